"""A layer that is narrower than a client's rank takes the rank it can under ``all-linear``, with every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fedloom
from fedloom.config import Settings
from fedloom.errors import AdapterError
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.peft_files import load_peft
from fedloom.methods.table import names, traits_of
from fedloom.models.families import resolve_targets
from fedloom.models.stock_peft import not_read
from fedloom.preview.description import describe

Make = Callable[..., Settings]
NARROW, RANK = 4, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama whose one key and value head is narrower than the rank."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    folder = tmp_path_factory.mktemp("narrow")
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(settings_for: Make, base: Path) -> Make:
    def settings(**overrides: object) -> Settings:
        usual: dict[str, object] = {"model__base": str(base), "model__target_modules": ["all-linear"]}
        return settings_for(**(usual | {"method__ranks": RANK} | overrides))

    return settings


TRAINED = [name for name in names() if traits_of(name).is_trained and name != "splitlora"]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_narrow_layers_at_the_rank_they_can(method: str, make: Make, tmp_path: Path) -> None:
    summary = fedloom.run(make(method__name=method), tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    folder = tmp_path / "run" / "adapter"
    folder = folder if (folder / "adapter_config.json").exists() else folder / "client-0"
    ranks = load_peft(folder).ranks
    assert {rank for name, rank in ranks.items() if name.endswith(("k_proj", "v_proj"))} <= {NARROW}
    assert max(ranks.values()) >= RANK
    config = transformers.AutoConfig.from_pretrained(make().model.base)
    assert not_read(folder, config) is None


def test_a_split_run_trains_narrow_layers_too(make: Make, tmp_path: Path) -> None:
    settings = make(method__name="splitlora", split__cut_layer=1, split__aggregate_every=1)
    summary = fedloom.run(settings, tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]


def test_describe_names_them_and_counts_what_they_train(make: Make) -> None:
    found = describe(make())
    assert found.narrow_modules == {
        f"model.layers.{block}.self_attn.{name}": NARROW for block in (0, 1) for name in ("k_proj", "v_proj")
    }
    assert "narrower than a rank, so adapted at what they can hold: k_proj (rank 4), v_proj (rank 4)" in found.lines()
    per_block = 2 * RANK * 32 + 2 * NARROW * 20 + 3 * RANK * 40
    assert set(found.num_trained_parameters) == {2 * per_block}
    assert not describe(make(method__ranks=NARROW)).narrow_modules


@pytest.mark.parametrize("measured", [None, 1])
def test_described_bytes_of_narrow_layers_are_the_bytes_that_cross(
    measured: int | None, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if measured is not None:  # the stack is larger than what is measured whole
        monkeypatch.setattr("fedloom.preview.message_sizes.MEASURED_NUMBERS", measured)
    settings = make(method__name="flora", method__ranks=[RANK, 2, RANK])
    summary, described = fedloom.run(settings, tmp_path / "run"), describe(settings)
    whole = (summary.upload_bytes, summary.download_bytes)
    assert described.run_bytes == (whole if measured is None else pytest.approx(whole, rel=1e-2))


@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_a_layer_that_was_named_must_hold_the_rank(method: str, make: Make, tmp_path: Path) -> None:
    settings = make(model__target_modules=["v_proj"], method__name=method, method__ranks=NARROW)
    wide = settings.model_copy(update={"method": settings.method.model_copy(update={"ranks": RANK})})
    with pytest.raises(AdapterError, match=r"method\.ranks: expected 1 to 4, the smaller side of .*v_proj"):
        fedloom.run(wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_slots_of_different_ranks_are_apart_in_a_narrow_layer(base: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    targets = resolve_targets(model, "all-linear")
    lora, slots = LoRAModel(model, targets, targets), [Slot(2, 0.5), Slot(RANK, 2.0), Slot(3, 1.0)]
    lora.open(slots)
    adapters = [fresh_adapter(lora.shapes, slot.rank, place) for place, slot in enumerate(slots)]
    for place, adapter in enumerate(adapters):
        lora.load(place, adapter)
    for place, (slot, adapter) in enumerate(zip(slots, adapters, strict=True)):
        read = lora.adapter(place)
        assert read.ranks == {name: min(slot.rank, *shape) for name, shape in lora.shapes.items()}
        for name in read:
            torch.testing.assert_close(read[name].a_RI, adapter[name].a_RI.double())
