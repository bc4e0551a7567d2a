"""Uploading an export: a private repository, one commit, and a line where the hub refuses. The hub is a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError

from fedloom.cli.app import exit_code
from fedloom.errors import RunError, SettingsError
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import save_peft
from fedloom.results.push import check_name, push


class Hub:
    """Stands in for the hub's interface and keeps what it was asked."""

    asked: list[tuple[str, dict[str, Any]]]
    refusal: Exception | None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.asked.append(("create", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.asked, Hub.refusal = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_folder_goes_to_a_private_repository_in_one_commit(hub: type[Hub], tmp_path: Path) -> None:
    assert push(tmp_path, "clinic/adapter") == "https://huggingface.co/clinic/adapter"
    (made, options), (sent, files) = hub.asked
    assert (made, options["private"], options["exist_ok"]) == ("create", True, True)
    assert (sent, files["repo_id"], files["folder_path"]) == ("upload", "clinic/adapter", tmp_path)


@pytest.mark.parametrize("refusal", [LocalTokenNotFoundError("no token found"), OSError("no route to host")])
def test_a_refusal_is_one_line_that_says_where_the_folder_is(
    refusal: Exception, hub: type[Hub], tmp_path: Path
) -> None:
    hub.refusal = refusal
    with pytest.raises(RunError, match=f"got {refusal}; check the token") as told:
        push(tmp_path, "clinic/adapter")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "../x", "a b/c", "/x", "x/"])
def test_what_is_no_repository_is_refused_before_anything_is_written(name: str) -> None:
    with pytest.raises(SettingsError, match="expected OWNER/NAME"):
        check_name(name)


@pytest.fixture
def sites(tmp_path: Path) -> list[str]:
    """Two adapters to merge."""
    for name in ("a", "b"):
        pair = Pair(torch.ones(3, 1), torch.full((1, 2), float(len(name))))
        save_peft(Adapter({"m.q_proj": pair}), tmp_path / name, base_name="org/base")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_merged_adapter_is_uploaded_as_an_export_is(
    hub: type[Hub], sites: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "together"
    assert exit_code(["aggregate", *sites, "--to", str(to), "--push", "clinic/together"]) == 0
    assert [files["folder_path"] for sent, files in hub.asked if sent == "upload"] == [to]
    assert "uploaded to https://huggingface.co/clinic/together" in capsys.readouterr().err


def test_a_bad_repository_is_refused_before_adapters_are_merged(
    hub: type[Hub], sites: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["aggregate", *sites, "--to", str(tmp_path / "together"), "--push", "together"]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "together").exists()
    assert not hub.asked
