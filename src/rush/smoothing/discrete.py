"""Discrete Gaussian noise on 8-bit images, under which a certificate holds in floating point too.

A certificate for Gaussian noise is about real numbers, but a network under float32 noise sees float32 sums, whose
distribution depends on the image in ways that no theorem about real numbers covers. Voracek and Hein (2023) construct
networks that get false certificates in this way. In this module, rounding is part of the base classifier.

Let F be the network as a function of integer images s = 255 x, e ~ N(0, sigma^2 I) and F'(y) = F(round(255 y)). F' is a
function of real vectors like any other, so Cohen's theorem holds for F' under e (``certification.bounds``). If x is an
8-bit image, round(255 (x + e)) = 255 x + round(255 e), where the entries of k = round(255 e) are independent integers:

    P(k = j) = Phi((j + 1/2) / (255 sigma)) - Phi((j - 1/2) / (255 sigma)).

The network gets the sums 255 x + k, each computed exactly and converted to one float32. The votes are therefore those
of the classifier that the certificate is about. The certificate holds for every change of the image within the radius
that leads to another 8-bit image. Sums are not clipped. A network that clips or rounds its input is an F like any
other.

Drawing k, in -J..J: k + J is the number of thresholds T_j = Phi((j + 1/2) / (255 sigma)), j = -J..J - 1, at or below a
uniform u. The thresholds are computed in integer arithmetic, and u is drawn, to 120 bits. Noise beyond +-J is moved to
+-J, where J is so large that its probability is about 1e-16 or less. The total variation between drawn and exact noise
is thus known (``DiscreteGaussian.total_variation``): 1e-13 for CIFAR-10 at sigma = 1. Bounds that certify leave room
for up to 2e-11 (``choices.TOTAL_VARIATION``), and larger images or deviations are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import isqrt
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rush.choices import LEVELS, TOTAL_VARIATION, NoiseName
from rush.data.checks import ROUNDING
from rush.errors import InputError
from rush.smoothing.base import Noise

_HIGH, _LOW, _CELL = 60, 60, 16  # bits of the two words of a uniform, and of the part by which most draws are decided
_WORK = 256  # fractional bits with which the thresholds are computed
_PI_DIGITS = 101
_PI = 314159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798
_OPEN = -(2**15)  # in ``by_cell``, minus the index of the first threshold in the cell
_PART = 1 << 20  # values of an image drawn together on a CPU, which bounds the memory of large ones
_TOGETHER = 1 << 16  # values of several images drawn together, which fit into the caches
_LARGEST_Z, _TAIL = 10, 1 << 44  # 1 - Phi(10) < 2^-76
_LARGEST_SIGMA = 14  # so that noise stays above _OPEN


@dataclass(frozen=True)
class DiscreteGaussian(Noise):
    """Gaussian noise of standard deviation ``sigma`` > 0 in [0, 1] pixel units, rounded to multiples of 1/255.

    Images under it are 8-bit images: every pixel is a multiple of 1/255, up to the rounding of float32.

    Raises:
        InputError: ``sigma`` is not in (0, 14].
    """

    name: ClassVar[NoiseName] = "discrete"
    eight_bit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma > _LARGEST_SIGMA:
            raise InputError(
                f"sigma of discrete noise must be at most {_LARGEST_SIGMA} in [0, 1] pixel units, got {self.sigma:g}"
            )

    def check(self, x: Tensor) -> None:
        """Raise InputError unless ``x`` (B, C, H, W) are 8-bit images, of a size for which the bounds leave room."""
        levels_of(x)
        values = x[0].numel() if len(x) else 0
        if self.total_variation(values) > TOTAL_VARIATION:
            raise InputError(
                f"discrete noise of sigma = {self.sigma:g} on {values:,} values per image is drawn to within "
                f"{self.total_variation(values):.2g} in total variation, more than the {TOTAL_VARIATION:g} that the "
                "bounds leave room for; give smaller images or a smaller sigma"
            )

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return self.integers(out, generator).div_(LEVELS)

    def fill_each(self, out: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Fill ``out`` as ``Noise.fill_each`` does. On a CPU small rows are drawn together, with the same bits."""
        together = _TOGETHER * len(out) // max(1, out.numel())
        if together < 2 or generators[0].device.type != "cpu":
            super().fill_each(out, generators)
            return
        thresholds = _thresholds(self.sigma, torch.device("cpu"))
        for first in range(0, len(out), together):
            rows, own = out[first : first + together], generators[first : first + together]
            rows.copy_(thresholds.drawn_by_cell(rows[0].numel(), own).div_(LEVELS).view(rows.shape))

    def add(self, pixels: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` as ``Noise.add``.

        Pixels and noise are added as integers, which float32 holds exactly, and every sum is divided by 255 once.
        """
        return self.integers(out, generator).add_(_rounded(pixels)).div_(LEVELS)

    def integers(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out``, float32 on the generator's device, with round(255 e) for e ~ N(0, sigma^2), and return it."""
        thresholds = _thresholds(self.sigma, generator.device)
        if generator.device.type == "cpu":
            for part in out.view(-1).split(_PART):
                thresholds.drawn_by_cell(len(part), [generator], out=part)
            return out
        high, low = (_uniform(out.numel(), bits, generator) for bits in (_HIGH, _LOW))
        return out.copy_(thresholds.count(high, low).view(out.shape))

    def total_variation(self, values: int) -> float:
        """Return a bound on the total variation between drawn and exact noise of ``values`` pixel values."""
        return values * _thresholds(self.sigma, torch.device("cpu")).total_variation


def levels_of(x: Tensor) -> Tensor:
    """Return the integers 0..255 of 8-bit images, float32 of the same shape.

    Raises:
        InputError: a pixel is not a multiple of 1/255, up to rounding.
    """
    levels = _rounded(x)
    distance = float((x * LEVELS - levels).abs().max()) / LEVELS if x.numel() else 0.0
    if not distance <= ROUNDING:
        raise InputError(
            "this noise needs 8-bit images, whose pixels are multiples of 1/255, got one that is "
            f"{distance:.2g} away from the nearest; round the images, x.mul(255).round().div(255), or smooth with "
            "real-valued noise, rush.Gaussian"
        )
    return levels


@dataclass(frozen=True)
class _Thresholds:
    """Thresholds Phi((j + 1/2) / (255 sigma)) for j = -J..J - 1, in units of 2^-120, ascending.

    Attributes:
        high: int64 (2J + 1,), the leading 60 bits, strictly ascending. The last one is never reached.
        low: int64 (2J + 1,), the other 60 bits.
        by_cell: float32 (2^16,), by the leading 16 bits of u as a signed number: the noise, if these bits decide, else
            ``_OPEN`` minus the index of the first threshold that they leave open.
        largest: J.
        total_variation: bound for one value, from the tails beyond +-J and the rounding of the thresholds.
    """

    high: Tensor
    low: Tensor
    by_cell: Tensor
    largest: int
    total_variation: float

    def count(self, high: Tensor, low: Tensor) -> Tensor:
        """Return the noise for uniforms (high, low), float32: the number of thresholds at or below, minus J."""
        below = torch.bucketize(high, self.high)  # strictly
        return (below + self._reached(below, high, low) - self.largest).to(torch.float32)

    def drawn_by_cell(self, values: int, generators: Sequence[torch.Generator], out: Tensor | None = None) -> Tensor:
        """Return noise of ``values`` from each generator, float32 (generators x values,), in ``out`` if it is given.

        Where 16 bits of a uniform do not decide, the others are drawn, too.
        """
        words = torch.empty(len(generators), -(-values // 4), dtype=torch.int64)
        for row, generator in zip(words, generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        cells = words.view(torch.int16)[:, :values].to(torch.int32).bitwise_and_(2**_CELL - 1).view(-1)
        noise = torch.index_select(self.by_cell, 0, cells, out=out)
        open_values = np.flatnonzero(noise.numpy() <= _OPEN)
        per_generator = np.bincount(open_values // max(1, values), minlength=len(generators)).tolist()
        rest, low = torch.empty(2, len(open_values), dtype=torch.int64)
        for generator, *own in zip(generators, rest.split(per_generator), low.split(per_generator), strict=True):
            for part, bits in zip(own, (_HIGH - _CELL, _LOW), strict=True):
                part.random_(0, 1 << bits, generator=generator)
        undecided = torch.from_numpy(open_values)
        first = (_OPEN - noise[undecided]).long()  # threshold in the cell
        high = (cells[undecided].long() << _HIGH - _CELL) | rest
        reached = first + self._reached(first, high, low)
        drawn = (reached - self.largest).to(torch.float32)
        further = self._reached(reached, high, low).nonzero()[:, 0]  # in the tails a cell has several thresholds
        drawn[further] = self.count(high[further], low[further])
        noise[undecided] = drawn
        return noise

    def _reached(self, index: Tensor, high: Tensor, low: Tensor) -> Tensor:
        """Return whether the thresholds at ``index`` are at or below the uniforms, bool."""
        threshold = self.high[index]
        return (threshold < high) | ((threshold == high) & (self.low[index] <= low))


@lru_cache(maxsize=16)
def _thresholds(sigma: float, device: torch.device) -> _Thresholds:
    if device.type != "cpu":
        made = _thresholds(sigma, torch.device("cpu"))
        return replace(made, high=made.high.to(device), low=made.low.to(device))
    one = 1 << _HIGH + _LOW
    step = 1 / (Fraction(sigma) * LEVELS)
    tails: list[int] = []  # 1 - T_j for j = 0, 1, ...
    for j in count():
        z = (j + Fraction(1, 2)) * step
        tail = one - _normal_cdf(z) if z < _LARGEST_Z else _TAIL
        if z >= _LARGEST_Z or (tails and (tails[-1] >> _LOW) - (tail >> _LOW) < 2):  # not ascending in 60 bits
            break
        tails.append(tail)
    ascending = [*tails[::-1], *(one - tail for tail in tails), 2 * one]
    high = torch.tensor([threshold >> _LOW for threshold in ascending])
    low = torch.tensor([threshold & (1 << _LOW) - 1 for threshold in ascending])
    starts = torch.arange(1 << _CELL) << _HIGH - _CELL
    below, until = torch.bucketize(starts, high), torch.bucketize(starts + (1 << _HIGH - _CELL), high)
    noise = torch.where(below == until, below - len(tails), _OPEN - below).to(torch.float32)
    return _Thresholds(high, low, noise, len(tails), float(Fraction(2 * tail + len(tails), one)))


def _rounded(x: Tensor) -> Tensor:
    """Return the nearest integers of 255 x."""
    return (x * LEVELS).round()


def _uniform(size: int, bits: int, generator: torch.Generator) -> Tensor:
    """Draw uniform integers in [0, 2^bits), int64 (size,)."""
    return torch.empty(size, dtype=torch.int64, device=generator.device).random_(0, 1 << bits, generator=generator)


def _normal_cdf(z: Fraction) -> int:
    """Return Phi(z) in units of 2^-120, rounded to the nearest, for 0 < z < 10.

    Phi(z) = 1/2 + (2 pi)^(-1/2) sum_n (-1)^n z^(2n+1) / (2^n n! (2n + 1)), in integers with 256 fractional bits.
    An error of one unit in a term is multiplied by at most exp(z^2 / 2) < 2^73 in the next ones, and there are fewer
    than 1,000 terms, so the sum is off by less than 2^(73 + 20 - 256) = 2^-163.
    """
    one = 1 << _WORK
    density = isqrt(one**3 * 10**_PI_DIGITS // (2 * _PI * one))  # (2 pi)^(-1/2)
    squared = z * z
    power = one * z.numerator // z.denominator  # z^(2n+1) / (2^n n!)
    total, n = 0, 0
    while power:
        total += (-1) ** n * (power // (2 * n + 1))
        n += 1
        power = power * squared.numerator // (2 * n * squared.denominator)
    value = (one >> 1) + (total * density >> _WORK)
    spare = _WORK - _HIGH - _LOW
    return value + (1 << spare - 1) >> spare
