"""Write a dialogue with the tokenizer's own chat template, and find the answers by applying it turn by turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.data.records import Dialogue, Record, Turn
from fedloom.data.templates import Rendered
from fedloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def render_chat(record: Record, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Write ``record`` with the chat template of ``tokenizer``.

    With P_i the text of the turns before answer i plus the template's cue to the assistant, and Q_i that of the turns
    up to and with it, answer i is the characters len(P_i) to len(Q_i), without trailing white space: the template's
    end-of-turn mark belongs to the answer. Nothing is searched for.

    Raises:
        DataError: the template rejects the turns, rewrites earlier turns so that P_i or Q_i does not begin the text,
            or asks for an answer in other words than it writes one.
    """
    turns = _turns(record)
    text = _apply(tokenizer, turns, cue="without")
    spans = []
    for position, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _apply(tokenizer, turns[:position], cue="with")
        through = text if position + 1 == len(turns) else _apply(tokenizer, turns[: position + 1], cue="without")
        _check_begins(position, tokenizer, turns, text=text, through=through, before=before)
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
    turns: tuple[Turn, ...],
    *,
    text: str,
    through: str,
    before: str,
) -> None:
    if text.startswith(through) and through.startswith(before):
        return
    uncued = _apply(tokenizer, turns[:position], cue="without")
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


def _apply(tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...], *, cue: str) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue == "with")
    except Exception as cause:  # the template is a stranger's program: whatever it raises is its mistake
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise DataError(
            f"expected turns that the tokenizer's chat template accepts, got {roles}: {cause}; "
            "correct the row, or set data.template to 'plain'"
        ) from cause
    return str(text)
