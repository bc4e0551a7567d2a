"""Talk to any server with OpenAI's chat protocol: patiently, within limits, and without ever writing down the key."""

from __future__ import annotations

import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from fedloom.errors import EndpointError

KEY_VARIABLES = ("FEDLOOM_JUDGE_KEY", "OPENAI_API_KEY")
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

    A call is tried ``attempts`` times: after a refused connection, a time-out, HTTP 408, 409, 429 or 5xx, or an answer
    that is none. Waits double from ``first_wait_seconds``; a ``Retry-After`` of the server is obeyed, up to
    ``longest_wait_seconds``.
    """

    url: str
    model: str
    timeout_seconds: float = 120.0
    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 120.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    @property
    def address(self) -> str:
        """Return where calls go: ``url`` itself, or its ``/chat/completions``."""
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def chat(self, messages: Sequence[Message], *, temperature: float = 0.0, max_tokens: int = 1024) -> Reply:
        """Send a conversation and return the reply.

        Raises:
            EndpointError: the server refuses the key or the request; or it was down, slow, busy or talked nonsense in
                all attempts.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
        request = self._request(json.dumps(body).encode())
        for attempt in range(self.attempts):
            try:
                return self._ask(request)
            except _Passing as trouble:
                if attempt + 1 == self.attempts:
                    raise EndpointError(f"{self.address}: {trouble}, {self.attempts} times: {trouble.advice}") from None
                self.sleep(min(self.longest_wait_seconds, trouble.wait or self.first_wait_seconds * 2**attempt))
        raise EndpointError(f"attempts must be at least 1, got {self.attempts}")

    def check(self) -> None:
        """Raise, without a call, where none could be made.

        Raises:
            EndpointError: the address is none of a web server, or the key would go there unencrypted.
        """
        parts = urlsplit(self.address)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise EndpointError(f"expected an endpoint like https://host/v1, got {self.url!r}; correct it")
        if (variable := key_variable()) and parts.scheme == "http" and not _is_this_machine(parts.hostname):
            raise EndpointError(
                f"{self.address} is not encrypted and would lay open the key of {variable}: use https, or unset it"
            )

    def _request(self, body: bytes) -> urllib.request.Request:
        self.check()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if (variable := key_variable()) is not None:
            headers["Authorization"] = f"Bearer {os.environ[variable]}"
        return urllib.request.Request(self.address, data=body, headers=headers, method="POST")

    def _ask(self, request: urllib.request.Request) -> Reply:
        try:
            with _OPENER.open(request, timeout=self.timeout_seconds) as response:
                return _reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise _Passing(f"no answer within {self.timeout_seconds:g} s", "raise the time-out") from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer within {self.timeout_seconds:g} s", "raise the time-out") from None
            raise _Passing(f"cannot be reached ({reason})", "is the server up, and the address right?") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP status means: worth another try, or final."""
        detail = _scrubbed(error.read(500).decode("utf-8", "replace"))
        if error.code in {401, 403}:
            variable = key_variable()
            origin = f"the key of {variable}" if variable else f"calls without a key: set {KEY_VARIABLES[0]}"
            return EndpointError(f"{self.address} refuses {origin} (HTTP {error.code}): {detail}")
        if error.code in {408, 409, 429} or error.code >= 500:
            wait = _retry_after(error.headers.get("Retry-After"))
            return _Passing(f"HTTP {error.code} ({detail})", "try later, or lower the concurrency", wait)
        return EndpointError(f"{self.address} refuses the request for {self.model!r} (HTTP {error.code}): {detail}")


def key_variable() -> str | None:
    """Return the name of the environment variable that holds the key, if one does."""
    return next((name for name in KEY_VARIABLES if os.environ.get(name)), None)


class _Passing(Exception):  # noqa: N818
    """Trouble that another try may not have."""

    def __init__(self, what: str, advice: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.advice = advice
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow nobody: a redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _reply(content: bytes) -> Reply:
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        return Reply(_text(text), int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        start = _scrubbed(content[:80].decode("utf-8", "replace"))
        raise _Passing(f"no chat reply in its answer ({start!r})", "does it speak OpenAI's chat protocol?") from None


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError("the message has no text")
    return content


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
    except (ValueError, TypeError):
        return None


def _scrubbed(text: str) -> str:
    """Return one line of text without any key: some servers repeat it in their refusals."""
    for variable in KEY_VARIABLES:
        if key := os.environ.get(variable):
            text = text.replace(key, "…")
    return " ".join(text.split())


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
