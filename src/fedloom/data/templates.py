"""Write a record as the text a model reads, and say which characters are the answer.

Templates are data: TOML files with the wording before the answer, and of each turn of a dialogue. ``chat`` stands for
the tokenizer's own chat template (``fedloom.data.chat``).
"""

from __future__ import annotations

import datetime
import string
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import assert_never

from fedloom.data.records import Dialogue, Prompt, Record, Shape
from fedloom.data.text_files import not_utf8
from fedloom.data.turns import CALLS, REASONING
from fedloom.errors import DataError

CHAT = "chat"
AUTO = "auto"


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template. ``date`` is what it is told the day is; None: today, by the clock."""

    date: datetime.date | None = None
    name: str = CHAT


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record's text.

    ``spans`` are the half-open character ranges of the answers, in order. ``framed`` says that the text carries its
    own special tokens (a chat template's does), so that none is put in front. ``special_spans`` are where the template
    writes special tokens, in a text whose contents spell some that are none; None elsewhere.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    framed: bool = False
    special_spans: tuple[tuple[int, int], ...] | None = None

    @property
    def prompt(self) -> str:
        """Everything before the last answer: what a model is given to generate it."""
        return self.text[: self.spans[-1][0]]


@dataclass(frozen=True)
class DialogueWording:
    """AnyTemplate of turns; ``assistant`` stands before an answer, the end of text and ``separator`` after it."""

    system: str
    user: str
    tool: str
    assistant: str
    answer: str
    separator: str


@dataclass(frozen=True)
class Template:
    """AnyTemplate of prompts and of dialogues."""

    name: str
    with_input: str
    without_input: str
    answer: str
    dialogue: DialogueWording

    def render(self, record: Record, end_of_text: str = "") -> Rendered:
        """Write ``record``; answers of a dialogue before the last one are closed by ``end_of_text``.

        The end of text after the last answer is not written: it is a token, which ``encode`` adds.
        """
        match record:
            case Prompt():
                return self._render_prompt(record)
            case Dialogue():
                return self._render_dialogue(record, end_of_text)
            case _:
                assert_never(record)

    def _render_prompt(self, record: Prompt) -> Rendered:
        wording = self.with_input if record.input.strip() else self.without_input
        prompt = wording.format(instruction=record.instruction, input=record.input)
        text = prompt + self.answer.format(answer=record.answer)
        return Rendered(text, ((len(prompt), len(text)),))

    def _render_dialogue(self, record: Dialogue, end_of_text: str) -> Rendered:
        self._check_is_text(record)
        wording, text, spans = self.dialogue, "", []
        turns_before = {"system": wording.system, "user": wording.user, "tool": wording.tool}
        for number, turn in enumerate(record.turns, start=1):
            if turn.role != "assistant":
                text += turns_before[turn.role].format(content=turn.content)
                continue
            text += wording.assistant
            start = len(text)
            text += wording.answer.format(answer=turn.content)
            is_last = number == len(record.turns)
            text += "" if is_last else end_of_text
            spans += [(start, len(text))] if turn.learned else []
            text += "" if is_last else wording.separator
        return Rendered(text, tuple(spans))

    def _check_is_text(self, record: Dialogue) -> None:
        """Refuse what a template file has no words for."""
        if given := beyond_text(record):
            raise DataError(
                f"expected turns of text with the template {self.name}, which has no words for {given[0]}; set "
                "data.template to 'chat' with a tokenizer whose chat template writes them, or remove them"
            )


def beyond_text(dialogue: Dialogue) -> list[str]:
    """Return what of a dialogue only a chat template can have words for: tools, calls, reasoning."""
    kinds = (CALLS, *REASONING)
    return ["tools"] if dialogue.tools else [key for turn in dialogue.turns for key in turn.given if key in kinds]


_PROMPT_NAMES = {
    "with_input": {"instruction", "input"},
    "without_input": {"instruction"},
    "answer": {"answer"},
}
_DIALOGUE_NAMES: dict[str, set[str]] = {
    "system": {"content"},
    "user": {"content"},
    "tool": {"content"},
    "assistant": set(),
    "answer": {"answer"},
    "separator": set(),
}


AnyTemplate = Template | ChatTemplate
"""How a record is worded: by a file, or by the tokenizer's chat template."""


def shipped_templates() -> tuple[str, ...]:
    """Return the names of the templates that come with the package."""
    folder = resources.files("fedloom.data") / "wording"
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def load_template(name_or_path: str | Path) -> Template:
    """Load a shipped template by name, or one's own TOML file by path.

    Raises:
        DataError: there is no such template, or the file lacks an entry or a placeholder.
    """
    name = str(name_or_path)
    return read_template(template_text(name), name)


def check_template(name: str) -> None:
    """Refuse a template that is none, without a tokenizer: ``auto`` and ``chat`` are what that makes of them.

    Raises:
        DataError: there is no such template, or the file lacks an entry or a placeholder.
    """
    if name not in (AUTO, CHAT):
        load_template(name)


def template_text(name: str) -> str:
    """Return the TOML of a shipped template by name, or of one's own file by path.

    Raises:
        DataError: there is no such template.
    """
    if name in shipped_templates():
        text = (resources.files("fedloom.data") / "wording" / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = _read(Path(name))
    else:
        known = ", ".join((AUTO, CHAT, *shipped_templates()))
        raise DataError(
            f"data.template: expected one of {known}, or a TOML file, got {name!r}; choose one of these, or check the "
            "path"
        )
    return text


def read_template(text: str, name: str) -> Template:
    """Make a template of its TOML; ``name`` is for messages.

    Raises:
        DataError: the text lacks an entry or a placeholder.
    """
    try:
        entries = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as cause:
        raise DataError(f"{name}: expected TOML, got {cause}; correct the file") from cause
    return _build(name, entries)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise not_utf8(file, cause) from cause
    except OSError as cause:
        raise DataError(f"{file}: expected a template that can be read, got {cause.strerror}; check it") from cause


def default_template(shape: Shape) -> str:
    """Return the name of the template that ``auto`` means for ``shape`` where there is no chat template to use."""
    match shape:
        case Shape.ALPACA | Shape.DOLLY:
            return "alpaca"
        case Shape.E2E:
            return "e2e"
        case Shape.PROMPT_COMPLETION | Shape.QUESTION_ANSWER | Shape.MESSAGES | Shape.SHAREGPT | Shape.AUTO:
            return "plain"
        case _:
            assert_never(shape)


def _build(name: str, entries: dict[str, object]) -> Template:
    dialogue = entries.pop("dialogue", {})
    if not isinstance(dialogue, dict):
        raise DataError(
            f"{name}: expected a table [dialogue], got {type(dialogue).__name__}; write its entries under [dialogue]"
        )
    prompts = _checked(name, entries, _PROMPT_NAMES)
    turns = _checked(f"{name} [dialogue]", dialogue, _DIALOGUE_NAMES)
    return Template(name, **prompts, dialogue=DialogueWording(**turns))


def _checked(place: str, entries: dict[str, object], expected: dict[str, set[str]]) -> dict[str, str]:
    if entries.keys() != expected.keys():
        missing = [f"add {key}" for key in sorted(expected.keys() - entries.keys())]
        unknown = [f"remove {key}" for key in sorted(entries.keys() - expected.keys())]
        action = ", ".join(missing + unknown)
        raise DataError(f"{place}: expected the entries {', '.join(expected)}, got {', '.join(entries)}; {action}")
    checked: dict[str, str] = {}
    for key, value in entries.items():
        if not isinstance(value, str):
            raise DataError(f"{place}, entry {key}: expected text, got {type(value).__name__}; quote it")
        if (found := _placeholders(place, key, value)) != expected[key]:
            raise DataError(
                f"{place}, entry {key}: expected {_braced(expected[key])}, got {_braced(found)}; correct the "
                "placeholders"
            )
        checked[key] = value
    return checked


def _placeholders(place: str, key: str, value: str) -> set[str]:
    try:
        fields = [field for field in string.Formatter().parse(value) if field[1] is not None]
    except ValueError as cause:
        raise DataError(
            f"{place}, entry {key}: expected names in braces, got {cause}; write {{{{ and }}}} for plain braces"
        ) from cause
    if any(specification or conversion for _, _, specification, conversion in fields):
        raise DataError(f"{place}, entry {key}: expected placeholders by name only, got a format (: or !); remove it")
    return {name for _, name, _, _ in fields if name is not None}


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names)) or "no placeholder"
