"""How good a state is: loss and scores of the global model, or the mean over every client's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.config.conduct import SuiteName
from fedloom.data.groups import Grouping
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.evaluation.intervals import Estimate
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Standing
from fedloom.results.suite_runs import run_suite
from fedloom.results.suites import PER_GROUP, SuiteChoice, SuiteScores
from fedloom.training.row_losses import RowLosses, row_losses_of

Score = Callable[[Adapter, TokenSet, int], RowLosses]  # adapter, rows, tokens of a pass
OnScored = Callable[[str, int, int, float], None]  # what, done, total, seconds left


def held_out_loss(
    score: Score, adapter: Adapter, rows: TokenSet, token_budget: int, grouping: Grouping | None = None
) -> dict[str, Any]:
    """Return the mean loss in nats per supervised token, its perplexity, the counts, and the loss of every group."""
    losses = score(adapter, rows, token_budget)
    groups = {} if grouping is None else {name: losses.select(rows).mean_nats for name, rows in grouping.members()}
    return {
        "loss_nats": losses.mean_nats,
        "perplexity": math.exp(min(losses.mean_nats, 700.0)),
        "num_loss_tokens": int(losses.num_loss_tokens.sum()),
        "num_rows": len(rows),
        **({"loss_nats_of_group": groups} if groups else {}),
    }


def score_here(lora: LoRAModel, cores: int | None = None) -> Score:
    """Return what scores rows with a base of this process, on so many cores or on those that it has."""
    return lambda adapter, rows, budget: row_losses_of(lora, adapter, rows, token_budget=budget, cores=cores)


def evaluate_state(
    score: Score, state: Standing, rows: TokenSet | None, token_budget: int, grouping: Grouping | None = None
) -> dict[str, Any]:
    """Score a state; where every client has its own model, each of them, and report their mean and spread."""
    if rows is None:
        return {}
    if not state.own:
        return held_out_loss(score, state.shared, rows, token_budget, grouping)
    own = sorted(state.own.items())
    return _mean_of({client: held_out_loss(score, each, rows, token_budget, grouping) for client, each in own})


def _mean_of(scores: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    losses = [score["loss_nats"] for score in scores.values()]
    first = next(iter(scores.values()))
    if len(losses) == 1:
        return dict(first)
    return {
        "loss_nats": statistics.fmean(losses),
        "perplexity": math.exp(min(statistics.fmean(losses), 700.0)),
        "num_loss_tokens": first["num_loss_tokens"],
        "num_rows": first["num_rows"],
        "loss_nats_of_client": {str(client): score["loss_nats"] for client, score in scores.items()},
        "loss_nats_sd": statistics.stdev(losses),
        **_means(scores.values(), "loss_nats_of_group"),
    }


def _means(scores: Collection[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return ``{key: the mean of every entry of that mapping}``, nothing where the scores have none."""
    found = [score[key] for score in scores if key in score]
    return {key: {name: statistics.fmean(one[name] for one in found) for name in found[0]}} if found else {}


def score_state(
    lora: LoRAModel,
    tokenizer: Any,
    state: Standing,
    suites: Sequence[SuiteName],
    choice: SuiteChoice,
    rows: Rows | None,
    folder: Path,
    on_scored: OnScored | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a state by every suite; what is decoded is kept in ``folder``, one file a suite, round and client.

    ``on_scored`` receives what is scored, items done, items in all and the seconds left.
    """
    scores: dict[str, dict[str, Any]] = {}
    owners: list[tuple[int | None, Adapter]] = [(None, state.shared)]
    if state.own:
        is_one = len(state.own) == 1
        owners = [(None if is_one else client, own) for client, own in sorted(state.own.items())]
    for suite in suites:
        found = []
        for client, adapter in owners:
            lora.set_side(adapter or None)
            lora.route_all(None)
            what = suite if client is None else f"{suite} of client {client}"
            told = None if on_scored is None else partial(on_scored, what)
            outputs = outputs_stem(folder, suite, state.round, client)
            found.append(run_suite(suite, lora, tokenizer, choice, rows=rows, outputs=outputs, on_progress=told))
        scores[suite] = _mean_scores(found)
    return scores


def outputs_stem(folder: Path, suite: SuiteName, round: int, client: int | None = None) -> Path:
    """Return where outputs of a round, or of one client's own model after it, are kept; the end of the name is open."""
    return folder / (f"{suite}-round{round}" + ("" if client is None else f"-client{client}"))


def _mean_scores(found: Sequence[SuiteScores]) -> dict[str, Any]:
    """Return one model's figures, or their mean over several without an interval."""
    if len(found) == 1:
        return found[0].as_dict()
    return {
        "suite": found[0].suite,
        "metrics": _mean_values([one.estimates for one in found]),
        "num_models": len(found),
        **({PER_GROUP: _mean_values([one.groups for one in found])} if found[0].groups else {}),
    }


def _mean_values(found: Sequence[Mapping[str, Estimate]]) -> dict[str, dict[str, float]]:
    return {name: {"value": statistics.fmean(one[name].value for one in found)} for name in found[0]}
