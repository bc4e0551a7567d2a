"""A base is loaded frozen and whole, known by its content; every defect is named."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fedloom
from fedloom import embedded
from fedloom.data.sources import load_rows
from fedloom.errors import MissingExtraError, ModelError
from fedloom.models.load import load_base
from fedloom.training.row_losses import row_losses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a tiny Llama of bytes, without a tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    path = tmp_path / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_is_frozen_in_evaluation_mode_and_of_the_asked_dtype(folder: Path) -> None:
    base = load_base(folder, tokenizer="bytes", dtype="bfloat16", device="cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert (base.dtype, base.device.type, base.name) == (torch.bfloat16, "cpu", str(folder))


def test_threads_load_one_after_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping loads would leave transformers without its tying of weights for the rest of the process."""
    inside, most, load = 0, 0, transformers.AutoModelForCausalLM.from_pretrained

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        try:
            return load(*args, **kwargs)
        finally:
            inside -= 1

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", counted)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: load_base(folder, tokenizer="bytes", device="cpu"), range(8)))
    assert most == 1


def test_auto_dtype_is_that_of_the_weights(folder: Path) -> None:
    load_base(folder, tokenizer="bytes").model.to(torch.float16).save_pretrained(folder)
    assert load_base(folder, tokenizer="bytes", dtype="auto", device="cpu").dtype == torch.float16


def test_the_hash_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    one, other = (load_base(path, tokenizer="bytes").revision_hash for path in (folder, copy))
    assert one == other
    edit_config(copy, rms_norm_eps=1e-5)
    assert load_base(copy, tokenizer="bytes").revision_hash != one


@pytest.mark.parametrize("choice", [{"dtype": "fp16"}, {"dtype": torch.float16}, {"quantization": "4bits"}], ids=str)
def test_a_dtype_or_quantization_that_is_not_there_is_refused(folder: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"expected dtype float32, .* and quantization none, 4bit, 8bit, got"):
        load_base(folder, **choice)


def test_the_embedded_base_and_rows_go_by_their_name() -> None:
    assert load_base("embedded").revision_hash == load_base(embedded.model_path()).revision_hash
    assert [len(load_rows("embedded", split)) for split in ("train", "test")] == [4000, 400]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "too/many/parts"])
def test_an_absent_folder_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"model.base: expected a folder or a hub name, got '{name}'"):
        load_base(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"with config\.json, found none"):
        load_base(tmp_path)


def test_a_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not a model's configuration"):
        load_base(folder, tokenizer="bytes")


def test_a_model_that_is_no_causal_lm_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="vit")
    with pytest.raises(ModelError, match=r"expected a causal language model, .* holds a 'vit'"):
        load_base(folder, tokenizer="bytes")


def test_a_missing_tokenizer_is_told_with_the_way_out(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer; set model.tokenizer .* 'bytes'"):
        load_base(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, keep: float) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        load_base(folder, tokenizer="bytes")


def test_absent_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected weights as \*\.safetensors"):
        load_base(folder, tokenizer="bytes")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "part-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"names part-1\.safetensors, which is not in"):
        load_base(folder, tokenizer="bytes")


def test_a_missing_tensor_is_not_filled_with_noise(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        load_base(folder, tokenizer="bytes")


def test_weights_of_other_shapes_are_refused(folder: Path) -> None:
    edit_config(folder, hidden_size=32)
    with pytest.raises(ModelError, match="do not load"):
        load_base(folder, tokenizer="bytes")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:x"])
def test_an_absent_device_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"model.device: expected auto or a device .* got '{device}'"):
        load_base(folder, tokenizer="bytes", device=device)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_without_its_extra_names_the_extra(
    folder: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.models.load.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"fedloom\[quantized\]"):
        load_base(folder, tokenizer="bytes", quantization=quantization)  # type: ignore[arg-type]


@pytest.mark.extra("quantized")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("quantization", "most"), [("8bit", 0.02), ("4bit", 0.2)])
def test_a_quantized_base_scores_near_the_whole_one(quantization: str, most: float, data_dir: Path) -> None:
    model, texts = data_dir / "models" / "stories3M", ["Once upon a time, there was a little girl named Lily."]
    losses = []
    for choice in ("none", quantization):
        base = load_base(model, device="cpu", quantization=choice)  # type: ignore[arg-type]
        ids = torch.tensor([base.tokenizer(texts[0])["input_ids"]])
        losses.append(float(base.model(input_ids=ids, labels=ids).loss))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=most)


@pytest.mark.extra("quantized")
@pytest.mark.filterwarnings("ignore")
def test_clients_train_beside_a_quantized_base(tmp_path: Path, data_dir: Path) -> None:
    changes = [
        f"model.base={data_dir / 'models' / 'stories3M'}",
        "model.quantization=4bit",
        "method.name=flora",
        "federation.num_rounds=1",
        "training.local_steps=2",
        "data.max_rows=80",
        "evaluation.suites=[]",
    ]
    summary = fedloom.run(fedloom.load_settings("demo", changes), tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]


@pytest.mark.data
def test_greedy_decoding_gives_the_published_text(data_dir: Path) -> None:
    """Golden: the text that comes with stories260K, 200 tokens from the beginning of text."""
    base = load_base(data_dir / "models" / "stories260K", device="cpu")
    start = torch.tensor([[base.tokenizer.bos_token_id]])
    output = base.model.generate(start, max_new_tokens=200, do_sample=False)
    text = base.tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.strip() == (data_dir / "models" / "golden_stories260K.txt").read_text().strip()


@pytest.mark.data
def test_stories3m_has_its_known_perplexity_on_stories(data_dir: Path) -> None:
    """Documented with the data: perplexity 3.49 on children's stories; the packed scorer must come near on a sample."""
    from fedloom.data.tokens import TokenSet

    base = load_base(data_dir / "models" / "stories3M", device="cpu")
    stories = (data_dir / "models" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:40]
    ids = [base.tokenizer(story.strip())["input_ids"][:512] for story in stories if story.strip()]
    rows = TokenSet.from_rows((row, [True] * len(row)) for row in ids)
    perplexity = 2.718281828 ** row_losses(base.model, rows, token_budget=4096).mean_nats
    assert 2.5 < perplexity < 6.0
