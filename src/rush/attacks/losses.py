"""Losses that attacks maximise, per image and on log-probabilities.

All except the cross-entropies are differences of log-probabilities, which equal those of the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from rush.errors import InputError
from rush.runtime.numbers import is_one_of

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["cross-entropy", "margin", "dlr"]


def cross_entropy(log_probs: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y, (B,), from log-probabilities (B, K)."""
    return -log_probs.gather(1, y[:, None])[:, 0]


def margin(log_probs: Tensor, y: Tensor) -> Tensor:
    """Return the largest other log-probability minus the label's, (B,), from (B, K).

    It is positive exactly where the label is not the most probable class.
    """
    of_label = log_probs.gather(1, y[:, None])[:, 0]
    others = log_probs.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - of_label


def dlr(log_probs: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (B,), (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), z_(j) the j-th largest.

    It is the margin made invariant to shift and scale of the logits (Croce & Hein 2020, equation 6), with the same
    sign, and needs three classes.
    """
    highest = log_probs.topk(3, dim=1).values
    return margin(log_probs, y) / (highest[:, 0] - highest[:, 2]).clamp(min=1e-12)


def targeted_cross_entropy(targets: Tensor, log_probs: Tensor, _y: Tensor) -> Tensor:
    """Return log p_t, (B,), for targets t (B,)."""
    return log_probs.gather(1, targets[:, None])[:, 0]


def targeted_margin(targets: Tensor, log_probs: Tensor, y: Tensor) -> Tensor:
    """Return z_t - z_y, (B,), for targets t (B,): positive only where the label is not the most probable class."""
    return targeted_cross_entropy(targets, log_probs, y) - targeted_cross_entropy(y, log_probs, y)


def targeted_dlr(targets: Tensor, log_probs: Tensor, y: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio (B,), (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    It is equation 7 of Croce & Hein 2020 and needs four classes.
    """
    highest = log_probs.topk(4, dim=1).values
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return targeted_margin(targets, log_probs, y) / spread.clamp(min=1e-12)


def named_loss(name: LossName, num_classes: int, targets: Tensor | None = None) -> Loss:
    """Return the loss (log_probs (B, K), y (B,)) -> (B,) of this name.

    Args:
        name: the loss.
        num_classes: K.
        targets: int64 (B,), target classes. The loss is then targeted and serves that batch of images only.

    Raises:
        InputError: The name is unknown, a target is not a class, or DLR has fewer than three classes (four with
            targets).
    """
    if not is_one_of(name, get_args(LossName)):
        raise InputError(f"unknown loss {name!r}; allowed: {', '.join(get_args(LossName))}")
    fewest = 3 if targets is None else 4
    if name == "dlr" and num_classes < fewest:
        kind = "dlr" if targets is None else "targeted dlr"
        raise InputError(
            f"{kind} compares the {fewest} most probable classes and the model has {num_classes}; use margin"
        )
    if targets is None:
        return {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr}[name]
    _check_targets(targets, num_classes)
    targeted = {"cross-entropy": targeted_cross_entropy, "margin": targeted_margin, "dlr": targeted_dlr}
    return partial(targeted[name], targets)


def _check_targets(targets: Tensor, num_classes: int) -> None:
    if targets.dtype != torch.int64 or targets.ndim != 1 or len(targets) == 0:
        raise InputError(f"targets must be int64 (B,), got {targets.dtype} of shape {tuple(targets.shape)}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"targets must be 0 to {num_classes - 1}, got {low} to {high}")
