"""Every command that writes, small: what is there before it, what it is, and what its folder holds after it.

Figures that a clock or a process gives (seconds, memory, sessions, times) are no part of what is compared; nor are
TensorBoard's event files, of which every session writes one of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from faults.forked_commands import CRASHED, command, forked

from fedloom.run_folder.manifest import SEAL

_TIMED = {"seconds", "peak_memory_bytes", "sessions", "latency_seconds", "created"}
_HOLD_TIMES = {"record.json", "finished.json", "README.md", "update.json"}
_TIMES = re.compile(rb'"(?:seconds|latency_seconds)": ?[-+.e0-9]+|\b\d+(?:\.\d+)? (?:s|ms|MB|GB)\b')
_NOT_COMPARED = ("tensorboard/", ".fedloom.lock")
SMALL = (
    "federation.num_rounds=2", "federation.num_clients=3", "training.local_steps=1", "training.batch_size=2",
    "training.schedule=constant", "method.ranks=2", "model.tokenizer=bytes", "data.shape=dolly", "data.template=plain",
    "data.max_rows=", "data.eval_rows=4", "partition.scheme=iid", "partition.column=", "evaluation.suites=[]",
    "partition.categories_per_client=", "model.base=../inputs/base", "data.path=../inputs/rows.json",
)  # fmt: skip


def run_of(method: str, *settings: str, out: str = "run", more: Sequence[str] = ()) -> list[str]:
    """Return a small run of a method."""
    chosen = [*SMALL, f"method.name={method}", *settings]
    if method in ("standalone", "centralised", "base"):
        chosen = [one for one in chosen if not (method == "base" and one.startswith(("method.ranks", "training.")))]
    return ["run", "../inputs/recipe.toml", *[part for one in chosen for part in ("--set", one)], "--out", out, *more]


@dataclass(frozen=True)
class Writer:
    """A command that writes: its name, what is run before it, and its arguments."""

    name: str
    arguments: list[str]
    before: tuple[list[str], ...] = ()


def writers(port: int) -> list[Writer]:
    """Return every command that writes, each on its own; the judge is asked at ``port``."""
    done = (run_of("fedit"),)
    matched = ('evaluation.suites=["exact-match"]', "evaluation.max_new_tokens=2")
    judged = ["--endpoint", f"http://127.0.0.1:{port}/v1", "--judge", "m", "--questions", "../inputs/questions.jsonl"]
    cut = ("split.cut_layer=1", "split.aggregate_every=1", "split.client_rank=2", "split.server_rank=2")
    methods = "fedit,flora,base"
    tuned = ("--methods", "fedit,base", "--grid", "training.learning_rate=1e-3,1e-2")
    return [
        Writer("run, FedIT, all kept", run_of("fedit", "run.keep_updates=true", "run.keep_states=true")),
        Writer("run, FLoRA", run_of("flora", "federation.num_rounds=3")),
        Writer("run, SplitLoRA", run_of("splitlora", *cut)),
        Writer("run, standalone", run_of("standalone")),
        Writer("run, centralised, with a suite", run_of("centralised", *matched)),
        Writer("run, three rounds more", run_of("fedit", "federation.num_rounds=3"), done),
        Writer("run --fresh over another", run_of("flora", more=["--fresh"]), done),
        Writer("compare", ["compare", *run_of("fedit")[1:-2], "--methods", methods, "--out", "all"]),
        Writer("compare --grid", ["compare", *run_of("fedit")[1:-2], *tuned, "--out", "tuned"]),
        Writer("evaluate", ["evaluate", "run", "--suite", "exact-match", "--max-new-tokens", "2"], done),
        Writer("export", ["export", "run", "--to", "there/adapter", "--rank", "1"], done),
        Writer("export --merge", ["export", "run", "--to", "merged", "--merge"], done),
        Writer("judge", ["judge", "run", *judged, "--max-new-tokens", "2", "--out", "judged"], done),
        Writer("report", ["report", "run", "--out", "pages/report.html"], done),
        Writer("recipes copy", ["recipes", "copy", "demo", "--to", "mine.toml"]),
    ]


class Bench:
    """A folder for trials: inputs made once, and for every command what was there before and what is after it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.work = self.root / "work"
        self.work.mkdir(parents=True)
        made = forked(self.root, lambda: _make_inputs(self.root / "inputs"))
        assert made.code == 0, made.said

    def begin(self, writer: Writer) -> None:
        """Make the folder in which the command starts."""
        shutil.rmtree(self.work)
        before = self.root / f"before-{hashlib.sha256(repr(writer.before).encode()).hexdigest()[:8]}"
        if not before.exists():
            self.work.mkdir()
            for arguments in writer.before:
                ended = command(self.work, arguments)
                assert ended.code == 0, ended.said
            shutil.copytree(self.work, before)
        else:
            shutil.copytree(before, self.work)

    def contents(self) -> dict[str, str]:
        """Return a hash of every file in the folder, of what does not depend on the clock; folders have none."""
        found = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            if not any(part in f"{name}/" for part in _NOT_COMPARED):
                found[name] = "" if path.is_dir() else _content(path)
        return found


def differences(expected: dict[str, str], found: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return what differs or lacks, and what is left over."""
    changed = [name for name in expected if found.get(name) != expected[name]]
    return changed, sorted(found.keys() - expected.keys())


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        data = json.dumps([_untimed(json.loads(line)) for line in lines]).encode()
    elif path.suffix in (".html", ".md"):
        data = _TIMES.sub(b"", data)
    elif path.suffix == ".sqlite":
        data = b"a database"
    return hashlib.sha256(data).hexdigest()


def _untimed(value: Any) -> Any:
    """Leave out what the clock or the run's drawn name decides: times, hashes of files that hold them, and seals."""
    if isinstance(value, dict) and isinstance(value.get("run"), str) and "files" in value:
        files = {name: found for name, found in value["files"].items() if Path(name).name not in _HOLD_TIMES}
        value = {key: item for key, item in value.items() if key not in ("run", SEAL)} | {"files": files}
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in _TIMED}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _make_inputs(folder: Path) -> int:
    from tiny_models import seeded_model

    folder.mkdir()
    seeded_model("llama", vocab_size=256).float().save_pretrained(folder / "base")
    words = ["red", "blue", "one", "two", "cat", "dog"]
    rows = [
        {"instruction": words[k % 6], "context": "", "response": words[(k + 1) % 6], "category": "ab"[k % 2]}
        for k in range(22)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    questions = [{"question_id": k, "turns": [words[k]], "category": "writing"} for k in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    ended = CRASHED
    from fedloom import recipes

    recipes.copy("demo", folder / "recipe.toml")
    return 0 if (folder / "recipe.toml").exists() else ended


class _Judge(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = {"choices": [{"message": {"content": "[[8]] [[7]]"}}], "usage": {"prompt_tokens": 1}}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def judge_server() -> Iterator[int]:
    """Yield the port of a judge on this machine that always says the same."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()
