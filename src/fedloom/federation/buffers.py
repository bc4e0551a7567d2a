"""Bytes in several places, sent one after another: what is large is not copied to stand behind its head."""

from __future__ import annotations

Buffer = bytes | bytearray | memoryview
Buffers = list[Buffer]


def num_bytes(buffers: Buffers) -> int:
    """Return how many bytes they are together."""
    return sum(map(len, buffers))
