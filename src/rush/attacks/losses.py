"""Losses that attacks climb: per image, on log-probabilities."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(log_probs: Tensor, y: Tensor) -> Tensor:
    """-log p_y, (B,), from log-probabilities (B, K)."""
    return -log_probs.gather(1, y[:, None])[:, 0]


def margin(log_probs: Tensor, y: Tensor) -> Tensor:
    """Largest other log-probability minus the label's, (B,): positive exactly where the label is not the most probable
    class."""
    own = log_probs.gather(1, y[:, None])[:, 0]
    others = log_probs.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own
