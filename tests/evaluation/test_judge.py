"""The judge is a real HTTP server on this machine that fails as it is told to."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import EndpointError, EvaluationError
from fedloom.evaluation.judge.asking import CallEstimate, Judging
from fedloom.evaluation.judge.endpoint import Endpoint
from fedloom.evaluation.judge.judge_prompts import parse_scores, read_prompts
from fedloom.evaluation.judge.judge_questions import (
    JudgeQuestion,
    answer_turns,
    read_answers,
    read_judge_questions,
    write_answers,
)
from fedloom.evaluation.judge.protocols import compare_grades, grade_answers, judge_pairs

KEY = "sk-very-secret"
QUESTIONS = [JudgeQuestion(str(i), (f"Question {i}?",), "generic") for i in range(4)]
GOOD = {question.id: ("a good answer",) for question in QUESTIONS}
BAD = {question.id: ("bad",) for question in QUESTIONS}
Failure = tuple[int, dict[str, str], bytes]


class Judge:
    """Prefers good answers; before that, it fails once for each entry of ``failures``."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.requests: list[dict[str, Any]] = []
        self.authorisations: list[str | None] = []
        self.reply: Callable[[list[dict[str, str]]], str] = self.prefer_good
        self.delay = threading.Event()
        self.is_slow = False

    @staticmethod
    def prefer_good(messages: list[dict[str, str]]) -> str:
        text = messages[1]["content"]
        if "<first assistant>" not in text:
            return "Fine. Rating: [[7]]" if "good" in text else "Poor. Rating: [[2]]"
        first, _, second = text.partition("<second assistant>")
        return f"Well. Scores: [[{8 if 'good' in first else 4}]] [[{8 if 'good' in second else 4}]]"


@pytest.fixture
def judge() -> Iterator[tuple[Judge, Endpoint]]:
    state = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(body)
            state.authorisations.append(self.headers.get("Authorization"))
            if state.is_slow:
                state.delay.wait(5)
            if state.failures:
                status, headers, content = state.failures.pop(0)
            else:
                choices = [{"message": {"role": "assistant", "content": state.reply(body["messages"])}}]
                usage = {"prompt_tokens": 10, "completion_tokens": 3}
                status, headers, content = 200, {}, json.dumps({"choices": choices, "usage": usage}).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state, Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "judge-model", sleep=lambda _: None)
    state.delay.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_JUDGE_KEY", KEY)


def test_pairs_are_judged_in_both_orders_and_reported_as_sums(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    verdicts = judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0)
    assert (verdicts.first_sum, verdicts.second_sum) == (16.0, 32.0)
    assert verdicts.relative.value == 2.0
    assert (verdicts.num_second_wins, verdicts.num_ties, verdicts.num_inconsistent) == (4, 0, 0)
    assert (verdicts.difference.value, verdicts.difference.is_judged) == (4.0, False)  # of four questions
    contents = [request["messages"][1]["content"] for request in state.requests]
    assert sum(content.index("good") < content.index("bad") for content in contents) == 4
    assert len(contents) == 8
    assert verdicts.usage.prompt_tokens == 80


def test_a_judge_that_likes_the_first_place_ends_in_ties_and_is_found_out(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    state.reply = lambda _: "Scores: [[9]] [[3]]"
    verdicts = judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0)
    assert (verdicts.num_ties, verdicts.num_inconsistent) == (4, 4)
    assert verdicts.relative.value == 1.0


def test_a_verdict_is_asked_for_again_and_then_counted_but_never_guessed(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge

    def reply(messages: list[dict[str, str]]) -> str:
        if "Question 0?" in messages[1]["content"]:
            return "I would say 8 out of 10."
        if "Question 1?" in messages[1]["content"] and len(messages) == 2:
            return "Hard to tell: [[11]]"
        return "Rating: [[6]]"

    state.reply = reply
    grades = grade_answers(endpoint, QUESTIONS, GOOD, seed=0, judging=Judging(tries=3))
    assert grades.num_missing == 1
    assert grades.scores["0"] == (None,)
    assert grades.overall.n == 3
    assert grades.overall.value == 6.0
    assert grades.usage.num_calls == 3 + 2 + 1 + 1
    assert state.requests[-1]["messages"]


def test_a_repeated_run_asks_nothing(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    state, endpoint = judge
    cache = tmp_path / "verdicts.sqlite"
    estimates: list[CallEstimate] = []
    first = judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache, on_estimate=estimates.append)
    again = judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache, on_estimate=estimates.append)
    assert len(state.requests) == 8
    assert again.scores == first.scores
    assert again.usage.num_calls == 0
    assert [estimate.num_calls for estimate in estimates] == [8, 0]
    assert estimates[1].num_cached == 8
    assert estimates[0].prompt_tokens > 8 * 50


def test_an_estimate_can_stop_a_run_before_the_first_call(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge

    def refuse(estimate: CallEstimate) -> None:
        raise KeyboardInterrupt(f"{estimate.num_calls} calls are too many")

    with pytest.raises(KeyboardInterrupt):
        judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, on_estimate=refuse)
    assert state.requests == []


def test_an_interrupted_run_goes_on_with_what_is_missing(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    _, endpoint = judge
    cache = tmp_path / "verdicts.sqlite"

    def interrupt(done: int, total: int) -> None:
        assert total == 8
        if done == 3:
            raise KeyboardInterrupt

    one_at_a_time = Judging(concurrency=1)
    with pytest.raises(KeyboardInterrupt):
        judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache, judging=one_at_a_time, on_progress=interrupt)
    resumed = judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache, judging=one_at_a_time)
    assert resumed.usage.num_cached == 3
    assert resumed.usage.num_calls == 5
    assert resumed.scores == judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0).scores


def test_passing_trouble_is_waited_out_as_the_server_asks(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    waits: list[float] = []
    patient = Endpoint(endpoint.url, "m", sleep=waits.append)
    state.failures = [
        (429, {"Retry-After": "7"}, b"slow down"),
        (503, {}, b""),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    ]
    assert patient.chat([{"role": "user", "content": "x"}, {"role": "user", "content": "good"}]).text.startswith("Fine")
    assert waits == [7.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((429, {}, b"busy"), r"HTTP 429 \(busy\), 2 times: try later"),
        ((500, {}, b"oops"), "HTTP 500"),
        ((200, {}, b"nonsense"), r"no chat reply in its answer \('nonsense'\), 2 times: does it speak OpenAI's"),
        ((401, {}, f"wrong key {KEY}".encode()), "refuses the key of FEDLOOM_JUDGE_KEY .HTTP 401.: wrong key …"),
        ((404, {}, b"no such model"), "refuses the request for 'm' .HTTP 404.: no such model"),
        ((307, {"Location": "http://127.0.0.1:9/"}, b""), "refuses the request"),
    ],
)
def test_what_a_server_does_wrong_is_said_in_one_line_without_the_key(
    judge: tuple[Judge, Endpoint], failure: Failure, message: str
) -> None:
    state, endpoint = judge
    state.failures = [failure] * 2
    with pytest.raises(EndpointError, match=message) as caught:
        Endpoint(endpoint.url, "m", attempts=2, sleep=lambda _: None).chat([{"role": "user", "content": "x"}])
    assert KEY not in str(caught.value)


def test_a_slow_server_runs_into_the_time_out(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    state.is_slow = True
    hasty = Endpoint(endpoint.url, "m", timeout_seconds=0.05, attempts=2, sleep=lambda _: None)
    with pytest.raises(EndpointError, match=r"no answer within 0.05 s, 2 times: raise the time-out"):
        hasty.chat([{"role": "user", "content": "x"}])


def test_a_server_that_is_down_is_named() -> None:
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1/chat/completions: cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, sleep=lambda _: None).chat([])


def test_a_failure_keeps_the_verdicts_before_it(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    state, endpoint = judge

    def reply(messages: list[dict[str, str]]) -> str:
        if len(state.requests) == 3:
            state.failures = [(401, {}, b"")] * 100
        return Judge.prefer_good(messages)

    state.reply = reply
    cache = tmp_path / "verdicts.sqlite"
    with pytest.raises(EndpointError, match="3 of 8 verdicts were kept; run again"):
        judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache, judging=Judging(concurrency=1))
    state.failures, state.reply = [], Judge.prefer_good
    assert judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache).usage.num_cached == 3


def test_the_key_is_sent_but_never_written(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    state, endpoint = judge
    cache = tmp_path / "verdicts.sqlite"
    judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=cache)
    assert set(state.authorisations) == {f"Bearer {KEY}"}
    assert KEY.encode() not in cache.read_bytes()
    assert KEY not in repr(endpoint)


def test_the_key_does_not_travel_unencrypted() -> None:
    with pytest.raises(EndpointError, match="is not encrypted and would lay open the key of FEDLOOM_JUDGE_KEY"):
        Endpoint("http://judge.example/v1", "m").chat([])


def test_two_turns_are_graded_apart_and_references_where_they_are_needed(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    questions = [JudgeQuestion("1", ("One?", "And two?"), "math"), JudgeQuestion("2", ("Three?",), "writing")]
    answers = {"1": ("good one", "worse"), "2": ("bad",)}
    grades = grade_answers(endpoint, questions, answers, {"1": ("ref one", "ref two")}, seed=0)
    assert grades.scores == {"1": (7.0, 7.0), "2": (2.0,)}
    assert [estimate.n for estimate in grades.per_turn] == [2, 1]
    assert grades.per_category == {"math": 7.0, "writing": 2.0}
    second_turn = next(r["messages"][1]["content"] for r in state.requests if "worse" in r["messages"][1]["content"])
    assert all(part in second_turn for part in ("One?", "good one", "And two?", "ref one", "ref two"))
    assert not any(
        "ref" in r["messages"][1]["content"] for r in state.requests if "Three?" in r["messages"][1]["content"]
    )
    with pytest.raises(EvaluationError, match=r"question 1 \(math\): expected a reference answer for turn 1"):
        grade_answers(endpoint, questions, answers, seed=0)
    assert compare_grades(grades, grades, seed=0).value == 0.0


def test_missing_answers_are_refused_before_any_call(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    with pytest.raises(EvaluationError, match="question 3: expected 1 answers of the second model, got 0"):
        judge_pairs(endpoint, QUESTIONS, GOOD, {key: BAD[key] for key in "012"}, seed=0)
    assert state.requests == []


def test_a_judge_without_any_verdict_is_an_error(judge: tuple[Judge, Endpoint]) -> None:
    state, endpoint = judge
    state.reply = lambda _: "no idea"
    with pytest.raises(
        EvaluationError,
        match="in both orders, none of 4 questions has them: its first such reply begins 'no idea'; choose",
    ):
        judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0)
    with pytest.raises(EvaluationError, match="read from 4 verdicts: its first such reply begins 'no idea'"):
        grade_answers(endpoint, QUESTIONS, GOOD, seed=0)


@pytest.mark.parametrize(
    ("reply", "expected", "scores"),
    [
        ("Rating: [[7]]", 1, (7.0,)),
        ("First [[3]], on reflection [[ 8.5 ]].", 1, (8.5,)),
        ("[[8]] [[9]]", 2, (8.0, 9.0)),
        ("[[8]]", 2, None),
        ("Rating: [[0]]", 1, None),
        ("Rating: [[70]]", 1, None),
        ("Rating: 7", 1, None),
        ("", 1, None),
    ],
)
def test_scores_are_read_only_from_the_agreed_brackets(
    reply: str, expected: int, scores: tuple[float, ...] | None
) -> None:
    assert parse_scores(reply, expected) == scores


def test_a_file_that_is_no_cache_is_refused(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    _, endpoint = judge
    file = tmp_path / "verdicts.sqlite"
    file.write_text("x" * 2000)
    with pytest.raises(EvaluationError, match="expected a cache of verdicts"):
        judge_pairs(endpoint, QUESTIONS, BAD, GOOD, seed=0, cache=file)


def test_the_cache_is_a_plain_sqlite_file(judge: tuple[Judge, Endpoint], tmp_path: Path) -> None:
    _, endpoint = judge
    file = tmp_path / "new" / "verdicts.sqlite"
    grade_answers(endpoint, QUESTIONS, GOOD, seed=0, cache=file)
    database = sqlite3.connect(file)
    assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (4,)
    database.close()


def test_a_model_answers_each_turn_with_the_conversation_before_it(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from fedloom.evaluation.decoding import DecodingSettings

    prompts: list[tuple[str, ...]] = []

    def render(turns: Any) -> str:
        prompts.append(tuple(turns))
        return "|".join(turns)

    questions = [JudgeQuestion("1", ("a?", "b?")), JudgeQuestion("2", ("c?",))]
    settings = DecodingSettings(num_beams=1, max_new_tokens=3)
    answers = answer_turns(model, tokenizer, questions, render, settings, file=tmp_path / "outputs.jsonl")
    assert [len(turns) for turns in answers.values()] == [2, 1]
    assert prompts == [("a?",), ("c?",), ("a?", answers["1"][0], "b?")]
    write_answers(tmp_path / "answers.jsonl", answers, "model")
    assert read_answers(tmp_path / "answers.jsonl") == answers


@pytest.mark.data
def test_fastchats_files_are_read(data_dir: Path, judge: tuple[Judge, Endpoint]) -> None:
    folder = data_dir / "instruct"
    questions = read_judge_questions(folder / "mt_bench_question.jsonl")
    references = read_answers(folder / "mt_bench_reference_gpt-4.jsonl")
    assert len(questions) == 80
    assert all(len(question.turns) == 2 for question in questions)
    prompts = read_prompts(folder / "judge_prompts.jsonl")
    answers = {question.id: ("an answer", "a good answer") for question in questions}
    _, endpoint = judge
    grades = grade_answers(endpoint, questions, answers, references, seed=0, prompts=prompts)
    assert grades.usage.num_verdicts == 160
    assert len(grades.per_category) == 8
    assert len(read_judge_questions(folder / "vicuna_question.jsonl")) == 80
