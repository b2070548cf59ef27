"""The momentum iterative fast gradient method (Dong et al. 2018)."""

from torch import Tensor

from rush.attacks.gradient import LogProbs
from rush.attacks.losses import Loss, cross_entropy
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel


def mifgsm(
    log_probs: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | None = None,
    decay: float = 1.0,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Maximise ``loss`` in the ball by steps along the steepest ascent for a decayed sum of gradients.

    g_{t+1} = decay g_t + gradient / ||gradient||_1, followed by a step of ``step_size`` x epsilon along the steepest
    ascent for g (Dong et al. 2018, algorithm 1, equation 9 for l2). The sum averages the noise of a stochastic
    ``log_probs``.

    Args:
        log_probs, x, y, threat, steps, start, loss: as for ``pgd``.
        step_size: share of epsilon, by default 1 / steps, so that the last step can just reach the edge of the ball.
        decay: factor on the sum per step.

    Returns:
        Two candidates per image, (best, last), both (B, C, H, W) in the ball and in [0, 1], as from ``pgd``.

    Cost: steps + 1 forward and ``steps`` backward passes through ``log_probs``.
    """
    share = 1 / steps if step_size is None else step_size
    return pgd(log_probs, x, y, threat, steps=steps, step_size=share, start=start, loss=loss, decay=decay)
