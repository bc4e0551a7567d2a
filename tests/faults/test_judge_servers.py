"""Judges' servers that are slow, endless, huge, nested, hostile or in the wrong place: each is one line, in time."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedloom.errors import EndpointError, EvaluationError, FedloomError
from fedloom.evaluation.judge.asking import CallEstimate
from fedloom.evaluation.judge.endpoint import Endpoint
from fedloom.evaluation.judge.judge_prompts import JudgePrompt, read_prompts
from fedloom.evaluation.judge.judge_questions import JudgeQuestion, read_answers, read_judge_questions
from fedloom.evaluation.judge.protocols import grade_answers
from fedloom.evaluation.judge.verdict_cache import VerdictCache

KEY = "sk-SECRET-0123"
TIMEOUT_SECONDS = 0.4
Answering = Callable[[socket.socket], None]
Serve = Callable[[Answering], int]


def whole(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def completion(content: object = "Rating: [[7]]", **usage: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


def is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length: ")
    return bool(end) and len(body) >= int(length.split(b"\r\n")[0] or 0)


@pytest.fixture
def heads() -> list[bytes]:
    """What servers were sent."""
    return []


@pytest.fixture
def serve(heads: list[bytes]) -> Iterator[Serve]:
    """Return a function that starts a server on this machine, which answers each request as it is told to."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def answer_one(connection: socket.socket, answering: Answering) -> None:
        with connection:
            connection.settimeout(5)
            received = b""
            try:
                while not is_whole(received) and (part := connection.recv(65536)):
                    received += part
                heads.append(received)
                answering(connection)
            except OSError:
                return

    def listen(listener: socket.socket, answering: Answering) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=answer_one, args=(connection, answering))
            thread.start()
            threads.append(thread)

    def start(answering: Answering) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        thread = threading.Thread(target=listen, args=(listener, answering))
        thread.start()
        threads.append(thread)
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("FEDLOOM_JUDGE_KEY", KEY)


def endpoint_at(port: int, attempts: int = 2) -> Endpoint:
    url = f"http://127.0.0.1:{port}/v1"
    return Endpoint(url, "m", timeout_seconds=TIMEOUT_SECONDS, attempts=attempts, sleep=lambda _: None)


def refusal(endpoint: Endpoint) -> str:
    with pytest.raises(EndpointError) as caught:
        endpoint.chat([{"role": "user", "content": "x"}])
    message = str(caught.value)
    assert KEY not in message
    assert "\n" not in message
    return message


def drip(first: bytes, drop: bytes) -> Answering:
    """Answer ``first`` at once, and ``drop`` again and again: every read is quick, the answer never ends."""

    def answering(connection: socket.socket) -> None:
        connection.sendall(first)
        connection.settimeout(0.02)
        for _ in range(200):
            connection.sendall(drop)
            try:
                if connection.recv(1) == b"":  # the client has gone
                    return
            except TimeoutError:
                pass

    return answering


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("answering", "expected"),
    [
        (drip(b"", b""), "no answer within"),
        (drip(OK, b"X-More: 1\r\n"), "no answer within"),
        (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no answer within"),
        (drip(OK + b"Content-Length: 100000\r\n\r\n", b" "), "no whole answer within"),
        (drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "no whole answer within"),
        (drip(OK + b"\r\n", b" "), "no whole answer within"),
        (drip(b"HTTP/1.1 503 X\r\nContent-Length: 500\r\n\r\nbusy", b""), "HTTP 503 (busy"),
        (drip(b"HTTP/1.1 400 X\r\nContent-Length: 500\r\n\r\nwrong", b""), "refuses the request"),
    ],
    ids=["silent", "headers", "hints", "body", "chunks", "until-closed", "busy-stalls", "refusal-stalls"],
)
def test_a_server_that_never_ends_its_answer_is_left_at_one_deadline(
    serve: Serve, answering: Answering, expected: str
) -> None:
    started = time.monotonic()
    assert expected in refusal(endpoint_at(serve(answering)))
    assert time.monotonic() - started < 2 * TIMEOUT_SECONDS + 2


def flood(first: bytes, part: bytes, num_parts: int) -> Answering:
    def answering(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(num_parts):
            connection.sendall(part)

    return answering


@pytest.mark.parametrize(
    ("answering", "expected"),
    [
        (flood(OK + b"\r\n", b" " * 2**20, 64), "an answer of more than 1.05 MB"),
        (flood(OK + b"Content-Length: 99999999999\r\n\r\n", b" " * 2**20, 64), "an answer of more than 1.05 MB"),
        (
            flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * 2**20 + b"\r\n", 64),
            "more than 1.05",
        ),
        (flood(OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\nabc", b"", 0), "no whole HTTP answer"),
        (flood(OK, b"X-Long: " + b"y" * 2**16 + b"\r\n", 64), "no whole HTTP answer"),
        (flood(OK + b"Content-Encoding: gzip\r\n\r\n", b"", 0), "a compressed answer, which was not asked for"),
        (flood(OK + b"Content-Length: -1\r\n\r\n", b"", 0), "no whole HTTP answer"),
        (flood(b"\x00\xff" * 50 + b"\r\n\r\n", b"", 0), "no whole HTTP answer"),
        (flood(b"HTTP/1.1 400 X\r\n\r\n", b"e" * 2**20, 64), "refuses the request"),
    ],
    ids=["endless", "length", "chunks", "huge-chunk", "headers", "compressed", "negative", "binary", "refusal"],
)
def test_a_server_that_sends_too_much_or_no_http_is_left_in_bounded_memory(
    serve: Serve, answering: Answering, expected: str
) -> None:
    port = serve(answering)
    tracemalloc.start()
    try:
        message = refusal(endpoint_at(port, attempts=1))
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()
    assert expected in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b"",
        b"\xff\xfe",
        b"null",
        b'{"choices": {}}',
        b'{"choices": [{"message": "x"}]}',
        completion(content=[{"text": "[[7]]"}]),
        completion(content=7),
        b'{"choices": [{"message": {"content": "[[7]]"}}], "usage": {"prompt_tokens": 1e400}}',
        b'{"choices": [{"message": {"content": "[[7]]"}}], "usage": {"prompt_tokens": NaN}}',
        completion(prompt_tokens=-1),
        completion(completion_tokens="many"),
        completion(completion_tokens=2**70),
        completion(completion_tokens=True),
        b'{"choices": [{"message": {"content": "[[7]]"}}], "usage": [1]}',
    ],
    ids=lambda body: ascii(body[:60]),
)
def test_an_answer_of_another_shape_is_no_reply(serve: Serve, body: bytes) -> None:
    assert "no chat reply in its answer" in refusal(endpoint_at(serve(lambda c: c.sendall(whole(body)))))


def test_the_start_of_an_answer_is_shown_without_its_control_characters(serve: Serve) -> None:
    message = refusal(endpoint_at(serve(lambda c: c.sendall(whole(b"\x1b[2Jhello", "400 Bad")))))
    assert "\\u001b[2Jhello" in message
    assert "\x1b" not in message


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_named_and_the_key_stays_here(serve: Serve, heads: list[bytes], status: str) -> None:
    elsewhere = serve(lambda c: c.sendall(whole(completion())))
    location = f"Location: http://127.0.0.1:{elsewhere}/v1\r\n"
    message = refusal(endpoint_at(serve(lambda c: c.sendall(whole(b"", status, location)))))
    assert f"redirects to http://127.0.0.1:{elsewhere}/v1" in message
    assert len(heads) == 1


@pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\n", f"{KEY} two", f"{KEY}é", f"{KEY}\x00"[:-1] + "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    serve: Serve, heads: list[bytes], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("FEDLOOM_JUDGE_KEY", key)
    assert "FEDLOOM_JUDGE_KEY: expected a key of visible ASCII" in refusal(endpoint_at(serve(lambda _: None)))
    assert heads == []


def test_a_key_that_the_server_repeats_is_kept_nowhere(serve: Serve, tmp_path: Path) -> None:
    cache = tmp_path / "verdicts.sqlite"
    port = serve(lambda c: c.sendall(whole(completion(f"I know {KEY}. Rating: [[7]]"))))
    questions = [JudgeQuestion("1", ("Why?",))]
    assert grade_answers(endpoint_at(port), questions, {"1": ("So.",)}, seed=0, cache=cache).overall.value == 7.0
    assert KEY.encode() not in cache.read_bytes()
    assert b"I know" in cache.read_bytes()
    long = b"x" * 295 + KEY.encode()
    assert "sk-" not in refusal(endpoint_at(serve(lambda c: c.sendall(whole(long, "400 Bad")))))


def test_openais_key_goes_to_openai_and_this_machine_only(
    serve: Serve, heads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDLOOM_JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint_at(serve(lambda c: c.sendall(whole(completion())))).chat([])
    assert f"Bearer {KEY}".encode() in heads[0]
    with pytest.raises(EndpointError, match="lay open the key of OPENAI_API_KEY"):
        Endpoint("http://api.openai.com/v1", "m").check()
    Endpoint("http://notopenai.com/v1", "m").check()  # unencrypted, and allowed: no key goes there


def test_a_plain_proxy_never_sees_a_call_to_this_machine(
    serve: Serve, heads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(lambda c: c.sendall(whole(b"{}")))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy}")
    assert "cannot be reached" in refusal(Endpoint("http://localhost:9/v1", "m", attempts=1))
    assert heads == []


def test_a_tunnel_hides_the_key_from_the_proxy_which_is_named(
    serve: Serve, heads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(lambda c: c.sendall(whole(b"", "403 Forbidden")))
    monkeypatch.setenv("HTTPS_PROXY", f"user:password@127.0.0.1:{proxy}")
    endpoint = Endpoint("https://judge.example/v1", "m", attempts=1)
    name = f"http://127.0.0.1:{proxy} (of HTTPS_PROXY)"
    assert endpoint.proxy_name == name
    message = refusal(endpoint)
    assert name in message
    assert "password" not in message
    assert heads[0].startswith(b"CONNECT judge.example:443")
    assert KEY.encode() not in heads[0]
    told: list[CallEstimate] = []
    with pytest.raises(EndpointError):
        grade_answers(endpoint, [JudgeQuestion("1", ("Why?",))], {"1": ("So.",)}, seed=0, on_estimate=told.append)
    assert told[0].proxy == name


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://", "http://proxy:none", "ftp://proxy"])
def test_a_proxy_that_cannot_be_used_is_refused_before_any_call(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(EndpointError, match="the proxy of https_proxy: expected an address like http://proxy:3128"):
        Endpoint("https://judge.example/v1", "m").check()
    monkeypatch.setenv("no_proxy", "judge.example")
    Endpoint("https://judge.example/v1", "m").check()


@pytest.mark.parametrize(
    "url", ["", "judge", "ftp://host", "http://", "http://[::1", "http://h:99999999", "http://a\0b", "http://\x1b[2J"]
)
def test_an_address_that_is_none_is_refused_before_any_call(url: str) -> None:
    with pytest.raises(EndpointError, match="expected an endpoint like https://host/v1"):
        Endpoint(url, "m").check()


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(EndpointError, match="expected no user or password in the address") as caught:
        Endpoint("https://me:hunter2@judge.example/v1", "m").check()
    assert "hunter2" not in str(caught.value)


def test_a_call_can_be_made_where_an_event_loop_runs_already(serve: Serve) -> None:
    import asyncio

    endpoint = endpoint_at(serve(lambda c: c.sendall(whole(completion(prompt_tokens=3)))))

    async def notebook() -> int:
        return endpoint.chat([]).prompt_tokens

    assert asyncio.run(notebook()) == 3


def test_half_a_character_in_a_reply_can_be_kept_and_shown(serve: Serve) -> None:
    reply = endpoint_at(serve(lambda c: c.sendall(whole(completion("\ud800 [[7]]"))))).chat([])
    assert reply.text.encode() == b"? [[7]]"


def kept_verdict(path: Path) -> None:
    from fedloom.evaluation.judge.endpoint import Reply

    with VerdictCache(path) as cache:
        cache.put("k", [Reply("Rating: [[2]]", 10, 3)])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE verdicts SET replies = replace(replies, '[[2]]', '[[9]]')",
        "UPDATE verdicts SET replies = '['",
        "UPDATE verdicts SET replies = '[[1]]'",
        "UPDATE verdicts SET replies = x'ff'",
        "UPDATE verdicts SET hash = NULL",
        "UPDATE verdicts SET hash = 7",
        "DROP TABLE verdicts; CREATE TABLE verdicts (x TEXT)",
        "DROP TABLE verdicts; CREATE VIEW verdicts AS SELECT 1 AS key",
    ],
)
def test_a_cache_that_changed_is_named_and_not_used(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "verdicts.sqlite"
    kept_verdict(path)
    database = sqlite3.connect(path)
    database.executescript(statement)
    database.close()
    with pytest.raises(
        EvaluationError, match=r"verdicts\.sqlite: expected a cache of verdicts, got another or a damaged file"
    ):
        read_back(path)


@pytest.mark.parametrize("offset", [100, 4096, 8150, 8185])
def test_a_byte_that_changed_in_a_cache_is_never_believed(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "verdicts.sqlite"
    kept_verdict(path)
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    found = None
    with contextlib.suppress(EvaluationError):
        found = read_back(path)
    assert found in (None, "Rating: [[2]]")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.parent.joinpath("verdicts.sqlite").symlink_to("/")])
def test_a_cache_that_cannot_be_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "verdicts.sqlite"
    make(path)
    with pytest.raises(EvaluationError, match=r"verdicts\.sqlite: expected a cache of verdicts"):
        VerdictCache(path)


def test_verdicts_of_an_older_cache_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE verdicts (key TEXT PRIMARY KEY, replies TEXT NOT NULL)")
    database.execute("INSERT INTO verdicts VALUES ('k', '[[\"Rating: [[2]]\", 10, 3]]')")
    database.commit()
    database.close()
    assert read_back(path) == read_back(path) == "Rating: [[2]]"


def read_back(path: Path) -> str | None:
    with VerdictCache(path) as cache:
        found = cache.get("k")
        return found[0].text if found else None


@pytest.mark.parametrize(
    "row",
    [
        '{"question_id": 1, "turns": []}',
        '{"question_id": 1, "turns": [""]}',
        '{"question_id": 1, "turns": ["a", 2]}',
        '{"question_id": 1, "turns": "abc"}',
        '{"question_id": 1, "turns": null}',
        '{"question_id": 1, "text": ["a"]}',
        '{"question_id": [1], "turns": ["a"]}',
        '{"question_id": true, "turns": ["a"]}',
        '{"question_id": 1, "turns": ["a"], "category": {}}',
        '{"question_id": 1, "turns": ["\\ud800"]}',
        "[" * 100_000,
        "7",
    ],
    ids=lambda row: row[:50],
)
def test_a_question_of_the_wrong_shape_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question_id": 0, "turns": ["good"]}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(FedloomError, match=r"questions\.jsonl line 2: "):
        read_judge_questions(file)


@pytest.mark.parametrize("choices", ["[]", "{}", '[{"turns": []}]', '[{"turns": [null]}]', '[{"turns": "ab"}]', "[7]"])
def test_an_answer_of_the_wrong_shape_is_named_by_its_line(tmp_path: Path, choices: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(f'{{"question_id": 0, "choices": {choices}}}\n')
    with pytest.raises(EvaluationError, match=r"answers\.jsonl line 1: expected choices\[0\]\.turns"):
        read_answers(file)


@pytest.mark.parametrize(
    "template",
    ["{answer.__class__}", "{answer[0]}", "{answer:>99999999999}", "{answer!r}", "{", "{other}", "{}", "{0}"],
)
def test_a_judges_template_can_ask_for_a_fields_text_and_no_more(template: str) -> None:
    with pytest.raises(EvaluationError, match="the judge's template"):
        JudgePrompt("", template).messages(answer="x")
    assert JudgePrompt("", "{{{answer}}}").messages(answer="{x}")[0]["content"] == "{{x}}"


@pytest.mark.parametrize("row", ['{"name": 1, "prompt_template": "x"}', '{"name": "a", "prompt_template": []}', "[]"])
def test_a_judges_prompt_of_the_wrong_shape_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(row)
    with pytest.raises(FedloomError, match=r"prompts\.jsonl line 1: expected (the keys name|an object)"):
        read_prompts(file)
