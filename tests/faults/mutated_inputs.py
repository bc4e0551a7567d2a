"""Mutated messages, files and settings for every reader: each is refused in one line, in bounded time and memory.

A reader is given a valid input, which it must take, and mutated ones. A mutated input that is no longer the valid one
and is hashed must be refused; so must one whose mutation leaves nothing valid. Any other may be taken: a flipped bit of
a text is another text.
"""

from __future__ import annotations

import json
import signal
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faults import mutations
from faults.mutations import Mutation

from fedloom.errors import FedloomError
from fedloom.wording import printable

MAX_SECONDS = 5.0
MAX_BYTES, MAX_BYTES_OF_INPUT = 32 << 20, 100
"""What a reader may allocate at most: so much, and so many times its input."""
_MAX_LINES = {"--set": 20, "recipe, TOML": 200, "recipe, JSON": 200}
"""Settings report every problem at once, a line each."""


@dataclass(frozen=True)
class Reader:
    """Something that reads what others wrote.

    Attributes:
        valid: inputs that it takes.
        read: raises a FedloomError for any other; what it returns is not looked at.
        hashed: whether any change at all must be refused.
    """

    name: str
    valid: Sequence[bytes]
    read: Callable[[bytes], object]
    mutations: Sequence[Mutation]
    hashed: bool = False


@dataclass
class Verdicts:
    """What became of a reader's mutated inputs."""

    name: str
    refused: int = 0
    taken: int = 0
    wrong: list[str] = field(default_factory=list)
    most_bytes: int = 0
    most_seconds: float = 0.0

    @property
    def total(self) -> int:
        """Inputs tried."""
        return self.refused + self.taken + len(self.wrong)


def tried(reader: Reader, number: int) -> Verdicts:
    """Give a reader ``number`` mutated inputs, seeded by its name and their numbers."""
    verdicts = Verdicts(reader.name)
    for valid in reader.valid:
        reader.read(valid)
    seed = int.from_bytes(reader.name.encode()[:8], "little")
    for position in range(number):
        rng = np.random.default_rng([12, seed, position])
        valid = reader.valid[position % len(reader.valid)]
        data = valid
        for _ in range(int(rng.integers(1, 4))):
            data = reader.mutations[int(rng.integers(len(reader.mutations)))](data, rng)
        if data != valid:
            _try(reader, data, position, verdicts)
    return verdicts


def _try(reader: Reader, data: bytes, position: int, verdicts: Verdicts) -> None:
    place = f"{reader.name}, input {position}"
    tracemalloc.start()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(4 * round(MAX_SECONDS))
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(data)
        if reader.hashed:
            verdicts.wrong.append(f"{place}: taken, though its hash is another's")
        else:
            verdicts.taken += 1
    except FedloomError as error:
        lines = str(error).splitlines()
        if len(lines) > _MAX_LINES.get(reader.name, 1) or not all(printable(one) == one for one in lines):
            verdicts.wrong.append(f"{place}: refused in {len(lines)} lines, or with control characters: {lines[:2]}")
        else:
            verdicts.refused += 1
    except Exception as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = "" if at is None else f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        verdicts.wrong.append(f"{place}: {type(error).__name__} at {where}: {str(error)[:120]!r}")
    signal.alarm(0)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    verdicts.most_bytes, verdicts.most_seconds = max(verdicts.most_bytes, peak), max(verdicts.most_seconds, seconds)
    if seconds > MAX_SECONDS or peak > MAX_BYTES + MAX_BYTES_OF_INPUT * len(data):
        verdicts.wrong.append(f"{place}: {seconds:.1f} s, {peak:,} bytes for {len(data):,}")


def _stop(*_: object) -> None:
    raise TimeoutError("it did not end")


def readers(folder: Path) -> list[Reader]:
    """Return every reader, each with what it takes; files are written into ``folder``."""
    return [*_messages(), *_files(folder), *_states(folder), *_settings(folder), *_explained(folder / "run")]


def _in_file(file: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def reading(data: bytes) -> object:
        file.write_bytes(data)
        return read(file)

    return reading


def _messages() -> list[Reader]:
    from federation import test_hostile_messages as honest
    from split import test_message_checks as split

    from fedloom.errors import UpdateError
    from fedloom.federation.blob import WireDtype, sealed, unsealed
    from fedloom.federation.broadcasts import decode_broadcast, encode_broadcast
    from fedloom.federation.messages import encode_failure
    from fedloom.federation.server import broadcasts_for
    from fedloom.federation.update_checks import check_update
    from fedloom.methods.client_half import Work
    from fedloom.methods.state import Failure
    from fedloom.methods.zero_padding import ZeroPadding
    from fedloom.split.cut_messages import SplitMessage
    from fedloom.split.message_checks import check_message

    def answer(message: bytes) -> None:
        found = honest.received(message)
        if isinstance(found, Failure) and found.reason != "out of memory":
            raise UpdateError(found.reason)
        if not isinstance(found, Failure):
            check_update(found, honest.broadcast(), Work(), honest.SHAPES, honest.ASKED)

    def broadcast(message: bytes) -> object:
        return decode_broadcast(message, honest.SHAPES)

    def split_message(message: bytes) -> None:
        found = SplitMessage.from_bytes(message)
        dtype = "int8" if found.matrix.scales_T is not None else "fp32"
        check_message(found, split.replace(split.EXPECTED, dtype=dtype))

    few_bits, few_bits_sent, few_bits_answer = _in_few_bits(honest)
    strategy, own = ZeroPadding(honest.COHORT), honest.update().adapter
    states = [honest.state(), honest.replace(honest.state(), round=1, side=own, chain=(own,))]
    sent = [broadcasts_for(state, [1], strategy, {1: 2}, {1: 2.0})[0] for state in states]
    news = [encode_broadcast(one, WireDtype.FP32) for one in sent]
    update, failure = sealed(honest.sent()), encode_failure(Failure(1, "out of memory", 0))
    cut = [split.message().to_bytes(), split.message("int8").to_bytes()]
    found = []
    for name, valid, read in (
        ("update", [update], answer),
        ("failure", [failure], answer),
        ("broadcast", news, broadcast),
        ("broadcast in few bits", [few_bits_sent], broadcast),
        ("update in few bits", [few_bits_answer], few_bits),
        ("split message", cut, split_message),
    ):
        found.append(Reader(f"{name}, changed on the way", valid, read, mutations.TENSORS, hashed=True))
        bare = [unsealed(one) for one in valid]
        found.append(Reader(f"{name}, sent so", bare, lambda b, read=read: read(sealed(b)), mutations.TENSORS))
    return found


def _in_few_bits(honest: Any) -> tuple[Callable[[bytes], None], bytes, bytes]:
    """Return a reader of answers in 4 bits with second moments, a valid broadcast with control variates, an answer."""
    import torch

    from fedloom.errors import UpdateError
    from fedloom.federation.blob import WireDtype
    from fedloom.federation.broadcasts import encode_broadcast
    from fedloom.federation.messages import decode_answer, encode_update, moments_entries
    from fedloom.federation.server import broadcasts_for
    from fedloom.federation.update_checks import check_update
    from fedloom.lora.pair import BOTH
    from fedloom.methods import table
    from fedloom.methods.options import MethodOptions
    from fedloom.methods.state import Failure

    options = MethodOptions(few_bits=True, moments="shared", control_clients=3)
    strategy = table.make("zero-padding", honest.COHORT, options)
    entries = moments_entries(honest.SHAPES, 2, BOTH)
    moments = {key.removeprefix("moments/"): torch.ones(shape) for key, (_, shape) in entries.items()}
    state = honest.replace(strategy.initial(), round=1, start=honest.update().adapter, optimiser=moments)
    state = honest.replace(state, control=honest.update().adapter.as_tensors())
    (broadcast,), work = (
        broadcasts_for(state, [1], strategy, {1: 2}, {1: 2.0}, WireDtype.INT4),
        strategy.client.work(2),
    )

    def read(message: bytes) -> None:
        found = decode_answer(message, broadcast, work, honest.SHAPES, WireDtype.INT4, lambda draw: broadcast.start)
        if isinstance(found, Failure):
            raise UpdateError(found.reason)
        check_update(found, broadcast, work, honest.SHAPES, honest.ASKED)

    update = honest.replace(honest.update(), round=2, moments=moments)
    answer = encode_update(update, update.adapter.as_tensors(), WireDtype.INT4)
    read(answer)
    return read, encode_broadcast(broadcast, WireDtype.INT4), answer


def _files(folder: Path) -> list[Reader]:
    import pyarrow
    import pyarrow.parquet

    from fedloom import embedded
    from fedloom.data.sources import load_rows
    from fedloom.data.templates import load_template
    from fedloom.evaluation.choice.questions import read_questions
    from fedloom.evaluation.e2e.e2e_files import read_outputs, read_references
    from fedloom.evaluation.judge.judge_prompts import read_prompts
    from fedloom.evaluation.judge.judge_questions import read_answers, read_judge_questions

    rows = [{"instruction": f"say {k}", "context": "", "response": "é" * k, "category": "a"} for k in range(5)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "valid.parquet")
    question = b'{"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}\n'
    asked = b'{"question_id": 1, "turns": ["good"], "category": "writing"}\n' * 1
    said = b'{"question_id": 1, "choices": [{"index": 0, "turns": ["yes"]}]}\n'
    prompt = b'{"name": "pair", "prompt_template": "{question} {answer_a}", "system_prompt": ""}\n'
    template = (Path(embedded.__file__).parents[1] / "data" / "wording" / "alpaca.toml").read_bytes()
    table = b'mr,ref\n"name[A], food[B]","A serves B."\n"name[C]","It is C."\n'
    text, json_lines, bytes_only = mutations.TEXT, mutations.LINES, (*mutations.BYTES, mutations.bad_text)
    every: list[tuple[str, str, bytes, Callable[[Path], object], Sequence[Mutation]]] = [
        ("rows, JSON lines", "rows.jsonl", lines, load_rows, json_lines),
        ("rows, JSON", "rows.json", json.dumps(rows).encode(), load_rows, mutations.JSON),
        ("rows, CSV", "rows.csv", b'instruction,response\nsay,b\n"x,y",z\n', load_rows, text),
        ("rows, parquet", "rows.parquet", (folder / "valid.parquet").read_bytes(), load_rows, bytes_only),
        ("template", "own.toml", template, load_template, text),
        ("questions", "questions.jsonl", question, read_questions, json_lines),
        ("judge's questions", "asked.jsonl", asked, read_judge_questions, json_lines),
        ("judge's prompts", "prompts.jsonl", prompt, read_prompts, json_lines),
        ("answers", "answers.jsonl", said, read_answers, json_lines),
        ("references", "references.csv", table, read_references, text),
        ("outputs to score", "outputs.tsv", b"MR\toutput\nname[C]\tC.\n", read_outputs, text),
    ]
    return [Reader(name, [data], _in_file(folder / file, read), kinds) for name, file, data, read, kinds in every]


def _states(folder: Path) -> list[Reader]:
    from federation import test_hostile_messages as honest

    from fedloom.data.partition import Partition
    from fedloom.evaluation.decoding import GREEDY
    from fedloom.evaluation.judge.endpoint import Reply
    from fedloom.evaluation.judge.verdict_cache import VerdictCache
    from fedloom.evaluation.outputs_file import OutputsFile
    from fedloom.lora.peft_files import load_peft, save_peft
    from fedloom.methods.state_codec import damage_named, read_state, state_files

    own = honest.update().adapter
    tensors, numbers = state_files(honest.replace(honest.state(), round=1, side=own, chain=(own,))).values()

    def state(tensors: bytes, numbers: bytes) -> None:
        with damage_named(folder):
            read_state(tensors, numbers)

    save_peft(own, folder / "adapter", base_name="base")
    weights, config = folder / "adapter/adapter_model.safetensors", folder / "adapter/adapter_config.json"
    whole = weights.read_bytes(), config.read_bytes()

    def adapter(weights_data: bytes, config_data: bytes) -> object:
        weights.write_bytes(weights_data)
        config.write_bytes(config_data)
        return load_peft(folder / "adapter")

    Partition.from_owners(np.array([0, 1, 0, 1]), 2).save(folder / "partition.json", "hash")
    partition = (folder / "partition.json").read_bytes()
    kept = OutputsFile.open(folder / "kept.jsonl", GREEDY, "model")
    kept.append([("prompt", "output", False), ("other", "é", True)])
    with VerdictCache(folder / "verdicts.sqlite") as cache:
        cache.put("key", [Reply("yes", 1, 2)])

    def verdicts(file: Path) -> None:
        with VerdictCache(file) as opened:
            opened.get("key")

    cached, decoded = (folder / "verdicts.sqlite").read_bytes(), (folder / "kept.jsonl").read_bytes()
    reading = _in_file(folder / "partition.json", lambda file: Partition.load(file, "hash"))
    outputs = _in_file(folder / "kept.jsonl", lambda file: OutputsFile.open(file, GREEDY, "model"))
    return [
        Reader("state, tensors", [tensors], lambda data: state(data, numbers), (*mutations.BYTES, mutations.header)),
        Reader("state, numbers", [numbers], lambda data: state(tensors, data), mutations.JSON),
        Reader("adapter, tensors", whole[:1], lambda data: adapter(data, whole[1]), mutations.TENSORS),
        Reader("adapter, configuration", whole[1:], lambda data: adapter(whole[0], data), mutations.JSON),
        Reader("partition", [partition], reading, mutations.JSON),
        Reader("decoded outputs", [decoded], outputs, mutations.LINES),
        Reader("verdicts", [cached], _in_file(folder / "verdicts.sqlite", verdicts), mutations.BYTES),
    ]


def _settings(folder: Path) -> list[Reader]:
    import tomllib

    from fedloom import config, recipes

    text = recipes.read("demo")
    document = json.dumps(tomllib.loads(text)).encode()
    names = [f"{table}.{key}" for table, found in tomllib.loads(text).items() for key in found]
    values = [f"{name}=1".encode() for name in names]

    def override(data: bytes) -> object:
        parsed = config.parse(text, "demo.toml")
        return config.resolve(parsed, "demo", [data.decode("utf-8", "surrogateescape")])

    def taken(data: bytes) -> object:
        try:
            return override(data)
        except FedloomError:
            return None

    return [
        Reader("recipe, TOML", [text.encode()], _in_file(folder / "recipe.toml", config.load), mutations.TEXT),
        Reader("recipe, JSON", [document], _in_file(folder / "recipe.json", config.load), mutations.JSON),
        Reader("--set", values, lambda data: taken(data) if data in values else override(data), mutations.TEXT),
    ]


def _explained(run: Path) -> list[Reader]:
    """Return ``explain`` as a reader of each file of a run: what it did not write it refuses."""
    from federation import test_hostile_messages as honest

    from fedloom import config, recipes
    from fedloom.explanation.explain import explain
    from fedloom.methods.state_codec import state_files
    from fedloom.run_folder.writer import RunFolder

    changed = ("method.name=zero-padding", "method.ranks=2", "federation.num_clients=2")
    settings = config.resolve(config.parse(recipes.read("demo"), "demo.toml"), "demo", changed)
    figures = {"change_norm": 1.0, "aggregation_noise": 0.1, "agreement": 0.5, "cosine": 0.0, "client_norm": 2.0}
    clients = [{"client": k, "reason": None, "weight": 0.5, "norm": 1.0, "num_steps": 5} for k in range(2)]
    own = honest.update().adapter
    record = {"eval": None, "clients": clients, "modules": [{"module": name, **figures} for name in own]}
    state = honest.replace(honest.state(), round=1, start=own, side=own, chain=(own,))
    with RunFolder.open(run, settings.as_dict(), {"seed": 1, "date": "2026-01-01"}) as folder:
        folder.write_round(1, record, state_files(state))

    def reading(file: Path, valid: bytes) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            file.write_bytes(data)
            try:
                return explain(run).lines()
            finally:
                file.write_bytes(valid)

        return read

    binary = (*mutations.BYTES, mutations.header)
    found = []
    for name, kinds, hashed in (
        ("manifest.json", mutations.JSON, False),
        ("config.json", mutations.JSON, True),
        ("rounds/1/hashes.json", mutations.JSON, False),
        ("rounds/1/record.json", mutations.JSON, True),
        ("rounds/1/state/server.json", mutations.JSON, True),
        ("rounds/1/state/server.safetensors", binary, True),
    ):
        valid = (run / name).read_bytes()
        found.append(Reader(f"explained run, {name}", [valid], reading(run / name, valid), kinds, hashed))
    return found
