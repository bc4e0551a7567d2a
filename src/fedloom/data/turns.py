"""The turns of a dialogue, and all that a row says of them that changes what is read or learned.

A turn's content is text, or text in parts. An assistant's turn may call tools (``tool_calls``; ShareGPT's
``function_call``), reason (``reasoning_content``), or be shown and not learned (``weight: 0``). What templates alone
can write is kept as the row gives it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.errors import DataError

CALLS, REASONING = "tool_calls", ("reasoning_content", "thinking")
_OF_ANSWERS = (CALLS, *REASONING)
_OF_TOOLS = ("name", "tool_call_id")
_FUNCTION_CALL = "function_call"
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    _FUNCTION_CALL: "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MESSAGE_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue; ``role`` is system, user, assistant or tool.

    ``learned`` is False for an answer that is shown and not learned. ``given`` holds what else a chat template may
    write: ``tool_calls`` and ``reasoning_content`` of an answer, ``name`` and ``tool_call_id`` of a tool.
    """

    role: str
    content: str
    learned: bool = True
    given: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_learned_answer(self) -> bool:
        """Whether this is an answer, and one that is learned."""
        return self.role == "assistant" and self.learned

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it to learn: no text and no call."""
        return not self.content.strip() and CALLS not in self.given


def message_turns(value: object) -> tuple[Turn, ...]:
    """Read a list of turns with ``role`` and ``content``.

    Raises:
        DataError: it is none, or holds what cannot be read.
    """
    return _turns(value, "role", "content", _MESSAGE_ROLES)


def sharegpt_turns(value: object) -> tuple[Turn, ...]:
    """Read a list of turns with ``from`` and ``value``.

    Raises:
        DataError: it is none, or holds what cannot be read.
    """
    return _turns(value, "from", "value", _SHAREGPT_ROLES)


def with_system(turns: tuple[Turn, ...], system: str) -> tuple[Turn, ...]:
    """Return the turns after a system prompt from a column of its own.

    Raises:
        DataError: they begin with another one.
    """
    if not system.strip() or (turns and turns[0].role == "system" and turns[0].content == system):
        return turns
    if turns and turns[0].role == "system":
        raise DataError(
            "expected one system prompt, got one in the column 'system' and another in the first turn; remove one"
        )
    return (Turn("system", system), *turns)


def history_turns(value: object) -> tuple[Turn, ...]:
    """Read earlier exchanges, a list of pairs of question and answer; none where the value is empty.

    Raises:
        DataError: it is something else.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ()
    pairs = value if isinstance(value, list) else None
    if pairs is None or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DataError(
            f"column 'history': expected a list of [question, answer] pairs, got {str(value)[:40]!r}; correct the row, "
            "or rename the column if it is no part of the dialogue"
        )
    return tuple(
        Turn(role, text_of(text, "history"))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )


def tools_of(value: object) -> tuple[Mapping[str, Any], ...]:
    """Read the tools that an assistant may call: a list of objects, or JSON of one.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str) and value.strip():
        value = _json(value, "column 'tools'")
    if not value or (isinstance(value, float) and math.isnan(value)):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"column 'tools': expected a list of objects, got {str(value)[:40]!r}; correct the row")
    return tuple(value)


def text_of(value: object, name: str) -> str:
    """Return a cell as text: numbers count as it, nothing and NaN as an empty one.

    Raises:
        DataError: it is neither.
    """
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            pass
        case float() if math.isnan(value):
            return ""
        case float() if math.isinf(value):
            raise DataError(f"column {name!r}: expected text or a number, got {value}; write one or leave it empty")
        case int() | float():
            return str(value)
    raise DataError(f"column {name!r}: expected text, got {type(value).__name__}; write text or leave it empty")


def _turns(value: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise DataError(f"expected a list of turns, got {type(value).__name__}; correct the row, or set data.shape")
    turns = []
    for number, turn in enumerate(value, start=1):
        calls = isinstance(turn, dict) and bool(turn.get(CALLS))
        if not isinstance(turn, dict) or role_key not in turn or (content_key not in turn and not calls):
            found = ", ".join(map(repr, turn)) if isinstance(turn, dict) else type(turn).__name__
            raise DataError(
                f"turn {number}: expected {role_key!r} and {content_key!r}, found {found}; "
                "correct the row, or set data.shape (messages has role and content, sharegpt has from and value)"
            )
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise DataError(
                f"turn {number}: expected {role_key!r} to be one of {', '.join(roles)}, got {role!r}; rename it"
            )
        try:
            turns.append(_turn(role, roles[role], turn, content_key))
        except DataError as problem:
            raise DataError(f"turn {number}: {problem}") from None
    return tuple(turns)


def _turn(named: str, role: str, turn: Mapping[str, Any], content_key: str) -> Turn:
    content = _content(turn.get(content_key), content_key)
    kept = _OF_ANSWERS if role == "assistant" else _OF_TOOLS if role == "tool" else ()
    given = {key: turn[key] for key in kept if turn.get(key)}
    if named == _FUNCTION_CALL:
        called = _json(content, f"{content_key!r} of a {_FUNCTION_CALL}")
        content, given = "", {CALLS: called if isinstance(called, list) else [called]}
    if CALLS in given:
        given[CALLS] = _calls(given[CALLS])
    return Turn(role, content, _is_learned(turn) if role == "assistant" else True, given)


def _content(value: object, name: str) -> str:
    """Return a content that is text, or a list of parts that are."""
    if not isinstance(value, list) or not value:
        return text_of(value, name)
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{name!r}: expected parts of text, got {kind}; remove the part or the row")
        texts.append(text)
    return "".join(texts)


def _is_learned(turn: Mapping[str, Any]) -> bool:
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"'weight': expected 0 (not learned) or 1, got {weight!r}; correct it")
    return bool(weight)


def _calls(calls: object) -> list[dict[str, Any]]:
    """Return calls as templates read them: a function's name with its arguments as an object."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{CALLS!r}: expected a list of objects, got {str(calls)[:40]!r}; correct the row")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{CALLS!r}: expected the name of a function, got {str(call)[:40]!r}; correct the row")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.strip():
            arguments = _json(arguments, "'arguments' of a call")
        function = {**function, "arguments": arguments or {}}
        read.append({"type": "function", **call, "function": function} if "function" in call else _wrapped(function))
    return read


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{what}: expected JSON, got {text[:40]!r}; correct the row") from None


def structured_text(given: Sequence[object]) -> str:
    """Return as one text what rows give besides contents: names, arguments, descriptions."""
    return json.dumps(list(given), ensure_ascii=False, default=str)
