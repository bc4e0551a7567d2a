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
from shown_output import blocks_on, missing

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


def shown_blocks(page: Path) -> list[list[tuple[list[str], list[str]]]]:
    """Return for every shell block the words after ``fedloom`` of its commands, each with what is shown below it."""
    return [
        [(shlex.split(line, comments=True)[1:], below) for line, below in block if re.match(r"fedloom\b", line)]
        for block in blocks_on(text_of(page))
    ]


def shown(page: Path) -> list[tuple[list[str], list[str]]]:
    """Return the same of all blocks together."""
    return [one for block in shown_blocks(page) for one in block]


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


SAVED = re.compile(r"Save this as `(\S+)`.*?\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HUB = {name for name in recipes.names() if 'base = "embedded"' not in recipes.read(name)}
SILENT = ("recipes", "settings", "report", "validate", "doctor")
"""What prints no figure of a result: names, paths, whether settings are right, what a machine has."""
OF_A_MINUTE = {"mine.toml", "1,2"}
"""The words of a comparison that is run although it has more rounds than one."""
MARKS = {DOCS / "privacy.md": pytest.mark.extra("privacy")}
"""The extra that a page's commands need."""


def why_not_run(words: list[str]) -> str | None:
    """Return why no test of a page runs one of its commands; None where it does."""
    line = shlex.join(words)
    if re.search(r"path/to/|OWNER/NAME|site\.toml|study\.toml|unit_column=patient|my-fedex|site-a", line):
        return "names what only the reader has"
    if words[0] in (*TRAINING, "describe") and recipe_of(words) in HUB and "model.base=embedded" not in words:
        return "downloads its base"
    if "engine.name=ray" in words or words[0] in ("sites", "serve"):
        return "needs an extra, and is run by the tests of that extra"
    few = any(re.fullmatch(r"federation.num_rounds=([1-4]|30|60)", word) for word in words)
    if words[0] == "demo" or (words[0] in TRAINING and recipe_of(words) != "mine.toml" and not few):
        return "takes minutes"
    if words[0] == "compare" and "federation.num_rounds=1" not in words and not OF_A_MINUTE.issubset(words):
        return "takes minutes"
    if {"runs/demo", "runs/kept", "runs/stopped", "runs/planted"} & {*words}:
        return "is about such a run"
    return None


def run_page(page: Path, folder: Path) -> None:
    """Run a page's commands, as a reader would, in one folder; what is shown must be printed."""
    if not embedded.model_path().is_dir():
        pytest.skip("the embedded model is absent")
    (folder / "mine.toml").write_text(blocks(DOCS / "quickstart.md", "toml")[0], encoding="utf-8")
    for name, text in SAVED.findall(text_of(page)):
        (folder / name).write_text(text, encoding="utf-8")
    for words, below in shown(page):
        if why_not_run(words) is None:
            command = [sys.executable, "-m", "fedloom", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
            printed = [*done.stdout.splitlines(), *done.stderr.splitlines()]
            absent = missing(below, printed)
            assert not absent, f"{absent}: {shlex.join(words)} printed\n{done.stdout}{done.stderr}"


def test_lines_are_compared_by_words_and_nearly_by_numbers() -> None:
    printed = ["reading rows", "held-out loss 3.4170 nats per token (base 5.0148)", "bytes up 3.8 MB, down 6,240"]
    assert not missing(["held-out loss 3.42 nats per token (base 5.01)", "bytes up 3.8 MB, down 6,239"], printed)
    assert missing(["held-out loss 3.17 nats per token (base 5.01)"], printed), "another figure"
    assert missing(["held-out gain 3.417 nats per token (base 5.0148)"], printed), "another word"
    assert missing(["bytes up 3.8 MB, down 6,240", "reading rows"], printed), "another order"
    assert not missing(["held-out loss 3.42 nats …", "bytes up 3.8 …"], printed)
    assert missing(["held-out loss 3.17 nats …"], printed), "another figure in its beginning"
    assert missing(["loss 3.42 nats …"], printed), "not its beginning"
    assert not missing(["effective 3.2"], ["effective 3.3"])
    assert missing(["effective 3.2", "effective 0.2"], ["effective 3.4", "effective 0.3"])


def test_a_plain_block_continues_what_the_last_command_above_it_prints() -> None:
    page = "```console\n$ one\n$ two \\\n  --more\n2\n```\n\n```\n│ 3 │\n└───┘\n```\n\nText.\n\n```\nnot it\n```\n"
    assert list(blocks_on(page)) == [[("one", []), ("two    --more", ["2", "│ 3 │"])]]


@every_page
def test_what_a_page_shows_is_compared_and_every_block_that_runs_shows_something(page: Path) -> None:
    """What nobody compares would go stale, and a reader wants to see whether it went right."""
    for block in shown_blocks(page):
        run = [(words, below) for words, below in block if why_not_run(words) is None]
        for words, below in block:
            reason = why_not_run(words)
            assert reason is None or not below, f"{shlex.join(words)} {reason}, and shows what nobody compares"
        for words, below in run:
            assert below or words[0] not in TRAINING, f"{shlex.join(words)}: show what it ends with"
        telling = [words for words, _ in run if words[0] not in SILENT]
        assert not telling or any(below for _, below in run), f"{shlex.join(telling[0])}: show some of what it prints"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=MARKS.get(page, ()))
        for page in PAGES
        if any(why_not_run(words) is None for words in commands(page))
    ],
)
def test_a_page_runs_as_written(page: Path, tmp_path: Path) -> None:
    """What needs an extra of its own is run where that extra is: tests/engines/test_cluster_page.py."""
    run_page(page, tmp_path)
    if page in (DOCS / "quickstart.md", ROOT / "README.md"):
        for program in blocks(page, "python"):
            subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=600)


def test_many_commands_are_run() -> None:
    """A rule that left out too much would make every page pass."""
    run = [words for page in PAGES for words in commands(page) if why_not_run(words) is None]
    assert len(run) >= 65
