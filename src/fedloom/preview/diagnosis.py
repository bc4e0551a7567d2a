"""What this machine has, and what of a recipe would and would not run on it, and why.

No weights are loaded, nothing is fetched or written; the rows are read and made into tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fedloom.assembly.free_memory import free_here
from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings, files
from fedloom.errors import FedloomError
from fedloom.methods import table
from fedloom.models.stored_quantization import stored_method
from fedloom.preview.description import describe
from fedloom.preview.rehearsal import Finding, SketchWorkshop, Verdict, rehearse
from fedloom.run_folder.manifest import versions
from fedloom.wording import Displayed, written_bytes

_REQUIREMENT = re.compile(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]")
_DEVELOPERS = ("dev", "docs")
_NOWHERE: Mapping[str, str] = {}


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
class Diagnosis(Displayed):
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


def diagnose(
    recipe: str | None = None,
    settings: Settings | None = None,
    *,
    origins: Mapping[str, str] = _NOWHERE,
    out: Path | None = None,
    fresh: bool = False,
    workshop: Workshop | None = None,
) -> Diagnosis:
    """Look at this machine, and at what would be in the way of a run of a recipe into ``out``.

    ``origins`` say where each setting was read. ``workshop`` opens the base, by default without its weights.
    """
    machine = this_machine()
    if settings is None:
        return Diagnosis(machine, recipe, ())
    folder = out or Path("runs") / Path(recipe or "run").stem
    prepared = Preparation(settings, folder, workshop or SketchWorkshop(), fresh)
    return Diagnosis(machine, recipe, tuple(findings(prepared, machine, origins)))


def this_machine() -> Machine:
    """Return what this machine has."""
    return Machine(
        versions=versions(),
        devices=tuple(_devices()),
        memory_bytes=psutil.virtual_memory().total,
        free_memory_bytes=free_here(),
        num_cores=os.cpu_count() or 1,
        extras=_extras(),
        methods=tuple(name for name in table.names() if name not in table.shipped()),
        faults=table.faults(),
    )


def findings(prepared: Preparation, machine: Machine, origins: Mapping[str, str] = _NOWHERE) -> Iterator[Finding]:
    """Yield one finding per thing that a recipe needs, those in the way in the words of a run."""
    absent, at_hand = set[str](), False
    for problem in files.problems(prepared.settings):
        absent.add(problem.setting)
        yield Finding(problem.setting, Verdict.NO, problem.line(origins))
    for finding in rehearse(prepared, frozenset(absent)):
        yield finding
        if finding.need == f"base {prepared.settings.model.base}":
            at_hand = finding.verdict is Verdict.YES
    yield _memory(prepared.settings, machine) if at_hand else _memory_unknown()


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
    stored = stored_method(files.base_config(settings.model.base) or {})
    smaller = ", or model.quantization = 4bit on a GPU" if settings.model.quantization == "none" and not stored else ""
    kept = ", or set training.checkpoint_activations" if settings.traits.runs_rounds else ""
    return Finding("memory", Verdict.NO, f"{why}; lower training.token_budget{kept}{smaller}")


def _memory_unknown() -> Finding:
    return Finding(
        "memory", Verdict.UNKNOWN, "its estimate needs the base's configuration, which is not on this machine"
    )
