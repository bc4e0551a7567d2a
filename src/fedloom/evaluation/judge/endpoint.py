"""Talk to any server with OpenAI's chat protocol: patiently, within limits, and without ever writing down the key."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedloom.errors import EndpointError
from fedloom.evaluation.judge.judge_key import (
    OPENAI_VARIABLE,
    OWN_VARIABLE,
    authorization,
    is_this_machine,
    key_variable,
    shown,
    without_keys,
)
from fedloom.evaluation.judge.proxies import proxy_for

if TYPE_CHECKING:
    from fedloom.evaluation.judge.exchange import Answer

MAX_ANSWER_BYTES = 2**20
Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Reply:
    """What the server said, and the tokens it counted (0 where it does not count)."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server and the model asked there. The key is read from the environment at each call and kept nowhere.

    A call is tried ``attempts`` times: after a refused connection, HTTP 408, 409, 429 or 5xx, an answer that is none,
    is larger than ``max_answer_bytes`` or is not whole within ``timeout_seconds``. Waits double from
    ``first_wait_seconds``; a ``Retry-After`` of the server is obeyed, up to ``longest_wait_seconds``.
    """

    url: str
    model: str
    timeout_seconds: float = 120.0
    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 120.0
    max_answer_bytes: int = MAX_ANSWER_BYTES
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    @property
    def address(self) -> str:
        """Return where calls go: ``url`` itself, or its ``/chat/completions``."""
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    @property
    def proxy_name(self) -> str | None:
        """Return the proxy that calls go through, without its password, or None.

        Raises:
            EndpointError: the environment sets a proxy that none can go through.
        """
        proxy = proxy_for(self.address)
        return proxy.name if proxy else None

    def chat(self, messages: Sequence[Message], *, temperature: float = 0.0, max_tokens: int = 1024) -> Reply:
        """Send a conversation and return the reply.

        Raises:
            EndpointError: the server refuses the key or the request; or it was down, slow, busy or talked nonsense in
                all attempts.
        """
        from fedloom.evaluation.judge.exchange import PassingTroubleError

        self.check()
        body = {"model": self.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
        for attempt in range(self.attempts):
            try:
                return self._ask(json.dumps(body).encode())
            except PassingTroubleError as trouble:
                if attempt + 1 == self.attempts:
                    raise EndpointError(f"{self.address}: {trouble}, {self.attempts} times: {trouble.advice}") from None
                self.sleep(min(self.longest_wait_seconds, trouble.wait or self.first_wait_seconds * 2**attempt))
        raise EndpointError(f"attempts must be at least 1, got {self.attempts}")

    def check(self) -> None:
        """Raise, without a call, where none could be made.

        Raises:
            EndpointError: the address is none of a web server, holds a password, or would get the key unencrypted; the
                key or the proxy of the environment cannot be used.
        """
        import httpx2

        try:
            parts = urlsplit(self.address)
            is_address = parts.scheme in {"http", "https"} and bool(httpx2.URL(self.address).host)
            is_address = is_address and parts.port != 0
        except (ValueError, UnicodeError, httpx2.InvalidURL):
            raise self._no_address() from None
        if "@" in parts.netloc:
            raise EndpointError(
                f"the endpoint at {parts.hostname}: expected no user or password in the address, got one; "
                f"set {OWN_VARIABLE} instead"
            )
        if not is_address:
            raise self._no_address()
        if (variable := key_variable(self._host)) and parts.scheme == "http" and not is_this_machine(self._host):
            raise EndpointError(
                f"{self.address} is not encrypted and would lay open the key of {variable}: use https, or unset it"
            )
        authorization(self._host)
        proxy_for(self.address)

    @property
    def _host(self) -> str:
        return urlsplit(self.address).hostname or ""

    def _no_address(self) -> EndpointError:
        return EndpointError(f"expected an endpoint like https://host/v1, got {self.url!r}; correct it")

    def _ask(self, body: bytes) -> Reply:
        from fedloom.evaluation.judge.exchange import Limits, PassingTroubleError, post

        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        headers |= authorization(self._host)
        limits = Limits(self.timeout_seconds, self.max_answer_bytes)
        answer = post(self.address, body, headers, proxy_for(self.address), limits)
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        try:
            return _reply(answer.body)
        except _NotAReplyError:
            start = shown(answer.body.decode("utf-8", "replace"), 80)
            raise PassingTroubleError(
                f"no chat reply in its answer ({start!r})", "does it speak OpenAI's chat protocol?"
            ) from None

    def _refusal(self, answer: Answer) -> Exception:
        """Return what an HTTP status means: worth another try, or final."""
        from fedloom.evaluation.judge.exchange import PassingTroubleError

        status, detail = answer.status, shown(answer.body.decode("utf-8", "replace"), 300)
        if status in {401, 403}:
            variable = key_variable(self._host)
            unsent = f"; {OPENAI_VARIABLE} is sent to OpenAI only" if os.environ.get(OPENAI_VARIABLE) else ""
            origin = f"the key of {variable}" if variable else f"calls without a key: set {OWN_VARIABLE}{unsent}"
            return EndpointError(f"{self.address} refuses {origin} (HTTP {status}): {detail}")
        if status in {408, 409, 429} or status >= 500:
            wait = _retry_after(answer.headers.get("Retry-After"))
            return PassingTroubleError(f"HTTP {status} ({detail})", "try later, or lower the concurrency", wait)
        if 300 <= status < 400:
            target = shown(answer.headers.get("Location", "nowhere"), 200)
            detail = f"it redirects to {target}, and no call follows, since it would carry the key there"
        return EndpointError(f"{self.address} refuses the request for {self.model!r} (HTTP {status}): {detail}")


class _NotAReplyError(ValueError):
    """An answer that is no chat completion."""


def _reply(content: bytes) -> Reply:
    """Read a chat completion: its text, without any key, and its counts of tokens.

    Raises:
        _NotAReplyError: it is none.
    """
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _NotAReplyError from error
    if not isinstance(text, str) or not all(_is_count(count) for count in counts):
        raise _NotAReplyError
    return Reply(without_keys(text.encode("utf-8", "replace").decode()), *counts)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _retry_after(value: str | None) -> float | None:
    """Return the seconds a server asks to wait, given as a number or as a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
