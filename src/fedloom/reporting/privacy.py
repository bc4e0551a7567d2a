"""What a run cost in privacy, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DRAWS = {
    "seed": "a simulation: whoever knows the run's seed knows the noise",
    "system": "drawn by each site from its operating system",
}


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """Say what a round's record says of privacy: what the client has spent that spent most, and what it is worth."""
    spent, drawn = privacy.get("epsilon"), _DRAWS.get(str(privacy.get("draws")), "")
    cost = "an ε that no site told" if spent is None else f"ε = {spent:.3f}"
    return f"every {privacy.get('unit')} hidden with at most {cost} at δ = {privacy.get('delta'):g}; {drawn}"
