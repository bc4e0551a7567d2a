"""Time a round on Ray and through sites against one process and against bare gRPC; measure what a message needs.

    python benchmarks/engines.py                       # messages of 0.25, 8 and 100 MB
    python benchmarks/engines.py --megabytes 0.25 --rounds 31
    python benchmarks/engines.py memory --megabytes 400

A random base of narrow and very wide blocks, adapters on the latter, one row and one step a client and round, so that
training is short and messages are large; `fedit`, whose adapter crosses whole both ways every round. Three sites in
processes of their own (`fedloom site run`) over gRPC with mutual TLS on loopback, Ray with two workers and two clients,
the same two and three clients in one process, and as many bare gRPC streams (mutual TLS, the link's options and pieces)
over which as many bytes go both ways. All take turns round by round in one run; reported are medians and, for pairs,
the median of the ratios. A round's overhead is the time that the engine takes for the round beyond its slowest client's
training steps; of one process, beyond all clients' steps. That includes what a client does besides them: reading,
checking, making room for the adapter, writing, and at a site storing. Beside it stands the overhead beyond the slowest
site's own work, and with ``--kinds local-2 ray`` (or ``local-3 sites``) beyond a client's share of the round of one
process. What the server does with the updates afterwards is the same everywhere and left out.

Wanted are at most 0.1 s at 0.25 MB and twice bare gRPC at 8 and 100 MB. Met on Ray, and by sites beside their own
work (1.7 to 1.8 times at both, on two busy cores with preference); not beyond the training steps alone, since an answer
is synced to the disk before it leaves: docs/log.md has the parts. All kinds at once at 100 MB need 12 GB: name them one
by one.

``memory`` serves a study to sites, all in processes of their own, once at rank 1 and once with messages of so many
megabytes, and prints how many messages' size the peak of each process grows by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom import config
from fedloom.experiment.session import run
from fedloom.reporting.progress import SilentProgress
from fedloom.run_folder.reader import read_run
from fedloom.sites.grpc_link import _OPTIONS as OPTIONS
from fedloom.sites.grpc_link import PIECE_BYTES, GrpcServerLink
from fedloom.sites.kit import read_kit
from fedloom.sites.serving import serve
from fedloom.sites.study import resolve_study
from fedloom.sites.throwaway_certificates import ThrowawayRoot

NAMES = ("berlin", "oslo", "rome")
LONGEST = 1800.0
TARGETS, WIDTH = ("gate_proj", "up_proj", "down_proj"), 64
RAW = "/raw/Echo"
KINDS = ("local-2", "local-3", "ray", "sites")


@dataclass(frozen=True)
class Shape:
    """A base of wide blocks and a rank, whose adapter weighs about so many megabytes."""

    inner: int
    layers: int
    rank: int

    @property
    def megabytes(self) -> float:
        """The adapter's size in fp32."""
        return self.rank * (WIDTH + self.inner) * len(TARGETS) * self.layers * 4 / 1e6


SHAPES = {0.25: Shape(256, 2, 32), 8: Shape(5144, 4, 32), 100: Shape(32488, 8, 32), 400: Shape(65040, 8, 64)}


def write_base(folder: Path, shape: Shape) -> None:
    """Write a random base over bytes, most of it in the projections that are adapted."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Project:
    """Files of a study: a base, a row per site, kits and settings."""

    folder: Path
    shape: Shape
    num_rounds: int

    def write(self, names: Sequence[str]) -> None:
        """Write them."""
        write_base(self.folder / "base", self.shape)
        root = ThrowawayRoot()
        root.write(self.folder / "kit", "server", "server")
        for number in (2, 3):
            (self.folder / f"rows-{number}").mkdir()
        for number, name in enumerate(names):
            row = [{"instruction": f"say {name}", "context": "", "response": name}]
            for count in range(max(2, number + 1), 4):
                (self.folder / f"rows-{count}" / f"local_training_{number}.json").write_text(json.dumps(row))
            root.write(self.folder / name / "kit", "client", name)

    def recipe(self, rank: int) -> dict[str, dict[str, Any]]:
        """Return what the study and the recipe of one process have in common."""
        return {
            "model": {"base": str(self.folder / "base"), "tokenizer": "bytes", "target_modules": list(TARGETS)},
            "data": {"shape": "dolly", "template": "plain"},
            "method": {"name": "fedit", "ranks": rank},
            "federation": {"num_rounds": self.num_rounds},
            "training": {"local_steps": 1, "batch_size": 1, "learning_rate": 1e-3},
            "evaluation": {"every": 0},
        }

    def of_one_process(self, num_clients: int, **engine: Any) -> config.Settings:
        """Return the recipe that trains the first clients' rows."""
        document = self.recipe(self.shape.rank)
        document["data"]["path"] = str(self.folder / f"rows-{num_clients}")
        document["federation"]["num_clients"] = num_clients
        document |= {"partition": {"scheme": "natural"}, "engine": engine}
        return config.resolve(document, "the benchmark")

    def study(self, names: Sequence[str], rank: int, address: str) -> dict[str, dict[str, Any]]:
        """Return the study."""
        sites = {"names": list(names), "quorum": len(names), "address": address, "kit": str(self.folder / "kit")}
        return {**self.recipe(rank), "sites": {**sites, "deadline_s": LONGEST}}

    def site_file(self, name: str, address: str) -> Path:
        """Write a site's file and return its path."""
        number, path = NAMES.index(name), self.folder / name / "site.toml"
        folder = tempfile.mkdtemp(prefix="state-", dir=self.folder / name)
        tables = {
            "site": {"name": name, "server": address, "kit": str(self.folder / name / "kit"), "folder": folder},
            "data": {"path": str(self.folder / "rows-3" / f"local_training_{number}.json")},
            "model": {"base": str(self.folder / "base"), "tokenizer": "bytes"},
            "policy": {"confirm": "never", "max_rank": 1024},
        }
        path.write_text(toml(tables))
        return path


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Write tables as TOML."""
    return "\n".join(
        line
        for name, table in tables.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    )


@contextmanager
def processes(*commands: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run commands of this Python, and end them."""
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        started = []
        for command in commands:
            started.append(subprocess.Popen([sys.executable, *command], stdout=log, stderr=log))
            stack.callback(started[-1].wait)
            stack.callback(started[-1].kill)
        yield started


class Turn(SilentProgress):
    """Lets a run go one round at a time, and takes its records."""

    def __init__(self, work: Callable[[Turn], object]) -> None:
        self._go, self._records = threading.Semaphore(0), queue.Queue[Any]()
        self._is_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Turn], object]) -> None:
        try:
            work(self)
        except BaseException as error:
            self._records.put(error)
            raise

    @property
    def thread(self) -> int:
        """The thread that works."""
        return self._thread.ident or 0

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        """Wait for the first turn."""
        self._is_begun.set()
        self._go.acquire()

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Hand the record over and wait for the next turn."""
        self._records.put(record)
        self._go.acquire()

    def next(self) -> Mapping[str, Any]:
        """Let one round go, and return its record."""
        self._is_begun.wait(LONGEST)
        self._go.release()
        found = self._records.get(timeout=LONGEST)
        if isinstance(found, BaseException):
            raise found
        record: Mapping[str, Any] = found
        return record

    def end(self) -> None:
        """Let the run finish."""
        self._go.release()
        self._thread.join(LONGEST)


class RawStreams:
    """Bare gRPC: as many streams as clients, over each of which so many bytes go down and come back."""

    def __init__(self, folder: Path, num_clients: int, num_bytes: int) -> None:
        import grpc

        kit = read_kit(folder / "kit", "server")
        self._pieces = [bytes(min(PIECE_BYTES, num_bytes - at)) for at in range(0, num_bytes, PIECE_BYTES)]
        self._go = [queue.Queue[bool]() for _ in range(num_clients)]
        self._came = queue.Queue[int]()
        self._free = queue.Queue[int]()
        for number in range(num_clients):
            self._free.put(number)
        self._server = grpc.server(ThreadPoolExecutor(2 * num_clients + 2), options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        service, method = RAW.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        credentials = grpc.ssl_server_credentials([(kit.key, kit.certificate)], kit.root, require_client_auth=True)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        self._wanted = num_bytes

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        number = self._free.get()
        threading.Thread(target=self._take, args=(number, requests), daemon=True).start()
        while self._go[number].get():
            yield from self._pieces

    def _take(self, number: int, requests: Iterator[bytes]) -> None:
        size = 0
        with contextlib.suppress(Exception):  # gRPC has no public name for a stream that ends
            for piece in requests:
                size += len(piece)
                if size >= self._wanted or not piece:
                    size = 0
                    self._came.put(number)

    def wait_for_all(self) -> None:
        """Wait until every client has said that it is there."""
        for _ in self._go:
            self._came.get(timeout=LONGEST)

    def seconds(self) -> float:
        """Send the bytes to all, and return how long it takes until all have come back."""
        begun = time.perf_counter()
        for one in self._go:
            one.put(True)
        self.wait_for_all()
        return time.perf_counter() - begun

    def close(self) -> None:
        """End it."""
        for one in self._go:
            one.put(False)
        self._server.stop(1.0).wait()


def answer_raw(address: str, kit_folder: str, num_bytes: int) -> None:
    """Be a client of :class:`RawStreams`: send back as many bytes as came."""
    import grpc

    kit = read_kit(Path(kit_folder), "client")
    pieces = [bytes(min(PIECE_BYTES, num_bytes - at)) for at in range(0, num_bytes, PIECE_BYTES)]
    out: queue.Queue[bytes] = queue.Queue(maxsize=8)
    credentials = grpc.ssl_channel_credentials(kit.root, kit.key, kit.certificate)
    with grpc.secure_channel(address, credentials, options=OPTIONS) as channel:
        stream = channel.stream_stream(RAW)(iter(out.get, None))
        out.put(b"")
        size = 0
        for piece in stream:
            size += len(piece)
            if size >= num_bytes:
                size = 0
                for one in pieces:
                    out.put(one)


@dataclass
class Times:
    """Seconds of rounds: of the engine, of its slowest client's training and all its work, and of bare gRPC."""

    engine: list[float]
    training: list[float]
    raw: list[float]
    client: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> list[float]:
        """Seconds beyond the training."""
        return [a - b for a, b in zip(self.engine, self.training, strict=True)]


def num_clients_of(kind: str) -> int:
    """Return how many clients a kind has."""
    return 2 if kind in ("ray", "local-2") else 3


def free_address() -> str:
    """Return an address of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def time_rounds(shape: Shape, repeats: int, kinds: Sequence[str]) -> None:
    """Let all engines take turns, and print what a round costs beyond its training."""
    with tempfile.TemporaryDirectory(prefix="engines-") as name, ExitStack() as stack:
        project = Project(Path(name), shape, repeats + 1)
        project.write(NAMES)
        raws: dict[int, RawStreams] = {}
        num_bytes = int(shape.megabytes * 1e6)
        for count in sorted({num_clients_of(kind) for kind in kinds}):
            raw = raws[count] = RawStreams(project.folder, count, num_bytes)
            stack.callback(raw.close)
            place = f"127.0.0.1:{raw.port}"
            kits = [str(project.folder / NAMES[number] / "kit") for number in range(count)]
            stack.enter_context(processes(*([__file__, "answer", "--raw", place, kit, str(num_bytes)] for kit in kits)))
            raw.wait_for_all()
        turns = start_all(project, kinds, stack)
        times = {kind: Times([], [], []) for kind in turns}
        for _ in range(repeats + 1):
            for kind, turn in turns.items():
                record = turn.next()
                add(times[kind], record, kind)
                times[kind].raw.append(raws[num_clients_of(kind)].seconds())
        for turn in turns.values():
            turn.end()
    report(shape, times)


def start_all(project: Project, kinds: Sequence[str], stack: ExitStack) -> dict[str, Turn]:
    """Start a run of each kind."""
    turns: dict[str, Turn] = {}
    out = project.folder

    def local(num_clients: int, **engine: Any) -> Callable[[Turn], object]:
        settings = project.of_one_process(num_clients, **engine)
        return lambda turn: run(settings, out / f"run-{num_clients}-{len(engine)}", progress=turn)

    for count in (2, 3):
        if f"local-{count}" in kinds:
            turns[f"local-{count}"] = Turn(local(count))
    if "ray" in kinds:
        turns["ray"] = Turn(local(2, name="ray", workers=2))
    if "sites" in kinds:
        address = free_address()
        study = resolve_study(project.study(NAMES, project.shape.rank, address), "the benchmark")
        kit = read_kit(out / "kit", "server")
        turns["sites"] = Turn(
            lambda turn: serve(
                study,
                out / "run-sites",
                lambda study, largest: GrpcServerLink(address, kit, NAMES, largest),
                progress=turn,
            )
        )
        commands = [["-m", "fedloom", "site", "run", str(project.site_file(name, address))] for name in NAMES]
        stack.enter_context(processes(*commands))
    return turns


def add(times: Times, record: Mapping[str, Any], kind: str) -> None:
    """Take a round's record in."""
    training = [client["seconds"] for client in record["clients"]]
    assert all(client["reason"] is None for client in record["clients"]), record["clients"]
    times.engine.append(record["seconds"]["train"])
    times.training.append(sum(training) if kind.startswith("local") else max(training))
    times.client.append(max((site["seconds"] for site in record.get("sites", ())), default=times.training[-1]))


def report(shape: Shape, times: Mapping[str, Times]) -> None:
    """Print medians; the first round of each is left out."""
    print(f"messages of {shape.megabytes:.2f} MB each way, {os.getloadavg()[0]:.1f} load, medians")
    for kind, found in times.items():
        overhead, raw = found.overhead[1:], found.raw[1:]
        ratios = [a / b for a, b in zip(overhead, raw, strict=True)]
        print(
            f"  {kind:8s} round {statistics.median(found.engine[1:]):7.3f} s, beyond training {spread(overhead)} s, "
            f"bare gRPC {statistics.median(raw):.3f} s, ratio {spread(ratios)}"
        )
        if kind == "sites":
            tell_beyond("the slowest site's work", found.engine[1:], found.client[1:], raw)
        count = num_clients_of(kind)
        alone = times.get(f"local-{count}")
        if alone is not None and alone is not found:
            one = [seconds / count for seconds in alone.engine[1:]]
            tell_beyond("a client of one process", found.engine[1:], one, raw)


def tell_beyond(what: str, engine: Sequence[float], without: Sequence[float], raw: Sequence[float]) -> None:
    """Print what rounds cost beyond something, and how many times bare gRPC that is."""
    beyond = [a - b for a, b in zip(engine, without, strict=True)]
    ratios = [a / b for a, b in zip(beyond, raw, strict=True)]
    print(f"           beyond {what} {spread(beyond)} s, ratio {spread(ratios)}")


def spread(values: Sequence[float]) -> str:
    """Write a median with its range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)})"


def measure_memory(shape: Shape, num_rounds: int, num_sites: int) -> None:
    """Print by how many messages the peak of server, site and trainer exceeds that of a run at rank 1."""
    small, large = (peaks_at(shape, rank, num_rounds, NAMES[:num_sites]) for rank in (1, shape.rank))
    for who, peak in large.items():
        grown = peak - small[who]
        print(f"  {who:8s} peak {peak:6.0f} MB, {grown:6.0f} MB above rank 1: {grown / shape.megabytes:.2f} messages")


def peaks_at(shape: Shape, rank: int, num_rounds: int, names: Sequence[str]) -> dict[str, float]:
    """Serve a study at this rank to its end, and return the peaks of its processes."""
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        project = Project(Path(name), shape, num_rounds)
        project.write(NAMES)
        address = free_address()
        study = project.folder / "study.toml"
        study.write_text(toml(project.study(names, rank, address)))
        serving = ["-m", "fedloom", "serve", str(study), "--out", str(project.folder / "run")]
        sites = [["-m", "fedloom", "site", "run", str(project.site_file(one, address))] for one in names]
        with processes(serving, *sites) as started:
            peaks = peaks_of(started)
            assert started[0].returncode == 0, "the server failed"
        assert read_run(project.folder / "run").finished is not None
    return peaks


def peaks_of(started: Sequence[subprocess.Popen[bytes]]) -> dict[str, float]:
    """Follow processes until the first ends; return the largest peak of server, site and trainer, in MB."""
    peaks = dict.fromkeys(("server", "site", "trainer"), 0.0)
    while started[0].poll() is None:
        time.sleep(0.05)
        for number, process in enumerate(started):
            children = psutil.Process(process.pid).children() if number else []
            for who, pid in [("site" if number else "server", process.pid), *(("trainer", c.pid) for c in children)]:
                peaks[who] = max(peaks[who], peak_of(pid))
    return peaks


def peak_of(pid: int) -> float:
    """Return a process's peak of resident memory in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["rounds", "memory", "answer"], default="rounds")
    parser.add_argument("--megabytes", type=float, nargs="+", default=None, choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sites", type=int, default=1, help="sites of `memory`")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--raw", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "answer":
        address, kit, num_bytes = options.raw
        answer_raw(address, kit, int(num_bytes))
    elif options.what == "memory":
        for size in options.megabytes or [400]:
            print(f"messages of {SHAPES[size].megabytes:.2f} MB", flush=True)
            measure_memory(SHAPES[size], 2, options.sites)
    else:
        for size in options.megabytes or [0.25, 8, 100]:
            time_rounds(SHAPES[size], options.rounds, options.kinds)


if __name__ == "__main__":
    main()
