"""What a run cost in privacy, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DRAWS = {
    "seed": "a simulation: whoever knows the run's seed knows the noise",
    "system": "drawn by each site from its operating system",
}
_SERVERS = "drawn by the server from its operating system"


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """Say what a round's record says of privacy: what the client has spent that spent most, and what it is worth."""
    spent, unit, drawn = privacy.get("epsilon"), privacy.get("unit"), str(privacy.get("draws"))
    by_server = unit == "client" and privacy.get("noise") != "clients"
    where = _SERVERS if by_server and drawn == "system" else _DRAWS.get(drawn, "")
    counted = ", counted without amplification by sampling" if privacy.get("amplified") is False else ""
    cost = "an ε that no site told" if spent is None else f"ε = {spent:.3f}"
    column = privacy.get("unit_column")
    hidden = f"every {unit} hidden" if column is None else f"every {column} hidden with all its rows at a client,"
    return f"{hidden} with at most {cost} at δ = {privacy.get('delta'):g}{counted}; {where}"
