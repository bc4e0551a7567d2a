"""What threads may do with a base: how many compute it, and that one builds a model at a time."""

from __future__ import annotations

import threading

import torch

BUILDING = threading.RLock()
"""Held while transformers builds or loads a model.

It replaces functions of its own classes for that time and puts back what it found. Two threads that overlap put back
each other's replacement, and from then on no model of the process has its tied weights.
"""


def compute_with(threads: int) -> None:
    """Let torch divide an operation among ``threads`` threads of this process, whatever the environment asks for.

    Sums round by how they are divided, so the number is a setting and no guess.
    """
    torch.set_num_threads(threads)
