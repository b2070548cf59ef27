"""Smoothing noise, one object for training, certification, prediction and attacks."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from rush.choices import NoiseName
from rush.runtime.numbers import sigma_of
from rush.smoothing.discrete import DiscreteGaussian


@dataclass(frozen=True)
class RealNoise(ABC):
    """Independent noise of standard deviation ``sigma`` > 0 in every pixel, in [0, 1] pixel units, never clipped.

    It is drawn and added in float32. Certificates under it hold up to that rounding, see ``DiscreteGaussian``.
    """

    name: ClassVar[NoiseName]
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def check(self, x: Tensor) -> None:  # noqa: B027 - most noises need no more
        """Accept any images: real-valued noise needs no grid."""

    @abstractmethod
    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out``, float32 on the generator's device, with the noise that ``sample`` draws, and return it."""

    def sample(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
        """Draw noise of ``shape``, float32 on the generator's device."""
        return self.fill(torch.empty(shape, dtype=torch.float32, device=generator.device), generator)

    def add(self, pixels: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` (B, C, H, W) with noisy copies of ``pixels`` (C, H, W), and return it."""
        return self.fill(out, generator).add_(pixels)


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


Noise: TypeAlias = RealNoise | DiscreteGaussian

_NOISES: dict[NoiseName, type[Noise]] = {noise.name: noise for noise in (Gaussian, DiscreteGaussian, Uniform, Laplace)}


def make_noise(name: NoiseName, sigma: float) -> Noise:
    """Return the noise called ``name`` with standard deviation ``sigma``."""
    return _NOISES[name](sigma)
