"""Decode prompts with a model, every distinct prompt once, and keep what was decoded.

Letters: B rows of a pass (prompts times beams), T tokens, G generated tokens, N length of an n-gram, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.data.answer_frame import AnswerFrame, plain_frame
from fedloom.data.token_rows import PromptTokens, text_prompts
from fedloom.data.tokenizer import pad_id
from fedloom.errors import EvaluationError
from fedloom.evaluation.outputs_file import OutputsFile
from fedloom.evaluation.prompt_batches import left_padded, let_go, prompt_batches
from fedloom.models.causal import causal_lm, context_length, end_ids
from fedloom.models.foreign_forward import foreign_forward


@dataclass(frozen=True)
class DecodingSettings:
    """How text is decoded. The defaults are SplitLoRA's: 10 beams, length penalty 0.8, no 4-gram twice.

    N-grams are counted in the decoded text alone, as the GPT-2/LoRA release does; counting the prompt's too would
    forbid a model to name what it was asked about. ``num_beams=1`` is greedy.
    """

    num_beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64


GREEDY = DecodingSettings(num_beams=1, length_penalty=1.0, no_repeat_ngram_size=0)
OnProgress = Callable[[int, int, float], None]  # done, total, seconds left


@dataclass(frozen=True)
class Decoded:
    """One output per prompt, in the prompts' order, and how they came about."""

    outputs: tuple[str, ...]
    settings: DecodingSettings
    num_unique: int
    num_resumed: int
    num_cut_off: int
    seconds: float


@dataclass(frozen=True)
class Output:
    """The answer decoded for one prompt; ``is_cut_off`` says it ended by the limit, not by a token that ends it."""

    text: str
    is_cut_off: bool


def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | PromptTokens],
    settings: DecodingSettings | None = None,
    *,
    frame: AnswerFrame | None = None,
    batch_size: int = 16,
    file: Path | None = None,
    model_id: str = "",
    on_progress: OnProgress | None = None,
) -> Decoded:
    """Decode every distinct prompt once, in batches of similar length, longest first, on the model's device;
    company that would change what a model decodes is not kept.

    A prompt given as text is read as it stands; those of rows come from ``fedloom.data.token_rows.record_prompts``.
    ``frame`` says where their answers end (``fedloom.data.answer_frame``); by default at the end of text, and where the
    base's ``generation_config`` says.
    Adapters are whatever the model is routed to (``LoRAModel.route_all``); nothing is merged. With ``file``, each batch
    is appended to it as it is done, together with the settings and ``model_id`` (say, hashes of base and adapter); a
    later call with the same ones decodes only what is missing.

    Raises:
        EvaluationError: a prompt leaves no room for the answer, or ``file`` holds outputs of another model or settings.
    """
    settings = settings or DecodingSettings()
    begin = time.monotonic()
    frame = frame or plain_frame(tokenizer, end_ids(model))
    store = OutputsFile.open(file, settings, model_id, frame.tag)
    known = {prompt: Output(text, cut) for prompt, (text, cut) in store.outputs.items()}
    tokens_of = {prompt.text: prompt for prompt in _tokenised(prompts, tokenizer)}
    unique = list(tokens_of)
    todo = [tokens_of[prompt] for prompt in unique if prompt not in known]
    num_resumed = len(unique) - len(todo)
    for batch, outputs in _decode_batches(model, tokenizer, todo, settings, frame, batch_size):
        store.append([(prompt, output.text, output.is_cut_off) for prompt, output in zip(batch, outputs, strict=True)])
        known.update(zip(batch, outputs, strict=True))
        if on_progress is not None:
            done = sum(prompt in known for prompt in unique)
            pace = (time.monotonic() - begin) / (done - num_resumed)
            on_progress(done, len(unique), pace * (len(unique) - done))
    asked = (prompt if isinstance(prompt, str) else prompt.text for prompt in prompts)
    texts = tuple(known[prompt].text for prompt in asked)
    num_cut_off = sum(known[prompt].is_cut_off for prompt in unique)
    return Decoded(texts, settings, len(unique), num_resumed, num_cut_off, time.monotonic() - begin)


def _decode_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[PromptTokens],
    settings: DecodingSettings,
    frame: AnswerFrame,
    batch_size: int,
) -> Iterator[tuple[list[str], list[Output]]]:
    _check_room(model, prompts, settings)
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    for batch in prompt_batches(model, longest_first, batch_size):
        outputs = _generate(causal_lm(model), tokenizer, [prompt.ids for prompt in batch], settings, frame)
        yield [prompt.text for prompt in batch], outputs


def _tokenised(prompts: Sequence[str | PromptTokens], tokenizer: Any) -> list[PromptTokens]:
    texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    as_they_stand = dict(zip(texts, text_prompts(texts, tokenizer), strict=True))
    return [as_they_stand[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], settings: DecodingSettings, frame: AnswerFrame
) -> list[Output]:
    from transformers import GenerationConfig, LogitsProcessorList

    pad = pad_id(tokenizer)
    input_ids_BT, mask_BT = left_padded(rows, pad, model.device)
    width = input_ids_BT.shape[1]
    config = GenerationConfig(
        do_sample=False,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(frame.stop_ids),
    )
    processors = LogitsProcessorList()
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatedNgrams(settings.no_repeat_ngram_size, width))
    let_go(model)
    with foreign_forward(model):
        generated_BT = model.generate(
            input_ids_BT, attention_mask=mask_BT, generation_config=config, logits_processor=processors
        )
    return [Output(*frame.answer(row[width:].tolist(), tokenizer)) for row in generated_BT]


class NoRepeatedNgrams:
    """Forbid the token that would complete an n-gram already decoded; the prompt, ``width`` tokens, does not count."""

    def __init__(self, size: int, width: int) -> None:
        self.size = size
        self.width = width

    def __call__(self, input_ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        decoded_BG = input_ids_BT[:, self.width :]
        if decoded_BG.shape[1] < self.size:
            return scores_BV
        ngrams_BGN = decoded_BG.unfold(1, self.size, 1)
        begun_BN = decoded_BG[:, decoded_BG.shape[1] - self.size + 1 :]
        repeats_BG = (ngrams_BGN[:, :, :-1] == begun_BN[:, None, :]).all(dim=-1)
        forbidden_BG = torch.where(repeats_BG, float("-inf"), 0.0).to(scores_BV)
        return scores_BV.scatter_add(1, ngrams_BGN[:, :, -1], forbidden_BG)


def _check_room(model: Any, prompts: Sequence[PromptTokens], settings: DecodingSettings) -> None:
    context = context_length(model)
    if context is None:
        return
    room = context - settings.max_new_tokens
    if room < 1 and prompts:
        raise EvaluationError(
            f"max_new_tokens: expected fewer than the model's context of {context} tokens, which holds the prompt "
            f"too, got {settings.max_new_tokens}; lower it"
        )
    overlong = [prompt for prompt in prompts if len(prompt.ids) > room]
    if overlong:
        raise EvaluationError(
            f"expected prompts of at most {room} tokens ({settings.max_new_tokens} new ones in the model's context of "
            f"{context}), got {len(overlong)} longer ones; the first begins {overlong[0].text[:60]!r}: lower "
            "max_new_tokens, or "
            "shorten the prompts"
        )
