"""Numbers on the wire: codes are exact once rounded, as near as their bits allow, and refused where they are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.federation import coding
from fedloom.federation.blob import WireDtype
from fedloom.federation.coding import entries_of, num_bytes_of, read, read_exactly, rounded, written, written_exactly

CODED = [dtype for dtype in WireDtype if dtype.is_coded]
SHAPES = {"m.b": (7, 3), "m.a": (3, 5), "n.b": (4, 1), "n.a": (1, 64), "none.b": (4, 0), "none.a": (0, 6)}


def factors(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-30, 30, (1,), generator=generator)
        for key, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", WireDtype)
def test_what_is_written_is_read_as_it_was_rounded(dtype: WireDtype) -> None:
    tensors = written(factors() if dtype.is_coded else {k: t.clamp(-1, 1) for k, t in factors().items()}, dtype)
    expected = entries_of(SHAPES, dtype)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        k: shape for k, (_, shape) in expected.items()
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) == num_bytes_of(SHAPES, dtype)
    given = factors() if dtype.is_coded else {k: t.clamp(-1, 1) for k, t in factors().items()}
    found, wanted = read(tensors, SHAPES, dtype), rounded(given, dtype)
    assert all(torch.equal(found[key], wanted[key]) for key in SHAPES)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("seed", range(20))
def test_rounded_numbers_are_passed_on_unchanged(dtype: WireDtype, seed: int) -> None:
    once = rounded(factors(seed), dtype)
    again = read_exactly(written_exactly(once, dtype), SHAPES, dtype)
    assert all(torch.equal(again[key], once[key]) for key in SHAPES)
    assert all(torch.equal(rounded(once, dtype)[key], once[key]) for key in SHAPES)
    assert sum(tensor.nbytes for tensor in written_exactly(once, dtype).values()) == num_bytes_of(SHAPES, dtype)


@pytest.mark.parametrize("dtype", WireDtype)
def test_numbers_that_would_change_are_written_as_they_are(dtype: WireDtype) -> None:
    given = {key: tensor.clamp(-1, 1) for key, tensor in factors().items()}
    again = read_exactly(written_exactly(given, dtype), SHAPES, dtype)
    assert all(torch.equal(again[key], given[key]) for key in SHAPES)


@pytest.mark.parametrize("dtype", CODED)
def test_a_number_is_off_by_half_a_step_at_most(dtype: WireDtype) -> None:
    given = factors()
    found = rounded(given, dtype)
    top = 2 ** (dtype.bits - 1) - 1
    for key, tensor in given.items():
        if not tensor.numel():
            continue
        step = tensor.abs().amax(dim=1 if key.endswith(".a") else 0, keepdim=True) / top * (1 + 2**-11)
        assert bool(((found[key] - tensor).abs() <= step / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", CODED)
def test_a_slot_of_zeros_stays_zero_and_no_slot_touches_another(dtype: WireDtype) -> None:
    given = {"m.a": torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1e30, -1e30, 1e30]])}
    assert torch.allclose(rounded(given, dtype)["m.a"], given["m.a"], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", CODED)
def test_codes_and_scales_that_are_none_are_refused(dtype: WireDtype) -> None:
    good = written(factors(), dtype)
    bad_codes = good | {"m.a": torch.full_like(good["m.a"], 255)}
    with pytest.raises(UpdateError, match="expected codes"):
        read(bad_codes, SHAPES, dtype)
    for scale in (-1.0, float("nan"), float("inf")):
        bad = torch.full_like(good["m.a" + coding.SCALE], scale)
        with pytest.raises(UpdateError, match="expected finite scales"):
            read(good | {"m.a" + coding.SCALE: bad}, SHAPES, dtype)


def test_two_and_four_bits_take_the_bytes_they_say() -> None:
    shapes = {"m.a": (16, 288)}
    assert num_bytes_of(shapes, WireDtype.INT4) == 16 * (288 // 2 + 4)
    assert num_bytes_of(shapes, WireDtype.INT2) == 16 * (288 // 4 + 4)
    assert num_bytes_of(shapes, WireDtype.FP32) == 16 * 288 * 4
