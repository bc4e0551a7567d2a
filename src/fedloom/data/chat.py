"""Write a dialogue with the tokenizer's own chat template, and find the answers by applying it turn by turn."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fedloom.data.chat_clock import on_day
from fedloom.data.records import Dialogue, Record, Turn
from fedloom.data.templates import ChatTemplate, Rendered
from fedloom.data.time_limit import TookTooLong, time_limit
from fedloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDER_SECONDS = 5.0
"""Time for writing one row: templates need milliseconds."""
MAX_FACTOR, MAX_EXTRA = 10, 1_000_000
"""Characters a template may write: so many for each of the contents, and so many of its own."""
_LARGEST_NUMBER = 10_000_000


def render_chat(record: Record, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Write ``record`` with the chat template of ``tokenizer``.

    With P_i the text of the turns before answer i plus the template's cue to the assistant, and Q_i that of the turns
    up to and with it, answer i is the characters len(P_i) to len(Q_i), without trailing white space: the template's
    end-of-turn mark belongs to the answer. Nothing is searched for.

    Raises:
        DataError: the template rejects the turns, rewrites earlier turns so that P_i or Q_i does not begin the text,
            or asks for an answer in other words than it writes one; it takes too long or writes too much.
    """
    turns = _turns(record)
    text = _apply(tokenizer, template, turns, cue="without")
    spans = []
    for position, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _apply(tokenizer, template, turns[:position], cue="with")
        through = (
            text if position + 1 == len(turns) else _apply(tokenizer, template, turns[: position + 1], cue="without")
        )
        _check_begins(position, tokenizer, template, turns, text=text, through=through, before=before)
        spans.append((len(before), len(through.rstrip())))
        if spans[-1][0] >= spans[-1][1]:
            raise DataError(
                f"turn {position + 1}: expected a chat template that writes the answer, got nothing for it; correct "
                "the chat template, or set data.template to 'plain'"
            )
    return Rendered(text, tuple(spans), framed=True)


def _check_begins(
    position: int,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    turns: tuple[Turn, ...],
    *,
    text: str,
    through: str,
    before: str,
) -> None:
    if text.startswith(through) and through.startswith(before):
        return
    uncued = _apply(tokenizer, template, turns[:position], cue="without")
    if text.startswith(through) and through.startswith(uncued) and before.startswith(uncued):
        cue, found = before[len(uncued) :], through[len(uncued) :]
        raise DataError(
            f"turn {position + 1}: the tokenizer's chat template asks for an answer with {cue!r}, but writes one as "
            f"{found[: len(cue) + 20]!r}, so a model trained on it would be asked in other words; correct the chat "
            "template, or set data.template to 'plain'"
        )
    raise DataError(
        f"turn {position + 1}: the tokenizer's chat template writes earlier turns differently once others "
        "follow, so the answer's place is unknown; set data.template to 'plain', or keep one answer each"
    )


def _turns(record: Record) -> tuple[Turn, ...]:
    if isinstance(record, Dialogue):
        return record.turns
    asked = f"{record.instruction}\n\n{record.input}" if record.input.strip() else record.instruction
    return (Turn("user", asked), Turn("assistant", record.answer))


def _apply(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, turns: tuple[Turn, ...], *, cue: str) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    limit = MAX_FACTOR * sum(len(turn.content) for turn in turns) + MAX_EXTRA
    _check_numbers(str(tokenizer.chat_template))
    try:
        with time_limit(RENDER_SECONDS):
            written = tokenizer.apply_chat_template(
                messages,
                chat_template=on_day(tokenizer.get_chat_template(), template.date),
                tokenize=False,
                add_generation_prompt=cue == "with",
            )
            text = str(written)
    except TookTooLong as cause:
        raise DataError(
            f"expected a chat template that writes the turns within {RENDER_SECONDS:.0f} s, got one that does not; "
            "correct the chat template, or set data.template to 'plain'"
        ) from cause
    except Exception as cause:  # the template is a stranger's program: whatever it raises is its mistake
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise DataError(
            f"expected turns that the tokenizer's chat template accepts, got {roles}: {cause}; "
            "correct the row, or set data.template to 'plain'"
        ) from cause
    if len(text) > limit:
        raise DataError(
            f"expected a chat template that writes at most {limit:,} characters for these turns, got {len(text):,}; "
            "correct the chat template, or set data.template to 'plain'"
        )
    return text


@lru_cache(maxsize=16)
def _check_numbers(template: str) -> None:
    """Refuse what a time limit cannot stop: a power, or text repeated, is one call of C code."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, value) for _, kind, value in Environment().lex(template)]
    except TemplateSyntaxError:
        return  # the tokenizer says so in its own words
    numbers = [value for kind, value in tokens if kind == "integer" and len(value) > len(str(_LARGEST_NUMBER))]
    powers = [value for kind, value in tokens if kind == "operator" and value == "**"]
    if found := [*powers, *numbers]:
        raise DataError(
            f"expected a chat template without powers (**) and numbers above {_LARGEST_NUMBER:,}, got {found[0][:40]}; "
            "correct the chat template, or set data.template to 'plain'"
        )
