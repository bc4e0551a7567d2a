"""Put conversations to a judge: cached, several at a time, again where no verdict came, with an estimate before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import EndpointError
from fedloom.evaluation.judge.endpoint import Endpoint, Message, Reply
from fedloom.evaluation.judge.judge_prompts import parse_scores, reminder
from fedloom.evaluation.judge.verdict_cache import VerdictCache, request_key

_CHARACTERS_PER_TOKEN = 4  # a usual figure for English; only the estimate before the first call uses it


@dataclass(frozen=True)
class CallEstimate:
    """What a run will ask for: calls beyond the cached ones, about how many tokens they hold, and any proxy between."""

    num_calls: int
    num_cached: int
    prompt_tokens: int
    completion_tokens_at_most: int
    proxy: str | None = None


@dataclass(frozen=True)
class Usage:
    """What a run asked for; ``unread`` is the first reply that held no scores, as the judge wrote it."""

    num_verdicts: int
    num_cached: int
    num_calls: int
    num_unparseable: int
    prompt_tokens: int
    completion_tokens: int
    unread: str = ""

    @property
    def advice(self) -> str:
        """What to do where no reply held scores, with the reply."""
        shown = " ".join(self.unread.split())[:120]
        return f"its first such reply begins {shown!r}; choose another judge" if shown else "choose another judge"


@dataclass(frozen=True)
class Judging:
    """How a judge is asked."""

    temperature: float = 0.0
    max_tokens: int = 1024
    tries: int = 3
    """Replies asked for until one holds a verdict."""
    concurrency: int = 4


OnEstimate = Callable[[CallEstimate], None]
OnVerdict = Callable[[int, int], None]  # done, total


def ask_all(
    endpoint: Endpoint,
    asked: Sequence[list[Message]],
    num_scores: int,
    path: Path | None,
    judging: Judging,
    on_estimate: OnEstimate | None,
    on_progress: OnVerdict | None,
) -> tuple[list[tuple[float, ...] | None], Usage]:
    """Get a verdict for every conversation, from the cache or the judge; None where the judge gave none."""
    keys = [_key(endpoint, messages, num_scores, judging) for messages in asked]
    with VerdictCache(path) as cache:
        replies = {key: found for key in keys if (found := cache.get(key)) is not None}
        todo = {key: messages for key, messages in zip(keys, asked, strict=True) if key not in replies}
        num_cached = len(asked) - len(todo)
        if on_estimate is not None:
            on_estimate(_estimate(endpoint, list(todo.values()), num_cached, judging))
        fresh = _ask_judge(endpoint, todo, num_scores, cache, judging, on_progress)
    replies |= fresh
    verdicts = [parse_scores(replies[key][-1].text, num_scores) for key in keys]
    new = [reply for found in fresh.values() for reply in found]
    tokens = sum(reply.prompt_tokens for reply in new), sum(reply.completion_tokens for reply in new)
    unread = next((replies[key][-1].text for key, verdict in zip(keys, verdicts, strict=True) if verdict is None), "")
    return verdicts, Usage(len(asked), num_cached, len(new), verdicts.count(None), *tokens, unread)


def _ask_judge(
    endpoint: Endpoint,
    todo: Mapping[str, list[Message]],
    num_scores: int,
    cache: VerdictCache,
    judging: Judging,
    on_progress: OnVerdict | None,
) -> dict[str, list[Reply]]:
    """Ask several at a time, and keep every verdict the moment it comes."""
    done: dict[str, list[Reply]] = {}
    pool = ThreadPoolExecutor(judging.concurrency)
    keys = {pool.submit(_verdict, endpoint, messages, num_scores, judging): key for key, messages in todo.items()}
    failure: EndpointError | None = None
    try:
        for future in as_completed(keys):
            failure = failure or _failure(future, keys)
            if future.cancelled() or future.exception() is not None:
                continue
            done[keys[future]] = future.result()
            cache.put(keys[future], done[keys[future]])
            if on_progress is not None:
                on_progress(len(done), len(todo))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise EndpointError(
            f"{failure} ({len(done)} of {len(todo)} verdicts were kept; run again to go on)"
        ) from failure
    return done


def _failure(future: Future[list[Reply]], others: Mapping[Future[list[Reply]], str]) -> EndpointError | None:
    """Return why the endpoint failed, if it did, and begin no further calls then."""
    error = None if future.cancelled() else future.exception()
    if error is None:
        return None
    if not isinstance(error, EndpointError):
        raise error
    for other in others:
        other.cancel()
    return error


def _verdict(endpoint: Endpoint, messages: list[Message], num_scores: int, judging: Judging) -> list[Reply]:
    """Ask until a reply holds the scores; each further try shows the judge its reply and the format again."""
    replies: list[Reply] = []
    conversation = list(messages)
    for _ in range(judging.tries):
        reply = endpoint.chat(conversation, temperature=judging.temperature, max_tokens=judging.max_tokens)
        replies.append(reply)
        if parse_scores(reply.text, num_scores) is not None:
            break
        conversation += [{"role": "assistant", "content": reply.text}, reminder(num_scores)]
    return replies


def _key(endpoint: Endpoint, messages: list[Message], num_scores: int, judging: Judging) -> str:
    return request_key(
        address=endpoint.address,
        model=endpoint.model,
        messages=messages,
        num_scores=num_scores,
        temperature=judging.temperature,
        max_tokens=judging.max_tokens,
        tries=judging.tries,
    )


def _estimate(endpoint: Endpoint, todo: Sequence[list[Message]], num_cached: int, judging: Judging) -> CallEstimate:
    characters = sum(len(message["content"]) for messages in todo for message in messages)
    most_tokens = len(todo) * judging.max_tokens
    return CallEstimate(
        len(todo), num_cached, characters // _CHARACTERS_PER_TOKEN, most_tokens, endpoint.proxy_name if todo else None
    )
