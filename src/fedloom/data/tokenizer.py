"""Load a tokenizer that can say which characters each token stands for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedloom.data.hub_refusal import hub_refusal
from fedloom.data.own_code import own_code_refusal
from fedloom.errors import DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
_USUAL_ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder or hub name; ``bytes`` is the one whose 256 ids are the bytes.

    A tokenizer without an end-of-text token gets the one its folder's ``config.json`` names (of several, the first),
    else the only usual one in its vocabulary (plain GPT-2 files have ``<|endoftext|>`` but do not say so). Code of its
    own runs only with ``trust_remote_code``.

    Raises:
        ModelError: there is no tokenizer, it needs code that is not trusted, it gives no character offsets, or its end
            of text is unknown.
        MissingExtraError: the folder holds only a SentencePiece model and that library is absent.
    """
    if str(name_or_path) == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    _check_sentencepiece(Path(name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as cause:
        if (refusal := own_code_refusal(cause, name_or_path)) is not None:
            raise refusal from cause
        if isinstance(cause, OSError) and not Path(name_or_path).expanduser().exists():
            wanted = "a folder, a name on the hub, or 'bytes' for a model of bytes"
            raise ModelError(hub_refusal("tokenizer", wanted, name_or_path, cause)) from cause
        detail = (str(cause).splitlines() or ["no detail"])[0]
        raise ModelError(
            f"{name_or_path}: expected a tokenizer (tokenizer.json) in this folder or hub name, got {detail}; "
            "set model.tokenizer, or 'bytes' for a model of bytes"
        ) from cause
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name_or_path}: expected a tokenizer that gives character offsets, got a slow one; convert it to a "
            "tokenizer.json, or set model.tokenizer"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one of a config.json alone
        raise ModelError(
            f"{name_or_path}: expected a tokenizer (tokenizer.json) in this folder or hub name, got one without a "
            "vocabulary; set model.tokenizer, or 'bytes' for a model of bytes"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _find_end_of_text(tokenizer, Path(name_or_path))
    return tokenizer


def set_vocabulary(tokenizer: PreTrainedTokenizerFast, num_ids: int) -> None:
    """Record how many ids the base has. A tokenizer may have more, as long as no text in use holds them."""
    tokenizer.num_base_ids = num_ids


def may_exceed(tokenizer: Any) -> bool:
    """Tell whether a tokenizer has tokens that the base has no row for."""
    num_ids = getattr(tokenizer, "num_base_ids", None)
    return num_ids is not None and len(tokenizer) > num_ids


def check_ids(ids: Sequence[int] | npt.NDArray[np.int32], tokenizer: Any, where: str) -> None:
    """Reject tokens that the base has no row for.

    Raises:
        DataError: naming the place and the first such token.
    """
    if not may_exceed(tokenizer):
        return
    num_ids = tokenizer.num_base_ids
    beyond = next((int(token) for token in ids if token >= num_ids), None)
    if beyond is not None:
        raise DataError(
            f"{where}: expected tokens of the base's vocabulary (ids below {num_ids}), got "
            f"{tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}); remove that text, or use a tokenizer "
            "without that token"
        )


def pad_id(tokenizer: Any) -> int:
    """Return the id to pad with: the tokenizer's own where the base has a row for it, else the end of text."""
    pad, num_ids = tokenizer.pad_token_id, getattr(tokenizer, "num_base_ids", None)
    usable = pad is not None and (num_ids is None or pad < num_ids)
    return int(pad if usable else tokenizer.eos_token_id)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of all that decides how a tokenizer reads a text: two of one hash give the same tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # set by whoever called it last
    parts = [
        json.dumps(backend, sort_keys=True),
        json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]),
        json.dumps(tokenizer.chat_template, sort_keys=True),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose ids are the bytes of the UTF-8 text; 0 is the end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = _byte_symbols()
    # The zero byte keeps its own character: it is a special token, taken out before bytes become symbols.
    vocabulary = {"\x00" if byte == 0 else symbol: byte for byte, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("\x00", normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\x00", pad_token="\x00")


def _byte_symbols() -> list[str]:
    """Return the printable stand-in of each byte, as GPT-2's byte-level BPE assigns them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    code = {byte: byte for byte in printable} | {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(code[byte]) for byte in range(256)]


def _check_sentencepiece(folder: Path) -> None:
    only_sentencepiece = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtraError("sentencepiece", f"{folder}/tokenizer.model")


def _find_end_of_text(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    config = folder / "config.json"
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        first = named[0] if isinstance(named, list) and named else named
        if isinstance(first, int):
            return str(tokenizer.convert_ids_to_tokens(first))
    vocabulary = tokenizer.get_vocab()
    usual = [token for token in _USUAL_ENDS_OF_TEXT if token in vocabulary]
    if len(usual) == 1:
        return usual[0]
    raise ModelError(
        f"{folder}: expected a tokenizer that names its end-of-text token, got none; write eos_token into "
        "tokenizer_config.json"
    )
