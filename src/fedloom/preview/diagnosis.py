"""What this machine has, and what of a recipe would and would not run on it, and why. Nothing is loaded or fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fedloom import embedded
from fedloom.config import Settings, files
from fedloom.data.tokenizer import load_tokenizer
from fedloom.errors import FedloomError
from fedloom.methods import table
from fedloom.models.base_folder import read_config, weight_files
from fedloom.models.load import Quantization
from fedloom.names import looks_like_hub_name
from fedloom.preview.description import describe
from fedloom.run_folder.manifest import versions
from fedloom.wording import written_bytes

_REQUIREMENT = re.compile(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]")
_DEVELOPERS = ("dev", "docs")
_ROW_CACHE = "datasets--"


class Verdict(StrEnum):
    """Whether something of a recipe would run here."""

    YES = "yes"
    UNKNOWN = "not known"
    NO = "no"


@dataclass(frozen=True)
class Finding:
    """One thing that a recipe needs, whether it is here, and why (not)."""

    need: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Machine:
    """What this machine has.

    Attributes:
        extras: by name, its packages that are missing.
        methods: the methods of installed packages, and those registered in this process.
        faults: a line for every installed method that cannot be used.
    """

    versions: Mapping[str, str]
    devices: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    num_cores: int
    extras: Mapping[str, tuple[str, ...]]
    methods: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """The machine, and the findings on a recipe, none without one."""

    machine: Machine
    recipe: str | None
    findings: tuple[Finding, ...]

    @property
    def would_run(self) -> bool:
        """Whether nothing is known to be in the way."""
        return all(finding.verdict is not Verdict.NO for finding in self.findings)

    @property
    def summary(self) -> str:
        """The findings in a few words."""
        if not self.would_run:
            return "would not run here"
        known = all(finding.verdict is Verdict.YES for finding in self.findings)
        return "would run here" if known else "no obstacle found, but not everything could be checked"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        machine = {
            **self.machine.__dict__,
            "versions": dict(self.machine.versions),
            "extras": dict(self.machine.extras),
        }
        findings = [{**finding.__dict__, "verdict": str(finding.verdict)} for finding in self.findings]
        return {"machine": machine, "recipe": self.recipe, "findings": findings, "would_run": self.would_run}

    def lines(self) -> list[str]:
        """Return everything for people."""
        machine = self.machine
        written = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if name != "platform")
        lines = [
            f"versions: {written}",
            f"platform: {machine.versions['platform']}",
            f"devices: {', '.join(machine.devices)}",
            f"memory: {written_bytes(machine.free_memory_bytes)} free of {written_bytes(machine.memory_bytes)}",
            f"cores: {machine.num_cores}, of which one computes the base unless engine.threads says otherwise",
        ]
        lines += [
            f"extra {name}: "
            + (f"missing {', '.join(missing)}; pip install 'fedloom[{name}]'" if missing else "installed")
            for name, missing in machine.extras.items()
        ]
        if machine.methods:
            lines.append(f"methods besides the shipped ones: {', '.join(machine.methods)}")
        lines += machine.faults
        if self.recipe is None:
            return lines
        lines += ["", f"{self.recipe}: {self.summary}"]
        return lines + [f"  {one.need}: {one.verdict}, {one.why}" for one in self.findings]


def diagnose(recipe: str | None = None, settings: Settings | None = None) -> Diagnosis:
    """Look at this machine, and at what a recipe would need of it."""
    machine = this_machine()
    return Diagnosis(machine, recipe, tuple(findings(settings, machine)) if settings is not None else ())


def this_machine() -> Machine:
    """Return what this machine has."""
    memory = psutil.virtual_memory()
    return Machine(
        versions=versions(),
        devices=tuple(_devices()),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        num_cores=os.cpu_count() or 1,
        extras=_extras(),
        methods=tuple(name for name in table.names() if name not in table.shipped()),
        faults=table.faults(),
    )


def findings(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Yield one finding per thing that a recipe needs."""
    base_at_hand = True
    for problem in files.problems(settings):
        base_at_hand = base_at_hand and problem.setting != "model.base"
        yield Finding(problem.setting, Verdict.NO, f"expected {problem.expected}, got {problem.got}; {problem.action}")
    if base_at_hand:
        base = _base(settings)
        yield base
        base_at_hand = base.verdict is Verdict.YES
    yield from _data(settings)
    yield _device(settings)
    yield from _needed_extras(settings, machine.extras)
    yield _memory(settings, machine) if base_at_hand else _memory_unknown()


def _devices() -> Iterator[str]:
    yield "cpu"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index} ({name}, {written_bytes(free)} free of {written_bytes(total)})"
    if torch.backends.mps.is_available():
        yield "mps"


def _extras() -> dict[str, tuple[str, ...]]:
    """Return the extras for users, with those of their packages that are not installed."""
    packages: dict[str, list[str]] = {}
    for requirement in metadata.requires("fedloom") or []:
        if match := _REQUIREMENT.fullmatch(requirement):
            packages.setdefault(match[2], []).append(match[1])
    return {
        extra: tuple(name for name in names if not _is_installed(name))
        for extra, names in sorted(packages.items())
        if extra not in _DEVELOPERS
    }


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _base(settings: Settings) -> Finding:
    name, need = settings.model.base, f"base {settings.model.base}"
    if name == embedded.NAME:
        return Finding(need, Verdict.YES, "it comes with the package")
    if Path(name).expanduser().is_dir():
        return _folder(settings, need)
    if _is_cached(name, settings.model.revision):
        return Finding(need, Verdict.YES, "in the hub's cache on this machine")
    return Finding(need, Verdict.UNKNOWN, "not on this machine; a run would fetch it from the hub")


def _folder(settings: Settings, need: str) -> Finding:
    """Read what a run would read of the folder before the weights: the configuration, their headers, the tokenizer."""
    folder, trusted = Path(settings.model.base).expanduser(), settings.model.trust_remote_code
    try:
        read_config(folder, trusted)
        weight_files(folder)
        load_tokenizer(settings.model.tokenizer or folder, trust_remote_code=trusted)
    except FedloomError as error:
        return Finding(need, Verdict.NO, str(error))
    return Finding(need, Verdict.YES, "a folder with its weights")


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def _data(settings: Settings) -> Iterator[Finding]:
    for path in filter(None, (settings.data.path, settings.data.eval_path)):
        if path == embedded.NAME:
            yield Finding(f"data {path}", Verdict.YES, "it comes with the package")
        elif Path(path).exists():
            yield Finding(f"data {path}", Verdict.YES, "on this machine")
        elif looks_like_hub_name(path) and (_hub_cache() / f"{_ROW_CACHE}{path.replace('/', '--')}").is_dir():
            yield Finding(f"data {path}", Verdict.YES, "in the hub's cache on this machine")
        elif looks_like_hub_name(path):
            yield Finding(f"data {path}", Verdict.UNKNOWN, "not on this machine; a run would fetch it from the hub")


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _device(settings: Settings) -> Finding:
    name = settings.model.device
    kinds = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        chosen = next(kind for kind in ("cuda", "mps", "cpu") if kinds[kind])
        return Finding("device auto", Verdict.YES, f"this would be {chosen}")
    kind, _, index = name.partition(":")
    if kinds.get(kind, 0) > int(index or 0):
        return Finding(f"device {name}", Verdict.YES, "present")
    here = ", ".join(kind for kind, count in kinds.items() if count)
    return Finding(f"device {name}", Verdict.NO, f"this machine has {here}; set model.device = auto")


def _needed_extras(settings: Settings, extras: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    quantization: Quantization = settings.model.quantization
    needed = {"quantized": f"model.quantization = {quantization}"} if quantization != "none" else {}
    needed |= {name: f"run.trackers = {name}" for name in settings.run.trackers}
    needed |= {"cluster": "engine.name = ray"} if settings.engine.name == "ray" else {}
    for extra, reason in needed.items():
        missing = extras.get(extra, ())
        verdict = Verdict.NO if missing else Verdict.YES
        why = f"missing {', '.join(missing)}: pip install 'fedloom[{extra}]'" if missing else "it is installed"
        yield Finding(f"extra {extra} ({reason})", verdict, why)


def _memory(settings: Settings, machine: Machine) -> Finding:
    try:
        needed = describe(settings).memory_bytes
    except FedloomError as error:
        return Finding("base and adapters", Verdict.NO, str(error))
    on_cuda = settings.model.device.startswith("cuda") or (
        settings.model.device == "auto" and torch.cuda.device_count() > 0
    )
    index = int(settings.model.device.partition(":")[2] or 0)
    free = torch.cuda.mem_get_info(index)[0] if on_cuda and index < torch.cuda.device_count() else None
    available = machine.free_memory_bytes if free is None else free
    place = "this machine" if free is None else f"cuda:{index}"
    why = f"{written_bytes(needed)} estimated, {written_bytes(available)} free on {place}"
    if needed <= available:
        return Finding("memory", Verdict.YES, why)
    return Finding("memory", Verdict.NO, f"{why}; lower training.token_budget, or model.quantization = 4bit on a GPU")


def _memory_unknown() -> Finding:
    return Finding(
        "memory", Verdict.UNKNOWN, "its estimate needs the base's configuration, which is not on this machine"
    )
