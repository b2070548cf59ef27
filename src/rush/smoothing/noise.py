"""Smoothing noise, one object for training, certification, prediction and attacks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rush.runtime.numbers import sigma_of


@dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian noise of standard deviation ``sigma`` > 0 in [0, 1] pixel units, never clipped."""

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def sample(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
        """Draw noise of ``shape``, float32 on the generator's device."""
        return self.fill(torch.empty(shape, dtype=torch.float32, device=generator.device), generator)

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out``, float32 on the generator's device, with the noise that ``sample`` draws, and return it."""
        return out.normal_(generator=generator).mul_(self.sigma)
