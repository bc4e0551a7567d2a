"""The pages cannot rot: links resolve, names exist, commands parse, the quickstart's commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from shown_output import missing, shown_beside

from fedloom import config, embedded, recipes
from fedloom.cli.app import app, exit_code
from fedloom.cli.experiments import load_settings
from fedloom.cli.options import DEFAULT_RECIPE
from fedloom.config import compared_variants
from fedloom.config.method_settings import split_overrides

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.rglob("*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "examples/README.md",
    ]
)
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = ("console", "bash", "sh")
TRAINING = ("run", "compare")
OFFLINE = (["recipes"], *([name, "demo"] for name in ("doctor", "validate", "describe", "run", "compare")))
COMMAND: Any = typer.main.get_command(app)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
MARKDOWN = sorted({*PAGES, *(ROOT / "src").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *ROOT.glob("*.md")})
MAX_COLUMNS = 120


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def shown(page: Path) -> list[tuple[list[str], list[str]]]:
    """Return the words after ``fedloom`` of every command in a page's shell blocks, and what is shown below it."""
    found = [one for block in blocks(page, *SHELLS) for one in shown_beside(block)]
    return [(shlex.split(line, comments=True)[1:], below) for line, below in found if re.match(r"fedloom\b", line)]


def commands(page: Path) -> list[list[str]]:
    """Return the words after ``fedloom`` of every command in a page's shell blocks."""
    return [words for words, _ in shown(page)]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    for target in (first or second for first, second in LINK.findall(prose_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        assert linked.suffix != ".md" or not anchor or anchor in anchors(linked), f"{target}: no such heading"
        assert DOCS not in page.parents or linked.is_relative_to(DOCS), f"{target} leaves the documentation"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_line_of_markdown_fits_the_columns(page: Path) -> None:
    """Tables and code too: a row that does not fit becomes a list item, a long link a reference."""
    lines = enumerate(text_of(page).splitlines(), start=1)
    assert not [f"line {number}: {len(line)} columns" for number, line in lines if len(line) > MAX_COLUMNS]


@cache
def defined_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"def (test_\w+)\(", text_of(file))}


def nav_pages(entry: object) -> list[str]:
    match entry:
        case str():
            return [entry]
        case list():
            return [page for part in entry for page in nav_pages(part)]
        case dict():
            return [page for part in entry.values() for page in nav_pages(part)]
    raise AssertionError(entry)


def test_the_navigation_holds_every_page_once() -> None:
    listed = nav_pages(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@every_page
def test_every_test_and_file_that_a_page_names_exists(page: Path) -> None:
    prose = prose_of(page)
    for name in re.findall(r"`(test_\w+)`", prose):
        assert name in defined_tests(), name
    for path in re.findall(r"`((?:src|tests|scripts|examples|benchmarks)/[\w./-]+\.\w+)`", prose):
        assert (ROOT / path).exists(), path


@every_page
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    settings = {name for name, _ in config.every_setting()}
    tables = {name.partition(".")[0] for name in settings}
    for name in re.findall(rf"`((?:{'|'.join(sorted(tables))})\.[a-z_0-9]+)\b", prose_of(page)):
        assert name in settings or name.endswith((".json", ".jsonl", ".toml")), name


def test_the_map_of_the_design_holds_every_package() -> None:
    section = text_of(DOCS / "design.md").partition("## The map")[2].partition("\n## ")[0]
    listed = {
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    there = {path.stem for path in (ROOT / "src" / "fedloom").iterdir() if not path.name.startswith("_")}
    assert listed == {name for name in there if name != "py"}


@every_page
def test_every_command_parses(page: Path) -> None:
    for words in commands(page):
        command, context = COMMAND, None
        while words and hasattr(command, "commands") and words[0] in command.commands:
            context = typer.Context(command, info_name=words[0], parent=context)
            command, words = command.commands[words[0]], words[1:]
        assert context is not None or not words, f"no such command: fedloom {shlex.join(words)}"
        command.make_context("fedloom", list(words), parent=context, resilient_parsing=False)


def recipe_of(words: list[str]) -> str:
    """Return the recipe that a command names, or the one that it takes where it names none."""
    return words[1] if len(words) > 1 and not words[1].startswith("-") else DEFAULT_RECIPE


@every_page
def test_every_recipe_and_override_of_a_command_is_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "adding-a-method.md":
        install("my_fedex", blocks(page, "python")[0], "my-fedex = my_fedex:METHOD")
    (tmp_path / "e2e-dataset").mkdir()
    (tmp_path / "e2e-dataset/trainset.csv").write_text("mr,ref\n", encoding="utf-8")
    for position, recipe in enumerate(blocks(DOCS / "quickstart.md", "toml")):
        (tmp_path / "mine.toml").write_text(recipe, encoding="utf-8")
        assert position == 0
    for words in commands(page):
        if words[:1] in (["run"], ["describe"], ["validate"], ["compare"]) and "path/to/" not in " ".join(words):
            given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            overrides, own = split_overrides(given)
            grid = [words[i + 1] for i, word in enumerate(words) if word == "--grid"]
            if own or grid:
                methods = words[words.index("--methods") + 1].split(",")
                assert compared_variants(load_settings(recipe_of(words), overrides), methods, [1], own, grid)
            assert (
                exit_code(["validate", recipe_of(words), *(part for o in overrides for part in ("--set", o))]) == 0
            ), words


def test_the_pages_of_methods_name_their_recipes() -> None:
    named = {words[1] for page in (DOCS / "methods").glob("*.md") for words in commands(page) if words[0] in TRAINING}
    assert named <= set(recipes.names())


def run_page(page: Path, folder: Path, leave_out: Callable[[list[str]], bool]) -> None:
    """Run a page's commands and then its programs, as a reader would, in one folder; what is shown must be printed."""
    if not embedded.model_path().is_dir():
        pytest.skip("the embedded model is absent")
    for words, below in shown(page):
        if not leave_out(words):
            command = [sys.executable, "-m", "fedloom", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
            printed = [*done.stdout.splitlines(), *done.stderr.splitlines()]
            assert not missing(below, printed), f"{shlex.join(words)} printed\n{done.stdout}{done.stderr}"
    for program in blocks(page, "python"):
        subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=600)


def test_lines_are_compared_by_words_and_nearly_by_numbers() -> None:
    printed = ["reading rows", "held-out loss 3.4170 nats per token (base 5.0148)", "bytes up 3.8 MB, down 6,240"]
    assert not missing(["held-out loss 3.42 nats per token (base 5.01)", "bytes up 3.8 MB, down 6,239"], printed)
    assert missing(["held-out loss 3.17 nats per token (base 5.01)"], printed), "another figure"
    assert missing(["held-out gain 3.417 nats per token (base 5.0148)"], printed), "another word"
    assert missing(["bytes up 3.8 MB, down 6,240", "reading rows"], printed), "another order"


def test_only_pages_that_are_run_show_what_is_printed() -> None:
    """What a page shows and nobody compares would go stale."""
    showing = [page for page in PAGES if any(below for words, below in shown(page))]
    assert sorted(showing) == sorted([DOCS / "quickstart.md", ROOT / "README.md"])


@pytest.mark.slow
def test_the_quickstart_runs_as_written(tmp_path: Path) -> None:
    page = DOCS / "quickstart.md"
    (tmp_path / "mine.toml").write_text(blocks(page, "toml")[0], encoding="utf-8")
    run_page(page, tmp_path, leave_out=lambda words: words[0] == "compare")
    assert (tmp_path / "runs/first/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_readme_runs_as_written_but_for_what_needs_the_hub(tmp_path: Path) -> None:
    """What needs an extra is run where that extra is: tests/engines/test_cluster_page.py."""

    def elsewhere(words: list[str]) -> bool:
        return "engine.name=ray" in words or (words[:2] not in OFFLINE and "runs/x" not in words)

    run_page(ROOT / "README.md", tmp_path, leave_out=elsewhere)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "woven/adapter_model.safetensors").is_file()
