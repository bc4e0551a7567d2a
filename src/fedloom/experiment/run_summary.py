"""What a finished run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.reporting.privacy import privacy_line
from fedloom.wording import Displayed, counted, counted_rounds, written_bytes


@dataclass(frozen=True)
class RunSummary(Displayed):
    """What a finished run came to; ``start_rounds`` of its rounds trained nothing."""

    folder: Path
    method: str
    seed: int
    num_rounds: int
    base_eval: Mapping[str, Any]
    eval: Mapping[str, Any]
    upload_bytes: int
    download_bytes: int
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    aggregation_noise: float | None
    rank: int
    privacy: Mapping[str, Any] | None = None
    start_rounds: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**self.__dict__, "folder": str(self.folder), "base_eval": dict(self.base_eval), "eval": dict(self.eval)}

    def lines(self) -> list[str]:
        """Return the summary for people."""
        rounds = counted_rounds(self.num_rounds - self.start_rounds, self.start_rounds)
        lines = [f"{self.method}, seed {self.seed}: {rounds} in {self.seconds:.1f} s"]
        if "loss_nats" in self.eval:
            before = f" (base {self.base_eval['loss_nats']:.4f})" if "loss_nats" in self.base_eval else ""
            tokens = f"{self.eval['num_loss_tokens']:,} tokens of {self.eval['num_rows']:,} rows"
            lines.append(f"held-out loss {self.eval['loss_nats']:.4f} nats per token{before} on {tokens}")
        if (found := self.eval.get("clients")) is not None:
            under = "its own adapter" if found["adapter"] == "own" else "the global adapter"
            lines.append(
                f"on own rows of {counted(found['num_clients'], 'client')}, each under {under}: mean loss "
                f"{found['loss_nats']:.4f} ({found['loss_nats_by_rows']:.4f} by rows), a tenth at or above "
                f"{found['loss_nats_worst_tenth']:.4f} ({found['loss_nats_worst_tenth_by_rows']:.4f} by rows), worst "
                f"{found['loss_nats_worst']:.4f}"
            )
        for suite, scores in self.eval.get("suites", {}).items():
            figures = ", ".join(f"{name} {found['value']:.4f}" for name, found in scores["metrics"].items())
            lines.append(f"{suite}: {figures}")
        up, down = written_bytes(self.upload_bytes), written_bytes(self.download_bytes)
        device = self.peak_device_memory_bytes
        of_device = "" if device is None else f", of the device {written_bytes(device)} in one round"
        lines.append(f"bytes up {up}, down {down}; peak memory {written_bytes(self.peak_memory_bytes)}{of_device}")
        if self.aggregation_noise is not None:
            lines.append(f"aggregation noise of the last round {self.aggregation_noise:.3g}")
        if self.privacy is not None:
            lines.append(privacy_line(self.privacy))
        return lines
