"""The link over gRPC: the site dials, one stream carries frames both ways, both ends show a certificate.

A site's name is the common name of its certificate, which the server's root has signed; nothing a site says can change
it. A site dials again after every break. Frames go in pieces; a sender puts no more than :data:`FRAMES_WAITING` of them
in a row, and a receiver takes in no longer ones than it was told.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedloom.errors import MissingExtraError, RunError
from fedloom.federation.blob import Checked
from fedloom.federation.buffers import Buffer, room_for
from fedloom.sites.frames import compared
from fedloom.sites.kit import Kit
from fedloom.sites.link import CONNECTED, SERVER, Frame, cut, offered, size_of

PIECE_BYTES = 2 << 20
FRAMES_WAITING = 8
_SERVICE, _METHOD = "fedloom.Sites", "Session"
_OPTIONS = [
    ("grpc.max_receive_message_length", PIECE_BYTES + 64),
    ("grpc.max_send_message_length", PIECE_BYTES + 64),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]
_MORE, _LAST, _FIRST, _LENGTH_BYTES = b"\x00", b"\x01", b"\x02", 8
_LONGEST_WAIT = 5.0
_WAIT_FOR_TWIN = 30.0


class GrpcServerLink:
    """The server's end: sites by the name in their certificates; others are turned away."""

    def __init__(self, address: str, kit: Kit, names: tuple[str, ...], largest_frame: int) -> None:
        """Listen.

        Raises:
            RunError: the port is taken, or the address is not this machine's.
            MissingExtraError: gRPC is not installed.
        """
        grpc = required_grpc()
        self.inbox: queue.Queue[tuple[str, Frame | Checked]] = queue.Queue(maxsize=64 * len(names))
        self.connections: Counter[str] = Counter()
        self._names, self._largest, self._lock = frozenset(names), largest_frame, threading.Lock()
        self._out: dict[str, queue.Queue[Frame | None]] = {}
        self._codes = grpc.StatusCode
        self._server = grpc.server(ThreadPoolExecutor(2 * len(names) + 4), options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        credentials = grpc.ssl_server_credentials(
            [(kit.key, kit.certificate)], root_certificates=kit.root, require_client_auth=True
        )
        check_free(address)
        try:
            bound = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise RunError(_port_taken(address, "the system refused it"))
        self.port = bound
        self._server.start()

    def send(self, to: str, frame: Frame) -> bool:
        """Put a frame into the site's stream; False where it has none, or does not take it in."""
        with self._lock:
            out = self._out.get(to)
        return out is not None and offered(out, frame)

    def close(self) -> None:
        """Let what waits go out, and end every stream."""
        with self._lock:
            waiting = list(self._out.values())
        for out in waiting:
            _end(out)
        self._server.stop(2.0).wait()

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
        name = names[0] if names else ""
        if name not in self._names:
            context.abort(self._codes.PERMISSION_DENIED, f"{name[:100]} is not a site of this study")
        out: queue.Queue[Frame | None] = queue.Queue(maxsize=FRAMES_WAITING)
        with self._lock:
            former, self._out[name] = self._out.get(name), out
            self.connections[name] += 1
        if former is not None:
            _end(former)  # the newer connection of a site is the one that counts
        context.add_callback(lambda: _end(out))
        threading.Thread(target=self._listen, args=(name, requests, out, context), daemon=True).start()
        try:
            yield from _outgoing(out)
            if self._out.get(name, out) is not out:
                context.abort(self._codes.ABORTED, f"a newer connection of {name} took this one's place")
        finally:
            with self._lock:
                if self._out.get(name) is out:
                    del self._out[name]

    def _listen(self, name: str, requests: Iterator[bytes], out: queue.Queue[Frame | None], context: Any) -> None:
        try:
            for frame in _frames(requests, self._largest):
                self.inbox.put((name, compared(frame)))
                del frame  # while the next one is waited for, this one is not held
        except Exception:  # gRPC has one error for every way in which a stream ends, and no public name for it
            context.cancel()
        _end(out)


class GrpcSiteLink:
    """A site's end: it dials, and dials again after every break."""

    def __init__(
        self,
        address: str,
        kit: Kit,
        largest_frame: int,
        note: Callable[[str], None],
        refused: Callable[[str], None],
        room: Callable[[int], memoryview] = room_for,
    ) -> None:
        """Dial; ``refused`` is told where the server turns this site away for good, ``room`` is where frames are put.

        Raises:
            MissingExtraError: gRPC is not installed.
        """
        self._grpc = required_grpc()
        self.inbox: queue.Queue[tuple[str, Frame | Checked]] = queue.Queue()
        self.connections: Counter[str] = Counter()
        self._address, self._kit, self._largest = address, kit, largest_frame
        self._note, self._refused, self._room = note, refused, room
        self._lock, self._out = threading.Lock(), None
        self._channel: Any = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    _out: queue.Queue[Frame | None] | None

    def send(self, to: str, frame: Frame) -> bool:
        """Put a frame into the stream; False where there is none."""
        with self._lock:
            out = self._out
        return out is not None and to == SERVER and offered(out, frame)

    def close(self) -> None:
        """Let what waits go out, and end the stream."""
        self._is_closed.set()
        with self._lock:
            out, channel = self._out, self._channel
        if out is not None:
            _end(out)
        self._thread.join(2.0)
        if channel is not None:
            channel.close()

    def _run(self) -> None:
        wait, told = 0.2, ""
        while not self._is_closed.is_set():
            error = self._session()
            if error is None:
                wait, told = 0.2, ""
            elif error.code() == self._grpc.StatusCode.PERMISSION_DENIED:
                self._refused(f"{self._address}: the server turned this site away: {error.details()}")
                return
            elif error.code() == self._grpc.StatusCode.ABORTED:
                wait = _WAIT_FOR_TWIN
                self._note(f"{self._address}: {error.details()}: is a second site of this name running? trying again "
                           f"in {wait:g} s")  # fmt: skip
            elif error.code() == self._grpc.StatusCode.UNAVAILABLE:
                why = unreachable(self._address, self._kit) or "the connection ended"
                if why != told:
                    told = why
                    self._note(f"{self._address}: {why}; trying again")
            self._is_closed.wait(wait)
            wait = min(wait * 2, _LONGEST_WAIT) if wait < _WAIT_FOR_TWIN else 0.2

    def _session(self) -> Any:
        """Carry one stream to its end; return its error, or None where frames came in and no newer stream ended it."""
        grpc, kit = self._grpc, self._kit
        credentials = grpc.ssl_channel_credentials(kit.root, kit.key, kit.certificate)
        channel = grpc.secure_channel(self._address, credentials, options=_OPTIONS)
        out: queue.Queue[Frame | None] = queue.Queue(maxsize=FRAMES_WAITING)
        has_come = False
        try:
            stream = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(_outgoing(out))
            with self._lock:
                self._out, self._channel = out, channel
            self.connections[SERVER] += 1
            self.inbox.put((SERVER, CONNECTED))
            for frame in _frames(stream, self._largest, self._room):
                has_come = True
                self.inbox.put((SERVER, frame))
                del frame
        except grpc.RpcError as error:
            return error if not has_come or error.code() == grpc.StatusCode.ABORTED else None
        except ValueError:
            return None
        finally:
            with self._lock:
                self._out = self._channel = None
            _end(out)
            channel.close()
        return None


def unreachable(address: str, kit: Kit) -> str | None:
    """Say why a server cannot be reached, by trying; None where a handshake succeeds."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=kit.root.decode())
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as plain:
            context.wrap_socket(plain, server_hostname=host.strip("[]")).close()
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate does not fit: {error.verify_message}"
    except ssl.SSLError as error:
        if "CERTIFICATE_REQUIRED" in str(error).upper() or "ALERT" in str(error).upper():
            return None
        return f"the server does not speak TLS as it should ({error.reason})"
    except OSError as error:
        return f"no connection ({(error.strerror or str(error)).lower()})"
    return None


def required_grpc() -> Any:
    """Return gRPC.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import grpc
    except ImportError as error:
        raise MissingExtraError("sites", "training across sites") from error
    return grpc


def check_free(address: str) -> None:
    """Check that an address can be listened on; gRPC and FLARE say no more than that it failed.

    Raises:
        RunError: it cannot.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        raise RunError(_port_taken(address, (error.strerror or str(error)).lower())) from error


def _port_taken(address: str, reason: str) -> str:
    return (
        f"sites.address: expected an address of this machine with a free port, got {address} ({reason}); end what "
        "listens there, or set another"
    )


def _end(out: queue.Queue[Frame | None]) -> None:
    """Ask the sender of a stream to end, whatever waits in front of it."""
    while True:
        try:
            out.put_nowait(None)
        except queue.Full:
            try:
                out.get_nowait()
            except queue.Empty:
                continue
        else:
            return


def _outgoing(out: queue.Queue[Frame | None]) -> Iterator[bytes]:
    while (frame := out.get()) is not None:
        beginning = _FIRST + size_of(frame).to_bytes(_LENGTH_BYTES, "little")
        for piece, is_last in cut(frame, PIECE_BYTES):
            yield b"".join([_LAST if is_last else beginning, *piece])
            beginning = _MORE
        del frame  # nothing is held while there is nothing to send


def _frames(stream: Iterator[bytes], largest: int, room: Callable[[int], memoryview] = room_for) -> Iterator[Buffer]:
    """Yield whole frames, in memory that ``room`` gives; the first of several pieces says how long they are together.

    Raises:
        ValueError: one is longer than the receiver takes in, or than it says.
    """
    frame, taken = memoryview(b""), 0
    for piece in stream:
        kind, part = piece[:1], memoryview(piece)[1:]
        if kind == _FIRST:
            size, part = int.from_bytes(part[:_LENGTH_BYTES], "little"), part[_LENGTH_BYTES:]
            if size > largest or taken:
                raise ValueError("a frame is too long, or begins within another")
            frame = room(size)
        elif not taken:
            frame = room(len(part) if len(part) <= largest else 0)
        if taken + len(part) > len(frame):
            raise ValueError("a frame is too long")
        frame[taken : taken + len(part)] = part
        taken += len(part)
        if kind == _LAST:
            if taken < len(frame):
                raise ValueError("a frame is too short")
            whole, frame, taken = frame, memoryview(b""), 0
            yield whole
            del whole
