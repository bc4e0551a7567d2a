"""The link over gRPC on loopback: order, sizes, breaks, and who is turned away."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from site_ends import frames, wait

from fedloom.errors import RunError
from fedloom.sites.grpc_link import PIECE_BYTES, GrpcServerLink, GrpcSiteLink, unreachable
from fedloom.sites.kit import Kit, read_kit
from fedloom.sites.link import CONNECTED, SERVER
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")

LARGEST = 5 * PIECE_BYTES


class Ends:
    """Kits of one project, and the links that a test opened."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, ThrowawayRoot()
        self.server_kit = read_kit(self.root.write(folder / "server", "server", "server"), "server")
        self.open: list[GrpcServerLink | GrpcSiteLink] = []
        self.refused: list[str] = []
        self.notes: list[str] = []

    def kit(self, name: str) -> Kit:
        return read_kit(self.root.write(self.folder / name, "client", name), "client")

    def server(self, port: int = 0, largest: int = LARGEST) -> GrpcServerLink:
        self.open.append(link := GrpcServerLink(f"127.0.0.1:{port}", self.server_kit, ("a", "b"), largest))
        return link

    def site(self, port: int, kit: Kit, largest: int = LARGEST) -> GrpcSiteLink:
        link = GrpcSiteLink(f"127.0.0.1:{port}", kit, largest, self.notes.append, self.refused.append)
        self.open.append(link)
        return link


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    found = Ends(tmp_path)
    yield found
    for link in reversed(found.open):
        link.close()


def test_frames_of_every_size_arrive_whole_and_in_order_both_ways(ends: Ends) -> None:
    server = ends.server()
    site = ends.site(server.port, ends.kit("a"))
    sizes = [0, 1, 100, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 3 * PIECE_BYTES + 7]
    sent = [bytes([n]) * size for n, size in enumerate(sizes)]
    wait(lambda: site.send(SERVER, b"hello"))
    assert frames(server, 1) == [("a", b"hello")]
    for data in sent:
        assert site.send(SERVER, data)
        assert server.send("a", data)
    assert [server.inbox.get(timeout=20) for _ in sent] == [("a", data) for data in sent]
    assert frames(site, len(sent) - 1) == [(SERVER, data) for data in sent if data]  # an empty one says: connected
    assert not server.send("b", b"it has not come")
    assert not server.send("paris", b"a stranger")
    assert not site.send("b", b"another site")


@pytest.mark.slow
def test_a_frame_of_300_mb_arrives_whole_both_ways(ends: Ends) -> None:
    size = 300_000_000
    server = ends.server(largest=size)
    site = ends.site(server.port, ends.kit("a"), size)
    data = bytes(size - 1) + b"x"
    wait(lambda: site.send(SERVER, b"hello"))
    frames(server, 1)
    assert site.send(SERVER, data)
    assert server.inbox.get(timeout=120) == ("a", data)
    assert server.send("a", data)
    until = time.monotonic() + 120
    while (got := site.inbox.get(timeout=120)[1]) == CONNECTED and time.monotonic() < until:
        pass
    assert got == data


def test_a_thousand_small_frames_arrive_in_order(ends: Ends) -> None:
    server = ends.server()
    site = ends.site(server.port, ends.kit("b"))
    wait(lambda: site.send(SERVER, b"hello"))

    def send() -> None:
        for number in range(1000):
            assert site.send(SERVER, str(number).encode())

    sender = threading.Thread(target=send)
    sender.start()
    assert frames(server, 1001)[1:] == [("b", str(number).encode()) for number in range(1000)]
    sender.join()


def test_a_name_that_the_study_does_not_have_is_turned_away(ends: Ends) -> None:
    server = ends.server()
    ends.site(server.port, ends.kit("paris"))
    wait(lambda: ends.refused)
    assert "paris is not a site of this study" in ends.refused[0]
    assert server.inbox.empty()


def test_a_certificate_of_another_project_gets_no_frame_through(ends: Ends, tmp_path: Path) -> None:
    server, other = ends.server(), Ends(tmp_path / "other")
    site = ends.site(server.port, other.kit("a"))
    own, theirs = ends.kit("a"), other.kit("a")
    mixed = ends.site(server.port, Kit(theirs.key, theirs.certificate, own.root, "a"))
    for _ in range(20):
        site.send(SERVER, b"x")
        mixed.send(SERVER, b"x")
        time.sleep(0.05)
    with pytest.raises(queue.Empty):
        server.inbox.get(timeout=0.5)
    wait(lambda: ends.notes)
    assert "certificate does not fit" in "".join(ends.notes)


@pytest.mark.parametrize("days", [-3, 3], ids=["expired", "not valid yet"])
def test_a_certificate_that_is_not_valid_today_gets_no_frame_through_either(days: int, ends: Ends) -> None:
    """The site's own check of its kit, which would have refused it, is left out here."""
    server = ends.server()
    folder = ends.root.write(ends.folder / "old", "client", "a", datetime.now(UTC) + timedelta(days=days))
    key, certificate, root = ((folder / name).read_bytes() for name in ("client.key", "client.crt", "rootCA.pem"))
    site = ends.site(server.port, Kit(key, certificate, root, "a"))
    for _ in range(10):
        site.send(SERVER, b"x")
        time.sleep(0.05)
    with pytest.raises(queue.Empty):
        server.inbox.get(timeout=0.5)


def test_who_shows_no_certificate_gets_no_frame_through(ends: Ends) -> None:
    import grpc

    server, link = ends.server(), ends.kit("a")
    with grpc.secure_channel(f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(link.root)) as channel:
        stream = channel.stream_stream("/fedloom.Sites/Session")(iter([b"\x01x"]))
        with pytest.raises(grpc.RpcError):
            next(stream)
    assert server.inbox.empty()


def test_a_client_without_tls_gets_nothing(ends: Ends) -> None:
    server = ends.server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"x" * 100)
        plain.settimeout(5)
        assert b"fedloom" not in plain.recv(1000)
    assert server.inbox.empty()


def test_a_frame_that_is_too_long_ends_the_stream_and_the_next_one_comes_in(ends: Ends) -> None:
    server = ends.server()
    site = ends.site(server.port, ends.kit("a"))
    wait(lambda: site.send(SERVER, b"hello"))
    site.send(SERVER, b"x" * (LARGEST + 1))
    assert frames(server, 1) == [("a", b"hello")]

    def comes_in() -> bool:
        site.send(SERVER, b"again")
        time.sleep(0.1)
        return not server.inbox.empty()

    wait(comes_in)
    assert server.inbox.get() == ("a", b"again")


def test_a_site_dials_again_after_the_server_came_back(ends: Ends) -> None:
    server = ends.server()
    site = ends.site(server.port, ends.kit("a"))
    wait(lambda: site.send(SERVER, b"one"))
    assert frames(server, 1) == [("a", b"one")]
    server.close()
    wait(lambda: not site.send(SERVER, b"lost"))
    again = ends.server(server.port)
    wait(lambda: site.send(SERVER, b"two"))
    wait(lambda: ("a", b"two") in list(again.inbox.queue))
    wait(lambda: [data for _, data in list(site.inbox.queue)].count(CONNECTED) >= 2)
    assert not again.send("b", b"nobody")


def test_the_newer_of_two_connections_of_one_name_counts(ends: Ends) -> None:
    server, kit = ends.server(), ends.kit("a")
    first = ends.site(server.port, kit)
    wait(lambda: first.send(SERVER, b"one"))
    frames(server, 1)
    second = ends.site(server.port, kit)
    wait(lambda: second.send(SERVER, b"two"))
    assert frames(server, 1) == [("a", b"two")]
    wait(lambda: server.send("a", b"for the second"))
    assert frames(second, 1) == [(SERVER, b"for the second")]
    wait(lambda: ends.notes)
    assert "a newer connection of a took this one's place: is a second site of this name running?" in ends.notes[0]
    assert not first.send(SERVER, b"three")  # it does not push the second one out at once
    assert server.connections["a"] == 2


def test_a_taken_port_is_one_line(ends: Ends) -> None:
    server = ends.server()
    with pytest.raises(RunError, match=r"sites\.address: expected .* got 127\.0\.0\.1:\d+ \(address already in use\)"):
        ends.server(server.port)


def test_nothing_listens_beyond_loopback(ends: Ends) -> None:
    port = f":{ends.server().port:04X}"
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(port)]
    mapped = "0000000000000000FFFF0000"  # how the system writes an IPv4 address of a socket for both
    assert [address.removeprefix(mapped) for address in listening] == [f"0100007F{port}"]


def test_an_address_where_nobody_listens_is_said(ends: Ends) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert unreachable(f"127.0.0.1:{port}", ends.kit("a")) == "no connection (connection refused)"


@pytest.mark.parametrize(
    ("days", "told"), [(-3, "valid from"), (3, "valid from")], ids=["expired", "not valid yet, or a clock that is off"]
)
def test_a_certificate_that_is_not_valid_today_is_one_line(ends: Ends, days: int, told: str) -> None:
    folder = ends.root.write(ends.folder / "old", "client", "a", datetime.now(UTC) + timedelta(days=days))
    with pytest.raises(RunError, match=told):
        read_kit(folder, "client")


def test_a_kit_of_two_projects_and_one_that_is_not_there_are_one_line(ends: Ends, tmp_path: Path) -> None:
    ends.kit("a")
    ThrowawayRoot().write(tmp_path / "other", "client", "a")
    (tmp_path / "a" / "rootCA.pem").write_bytes((tmp_path / "other" / "rootCA.pem").read_bytes())
    with pytest.raises(RunError, match="one of another project"):
        read_kit(tmp_path / "a", "client")
    with pytest.raises(RunError, match="expected a file of the kit"):
        read_kit(tmp_path / "none", "client")
    (tmp_path / "a" / "client.crt").write_text("no certificate")
    with pytest.raises(RunError, match="got something else"):
        read_kit(tmp_path / "a", "client")


def test_the_private_key_is_the_owners_alone(ends: Ends) -> None:
    ends.kit("a")
    assert (ends.folder / "a" / "client.key").stat().st_mode & 0o077 == 0
