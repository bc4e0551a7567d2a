"""Cutting a decoder, and loading only a part of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from split.split_cases import DEPTH, FAMILIES, random_model

from fedloom.errors import CutError, ModelError
from fedloom.models.cut import cut, verify_cut
from fedloom.models.partial_load import load_bottom, load_middle, load_top

IDS_BT = torch.tensor([[5, 9, 3, 44, 7, 21, 60, 8, 13]])
BOUNDARIES = [(1,), (2,), (3,), (1, 4), (1, 3), (2, 3)]


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_chained_parts_equal_the_uncut_decoder(case: str, boundaries: tuple[int, ...]) -> None:
    model = random_model(case)
    expected = model.base_model(IDS_BT).last_hidden_state
    hidden = IDS_BT
    for part in cut(model, *boundaries):
        hidden = part(hidden)
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("boundaries", [(1,), (2, 3)])
def test_parts_with_caches_of_their_own_decode_as_the_uncut_model_does(case: str, boundaries: tuple[int, ...]) -> None:
    model = random_model(case)
    expected = model.base_model(IDS_BT, use_cache=False).last_hidden_state
    parts = cut(model, *boundaries)
    caches = [part.new_cache() for part in parts]
    seen = []
    for start, stop in [(0, 6), (6, 7), (7, 8), (8, 9)]:
        hidden = IDS_BT[:, start:stop]
        for part, cache in zip(parts, caches, strict=True):
            positions = torch.arange(start, stop)[None]
            hidden = part(hidden, past_key_values=cache, use_cache=True, position_ids=positions)
        seen.append(hidden)
    torch.testing.assert_close(torch.cat(seen, 1), expected, rtol=1e-5, atol=2e-6)


def test_cutting_leaves_the_model_as_it_was() -> None:
    model = random_model("gpt2")
    before = model(IDS_BT).logits
    cut(model, 1, 3)
    assert torch.equal(model(IDS_BT).logits, before)


@pytest.mark.parametrize(
    ("boundaries", "allowed"), [((0,), "1 to 3"), ((4,), "1 to 3"), ((3, 3), "1 to 2"), ((-1,), "1 to 3")]
)
def test_a_cut_outside_the_model_is_refused_with_what_is_allowed(boundaries: tuple[int, ...], allowed: str) -> None:
    with pytest.raises(CutError, match=f"split.cut_layer: expected {allowed}"):
        cut(random_model("llama"), *boundaries)


def test_a_tail_that_leaves_nothing_for_the_server_is_refused() -> None:
    with pytest.raises(CutError, match=r"split.tail_blocks: expected 0 to 2"):
        cut(random_model("llama"), 1, 0)


def test_a_family_that_cannot_be_cut_is_refused_by_name() -> None:
    model = random_model("llama")
    model.config.model_type = "unlisted"
    model.model.others = torch.nn.ModuleList([torch.nn.Identity() for _ in range(len(model.model.layers))])
    with pytest.raises(CutError, match="unlisted"):
        cut(model, 1)


def test_a_cut_that_changes_the_result_is_refused_by_name() -> None:
    model = random_model("llama")
    parts = cut(model, 2)
    parts[1].decoder.norm = torch.nn.Identity()
    with pytest.raises(CutError, match="llama cannot be cut"):
        verify_cut(model, parts)


@pytest.mark.parametrize("case", ["llama", "llama, tied", "gpt2", "gpt2, untied", "gemma2", "phi"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_each_side_loads_its_own_part_and_nothing_else(case: str, shard_size: str, tmp_path: Path) -> None:
    model = random_model(case)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    client, server, tail = load_bottom(tmp_path, 1), load_middle(tmp_path, 1, 3), load_top(tmp_path, 3)
    hidden = tail.part(server.part(client.part(IDS_BT)))
    torch.testing.assert_close(hidden, model.base_model(IDS_BT).last_hidden_state, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        tail.model.get_output_embeddings()(hidden), model.get_output_embeddings()(hidden), rtol=0, atol=0
    )
    whole = sum(p.nbytes for p in model.parameters())
    blocks = sum(p.nbytes for n, p in model.named_parameters() if ".1." in n or ".2." in n)
    assert server.loaded_bytes == blocks
    assert max(client.loaded_bytes, tail.loaded_bytes) < whole - blocks
    assert not any(p.is_meta for part in (client, server, tail) for p in part.model.parameters())


def test_loading_where_no_cut_can_be_is_refused(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    for load in (lambda: load_bottom(tmp_path, 0), lambda: load_bottom(tmp_path, DEPTH), lambda: load_top(tmp_path, 0)):
        with pytest.raises(CutError, match=r"split\.cut_layer"):
            load()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_bottom(tmp_path, 1)
