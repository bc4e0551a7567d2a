"""The small model and data that come with the package, both of our own making (``CARD.md`` beside this file).

Paths only. Wherever a base or a data set is named, ``embedded`` names these; ``transformers`` loads the model from
its path. The rows are of shape 'dolly', the template is 'plain'.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAME = "embedded"


def base_path(name: str | Path) -> str | Path:
    """Return where a base lies: ``name`` itself, unless it names the one in the package."""
    return model_path() if str(name) == NAME else name


def model_path() -> Path:
    """Return the folder of the base model and its tokenizer, in Hugging Face format."""
    return _file("model")


def data_path() -> Path:
    """Return the training rows: JSON lines of instruction, context, response, category."""
    return _file("train.jsonl")


def eval_path() -> Path:
    """Return the held-out rows, in the same columns."""
    return _file("eval.jsonl")


def card_path() -> Path:
    """Return the model card: what the base read, the figures it reached, and the hashes of every file."""
    return _file("CARD.md")


def _file(name: str) -> Path:
    """Return a packaged file; the package is installed as a folder, never run from an archive."""
    return Path(str(resources.files("fedloom.embedded"))) / name
