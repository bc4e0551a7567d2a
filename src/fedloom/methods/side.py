"""The side adapter: how it grows from round to round, the same at the server and at every client.

Server and clients hold the same side because both apply the same additions by the same function, one at a time and in
the same order; a hash of it travels with every broadcast and proves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch

from fedloom.lora.algebra import compress, total
from fedloom.lora.pair import Adapter


def grown(side: Adapter, addition: Adapter) -> Adapter:
    """Return the side after one round's addition, compacted where that saves."""
    return compacted(total([side, addition]))


def grown_by(side: Adapter, additions: Iterable[Adapter]) -> Adapter:
    """Return the side after several rounds' additions, one at a time: compaction in between is part of the result."""
    for addition in additions:
        side = grown(side, addition)
    return side


_COMPACTED: WeakValueDictionary[tuple[object, ...], Adapter] = WeakValueDictionary()
"""Compacted sides that somebody in this process holds, by what they were compacted from."""


def compacted(side: Adapter) -> Adapter:
    """Compress losslessly once a module's pair is larger than its matrix; below that it costs more than it saves.

    Where server and clients live in one process, the second of them is given what the first one has computed: a hash
    takes a small part of the time.
    """
    if all(pair.rank <= min(pair.shape) for pair in side.values()):
        return side
    key = (digest(side), *sorted({(str(t.dtype), str(t.device)) for t in side.as_tensors().values()}))
    found = _COMPACTED.get(key)
    if found is None:
        found = _COMPACTED[key] = compress(side).adapter
    return found


def digest(adapter: Adapter) -> str:
    """Return the SHA-256 of an adapter's names, shapes and float32 numbers; of nothing, the empty text."""
    if not adapter:
        return ""
    found = hashlib.sha256()
    for key, tensor in sorted(adapter.as_tensors().items()):
        found.update(f"{key} {tuple(tensor.shape)};".encode())
        found.update(tensor.to("cpu", torch.float32).contiguous().numpy().data)
    return found.hexdigest()
