"""Every shipped recipe loads, says what it claims, and runs on the small base."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from shown_output import is_like

from fedloom import config, recipes
from fedloom.cli.experiments import load_settings
from fedloom.config import checks
from fedloom.errors import SettingsError

NAMES = recipes.names()
OF_ROUNDING = 0.2
"""Share by which a small run's loss differs on another processor: its steps amplify rounding. The default ended at
0.362 and 0.330 nats before and after one change of rounding on an Intel Xeon, and at 0.377 on an AMD EPYC."""
OFTEN = ("default", "demo", "flora-hetero-dolly")
"""The small forms that run with every slow test; FEDLOOM_SMALL_RUNS=1 runs all, five minutes more of CPU."""


def loaded(name: str, *overrides: str) -> config.Settings:
    return config.resolve(config.parse(recipes.read(name), f"{name}.toml"), name, overrides, also=[checks.problems])


def test_the_shipped_recipes_are_these() -> None:
    assert NAMES == [
        "default",
        "demo",
        "e2e-dirichlet",
        "fedit-dolly",
        "fedit-natural",
        "flora-hetero-dolly",
        "flora-homo-alpaca",
        "splitlora-e2e",
        "splitlora-e2e-medium",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads(name: str) -> None:
    loaded(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_its_own_recipe_in_its_commands(name: str) -> None:
    recipe = recipes.describe(name)
    assert recipe.command.split()[0] == recipe.small.split()[0] == "fedloom"
    assert recipe.command.split()[2] == recipe.small.split()[2] == name
    assert recipes.read(name).startswith(f"# {name}\n")


def small_overrides(name: str) -> list[str]:
    words = shlex.split(recipes.describe(name).small)
    return [value for option, value in pairwise(words) if option == "--set"]


@pytest.mark.parametrize("name", NAMES)
def test_the_small_run_changes_the_base_the_rows_and_what_fits_steps_to_them(name: str) -> None:
    """Method, ranks, clients and rounds stay; a smaller base wants a larger rate, fewer rows want smaller batches."""
    first, second, *others = small_overrides(name)
    assert (first, second) == ("model.base=embedded", "data.path=embedded")
    fitting = ("training.batch_size=", "training.learning_rate=", "training.warmup_steps=")
    assert all(override.startswith(("data.", "partition.", *fitting)) for override in others)


@pytest.mark.parametrize("name", NAMES)
def test_the_small_run_is_what_run_takes_in_an_empty_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the checks of the command itself, the base's context and the files on disk among them."""
    monkeypatch.chdir(tmp_path)
    assert load_settings(name, small_overrides(name)).model.base == "embedded"


@pytest.mark.parametrize("name", NAMES)
def test_a_small_run_teaches_something(name: str) -> None:
    """A reader should see that it worked: the loss of the header's last line is below the base's."""
    loss, base = losses_in(recipes.describe(name).prints)
    assert loss < 0.6 * base


def losses_in(line: str) -> tuple[float, float]:
    """Return the loss and the base's that a run's line states."""
    numbers = re.match(r"held-out loss ([\d.]+) nats per token \(base ([\d.]+)\)", line)
    assert numbers is not None
    return float(numbers[1]), float(numbers[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_small_run_ends_with_what_its_header_says(name: str, tmp_path: Path) -> None:
    """As typed, in an empty folder, to its end."""
    if name not in OFTEN and not os.environ.get("FEDLOOM_SMALL_RUNS"):
        pytest.skip("a minute of CPU: FEDLOOM_SMALL_RUNS=1 runs the small form of every recipe")
    recipe = recipes.describe(name)
    command = [sys.executable, "-m", *shlex.split(recipe.small)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    printed = next(line for line in done.stdout.splitlines() if line.startswith("held-out loss"))
    loss, base = losses_in(printed)
    stated, _ = losses_in(recipe.prints)
    assert loss == pytest.approx(stated, rel=OF_ROUNDING)
    assert loss < 0.6 * base
    # All else on the line, the base's loss and the counts, as on a page.
    assert is_like(recipe.prints.partition("(")[2], printed.partition("(")[2]), done.stdout


def adapter_bytes(layers: int, shapes: list[tuple[int, int]], rank: int) -> int:
    return 4 * layers * sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def test_bytes_in_the_headers_follow_from_the_shapes() -> None:
    tinyllama = (22, [(2048, 2048), (256, 2048)])
    llama = [(128, 128), (64, 128), (64, 128), (128, 128), (384, 128), (384, 128), (128, 384)]
    claims = {
        "default": [adapter_bytes(4, [(128, 128), (64, 128)], 16)],
        "demo": [adapter_bytes(4, llama, 96)],
        "fedit-dolly": [adapter_bytes(32, [(4096, 4096)] * 4, 8)],
        "fedit-natural": [adapter_bytes(32, [(4096, 4096)] * 4, 8)],
        "flora-hetero-dolly": [adapter_bytes(*tinyllama, 64), adapter_bytes(*tinyllama, 160)],
        "flora-homo-alpaca": [adapter_bytes(*tinyllama, 16), adapter_bytes(*tinyllama, 160)],
        "e2e-dirichlet": [adapter_bytes(12, [(2304, 768)], 8)],
        "splitlora-e2e": [adapter_bytes(12, [(2304, 768)], 4) // 4, adapter_bytes(3, [(2304, 768)], 4) // 4],
        "splitlora-e2e-medium": [adapter_bytes(24, [(3072, 1024)], 4) // 4, adapter_bytes(3, [(3072, 1024)], 4) // 4],
    }
    assert sorted(claims) == NAMES
    for name, numbers in claims.items():
        for number in numbers:
            assert f"{number:,}" in recipes.describe(name).expect, name


def test_heterogeneous_flora_has_the_papers_ranks() -> None:
    settings = loaded("flora-hetero-dolly")
    assert sum(settings.client_ranks) == 160
    assert set(settings.client_scales) == {2.0}


def test_fedit_draws_one_client_of_ten() -> None:
    assert loaded("fedit-dolly").cohort_size == 1


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean fedit-dolly"):
        recipes.read("fedit-doly")


def test_a_copy_is_the_recipe_and_never_overwrites(tmp_path: Path) -> None:
    file = recipes.copy("fedit-dolly", tmp_path)
    assert file == tmp_path / "fedit-dolly.toml"
    assert file.read_text(encoding="utf-8") == recipes.read("fedit-dolly")
    with pytest.raises(SettingsError, match="expected a new file"):
        recipes.copy("fedit-dolly", file)


def test_a_copy_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        recipes.copy("fedit-dolly", tmp_path / "no" / "where.toml")
