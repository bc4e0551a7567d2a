"""Write a dialogue with the tokenizer's own chat template, and find the answers by applying it turn by turn."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from fedloom.data.chat_clock import on_day
from fedloom.data.records import Dialogue, Record
from fedloom.data.special_text import given_beside
from fedloom.data.templates import ChatTemplate, Rendered, beyond_text
from fedloom.data.time_limit import TookTooLong, time_limit
from fedloom.data.turns import CALLS, REASONING, Turn
from fedloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDER_SECONDS = 5.0
"""Time for writing one row: templates need milliseconds."""
MAX_FACTOR, MAX_EXTRA = 10, 1_000_000
"""Characters a template may write: so many for each of the contents, and so many of its own."""
_LARGEST_NUMBER = 10_000_000


class RewritesTurnsError(DataError):
    """The template writes earlier turns differently once others follow, so not all answers can be learned at once."""


def render_chat(record: Record, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Write ``record`` with the chat template of ``tokenizer``.

    With P_i the text of the turns before answer i plus the template's cue to the assistant, and Q_i that of the turns
    up to and with it, answer i is the characters len(P_i) to len(Q_i), without trailing white space: the template's
    end-of-turn mark belongs to the answer. Nothing is searched for. Answers that are not learned have no such place.

    Raises:
        RewritesTurnsError: the template rewrites earlier turns, so that P_i or Q_i does not begin the text.
        DataError: the template rejects the turns, leaves tools or calls out,
            or asks for an answer in other words than it writes one; it takes too long or writes too much.
    """
    dialogue = _dialogue(record)
    turns = dialogue.turns
    text = _apply(tokenizer, template, dialogue, cue="without")
    _check_writes(tokenizer, template, dialogue, text)
    spans = []
    for position, turn in enumerate(turns):
        if not turn.is_learned_answer:
            continue
        before = _apply(tokenizer, template, _first(dialogue, position), cue="with")
        through = (
            text
            if position + 1 == len(turns)
            else _apply(tokenizer, template, _first(dialogue, position + 1), cue="without")
        )
        _check_begins(position, tokenizer, template, dialogue, text=text, through=through, before=before)
        spans.append((len(before), len(through.rstrip())))
        if spans[-1][0] >= spans[-1][1]:
            raise DataError(
                f"turn {position + 1}: expected a chat template that writes the answer, got nothing for it; correct "
                f"the chat template{_or_plain(dialogue)}"
            )
    return Rendered(text, tuple(spans), framed=True)


def _check_begins(
    position: int,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    dialogue: Dialogue,
    *,
    text: str,
    through: str,
    before: str,
) -> None:
    if text.startswith(through) and through.startswith(before):
        return
    uncued = _apply(tokenizer, template, _first(dialogue, position), cue="without")
    if text.startswith(through) and through.startswith(uncued) and before.startswith(uncued):
        cue, found = before[len(uncued) :], through[len(uncued) :]
        raise DataError(
            f"turn {position + 1}: the tokenizer's chat template asks for an answer with {cue!r}, but writes one as "
            f"{found[: len(cue) + 20]!r}, so a model trained on it would be asked in other words; correct the chat "
            f"template{_or_plain(dialogue)}"
        )
    raise RewritesTurnsError(
        f"turn {position + 1}: the tokenizer's chat template writes earlier turns differently once others "
        f"follow, so the answer's place is unknown; keep one answer each{_or_plain(dialogue)}"
    )


def _check_writes(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, dialogue: Dialogue, text: str) -> None:
    """Refuse tools, calls and reasoning that the template leaves out: the text is the same without them."""
    last = dialogue.last_answer
    without = [("tools", replace(dialogue, tools=()))] if dialogue.tools else []
    for position, turn in enumerate(dialogue.turns):
        kinds = [key for key in turn.given if key == CALLS or (key in REASONING and position == last)]
        for key in kinds:
            given = {name: value for name, value in turn.given.items() if name != key}
            turns = [replace(one, given=given) if one is turn else one for one in dialogue.turns]
            without.append((f"{key} of turn {position + 1}", replace(dialogue, turns=tuple(turns))))
    for what, bare in without:
        if _apply(tokenizer, template, bare, cue="without") == text:
            raise DataError(
                f"expected a chat template that writes the row's {what}, got one that leaves them out; use a tokenizer "
                "whose chat template writes them, or remove them"
            )


def _dialogue(record: Record) -> Dialogue:
    if isinstance(record, Dialogue):
        return record
    return Dialogue((Turn("user", record.asked), Turn("assistant", record.answer)))


def _or_plain(dialogue: Dialogue) -> str:
    """Offer another template where it would have words for all of a dialogue."""
    return "" if beyond_text(dialogue) else ", or set data.template to 'plain'"


def _first(dialogue: Dialogue, number: int) -> Dialogue:
    return replace(dialogue, turns=dialogue.turns[:number])


def _apply(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, dialogue: Dialogue, *, cue: str) -> str:
    messages = [{"role": turn.role, "content": turn.content, **turn.given} for turn in dialogue.turns]
    tools = [dict(tool) for tool in dialogue.tools] or None
    limit = MAX_FACTOR * (sum(len(turn.content) for turn in dialogue.turns) + len(given_beside(dialogue))) + MAX_EXTRA
    _check_numbers(str(tokenizer.chat_template))
    try:
        with time_limit(RENDER_SECONDS):
            written = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=on_day(tokenizer.get_chat_template(tools=tools), template.date),
                tokenize=False,
                add_generation_prompt=cue == "with",
            )
            text = str(written)
    except TookTooLong as cause:
        raise DataError(
            f"expected a chat template that writes the turns within {RENDER_SECONDS:.0f} s, got one that does not; "
            f"correct the chat template{_or_plain(dialogue)}"
        ) from cause
    except Exception as cause:  # the template is a stranger's program: whatever it raises is its mistake
        roles = ", ".join(turn.role for turn in dialogue.turns) or "none"
        raise DataError(
            f"expected turns that the tokenizer's chat template accepts, got {roles}: {cause}; "
            f"correct the row{_or_plain(dialogue)}"
        ) from cause
    if len(text) > limit:
        raise DataError(
            f"expected a chat template that writes at most {limit:,} characters for these turns, got {len(text):,}; "
            f"correct the chat template{_or_plain(dialogue)}"
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
            "correct the chat template"
        )
