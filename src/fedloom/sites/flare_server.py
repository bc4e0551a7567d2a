"""fedloom's part of FLARE's server process: it passes pieces on, and says which site sent them.

It is named in the kit's ``local/resources.json`` and loaded by FLARE, never by fedloom itself.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.private.defs import CellMessageHeaderKeys

from fedloom.sites.flare_pipe import (
    CHANNEL,
    CONNECTED,
    DOWN,
    GONE,
    NAMES,
    PIECE,
    STARTED,
    STRANGER,
    UP,
    Event,
    Lanes,
    Pipe,
    Place,
    end_with_starter,
    seconds_for,
)

_LOOK_SECONDS = 2.0
_GONE = {ReturnCode.INVALID_TARGET, ReturnCode.TARGET_UNREACHABLE}


class FedloomServer(FLComponent):  # type: ignore[misc]
    """The server's end of the link, as FLARE sees it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_read = end_with_starter(os.environ)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Begin when FLARE's server has started."""
        if event_type != EventType.SYSTEM_START:
            return
        self._is_read.set()
        pipe = Pipe.of_environment(os.environ)
        if pipe is None:
            self.log_error(fl_ctx, "this kit is started by `fedloom serve`, not by itself; no study is served")
            return
        self._pipe, self._names = pipe, frozenset(json.loads(os.environ[NAMES]))
        self._connected: set[str] = set()
        engine = fl_ctx.get_engine()
        self._members, self._cell = engine.client_manager, engine.get_cell()
        self._cell.register_request_cb(channel=CHANNEL, topic=UP, cb=self._take)
        lanes = Lanes(pipe, self._post)
        threading.Thread(target=lanes.run, args=(self._names,), name="fedloom", daemon=True).start()
        threading.Thread(target=self._look, name="fedloom sites", daemon=True).start()
        pipe.put(Event(STARTED))

    def _take(self, message: Any) -> Any:
        name = self._proven(message)
        if name is None:
            return make_reply(ReturnCode.UNAUTHENTICATED)
        if name not in self._names:
            return make_reply(ReturnCode.OK, body=STRANGER)
        if name not in self._connected:
            self._connected.add(name)
            self._pipe.put(Event(CONNECTED, name))
        place = Place.of(message.get_header)
        if place is not None:
            self._pipe.put(Event(PIECE, name, place, bytes(message.payload)))
        return make_reply(ReturnCode.OK, body=b"")

    def _proven(self, message: Any) -> str | None:
        """Return the name under which the sender's token is registered, where the message says no other.

        FLARE has checked the token's signature; it does not compare names while a token is not registered, as after
        a restart. Then nothing is taken in.
        """
        member = self._members.clients.get(message.get_header(CellMessageHeaderKeys.TOKEN))
        name = None if member is None else str(member.name)
        claims = {message.get_header(key) for key in (MessageHeaderKey.ORIGIN, CellMessageHeaderKeys.CLIENT_NAME)}
        return name if claims == {name} and not self._members.is_client_disabled(name) else None

    def _post(self, to: str, place: Place, data: bytes) -> bool:
        if to not in self._connected:
            return False  # what waited for a site that left is not for the one that comes back
        try:
            reply = self._cell.send_request(
                channel=CHANNEL,
                topic=DOWN,
                target=to,
                request=new_cell_message(place.as_headers(), data),
                timeout=seconds_for(data),
                optional=True,
            )
        except Exception as error:  # FLARE has no error of its own for a receiver that leaves meanwhile
            self.logger.warning(f"no message to {to}: {error}")
            return False
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code in _GONE:
            self._leave(to)
        return bool(code == ReturnCode.OK)

    def _leave(self, name: str) -> None:
        if name in self._connected:
            self._connected.discard(name)
            self._pipe.put(Event(GONE, name))

    def _look(self) -> None:
        """Follow who has left, and who was turned away while the server runs."""
        path = Path(self._members.disabled_clients_file or "")
        read = 0.0
        while True:
            time.sleep(_LOOK_SECONDS)
            changed = path.stat().st_mtime if path.is_file() else 0.0
            if changed != read:
                read = changed
                for name in json.loads(path.read_text(encoding="utf-8"))["disabled_clients"]:
                    if not self._members.is_client_disabled(name):
                        self._members.disable_client(name)
            here = {client.name for client in self._members.get_clients().values()}
            for name in self._connected - here:
                self._leave(name)
