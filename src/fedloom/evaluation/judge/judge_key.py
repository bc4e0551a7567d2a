"""The key of a judge's server: read from the environment at each call, sent to its server alone, written nowhere."""

from __future__ import annotations

import ipaddress
import os

from fedloom.errors import EndpointError
from fedloom.wording import printable

OWN_VARIABLE, OPENAI_VARIABLE = "FEDLOOM_JUDGE_KEY", "OPENAI_API_KEY"
_SHORTEST_SECRET = 6  # "EMPTY" and "none", which stand for no key, are not taken out of replies


def key_variable(host: str) -> str | None:
    """Return the name of the variable whose key is for ``host``, if one is set.

    OpenAI's key goes to OpenAI and to servers on this machine only: another host would learn it.
    """
    if os.environ.get(OWN_VARIABLE):
        return OWN_VARIABLE
    is_for_openai = host == "openai.com" or host.endswith(".openai.com") or is_this_machine(host)
    return OPENAI_VARIABLE if is_for_openai and os.environ.get(OPENAI_VARIABLE) else None


def authorization(host: str) -> dict[str, str]:
    """Return the header that carries the key for ``host``, or none.

    Raises:
        EndpointError: the key holds a character that a header cannot; the key itself is not shown.
    """
    if (variable := key_variable(host)) is None:
        return {}
    key = os.environ[variable]
    if not all("!" <= character <= "~" for character in key):
        raise EndpointError(
            f"{variable}: expected a key of visible ASCII characters, got one with a space, a line end or another "
            "character: set it again"
        )
    return {"Authorization": f"Bearer {key}"}


def is_this_machine(host: str) -> bool:
    """Tell whether ``host`` is the loopback address or its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_keys(text: str) -> str:
    """Return text without any key: some servers repeat it in their answers."""
    for variable in (OWN_VARIABLE, OPENAI_VARIABLE):
        key = os.environ.get(variable, "").strip()
        if len(key) >= _SHORTEST_SECRET:
            text = text.replace(key, "…")
    return text


def shown(text: str, num_characters: int) -> str:
    """Return the start of a server's text as one line that is fit to print, without any key."""
    line = " ".join(without_keys(text).split())
    return printable(line if len(line) <= num_characters else f"{line[:num_characters]}…")
