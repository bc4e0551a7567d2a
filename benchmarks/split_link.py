"""Time a split step whose client is at a site against the step of one process and a bare round trip of as many bytes.

    python benchmarks/split_link.py
    python benchmarks/split_link.py --periods 9 --width 512

A random base of six blocks cut after the second, one client with rows of 64 bytes, 8 a step, `splitlora`, bf16 across
the cut. The site is a process of its own (`fedloom site run`) over gRPC with mutual TLS on loopback; the bare round
trip is that of `engines.py`: the bytes of a step's activations down one stream and back. Wanted is at most the step of
one process and one round trip. The kinds take turns period by period; reported are medians over steps, and of the
pairs of medians by period.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines import LONGEST, RawStreams, Turn, free_address, processes, spread, toml
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom import config
from fedloom.experiment.session import run
from fedloom.sites.grpc_link import GrpcServerLink
from fedloom.sites.kit import read_kit
from fedloom.sites.serving import serve
from fedloom.sites.study import resolve_study
from fedloom.sites.throwaway_certificates import ThrowawayRoot
from fedloom.split.period import Period

NAME, ROWS, STEPS, LENGTH = "oslo", 64, 20, 64


def write_files(folder: Path, width: int) -> None:
    """Write a base, rows and kits."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 6, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=2 * LENGTH, **shape)).save_pretrained(
        folder / "base"
    )
    rows = [{"instruction": f"{row:04d}" * 4, "context": "", "response": "x" * (LENGTH - 20)} for row in range(ROWS)]
    (folder / "rows").mkdir()
    (folder / "rows" / "local_training_0.json").write_text(json.dumps(rows))
    root = ThrowawayRoot()
    root.write(folder / "kit", "server", "server")
    root.write(folder / NAME / "kit", "client", NAME)


def tables(folder: Path, num_periods: int) -> dict[str, dict[str, Any]]:
    """Return what the study and the recipe of one process have in common."""
    return {
        "model": {"base": str(folder / "base"), "tokenizer": "bytes"},
        "data": {"shape": "dolly", "template": "plain"},
        "method": {"name": "splitlora", "ranks": 8},
        "federation": {"num_rounds": num_periods},
        "training": {"local_steps": STEPS, "batch_size": 8, "learning_rate": 1e-3},
        "split": {"cut_layer": 2, "aggregate_every": STEPS},
        "evaluation": {"every": 0},
    }


def site_file(folder: Path, address: str) -> Path:
    """Write the site's file and return its path."""
    path = folder / "site.toml"
    site = {"name": NAME, "server": address, "kit": str(folder / NAME / "kit"), "folder": str(folder / "state")}
    rows = {"path": str(folder / "rows" / "local_training_0.json")}
    model = {"base": str(folder / "base"), "tokenizer": "bytes"}
    path.write_text(toml({"site": site, "data": rows, "model": model, "policy": {"confirm": "never", "split": "yes"}}))
    return path


class StepTimes:
    """Seconds of every step, by the thread that took it."""

    def __init__(self) -> None:
        self.by_thread = defaultdict[int, list[float]](list)
        step = Period.step

        def timed(period: Period, number: int) -> float:
            begun = time.perf_counter()
            loss = step(period, number)
            self.by_thread[threading.get_ident()].append(time.perf_counter() - begun)
            return loss

        Period.step = timed  # type: ignore[method-assign]

    def last(self, turn: Turn) -> float:
        """Return the median step of the last period."""
        return statistics.median(self.by_thread[turn.thread][-STEPS:])


def start(folder: Path, num_periods: int, stack: ExitStack) -> dict[str, Turn]:
    """Start the run of one process and the served one."""
    recipe = tables(folder, num_periods)
    recipe["data"]["path"], recipe["federation"]["num_clients"] = str(folder / "rows"), 1
    settings = config.resolve({**recipe, "partition": {"scheme": "natural"}}, "the benchmark")
    address, kit = free_address(), read_kit(folder / "kit", "server")
    sites = {"names": [NAME], "quorum": 1, "address": address, "kit": str(folder / "kit"), "deadline_s": LONGEST}
    study = resolve_study({**tables(folder, num_periods), "sites": sites}, "the benchmark")
    turns = {
        "one process": Turn(lambda turn: run(settings, folder / "alone", progress=turn)),
        "over a link": Turn(
            lambda turn: serve(
                study,
                folder / "served",
                lambda study, largest: GrpcServerLink(address, kit, (NAME,), largest),
                progress=turn,
            )
        ),
    }
    stack.enter_context(processes(["-m", "fedloom", "site", "run", str(site_file(folder, address))]))
    return turns


def bytes_of_a_step(record: Mapping[str, Any]) -> int:
    """Return what goes up in a step, without the adapters that cross at the period's end."""
    return int(record["clients"][0]["upload_bytes"]) // STEPS


def main() -> None:
    """Let both kinds and the bare streams take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engines-") as name, ExitStack() as stack:
        folder, steps = Path(name), StepTimes()
        write_files(folder, options.width)
        turns = start(folder, options.periods + 1, stack)
        num_bytes = bytes_of_a_step(turns["one process"].next())
        turns["over a link"].next()
        raw = RawStreams(folder, 1, num_bytes)
        stack.callback(raw.close)
        place, kit = f"127.0.0.1:{raw.port}", str(folder / NAME / "kit")
        program = str(Path(__file__).with_name("engines.py"))
        stack.enter_context(processes([program, "answer", "--raw", place, kit, str(num_bytes)]))
        raw.wait_for_all()
        found: dict[str, list[float]] = {kind: [] for kind in (*turns, "round trip")}
        for _ in range(options.periods):
            for kind, turn in turns.items():
                turn.next()
                found[kind].append(steps.last(turn))
            found["round trip"].append(statistics.median(raw.seconds() for _ in range(STEPS)))
        for turn in turns.values():
            turn.end()
    print(f"steps of {num_bytes / 1e3:.0f} kB up, {os.getloadavg()[0]:.1f} load, seconds, medians")
    for kind, values in found.items():
        print(f"  {kind:12s} {spread(values)}")
    beyond = [a - b for a, b in zip(found["over a link"], found["one process"], strict=True)]
    print(f"  beyond one process {spread(beyond)}")
    print(
        f"  of a round trip    {spread([a / b for a, b in zip(beyond, found['round trip'], strict=True)])} (1 wanted)"
    )


if __name__ == "__main__":
    main()
