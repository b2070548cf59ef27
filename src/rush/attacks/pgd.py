"""Projected gradient descent (Madry et al. 2018)."""

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, loss_and_gradient
from rush.attacks.losses import Loss, cross_entropy
from rush.attacks.threat import ThreatModel


def pgd(
    log_probs: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
    decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Two candidates for each image, (best, last), both (B, C, H, W) in the ball and in [0, 1].

    ``steps`` steps of ``step_size`` x epsilon along the steepest ascent of ``loss``, projected after each. ``best`` is
    the iterate, start included, with the largest loss that was measured; ``last`` is the final one. On a random
    ``log_probs`` a measured maximum may be luck, so the caller compares the two on other noise.

    x: (B, C, H, W) in [0, 1]; y: (B,); start: where to begin, ``x`` by default. step_size: share of epsilon. decay:
    steps follow the sum of all gradients so far, each scaled to l1 norm 1 and decayed by this once a step.
    Cost: steps + 1 forward and ``steps`` backward passes through ``log_probs``. Nothing here is random but
    ``log_probs``.
    """
    adversarial = x if start is None else threat.project(start, x)
    best, best_loss = adversarial, torch.full((len(x),), -torch.inf, device=x.device)
    direction = torch.zeros_like(x)
    for _ in range(steps):
        values, gradient = loss_and_gradient(log_probs, adversarial, y, loss)
        best, best_loss = _better(best, best_loss, adversarial, values)
        direction = gradient if decay is None else decay * direction + _scaled(gradient)
        adversarial = threat.project(adversarial + threat.step(direction, step_size, adversarial), x)
    with torch.no_grad():
        values = loss(log_probs(adversarial), y)
    best, _ = _better(best, best_loss, adversarial, values)
    return best, adversarial


def _better(best: Tensor, best_loss: Tensor, point: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    better = values > best_loss
    return torch.where(better.view(-1, 1, 1, 1), point, best), torch.where(better, values, best_loss)


def _scaled(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().flatten(1).sum(1).clamp(min=1e-30).view(-1, 1, 1, 1)
