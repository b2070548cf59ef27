"""Gradient ascent on images inside training. The attacks of the evaluation are those of ``rush.attacks``."""

from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-12  # least divisor of a gradient or change; below it, nothing moves


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of the scalar ``loss`` at these points. No ``.grad`` is filled and no graph is kept."""
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        return torch.autograd.grad(loss(point), point)[0]


def signed_ascent(
    loss: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """Return the last iterate, without graph, of l-inf ascent on ``loss`` inside the ball around ``x`` and [0, 1]."""
    adversarial = start
    for _ in range(steps):
        moved = adversarial + step_size * gradient(loss, adversarial).sign()
        adversarial = moved.clamp(x - epsilon, x + epsilon).clamp(0.0, 1.0)
    return adversarial


def l2_ascent(
    loss: Callable[[Tensor], Tensor],
    centre: Tensor,
    epsilon: float | Tensor,
    steps: int,
    restrict: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the last iterate, without graph, of l2 ascent on ``loss`` from ``centre`` inside the ball around it.

    Each of the ``steps`` has length 2 epsilon / steps along the gradient and is followed by ``restrict`` and then by
    the ball.
    """
    point = centre
    for _ in range(steps):
        ascent = gradient(loss, point)
        change = restrict(point + 2 * epsilon / steps * (ascent / l2_norms(ascent))) - centre
        # The reciprocal is how torch divides a number by a tensor; a tensor in place of the number must round alike.
        point = centre + change * (l2_norms(change).reciprocal() * epsilon).clamp(max=1.0)
    return point


def l2_norms(images: Tensor) -> Tensor:
    """Return the l2 norm of every image (N, 1, 1, 1), as a divisor, never below ``_SMALLEST_NORM``."""
    return images.flatten(1).norm(dim=1).clamp(min=_SMALLEST_NORM).view(-1, 1, 1, 1)
