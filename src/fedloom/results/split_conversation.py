"""Ask a result something while its base stays cut: the client decodes with the server, a cache on each side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.data.records import Turn
from fedloom.models.cut import check_cuts, cut, num_blocks
from fedloom.results.conversation import Sampling, num_new_tokens, wording_of
from fedloom.results.held_out import BASE
from fedloom.results.opened_result import OpenedResult
from fedloom.split.codecs import WireDtype
from fedloom.split.split_generation import generate
from fedloom.training.verified_head import output_head
from fedloom.wording import written_bytes


@dataclass(frozen=True)
class CutAnswer:
    """An answer decoded over a cut, and the bytes that crossed for it."""

    prompt: str
    answers: Mapping[str, str]
    cut_layer: int
    wire_dtype: WireDtype
    num_new_tokens: int
    upload_bytes: int
    download_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return answer and bytes as plain values."""
        return {**self.__dict__, "answers": dict(self.answers)}

    def lines(self) -> list[str]:
        """Return the answer for people, then what crossed."""
        crossed = f"{written_bytes(self.upload_bytes)} up, {written_bytes(self.download_bytes)} down"
        return [*self.answers.values(), f"(cut after block {self.cut_layer}: {self.num_new_tokens} tokens, {crossed})"]


def generate_cut(
    opened: OpenedResult, prompt: str, cut_layer: int, sampling: Sampling, template: str | None = None
) -> CutAnswer:
    """Answer one prompt greedily with the model cut after ``cut_layer`` blocks.

    Raises:
        CutError: if the base cannot be cut there.
        EvaluationError: if the prompt leaves no room for an answer.
    """
    check_cuts((cut_layer,), num_blocks(opened.lora.model))
    name = next(iter(opened.adapters), BASE)
    lora, tokenizer = opened.use(None if name == BASE else name), opened.base.tokenizer
    wire: WireDtype = "bf16" if opened.settings is None else opened.settings.split.wire_dtype
    wording, turns = wording_of(opened, template), [Turn("user", prompt)]
    ids, frame = wording.prompt(turns, tokenizer).ids, wording.frame(turns, lora, tokenizer)
    found = generate(
        cut(lora.model, cut_layer),
        output_head(lora.model),
        ids,
        max_new_tokens=num_new_tokens(lora, ids, sampling),
        stop_ids=frame.stop_ids,
        wire_dtype=wire,
    )
    text, _ = frame.answer(found.new_ids, tokenizer)
    return CutAnswer(
        prompt, {name: text}, cut_layer, wire, len(found.new_ids), found.upload_bytes, found.download_bytes
    )
