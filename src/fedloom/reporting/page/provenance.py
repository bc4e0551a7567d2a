"""What went in: settings, seeds, hashes, versions, paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.reporting.page.parts import table
from fedloom.reporting.run_groups import RunGroup
from fedloom.reporting.svg import element
from fedloom.run_folder.durable import encode_json
from fedloom.run_folder.manifest import flatten
from fedloom.run_folder.reader import StoredRun


def settings(groups: Sequence[RunGroup]) -> str:
    """Return the settings that differ between groups, and folded away those they share."""
    flat = {group.label: flatten(group.first.config) for group in groups}
    names = list({name: None for one in flat.values() for name in one})
    differing = [name for name in names if len({_text(one, name) for one in flat.values()}) > 1]
    shared = [name for name in names if name not in differing]
    common = table(["setting", "value"], [[name, _text(next(iter(flat.values())), name)] for name in shared])
    folded = element("details", element("summary", text=f"Settings ({len(shared)})"), common)
    if not differing:
        return folded
    rows = [[name, *(_text(one, name) for one in flat.values())] for name in differing]
    return table(["setting", *flat], rows, "Settings that differ") + folded


def origins(groups: Sequence[RunGroup]) -> str:
    """Return seeds, hashes and versions: once where all runs share them, by run where they differ."""
    runs = [(group.label, run) for group in groups for run in group.runs]
    known = [flatten(run.manifest["identity"]) for _, run in runs]
    names = list({name: None for one in known for name in one})
    differing = [name for name in names if len({_text(one, name) for one in known}) > 1]
    shared = [[name, _text(known[0], name)] for name in names if name not in differing]
    by_run = [
        [label, run.path.name, *(_text(one, name) for name in differing)]
        for (label, run), one in zip(runs, known, strict=True)
    ]
    everywhere = table(["all runs", ""], shared, "Seeds and hashes") if shared else ""
    return everywhere + table(["method", "folder", *differing], by_run) + _versions([run for _, run in runs])


def _versions(runs: Sequence[StoredRun]) -> str:
    versions = {run.path.name: run.manifest["sessions"][-1]["versions"] for run in runs}
    packages = list({name: None for one in versions.values() for name in one})
    rows = [[package, *(one.get(package, "–") for one in versions.values())] for package in packages]
    if len({encode_json(one) for one in versions.values()}) == 1:
        body = table(["package", "version"], [row[:2] for row in rows])
    else:
        body = table(["package", *versions], rows)
    return element("details", element("summary", text="Versions"), body)


def _text(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name, "–")
    return value if isinstance(value, str) else encode_json(value)
