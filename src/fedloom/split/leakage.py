"""How many of a client's tokens its activations give away: the standard inversion attack, trained on public text only.

The attacker is a curious server. It knows the base model, whose weights are public, so it can run the client's blocks
on public text and train an inverter from activations to tokens; then it reads the clients' activations with it. Two
references stand beside the learned inverter: the nearest token embedding, which is all it takes at an embedding's
output, and always guessing the commonest public token, which is no attack at all.

The figure is a lower bound on what leaks: a stronger attacker, or one with text of the clients' own kind, gets more.

Letters: T tokens, D width, V vocabulary.
Source: the learned inverters of BiSR and SIP (arXiv 2409.00960), here one residual layer per token and one block that
looks at the neighbours; deviation: no gradient matching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.data.tokens import TokenSet
from fedloom.errors import EvaluationError
from fedloom.models.cut import Part
from fedloom.seeding import stream, torch_stream
from fedloom.split.codecs import WireDtype, encode
from fedloom.split.split_step import run_bottom
from fedloom.training.packing import pack


@dataclass(frozen=True)
class LeakageReport:
    """Shares of the clients' tokens that are recovered exactly, between 0 and 1.

    ``recovered`` is the learned inverter's; ``recovered_in_full`` the share of rows without a single wrong token.
    """

    cut_layer: int
    recovered: float
    recovered_in_full: float
    nearest_embedding: float
    commonest_token: float
    num_public_tokens: int
    num_private_tokens: int
    attack: str = "learned inverter (per-token layer and one attention block), trained on public text"


@dataclass(frozen=True)
class AttackSettings:
    """How the inverter is trained: AdamW on batches of public rows."""

    steps: int = 600
    rows_per_step: int = 8
    learning_rate: float = 2e-3
    token_budget: int = 8192


class Inverter(nn.Module):
    """From activations to token logits: a residual layer per token, a block that sees all tokens, a projection."""

    def __init__(self, width: int, embeddings_VD: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        self.neighbours = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.embeddings_VD = nn.functional.normalize(embeddings_VD.detach().float(), dim=1) * width**0.5
        self.bias_V = nn.Parameter(torch.zeros(len(embeddings_VD)))

    def forward(self, hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return logits (T, V) for activations of samples one behind the other."""
        seen_TD = self.norm(hidden_TD)
        seen_TD = seen_TD + self.own(seen_TD)
        samples = torch.split(seen_TD, list(lengths))
        padded = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
        counts = torch.tensor(list(lengths), device=padded.device)
        is_padding = torch.arange(padded.shape[1], device=padded.device)[None] >= counts[:, None]
        mixed = self.neighbours(padded, src_key_padding_mask=is_padding)
        logits = mixed[~is_padding] @ self.embeddings_VD.T
        scaled: Tensor = logits * self.scale / padded.shape[-1] ** 0.5 + self.bias_V
        return scaled


def measure_leakage(
    part: Part,
    embeddings_VD: Tensor,
    public: TokenSet,
    private: TokenSet,
    *,
    wire_dtype: WireDtype,
    seed: int,
    settings: AttackSettings | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss_nats: None,
) -> LeakageReport:
    """Train the inverter on public text for a bottom part and report what it reads from private activations.

    ``part`` runs with whatever adapters it is routed to, and its activations are rounded as on the wire. No private
    row is seen before the report.

    Raises:
        EvaluationError: if there is no public or no private text, or they share rows.
    """
    _check_texts(public, private)
    settings = settings or AttackSettings()
    inverter = train_inverter(part, embeddings_VD, public, wire_dtype, seed, settings, on_step)
    commonest = int(torch.bincount(torch.from_numpy(public.input_ids.copy()).long()).argmax())
    right: list[Tensor] = []
    nearest = common = 0
    for start in range(0, len(private), settings.rows_per_step):
        rows = range(start, min(start + settings.rows_per_step, len(private)))
        hidden_TD, ids_T, lengths = observe(part, private, rows, wire_dtype)
        with torch.no_grad():
            hits_T = inverter(hidden_TD, lengths).argmax(1) == ids_T
        right += torch.split(hits_T, lengths)
        nearest += int((nearest_tokens(hidden_TD, embeddings_VD) == ids_T).sum())
        common += int((ids_T == commonest).sum())
    hits = sum(int(row.sum()) for row in right)
    total = private.num_tokens
    return LeakageReport(
        cut_layer=part.stop,
        recovered=hits / total,
        recovered_in_full=sum(bool(row.all()) for row in right) / len(right),
        nearest_embedding=nearest / total,
        commonest_token=common / total,
        num_public_tokens=public.num_tokens,
        num_private_tokens=total,
    )


def train_inverter(
    part: Part,
    embeddings_VD: Tensor,
    public: TokenSet,
    wire_dtype: WireDtype,
    seed: int,
    settings: AttackSettings,
    on_step: Callable[[int, float], None] = lambda step, loss_nats: None,
) -> Inverter:
    """Train the attacker's inverter on public text alone."""
    inverter = Inverter(embeddings_VD.shape[1], embeddings_VD).to(embeddings_VD.device)
    _draw(inverter, seed)
    optimiser = torch.optim.AdamW(inverter.parameters(), lr=settings.learning_rate)
    rng = stream(seed, "leakage")
    for step in range(settings.steps):
        rows = rng.integers(0, len(public), settings.rows_per_step).tolist()
        hidden_TD, ids_T, lengths = observe(part, public, rows, wire_dtype)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        loss = nn.functional.cross_entropy(inverter(hidden_TD, lengths), ids_T)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        optimiser.step()
        on_step(step, float(loss.detach()))
    return inverter.eval()


def observe(
    part: Part, rows: TokenSet, chosen: Sequence[int], wire_dtype: WireDtype
) -> tuple[Tensor, Tensor, list[int]]:
    """Return what the server sees of some rows, their tokens, and the rows' lengths."""
    device = next(part.decoder.parameters()).device
    batch = pack([rows.row(row) for row in chosen], device)
    with torch.no_grad():
        hidden_TD = run_bottom(part, batch)
    return encode(hidden_TD, wire_dtype).decode(torch.float32), batch.input_ids_T, list(batch.lengths)


def nearest_tokens(hidden_TD: Tensor, embeddings_VD: Tensor) -> Tensor:
    """Return the tokens whose embeddings point most nearly the way of the activations."""
    directions_VD = nn.functional.normalize(embeddings_VD.float(), dim=1)
    return (hidden_TD.float() @ directions_VD.T).argmax(1)


def _draw(inverter: Inverter, seed: int) -> None:
    """Draw the inverter's weights from their own stream."""
    generator = torch_stream(seed, "leakage weights", device=inverter.bias_V.device)
    for name, parameter in inverter.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif "norm" not in name and name != "scale":
            nn.init.zeros_(parameter)


def _check_texts(public: TokenSet, private: TokenSet) -> None:
    if not len(public) or not len(private):
        raise EvaluationError(
            f"leakage: expected public and private rows, got {len(public)} and {len(private)}; give rows of both"
        )
    known = {public.row(row)[0].tobytes() for row in range(len(public))}
    shared = sum(private.row(row)[0].tobytes() in known for row in range(len(private)))
    if shared:
        raise EvaluationError(
            f"leakage: expected public text that is not the clients', got {shared} rows in both; choose other public "
            "text"
        )
