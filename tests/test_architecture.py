"""The shape of the code base: what may import what, how large things are, what is never called."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from fedloom.methods import table

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedloom"

# A module imports only from entries earlier in this list, and from its own. An entry is a package, or a module of one
# that stands elsewhere than the rest of it: the traits of the methods are read where their strategies are not known.
ORDER = (
    "wording",
    "errors",
    "seeding",
    "wording",
    "names",
    "file_formats",
    "embedded",
    "methods.traits",
    "methods.options",
    "methods.method",
    "methods.shipped",
    "methods.table",
    "models.stored_quantization",
    "config",
    "data",
    "lora",
    "models",
    "privacy",
    "training",
    "methods",
    "federation",
    "clients",
    "engines",
    "split",
    "evaluation",
    "run_folder",
    "privacy.ledger",
    "reporting",
    "audit",
    "recipes",
    "assembly",
    "preview",
    "results",
    "explanation",
    "experiment",
    "sites",
    "cli",
)
CONFIG_READERS = {"config", "assembly", "preview", "results", "explanation", "experiment", "sites", "cli"}
MAX_MODULE_LINES = 350
MAX_FUNCTION_STATEMENTS = 40
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
BANNED_CALLS = {
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.seed",
    "torch.save",
    "torch.load",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "transformers.set_seed",
    "set_seed",
}
BANNED_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "random"}
HEAVY = ("torch", "transformers", "datasets", "peft")

MODULES = sorted(SOURCE.rglob("*.py"))
PROGRAMS = [*MODULES, *sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def assert_nothing_is_found(paths: Iterable[Path], look: Callable[[Path], Iterable[str]]) -> None:
    """Look into every module, each of which is parsed once, and name all that is wrong."""
    assert not [f"{path.relative_to(ROOT)}: {what}" for path in paths for what in look(path)]


def package_of(path: Path) -> str:
    """Return the entry of ORDER a module belongs to: its own, its package's, or its own name at the top."""
    return entry_of(path.relative_to(SOURCE).with_suffix("").parts)


def entry_of(parts: Sequence[str]) -> str:
    """Return the longest entry of ORDER that a dotted name begins with, or its first part."""
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ORDER else parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for a chain of names, and the empty text for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}" if dotted(value) else ""
        case _:
            return ""


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_imports_go_down_the_list() -> None:
    assert_nothing_is_found(MODULES, upward_imports)


def upward_imports(path: Path) -> Iterator[str]:
    package = package_of(path)
    if package in {"__init__", "__main__"}:
        return
    if package not in ORDER:
        yield f"{package} has no place in the order of packages: give it one"
        return
    allowed = {"__init__", *ORDER[: ORDER.index(package) + 1]}
    for line, name in imports(parse(path)):
        parts = name.split(".")
        entry = entry_of(parts[1:]) if parts[0] == "fedloom" and len(parts) > 1 else ""
        if entry in ORDER and entry not in allowed:
            yield f"line {line}: {package} imports {name}"


def test_only_the_composition_root_knows_settings() -> None:
    others = [path for path in MODULES if package_of(path) not in CONFIG_READERS]
    assert_nothing_is_found(
        others, lambda path: [name for _, name in imports(parse(path)) if name.startswith("fedloom.config")]
    )


# The same words with another meaning: the untouched model, a setting of [model], a judge's protocol of FedIT's paper.
NO_METHOD = {
    ("cli/score_commands.py", "base"),
    ("cli/score_commands.py", "fedit"),
    ("preview/description.py", "base"),
    ("preview/rehearsal.py", "base"),
    ("reporting/report.py", "base"),
    ("results/held_out.py", "base"),
    ("results/judgement.py", "fedit"),
}
# Plain words as well, so within a text they mean nothing.
PLAIN_WORDS = {"base", "standalone", "carry"}


def test_only_the_methods_know_a_method_by_name() -> None:
    """Other code asks for a trait. Names in longer texts (messages, help) come from the table too."""
    others = [path for path in MODULES if path.relative_to(SOURCE).parts[0] not in ("methods", "recipes")]
    assert_nothing_is_found(others, methods_named)


def methods_named(path: Path) -> Iterator[str]:
    tree, place = parse(path), str(path.relative_to(SOURCE))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names = set(table.shipped())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            named = {node.value} & names | set(re.findall(r"[\w-]+", node.value)) & names - PLAIN_WORDS
            yield from (f"line {node.lineno}: {name}" for name in named if (place, name) not in NO_METHOD)


def test_nothing_banned_is_called_or_imported() -> None:
    assert_nothing_is_found(PROGRAMS, banned)


def banned(path: Path) -> Iterator[str]:
    tree = parse(path)
    yield from (f"line {line}: import {name}" for line, name in imports(tree) if name.split(".")[0] in BANNED_IMPORTS)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=function) if dotted(function) in BANNED_CALLS:
                yield f"line {node.lineno}: {dotted(function)}"
            case ast.ExceptHandler(type=None):
                yield f"line {node.lineno}: bare except"
            case ast.Call(func=function, keywords=keywords) if dotted(function) != "zip":
                lax = [word for word in keywords if word.arg == "strict" and ast.unparse(word.value) == "False"]
                yield from (f"line {node.lineno}: strict=False" for _ in lax)
            case ast.ImportFrom(level=level) if level:
                yield f"line {node.lineno}: relative import"
            case _:
                continue


def test_modules_and_functions_are_small() -> None:
    assert_nothing_is_found(MODULES, what_is_long)


def what_is_long(path: Path) -> Iterator[str]:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    if num_lines > MAX_MODULE_LINES:
        yield f"{num_lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            if size > MAX_FUNCTION_STATEMENTS:
                yield f"{node.name}: {size} statements"


def test_every_module_has_a_name_that_says_something_and_a_docstring() -> None:
    assert_nothing_is_found(PROGRAMS, vague_name_or_no_docstring)


def vague_name_or_no_docstring(path: Path) -> Iterator[str]:
    yield from (f"vague name {word}" for word in VAGUE_NAMES & set(path.stem.split("_")))
    if not ast.get_docstring(parse(path)):
        yield "no docstring"


def test_every_public_name_is_documented() -> None:
    assert_nothing_is_found(MODULES, undocumented)


def undocumented(path: Path) -> Iterator[str]:
    tree = parse(path)
    members = [*tree.body]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members.extend(node.body)
    for node in members:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and node.name != "forward"
            and not ast.get_docstring(node)
            and not any(dotted(decorator).endswith(("setter", "overload")) for decorator in node.decorator_list)
        ):
            yield f"line {node.lineno}: {node.name}"


def test_the_test_folders_mirror_the_packages() -> None:
    """``split`` is a feature of its own that models, training, federation and evaluation share."""
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir() and any(folder.glob("test_*"))}
    assert folders <= {folder.name for folder in SOURCE.iterdir() if folder.is_dir()} | {
        "docs",
        "examples",
        "faults",
        "split",
    }


@pytest.mark.parametrize(
    "code",
    [
        "import fedloom",
        "import fedloom.config",
        "from fedloom.methods import table; table.names()",
        "import fedloom.run_folder.writer, fedloom.reporting.progress",
        "import contextlib\nfrom fedloom.cli import main\nsys.argv = ['fedloom', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    main()",
    ],
    ids=["import fedloom", "import fedloom.config", "the table", "import fedloom.reporting", "fedloom --help"],
)
def test_what_must_be_quick_does_not_load_the_heavy_libraries(code: str) -> None:
    if "cli" in code and not list(SOURCE.glob("cli*")):
        pytest.skip("no command line yet")
    script = f"import sys\n{code}\nprint(*({set(HEAVY)!r} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []


def test_public_names_are_there_and_documented() -> None:
    package = importlib.import_module("fedloom")
    for name in getattr(package, "__all__", []):
        assert hasattr(package, name), name
        assert name == "__version__" or getattr(package, name).__doc__, name
