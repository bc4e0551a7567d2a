"""Updates that wait until all of their round have been seen: the first in memory, the rest in a file on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import RunError
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Update

BYTES_IN_MEMORY = 1 << 28
"""Bytes of adapters that wait in memory; what comes beyond them waits in a temporary file."""


@dataclass(frozen=True, eq=False)
class _OnDisk:
    """An update whose tensors lie in the file: where, and in which memory layout they were."""

    update: Update
    offset: int
    length: int
    strides: dict[str, tuple[int, ...]]


class Waiting:
    """A round's updates in the order of their arrival; iterate as often as needed, and close it.

    What comes back from the disk is the same to the bit and in the same memory layout, on which rounding depends.
    """

    def __init__(self, bytes_in_memory: int = BYTES_IN_MEMORY) -> None:
        self._room = bytes_in_memory
        self._file: IO[bytes] | None = None
        self._held: list[Update | _OnDisk] = []

    def put(self, update: Update) -> None:
        """Let an update wait.

        Raises:
            RunError: the disk has no room for it.
        """
        if update.adapter.num_bytes <= self._room:
            self._room -= update.adapter.num_bytes
            self._held.append(update)
        else:
            self._room = 0  # what comes after one that did not fit waits behind it
            self._held.append(self._written(update))

    def __iter__(self) -> Iterator[Update]:
        for held in self._held:
            yield held if isinstance(held, Update) else self._read(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _written(self, update: Update) -> _OnDisk:
        tensors = update.adapter.as_tensors()
        strides = {f"{n}.{f}": t.stride() for n, p in update.adapter.items() for f, t in (("b", p.b_OR), ("a", p.a_RI))}
        blob = save({key: tensor.clone() for key, tensor in tensors.items()})
        try:
            self._file = self._file or _file()
            offset = self._file.seek(0, 2)
            self._file.write(blob)
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: expected room for the updates of a round, got {error}; free some, or set "
                "TMPDIR to another folder"
            ) from error
        return _OnDisk(replace(update, adapter=Adapter()), offset, len(blob), strides)

    def _read(self, held: _OnDisk) -> Update:
        assert self._file is not None
        self._file.seek(held.offset)
        tensors = load(self._file.read(held.length))
        laid_out = {key: _laid_out(tensors[key], stride) for key, stride in held.strides.items()}
        return replace(held.update, adapter=Adapter.from_tensors(laid_out))


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
