"""A run whose server sees sums alone gives the plain fixed-point sum's bits, whoever drops out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.config import Settings, with_method
from fedloom.errors import MissingExtraError, SettingsError, TooFewClientsError, UpdateError
from fedloom.experiment import describe, run
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import Engine
from fedloom.methods.state import Broadcast, Failure
from fedloom.privacy.secure_sum.steps import Member, Step

Make = Callable[..., Settings]


def settings_of(make: Make, method: str, **overrides: object) -> Settings:
    ranks: object = 2 if method == "fedit" else [4, 2, 1, 3]
    common = {"partition__scheme": "iid", "partition__column": None, "federation__num_clients": 4}
    kind = "sketch" if method == "flora" else "masked"
    return make(**{"method__name": method, "method__ranks": ranks, "privacy__sum": kind, **common, **overrides})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every mask be zero: what is added up then is the plain sum in fixed point."""

    def nothing(_seed: bytes, length: int) -> Any:
        return np.zeros(length, np.uint64)

    for home in ("member", "server"):
        monkeypatch.setattr(f"fedloom.privacy.secure_sum.{home}.mask", nothing)


class Losing:
    """An engine of whose clients one fails in every round."""

    def __init__(self, engine: Engine, lost: int) -> None:
        self._engine, self._lost = engine, lost

    def train(self, broadcasts: list[Broadcast]) -> Iterator[Arrival]:
        for arrival in self._engine.train(broadcasts):
            client = arrival.outcome.client
            yield Arrival(Failure(client, "its battery was empty"), 7, 0) if client == self._lost else arrival


def losing(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    from fedloom.experiment import loop

    shown = loop.ShownEngine
    monkeypatch.setattr(loop, "ShownEngine", lambda engine, progress: Losing(shown(engine, progress), lost))


@pytest.mark.slow
@pytest.mark.extra("privacy")
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedit", {}),
        ("zero-padding", {"server__step": "momentum", "federation__max_weight": 0.3, "training__moments": "own"}),
        ("ffa-lora", {}),
        ("ffa-lora", {"privacy__unit": "client", "method__weighting": "uniform"}),
        ("flora", {"model__base": "embedded", "model__tokenizer": None, "federation__num_rounds": 1}),
        ("flora", {"server__step": "fedadam", "method__initialisation": "shared", "federation__clients_per_round": 3}),
    ],
)
def test_the_result_is_that_of_the_plain_sum_in_fixed_point_bit_for_bit(
    method: str, overrides: dict[str, Any], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(settings_for, method, **overrides)
    run(settings, tmp_path / "masked")
    with monkeypatch.context() as patched:
        without_masks(patched)
        run(settings, tmp_path / "unmasked")
    assert adapter(tmp_path / "masked") == adapter(tmp_path / "unmasked")
    run(settings_of(settings_for, method, **overrides, privacy__sum="plain"), tmp_path / "plain")
    found, wanted = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("masked", "plain")
    )
    squares = [0.0, 0.0]
    for name, tensor in wanted.items():
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            change = found[other] @ found[name] - wanted[other] @ tensor
            squares = [squares[0] + float((change**2).sum()), squares[1] + float(((wanted[other] @ tensor) ** 2).sum())]
    assert squares[0] < 1e-9 * squares[1]
    planned = describe(settings)
    drawn = settings.cohort_size
    said = f"sum: {settings.privacy.sum}; the server sees no update, and of {drawn} clients a round 3 must stay"
    assert said in planned.lines()
    for record in records(tmp_path / "masked"):
        assert record["train_loss_nats"] is None
        assert record["agreement"] is None
        for client in record["clients"]:
            assert client["reason"] is client["norm"] is client["loss_nats"] is None
            assert client["upload_bytes"] == planned.upload_bytes[client["client"]]
        down = planned.first_download_bytes if record["round"] == 1 else planned.download_bytes
        if "federation__clients_per_round" not in overrides:  # else they miss rounds
            assert [client["download_bytes"] for client in record["clients"]] == list(down)


@pytest.mark.extra("privacy")
def test_a_client_that_drops_out_leaves_the_sum_of_the_others_and_a_second_ends_the_run(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(settings_for, "ffa-lora")
    losing(monkeypatch, 2)
    run(settings, tmp_path / "masked")
    for record in records(tmp_path / "masked"):
        assert [client["reason"] for client in record["clients"]] == [None, None, "its battery was empty", None]
        assert sum(client["weight"] for client in record["clients"]) == pytest.approx(1.0)
        assert record["clients"][2]["weight"] == 0.0
    with monkeypatch.context() as patched:
        without_masks(patched)
        run(settings, tmp_path / "unmasked")
    assert adapter(tmp_path / "masked") == adapter(tmp_path / "unmasked")
    losing(monkeypatch, 1)
    with pytest.raises(
        TooFewClientsError, match=r"expected at least 3 of 4 clients \(privacy.threshold\), got 2.*battery"
    ):
        run(settings, tmp_path / "few")


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_a_client_that_leaves_at_any_message_leaves_the_sum_of_those_whose_numbers_came(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, answer = settings_of(settings_for, "fedit", federation__num_rounds=1), Member.answer
    run(settings, tmp_path / "all")
    with monkeypatch.context() as patched:
        losing(patched, 2)
        run(settings, tmp_path / "without")
    assert adapter(tmp_path / "all") != adapter(tmp_path / "without")
    for step in Step:

        def leaving(self: Member, at: Step, message: bytes, step: Step = step) -> bytes:
            if self.number == 2 and at is step:
                raise UpdateError("its battery was empty")
            return answer(self, at, message)

        with monkeypatch.context() as patched:
            patched.setattr(Member, "answer", leaving)
            run(settings, tmp_path / step)
        came = step in (Step.AGREED, Step.TOLD)
        assert adapter(tmp_path / step) == adapter(tmp_path / ("all" if came else Step.KEYS))
        (record,) = records(tmp_path / step)
        assert record["clients"][2]["reason"] == (None if came else "its battery was empty")
    found, wanted = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in (Step.KEYS, "without")
    )  # shares are of those who have trained, so numbers are rounded elsewhere
    assert all(np.allclose(found[name], tensor, rtol=1e-5, atol=1e-9) for name, tensor in wanted.items())


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_a_resumed_run_has_the_same_bits_and_hidden_rows_go_with_masks(settings_for: Make, tmp_path: Path) -> None:
    own = {"privacy__unit": "row", "privacy__noise_multiplier": 0.8, "federation__clients_per_round": 3}
    run(settings_of(settings_for, "ffa-lora", **own), tmp_path / "one")
    run(settings_of(settings_for, "ffa-lora", **own, federation__num_rounds=1), tmp_path / "two")
    run(settings_of(settings_for, "ffa-lora", **own), tmp_path / "two")
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two")


def test_a_missing_extra_is_named_before_anything_is_made(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(MissingExtraError, match=r"privacy.sum needs the extra 'privacy'"):
        run(settings_of(settings_for, "ffa-lora"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("weave", {}, "privacy.sum only with method.name = fedit, zero-padding, flora or ffa-lora"),
        (
            "flora",
            {"privacy__sum": "masked"},
            "expected sketch with method.name = flora, which stacks products.*choose fedit, zero-padding or ffa-lora",
        ),
        ("fedit", {"privacy__sum": "sketch"}, "expected masked with method.name = fedit.*set masked, or choose flora"),
        ("fedit", {"privacy__sketch_rank": 3}, "privacy.sketch_rank only with privacy.sum = sketch"),
        ("flora", {"privacy__sketch_rank": 11}, "at most 10, to which the ranks of a round's clients add up, got 11"),
        ("flora", {"server__step": "fedexp"}, "fedexp reads the norm of each client's change"),
        ("flora", {"federation__clients_per_round": 2}, "sketch only with 3 clients a round or more"),
        ("fedit", {"method__weighting": "tokens"}, "tokens and norms are known of single updates only"),
        ("zero-padding", {"method__weighting": "norm"}, "tokens and norms are known of single updates only"),
        ("fedit", {"server__step": "fedexp"}, "fedexp reads the norm of each client's change"),
        ("fedit", {"server__step": "adamw", "training__local_steps": 1}, "adamw needs gradients"),
        ("fedit", {"server__robust": "median"}, "it compares single updates, which nobody sees"),
        ("fedit", {"federation__max_norm_ratio": 9.0}, "nobody sees the norm of a single update"),
        ("fedit", {"method__initialisation": "gradient"}, "the sketches of the gradient would be seen"),
        ("fedit", {"training__moments": "shared"}, "second moments would be seen beside the sum"),
        ("fedit", {"training__control_variates": True}, "how far clients move on average"),
        ("fedit", {"wire__dtype": "int4"}, "masked numbers cross in fixed point, at one scale for all"),
        ("fedit", {"wire__dtype": "bf16"}, "masked numbers cross in fixed point"),
        ("fedit", {"run__keep_updates": True}, "there is no update to keep"),
        ("fedit", {"federation__clients_per_round": 2}, "masked only with 3 clients a round or more"),
        ("fedit", {"privacy__threshold": 2}, "more than two thirds of the 4 clients of a round"),
        ("fedit", {"privacy__threshold": 5}, "more than two thirds of the 4 clients of a round"),
        (
            "fedit",
            {"privacy__sum": "plain", "privacy__threshold": 3},
            "privacy.threshold only with privacy.sum = masked or sketch",
        ),
    ],
)
def test_what_looks_at_single_updates_is_refused_with_the_reason(
    method: str, overrides: dict[str, Any], words: str, settings_for: Make
) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_of(settings_for, method, **overrides)


def test_another_method_of_a_comparison_has_plain_sums(settings_for: Make) -> None:
    for method in ("fedit", "ffa-lora", "weave"):
        other = with_method(settings_of(settings_for, "flora", privacy__sketch_rank=5), method)
        assert (other.privacy.sum, other.privacy.sketch_rank) == ("plain", None)
    for method in ("flora", "rolora", "standalone", "base"):
        assert with_method(settings_of(settings_for, "ffa-lora", privacy__threshold=4), method).privacy.sum == "plain"


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_a_sketched_sum_of_a_lower_rank_has_that_rank_and_a_client_that_leaves_is_not_in_it(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 4, 2, 1, 3: without the third the sum has 9, of which 5 are sent, or all."""
    losing(monkeypatch, 2)
    own = {"model__base": "embedded", "model__tokenizer": None, "federation__num_rounds": 1}
    found = {}
    for name, rank in (("all", None), ("some", 5), ("plain", None)):
        kind = "plain" if name == "plain" else "sketch"
        settings = settings_of(settings_for, "flora", **own, privacy__sum=kind, privacy__sketch_rank=rank)
        run(settings, tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        pairs = {k: (tensors[k.replace("lora_A", "lora_B")], a) for k, a in tensors.items() if "lora_A" in k}
        found[name] = {k: b @ a for k, (b, a) in pairs.items()}
        if name != "plain":
            assert all(len(a) == min(rank or 9, len(b), a.shape[1]) for b, a in pairs.values())
        if name == "some":
            assert (
                "each module's sum is exact up to rank 5, and what it has beyond up to rank 10 is lost"
                in describe(settings).lines()
            )
    off = {
        name: sum(float(((one - found["plain"][k]) ** 2).sum()) for k, one in products.items())
        for name, products in found.items()
    }
    size = sum(float((one**2).sum()) for one in found["plain"].values())
    best = sum(float((np.linalg.svd(one, compute_uv=False)[5:] ** 2).sum()) for one in found["plain"].values())
    # The best one is met to the rounding of fp32 factors.
    assert off["all"] < 1e-10 * size < (1.0 - 1e-6) * best < off["some"] < 2.0 * best
