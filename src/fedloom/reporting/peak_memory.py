"""The most memory that was held: by the process so far, and by an accelerator in one round."""

from __future__ import annotations

import sys
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peaks_of_round() -> dict[str, int | None]:
    """Return the fields of a round's record, and begin the accelerator's next round.

    ``peak_memory_bytes`` is the process's high-water mark so far, which nothing can reset;
    ``peak_device_memory_bytes`` what tensors held at most on one CUDA device since the last call, None without one.
    """
    peaks = {"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": _peak_device_memory_bytes()}
    reset_device_peak()
    return peaks


def peak_memory_bytes() -> int:
    """Return the most memory this process ever held resident."""
    if resource is None:
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().peak_wset)
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high_water if sys.platform == "darwin" else high_water * 1024


def reset_device_peak() -> None:
    """Forget what accelerators held before, so that a first round's peak is its own."""
    if (cuda := _cuda_in_use()) is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _peak_device_memory_bytes() -> int | None:
    cuda = _cuda_in_use()
    if cuda is None:
        return None
    return max(int(cuda.max_memory_allocated(device)) for device in range(cuda.device_count()))


def _cuda_in_use() -> Any:
    """Return ``torch.cuda`` where somebody has used it; torch is not loaded, nor CUDA started, to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
