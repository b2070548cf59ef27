"""Networks that draw by themselves at every call, with exactly known probabilities: oracles for foreign random ones."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from exact_models import HalfSpace

_CERTAIN = 50.0  # difference of logits that float64 takes for certainty


class NoisyHalfSpace(HalfSpace):
    """``HalfSpace`` whose score gets one N(0, 1) draw times ``spread`` an image, from torch's global generator.

    P(class 1) = Phi(score / spread), so the vote changes at the plane. The mean of its probabilities does too: it is
    the expectation of an odd function of the score plus one half.
    """

    def __init__(self, weight: Tensor, bias: float, spread: float) -> None:
        super().__init__(weight, bias)
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight.flatten() + self.bias + self.spread * self.draws(len(x))
        return torch.stack([-score, score], 1)

    def draws(self, rows: int) -> Tensor:
        return torch.randn(rows)

    def chance(self, x: Tensor) -> NDArray[np.float64]:
        """P(class 1) of one draw, (N,)."""
        return stats.norm.cdf(self.scores(x) / self.spread)


class SharedNoise(NoisyHalfSpace):
    """``NoisyHalfSpace`` with one draw a call for all images of it."""

    def draws(self, rows: int) -> Tensor:
        return torch.randn(1).expand(rows)


class ManySources(NoisyHalfSpace):
    """``NoisyHalfSpace`` whose draw is the sum of torch's, NumPy's and Python's global generators, of variance 1."""

    def draws(self, rows: int) -> Tensor:
        others = torch.tensor([np.random.standard_normal() + random.gauss(0, 1) for _ in range(rows)])  # noqa: NPY002
        return ((torch.randn(rows) + others) / 3**0.5).float()


class Drawn(nn.Module):
    """Gives one of a few vectors of probabilities, drawn anew for every image with these ``weights``; ``x`` moves
    nothing.

    probabilities: one vector over the classes for each weight; 0 and 1 are met to 1e-21. shared: one draw a call.
    """

    def __init__(
        self, weights: Sequence[float], probabilities: Sequence[Sequence[float]], shared: bool = False
    ) -> None:
        super().__init__()
        self.weights, self.table = torch.tensor(weights), torch.tensor(probabilities, dtype=torch.float64)
        self.shared = shared
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.multinomial(self.weights, 1 if self.shared else len(x), replacement=True)
        logits = self.table.log().clamp(min=-_CERTAIN)[drawn.expand(len(x))]
        return logits.float() + 0 * x.flatten(1).sum(1, keepdim=True)

    @property
    def vote(self) -> NDArray[np.float64]:
        """P(most probable class of one draw = c), (K,)."""
        top = torch.nn.functional.one_hot(self.table.argmax(1), self.table.shape[1])
        return (self.weights.double()[:, None] * top).sum(0).numpy()

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean probability of each class, (K,)."""
        return (self.weights.double()[:, None] * self.table).sum(0).numpy()


def split_decision() -> Drawn:
    """Three times in five class 0 by a hair, else class 1 for sure: the vote is class 0, the mean class 1."""
    return Drawn([0.6, 0.4], [[0.55, 0.45], [0.01, 0.99]])
