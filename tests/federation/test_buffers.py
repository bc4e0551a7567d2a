"""Messages in several buffers: the bytes are safetensors', nothing is copied to join them, nothing is hashed twice."""

from __future__ import annotations

import hashlib

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.federation import blob as blobs
from fedloom.federation.blob import SEAL_BYTES, Checked, blob_in, checked, pack, packed, read_tensors, sealed


class Head(BaseModel):
    """Numbers whose JSON needs escapes."""

    text: str = 'é "quoted" \\ \x7f'


TENSORS: dict[str, Tensor] = {
    "b": torch.arange(12.0).reshape(3, 4),
    "ä/a": torch.arange(4.0).reshape(2, 2).to(torch.bfloat16),
    "z": torch.arange(5.0).reshape(1, 5).to(torch.float16),
    "turned": torch.arange(12.0).reshape(4, 3).T,
    "double": torch.arange(4.0).reshape(2, 2).double(),
    "empty": torch.zeros(0, 4),
}


def test_a_message_is_what_safetensors_writes_and_a_hash_of_it() -> None:
    found = pack(TENSORS, Head())
    text = Head().model_dump_json().ljust(blobs.NUMBERS_CHARACTERS)
    expected = save({key: tensor.contiguous() for key, tensor in TENSORS.items()}, metadata={"message": text})
    assert found[:-SEAL_BYTES] == expected
    assert found[-SEAL_BYTES:] == hashlib.sha256(expected).digest()[:SEAL_BYTES]


def test_its_tensors_come_back_in_memory_of_their_own() -> None:
    message = bytearray(pack(TENSORS, Head()))
    found = read_tensors(blob_in(message))
    message[:] = bytes(len(message))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor.to(torch.float32)) for key, tensor in TENSORS.items())


def test_the_buffers_are_the_tensors_own_memory() -> None:
    tensor = torch.zeros(2, 3)
    parts = packed({"a": tensor}, Head())
    tensor[0, 0] = 1.0
    assert bytes(parts[1]) == tensor.numpy().tobytes()


def test_a_message_that_was_checked_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    message = checked(sealed(b"message"))
    assert len(message) == 7 + SEAL_BYTES
    with pytest.raises(UpdateError, match="do not have the hash"):
        checked(sealed(b"message")[:-1])
    monkeypatch.setattr(blobs, "_seal", lambda parts: pytest.fail("it was hashed again"))
    assert blob_in(message) == b"message"
    assert blob_in(Checked(b"whatever it is" + bytes(SEAL_BYTES))) == b"whatever it is"


def spoilt(change: str, to: str) -> bytes:
    whole = pack({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, Head())[:-SEAL_BYTES]
    assert change.encode() in whole
    return whole.replace(change.encode(), to.encode())


@pytest.mark.parametrize(
    ("change", "to"),
    [
        ("[0,8]", "[8,0]"),
        ("[0,8]", "[0,9]"),
        ("[0,8]", "[1,8]"),
        ("[8,16]", "[0,16]"),
        ("[8,16]", "[8,99]"),
        ("[1,2]", "[2,2]"),
        ("[1,2]", "[-1,-2]".replace(",-2", "")),
        ("[1,2]", "{}   "),
        ("F32", "I99"),
    ],
)
def test_offsets_and_shapes_that_do_not_fill_the_message_are_refused(change: str, to: str) -> None:
    with pytest.raises(UpdateError, match="do not parse"):
        read_tensors(spoilt(change, to))
