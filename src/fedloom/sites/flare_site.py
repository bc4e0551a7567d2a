"""fedloom's part of FLARE's process at a site: it passes pieces on, and looks whether the server is there.

It is named in the kit's ``local/resources.json`` and loaded by FLARE, never by fedloom itself.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from fedloom.sites.flare_pipe import (
    CHANNEL,
    CONNECTED,
    DOWN,
    GONE,
    PIECE,
    REFUSED,
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
from fedloom.sites.link import SERVER

_LOOK_SECONDS = 1.0


class FedloomSite(FLComponent):  # type: ignore[misc]
    """A site's end of the link, as FLARE sees it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_read = end_with_starter(os.environ)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Begin when the site is registered at the server."""
        if event_type != EventType.SYSTEM_START:
            return
        self._is_read.set()
        pipe = Pipe.of_environment(os.environ)
        if pipe is None:
            self.log_error(fl_ctx, "this kit is started by `fedloom site run`, not by itself; it takes no part")
            return
        self._pipe, self._is_connected, self._is_refused = pipe, threading.Event(), False
        self._cell = fl_ctx.get_engine().get_cell()
        self._cell.register_request_cb(channel=CHANNEL, topic=DOWN, cb=self._take)
        lanes = Lanes(pipe, self._post)
        threading.Thread(target=lanes.run, args=((SERVER,),), name="fedloom", daemon=True).start()
        threading.Thread(target=self._look, name="fedloom server", daemon=True).start()
        pipe.put(Event(STARTED))

    def _take(self, message: Any) -> Any:
        if message.get_header(MessageHeaderKey.ORIGIN) != SERVER:
            return make_reply(ReturnCode.UNAUTHENTICATED)
        place = Place.of(message.get_header)
        if place is not None:
            self._pipe.put(Event(PIECE, SERVER, place, bytes(message.payload)))
        return make_reply(ReturnCode.OK, body=b"")

    def _post(self, to: str, place: Place, data: bytes) -> bool:
        if not self._is_connected.is_set():
            return False  # what waited for a server that is gone must not keep the next one waiting
        is_sent = self._ask(place.as_headers(), data)
        if not is_sent:
            self._is_connected.clear()
            self._pipe.put(Event(GONE, SERVER))
        return is_sent

    def _ask(self, headers: dict[str, Any], data: bytes) -> bool:
        request = new_cell_message(headers, data)
        try:
            reply = self._cell.send_request(
                channel=CHANNEL, topic=UP, target=SERVER, request=request, timeout=seconds_for(data), optional=True
            )
        except Exception as error:  # FLARE has no error of its own for a connection that breaks meanwhile
            self.logger.warning(f"no message to the server: {error}")
            return False
        if reply.get_header(MessageHeaderKey.RETURN_CODE) != ReturnCode.OK:
            return False
        if reply.payload is not None and bytes(reply.payload) == STRANGER:
            if not self._is_refused:
                self._is_refused = True
                self._pipe.put(Event(REFUSED, SERVER))
            return False
        return True

    def _look(self) -> None:
        """Ask the server, while it is not there, until it answers."""
        while not self._is_refused:
            if not self._is_connected.is_set() and self._ask({}, b""):
                self._is_connected.set()
                self._pipe.put(Event(CONNECTED, SERVER))
            time.sleep(_LOOK_SECONDS)
