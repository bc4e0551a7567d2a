"""Keep the texts of special tokens that stand in a record's contents from becoming special tokens.

A tokenizer takes ``<|im_end|>`` for the end of a turn wherever it stands, so whoever writes rows could forge turns.
Here only the template's own special tokens count. A row whose contents spell one is written a second time, with the
contents' characters hidden: what is left are the template's. They are then disguised as private-use characters, for a
copy of the tokenizer that knows its special tokens by their disguises alone. Every other row is left as it is.

A token is special where the tokenizer says so; other added tokens, as ``<think>`` often is, are read as ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fedloom.data.records import Dialogue, Prompt, Record
from fedloom.data.turns import structured_text
from fedloom.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Spans = tuple[tuple[int, int], ...]

# Plane 15 is for private use: no text needs it, and a row that holds both it and a special token's text is refused.
_FIRST, _HIDDEN, _LAST = 0xF0000, 0xFFFFC, 0xFFFFD
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class SpecialText:
    """The special tokens of one tokenizer as texts: where they are spelt, and how to read them as ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        # The longest first: a token wins over those that begin it.
        texts = {token.content for token in added} | set(tokenizer.all_special_tokens)
        self.texts = sorted(texts - {""}, key=lambda text: (-len(text), text))
        self._backend = tokenizer.backend_tokenizer
        self._pattern = _one_of(self.texts)
        self._letters = {ord(letter): chr(_HIDDEN) for letter in "".join(self.texts) if not letter.isspace()}
        self._normaliser = self._backend.normalizer if any(token.normalized for token in added) else None
        self._normalised = self._pattern
        if self._normaliser is not None:
            normal = (self._normaliser.normalize_str(token.content) for token in added if token.normalized)
            self._normalised = _one_of([*self.texts, *(text for text in normal if text)])

    def spelt_in(self, contents: Sequence[str]) -> bool:
        """Whether contents spell a special token, one alone or several one after the other."""
        text = "".join(contents)
        if self._pattern.search(text):
            return True
        return self._normaliser is not None and bool(self._normalised.search(self._normaliser.normalize_str(text)))

    def hidden(self, record: Record) -> Record:
        """Return the record with every character that special tokens are spelt with hidden."""
        match record:
            case Prompt():
                asked, given, answer = (text.translate(self._letters) for text in contents_of(record))
                return Prompt(asked, given, answer)
            case Dialogue(turns):
                hidden = tuple(replace(turn, content=turn.content.translate(self._letters)) for turn in turns)
                return replace(record, turns=hidden)

    def template_spans(self, text: str, hidden: str) -> Spans:
        """Return where the template itself writes special tokens, from the text with the contents and that without.

        Raises:
            DataError: the template does more with the contents than write them.
        """
        self._check_has_no_disguise(text)
        differs = (there != here for here, there in zip(text, hidden, strict=False) if there != chr(_HIDDEN))
        if len(text) != len(hidden) or any(differs):
            raise DataError(
                f"expected contents that spell no special token, or a template that only writes them, got "
                f"{self.first_in(text)!r} and a template that changes them; remove that text from the row, or choose "
                "another template"
            )
        return tuple(found.span() for found in self._pattern.finditer(hidden))

    def first_in(self, text: str) -> str:
        """Return the first special token's text in ``text``, for messages."""
        found = self._pattern.search(text)
        return found[0] if found else "a special token's text"

    def encodings(self, texts: Sequence[tuple[str, Spans]]) -> list[Encoding]:
        """Tokenise texts in which nothing but their spans is a special token; offsets are those of the texts."""
        disguised = [self._disguised(text, spans) for text, spans in texts]
        return list(self._copy.encode_batch(disguised, add_special_tokens=False))

    def _disguised(self, text: str, spans: Spans) -> str:
        self._check_has_no_disguise(text)
        pieces, end = [], 0
        for start, stop in spans:
            pieces += [text[end:start], self._disguises[text[start:stop]]]
            end = stop
        return "".join([*pieces, text[end:]])

    def _check_has_no_disguise(self, text: str) -> None:
        if found := _PRIVATE.search(text):
            raise DataError(
                f"expected no private-use character beside a special token's text, got U+{ord(found[0]):X} and "
                f"{self.first_in(text)!r}; remove one of them"
            )

    @cached_property
    def _disguises(self) -> dict[str, str]:
        return {text: chr(_FIRST + number) * len(text) for number, text in enumerate(self.texts)}

    @cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with its special tokens renamed, so that their texts are in no vocabulary and no match."""
        from tokenizers import Tokenizer

        described = json.loads(self._backend.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._disguises.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._disguises.get(text, text): number for text, number in model["vocab"].items()}
        else:
            model["vocab"] = [[self._disguises.get(text, text), *rest] for text, *rest in model["vocab"]]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = self._disguises.get(unknown, unknown)
        described |= {"post_processor": None, "truncation": None, "padding": None}
        copy = Tokenizer.from_str(json.dumps(described))
        if moved := [text for text in self.texts if self._backend.token_to_id(text) != self._id_in(copy, text)]:
            raise DataError(
                f"expected contents that spell no special token, got one, and a tokenizer whose {moved[0]!r} cannot be "
                "told from such text; remove that text from the row, or set model.tokenizer"
            )
        return copy

    def _id_in(self, copy: Tokenizer, text: str) -> int | None:
        return copy.token_to_id(self._disguises[text])


_BY_TOKENIZER: WeakKeyDictionary[Any, SpecialText] = WeakKeyDictionary()


def special_text(tokenizer: Any) -> SpecialText:
    """Return the special tokens' texts of ``tokenizer``, found once for each."""
    if tokenizer not in _BY_TOKENIZER:
        _BY_TOKENIZER[tokenizer] = SpecialText(tokenizer)
    return _BY_TOKENIZER[tokenizer]


def contents_of(record: Record) -> tuple[str, ...]:
    """Return the texts of a record that its author wrote, in order."""
    match record:
        case Prompt():
            return (record.instruction, record.input, record.answer)
        case Dialogue(turns):
            return tuple(turn.content for turn in turns)


def given_beside(record: Record) -> str:
    """Return as one text what its author gave besides contents: tools, calls, names; empty where there is none."""
    if isinstance(record, Prompt):
        return ""
    given = [*record.tools, *(turn.given for turn in record.turns if turn.given)]
    return structured_text(given) if given else ""


def _one_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
