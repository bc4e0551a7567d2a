"""Score files of outputs against files of references."""

from __future__ import annotations

from pathlib import Path

from fedloom.evaluation.e2e.e2e_files import matched_texts, read_outputs, read_references
from fedloom.evaluation.e2e.scorer import score_e2e
from fedloom.results.suites import SuiteScores


def score_files(references: Path, outputs: Path) -> SuiteScores:
    """Return the E2E metrics of one file of outputs.

    Raises:
        EvaluationError: a file is absent, or the two do not match in number or order.
    """
    known = read_references(references)
    scores = score_e2e(known.texts, matched_texts(known, read_outputs(outputs)))
    notes = {
        "num_items": scores.num_items,
        "num_references": scores.num_references,
        "num_empty_outputs": scores.num_empty_outputs,
        "absent": scores.absent,
    }
    return SuiteScores("e2e", scores.estimates, notes)
