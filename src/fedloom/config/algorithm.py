"""The tables that say how to learn: method, server step, federation, local training, the cut.

Lists with one entry per client follow the client's number.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fedloom.config.setting import (
    Count,
    CountPerClient,
    Decay,
    Fraction,
    Natural,
    NonNegative,
    OpenHalf,
    PathOrName,
    Positive,
    PositivePerClient,
    Table,
    having,
    setting,
)
from fedloom.methods.table import BASELINE
from fedloom.methods.traits import DEFAULT_WEIGHTING

TRAINED = {"method.name": having("is_trained")}
ROUNDS = {"method.name": having("runs_rounds")}
SENT = {"method.name": having("sends_adapters")}
STEPPED = {"method.name": having("takes_server_steps")}
SMOOTHED = ("fedadam", "fedyogi")
AVERAGED = {"method.name": having("aggregates")}
COMPARED = {"method.name": having("sends_products")}
CUT = {"method.name": having("is_cut")}


LOCAL_STEPS = ("plain", "momentum", "fedexp", "fedadam", "fedyogi", "fedadagrad")
"""Server steps with which clients take steps of their own."""


class Method(Table):
    """What the server does with the clients' adapters, and the adapters' size."""

    name: Annotated[str, having()] = setting(BASELINE, "The method; a control is a method too.")
    ranks: CountPerClient = setting(
        8,
        "Rank of the adapters: one for all, or one per client, as a list or by name: `{north = 16, south = 8}`.",
        when=TRAINED,
    )
    alpha: PositivePerClient | None = setting(
        None, "LoRA's alpha: one for all, or one per client; default: twice the rank.", when=TRAINED
    )
    scaling: Literal["alpha/r", "rslora"] = setting(
        "alpha/r", "Factor on B·A: alpha/r, or alpha/√r (rsLoRA).", when=TRAINED
    )
    weighting: Literal["rows", "tokens", "uniform", "work", "norm"] = setting(
        DEFAULT_WEIGHTING,
        "Weight of a client in the mean: its rows (FedAvg), its supervised tokens, the same for all, `work`, the rows "
        "that it is asked to train on in the round (with epochs the same as `rows`), or `norm`, HetLoRA's, for methods "
        "that know it.",
        when=SENT,
    )
    initialisation: Literal["independent", "shared", "gradient"] = setting(
        "independent",
        "Where A comes from. `independent`: a random draw, the same for all clients; with FLoRA each client of a "
        "round draws its own. `shared`, for FLoRA: all clients of a round draw the same. `gradient`, for the others: "
        "before the first round clients sketch the gradient of four rows at the base, and its largest directions are "
        "the first A; that is one round more.",
        when=AVERAGED,
    )
    broadcast: Literal["stack", "compressed"] = setting(
        "stack",
        "What the server sends after a round: the stack, or its recompression.",
        when={"method.name": having("grows_side")},
    )
    tolerance: Decay = setting(
        0.0,
        "Fraction of the energy the recompression may drop; 0: lossless.",
        when={"method.broadcast": ("compressed",)},
    )

    broadcast_max_bytes: Count | Fraction | None = setting(
        None,
        "Most bytes of a recompressed addition: a number, or a fraction (with a decimal point) of an adapter of the "
        "largest rank in the wire's type; what is left out is sent later. Default: no limit.",
        when={"method.broadcast": ("compressed",)},
    )


class Server(Table):
    """The step the server takes along the aggregated product."""

    step: Literal["plain", "momentum", "fedexp", "fedadam", "fedyogi", "fedadagrad", "adamw"] = setting(
        "plain",
        "Kind of server step. `adamw`: clients send the gradient of one batch, and the server takes the step of "
        "`[training]`'s AdamW on the factors.",
        when=STEPPED,
    )
    learning_rate: Positive = setting(
        1.0, "Factor on the aggregate: the sum of the clients' weights, FLoRA's scaling factor.", when=STEPPED
    )
    momentum: Decay = setting(0.5, "Share of the last step kept.", when={"server.step": ("momentum",)})
    fedexp_cap: Positive = setting(1.5, "Largest factor FedExP may choose.", when={"server.step": ("fedexp",)})
    beta1: Decay = setting(0.9, "Share of the mean change kept.", when={"server.step": SMOOTHED})
    beta2: Decay = setting(0.99, "Share of the mean squared changes kept.", when={"server.step": SMOOTHED})
    epsilon: Positive = setting(
        0.1,
        "Least root mean square change of a row or column that a step divides by, relative to that of the first round.",
        when={"server.step": (*SMOOTHED, "fedadagrad")},
    )
    robust: Literal["none", "clip", "cosine", "krum", "median"] = setting(
        "none",
        "Rule by which few hostile updates cannot decide: every other than `none` clips changes to the round's median; "
        "`cosine` and `krum` leave updates out, `median` weighs them (see the page on reliability).",
        when=COMPARED,
    )
    hostile_fraction: OpenHalf = setting(
        0.1,
        "Share of a round's updates, rounded up, that may be hostile: as many are left out.",
        when={"server.robust": ("krum",)},
    )


class Federation(Table):
    """Who takes part, and how often."""

    num_rounds: Count = setting(10, "Rounds of the run.", when=TRAINED)
    num_clients: Count = setting(10, "Clients in the population.")
    sampling: Literal["uniform", "rows", "poisson"] = setting(
        "uniform",
        "How the clients of a round are drawn: all alike, or in proportion to their rows, which with equal weights is "
        "right for the mean over all rows. `poisson`, with `privacy.unit = client`: each by itself, so that their "
        "number differs from round to round, around `federation.clients_per_round`.",
        when=ROUNDS,
    )
    clients_per_round: Count | Fraction | None = setting(
        None,
        "Clients drawn per round: a number, or a fraction with a decimal point (`1`: one, `1.0`: all); default: all.",
        when=TRAINED,
    )
    participation: PathOrName | None = setting(
        None,
        "Run folder whose rounds say who takes part: in each round those whose updates counted there; of a cut model, "
        "each to the step at which it left. It replays a run of `fedloom serve` in one process; default: everybody "
        "drawn.",
        when=SENT,
    )
    min_clients: Count = setting(
        1,
        "Usable updates that a round needs; with fewer the run stops and can be resumed.",
        when={"method.name": having("has_clients")},
    )
    max_norm_ratio: Positive = setting(
        100.0,
        "An update whose norm is above this multiple of the last round's median is dropped; in round 1, of that "
        "round's. So is one of whose factors the norm is above this multiple of its round's.",
        when=SENT,
    )
    max_weight: Fraction = setting(
        1.0,
        "Largest share of one client in a mean; what is cut goes to the others in proportion. With too few clients for "
        "it all weigh the same.",
        when=SENT,
    )


class Training(Table):
    """What a client does in a round. Give exactly one of `local_steps` and `local_epochs`."""

    local_steps: Count | None = setting(None, "Optimiser steps per client and round.", when=TRAINED)
    local_epochs: Positive | None = setting(None, "Passes over the client's rows per round.", when=TRAINED)
    batch_size: Count = setting(16, "Rows per optimiser step.", when=TRAINED)
    micro_batch_size: Count | None = setting(
        None, "Rows per pass; default: the whole batch. Changes memory, and the result by rounding only.", when=ROUNDS
    )
    learning_rate: Positive = setting(3e-4, "AdamW's peak learning rate.", when=TRAINED)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "How the learning rate falls after warm-up.", when=TRAINED
    )
    warmup_steps: Natural = setting(0, "Steps over which the learning rate rises from zero.", when=TRAINED)
    schedule_span: Literal["round", "run"] = setting(
        "round",
        "Whether warm-up and schedule restart in each round or run once over all rounds; a server's AdamW runs once.",
        when={**SENT, "server.step": LOCAL_STEPS},
    )
    weight_decay: NonNegative = setting(0.0, "AdamW's decoupled weight decay.", when=TRAINED)
    beta1: Decay = setting(0.9, "AdamW's first decay.", when=TRAINED)
    beta2: Decay = setting(0.999, "AdamW's second decay.", when=TRAINED)
    moments: Literal["fresh", "own", "shared"] = setting(
        "fresh",
        "Where AdamW's moments start in a round: at zero, where the client left them, or from what the clients of "
        "earlier rounds found.",
        when={"method.name": having("continues"), "server.step": LOCAL_STEPS},
    )
    moments_prior: Count = setting(
        2, "Steps that shared moments count for when a round starts.", when={"training.moments": ("shared",)}
    )
    max_grad_norm: NonNegative = setting(1.0, "Clip a client's gradient to this norm; 0: do not clip.", when=TRAINED)
    dropout: Decay = setting(
        0.0, "Dropout on the adapters' input. Every row has its own mask, whichever rows share its pass.", when=TRAINED
    )
    label_smoothing: Decay = setting(0.0, "Share of the target spread evenly over the vocabulary.", when=TRAINED)
    proximal: NonNegative = setting(
        0.0,
        "FedProx's weight μ of half the squared distance of a client's product from its start; 0: no such term.",
        when=AVERAGED,
    )
    control_variates: bool = setting(
        False,
        "SCAFFOLD: correct a client's steps by how its moves differ from the mean of all clients'.",
        when={"method.name": having("averages_factors"), "server.step": LOCAL_STEPS},
    )
    token_budget: Count = setting(
        8192,
        "Tokens per pass over all clients trained together. Changes memory and speed, and the result by rounding only.",
        when=ROUNDS,
    )
    checkpoint_activations: bool = setting(
        False,
        "Keep what enters each block of a pass only, and run the blocks once more in backward: less memory, about a "
        "third more time, the same result.",
        when=ROUNDS,
    )


class Split(Table):
    """Split training: where the model is cut and what crosses."""

    cut_layer: CountPerClient = setting(1, "Decoder blocks on the client: one for all, or one per client.", when=CUT)
    aggregation: Annotated[str, having("aggregates_split")] = setting(
        BASELINE, "Method that aggregates the client-side adapters.", when=CUT
    )
    aggregate_every: Count = setting(100, "Steps between two aggregations of the client-side adapters.", when=CUT)
    server_update: Literal["joint", "sequential"] = setting(
        "joint", "One server step on all clients' activations, or one per client in turn.", when=CUT
    )
    labels: Literal["server", "client"] = setting(
        "server", "Where the labels are; `client`: the last blocks, head and loss stay there too (U-shape).", when=CUT
    )
    tail_blocks: Count = setting(1, "Last decoder blocks kept by the client.", when={"split.labels": ("client",)})
    client_half: Literal["trained", "frozen"] = setting(
        "trained", "`frozen`: no client-side adapters; a row's activations cross once and are cached.", when=CUT
    )
    client_rank: CountPerClient | None = setting(
        None, "Rank of the client-side adapters; default: `method.ranks`.", when=CUT
    )
    server_rank: Count | None = setting(
        None, "Rank of the server-side adapters; default: the largest of `method.ranks`.", when=CUT
    )
    wire_dtype: Literal["bf16", "fp32", "fp16", "int8"] = setting(
        "bf16", "Type of the activations that cross; int8 has one scale per token.", when=CUT
    )
    gradient_wire_dtype: Literal["bf16", "fp32", "fp16", "int8"] = setting(
        "bf16", "Type of the gradients that come back.", when=CUT
    )
    error_feedback: Literal["off", "on"] = setting(
        "off", "Carry the rounding error of the gradients into the next step.", when=CUT
    )
    micro_batches: Count = setting(1, "Micro-batches in flight, to hide the link's delay.", when=CUT)
