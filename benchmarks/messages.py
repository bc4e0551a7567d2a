"""What a large message costs at each end of a link: CPU seconds and peak memory, without network, model or training.

    python benchmarks/messages.py --megabytes 100 400

Three ends, each in a process of its own: the server writes a broadcast and cuts it into the gRPC link's pieces, a site
joins the pieces and checks the frame, and the process that trains there reads the frame. The pieces go through a file.
Memory is what the end needs at its peak beyond what it began with (Linux); for the first that is beyond the adapter.
"""

from __future__ import annotations

import argparse
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import broadcast_buffers, decode_broadcast
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Broadcast, News
from fedloom.sites.frames import TO_SITE, Task, framed, unframe, unframe_here
from fedloom.sites.grpc_link import _frames as joined
from fedloom.sites.grpc_link import _outgoing as pieces_of
from fedloom.sites.link import Frame

MODULES, RANK, LARGEST = 24, 32, 1 << 40


class Cost:
    """CPU seconds and growth of the peak of resident memory since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
        self._memory, self._cpu = mib("VmRSS"), time.process_time()

    def tell(self, what: str) -> None:
        """Print both."""
        spent, grown = time.process_time() - self._cpu, mib("VmHWM") - self._memory
        print(f"  {what:22s} {spent:6.2f} CPU s, {grown:6.0f} MiB", flush=True)


def mib(field: str) -> float:
    """Return a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def shapes_for(megabytes: float) -> dict[str, tuple[int, int]]:
    """Return modules whose adapter weighs so much in fp32."""
    side = int(megabytes * 1e6 / 4 / MODULES / RANK / 2)
    return {f"module.{number}": (side, side) for number in range(MODULES)}


def send(megabytes: float, file: Path) -> None:
    """Be the server."""
    start = Adapter(
        {
            name: Pair(torch.full((num_out, RANK), 0.5), torch.full((RANK, num_in), 0.5))
            for name, (num_out, num_in) in shapes_for(megabytes).items()
        }
    )
    broadcast = Broadcast(1, 0, RANK, 2.0, News(0, 0, (), False, ""), start)
    cost = Cost()
    outbox: queue.Queue[Frame | None] = queue.Queue()
    head = Task(run="ab" * 16, round=1, task="cd" * 32, counted=0)
    outbox.put(framed(head, broadcast_buffers(broadcast, WireDtype.FP32)))
    outbox.put(None)
    with file.open("wb") as out:
        for piece in pieces_of(outbox):
            out.write(len(piece).to_bytes(4, "little"))
            out.write(piece)
    cost.tell("the server sends")


def receive(megabytes: float, file: Path) -> None:
    """Be a site and its process that trains."""
    cost = Cost()
    frame = next(joined(pieces_in(file), LARGEST))
    unframe(frame, TO_SITE, LARGEST)
    cost.tell("a site takes it in")
    cost = Cost()
    _, body = unframe_here(frame, TO_SITE, LARGEST)
    received = decode_broadcast(body, shapes_for(megabytes))
    cost.tell("its trainer reads it")
    assert len(received.sent) == 2 * MODULES


def pieces_in(file: Path) -> Iterator[bytes]:
    """Read the pieces back."""
    with file.open("rb") as source:
        while length := source.read(4):
            yield source.read(int.from_bytes(length, "little"))


def main() -> None:
    """Run every end once per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100.0, 400.0])
    parser.add_argument("--end", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.end is not None:
        {"send": send, "receive": receive}[options.end[0]](options.megabytes[0], Path(options.end[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in options.megabytes:
            print(f"a message of {megabytes:g} MB ({megabytes * 1e6 / 2**20:.0f} MiB)", flush=True)
            for end in ("send", "receive"):
                own = ["--megabytes", str(megabytes), "--end", end, str(Path(folder) / "pieces")]
                subprocess.run([sys.executable, __file__, *own], check=True)


if __name__ == "__main__":
    main()
