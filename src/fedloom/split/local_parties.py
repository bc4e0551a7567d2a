"""A split run in one process over one resident base: a slot for every client of a period, one for the server."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.data.tokens import TokenSet
from fedloom.errors import CutError
from fedloom.federation.server import ServerRules
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.cut import cut, verify_cut
from fedloom.split.client_halves import LocalSplitClients
from fedloom.split.parties import MakeStrategy, SplitParties
from fedloom.split.party import MakeOptimiser, adamw
from fedloom.split.plan import SplitPlan, segments, server_shapes
from fedloom.split.server_half import SplitServer
from fedloom.training.verified_head import output_head


def local_parties(
    lora: LoRAModel,
    plan: SplitPlan,
    rows: Sequence[TokenSet],
    make_strategy: MakeStrategy,
    rules: ServerRules,
    make_optimiser: MakeOptimiser = adamw,
) -> SplitParties:
    """Verify the cuts against the uncut model and set up all parties over ``lora``, whose slots periods open anew.

    Raises:
        CutError: if the model cannot be cut there, or the plan counts other clients than there are rows for.
        SettingsError: if the plan cannot be followed.
    """
    model = lora.model
    plan.check(model, lora.shapes)
    if tuple(len(own) for own in rows) != plan.num_rows:
        raise CutError(f"split: expected clients with {list(plan.num_rows)} rows, got {[len(own) for own in rows]}")
    lora.close()
    for cut_layer in sorted(set(plan.cut_layers)):
        verify_cut(model, cut(model, cut_layer))
    lora.route_all(None)
    head = output_head(model)
    parts = segments(plan, model, lora.shapes)

    def open_slots(cohort: Sequence[int]) -> None:
        clients = [] if plan.is_frozen else [Slot(plan.ranks[client], plan.scales[client]) for client in cohort]
        lora.open([*clients, Slot(plan.server_rank, plan.server_scale)])

    return SplitParties(
        plan=plan,
        segments=parts,
        server_shapes=server_shapes(plan, model, lora.shapes),
        server=SplitServer(lora, head, plan, make_optimiser),
        clients=LocalSplitClients(lora, head, plan, parts, rows, make_optimiser),
        make_strategy=make_strategy,
        rules=rules,
        open_slots=open_slots,
    )
