"""Models and tokenizers that bring Python code of their own: refused unless it is trusted, and never asked about."""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import ModelError

TRUST_VARIABLE = "FEDLOOM_TRUST_REMOTE_CODE"


def own_code_refusal(error: Exception, name: str | Path) -> ModelError | None:
    """Return what to say where transformers would have to run a stranger's code; None where ``error`` is another."""
    if "trust_remote_code" not in str(error):
        return None
    return named_code_refusal(name, "Python code of its own (auto_map in its files)")


def named_code_refusal(name: str | Path, code: str) -> ModelError:
    """Return what to say of a base or tokenizer that needs code that was not run."""
    return ModelError(
        f"{name}: expected a model and tokenizer that transformers knows, got one that needs {code}, which was not "
        "run; read that code, and if you trust it set model.trust_remote_code = "
        f"true in the recipe, or for a result's base {TRUST_VARIABLE}=1 in the environment"
    )
