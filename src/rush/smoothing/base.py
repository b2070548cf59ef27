"""The interface of smoothing noise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rush.choices import NoiseName
from rush.runtime.numbers import sigma_of


class Draws(torch.Generator):
    """A generator that gives the finitely many draws of a noise in turn, 0, 1, 2, ..., instead of at random."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """Return the next draws, int64 (count,)."""
        self._taken += count
        return torch.arange(self._taken - count, self._taken)


@dataclass(frozen=True)
class Noise(ABC):
    """Noise of standard deviation ``sigma`` > 0, in [0, 1] pixel units.

    Attributes:
        eight_bit: whether judged images must be 8-bit images, whose pixels are multiples of 1/255.
        symmetric: whether a draw z is as probable as -z.
    """

    name: ClassVar[NoiseName]
    eight_bit: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def check(self, x: Tensor) -> None:  # noqa: B027 - most noises take any images
        """Raise InputError unless ``x`` (B, C, H, W) are images that this noise can smooth."""

    @abstractmethod
    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out``, float32 on the generator's device, with the noise that ``sample`` draws, and return it."""

    def fill_each(self, out: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Fill every row of ``out`` (B, ...) as ``fill`` does with the generator of its position."""
        for row, generator in zip(out, generators, strict=True):
            self.fill(row, generator)

    def sample(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
        """Draw noise of ``shape`` (..., C, H, W), float32 on the generator's device."""
        return self.fill(torch.empty(shape, dtype=torch.float32, device=generator.device), generator)

    def add(self, pixels: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` (B, C, H, W) with noisy copies of ``pixels`` (C, H, W), which passed ``check``, and return it.

        Every judged copy is made by this method.
        """
        return self.fill(out, generator).add_(pixels)

    def noisy(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return ``images`` under noise ``drawn`` by ``sample``, which broadcast, differentiable in the images."""
        return images + drawn
