"""Our files are PEFT's: stock peft gives the same logits from what we write, and we read what it writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TARGETS, tiny_model

from fedloom.errors import AdapterError
from fedloom.lora import algebra, peft_settings
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import WEIGHTS_NAME, base_of, load_peft, save_peft
from fedloom.lora.peft_settings import CONFIG_NAME
from fedloom.seeding import torch_stream

TOKENS = torch.arange(24).view(1, 24) % 50


def side_logits(family: str, adapter: Adapter) -> torch.Tensor:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.set_side(adapter)
    return lora.model(TOKENS).logits


def mixed_rank_adapter(family: str) -> Adapter:
    shapes, generator = LoRAModel(tiny_model(family), TARGETS[family]).shapes, torch_stream(1, "b")
    pairs = {}
    for rank, (name, shape) in enumerate(shapes.items(), start=2):
        pair = fresh_adapter({name: shape}, rank, 1)[name]
        pairs[name] = Pair(torch.randn(pair.b_OR.shape, generator=generator), pair.a_RI)
    return Adapter(pairs)


def test_stock_peft_loads_what_we_write_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    adapter = mixed_rank_adapter(family)
    save_peft(adapter, tmp_path, base_name="tiny", scale=2.0, conv1d=family == "gpt2")
    model = PeftModel.from_pretrained(tiny_model(family), tmp_path).double()
    assert torch.allclose(model(TOKENS).logits, side_logits(family, adapter.to(torch.float64)), atol=1e-6)
    assert algebra.distance(load_peft(tmp_path), adapter) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_stock_peft_writes_with_patterns(family: str, rslora: bool, tmp_path: Path) -> None:
    first = TARGETS[family][0]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[family],
        rank_pattern={first: 2},
        alpha_pattern={first: 5},
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model(family), config)
    model.save_pretrained(tmp_path)
    assert torch.allclose(model(TOKENS).logits, side_logits(family, load_peft(tmp_path).to(torch.float64)), atol=1e-5)


def test_a_rank_of_nothing_is_refused(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(3, 1), torch.ones(1, 2))}), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"r": 0}))
    empty = {"base_model.model.q.lora_A.weight": torch.ones(0, 2), "base_model.model.q.lora_B.weight": torch.ones(3, 0)}
    save_file(empty, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="expected a rank of 1 or more of q, got 0"):
        load_peft(tmp_path)


def test_the_file_states_alpha_as_scale_times_rank(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny", scale=2.0)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "tiny")


def test_a_pickle_in_place_of_safetensors_is_told_from_nothing_at_all(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"found adapter_model\.bin, which may run code .* save_pretrained"):
        load_peft(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="found none; fetch the folder again"):
        load_peft(tmp_path)


def test_a_stated_rank_that_is_not_the_tensors_is_written_as_a_whole_number(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"r": 6}))
    with pytest.raises(AdapterError, match="expected rank 6 of q"):
        load_peft(tmp_path)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    weights = tmp_path / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"alora_invocation_tokens": [1, 2]}, {"bias": "all"}, {"modules_to_save": ["head"]}]
)
def test_what_a_pair_cannot_express_is_refused(setting: dict[str, object], tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | setting))
    with pytest.raises(AdapterError, match=f"{next(iter(setting))} = .* cannot be expressed"):
        load_peft(tmp_path)


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_on_a_changed_base_is_refused_until_peft_converted_it(initialisation: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=initialisation)
    model = get_peft_model(tiny_model("llama").float(), config)
    model.peft_config["default"].init_lora_weights = True  # as peft's guide has it: the start is loaded as it was saved
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = initialisation
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.01
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterError, match=f"{initialisation}' changes the base first; convert it to plain LoRA"):
        load_peft(tmp_path / "trained")
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = side_logits("llama", load_peft(tmp_path / "plain").to(torch.float64))
    assert torch.allclose(ours.float(), logits, atol=1e-5)


@pytest.mark.parametrize("initialisation", ["corda", "lora_ga", "loftq"])
def test_other_initialisations_that_change_the_base_are_refused(initialisation: str, tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"init_lora_weights": initialisation}))
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{initialisation}' changes the base first"):
        load_peft(tmp_path)


@pytest.mark.parametrize("initialisation", ["gaussian", "orthogonal", False])
def test_an_initialisation_that_leaves_the_base_alone_is_read(initialisation: str | bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=initialisation)
    model = get_peft_model(tiny_model("llama").float(), config)
    model.save_pretrained(tmp_path)
    ours = side_logits("llama", load_peft(tmp_path).to(torch.float64))
    assert torch.allclose(ours.float(), model(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (b"[]", r"expected the settings of an adapter, got \[\]"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"peft_type": "LORA", "lora_alpha": 3}', "expected r of q as a number.*, got none"),
        (
            b'{"peft_type": "LORA", "r": 3, "lora_alpha": null}',
            "expected lora_alpha of q as a number.*, got none",
        ),
        (b'{"peft_type": "LORA", "r": "3", "lora_alpha": 3}', 'expected r of q as a number.*, got "3"'),
        (
            b'{"peft_type": "LORA", "r": 3, "lora_alpha": NaN}',
            "expected lora_alpha of q as a number.*, got NaN",
        ),
        (
            b'{"peft_type": "LORA", "r": 3, "lora_alpha": 3, "rank_pattern": [1]}',
            r"expected rank_pattern .*, got \[1\]",
        ),
    ],
)
def test_malformed_settings_are_refused_by_name(written: bytes, complaint: str, tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    (tmp_path / CONFIG_NAME).write_bytes(written)
    with pytest.raises(AdapterError, match=f"{CONFIG_NAME}: {complaint}.*; fetch it again"):
        load_peft(tmp_path)


def test_a_file_where_the_folder_goes_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for place in (tmp_path / "mine", tmp_path / "mine" / "inside"):
        with pytest.raises(AdapterError, match="expected a folder to write to, found a file; choose"):
            save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), place, base_name="tiny")
    assert (tmp_path / "mine").read_text() == "keep"


def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    diverged = Pair(torch.full((4, 3), math.nan), torch.ones(3, 4))
    with pytest.raises(AdapterError, match="expected finite numbers, got NaN or infinity at q"):
        save_peft(Adapter({"q": diverged}), tmp_path / "new", base_name="tiny")
    assert not (tmp_path / "new").exists()
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    names = {f"base_model.model.q.lora_{f}.weight": t for f, t in (("B", diverged.b_OR), ("A", diverged.a_RI))}
    save_file(names, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_NAME}: expected finite numbers, got NaN or infinity at q"):
        load_peft(tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_no_file_can_hold_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"scale: expected a finite number above 0, got {scale}; choose"):
        save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny", scale=scale)
    assert not any(tmp_path.iterdir())


def test_an_adapter_that_adds_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adds nothing"):
        save_peft(Adapter(), tmp_path / "nothing", base_name="tiny")
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def adapter() -> Adapter:
    return mixed_rank_adapter("llama")


@pytest.mark.parametrize("key", ["lora_alpha", "r"])
@pytest.mark.parametrize("value", ["10" * 200, "NaN", "Infinity", "-4", '"4"', "true", "[4]", "{}", "null", "1e400"])
def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path, adapter: Adapter, key: str, value: str) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config |= {"rank_pattern": {}, "alpha_pattern": {}, key: "@"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config).replace('"@"', value))
    with pytest.raises(AdapterError, match=r"expected (r|lora_alpha|rank) .*; fetch it again") as caught:
        load_peft(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a|", "(?P<n>", "[z-a]", "(?<!"])
def test_a_pattern_must_be_one(tmp_path: Path, adapter: Adapter, key: str, pattern: str) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {key: {pattern: 8} | config[key]}))
    with pytest.raises(AdapterError, match=f"{CONFIG_NAME}: expected regular expressions in {key}"):
        load_peft(tmp_path)


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9])+)+(!|#)", "(a|aa|aaa)*(b|c)"])
def test_matching_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(peft_settings, "MATCHING_SECONDS", 0.2)
    scales = peft_settings.Scales({"r": 4, "lora_alpha": 4, "rank_pattern": {pattern: 8}}, tmp_path)
    begun = time.monotonic()
    with pytest.raises(AdapterError, match="expected a rank_pattern that is matched within"):
        scales.of("a" * 2000, 4)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("key", sorted(peft_settings._TYPES))
def test_a_setting_of_the_wrong_type_is_refused_by_name(tmp_path: Path, adapter: Adapter, key: str) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {key: 7.5}))
    with pytest.raises(AdapterError, match=f"{CONFIG_NAME}: expected {key} as .*, got 7.5"):
        load_peft(tmp_path)


def test_settings_nested_beyond_reason_are_one_line(tmp_path: Path, adapter: Adapter) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    (tmp_path / CONFIG_NAME).write_text("[" * 200_000)
    with pytest.raises(AdapterError, match="expected JSON"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    "wrong", [lambda t: t.flatten(), lambda t: t[None], lambda t: t.to(torch.int8), lambda t: t[:1], lambda t: t[:0]]
)
def test_a_tensor_of_another_shape_or_dtype_is_refused_by_name(
    tmp_path: Path, adapter: Adapter, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    key = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {key: wrong(tensors[key]).contiguous()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="expected"):
        load_peft(tmp_path)


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_is_one_line(tmp_path: Path, adapter: Adapter, length: int) -> None:
    save_peft(adapter, tmp_path, base_name="base")
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(AdapterError, match="expected a safetensors file"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("base", "name", "is_folder"),
    [
        ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M", False),
        ("gpt2", "gpt2", False),
        ("embedded", "embedded", False),
        ("/somebody/models/gpt2", "gpt2", True),
        ("~/models/tiny", "tiny", True),
        ("../tiny", "tiny", True),
        ("/home/somebody/.cache/huggingface/hub/models--org--name/snapshots/0a1b", "org/name", False),
    ],
)
def test_a_base_is_named_by_its_hub_name_or_its_folder_s_name(
    base: str, name: str, is_folder: bool, tmp_path: Path
) -> None:
    reference = BaseReference.of(base, "c0ffee")
    save_peft(Adapter({"q": Pair(torch.ones(3, 1), torch.ones(1, 2))}), tmp_path, base_name=reference)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == name
    assert base_of(tmp_path) == (name, BaseReference(name, is_folder, "c0ffee"))


def test_weights_with_metadata_are_the_same_bytes_every_time_and_load(tmp_path: Path) -> None:
    adapter = Adapter({"q": Pair(torch.ones(3, 1), torch.ones(1, 2)), "v": Pair(torch.ones(5, 1), torch.ones(1, 2))})
    for number in range(8):
        save_peft(adapter, tmp_path / str(number), base_name=BaseReference("base", is_folder=True, sha256="c0ffee"))
    assert len({(tmp_path / str(number) / WEIGHTS_NAME).read_bytes() for number in range(8)}) == 1
    assert algebra.distance(load_peft(tmp_path / "0"), adapter) == 0.0


@pytest.mark.filterwarnings("error::UserWarning")
def test_peft_loads_what_names_its_base_by_folder_and_hash_without_a_warning(family: str, tmp_path: Path) -> None:
    reference = BaseReference("base", is_folder=True, sha256="c0ffee")
    save_peft(mixed_rank_adapter(family), tmp_path, base_name=reference, conv1d=family == "gpt2")
    PeftModel.from_pretrained(tiny_model(family), tmp_path)


@pytest.mark.parametrize("key", ["peft_type", "init_lora_weights", "rank_pattern", "bias", "use_dora", "anything"])
@pytest.mark.parametrize("depth", [50, 400, 700, 5000])
def test_settings_nested_however_deep_are_one_line_or_do_not_matter(key: str, depth: int, tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    settings = json.loads((tmp_path / CONFIG_NAME).read_text()) | {key: "HERE"}
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * depth):
        (tmp_path / CONFIG_NAME).write_text(json.dumps(settings).replace('"HERE"', value))
        said = ""
        try:
            load_peft(tmp_path)
        except AdapterError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
