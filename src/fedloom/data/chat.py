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
    up to and with it, answer i is the characters len(P_i) to len(Q_i), trailing white space left out: the template's
    end-of-turn mark belongs to the answer. Nothing is searched for.

    Raises:
        DataError: the template refuses the turns, or rewrites earlier turns so that P_i or Q_i does not begin the text.
    """
    turns = _turns(record)
    text = _apply(tokenizer, turns, cue="without")
    spans = []
    for position, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _apply(tokenizer, turns[:position], cue="with")
        through = text if position + 1 == len(turns) else _apply(tokenizer, turns[: position + 1], cue="without")
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"turn {position + 1}: the tokenizer's chat template writes earlier turns differently once others "
                "follow, so the answer's place is unknown; set data.template to 'plain', or keep one answer each"
            )
        spans.append((len(before), len(through.rstrip())))
    return Rendered(text, tuple(spans), framed=True)


def _turns(record: Record) -> tuple[Turn, ...]:
    if isinstance(record, Dialogue):
        return record.turns
    asked = f"{record.instruction}\n\n{record.input}" if record.input.strip() else record.instruction
    return (Turn("user", asked), Turn("assistant", record.answer))


def _apply(tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...], *, cue: str) -> str:
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue == "with")
    except (jinja2.TemplateError, IndexError, ValueError) as cause:
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise DataError(f"the tokenizer's chat template refuses the turns ({roles}): {cause}") from cause
    return str(text)
