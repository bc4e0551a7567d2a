"""Bases that are stored quantised: every command names what is missing, in one line, from the configuration alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.quantization_config import QuantizationMethod

from fedloom.cli.app import exit_code
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.errors import MissingExtraError, ModelError
from fedloom.models.load import load_base
from fedloom.models.stored_quantization import lack_of

INSTALLED_WITH = {
    "bitsandbytes": "'fedloom[quantized]'",
    "gptq": "optimum gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "fbgemm-gpu",
    "aqlm": "aqlm",
    "quanto": "optimum-quanto",
    "hqq": "hqq",
    "torchao": "torchao",
    "eetq": "kernels",
    "higgs": "flute-kernel fast_hadamard_transform",
    "vptq": "vptq",
    "spqr": "spqr_quant",
    "auto-round": "auto-round",
    "quark": "amd-quark",
    "fp_quant": "fp_quant",
    "fouroversix": "fouroversix",
    "sinq": "sinq",
    "gguf": "gguf",
}
"""What pip installs for a method."""
BY_TRANSFORMERS = {"fp8", "mxfp8", "mxfp4", "metal", "bitnet", "gemma"}
"""Methods that need no other package."""
UNREADABLE = {"nvfp4"}
"""Methods of which transformers reads no stored weights."""
COMMANDS = ("validate", "describe", "doctor", "run")


@pytest.fixture
def base(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a base; of the packages that read quantised weights none is installed."""
    monkeypatch.setattr("fedloom.models.stored_quantization.find_spec", lambda _: None)
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stored(base: Path, method: str | None, **more: object) -> None:
    path = base / "config.json"
    named = {} if method is None else {"quant_method": method}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {**named, **more}}))


def lines_of(command: str, base: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """Return the lines of a command about the base."""
    out = ["--out", str(base.parent / "run")] if command == "run" else []
    code = exit_code([command, "demo", "--set", f"model.base={base}", *more, *out])
    printed = capsys.readouterr()
    assert code == (2 if "stored quantised" in printed.out + printed.err else 0), printed
    assert not (base.parent / "run" / "manifest.json").exists()
    return [line for line in (printed.out + printed.err).splitlines() if "stored quantised" in line]


def test_every_method_of_transformers_has_its_place() -> None:
    known = {method.value for method in QuantizationMethod}
    assert known == INSTALLED_WITH.keys() | BY_TRANSFORMERS | UNREADABLE


METHODS = [*INSTALLED_WITH, "nvfp4", "of-tomorrow"]
EACH = [("validate", method) for method in METHODS]
EACH += [(command, method) for command in COMMANDS[1:] for method in ("bitsandbytes", "gptq", "of-tomorrow")]


@pytest.mark.parametrize(("command", "method"), EACH)
def test_every_command_names_the_package_or_the_method(
    method: str, command: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(base, method)
    (line,) = lines_of(command, base, capsys)
    assert f"which is stored quantised by {method}, which " in line
    if method in INSTALLED_WITH:
        assert f"; install it (pip install {INSTALLED_WITH[method]}), or choose the unquantised base" in line
    else:
        assert "cannot be read here, in --set; choose the unquantised base" in line


@pytest.mark.parametrize("method", sorted(BY_TRANSFORMERS))
def test_what_transformers_reads_by_itself_is_let_through(method: str) -> None:
    assert lack_of({"quantization_config": {"quant_method": method}}) is None


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_bitsandbytes_is_known_by_its_flags_too(bits: str, place: str) -> None:
    flags = {bits: True}
    config = {place: flags if place == "quantization_config" else {"quantization_config": flags}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom.models.stored_quantization.find_spec", lambda _: None)
        lack = lack_of(config)
    assert lack is not None
    assert (lack.method, lack.extra) == ("bitsandbytes", "quantized")


def test_a_base_loaded_from_python_is_refused_alike(base: Path) -> None:
    for method, kind, told in (
        ("bitsandbytes", MissingExtraError, r"fedloom\[quantized\]"),
        ("awq", ModelError, r"is stored quantised by awq, which needs gptqmodel; install it"),
        ("of-tomorrow", ModelError, "by of-tomorrow, which cannot be read here; choose the unquantised base"),
    ):
        stored(base, method)
        with pytest.raises(kind, match=told):
            load_base(base)


def test_a_stored_quantised_base_is_not_quantised_once_more(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(base, "fp8")
    for command in COMMANDS:
        lines = lines_of(command, base, capsys, "--set", "model.quantization=4bit")
        assert [line for line in lines if "model.quantization: expected none with a base that is stored" in line]
    with pytest.raises(ModelError, match=r"model\.quantization: expected none .*\(by fp8\), got '4bit'; drop it"):
        load_base(base, quantization="4bit")


def test_the_check_needs_no_torch() -> None:
    code = "import sys, fedloom.models.stored_quantization; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
