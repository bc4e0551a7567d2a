"""Control variates are SCAFFOLD's where the optimiser is SGD, and in a run they correct what a client trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.seeding import torch_stream
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.control_variates import carried, corrected_steps, correction_of, mean_after

SCALE, CLIENTS, STEPS, RATES = 2.0, 4, 3, [0.05, 0.1, 0.05]


def quadratics() -> list[tuple[Tensor, Tensor]]:
    """Return (curvature, optimum) of every client's loss; their optima lie far apart."""
    found = []
    for client in range(CLIENTS):
        draw = torch_stream(4, client)
        root = torch.randn(6, 6, generator=draw, dtype=torch.float64)
        found.append((root @ root.T / 6, 3.0 * torch.randn(6, generator=draw, dtype=torch.float64)))
    return found


def textbook(drawn: list[list[int]]) -> Tensor:
    """SCAFFOLD, algorithm 1, option II, with a server step of one; c in units of gradients."""
    losses, x = quadratics(), torch.zeros(6, dtype=torch.float64)
    c, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(CLIENTS)]
    for clients in drawn:
        ended, changes = [], []
        for k in clients:
            (curvature, optimum), y = losses[k], x.clone()
            for rate in RATES:
                y = y - rate * (curvature @ (y - optimum) - own[k] + c)
            new = own[k] - c + (x - y) / sum(RATES)
            ended.append(y)
            changes.append(new - own[k])
            own[k] = new
        x = x + torch.stack([y - x for y in ended]).mean(0)
        c = c + len(clients) / CLIENTS * torch.stack(changes).mean(0)
    return x


def ours(drawn: list[list[int]], corrects: bool = True) -> Tensor:
    """The same on one raw ``bt`` of one slot, whose effective factor is its transpose times the scale."""
    losses, x = quadratics(), torch.zeros(6, dtype=torch.float64)
    mean: dict[str, Tensor] = {}
    own: list[dict[str, Tensor]] = [{} for _ in range(CLIENTS)]
    for clients in drawn:
        ended = []
        for k in clients:
            (curvature, optimum), factor = losses[k], nn.Parameter(x[None] / SCALE)
            correction = correction_of(mean, own[k]) if corrects else {}
            correct = corrected_steps(correction, {"m.bt_RO": factor}, SCALE, RATES)
            for rate in RATES:
                slope = curvature @ (factor.detach()[0] * SCALE - optimum)
                with torch.no_grad():
                    factor.sub_(rate * slope[None] / SCALE)
                correct(rate)
            start, end = x[:, None], factor.detach().T * SCALE
            own[k] = carried({"m.b": start}, {"m.b": end}, correction)
            ended.append(end[:, 0])
        moved = {"m.b": (x - torch.stack(ended).mean(0))[:, None]}
        x, mean = torch.stack(ended).mean(0), mean_after(mean, moved, len(clients) / CLIENTS)
    return x


DRAWN = [[0, 1, 2, 3], [0, 2], [1, 3], [3], [0, 1, 2]]


def test_with_sgd_they_are_scaffolds() -> None:
    torch.testing.assert_close(ours(DRAWN), textbook(DRAWN), rtol=1e-12, atol=1e-12)


def test_they_take_clients_that_differ_to_the_optimum_of_all_and_a_plain_mean_does_not() -> None:
    losses = quadratics()
    best = torch.linalg.solve(sum(h for h, _ in losses), sum(h @ t for h, t in losses))  # type: ignore[call-overload]
    rounds = [list(range(CLIENTS))] * 1500
    assert float((ours(rounds) - best).norm()) < 1e-6
    assert float((ours(rounds, corrects=False) - best).norm()) > 1e-2


def test_in_a_round_the_whole_correction_is_taken_beside_the_steps(
    llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    """The first step is corrected by its share; a correction on A alone leaves B's first step as it is."""
    start = fresh_adapter(llama_lora.shapes, 2, 0, 1).to(torch.float64)
    task = ClientTask(1, rows_of_lengths([5, 9, 7], 1), 2, 2.0, start)
    settings = LocalTraining(learning_rate=1e-2, batch_size=3, steps=2, schedule="linear")
    correction = {key: torch.full_like(t, 0.3) for key, t in start.as_tensors(frozenset("a")).items()}
    once = replace(settings, steps=1)
    plain, corrected = (
        train_cohort(llama_lora, [replace(task, correction=one)], once, seed=1, round=1)[0].adapter
        for one in ({}, correction)
    )
    for name, pair in plain.items():
        torch.testing.assert_close(corrected[name].a_RI, pair.a_RI - 0.3)
        torch.testing.assert_close(corrected[name].b_OR, pair.b_OR)
    whole = train_cohort(llama_lora, [replace(task, correction=correction)], settings, seed=1, round=1)[0].adapter
    alone = train_cohort(llama_lora, [task], settings, seed=1, round=1)[0].adapter
    for name, pair in alone.items():
        assert torch.dist(whole[name].a_RI, pair.a_RI - 0.3) < 0.2 * torch.dist(whole[name].a_RI, pair.a_RI)
