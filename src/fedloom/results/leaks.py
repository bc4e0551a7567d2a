"""How much of the clients' text a server could read from the activations of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.assembly.inputs import encode_rows
from fedloom.config.setting import values_of
from fedloom.data.sources import Split, load_rows
from fedloom.data.text_files import read_utf8
from fedloom.data.tokens import TokenSet
from fedloom.errors import EvaluationError
from fedloom.evaluation.perplexity import plain_text_rows
from fedloom.models.cut import check_cuts, cut, num_blocks
from fedloom.results.held_out import TEXT, own_inputs
from fedloom.results.opened_result import Found, OpenedResult
from fedloom.split.codecs import WireDtype
from fedloom.split.leakage import AttackSettings, LeakageReport, measure_leakage
from fedloom.wording import Displayed

PRIVATE_ROWS = 100


@dataclass(frozen=True)
class Leakages(Displayed):
    """One report per cut."""

    path: Path
    wire_dtype: WireDtype
    reports: tuple[LeakageReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the reports as plain values."""
        reports = [asdict(report) for report in self.reports]
        return {"result": str(self.path), "wire_dtype": self.wire_dtype, "cuts": reports}

    def lines(self) -> list[str]:
        """Return the reports for people."""
        first = self.reports[0]
        lines = [
            f"attack: {first.attack}",
            f"{first.num_public_tokens:,} public tokens learned from, {first.num_private_tokens:,} private ones read",
            f"{'cut':>4} {'tokens read':>12} {'rows in full':>13} {'nearest embedding':>18} {'commonest token':>16}",
        ]
        for r in self.reports:
            shares = (r.recovered, r.recovered_in_full, r.nearest_embedding, r.commonest_token)
            read, full, nearest, common = (f"{100 * share:.1f} %" for share in shares)
            lines.append(f"{r.cut_layer:>4} {read:>12} {full:>13} {nearest:>18} {common:>16}")
        return [*lines, "the text stays with the client; these shares of it can be read from its activations"]


def leakage(
    opened: OpenedResult,
    public: str,
    *,
    cut_layers: tuple[int, ...] | None = None,
    shape: str | None = None,
    settings: AttackSettings | None = None,
    wire_dtype: WireDtype | None = None,
    on_step: Callable[[int, int, float], None] = lambda cut_layer, step, loss_nats: None,
) -> Leakages:
    """Train the inversion on public text for each cut and read the run's own rows with it.

    ``cut_layers`` None means the run's own cuts. The client's part runs with the result's adapter, as the last
    activations that crossed did.

    Raises:
        EvaluationError: if the result is not a run with rows, or public text and private rows are the same.
        CutError: if the base cannot be cut there.
    """
    check_run(opened.found)
    run = opened.settings
    assert run is not None
    cuts = cut_layers or tuple(sorted(set(values_of(run.split.cut_layer))))
    wire = wire_dtype or run.split.wire_dtype
    check_cuts(cuts, num_blocks(opened.lora.model))
    private = private_rows(opened)
    known = public_rows(opened, public, shape)
    lora = opened.use(next(iter(opened.adapters), None))
    causal_lm: Any = lora.model
    embeddings_VD = causal_lm.get_input_embeddings().weight
    reports = []
    for cut_layer in cuts:
        bottom = cut(lora.model, cut_layer)[0]

        def report(step: int, loss_nats: float, cut_layer: int = cut_layer) -> None:
            on_step(cut_layer, step, loss_nats)

        reports.append(
            measure_leakage(
                bottom,
                embeddings_VD,
                known,
                private,
                wire_dtype=wire,
                seed=run.run.seed,
                settings=settings,
                on_step=report,
            )
        )
    return Leakages(opened.found.path, wire, tuple(reports))


def check_run(found: Found) -> None:
    """Refuse a result without rows of its own, before a base is loaded.

    Raises:
        EvaluationError: it is a PEFT folder.
    """
    if found.settings is None:
        raise EvaluationError(
            f"{found.path}: expected a run with rows of its own, got a PEFT adapter; give a run folder"
        )


def private_rows(opened: OpenedResult) -> TokenSet:
    """Return the first rows that the run's clients own, as they were trained on."""
    inputs = own_inputs(opened)
    assert inputs is not None
    return inputs.tokens.select(range(min(PRIVATE_ROWS, len(inputs.tokens))))


def public_rows(opened: OpenedResult, path: str, shape: str | None) -> TokenSet:
    """Return public text as tokens: a file that is one text, or rows in any shape, the long ones cut."""
    if shape == TEXT or (shape is None and path.endswith(".txt")):
        text = read_utf8(Path(path))
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        return plain_text_rows(opened.lora, opened.base.tokenizer, paragraphs)[0]
    assert opened.settings is not None
    data = opened.settings.data
    if shape is not None:
        data = replace_shape(data, shape)
    learned = data.model_copy(update={"loss_on": "all", "overlong": "truncate", "unanswered": "drop"})
    return encode_rows(load_rows(path, Split.TRAIN), learned, opened.base)[1].tokens


def replace_shape(data: Any, shape: str) -> Any:
    """Return the data settings with another shape and its own columns and template."""
    return data.model_copy(update={"shape": shape, "columns": {}, "template": None})
