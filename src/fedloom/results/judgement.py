"""Put two results' answers before a judge: FedIT's pairwise scores, or MT-bench's grades over two turns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedloom.data.records import Turn
from fedloom.data.token_rows import PromptTokens
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import GREEDY
from fedloom.evaluation.intervals import Difference
from fedloom.evaluation.judge.asking import Judging, OnEstimate, OnVerdict
from fedloom.evaluation.judge.endpoint import Endpoint
from fedloom.evaluation.judge.judge_prompts import OWN_PROMPTS, JudgePrompt, read_prompts
from fedloom.evaluation.judge.judge_questions import (
    Answers,
    JudgeQuestion,
    answer_turns,
    read_answers,
    read_judge_questions,
    write_answers,
)
from fedloom.evaluation.judge.protocols import Grades, PairVerdicts, compare_grades, grade_answers, judge_pairs
from fedloom.evaluation.outputs_file import why_not_kept
from fedloom.models.causal import context_length
from fedloom.results.conversation import wording_of
from fedloom.results.held_out import BASE
from fedloom.results.opened_result import OpenedResult
from fedloom.run_folder.durable import plain
from fedloom.wording import Displayed

OnProgress = Callable[[str, int, int, float], None]


class Protocol(StrEnum):
    """FedIT: both answers side by side, 1 to 10 each, in both orders; MT-bench: one answer at a time, two turns."""

    FEDIT = "fedit"
    MT_BENCH = "mt-bench"


@dataclass(frozen=True)
class Bench:
    """What is asked and how: questions, reference answers, the judge's prompts, the answers' length, items at most."""

    questions: Path
    references: Path | None = None
    prompts: Path | None = None
    max_new_tokens: int = 256
    limit: int | None = None
    seed: int = 0

    def read_questions(self) -> list[JudgeQuestion]:
        """Return the questions, the first ``limit`` of them."""
        return read_judge_questions(self.questions)[: self.limit]

    def read_prompts(self) -> Mapping[str, JudgePrompt]:
        """Return the judge's prompts: ours, with those of the file in their place."""
        return OWN_PROMPTS if self.prompts is None else read_prompts(self.prompts)


@dataclass(frozen=True)
class Judged(Displayed):
    """What the judge said of ``second`` against ``first``: verdicts on pairs, or grades and their difference."""

    protocol: Protocol
    first: str
    second: str
    verdicts: PairVerdicts | None
    grades: tuple[Grades, Grades] | None
    difference: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """Return the verdicts as plain values."""
        found = {"protocol": self.protocol.value, "first": self.first, "second": self.second}
        if self.verdicts is not None:
            return found | {"verdicts": plain(self.verdicts)}
        assert self.grades is not None
        grades = dict(zip((self.first, self.second), map(plain, self.grades), strict=True))
        return found | {"grades": grades, "difference": plain(self.difference)}

    def lines(self) -> list[str]:
        """Return the verdicts for people."""
        if self.verdicts is not None:
            v = self.verdicts
            return [
                f"sums over questions: {self.first} {v.first_sum:.1f}, {self.second} {v.second_sum:.1f}",
                f"relative score {v.relative}",
                f"{self.second} − {self.first}: {v.difference}",
                f"{v.num_second_wins} won, {v.num_ties} tied, {v.num_first_wins} lost by {self.second}; "
                f"{v.num_inconsistent} changed sides with the order, {v.num_missing} without a verdict",
            ]
        assert self.grades is not None
        lines = [
            f"{name}: {grades.overall}" for name, grades in zip((self.first, self.second), self.grades, strict=True)
        ]
        missing = sum(grades.num_missing for grades in self.grades)
        return [*lines, f"{self.second} − {self.first}: {self.difference}", f"{missing} turns without a verdict"]


def check(endpoint: Endpoint, bench: Bench) -> None:
    """Raise, before anything is decoded, where the judge could not be asked about the answers.

    Raises:
        EndpointError: it is not an address, or the key would go there unencrypted.
        EvaluationError: a file of the bench is absent or not what it should be.
    """
    endpoint.check()
    bench.read_questions()
    bench.read_prompts()
    if bench.references is not None:
        read_answers(bench.references)


def check_folder(folder: Path) -> None:
    """Make the folder that keeps answers and verdicts.

    Raises:
        EvaluationError: nothing can be kept there.
    """
    if (reason := why_not_kept(folder)) is not None:
        raise EvaluationError(
            f"{folder}: expected a folder to keep answers and verdicts in, got {reason}; name another with --out"
        )


def answer_tokens(opened: OpenedResult, bench: Bench) -> int:
    """Return how long an answer may get: what the bench asks for, at most half the context, so that prompts fit."""
    context = context_length(opened.lora)
    return bench.max_new_tokens if context is None else min(bench.max_new_tokens, context // 2)


def answers_of(
    opened: OpenedResult, name: str, bench: Bench, folder: Path, on_progress: OnProgress | None = None
) -> Answers:
    """Return one model's answers to the bench, decoded greedily once and kept in ``folder``.

    They have :func:`answer_tokens` tokens at most.

    Raises:
        EvaluationError: a conversation leaves no room for its answer.
    """
    wording, tokenizer = wording_of(opened), opened.base.tokenizer

    def render(conversation: Sequence[str]) -> PromptTokens:
        turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(conversation)]
        return wording.prompt(turns, tokenizer)

    def told(done: int, total: int, seconds_left: float) -> None:
        if on_progress is not None:
            on_progress(name, done, total, seconds_left)

    model = opened.use(None if name == BASE else name)
    num_tokens = answer_tokens(opened, bench)
    settings = replace(GREEDY, max_new_tokens=num_tokens)
    identity = model_identity(opened, name)
    frame = wording.frame([Turn("user", bench.read_questions()[0].turns[0])], model, tokenizer)
    kept = f"{identity[:12]}-tokens{num_tokens}{frame.tag and f'-frame{frame.tag}'}.jsonl"
    answers = answer_turns(
        model,
        tokenizer,
        bench.read_questions(),
        render,
        settings,
        frame=frame,
        file=folder / f"decoded-{kept}",
        model_id=identity,
        on_progress=told,
    )
    write_answers(folder / f"answers-{kept}", answers, name)
    return answers


def model_identity(opened: OpenedResult, name: str) -> str:
    """Return the hash of base and adapter, so that kept answers are never taken for another model's."""
    digest = hashlib.sha256(opened.base.revision_hash.encode())
    if name != BASE:
        for key, tensor in sorted(opened.adapters[name].as_tensors().items()):
            digest.update(key.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def only_adapter(opened: OpenedResult) -> str:
    """Return the name of the one adapter that is judged.

    Raises:
        EvaluationError: there is none, or one per client.
    """
    names = list(opened.adapters)
    if len(names) != 1:
        raise EvaluationError(
            f"{opened.found.path}: expected one adapter to judge, got {len(names)}; choose one with --client K"
        )
    return names[0]


def judge(
    protocol: Protocol,
    endpoint: Endpoint,
    bench: Bench,
    first: tuple[str, Answers],
    second: tuple[str, Answers],
    *,
    cache: Path,
    on_estimate: OnEstimate | None = None,
    on_verdict: OnVerdict | None = None,
) -> Judged:
    """Ask the judge about two sides' answers; verdicts are cached, so that asking again costs nothing.

    Raises:
        EndpointError: the endpoint fails; verdicts so far are kept.
        EvaluationError: an answer or a needed reference is missing, or no verdict was parsed.
    """
    questions, prompts, names = bench.read_questions(), bench.read_prompts(), (first[0], second[0])
    judging = Judging()
    if protocol is Protocol.FEDIT:
        verdicts = judge_pairs(
            endpoint,
            questions,
            first[1],
            second[1],
            seed=bench.seed,
            cache=cache,
            prompts=prompts,
            judging=judging,
            on_estimate=on_estimate,
            on_progress=on_verdict,
        )
        return Judged(protocol, *names, verdicts, None, None)
    references = read_answers(bench.references) if bench.references is not None else None
    one, other = (
        grade_answers(
            endpoint,
            questions,
            answers,
            references,
            seed=bench.seed,
            cache=cache,
            prompts=prompts,
            judging=judging,
            on_estimate=on_estimate,
            on_progress=on_verdict,
        )
        for answers in (first[1], second[1])
    )
    return Judged(protocol, *names, None, (one, other), compare_grades(other, one, seed=bench.seed))
