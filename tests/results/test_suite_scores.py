"""Scores of a result from the command line: suites, files of outputs, a judge, leakage, decoding over a cut."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.config.conduct import SuiteName
from fedloom.errors import SettingsError
from fedloom.evaluation.e2e import meteor
from fedloom.evaluation.intervals import ItemStatistics, ratio, ratio_statistics
from fedloom.experiment import run
from fedloom.models.causal import context_length
from fedloom.results import suite_scores
from fedloom.results.conversation import Sampling, generate
from fedloom.results.opened_result import open_result
from fedloom.results.split_conversation import generate_cut
from fedloom.results.suite_scores import APPLYING, score_suite
from fedloom.results.suites import SuiteScores

Make = Callable[..., Settings]
SPLIT = {"method__name": "splitlora", "method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2}


@pytest.fixture(autouse=True)
def _without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR's Java program takes seconds a call and has tests of its own."""
    monkeypatch.setattr(meteor, "find_spec", lambda _: None)


@pytest.fixture
def finished(settings_for: Make, tmp_path: Path) -> Path:
    """Return the folder of a finished split run, whose wire is exact."""
    run(settings_for(**SPLIT, split__wire_dtype="fp32"), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def references(tmp_path: Path) -> Path:
    path = tmp_path / "references.csv"
    path.write_text('mr,ref\n"name[A]","red cat"\n"name[A]","a red cat"\n"name[B]","one dog"\n')
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capsys.readouterr()
    assert exit_code([*arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_and_its_base_are_scored_on_e2e_and_outputs_are_kept(
    finished: Path, references: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("evaluate", str(finished), "--suite", "e2e", "--data", str(references), "--beams", "2")
    first = printed(capsys, *arguments)
    assert set(first["scores"]) == {"base", "result"}  # type: ignore[call-overload]
    assert {"BLEU", "NIST", "ROUGE_L", "CIDEr"} <= set(first["scores"]["result"]["metrics"])  # type: ignore[index]
    assert len(list((finished / "evaluation").glob("e2e-*.jsonl"))) == 2
    assert printed(capsys, *arguments) == first


def test_a_run_whose_folder_refuses_is_scored_and_nothing_is_kept(
    finished: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(finished), "--suite", "e2e", "--data", str(references), "--beams", "1"]
    kept = printed(capsys, *arguments)
    shutil.rmtree(finished / "evaluation")
    (finished / "evaluation").write_text("no folder can be made here, not even by root")
    assert exit_code([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == kept
    assert err.count(f"note: what is decoded is not kept, since nothing can be written in {finished}/evaluation") == 1
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "text": "red?"}) + "\n")
    judge = ["--endpoint", "http://127.0.0.1:9", "--judge", "m", "--questions", str(questions)]
    assert exit_code(["judge", str(finished), *judge]) == 2
    assert "evaluation/judge: expected a folder to keep answers and verdicts in" in capsys.readouterr().err


def test_a_difference_is_the_adapters_score_less_the_bases(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = iter([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])

    def scored(suite: str, *_: object, **__: object) -> SuiteScores:
        items = {"share": ItemStatistics(ratio_statistics(next(right)), ratio)}
        return SuiteScores(suite, {}, {}, items=items)

    monkeypatch.setattr(suite_scores, "run_suite", scored)
    found = suite_scores.score_result(open_result(finished), suite_scores.Asked(suite="e2e"), lambda _: None)
    assert found.differences["result"]["share"].value == pytest.approx(2 / 3)
    assert found.lines()[-1].startswith("result − base, share: +0.6667 [")


def test_every_metric_has_its_paired_difference_from_the_base(
    finished: Path, references: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("evaluate", str(finished), "--suite", "e2e", "--data", str(references), "--beams", "1")
    found = printed(capsys, *arguments)
    metrics = {name: found["scores"][name]["metrics"] for name in ("base", "result")}  # type: ignore[index]
    differences = found["differences_from_base"]["result"]  # type: ignore[index]
    assert set(differences) == set(metrics["result"])
    for name, difference in differences.items():
        gap = metrics["result"][name]["value"] - metrics["base"][name]["value"]
        assert difference["value"] == pytest.approx(gap, abs=1e-9)
    assert exit_code(arguments) == 0
    assert "result − base, BLEU: " in capsys.readouterr().out


def test_exact_matches_are_counted_on_rows_of_a_file_for_a_run_and_for_an_adapter_alone(
    finished: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"{k}?", "answer": "cat"} for k in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    asked = ("--suite", "exact-match", "--data", str(file), "--shape", "question-answer", "--template", "plain")
    own = printed(capsys, "evaluate", str(finished), "--suite", "exact-match")
    assert own["scores"]["base"]["metrics"]["exact_match"]["n"] == 6  # type: ignore[index]
    other = printed(capsys, "evaluate", str(finished), *asked)
    assert other["scores"]["base"]["metrics"]["exact_match"]["n"] == 3  # type: ignore[index]
    base = ("--base", str(base_folder), "--tokenizer", "bytes")
    alone = printed(capsys, "evaluate", str(finished / "adapter"), *base, *asked)
    assert alone["scores"] == other["scores"]
    assert exit_code(["evaluate", str(finished / "adapter"), *base, "--suite", "last-number"]) == 2
    assert "last-number: expected rows, got none, not even held-out ones; name some" in capsys.readouterr().err


def test_what_the_command_line_leaves_out_is_as_in_the_run(
    settings_for: Make, tmp_path: Path, references: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"evaluation__beams": 3, "evaluation__limit": 1, "evaluation__max_new_tokens": 7}
    run(settings_for(**recipe, federation__num_rounds=1), tmp_path / "run")
    arguments = ("evaluate", str(tmp_path / "run"), "--suite", "e2e", "--data", str(references))
    scores = printed(capsys, *arguments)["scores"]["base"]  # type: ignore[index]
    assert scores["metrics"]["BLEU"]["n"] == 1
    assert (scores["decoding"]["num_beams"], scores["decoding"]["max_new_tokens"]) == (3, 7)
    given = printed(capsys, *arguments, "--beams", "2", "--limit", "2")["scores"]["base"]  # type: ignore[index]
    assert (given["decoding"]["num_beams"], given["metrics"]["BLEU"]["n"]) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite exact-match --beams 4", r"--suite exact-match: expected no option but --data, .* got --beams"),
        ("--suite e2e --shots 2 --answering text", r"--suite e2e: .* got --shots, --answering"),
        ("--suite mmlu --max-length 9 --overlong drop", r"--suite mmlu: .* got --max-length, --overlong"),
        ("--suite multiple-choice --shots 3", r"--suite multiple-choice: .* got --shots"),
        ("--suite multiple-choice --answering number", r"--answering: expected one of letter, text, got 'number'"),
        ("--lm-eval arc_easy --data x", r"--lm-eval: expected no option but --shots, --limit, got --data"),
        ("--lm-eval arc_easy --suite e2e", r"expected --suite or --lm-eval, got both"),
        ("--suite bleurt", r"--suite: expected one of e2e, .*, last-number, got 'bleurt'"),
        ("--limit 3", r"the loss on the run's own rows, .* got --limit"),
        ("--template plain", r"the loss on the run's own rows, .* expected no option but --data, got --template"),
        ("--data x --beams 2", r"the loss, without --suite: .* got --beams"),
        ("--data x --shape text --max-length 9", r"--shape text: expected no option but --data, --shape, got --max-l"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_before_anything_is_opened(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").touch()
    assert exit_code(["evaluate", str(tmp_path), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_the_options_of_every_suite_are_known() -> None:
    assert set(APPLYING) == set(get_args(SuiteName))


def test_a_recipes_path_takes_the_place_of_the_held_out_rows(settings_for: Make, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps([{"instruction": "2 + 2", "context": "", "response": "#### 4"}]))
    settings = settings_for(
        evaluation__suites=["last-number"],
        evaluation__paths={"last-number": str(file)},
        evaluation__max_new_tokens=3,
        federation__num_rounds=1,
    )
    found = run(settings, tmp_path / "run").eval["suites"]["last-number"]
    assert (found["metrics"]["exact_match"]["n"], found["max_new_tokens"]) == (1, 3)


def test_multiple_choice_runs_inside_a_run_and_stands_in_its_record(settings_for: Make, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"{k}?", "choices": ["cat", "dog"], "answer": k % 2} for k in range(6)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    settings = settings_for(
        evaluation__suites=["multiple-choice"], evaluation__paths={"multiple-choice": str(questions)}
    )
    summary = run(settings, tmp_path / "run")
    accuracy = summary.eval["suites"]["multiple-choice"]["metrics"]["accuracy"]
    assert accuracy["n"] == 6
    assert 0.0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1.0


def test_an_absent_suite_file_is_named_with_what_is_expected(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["evaluate", str(finished), "--suite", "e2e"]) == 2
    assert "references" in capsys.readouterr().err


def test_a_file_of_outputs_is_scored_without_a_model(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs.txt"
    outputs.write_text("red cat\none dog\n")
    found = printed(capsys, "score", "e2e", "--references", str(references), "--outputs", str(outputs))
    assert found["num_items"] == 2
    assert found["metrics"]["ROUGE_L"]["value"] == pytest.approx(1.0)  # type: ignore[index]
    outputs.write_text("red cat\n")
    assert exit_code(["score", "e2e", "--references", str(references), "--outputs", str(outputs)]) == 2


def test_leakage_is_reported_per_cut_against_public_text(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = tmp_path / "public.txt"
    public.write_text("a red cat saw one blue dog\n\ntwo dogs ran\n\n" * 20)
    found = printed(capsys, "leakage", str(finished), "--public", str(public), "--steps", "20")
    (report,) = found["cuts"]  # type: ignore[misc]
    assert report["cut_layer"] == 1
    assert 0.0 <= report["recovered"] <= 1.0
    assert exit_code(["leakage", str(finished), "--public", str(public), "--cuts", "9"]) == 2


def test_decoding_over_a_cut_gives_the_uncut_answer_and_counts_what_crosses(finished: Path) -> None:
    opened, sampling = open_result(finished), Sampling(max_new_tokens=12)
    cut = generate_cut(opened, "red cat", 1, sampling)
    assert cut.answers["result"] == generate(opened, "red cat", sampling=sampling, beside_base=False).answers["result"]
    assert cut.upload_bytes > 0


def test_an_answer_over_a_cut_ends_where_the_context_does(finished: Path) -> None:
    opened = open_result(finished)
    context = opened.lora.model.config.max_position_embeddings
    cut = generate_cut(opened, "red cat", 1, Sampling(max_new_tokens=10 * context))
    assert 0 < cut.num_new_tokens < context


def test_a_suite_is_scored_from_python_with_the_options_of_the_command_line(finished: Path) -> None:
    scored = score_suite(open_result(finished), "exact-match", limit=3)
    assert {name: one.estimates["exact_match"].n for name, one in scored.scores.items()} == {"base": 3, "result": 3}
    with pytest.raises(SettingsError, match=r"expected options from .*limit.*, got limits"):
        score_suite(open_result(finished), "exact-match", limits=3)


@pytest.fixture
def judge_url() -> Iterator[str]:
    """Serve a judge that gives the first answer 7 and the second 5."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            choices = [{"message": {"role": "assistant", "content": "[[7]] [[5]]"}}]
            body = json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_compares_a_run_with_its_base_in_both_orders_and_is_asked_once(
    finished: Path, judge_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "text": "red?"}) + "\n")
    arguments = ("judge", str(finished), "--endpoint", judge_url, "--judge", "m", "--questions", str(questions))
    first = printed(capsys, *arguments, "--max-new-tokens", "4")
    verdicts = first["verdicts"]
    assert (verdicts["first_sum"], verdicts["second_sum"]) == (6.0, 6.0)  # type: ignore[index]
    assert 1 <= verdicts["usage"]["num_calls"] <= 2  # type: ignore[index]
    again = printed(capsys, *arguments, "--max-new-tokens", "4")
    assert again["verdicts"]["usage"]["num_calls"] == 0  # type: ignore[index]
    longer = printed(capsys, *arguments, "--max-new-tokens", "6")
    assert longer["verdicts"]["num_missing"] == 0  # type: ignore[index]


def test_answers_for_a_judge_leave_their_questions_half_the_context(
    finished: Path, judge_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "text": "red?"}) + "\n")
    context = context_length(open_result(finished).lora)
    assert context is not None
    arguments = ["judge", str(finished), "--endpoint", judge_url, "--judge", "m", "--questions", str(questions)]
    assert exit_code([*arguments, "--max-new-tokens", str(context)]) == 0
    told = f"note: answers have at most {context // 2} tokens (half the base's context), not {context}"
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "ftp://foo"], "expected an endpoint like https://host/v1, got 'ftp://foo'"),
        (["--references", "none.jsonl"], "none.jsonl: expected a file of answers, found none"),
        (
            ["--prompts", "none.jsonl"],
            "none.jsonl: expected a file of JSON lines with name and prompt_template, found none",
        ),
    ],
)
def test_what_the_judge_cannot_be_asked_is_refused_before_decoding(
    options: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "text": "red?"}) + "\n")
    arguments = ["--endpoint", "http://127.0.0.1:9", "--judge", "m", "--questions", str(questions), *options]
    assert exit_code(["judge", str(finished), *arguments, "--out", str(tmp_path / "kept")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_a_judge_without_its_options_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["judge", str(finished)]) == 2
    assert "--endpoint" in capsys.readouterr().err
