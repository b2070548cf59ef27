"""Projected gradient descent (Madry et al. 2018)."""

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, loss_and_gradient
from rush.attacks.losses import Loss, cross_entropy
from rush.attacks.threat import ThreatModel, choose


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
    """Maximise ``loss`` in the ball by steps along the steepest ascent, each followed by a projection.

    On a stochastic ``log_probs`` the largest measured loss is partly luck, so the caller compares the two candidates on
    fresh noise.

    Args:
        log_probs: the attacked function, (B, C, H, W) -> (B, K).
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        threat: the ball.
        steps: number of steps.
        step_size: length of a step as a share of epsilon.
        start: first point (default ``x``), projected into the ball.
        loss: the objective.
        decay: if given, steps follow the sum of all gradients so far, each scaled to l1 norm 1 and multiplied by this
            factor at every later step.

    Returns:
        Two candidates per image, (best, last), both (B, C, H, W) in the ball and in [0, 1]. ``best`` is the iterate
        with the largest measured loss, the start included, and ``last`` is the final iterate.

    Random: nothing but ``log_probs``.

    Cost: steps + 1 forward and ``steps`` backward passes through ``log_probs``.
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
    return choose(better, point, best), choose(better, values, best_loss)


def _scaled(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().flatten(1).sum(1).clamp(min=1e-30).view(-1, 1, 1, 1)
