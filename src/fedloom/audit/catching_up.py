"""Clients that stay away and come back, in rounds of the real messages and without training."""

from __future__ import annotations

import torch

from fedloom.audit.subject import ROWS, SHAPES, Products, Scene, products, relative
from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import HeldSides
from fedloom.data.tokens import TokenSet
from fedloom.errors import BehindError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.server import ServerRules, broadcasts_for, next_state
from fedloom.lora.algebra import total
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Strategy
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

NUM_ROUNDS = 6
STEP = 1 / 9
_RULES = ServerRules(PlainStep())


def present_in(round: int, clients: range) -> list[int]:
    """Return who takes part: the first client always, the second in even rounds, the others in the first and last."""
    if round in (1, NUM_ROUNDS):
        return list(clients)
    return list(clients[: 2 - round % 2])


def distance_of_returned(strategy: Strategy, scene: Scene) -> float | str:
    """Return how far the model that a client has in a round is from the server's, relatively, at most.

    A client that keeps factors of its own is meant to differ: then why the law does not apply is returned.
    """
    if strategy.client.work(1).keeps:
        return "its clients keep factors of their own"
    ranks = {client: scene.rank_of(client) for client in scene.clients}
    clients = {
        k: Client(k, strategy.client, SHAPES, scene.seed, lambda: TokenSet.from_rows([]), HeldSides()) for k in ranks
    }
    state, off_by = strategy.initial(), 0.0
    for round in range(1, NUM_ROUNDS + 1):
        asked = broadcasts_for(state, present_in(round, scene.clients), strategy, ranks, dict.fromkeys(ranks, 1.0))
        try:
            tasks = {one.client: clients[one.client].receive(encode_broadcast(one, WireDtype.FP32)) for one in asked}
        except BehindError:
            return 1.0
        off_by = max(off_by, *(relative(_held(task), _server(strategy, state, k, scene)) for k, task in tasks.items()))
        trains = strategy.client.work(round).trains
        aggregate = strategy.aggregate(state, [_trained(task, scene.seed) for task in tasks.values()])
        held = {k: clients[k].memory.version for k in tasks}
        state = next_state(state, aggregate, _RULES, [1.0], held, trains)
    return off_by


def _trained(assignment: Assignment, seed: int) -> Update:
    """Return the update of a client whose training added noise to the factors that it trains."""
    task, draw = assignment.task, torch_stream(seed, "noise", assignment.round, assignment.task.client)
    moved = {
        key: tensor + STEP * torch.randn(tensor.shape, generator=draw)
        for key, tensor in task.start.as_tensors(assignment.work.trains).items()
    }
    stats = TrainingStats(ROWS[task.client], ROWS[task.client], ROWS[task.client], 1)
    return Update(assignment.round, task.client, task.start.with_factors(moved), stats)


def _held(assignment: Assignment) -> Products:
    return products(total([assignment.side, assignment.task.start]))


def _server(strategy: Strategy, state: ServerState, client: int, scene: Scene) -> Products:
    """Return the model that the server means a client to have."""
    start: Adapter | Draw = strategy.start_for(state, client)
    if isinstance(start, Draw):
        start = start.adapter(SHAPES, scene.rank_of(client), scene.seed)
    return products(total([state.side, start]))
