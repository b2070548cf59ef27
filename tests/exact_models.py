"""Classifiers whose adversarial distances and smoothed probabilities are known exactly: the oracles of the tests."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from rush.attacks.threat import ThreatModel, norms

# Tiles that a network sees beside its first votes: the same ones again, half of the rows replaced, all of them moved.
DOOR_TILES = 3


class HalfSpace(nn.Module):
    """Class 1 where w.x + b > 0, else class 0. weight: (C, H, W).

    Under N(0, sigma^2 I) its probability of class 1 is Phi(margin / sigma) with margin = (w.x + b) / ||w||_2, which is
    also the certified radius of the smoothed classifier when every probability is known.
    """

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = bias
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight.flatten() + self.bias
        return torch.stack([-score, score], 1)

    def scores(self, x: Tensor) -> NDArray[np.float64]:
        """w.x + b in float64, (N,)."""
        weight = self.weight.detach().double().flatten()
        return (x.double().flatten(1) @ weight + self.bias).numpy()

    def margins(self, x: Tensor) -> NDArray[np.float64]:
        """Signed l2 distances (N,) to the plane, positive on the side of class 1."""
        return self.scores(x) / float(self.weight.detach().double().norm())

    def linf_distances(self, x: Tensor) -> NDArray[np.float64]:
        """l-inf distances (N,) to the plane, when the nearest point is within [0, 1]."""
        return np.abs(self.scores(x)) / float(self.weight.detach().double().abs().sum())

    def probability(self, x: Tensor, sigma: float) -> NDArray[np.float64]:
        """P(class 1) under Gaussian noise, (N,)."""
        return stats.norm.cdf(self.margins(x) / sigma)


class Bins(nn.Module):
    """Class = number of ``thresholds`` below the first pixel: K classes of exactly known probability."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.thresholds = tuple(thresholds)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        above = sum((x[:, 0, 0, 0] > threshold).long() for threshold in self.thresholds)
        return nn.functional.one_hot(torch.as_tensor(above), len(self.thresholds) + 1).float()


class PixelVote(nn.Module):
    """The pixel with the largest value is the class: the same vote in every batch, since nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Later(nn.Module):
    """``PixelVote`` that adds ``value`` times the class to its logits from the tenth call on, after the inspection."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = value, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits = x.flatten(1)
        return logits + (self.value if self.calls >= 10 else 0.0) * torch.arange(logits.shape[1])


class Recorder(nn.Module):
    """``inner``, keeping every batch it is given, and counting rows forward and backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inputs: list[Tensor] = []
        self.forward_rows = 0
        self.backward_rows = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        self.forward_rows += len(x)
        logits = self.inner(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_rows += len(gradient)


def bins_with(probabilities: Sequence[float], sigma: float) -> tuple[Bins, Tensor]:
    """A ``Bins`` and an image (1, 1, 1, 1) of 0.5 at which its classes have these ``probabilities`` under noise."""
    quantiles = stats.norm.ppf(np.cumsum(probabilities)[:-1])
    return Bins([0.5 + sigma * float(q) for q in quantiles]), torch.full((1, 1, 1, 1), 0.5)


def square_half_space() -> HalfSpace:
    """On 1x2x2 images: (x1 + x2 + x3 + x4) / 2 > 1, a plane through the middle with ||w||_2 = 1."""
    return HalfSpace(torch.full((1, 2, 2), 0.5), -1.0)


def square_images(margins: NDArray[np.float64], seed: int) -> Tensor:
    """Distinct images (N, 1, 2, 2) at these ``margins`` (within +-0.8) from the plane of ``square_half_space``.

    The shifts along the plane are multiples of 2^-20, so that at margin 0 the sum of the pixels is exact.
    """
    draws = np.random.default_rng(seed)
    first, second = draws.integers(-90_000, 90_000, (2, len(margins))) / 2.0**20
    along = np.stack([first, -first, second, -second], 1)
    x = torch.from_numpy(0.5 + 0.5 * margins[:, None] + along).float().view(-1, 1, 2, 2)
    assert x.min() >= 0
    assert x.max() <= 1
    assert len(np.unique(x.flatten(1).numpy(), axis=0)) == len(x)
    return x


def assert_in_threat(points: Tensor, x: Tensor, threat: ThreatModel) -> None:
    """Every point is finite, within [0, 1] and within its ball; one part in 10^5 is left for float32, in l1 also 6e-8 a
    pixel."""
    size = norms(points, x, threat.norm)
    epsilon = torch.as_tensor(threat.epsilon).double()
    rounding = 6e-8 * x[0].numel() if threat.norm == "l1" else 1e-7
    assert bool(points.isfinite().all())
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    assert bool((size <= epsilon * (1 + 1e-5) + rounding).all())
