"""Gradient ascent on images inside training; the attacks of the evaluation are those of ``rush.attacks``."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of the scalar ``loss`` at these points; no ``.grad`` is filled and no graph is kept."""
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        return torch.autograd.grad(loss(point), point)[0]


def signed_ascent(
    loss: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """Return the last iterate of l-inf ascent on ``loss``, inside the ball around ``x`` and [0, 1]; no gradients."""
    adversarial = start
    for _ in range(steps):
        moved = adversarial + step_size * gradient(loss, adversarial).sign()
        adversarial = moved.clamp(x - epsilon, x + epsilon).clamp(0.0, 1.0)
    return adversarial
