"""Explain a run: what each module's adapter is made of, what each round did to it, and whether clients agreed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom import config
from fedloom.assembly.round_plan import strategy_of
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names
from fedloom.errors import RunError
from fedloom.explanation.facts import (
    ModuleFacts,
    RoundFacts,
    ScaleFacts,
    changes_between,
    history_of,
    round_facts,
    shapes_of,
)
from fedloom.explanation.kept import KeptState, state_after, uploads_of
from fedloom.explanation.moments import Moments, adamw_moments, shared_moments
from fedloom.explanation.pairs import Pairs, cosines_of, pairs_of
from fedloom.lora.pair import Adapter
from fedloom.methods.strategy import Cohort
from fedloom.results.opened_result import unfinished_note
from fedloom.run_folder.reader import StoredRun, read_run
from fedloom.wording import Displayed

UPDATES, STATES = "run.keep_updates = true", 'run.keep_states = "all"'
MAX_COMPARED = 32
"""Clients of which every two are compared; of more the first are."""


@dataclass(frozen=True)
class Explanation(Displayed):
    """What is known of a run.

    Attributes:
        round: the round whose modules are shown.
        rounds, history: every round's line, and every module's figures in those rounds.
        num_clients, chance: clients whose work counted, and what of it would be left if they had nothing in common.
        compared: what the agreement of clients is that of; empty where clients are not compared.
        missing: what is not known, and the setting that would keep it.
        moments: whose optimiser's moments are shown, in words; empty where none are.
    """

    path: Path
    method: str
    nominal_rank: int
    round: int
    num_rounds: int
    modules: tuple[ModuleFacts, ...]
    rounds: tuple[RoundFacts, ...]
    history: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    scales: tuple[ScaleFacts, ...]
    num_clients: int
    chance: float | None
    compared: str
    moments: str
    pairs: Pairs | None
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, the reading in words among them."""
        from fedloom.explanation.reading import reading

        return asdict(self) | {"path": str(self.path), "reading": reading(self)}

    def lines(self) -> list[str]:
        """Return tables and reading for people."""
        from fedloom.explanation.tables import lines

        return lines(self)


def explain(path: Path | str, *, round: int | None = None, module: str | None = None) -> Explanation:
    """Explain round ``round`` of the run in ``path``, by default the last one, and the way there.

    ``module`` chooses modules: a name, its last parts (``q_proj``), or a pattern (``*.0.*``). Nothing is changed, no
    base is loaded, no dense matrix is formed where factors are smaller.

    Raises:
        RunError: it is not a run, has no such round or module, is damaged, or nothing was trained.
    """
    run = read_run(Path(path))
    settings, names = config.load(run.path / "config.json", also=()), [one.name for one in run.holdings]
    settings = resolve_names(settings, names) if names else settings
    if not settings.traits.is_trained:
        raise RunError(f"{run.path}: expected a run that trains adapters, got method {run.method}; name another run")
    if not run.records:
        raise RunError(f"{unfinished_note(run)}; there is no round to explain yet")
    n = len(run.records) if round is None else round
    if not 1 <= n <= len(run.records):
        raise RunError(f"{run.path}: expected a round from 1 to {len(run.records)}, got {n}; change --round")
    return Explainer(run, settings, n, module).explanation()


class Explainer:
    """One run, its settings, and what is asked of it."""

    def __init__(self, run: StoredRun, settings: Settings, n: int, module: str | None) -> None:
        self.run, self.settings, self.n, self.module = run, settings, n, module
        self._state = lru_cache(maxsize=2)(lambda n: state_after(run, n, settings.traits) if n else None)

    def explanation(self) -> Explanation:
        """Return everything that is known."""
        record, every = self.run.records[self.n - 1], {n: self._modules(n) for n in self._numbers}
        modules = every[self.n]
        rounds = tuple(round_facts(self.run.records[n - 1], every[n], is_whole=self.module is None) for n in every)
        pairs, missing = self._pairs()
        used = [one["weight"] for one in record["clients"] if not one.get("reason") and one.get("weight")]
        return Explanation(
            path=self.run.path,
            method=self.run.method,
            nominal_rank=max(self.settings.client_ranks),
            round=self.n,
            num_rounds=self.settings.federation.num_rounds,
            modules=modules,
            rounds=rounds,
            history=history_of([every[n] for n in every]),
            scales=self._scales(record),
            num_clients=len(used),
            chance=sum((weight / sum(used)) ** 2 for weight in used) if used else None,
            compared=self._compared,
            moments=self._whose_moments if any(one.moments for one in modules) else "",
            pairs=pairs,
            notes=self._notes(record),
            missing=(*self._missing_states(modules, rounds), *missing),
        )

    @property
    def _numbers(self) -> range:
        return range(1, len(self.run.records) + 1)

    def _modules(self, n: int) -> tuple[ModuleFacts, ...]:
        record, state = self.run.records[n - 1], self._state(n)
        figures = {one["module"]: one for one in record.get("modules") or ()}
        shapes = {} if state is None else shapes_of(tuple(state.own.values()) or (state.shared,), state.going_on)
        changes = {} if figures else self._changes(n)
        cosines, moments = self._own_cosines(state), self._moments(n)
        return tuple(
            ModuleFacts(
                module=name,
                out_in=shapes[name][0] if name in shapes else None,
                shape=shapes[name][1] if name in shapes else None,
                change_norm=figures.get(name, {}).get("change_norm", changes.get(name)),
                aggregation_noise=figures.get(name, {}).get("aggregation_noise"),
                agreement=figures.get(name, {}).get("agreement"),
                cosine=figures.get(name, {}).get("cosine", cosines.get(name)),
                client_norm=figures.get(name, {}).get("client_norm"),
                moments=moments.get(name, {}),
            )
            for name in self._chosen([*(shapes or figures or record.get("rank") or {})])
        )

    def _chosen(self, names: Sequence[str]) -> Sequence[str]:
        """Return the modules asked for.

        Raises:
            RunError: there is none of that name.
        """
        asked = self.module
        if asked is None or not names:
            return names
        found = [name for name in names if name == asked or fnmatchcase(name, asked) or name.endswith(f".{asked}")]
        if not found:
            raise RunError(
                f"{self.run.path}: expected a module of this run, such as {names[0]}, got {asked!r}; change --module"
            )
        return found

    def _changes(self, n: int) -> dict[str, float]:
        """Return what a round changed, from two states: of runs whose records do not say it."""
        state, before = self._state(n), self._state(n - 1)
        if state is None or state.own or not (n == 1 or before is not None):
            return {}
        return changes_between(state.shared, before.shared if before is not None else Adapter())

    def _own_cosines(self, state: KeptState | None) -> dict[str, float | None]:
        """Return by module the mean cosine of two clients' own adapters, where clients have nothing else in common."""
        if state is None or not state.own or not self.settings.traits.is_control:
            return {}
        own = dict(list(state.own.items())[:MAX_COMPARED])
        by_module = [{name: Adapter({name: pair}) for name, pair in adapter.items()} for adapter in own.values()]
        return cosines_of(tuple(own), by_module).mean_of_module

    # ---- moments ----

    def _moments(self, n: int) -> Moments:
        training, scales = self.settings.training, self.settings.client_scales
        state, betas = self._state(n), (training.beta1, training.beta2)
        if state is None:
            return {}
        if self.settings.server.step != "adamw" and training.moments != "shared":
            pooled = self.settings.traits.pools_rows
            own = [(held, scales[0 if pooled else client]) for client, held in state.client_moments.items()]
            return adamw_moments(own, betas)
        if state.server is None or state.server.start is None:
            return {}
        scale = scales[self.settings.client_ranks.index(max(self.settings.client_ranks))]
        if self.settings.server.step == "adamw":
            return adamw_moments([(state.server.optimiser, scale)], betas)
        before = self._state(n - 1)
        steps = [one["num_steps"] for one in self.run.records[n - 1]["clients"] if not one.get("reason")]
        return shared_moments(
            state.server.optimiser,
            state.server.start,
            None if before is None or before.server is None else before.server.start,
            learning_rate=training.learning_rate,
            steps=fmean(steps) if steps else 0.0,
            scale=scale,
        )

    @property
    def _whose_moments(self) -> str:
        if self.settings.server.step == "adamw":
            return "the server's AdamW"
        return "shared by the clients" if self.settings.training.moments == "shared" else "of the clients' own AdamW"

    # ---- clients ----

    @property
    def _compared(self) -> str:
        traits = self.settings.traits
        if traits.is_cut or traits.pools_rows:
            return ""
        if traits.is_control:
            return "the clients' own adapters"
        if self.settings.server.step == "adamw":
            return "gradients of the factors"
        return "changes of the shared factor" if traits.is_personal else "changes of the product"

    def _scales(self, record: Mapping[str, Any]) -> tuple[ScaleFacts, ...]:
        ranks, scales = self.settings.client_ranks, self.settings.client_scales
        groups: dict[tuple[int, float], list[float | None]] = {}
        for one in record["clients"]:
            if not one.get("reason"):
                client = 0 if self.settings.traits.pools_rows else one["client"]
                groups.setdefault((ranks[client], scales[client]), []).append(one.get("norm"))
        power = 1.0 if self.settings.method.scaling == "alpha/r" else 0.5
        return tuple(
            ScaleFacts(rank, scale * rank**power, scale, len(norms), fmean(known) if known else None)
            for (rank, scale), norms in sorted(groups.items(), reverse=True)
            for known in [[norm for norm in norms if norm is not None]]
        )

    def _pairs(self) -> tuple[Pairs | None, tuple[str, ...]]:
        """Return which clients agreed in the round, or what is missing to tell."""
        traits, n = self.settings.traits, self.n
        if not traits.aggregates:
            return None, ()
        uploads = uploads_of(self.run.round_files(n))
        if not uploads:
            return None, (f"which clients agree with which; set {UPDATES}",)
        ranks = dict(enumerate(self.settings.client_ranks))
        shapes = next(iter(uploads.values())).shapes
        strategy = strategy_of(self.settings, Cohort(shapes, max(ranks.values()), ranks.__getitem__, self.run.seed))
        before = strategy.initial() if n == 1 else getattr(self._state(n - 1), "server", None)
        if before is None:
            return None, (f"what clients began round {n} with, so which of them agree; set {STATES}",)
        names = self._chosen(list(shapes))
        sent = {client: Adapter({n: own[n] for n in names}) for client, own in list(uploads.items())[:MAX_COMPARED]}
        return pairs_of(sent, before, strategy, ranks), ()

    # ---- what is not known ----

    def _notes(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        traits = self.settings.traits
        notes = [] if self.run.finished is not None else [unfinished_note(self.run)]
        if traits.is_cut:
            notes.append("clients of a cut model meet at every step: their agreement in a round is not measured")
        elif traits.aggregates and not record.get("modules"):
            notes.append(
                "agreement and noise by module are not in the records of this run: an earlier version wrote it"
            )
        return tuple(notes)

    def _missing_states(self, modules: Sequence[ModuleFacts], rounds: Sequence[RoundFacts]) -> tuple[str, ...]:
        if any(one.shape is None for one in modules):
            return (f"the state after round {self.n}, so ranks, spectrum and moments; set {STATES}",)
        if any(one.effective_rank is None for one in rounds):
            return (f"the states after earlier rounds, so their ranks; set {STATES}",)
        return ()
