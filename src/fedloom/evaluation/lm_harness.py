"""Run any task of lm-evaluation-harness on a model as it stands, adapters beside the base (extra ``lm-eval``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fedloom.data.token_rows import prefix_ids
from fedloom.errors import EvaluationError, MissingExtraError
from fedloom.evaluation.intervals import Estimate
from fedloom.evaluation.prompt_batches import Sharing, sharing_of
from fedloom.models.causal import causal_lm


@dataclass(frozen=True)
class HarnessResult:
    """Per task (and group of tasks) its metrics, the harness's version, and the settings it ran with."""

    metrics: dict[str, dict[str, Estimate]]
    version: str
    shots: int | None
    limit: int | None
    seed: int


def run_harness_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    include: Path | None = None,
) -> HarnessResult:
    """Run ``tasks`` and return each metric with a normal interval from the harness's own standard error.

    ``shots=None`` takes each task's own number; ``include`` is a folder of further task files.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        EvaluationError: a task is unknown, or its data cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "running tasks of lm-evaluation-harness") from error
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown or not tasks:
        raise EvaluationError(
            f"expected tasks of lm-evaluation-harness {lm_eval.__version__}, got {unknown}: see 'lm-eval ls tasks'"
        )
    lm = causal_lm(model)
    # The harness makes its own batches: a model that does not decode in company as alone gets one prompt at a time.
    batch_size = batch_size if sharing_of(lm) is Sharing.ANY else 1
    # Left to itself, one release of the harness puts the beginning-of-text first and another does not.
    begins = bool(prefix_ids(tokenizer))
    wrapped = HFLM(
        pretrained=lm, tokenizer=tokenizer, batch_size=batch_size, device=str(lm.device), add_bos_token=begins
    )
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"tasks {', '.join(tasks)}: expected lm-evaluation-harness to run them, got {error}; fetch their data "
            "first, "
            "or choose others"
        ) from error
    metrics = {task: _metrics(row, found.get("n-samples", {}).get(task, {})) for task, row in found["results"].items()}
    return HarnessResult(metrics, str(lm_eval.__version__), shots, limit, seed)


def _metrics(row: Mapping[str, Any], samples: Mapping[str, int], level: float = 0.95) -> dict[str, Estimate]:
    """Read ``acc,none`` and ``acc_stderr,none`` and its error; without one, or at 0, the interval is NaN."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = int(samples.get("effective") or row.get("sample_len") or 0)
    metrics = {}
    for key, value in row.items():
        name, _, extraction = key.partition(",")
        if not extraction or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{name}_stderr,{extraction}")
        half = z * error if isinstance(error, int | float) and error > 0 else math.nan
        label = name if extraction == "none" else key
        metrics[label] = Estimate(
            float(value), value - half, value + half, n, level, "normal, harness's standard error"
        )
    return metrics
