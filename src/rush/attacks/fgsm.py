"""The fast gradient method (Goodfellow et al. 2015)."""

from torch import Tensor

from rush.attacks.gradient import LogProbs, loss_and_gradient
from rush.attacks.losses import Loss, cross_entropy
from rush.attacks.threat import ThreatModel


def fgsm(log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss = cross_entropy) -> Tensor:
    """Return points (B, C, H, W) one step of size epsilon from ``x`` along the steepest ascent of ``loss``.

    The points are projected into the ball and into [0, 1].

    Cost: one forward and one backward pass through ``log_probs``.
    """
    _, gradient = loss_and_gradient(log_probs, x, y, loss)
    return threat.project(x + threat.step(gradient, 1.0, x), x)
