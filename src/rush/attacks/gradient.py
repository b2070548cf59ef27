"""What an attack sees of a model: a function from images to log-probabilities, one for each kind of attacker.

Random ones draw anew at every call and offer ``pinned``: the same function with one draw kept, so that two points are
compared on common random numbers.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.attacks.losses import Loss
from rush.runtime.execution import Execution, foreign_call
from rush.smoothing.classifier import SmoothedClassifier, mean_log_softmax

LogProbs: TypeAlias = Callable[[Tensor], Tensor]

_SEEDS = 2**31  # NumPy's global generator takes 32 bits


@runtime_checkable
class RandomLogProbs(Protocol):
    """Log-probabilities that draw at every call."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def pinned(self) -> LogProbs:
        """The same function with one new draw, kept for all calls with as many images."""
        ...


def is_random(log_probs: LogProbs) -> bool:
    """Whether ``log_probs`` draws at every call."""
    return isinstance(log_probs, RandomLogProbs)


def pinned(log_probs: LogProbs) -> LogProbs:
    """``log_probs`` with one new draw kept (common random numbers); itself where nothing is random."""
    return log_probs.pinned() if isinstance(log_probs, RandomLogProbs) else log_probs


def plain(model: nn.Module, execution: Execution) -> LogProbs:
    """The network itself, without noise."""
    return lambda x: F.log_softmax(execution.logits(model, x), dim=1)


def fresh_noise(
    smoothed: SmoothedClassifier, eot_samples: int, generators: Sequence[torch.Generator], antithetic: bool = True
) -> LogProbs:
    """Log of the mean softmax over ``eot_samples`` new noise draws an image at every call, one generator an image
    (EOT).

    antithetic: draws come in pairs z and -z. The mean stays that of the noise, since its law is symmetric, and what is
    linear in the noise cancels: fewer draws give the same gradient (``benchmarks/attacks.py gradient``).
    """
    return _FreshNoise(smoothed, eot_samples, generators, antithetic)


def frozen_noise(
    smoothed: SmoothedClassifier, x: Tensor, eot_samples: int, generators: Sequence[torch.Generator]
) -> LogProbs:
    """The smoothed classifier with noise drawn once for the images ``x`` and kept for all calls.

    An attack on it fits those draws: it flatters the defence. It is the first form of the first author's published
    attack.
    """
    noise, logits = smoothed.sample_noise(x, eot_samples, generators), smoothed.differentiable()
    return lambda points: smoothed.log_probs_at(points, noise, logits)


def fresh_draws(model: nn.Module, execution: Execution, eot_samples: int, generator: torch.Generator) -> LogProbs:
    """Log of the mean softmax over ``eot_samples`` calls of a network that draws by itself, new ones at every call.

    Every draw is a call of its own: a network may draw once for all rows of a call. It draws from the process's own
    generators, which are seeded from ``generator`` (on the CPU) for every mean and put back behind it.
    """
    return _FreshDraws(model, execution, eot_samples, generator)


def with_surrogate(log_probs: LogProbs, surrogate: LogProbs) -> LogProbs:
    """The value of ``log_probs`` with the derivative of ``surrogate``: backward pass differentiable approximation
    (BPDA, Athalye et al. 2018), for models that have no useful gradient of their own."""
    return _WithSurrogate(log_probs, surrogate) if is_random(log_probs) else _Through(log_probs, surrogate)


def loss_and_gradient(log_probs: LogProbs, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Loss (B,) at ``x`` and its gradient (B, C, H, W); one forward and one backward pass through ``log_probs``.

    The gradient is 0 where the loss does not depend on ``x`` at all.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = loss(log_probs(x), y)
        if not values.requires_grad:
            return values, torch.zeros_like(x)
        with foreign_call(x):
            (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    return values.detach(), torch.zeros_like(x) if gradient is None else gradient


@dataclass(frozen=True)
class GradientStatistics:
    """Of the gradient g of one noise draw, for each image: ``signal`` (B,) = ||E g||^2 and ``noise`` (B,) = E||g - E
    g||^2, both float64."""

    signal: Tensor
    noise: Tensor

    def draws_for(self, cosine: float) -> Tensor:
        """Independent draws (B,) after which the mean gradient has this cosine with the expected one, on average.

        With m draws cos^2 is about signal / (signal + noise / m). Infinite where no signal was seen: that all draws are
        flat says nothing of those that were not drawn.
        """
        ratio = torch.where(self.signal > 0, self.noise / self.signal, torch.inf)
        return ratio * cosine**2 / (1 - cosine**2)


def gradient_statistics(
    smoothed: SmoothedClassifier,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    generators: Sequence[torch.Generator],
    draws: int = 64,
) -> GradientStatistics:
    """Signal and noise of the gradient of ``loss`` of the mean softmax at ``x`` (B, C, H, W), from ``draws`` draws.

    Every draw's share of the gradient is got from one backward pass, as the derivative by its own noisy copy. Both
    figures are unbiased but for the loss's curvature in the mean; a negative estimate of the signal becomes 0. Cost:
    B x draws forward+backward passes.
    """
    logits, shares = smoothed.differentiable(), []
    for row in range(len(x)):
        noise = smoothed.sample_noise(x[row : row + 1], draws, generators[row : row + 1]).to(x.device)
        noisy = (x[row : row + 1, None] + noise).flatten(0, 1).requires_grad_(True)
        with torch.enable_grad():
            value = loss(mean_log_softmax(logits(noisy), 1), y[row : row + 1]).sum()
            with foreign_call(noisy):
                (gradient,) = torch.autograd.grad(value, noisy)
        shares.append((draws * gradient).flatten(1).double())
    squared = torch.stack([share.square().sum(1).mean() for share in shares])
    mean_squared = torch.stack([share.mean(0).square().sum() for share in shares])
    signal = ((draws * mean_squared - squared) / (draws - 1)).clamp(min=0)
    return GradientStatistics(signal, squared - signal)


class _FreshNoise:
    def __init__(
        self, smoothed: SmoothedClassifier, eot_samples: int, generators: Sequence[torch.Generator], antithetic: bool
    ) -> None:
        self._noise, self._logits = smoothed.noise, smoothed.differentiable()
        self._samples, self._generators = eot_samples, generators
        self._antithetic = antithetic and eot_samples % 2 == 0

    def __call__(self, x: Tensor) -> Tensor:
        return self._at(x, self._draw(x))

    def pinned(self) -> LogProbs:
        kept: list[Tensor] = []

        def at(x: Tensor) -> Tensor:
            if not kept:
                kept.append(self._draw(x))
            return self._at(x, kept[0])

        return at

    def _at(self, x: Tensor, noise: Tensor) -> Tensor:
        return mean_log_softmax(self._logits((x[:, None] + noise).flatten(0, 1)), len(x))

    def _draw(self, x: Tensor) -> Tensor:
        """Noise (B, m, C, H, W) on the device of ``x``, drawn into one tensor."""
        half = self._samples // 2 if self._antithetic else self._samples
        noise = torch.empty((len(x), self._samples, *x.shape[1:]), device=self._generators[0].device)
        for rows, generator in zip(noise, self._generators, strict=True):
            self._noise.fill(rows[:half], generator)
        if self._antithetic:
            torch.neg(noise[:, :half], out=noise[:, half:])
        return noise.to(x.device)


class _FreshDraws:
    def __init__(self, model: nn.Module, execution: Execution, eot_samples: int, generator: torch.Generator) -> None:
        self._model, self._execution = model, execution
        self._samples, self._generator = eot_samples, generator

    def __call__(self, x: Tensor) -> Tensor:
        return self._at(x, self._seed())

    def pinned(self) -> LogProbs:
        seed = self._seed()
        return lambda x: self._at(x, seed)

    def _at(self, x: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            draws = [self._execution.logits(self._model, x) for _ in range(self._samples)]
        return mean_log_softmax(torch.stack(draws, 1).flatten(0, 1), len(x))

    def _seed(self) -> int:
        return draw_seed(self._generator)


class _Through:
    def __init__(self, value: LogProbs, slope: LogProbs) -> None:
        self._value, self._slope = value, slope

    def __call__(self, x: Tensor) -> Tensor:
        slope = self._slope(x)
        with torch.no_grad():
            shift = self._value(x) - slope
        return slope + shift


class _WithSurrogate(_Through):
    def pinned(self) -> LogProbs:
        return _Through(pinned(self._value), pinned(self._slope))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context the process's generators (torch, NumPy, Python) start from ``seed``; put back behind it."""
    before, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a foreign network may draw from it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(legacy)  # noqa: NPY002


def draw_seed(generator: torch.Generator) -> int:
    """A seed for ``seeded``, drawn from ``generator`` on the CPU."""
    return int(torch.randint(_SEEDS, (), generator=generator))
