"""Attacked functions: images to log-probabilities of a model, one form for each kind of attacker.

Stochastic functions draw new noise at every call and offer ``pinned``: the same function with one draw kept, so that
two points can be compared on common random numbers.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

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
    """Log-probabilities that draw new noise at every call."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def pinned(self) -> LogProbs:
        """Return the same function with one new draw, kept for all calls with the same number of images."""
        ...


def is_random(log_probs: LogProbs) -> bool:
    """Return whether ``log_probs`` draws new noise at every call."""
    return isinstance(log_probs, RandomLogProbs)


def pinned(log_probs: LogProbs) -> LogProbs:
    """Return ``log_probs`` with one new draw kept (common random numbers), or itself if it is deterministic."""
    return log_probs.pinned() if isinstance(log_probs, RandomLogProbs) else log_probs


def plain(model: nn.Module, execution: Execution) -> LogProbs:
    """Return the log-probabilities of the network itself, without noise."""
    return lambda x: F.log_softmax(execution.logits(model, x), dim=1)


def seeded_plain(model: nn.Module, execution: Execution, generator: torch.Generator) -> LogProbs:
    """Return ``plain`` of a network that may be stochastic.

    Random: the process's generators are seeded from ``generator`` (on the CPU) before each call and restored
    afterwards.
    """

    def at(x: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            return F.log_softmax(execution.logits(model, x), dim=1)

    return _Redrawn(lambda _: draw_seed(generator), at)


def fresh_noise(
    smoothed: SmoothedClassifier, eot_samples: int, generators: Sequence[torch.Generator], antithetic: bool = True
) -> LogProbs:
    """Return the log of the mean softmax over new noise draws at every call (EOT).

    Args:
        smoothed: the smoothed classifier.
        eot_samples: number of draws per image and call.
        generators: one per image.
        antithetic: whether to draw pairs z and -z where the noise is symmetric and ``eot_samples`` even. The
            expectation is the same, and terms linear in the noise cancel: fewer draws give an equally good gradient
            (``benchmarks/attacks.py gradient``).

    Cost: B x eot_samples passes per call.
    """
    logits = smoothed.differentiable()
    in_pairs = antithetic and smoothed.noise.symmetric and eot_samples % 2 == 0
    half = eot_samples // 2 if in_pairs else eot_samples

    def draw(x: Tensor) -> Tensor:
        noise = torch.empty((len(x), eot_samples, *x.shape[1:]), device=generators[0].device)
        smoothed.noise.fill_each(noise[:, :half], generators)
        if in_pairs:
            torch.neg(noise[:, :half], out=noise[:, half:])
        return noise.to(x.device)

    def at(x: Tensor, noise: Tensor) -> Tensor:
        return mean_log_softmax(logits(smoothed.noise.noisy(x[:, None], noise).flatten(0, 1)), len(x))

    return _Redrawn(draw, at)


def frozen_noise(
    smoothed: SmoothedClassifier, x: Tensor, eot_samples: int, generators: Sequence[torch.Generator]
) -> LogProbs:
    """Return the smoothed classifier with noise drawn once for the images ``x`` and kept for all calls.

    An attack on it overfits those draws, so the reported robustness is too high. The attack PGDRS was first
    published in this form.
    """
    noise, logits = smoothed.sample_noise(x, eot_samples, generators), smoothed.differentiable()
    return lambda points: smoothed.log_probs_at(points, noise, logits)


def fresh_draws(model: nn.Module, execution: Execution, eot_samples: int, generator: torch.Generator) -> LogProbs:
    """Return the log of the mean softmax over ``eot_samples`` calls of a stochastic network, new ones at every call.

    Every draw is a separate call, since a network may draw once for all rows of a call.

    Random: the network draws from the process's generators, which are seeded from ``generator`` (on the CPU) before
    each average and restored afterwards.
    """

    def at(x: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            draws = [execution.logits(model, x) for _ in range(eot_samples)]
        return mean_log_softmax(torch.stack(draws, 1).flatten(0, 1), len(x))

    return _Redrawn(lambda _: draw_seed(generator), at)


def with_surrogate(log_probs: LogProbs, surrogate: LogProbs) -> LogProbs:
    """Return a function with the value of ``log_probs`` and the derivative of ``surrogate``.

    This is the backward pass differentiable approximation (BPDA, Athalye et al. 2018), for models without a useful
    gradient.
    """
    return (_RandomThrough if is_random(log_probs) else _Through)(log_probs, surrogate)


def loss_and_gradient(log_probs: LogProbs, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) at ``x`` and its gradient (B, C, H, W), which is 0 where it does not depend on ``x``.

    Cost: one forward and one backward pass through ``log_probs``.
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
    """Moments of the gradient g of one noise draw.

    Attributes:
        signal: ||E g||^2 per image, (B,), float64.
        noise: E||g - E g||^2 per image, (B,), float64.
    """

    signal: Tensor
    noise: Tensor

    def draws_for(self, cosine: float) -> Tensor:
        """Return the number of independent draws (B,) whose mean gradient has this cosine with E g, on average.

        With m draws cos^2 is about signal / (signal + noise / m). The number is infinite where the estimated signal is
        0: draws that are all flat do not bound the signal.
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
    """Estimate signal and noise of the gradient of ``loss`` of the mean softmax at ``x``.

    One backward pass gives the part of every draw: the derivative with respect to its noisy copy. Both estimates are
    unbiased except for the curvature of the loss in the mean. A negative estimate of the signal becomes 0.

    Args:
        smoothed: the smoothed classifier.
        x: images (B, C, H, W).
        y: labels (B,).
        loss: the objective.
        generators: one per image.
        draws: noise draws per image.

    Cost: B x draws forward and backward passes.
    """
    logits, shares = smoothed.differentiable(), []
    for row in range(len(x)):
        noise = smoothed.sample_noise(x[row : row + 1], draws, generators[row : row + 1]).to(x.device)
        noisy = smoothed.noise.noisy(x[row : row + 1, None], noise).flatten(0, 1).requires_grad_(True)
        with torch.enable_grad():
            value = loss(mean_log_softmax(logits(noisy), 1), y[row : row + 1]).sum()
            with foreign_call(noisy):
                (gradient,) = torch.autograd.grad(value, noisy)
        # The mean weights each copy by 1 / draws, which this undoes: one gradient g per row.
        shares.append((draws * gradient).flatten(1).double())
    squared = torch.stack([share.square().sum(1).mean() for share in shares])
    mean_squared = torch.stack([share.mean(0).square().sum() for share in shares])
    # E||mean||^2 = signal + noise / draws and E||g||^2 = signal + noise, solved for the signal.
    signal = ((draws * mean_squared - squared) / (draws - 1)).clamp(min=0)
    return GradientStatistics(signal, squared - signal)


@dataclass(frozen=True)
class _Redrawn:
    """The function ``at`` of images and of what ``draw`` draws for them at every call."""

    draw: Callable[[Tensor], Any]
    at: Callable[[Tensor, Any], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.at(x, self.draw(x))

    def pinned(self) -> LogProbs:
        kept: list[Any] = []  # filled at the first call, which gives the shape

        def at_kept(x: Tensor) -> Tensor:
            if not kept:
                kept.append(self.draw(x))
            return self.at(x, kept[0])

        return at_kept


@dataclass(frozen=True)
class _Through:
    """The function ``value`` with the derivative of ``slope``."""

    value: LogProbs
    slope: LogProbs

    def __call__(self, x: Tensor) -> Tensor:
        slope = self.slope(x)
        with torch.no_grad():
            shift = self.value(x) - slope
        return slope + shift


class _RandomThrough(_Through):
    def pinned(self) -> LogProbs:
        return _Through(pinned(self.value), pinned(self.slope))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the process (torch, NumPy, Python) within the context and restore them afterwards."""
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
    """Draw a seed for ``seeded`` from ``generator`` (on the CPU)."""
    return int(torch.randint(_SEEDS, (), generator=generator))
