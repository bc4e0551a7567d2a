"""One request and its answer, within a time and a size, whatever the server does."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2

from fedloom.evaluation.judge.judge_key import shown
from fedloom.evaluation.judge.proxies import Proxy
from fedloom.wording import written_bytes

_DETAIL_BYTES = 4096  # of a refusal; its start says why


class PassingTroubleError(Exception):
    """Trouble that another try may not have: what it was, what to do, and the seconds the server asks to wait."""

    def __init__(self, what: str, advice: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.advice = advice
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """What a server answered; of a refusal, the start of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Limits:
    """What one call may take, from the look-up of the host to the last byte of the answer."""

    seconds: float
    answer_bytes: int


def post(address: str, body: bytes, headers: Mapping[str, str], proxy: Proxy | None, limits: Limits) -> Answer:
    """Send one request and return the answer to it. A redirect is an answer, and is not followed.

    The call has an event loop of its own, in a thread of its own: only so can all of it end at one deadline, and a
    notebook, which has a loop already, call it too.

    Raises:
        PassingTroubleError: no whole answer within the limits, or none that is HTTP.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _exchange(address, body, headers, proxy, limits)).result()


async def _exchange(
    address: str, body: bytes, headers: Mapping[str, str], proxy: Proxy | None, limits: Limits
) -> Answer:
    tls = _tls()
    kept = bytearray()
    begun: httpx2.Response | None = None
    try:
        async with (
            asyncio.timeout(limits.seconds),
            httpx2.AsyncClient(trust_env=False, verify=tls, proxy=proxy.url if proxy else None, timeout=None) as client,
            client.stream("POST", address, content=body, headers=dict(headers)) as response,
        ):
            begun = response
            await _read(response, kept, limits.answer_bytes if response.is_success else _DETAIL_BYTES)
            return Answer(response.status_code, response.headers, bytes(kept))
    except TimeoutError:
        if begun is None or begun.is_success:
            missing = "no whole answer" if begun else "no answer"
            raise PassingTroubleError(f"{missing} within {limits.seconds:g} s", "raise the time-out") from None
        return Answer(begun.status_code, begun.headers, bytes(kept))
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        through = f" through the proxy {proxy.name}" if proxy else ""
        broke = isinstance(error, httpx2.ProtocolError | httpx2.ReadError)
        what = "gave no whole HTTP answer" if broke else "cannot be reached"
        reason = shown(str(error) or type(error).__name__, 200)
        raise PassingTroubleError(f"{what}{through} ({reason})", "is the server up, and the address right?") from None


async def _read(response: httpx2.Response, kept: bytearray, most_bytes: int) -> None:
    """Read an answer's body into ``kept``: as it was sent, so that a few bytes never become many."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        if not response.is_success:
            return
        raise PassingTroubleError("a compressed answer, which was not asked for", "is a proxy in between?")
    async for part in response.aiter_raw():
        kept += part[: most_bytes + 1 - len(kept)]
        if len(kept) <= most_bytes:
            continue
        if response.is_success:
            raise PassingTroubleError(
                f"an answer of more than {written_bytes(most_bytes)}", "is this a chat server, and its reply so long?"
            )
        return


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the certificates that are trusted; SSL_CERT_FILE of the environment counts."""
    return httpx2.create_ssl_context()
