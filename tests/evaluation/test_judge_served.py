"""A judge run against transformers' own server, interrupted and resumed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from site_ends import free_port

from fedloom.evaluation.judge.asking import Judging
from fedloom.evaluation.judge.endpoint import Endpoint
from fedloom.evaluation.judge.judge_questions import read_judge_questions
from fedloom.evaluation.judge.protocols import grade_answers

TEMPLATE = "{% for message in messages if message.role == 'user' %}{{ message.content[-160:] }}\n{% endfor %}"
VERDICT = "Rating: [[7]]"


def teach_to_grade(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """Train until every prompt is answered with a verdict: a judge small enough for a test."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    verdict = tokenizer(VERDICT, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for step in range(60):
        ids = rows[step % len(rows)]
        input_ids = torch.tensor([ids + verdict])
        labels = torch.tensor([[-100] * len(ids) + verdict])
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture
def served(data_dir: Path, tmp_path: Path) -> Iterator[Endpoint]:
    from transformers.utils.import_utils import is_serve_available

    from fedloom.models.load import load_base

    if not is_serve_available():
        pytest.skip("needs pip install 'transformers[serving]'")
    base = load_base(data_dir / "models" / "stories3M", device="cpu")
    base.model.requires_grad_(True)
    questions = read_judge_questions(data_dir / "instruct" / "vicuna_question.jsonl")
    closing = "\n\n<answer>\nAn answer.\n</answer>\n"
    teach_to_grade(base.model, base.tokenizer, [(question.turns[0] + closing)[-160:] for question in questions[:20]])
    base.model.save_pretrained(tmp_path / "judge")
    base.tokenizer.chat_template = TEMPLATE
    base.tokenizer.save_pretrained(tmp_path / "judge")
    port = free_port()
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [str(Path(sys.executable).with_name("transformers")), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield Endpoint(f"http://127.0.0.1:{port}/v1", str(tmp_path / "judge"), attempts=60, longest_wait_seconds=2)
        finally:
            server.terminate()


@pytest.mark.data
@pytest.mark.slow
def test_a_run_against_transformers_server_is_interrupted_and_resumed(
    served: Endpoint, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("FEDLOOM_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    questions = read_judge_questions(data_dir / "instruct" / "vicuna_question.jsonl")[:8]
    answers = {question.id: ("An answer.",) for question in questions}
    settings: dict[str, Any] = {"seed": 0, "cache": tmp_path / "verdicts.sqlite"}
    settings["judging"] = Judging(max_tokens=16, tries=2, concurrency=1)

    def interrupt(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_answers(served, questions, answers, on_progress=interrupt, **settings)
    resumed = grade_answers(served, questions, answers, **settings)
    assert resumed.usage.num_cached == 3
    assert resumed.usage.prompt_tokens > 0
    assert resumed.overall.value == 7.0
    assert grade_answers(served, questions, answers, **settings).usage.num_calls == 0
