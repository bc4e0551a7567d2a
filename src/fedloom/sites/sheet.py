"""The sheet: what a site must know of a run, as a whitelist. Nothing else of the study crosses.

No path is in it: a prompt template travels as its text, and base, tokenizer and rows are those that the site's owner
names. Hashes say whether they are the study's.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import StringConstraints, ValidationError

from fedloom.assembly.round_plan import training_of
from fedloom.config import Settings
from fedloom.config.input_tables import Data
from fedloom.data.encoding import LossOn, Overlong, Unanswered
from fedloom.data.records import Shape
from fedloom.data.templates import AUTO, CHAT, Template, read_template, template_text
from fedloom.errors import UpdateError
from fedloom.federation.blob import WireDtype
from fedloom.methods import table
from fedloom.methods.client_half import ClientHalf
from fedloom.methods.gradient_start import sketch_rank
from fedloom.methods.options import MethodOptions, ServerAdamW
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.models.row_attention import Attention
from fedloom.sites.frame_parts import Hash, Part, RunId
from fedloom.sites.sheet_sum import SheetSum, client_privacy_of, sum_of
from fedloom.training.cores import own_cores
from fedloom.training.local_training import SKETCH_ROWS, LocalTraining
from fedloom.training.private_rows import RowPrivacy

_LARGEST = 10**9
Number = Annotated[int, Ge(1), Le(_LARGEST)]
Block = Annotated[int, Ge(1), Le(1 << 16)]
Rate = Annotated[float, Ge(0), Le(1e9)]
Share = Annotated[float, Ge(0), Lt(1)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class SheetPrivacy(Part):
    """How the site hides its rows: ``RowPrivacy``, bounded."""

    clip: Annotated[float, Gt(0), Le(1e9)]
    noise_multiplier: Annotated[float, Gt(0), Le(1e9)]
    rows_per_unit: Number | None = None


class SheetBudget(Part):
    """What a site may spend on a study by the study's own word; its policy may allow less."""

    delta: Annotated[float, Gt(0), Lt(1)]
    max_epsilon: Annotated[float, Gt(0), Le(1e9)] | None = None


class SheetTraining(Part):
    """What a client does in a round: ``LocalTraining``, bounded."""

    learning_rate: Annotated[float, Gt(0), Le(1e9)]
    batch_size: Number
    steps: Number | None
    epochs: Annotated[float, Gt(0), Le(1e9)] | None
    micro_batch_size: Number | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Ge(0), Le(_LARGEST)]
    schedule_span: Literal["round", "run"]
    total_rounds: Number
    weight_decay: Rate
    betas: tuple[Share, Share]
    max_grad_norm: Rate | None
    dropout: Share
    label_smoothing: Share
    proximal: Rate = 0.0
    token_budget: Number
    start_rounds: Annotated[int, Ge(0), Le(1)] = 0
    privacy: SheetPrivacy | None = None
    checkpoint_activations: bool = False


class SheetSplit(Part):
    """How the model is cut and what crosses, as far as one site must know it.

    ``segments`` are the blocks whose adapters the site trains, those that are aggregated together as one entry.
    ``tail_blocks`` is given where the last blocks, the head and the labels stay at the site.
    """

    cut_layer: Block
    tail_blocks: Annotated[int, Ge(0), Le(1 << 16)] | None
    segments: Annotated[tuple[Annotated[tuple[Annotated[int, Ge(0)], ...], MaxLen(1 << 12)], ...], MaxLen(1 << 12)]
    client_half: Literal["trained", "frozen"]
    num_steps: Number
    aggregate_every: Number
    micro_batches: Number
    wire_dtype: Literal["bf16", "fp32", "fp16", "int8"]
    gradient_wire_dtype: Literal["bf16", "fp32", "fp16", "int8"]
    error_feedback: Literal["off", "on"]

    @property
    def num_periods(self) -> int:
        """Periods in all: the rounds of a split run."""
        return -(-self.num_steps // self.aggregate_every)


class SheetTemplate(Part):
    """How prompts are worded: the shape's own way, the tokenizer's chat template, or a text."""

    kind: Literal["auto", "chat", "text"]
    text: Annotated[str, MaxLen(1 << 16)] = ""
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None

    @property
    def day(self) -> datetime.date | None:
        """The day that a chat template is told; a day that is none is none."""
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            return None

    def template(self) -> str | Template:
        """Return what rows are encoded with.

        Raises:
            DataError: the text is no template.
        """
        return read_template(self.text, "the sheet's template") if self.kind == "text" else self.kind


class ClientCut(NamedTuple):
    """A client's part of a model that is cut, and the rank and scale of its adapter there."""

    rank: int
    scale: float
    split: SheetSplit


class Sheet(Part):
    """A run as one site sees it."""

    run: RunId
    client: Annotated[int, Ge(0), Le(10**6)]
    rank: Annotated[int, Ge(1), Le(1 << 20)]
    scale: Rate
    method: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
    weighting: Literal["rows", "tokens", "uniform", "work", "norm"]
    initialisation: Literal["independent", "shared", "gradient"]
    training: SheetTraining
    wire: WireDtype
    seed: Annotated[int, Ge(0), Le(1 << 63)]
    base_sha256: Hash
    tokenizer_sha256: Hash
    target_modules: Annotated[tuple[Pattern, ...], MaxLen(4096)] | None
    template: SheetTemplate
    shape: Shape
    max_length: Number | None
    overlong: Overlong
    unanswered: Unanswered
    loss_on: LossOn
    scores: bool
    batch_tokens: Number
    split: SheetSplit | None = None
    attention: Attention = "packed"
    sends_gradients: bool = False
    moments: Literal["fresh", "own", "shared"] = "fresh"
    moments_prior: Number = 2
    corrects: bool = False
    sketch_rank: Annotated[int, Ge(1), Le(1 << 20)] | None = None
    budget: SheetBudget | None = None
    sum: SheetSum | None = None
    unit_column: Pattern | None = None

    def rank_asked(self, round: int) -> int:
        """Return the rank of a round's task: the client's own, but where it sketches a gradient."""
        return self.sketch_rank if self.sketch_rank is not None and round <= self.training.start_rounds else self.rank

    @property
    def local_training(self) -> LocalTraining:
        """What the client does in a round."""
        privacy = None if self.training.privacy is None else RowPrivacy(**dict(self.training.privacy))
        cores = own_cores(self.training.token_budget)  # the site's own machine's, whatever the server has
        return LocalTraining(**{**dict(self.training), "privacy": privacy, "cores": cores})

    @property
    def line(self) -> str:
        """Say in a line what is asked, for the site's owner."""
        training = self.training
        budget = f"{training.steps} steps" if training.steps is not None else f"{training.epochs:g} passes"
        rounds, cut = f"{training.total_rounds} rounds of {budget}", ""
        if self.sketch_rank is not None:
            rounds = f"a gradient of {SKETCH_ROWS} rows sketched in {self.sketch_rank} directions, then {rounds}"
        if self.split is not None:
            rounds = f"{self.split.num_periods} rounds of {self.split.aggregate_every} steps"
            labels = "cross" if self.split.tail_blocks is None else "stay"
            cut = f", the model cut after block {self.split.cut_layer}: activations cross, labels {labels}"
        hidden = ""
        if (privacy := training.privacy) is not None:
            units = "rows" if self.unit_column is None else f"all rows of each {self.unit_column}"
            hidden = f", {units} hidden by noise of {privacy.noise_multiplier:g} times the clip"
        if self.sum is not None:
            hidden += f", updates in sums of at least {self.sum.fewest} sites under masks"
        return f"run {self.run}: {self.method}, rank {self.rank}, {rounds}, base {self.base_sha256[:12]}{cut}{hidden}"

    def half(self, shapes: dict[str, tuple[int, int]]) -> ClientHalf:
        """Return what the method's client trains, sends and keeps.

        Raises:
            MethodError: the method is not installed here, or sends nothing.
        """
        return self.strategy(shapes).client

    def strategy(self, shapes: dict[str, tuple[int, int]]) -> Strategy:
        """Return the method, as far as a client's part goes: what the server does with sums is not in a sheet.

        Raises:
            MethodError: the method is not installed here, or sends nothing.
        """
        largest = self.rank if self.sum is None else self.sum.max_rank
        cohort = Cohort(shapes, largest, lambda client: self.rank, self.seed)
        options = MethodOptions(
            weighting=self.weighting,
            initialisation=self.initialisation,
            adamw=ServerAdamW(learning_rate=1.0) if self.sends_gradients else None,  # its numbers stay at the server
            few_bits=self.wire.is_coded,
            moments=self.moments,
            moments_prior=self.moments_prior,
            control_clients=1 if self.corrects else 0,  # the number stays at the server
            client_privacy=client_privacy_of(self.sum),
            masked=self.sum is not None,
            sketch_rank=None if self.sum is None else self.sum.sketch_rank,
            sketch_is_whole=self.sum is None or self.sum.sketch_is_whole,
        )
        strategy: Strategy = table.make(self.method, cohort, options)
        return strategy


def sheet_of(
    settings: Settings,
    client: int,
    run: str,
    base_sha256: str,
    tokenizer_sha256: str,
    scores: bool,
    cut: ClientCut | None = None,
    cohort_size: int = 0,
) -> Sheet:
    """Return the sheet of one client of a study of which so many are drawn for a round.

    ``cut`` is its part of a model that is cut.

    Raises:
        DataError: its template is none.
    """
    data, method = settings.data, settings.method
    return Sheet(
        run=run,
        client=client,
        rank=settings.client_ranks[client] if cut is None else cut.rank,
        scale=settings.client_scales[client] if cut is None else cut.scale,
        method=method.name,
        weighting=method.weighting,
        initialisation=method.initialisation,
        training=_training_of(settings),
        wire=WireDtype(settings.wire.dtype),
        seed=settings.run.seed,
        base_sha256=base_sha256,
        tokenizer_sha256=tokenizer_sha256,
        target_modules=settings.model.target_modules,
        template=_template_of(data),
        shape=Shape(data.shape),
        max_length=data.max_length,
        overlong=Overlong(data.overlong),
        unanswered=Unanswered(data.unanswered),
        loss_on=LossOn(data.loss_on),
        scores=scores,
        batch_tokens=settings.evaluation.batch_tokens,
        split=None if cut is None else cut.split,
        attention=settings.model.attention,
        sends_gradients=settings.server.step == "adamw",
        moments=settings.training.moments,
        moments_prior=settings.training.moments_prior,
        corrects=settings.training.control_variates,
        sketch_rank=sketch_rank(max(settings.client_ranks)) if settings.start_rounds else None,
        budget=_budget_of(settings),
        sum=sum_of(settings, cohort_size),
        unit_column=data.unit_column,
    )


def _training_of(settings: Settings) -> SheetTraining:
    """Return what a site is told of a round; on how many cores it trains is its own to say."""
    numbers = asdict(training_of(settings))
    del numbers["cores"]
    return SheetTraining(**numbers)


def _budget_of(settings: Settings) -> SheetBudget | None:
    privacy = settings.privacy
    return None if privacy.unit != "row" else SheetBudget(delta=privacy.delta, max_epsilon=privacy.max_epsilon)


def read_sheet(body: bytes, run: str | None = None) -> Sheet:
    """Read a sheet at a site, of a run where that is said.

    Raises:
        UpdateError: it is not of this form.
    """
    try:
        sheet = Sheet.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        where = ""
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = f" ({'.'.join(map(str, first['loc']))[:80]}: {first['msg'].lower()})"
        raise UpdateError(
            f"expected a sheet of this form, got another{where}; run the same version of fedloom on both sides"
        ) from error
    if run is not None and sheet.run != run:
        raise UpdateError(f"expected a sheet of run {run}, got one of {sheet.run}; send its own")
    return sheet


def _template_of(data: Data) -> SheetTemplate:
    name = data.template or AUTO
    if name in (AUTO, CHAT):
        return SheetTemplate(kind="auto" if name == AUTO else "chat", date=data.date)
    text = template_text(name)
    read_template(text, name)
    return SheetTemplate(kind="text", text=text)
