"""Smoothing noise, one object for training, certification, prediction and attacks."""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from rush.choices import NoiseName
from rush.runtime.numbers import sigma_of
from rush.smoothing.discrete import DiscreteGaussian


@dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian noise of standard deviation ``sigma`` > 0 in [0, 1] pixel units, never clipped.

    It is drawn and added in float32. Certificates under it hold up to that rounding, see ``DiscreteGaussian``.
    """

    name: ClassVar[NoiseName] = "gaussian"
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def check(self, x: Tensor) -> None:
        """Accept any images: real-valued noise needs no grid."""

    def sample(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
        """Draw noise of ``shape``, float32 on the generator's device."""
        return self.fill(torch.empty(shape, dtype=torch.float32, device=generator.device), generator)

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out``, float32 on the generator's device, with the noise that ``sample`` draws, and return it."""
        return out.normal_(generator=generator).mul_(self.sigma)

    def add(self, pixels: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` (B, C, H, W) with noisy copies of ``pixels`` (C, H, W), and return it."""
        return self.fill(out, generator).add_(pixels)


Noise: TypeAlias = Gaussian | DiscreteGaussian

_NOISES: dict[NoiseName, type[Noise]] = {noise.name: noise for noise in (Gaussian, DiscreteGaussian)}


def make_noise(name: NoiseName, sigma: float) -> Noise:
    """Return the noise called ``name`` with standard deviation ``sigma``."""
    return _NOISES[name](sigma)
