"""Ask a result something, beside its base: the prompt worded as in training, the answer greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.config.input_tables import Data
from fedloom.data.answer_frame import AnswerFrame, answer_frame, plain_frame
from fedloom.data.encoding import resolve_template
from fedloom.data.records import Dialogue, Prompt, Record, Shape, Turn, detect_shape
from fedloom.data.sources import Rows, load_rows
from fedloom.data.templates import AUTO, ChatTemplate, Template, check_template
from fedloom.data.token_rows import PromptTokens, record_prompts, text_prompts
from fedloom.errors import DataError, EvaluationError
from fedloom.evaluation.prompt_batches import let_go
from fedloom.models.causal import causal_lm, context_length, end_ids
from fedloom.results.held_out import BASE
from fedloom.results.opened_result import OpenedResult
from fedloom.seeding import torch_stream
from fedloom.wording import Displayed

DIALOGUES = (Shape.MESSAGES, Shape.SHAREGPT)
NO_TEMPLATE = "none"
"""The template that leaves a prompt as it was typed."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded: greedy at temperature 0, else drawn from ``softmax(logits / temperature)``.

    It has ``max_new_tokens`` at most, fewer where the base's context ends before.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0.0 <= self.temperature < math.inf:
            raise EvaluationError(
                f"expected at least 1 new token and a finite temperature of 0 or more, got {self.max_new_tokens} and "
                f"{self.temperature}; change --max-new-tokens or --temperature"
            )


@dataclass(frozen=True)
class Wording:
    """How a prompt is worded; ``shape`` and ``template`` None: as typed."""

    shape: Shape | None
    template: Template | ChatTemplate | None

    @property
    def is_dialogue(self) -> bool:
        """Whether earlier turns stand before a question."""
        return self.shape in DIALOGUES

    @property
    def description(self) -> str:
        """The wording in a few words."""
        return "the prompt as typed" if self.template is None else f"template {self.template.name}"

    def prompt(self, turns: Sequence[Turn], tokenizer: Any) -> PromptTokens:
        """Return what the model reads; where the wording is of single questions, that is the last turn alone."""
        if self.template is None:
            return text_prompts([turns[-1].content], tokenizer)[0]
        return record_prompts([self._record(turns)], self.template, tokenizer)[0]

    def frame(self, turns: Sequence[Turn], model: Any, tokenizer: Any) -> AnswerFrame:
        """Return where the answer to these turns ends."""
        if self.template is None:
            return plain_frame(tokenizer, end_ids(model))
        return answer_frame(self._record(turns), self.template, tokenizer, end_ids(model))

    def _record(self, turns: Sequence[Turn]) -> Record:
        if self.is_dialogue:
            return Dialogue((*turns, Turn("assistant", "")))
        return Prompt(turns[-1].content, "", "")


@dataclass(frozen=True)
class Answered(Displayed):
    """A prompt as the model read it, and the answers by name: the adapters', then the base's."""

    prompt: str
    worded: str
    answers: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return prompt and answers as plain values."""
        return {"prompt": self.prompt, "worded": self.worded, "answers": dict(self.answers)}

    def lines(self) -> list[str]:
        """Return the answers for people; a single one without its name."""
        if len(self.answers) == 1:
            return [next(iter(self.answers.values()))]
        return [f"{name}: {answer}" for name, answer in self.answers.items()]


@dataclass
class Conversation:
    """Questions to one result, each answered by every model in ``names``; the first one's answers are remembered."""

    opened: OpenedResult
    wording: Wording
    sampling: Sampling
    names: Sequence[str]

    def __post_init__(self) -> None:
        self.turns: list[Turn] = []

    def ask(self, prompt: str) -> Answered:
        """Answer a prompt, in a dialogue after what was said before; the oldest exchanges go once there is no room.

        Raises:
            EvaluationError: the prompt alone leaves no room for an answer.
        """
        turns, tokenizer = [*self.turns, Turn("user", prompt)], self.opened.base.tokenizer
        worded = self.wording.prompt(turns, tokenizer)
        room = self._room()
        while len(turns) > 1 and room is not None and len(worded.ids) > room:
            turns = turns[2:]
            worded = self.wording.prompt(turns, tokenizer)
        frame = self.wording.frame(turns, self.opened.lora, tokenizer)
        answers = {name: answer(self.opened, name, worded, self.sampling, frame) for name in self.names}
        if self.wording.is_dialogue:
            self.turns = [*turns, Turn("assistant", next(iter(answers.values())))]
        return Answered(prompt, worded.text, answers)

    def _room(self) -> int | None:
        """Return the tokens that what was said may take: an answer keeps its own, or half the context."""
        context = context_length(self.opened.lora)
        return None if context is None else context - min(self.sampling.max_new_tokens, context // 2)


def converse(
    opened: OpenedResult, *, template: str | None = None, sampling: Sampling | None = None, beside_base: bool = True
) -> Conversation:
    """Begin a conversation with a result, worded as it was trained.

    Raises:
        DataError: there is no such template.
    """
    names = [*opened.adapters, BASE] if beside_base or not opened.adapters else list(opened.adapters)
    return Conversation(opened, wording_of(opened, template), sampling or Sampling(), names)


def generate(
    opened: OpenedResult,
    prompt: str,
    *,
    template: str | None = None,
    sampling: Sampling | None = None,
    beside_base: bool = True,
) -> Answered:
    """Answer one prompt with a result, and with its base beside it.

    Raises:
        DataError: there is no such template.
        EvaluationError: the prompt leaves no room for an answer.
    """
    return converse(opened, template=template, sampling=sampling, beside_base=beside_base).ask(prompt)


def check_wording(template: str | None) -> None:
    """Refuse a template that is none, before a base is loaded.

    Raises:
        DataError: there is no such template.
    """
    if template not in (None, NO_TEMPLATE):
        check_template(template)


def wording_of(opened: OpenedResult, template: str | None = None) -> Wording:
    """Return the wording of a run's training, or the one named.

    For a PEFT folder, which does not say how it was trained, that is the tokenizer's chat template, else ``plain``.

    Raises:
        DataError: there is no such template.
    """
    tokenizer, data = opened.base.tokenizer, None if opened.settings is None else opened.settings.data
    if template == NO_TEMPLATE:
        return Wording(None, None)
    shape = None if data is None else _shape_of(data)
    if shape is None:
        shape = Shape.MESSAGES if tokenizer.chat_template else Shape.QUESTION_ANSWER
    name = template or (data.template if data else None) or AUTO
    return Wording(shape, resolve_template(name, shape, tokenizer, None if data is None else data.day))


def wording_of_rows(data: Data, rows: Rows | None, tokenizer: Any) -> Wording | None:
    """Return the wording of rows at hand; None where nobody knows their shape, and the wording goes by it.

    Raises:
        DataError: there is no such template, or the rows have no known shape.
    """
    name, shape = data.template or AUTO, Shape(data.shape)
    if shape is Shape.AUTO and rows is not None:
        shape = detect_shape(rows, data.columns)
    return (
        None
        if shape is Shape.AUTO and name == AUTO
        else Wording(shape, resolve_template(name, shape, tokenizer, data.day))
    )


@torch.inference_mode()
def answer(opened: OpenedResult, name: str, worded: PromptTokens, sampling: Sampling, frame: AnswerFrame) -> str:
    """Decode one answer with an adapter, or with ``base``, up to where ``frame`` ends it.

    Raises:
        EvaluationError: the prompt leaves no room for it.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    model, tokenizer = causal_lm(opened.use(None if name == BASE else name)), opened.base.tokenizer
    ids = list(worded.ids)
    num_new = num_new_tokens(model, ids, sampling)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=num_new,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=list(frame.stop_ids),
    )
    processors = LogitsProcessorList([GumbelNoise(sampling, worded.text)] if sampling.temperature > 0.0 else [])
    input_ids_BT = torch.tensor([ids], device=model.device)
    let_go(model)
    generated_BT = model.generate(
        input_ids_BT,
        attention_mask=torch.ones_like(input_ids_BT),
        generation_config=config,
        logits_processor=processors,
    )
    return frame.answer(generated_BT[0, len(ids) :].tolist(), tokenizer)[0]


class GumbelNoise:
    """Make the greedy choice a draw from ``softmax(logits / temperature)``, from a named stream.

    The largest of ``logits / temperature + g`` with ``g = −log(−log u)`` is such a draw (the Gumbel-max trick), so no
    global generator is touched.
    """

    def __init__(self, sampling: Sampling, worded: str) -> None:
        self.temperature = sampling.temperature
        self.generator = torch_stream(sampling.seed, "generate", worded)

    def __call__(self, input_ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        uniform_BV = torch.rand(scores_BV.shape, generator=self.generator, dtype=torch.float64).clamp_min(1e-300)
        gumbel_BV = -(-uniform_BV.log()).clamp_min(1e-300).log()
        return scores_BV.float() / self.temperature + gumbel_BV.float().to(scores_BV.device)


def num_new_tokens(model: Any, ids: Sequence[int], sampling: Sampling) -> int:
    """Return how long the answer may get: what was asked for, or what the context leaves."""
    context = context_length(model)
    if context is None:
        return sampling.max_new_tokens
    if len(ids) >= context:
        raise EvaluationError(
            f"expected a prompt of at most {context - 1} tokens, one less than the base's context, got {len(ids)}; "
            "shorten it"
        )
    return min(sampling.max_new_tokens, context - len(ids))


def _shape_of(data: Data) -> Shape | None:
    """Return the shape of the rows a run was trained on; None where nobody can say any more."""
    if (shape := Shape(data.shape)) is not Shape.AUTO:
        return shape
    try:
        rows = load_rows(data.path, data.split, subset=data.subset, revision=data.revision)
    except DataError:
        return None
    return detect_shape(rows, data.columns)
