"""Smoothing noise, one object for training, certification, prediction and attacks."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rush.choices import NoiseName
from rush.errors import InputError
from rush.smoothing.base import Noise
from rush.smoothing.discrete import DiscreteGaussian
from rush.smoothing.splitting import Splitting

__all__ = [
    "DiscreteGaussian",
    "Gaussian",
    "Laplace",
    "Noise",
    "RealNoise",
    "Splitting",
    "Uniform",
    "make_noise",
    "noise_of",
]


@dataclass(frozen=True)
class RealNoise(Noise):
    """Independent real-valued noise in every pixel, never clipped.

    It is drawn and added in float32. Certificates under it hold up to that rounding, see ``DiscreteGaussian``.
    """


@dataclass(frozen=True)
class Gaussian(RealNoise):
    """Isotropic Gaussian noise, for certificates in l2."""

    name: ClassVar[NoiseName] = "gaussian"

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return out.normal_(generator=generator).mul_(self.sigma)


@dataclass(frozen=True)
class Uniform(RealNoise):
    """Uniform noise on [-sigma sqrt 3, sigma sqrt 3], for certificates in l1."""

    name: ClassVar[NoiseName] = "uniform"

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        largest = math.sqrt(3) * self.sigma
        return out.uniform_(-largest, largest, generator=generator)


@dataclass(frozen=True)
class Laplace(RealNoise):
    """Laplace noise of scale sigma / sqrt 2, for certificates in l1."""

    name: ClassVar[NoiseName] = "laplace"

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        out.exponential_(math.sqrt(2) / self.sigma, generator=generator)
        signs = torch.empty(out.shape, dtype=torch.int8, device=out.device).random_(0, 2, generator=generator)
        return out.mul_(signs.mul_(2).sub_(1))


_NOISES: dict[NoiseName, type[Noise]] = {
    noise.name: noise for noise in (Gaussian, DiscreteGaussian, Uniform, Laplace, Splitting)
}


def noise_of(sigma: float | None, noise: Noise | None) -> Noise:
    """Return ``noise``, or Gaussian noise of ``sigma``. Raises: InputError unless exactly one of them is given."""
    if noise is None and sigma is not None:
        return Gaussian(sigma)
    if noise is None or sigma is not None:
        raise InputError("give either sigma or noise")
    return noise


def make_noise(name: NoiseName, sigma: float) -> Noise:
    """Return the noise called ``name`` with standard deviation ``sigma``."""
    return _NOISES[name](sigma)
