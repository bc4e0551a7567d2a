from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import EvaluationError, MissingExtraError
from fedloom.evaluation.lm_harness import run_harness_tasks

TASK = """\
task: fedloom_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc}}
"""


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"fedloom\[lm-eval\]"):
        run_harness_tasks(None, None, ["arc_easy"])


@pytest.mark.extra("lm-eval")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_agrees_with_our_own_likelihoods(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from fedloom.evaluation.choice.questions import read_questions
    from fedloom.evaluation.choice.shared_prefix import Query, nats_from_scratch

    rows = [{"question": f"{i} and {i}?", "choices": ["one", "two", "six"], "answer": i % 3} for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=file))
    result = run_harness_tasks(model, tokenizer, ["fedloom_sums"], include=tmp_path, shots=0)
    queries = [
        Query(list(f"{q.question} Answer:".encode()), [list(f" {choice}".encode()) for choice in q.choices])
        for q in read_questions(file)
    ]
    found = nats_from_scratch(model, queries, token_budget=1000)
    expected = [int(nats.argmin() == row["answer"]) for nats, row in zip(found, rows, strict=True)]
    accuracy = result.metrics["fedloom_sums"]["acc"]
    assert accuracy.value == pytest.approx(sum(expected) / len(expected))
    assert accuracy.n == 9
    assert accuracy.low < accuracy.value < accuracy.high


@pytest.mark.extra("lm-eval")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match=r"expected tasks of .*, got \['no_such_task'\]"):
        run_harness_tasks(model, tokenizer, ["no_such_task"])
