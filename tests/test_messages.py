"""Every error says what to do: as far as the source can show, its message has a clause that begins with a verb."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedloom"
ERRORS = {
    node.name: node
    for node in ast.parse((SOURCE / "errors.py").read_text("utf-8")).body
    if isinstance(node, ast.ClassDef)
}

VERBS = (
    *("add", "answer", "ask", "build", "call", "change", "check", "choose", "convert", "correct", "decode", "drop"),
    *("export", "fetch", "fill", "finish", "fix", "free", "give", "install", "judge", "keep", "leave", "load"),
    *("lower", "make", "measure", "mend", "name", "narrow", "open", "pad", "quote", "raise", "regenerate"),
    *("remove", "rename", "repeat", "resend", "restore", "resume", "return", "run", "save", "score", "see", "send"),
    *("serve", "set", "shorten", "sort", "start", "take", "train", "try", "update", "upgrade", "use", "wait", "write"),
)
"""The imperatives with which our messages begin an action. A new one is added here when a message needs it."""
ADVICE = ("remedy", "advice", "advice_after", "action", "unfinished_note", "USE_PADDED", "hub_refusal")
"""Names of values, attributes and functions that hold an action, whose text another place gives."""
ACTION = re.compile(rf"(?:^|[;:] |, or |\bthen )(?:if [^,;]+, )?(?:{'|'.join(VERBS)})\b")
PROGRAMMING = "a programming error, not a user's mistake"
WITHOUT_ACTION = {
    "data/division.py:_check_encoded": (1, PROGRAMMING),
    "data/turns.py:_turns": (1, "it only adds the turn to a message that says what to do"),
    "data/layouts.py:write_shepherd": (1, PROGRAMMING),
    "data/partition.py:Partition.__post_init__": (3, PROGRAMMING),
    "evaluation/exact_match.py:score_matches": (1, PROGRAMMING),
    "evaluation/judge/endpoint.py:Endpoint.chat": (1, PROGRAMMING),
    "evaluation/perplexity.py:measure_perplexity": (1, PROGRAMMING),
    "reporting/tables.py:compare": (1, PROGRAMMING),
    "run_folder/writer.py:RunFolder.write_round": (1, PROGRAMMING),
    "split/local_parties.py:local_parties": (1, PROGRAMMING),
}
"""Places whose message needs no action: how many such messages, and the reason."""


def places() -> Iterator[tuple[str, str]]:
    """Yield ``file:function`` and the message of every error that is raised without an action."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        constants = constants_of(tree)
        for function, error, arguments in raises(tree):
            message = "; ".join(text_of(argument, constants) for argument in arguments)
            if not says_what_to_do(message) and not says_what_to_do_itself(error):
                yield f"{module}:{function}", message


def raises(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str, list[ast.expr]]]:
    """Yield (function, name, arguments) of every ``raise`` of one of our errors."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield from raises(node, f"{function}.{name}".strip("."))
                continue
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=arguments)) if name in ERRORS:
                yield function, name, arguments
        yield from raises(node, function)


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Return a module's constants of text."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """Return a message as it is written, with ``{expression}`` for what is filled in."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, constants) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, constants) + text_of(right, constants)
        case _:
            return f"{{{ast.unparse(node)}}}"


def says_what_to_do(message: str) -> bool:
    """Tell whether a message has an action, or is only the message of another place passed on."""
    own = re.sub(r"\{[^{}]*\}", "", message)
    if not re.search(r"[a-zA-Z]{2}", own):
        return True
    filled_in = re.findall(r"\{([^{}]*)\}", message)
    advised = any(re.search(rf"(?:^|\.)(?:{'|'.join(ADVICE)})\b", value) for value in filled_in)
    return advised or bool(ACTION.search(re.sub(r"\{[^{}]*\}", "{}", message)))


@cache
def says_what_to_do_itself(error: str) -> bool:
    """Tell whether an error's class composes its message, with an action in it, from what it is given."""
    for node in ast.walk(ERRORS[error]):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"), args=[own]):
                return says_what_to_do(text_of(own, {}))
    return False


def needless() -> Counter[str]:
    """Return how many messages of each place need no action."""
    return Counter({place: number for place, (number, _) in WITHOUT_ACTION.items()})


def test_every_error_says_what_to_do() -> None:
    found, allowed = Counter(place for place, _ in places()), needless()
    excess = {place for place in found if found[place] > allowed[place]}
    assert not [f"{place}: {message}" for place, message in places() if place in excess]


def test_every_error_listed_as_one_that_needs_no_action_has_none() -> None:
    found = Counter(place for place, _ in places())
    assert not {
        place: f"{found[place]} of {number} have none" for place, number in needless().items() if found[place] < number
    }


def test_an_error_that_composes_its_message_has_an_action_of_its_own() -> None:
    assert {error for error in ERRORS if says_what_to_do_itself(error)} == {"BehindError", "MissingExtraError"}


@pytest.mark.parametrize(
    ("message", "has_action"),
    [
        ("rank: expected 1 to {largest}, got {rank}; choose a lower rank", True),
        ("{path}: damaged ({error}); if it is elsewhere, give it with --base FOLDER", True),
        ("{name}: expected finite numbers, got NaN; {remedy}", True),
        ("{where}: {problem}", True),
        ("{path}: expected JSON, got {error}", False),
        ("expected a whole message, the name is missing", False),
    ],
)
def test_an_action_is_distinguished_from_a_description(message: str, has_action: bool) -> None:
    assert says_what_to_do(message) is has_action
