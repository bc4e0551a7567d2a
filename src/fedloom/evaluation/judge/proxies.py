"""The proxy that the environment sets between this machine and a judge's server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fedloom.errors import EndpointError
from fedloom.evaluation.judge.judge_key import is_this_machine


@dataclass(frozen=True)
class Proxy:
    """A proxy by its address, which may hold a password, and by what may be shown of it."""

    url: str = field(repr=False)
    name: str


def proxy_for(address: str) -> Proxy | None:
    """Return the proxy that calls to ``address`` go through: of the environment, else of the system.

    Calls to this machine go through none: a proxy elsewhere would read an unencrypted key, and could not reach it.

    Raises:
        EndpointError: the proxy is none that HTTP calls can go through.
    """
    parts = urlsplit(address)
    if is_this_machine(parts.hostname or "") or proxy_bypass(parts.netloc):
        return None
    found = getproxies()
    kind = parts.scheme if found.get(parts.scheme) else "all"
    if not (url := found.get(kind)):
        return None
    url = url if "://" in url else f"http://{url}"
    variable = next((name for name in (f"{kind}_proxy", f"{kind}_proxy".upper()) if os.environ.get(name)), "the system")
    try:
        proxy = urlsplit(url)
        port = f":{proxy.port}" if proxy.port else ""
    except ValueError:
        proxy, port = urlsplit(""), ""
    if proxy.scheme not in {"http", "https"} or not proxy.hostname:
        raise EndpointError(
            f"the proxy of {variable}: expected an address like http://proxy:3128, got another form; correct it, "
            f"or set NO_PROXY={parts.hostname}"
        )
    return Proxy(url, f"{proxy.scheme}://{proxy.hostname}{port} (of {variable})")
