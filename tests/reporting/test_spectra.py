"""The result's spectrum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import save_peft
from fedloom.reporting.spectra import Spectrum, mean_spectrum, spectra_of


def test_a_spectrum_is_that_of_the_product_on_disk(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pair = Pair(torch.randn(6, 3, generator=generator), torch.randn(3, 5, generator=generator))
    save_peft(Adapter({"model.layers.0.q_proj": pair}), tmp_path, base_name="base")
    (spectrum,) = spectra_of(tmp_path)
    expected = torch.linalg.svdvals(pair.b_OR @ pair.a_RI)
    assert (spectrum.shape, spectrum.rank) == ((6, 5), 3)
    assert spectrum.singular_values[:3] == pytest.approx(expected[:3].tolist(), rel=1e-5)
    assert spectrum.norm == pytest.approx(float(expected.norm()), rel=1e-5)


def test_directions_are_counted_by_energy() -> None:
    spectrum = Spectrum("m", (4, 4), 3, (3.0, 1.0, 0.0))
    assert [spectrum.rank_holding(share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_the_mean_over_modules_starts_at_one() -> None:
    spectra = [Spectrum("a", (4, 4), 2, (3.0, 0.0)), Spectrum("b", (4, 4), 1, (4.0,))]
    assert mean_spectrum(spectra) == [1.0, 0.0]
    assert mean_spectrum([]) == []
