"""What an attack sees of a model: a function from images to log-probabilities, one for each kind of attacker."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.attacks.losses import Loss
from rush.engine.precision import Execution
from rush.smoothing import SmoothedClassifier

LogProbs: TypeAlias = Callable[[Tensor], Tensor]


def plain(model: nn.Module, execution: Execution) -> LogProbs:
    """The network itself, without noise."""
    return lambda x: F.log_softmax(execution.logits(model, x), dim=1)


def fresh_noise(smoothed: SmoothedClassifier, eot_samples: int, generators: Sequence[torch.Generator]) -> LogProbs:
    """The smoothed classifier with ``eot_samples`` new noise draws an image at every call, one generator an image
    (EOT)."""
    return lambda x: smoothed.log_probs(x, eot_samples, generators)


def frozen_noise(
    smoothed: SmoothedClassifier, x: Tensor, eot_samples: int, generators: Sequence[torch.Generator]
) -> LogProbs:
    """The smoothed classifier with noise drawn once for the images ``x`` and kept for all calls.

    An attack on it fits those draws: it flatters the defence. It is the first form of the first author's published
    attack.
    """
    noise = smoothed.sample_noise(x, eot_samples, generators)
    return lambda points: smoothed.log_probs_at(points, noise)


def loss_and_gradient(log_probs: LogProbs, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Loss (B,) at ``x`` and its gradient (B, C, H, W); one forward and one backward pass through ``log_probs``."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = loss(log_probs(x), y)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient
