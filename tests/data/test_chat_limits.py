"""A stranger's chat template ends: whatever it loops over or writes, the row is refused in one line."""

from __future__ import annotations

import threading
import time

import pytest

from fedloom.data import ChatTemplate, Dialogue, Turn, byte_tokenizer, chat, render
from fedloom.data.time_limit import TookTooLong, time_limit
from fedloom.errors import DataError
from tests.data.test_token_rows import CHATML

DIALOGUE = Dialogue((Turn("user", "hi " * 20), Turn("assistant", "yes")))
ENDLESS = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "its own text": "{% for a in s %}{% for b in s %}{% for c in s %}{% for d in s %}{% for e in s %}{% for f in s %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro": "{% macro again(n) %}{% if n %}{{ again(n - 1) }}{{ again(n - 1) }}{% endif %}{% endmacro %}"
    "{{ again(60) }}",
}


@pytest.mark.parametrize("loop", ENDLESS)
def test_a_template_that_loops_is_stopped(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% set s = messages[0]['content'] %}" + ENDLESS[loop] + CHATML
    began = time.monotonic()
    with pytest.raises(DataError, match=r"writes the turns within 0 s.*set data\.template"):
        render(DIALOGUE, ChatTemplate(), tokenizer)
    assert time.monotonic() - began < 5.0
    tokenizer.chat_template = CHATML
    assert render(DIALOGUE, ChatTemplate(), tokenizer).spans


@pytest.mark.parametrize(
    ("much", "message"),
    [
        ("{% for a in range(99999) %}0123456789abcdef{% endfor %}", r"writes at most 1,000,630 characters.* got 1,6"),
        ("{{ 10**10**10 }}", r"without powers"),
        ("{{ 'x' * 99999999999 }}", r"numbers above 10,000,000, got 99999999999"),
    ],
)
def test_a_template_that_writes_too_much_is_refused(much: str, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = much + CHATML
    with pytest.raises(DataError, match=message):
        render(DIALOGUE, ChatTemplate(), tokenizer)


def test_a_time_limit_acts_in_every_thread_and_leaves_others_alone() -> None:
    stopped = []

    def endless() -> None:
        try:
            with time_limit(0.1):
                while True:
                    pass
        except TookTooLong:
            stopped.append(True)

    thread = threading.Thread(target=endless)
    thread.start()
    with time_limit(60.0):
        thread.join(10.0)
    assert stopped == [True]


def test_a_limit_that_was_kept_leaves_nothing_behind() -> None:
    for _ in range(3):
        with time_limit(0.05):
            pass
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        pass
