"""A command loads what it uses: help no torch, readers of adapters no modelling code, refusals no base."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedloom.config import Settings
from fedloom.experiment import run

HEAVY = {"torch", "transformers", "datasets", "peft", "numpy"}
MODELLING = {"transformers", "peft", "datasets", "pandas", "pyarrow", "matplotlib", "bitsandbytes", "lm_eval"}
"""What neither a report nor an adapter's file needs."""
BESIDE_A_BASE = MODELLING - {"transformers"}
"""What the passes of a base do not need."""
PROGRAM = """
import contextlib, io, json, shlex, sys
from fedloom.cli.app import exit_code

found, counted = [], set(sys.argv[1].split(","))
for line in sys.argv[2:]:
    told, result = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(result):
        code = exit_code(shlex.split(line))
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & counted)
    found.append({"line": line, "code": code, "told": told.getvalue(), "loaded": loaded})
print(json.dumps(found))
"""


def ran(lines: list[str], counted: set[str], folder: Path) -> list[dict[str, Any]]:
    """Run commands one after another in one new process; of each its exit code, its errors and what is loaded then."""
    command = [sys.executable, "-c", PROGRAM, ",".join(counted), *lines]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_help_and_validation_load_no_heavy_library(tmp_path: Path) -> None:
    lines = ["--help", "recipes", "run --help", "settings --schema", "validate flora-hetero-dolly", "validate demo"]
    for one in ran(lines, HEAVY, tmp_path):
        assert (one["code"], one["loaded"]) == (0, []), one


REFUSED = {
    "aggregate adapter --to to": "expected two adapters or more",
    "report adapter": "expected a run folder",
    "explain adapter": "expected a run folder",
    "leakage adapter --public rows.jsonl": "expected a run with rows of its own",
    "evaluate adapter": "expected held-out rows",
    "evaluate adapter --data rows.jsonl": "found nothing; check the path",
    "evaluate adapter --data rows.jsonl --shape text": "rows.jsonl",
    "evaluate adapter --suite nonsense": "expected one of e2e",
    "generate adapter": "expected either --prompt TEXT or --interactive",
    "generate adapter --prompt a --template nonsense": "expected one of auto",
    "generate adapter --prompt a --max-new-tokens 0": "expected at least 1 new token",
    "export adapter --to to --rank 2": "the largest rank of the adapter",
    "export adapter --to to --for nonsense": "expected one of peft",
    "judge adapter --endpoint http://localhost:1/v1 --judge m --questions none": "expected a file of questions",
}
"""What options and files tell, and a part of the refusal; the adapter's base is not there."""
WRITTEN = ("export adapter --to out", "export adapter --to served --for vllm", "aggregate adapter out --to merged")


def test_modelling_code_is_loaded_neither_for_a_refusal_nor_to_write_an_adapter_whose_base_is_elsewhere(
    tmp_path: Path,
) -> None:
    stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m.q_proj"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": "org/base"}))
    factors = {"A.weight": torch.ones(1, 2), "B.weight": torch.ones(3, 1)}
    weights = {f"base_model.model.m.q_proj.lora_{name}": factor for name, factor in factors.items()}
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    for one in ran([*REFUSED, *WRITTEN], MODELLING, tmp_path):
        assert (one["code"], one["loaded"]) == (0 if one["line"] in WRITTEN else 2, []), one
        assert REFUSED.get(one["line"], "") in one["told"]
    assert (tmp_path / "merged/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_commands_on_a_run_load_only_what_they_use(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    place = shlex.quote(str(tmp_path / "run"))
    run(settings_for(run__keep_states="all"), tmp_path / "run")
    readers = [f"report {place}", f"explain {place}"]
    for one in ran(readers, MODELLING, tmp_path):
        assert (one["code"], one["loaded"]) == (0, []), one
    users = [f"generate {place} --prompt hi --max-new-tokens 1", f"evaluate {place}"]
    for one in ran(users, BESIDE_A_BASE, tmp_path):
        assert (one["code"], one["loaded"]) == (0, []), one
