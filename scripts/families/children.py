"""Try kinds in processes of their own, with a limit of time and memory: one that fails ends alone.

The processes are forked from one that has imported everything, so each begins at once.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tiny_decoders import tiny_decoder
from trial import Findings, try_kind

CPU_SECONDS = 120
"""Of its own time, so that a busy machine changes nothing."""
MEMORY_BYTES = 8 << 30


def try_kinds(kinds: Sequence[str], workers: int, on_each: Callable[[Findings, int], None]) -> dict[str, Findings]:
    """Return the findings of all kinds; ``on_each`` is told each, with how many are done."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork of a process with threads of torch would wait for them
    for kind in ("llama", "qwen3_moe"):
        tiny_decoder(kind)  # imports what all kinds need
    found: dict[str, Findings] = {}
    with tempfile.TemporaryDirectory() as folder:
        for result in _ended(list(kinds), workers, Path(folder)):
            found[result.kind] = result
            on_each(result, len(found))
    return found


def _ended(waiting: list[str], workers: int, folder: Path) -> Iterator[Findings]:
    running: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            kind = waiting.pop(0)
            running[_begun(kind, folder / kind)] = kind
        ended, status = os.wait()
        kind = running.pop(ended)
        yield _findings(kind, folder / kind, status)
        shutil.rmtree(folder / kind)


def _begun(kind: str, folder: Path) -> int:
    """Start a process that tries a kind; return its id."""
    folder.mkdir()
    if child := os.fork():
        return child
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    silence = os.open(os.devnull, os.O_WRONLY)  # progress bars of many loads
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        (folder / "found.json").write_text(json.dumps(asdict(try_kind(kind, folder))))
    except BaseException:
        (folder / "traceback").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def _findings(kind: str, folder: Path, status: int) -> Findings:
    if (folder / "found.json").is_file():
        return Findings(**json.loads((folder / "found.json").read_text()))
    if (folder / "traceback").is_file():
        return Findings(kind, wrong=[f"the trial: {(folder / 'traceback').read_text().strip().splitlines()[-1]}"])
    return Findings(kind, wrong=[f"the trial: ended by signal {os.WTERMSIG(status)}"])
