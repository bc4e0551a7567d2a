"""Seeded changes of a valid input: of its bytes, of the JSON in it, of a safetensors header, of its text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]
ODD: list[Any] = [
    None, True, False, -1, 0, 1.5, 10**12, 2**53 + 1, 2**64, 10**400, math.nan, math.inf, -math.inf, 1e308, -0.0, "",
    "20", "x" * 5000, "\x1b[2J\x00", "\ud800", [], [1], [None], {}, {"a": 1}, [[[[[[]]]]]], "F64", [2, -2],
    [2**40, 2**40],
]  # fmt: skip
KEYS = ("admin", "", "__metadata__", "é", "a" * 3000, "../x", "__class__")


def odd(rng: Rng) -> Any:
    """Return a value that few fields can have."""
    return ODD[int(rng.integers(len(ODD)))]


def flip(data: bytes, rng: Rng) -> bytes:
    """Change one to eight bytes."""
    changed = bytearray(data)
    for position in rng.integers(0, max(1, len(data)), int(rng.integers(1, 9))):
        if changed:
            changed[int(position)] ^= int(rng.integers(1, 256))
    return bytes(changed)


def cut(data: bytes, rng: Rng) -> bytes:
    """Leave the end out."""
    return data[: int(rng.integers(0, len(data)))] if data else b"x"


def grow(data: bytes, rng: Rng) -> bytes:
    """Put bytes in somewhere."""
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 200))) + data[at:]


def double(data: bytes, rng: Rng) -> bytes:
    """Let a part come twice."""
    at, to = sorted(int(place) for place in rng.integers(0, len(data) + 1, 2))
    return data[:to] + data[at:to] + data[to:] + (b"" if at < to else data[:1] or b"x")


def nest(data: bytes, rng: Rng) -> bytes:
    """Begin with what never ends: 100,000 brackets, braces or digits."""
    return (b"[", b'{"a":', b"9")[int(rng.integers(3))] * 100_000 + data


def bad_text(data: bytes, rng: Rng) -> bytes:
    """Put a byte in that is no UTF-8, or a character that no text file has."""
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + (b"\xff", b"\xed\xa0\x80", b"\x00", b"\x1b]0;owned\x07")[int(rng.integers(4))] + data[at:]


def json_value(data: bytes, rng: Rng) -> bytes:
    """Change one value of a JSON text, wherever it is: another type, absent, one more, or nested."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return flip(data, rng)
    return _dumped(change(document, rng), rng)


def json_line(data: bytes, rng: Rng) -> bytes:
    """Change one value in one line of JSON lines."""
    lines = data.split(b"\n")
    at = int(rng.integers(len(lines)))
    return b"\n".join([*lines[:at], json_value(lines[at], rng), *lines[at + 1 :]])


def change(value: Any, rng: Rng) -> Any:
    """Return plain values with one of them changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        keys = list(value)
        key, found = keys[int(rng.integers(len(keys)))], dict(value)
        match int(rng.integers(5)):
            case 0:
                del found[key]
            case 1:
                found[KEYS[int(rng.integers(len(KEYS)))]] = odd(rng)
            case _:
                found[key] = change(found[key], rng)
        return found
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        return [*value[:at], change(value[at], rng), *value[at + 1 :]]
    return odd(rng)


def header(data: bytes, rng: Rng) -> bytes:
    """Change one value of a safetensors header, or its length."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or not 0 < length <= len(data) - 8:
        return int(rng.integers(0, 2**62)).to_bytes(8, "little") + data[8:]
    text = json_value(data[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def numbers(data: bytes, rng: Rng) -> bytes:
    """Change one value of the JSON that stands as text in a safetensors header's metadata."""
    length = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + length])
        name = next(iter(found["__metadata__"]))
        text = json_value(found["__metadata__"][name].encode(), rng)
        found["__metadata__"][name] = text.decode("utf-8", "replace")
    except (ValueError, KeyError, TypeError, StopIteration, AttributeError):
        return flip(data, rng)
    whole = json.dumps(found).encode()
    return len(whole).to_bytes(8, "little") + whole + data[8 + length :]


def line(data: bytes, rng: Rng) -> bytes:
    """Take a line out, let one come twice, change the order, or put an odd value behind the last ``=``."""
    lines = data.split(b"\n")
    at = int(rng.integers(len(lines)))
    match int(rng.integers(4)):
        case 0:
            return b"\n".join(lines[:at] + lines[at + 1 :])
        case 1:
            return b"\n".join(lines[: at + 1] + lines[at:])
        case 2:
            return b"\n".join(lines[at:] + lines[:at])
        case _:
            name = lines[at].partition(b"=")[0]
            return b"\n".join([*lines[:at], name + b"= " + _dumped(odd(rng), rng), *lines[at + 1 :]])


def _dumped(value: Any, rng: Rng) -> bytes:
    return json.dumps(value, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "surrogatepass")


BYTES: tuple[Mutation, ...] = (flip, cut, grow, double)
TEXT: tuple[Mutation, ...] = (flip, cut, double, bad_text, nest, line)
JSON: tuple[Mutation, ...] = (*TEXT, json_value, json_value, json_value)
LINES: tuple[Mutation, ...] = (*TEXT, json_line, json_line, json_line)
TENSORS: tuple[Mutation, ...] = (*BYTES, header, header, numbers, numbers)
