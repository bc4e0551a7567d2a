"""The tables that say how to run: devices of the cost model, the wire, evaluation, the engine, the run itself."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import field_validator

from fedloom.config.setting import (
    Count,
    Decay,
    Fraction,
    Name,
    Natural,
    NonNegative,
    NonNegativePerClient,
    Positive,
    PositivePerClient,
    Table,
    having,
    setting,
)

CUT = {"method.name": having("is_cut")}
ROUNDS = {"method.name": having("runs_rounds")}
TRAINED = {"method.name": having("is_trained")}
SENT = {"method.name": having("sends_adapters")}
ON_RAY = {"engine.name": ("ray",)}
Workers = Annotated[int, Ge(1), Le(10_000)]
Threads = Annotated[int, Ge(1), Le(1024)]
SuiteName = Literal["e2e", "mmlu", "multiple-choice", "exact-match", "last-number"]


class Devices(Table):
    """Devices and links that `describe` simulates: one value for all clients, or one per client. No result changes."""

    client_flops: PositivePerClient = setting(35.6e12, "Operations per second of a client.", when=TRAINED)
    client_memory_gib: PositivePerClient = setting(24.0, "Memory of a client.", when=CUT)
    uplink_mbit_per_second: PositivePerClient = setting(100.0, "Rate from client to server.", when=SENT)
    downlink_mbit_per_second: PositivePerClient = setting(100.0, "Rate from server to client.", when=SENT)
    latency_ms: NonNegativePerClient = setting(20.0, "Delay of a message, one way.", when=SENT)
    server_flops: Positive = setting(312e12, "Operations per second of the server.", when=CUT)
    utilisation: Fraction = setting(0.4, "Share of those operations that a real step reaches.", when=TRAINED)


class Wire(Table):
    """How adapters cross between client and server."""

    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4", "int2"] = setting(
        "fp32",
        "Type of the adapters on the wire. In 8, 4 or 2 bits a change crosses, with one scale a slot; what is rounded "
        "off is added to the next one.",
        when=SENT,
    )


class Evaluation(Table):
    """What is measured, and when."""

    every: Natural = setting(
        1, "Rounds between evaluations; 0: only at the end. The end is always evaluated.", when=TRAINED
    )
    patience: Count | None = setting(
        None,
        "Stop after that many evaluations without a lower loss on validation rows (`data.validation_fraction`), and "
        "release the adapter of the round with the lowest; default: train all rounds, and release the last.",
        when=TRAINED,
    )
    clients: Decay = setting(
        0.0, "Share of every client's rows held out, on which each client is scored for itself; 0: none."
    )
    batch_tokens: Count = setting(8192, "Tokens per evaluation pass.")
    suites: tuple[SuiteName, ...] = setting((), "Scores besides the held-out loss.")
    paths: dict[str, str] = setting({}, "Where a suite's data is: suite = path.")
    shots: Natural = setting(5, "Examples before a multiple-choice question.")
    answering: Literal["letter", "text"] = setting(
        "letter", "A choice's likelihood is its letter's, or its text's per byte."
    )
    limit: Count | None = setting(None, "Items per suite at most; default: all.")
    beams: Count = setting(10, "Beams when decoding.")
    length_penalty: NonNegative = setting(0.8, "Beam search's length penalty.")
    no_repeat_ngram: Natural = setting(4, "Length of n-grams that may not repeat; 0: any may.")
    max_new_tokens: Count = setting(100, "Tokens decoded per item at most.")


class Engine(Table):
    """Where clients train, and with how much of a machine. It changes no result beyond the last bits."""

    name: Literal["local", "ray"] = setting(
        "local", "Where clients train: in this process, or on the workers of Ray.", when=TRAINED
    )
    workers: Workers | None = setting(
        None, "Workers, each with a base of its own; default: one per GPU, else one per two cores.", when=ON_RAY
    )
    gpus_per_worker: NonNegative | None = setting(
        None, "GPUs of a worker, or a part of one; default: 1 where the base is on a GPU, else 0.", when=ON_RAY
    )
    cpus_per_worker: Positive = setting(
        1.0, "CPUs that Ray reserves for a worker, and cores of a step there.", when=ON_RAY
    )
    address: Name | None = setting(
        None, "A running Ray cluster: auto, or host:port; default: one is started on this machine.", when=ON_RAY
    )
    retries: Natural = setting(2, "Times a client is given to another worker because its worker died.", when=ON_RAY)
    clients_at_once: Count | None = setting(
        None,
        "Clients whose adapters are open together, and whose rows share passes; default: 1 on a CPU, on a GPU 16 or as "
        "many as a quarter of its free memory holds. Changes the result by rounding only, on a CPU by no bit where "
        "those of a matrix product's rows do not depend on how many there are. Private rows train client by client.",
        when=ROUNDS,
    )
    cores: Threads | None = setting(
        None,
        "Threads over which a step's and an evaluation's rows are spread on a CPU, by the thousand tokens; default: as "
        "many as this process has cores (on Ray cpus_per_worker) for engine.threads each, and training.token_budget "
        "has thousands. Changes no bit.",
    )
    threads: Threads = setting(1, "CPU threads that compute the base, everywhere; sums round otherwise with another.")


class Run(Table):
    """The run itself."""

    @field_validator("keep_states", mode="before")
    @classmethod
    def _read_earlier_form(cls, given: object) -> object:
        """It was true or false once, as recipes and run folders of that time say."""
        return {True: "all", False: "last"}[given] if isinstance(given, bool) else given

    seed: Natural = setting(1, "Seed of every random stream.")
    keep_updates: bool = setting(
        False,
        "Keep every client's upload as a PEFT folder.",
        when={"method.name": having("runs_rounds")},
    )
    keep_states: Literal["last", "best", "all"] = setting(
        "last",
        "Rounds whose state is kept: the last two, that of the lowest held-out loss too, or all. `--round` of "
        "evaluate, generate, export and judge takes any of them.",
        when=TRAINED,
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = setting(
        (), "Trackers besides TensorBoard, which is always written.", when=TRAINED
    )
    project: Name | None = setting(
        None,
        "Project in Weights & Biases, experiment in MLflow; default: that of WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, "
        "else `fedloom`.",
        when=TRAINED,
    )
    group: Name | None = setting(
        None,
        "Group of the run at its trackers; default: WANDB_RUN_GROUP, or the folder that holds the run's, so that the "
        "runs of a comparison are one.",
        when=TRAINED,
    )
    tags: tuple[Name, ...] = setting((), "Tags of the run at its trackers; default: WANDB_TAGS.", when=TRAINED)
