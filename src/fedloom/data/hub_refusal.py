"""What to say where a name on the hub gave nothing: the libraries' own texts name their functions, not a way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedloom.wording import first_line

CACHE = "HF_HOME"
OFFLINE = "HF_HUB_OFFLINE"
_DEPTH = 8


def hub_refusal(what: str, wanted: str, name: object, error: BaseException) -> str:
    """Return a line: what was expected as ``what``, that ``name`` came, why the hub gave nothing for it, what to do."""
    reason, action = _reason(error)
    found = f"{str(name)!r}, which is not on this machine and was not fetched"
    return f"{what}: expected {wanted}, got {found}: {reason}; {action}"


def _reason(error: BaseException) -> tuple[str, str]:
    """Return why the hub gave nothing, and what helps."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return "the hub shows it to those alone who agree to its terms", "agree on its page, then hf auth login"
        if isinstance(cause, RepositoryNotFoundError):
            return "the hub has none of that name that you may read", "check the name, or log in (hf auth login)"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{OFFLINE} is set, so nobody was asked",
            f"name a folder, set {CACHE} to a cache that has it, or unset {OFFLINE}",
        )
    if any(_is_no_answer(cause) for cause in causes):
        return (
            f"the hub does not answer{_of_network(causes)}",
            f"check the name and the connection, name a folder, or set {CACHE} to a cache that has it and {OFFLINE}=1",
        )
    return first_line(error), "check the name and the connection, or name a folder"


def _of_network(causes: Sequence[BaseException]) -> str:
    """Return what the operating system says, where it is among the causes."""
    told = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.errno and cause.strerror]
    return f" ({told[-1]})" if told else ""


def _is_no_answer(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, what caused that, and so on."""
    found: BaseException | None = error
    for _ in range(_DEPTH):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
