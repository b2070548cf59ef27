"""Splitting noise, under which certificates in l1 are exact (Levine and Feizi 2021, "DSSN").

An image has the pixels X_i / 255, with integers X_i. Let lambda = sigma sqrt 3, L = int(2 lambda 255) and v a fixed
array of integers, the template. There are L draws, k = 0, ..., L - 1. Draw k splits the line of pixel i at the points
t + 1/2 with t = v_i + k modulo L. The network sees the middle of the part of [0, 255] in which X_i lies, divided by
255. Every draw votes once. The smoothed class is the one with the most votes, or the lowest of several.

A step of one pixel from X_i to X_i + 1 crosses the point X_i + 1/2, which belongs to exactly one of the L draws. So it
changes at most one vote. An image at l1 distance m / 255 is m such steps away, and no count differs by more than m:
the class A stays if n_A - m >= n_c + m for every other class c, and > for c < A. Hence the certified radius

    min over c of floor((n_A - n_c - [c < A]) / 2) / 255,

for 8-bit images, in l1. Nothing is sampled, so no certificate is false with any probability, and no image abstains. The
proof holds for every template. The template is drawn once for each L and shape, the same one everywhere, and a network
is trained under it with one random k per image.

In floating point, the middle of a part is a quotient of two integers, computed exactly and rounded once. Equal parts
thus give the network equal bits.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rush.choices import LEVELS, NoiseName, splitting_draws
from rush.errors import InputError
from rush.smoothing.base import Draws, Noise
from rush.smoothing.discrete import levels_of

_MOST_DRAWS = 1 << 20  # draws, of which float32 holds every sum exactly


@dataclass(frozen=True)
class Splitting(Noise):
    """Splitting noise, for exact l1 certificates.

    ``sigma`` > 0 is the standard deviation of uniform noise on an interval of the same length, in [0, 1] pixel units.
    Images under it are 8-bit images: every pixel is a multiple of 1/255, up to the rounding of float32. Every judged
    image costs ``num_draws`` forward passes, 883 sigma.

    Raises:
        InputError: ``sigma`` gives fewer than 2 draws or more than a million.
    """

    name: ClassVar[NoiseName] = "splitting"
    eight_bit: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.num_draws <= _MOST_DRAWS:
            raise InputError(
                f"sigma = {self.sigma:g} gives splitting noise {self.num_draws:,} draws, which must be 2 to "
                f"{_MOST_DRAWS:,}: give a sigma between 0.0023 and 1187 in [0, 1] pixel units"
            )

    @property
    def num_draws(self) -> int:
        """Number of draws, L = int(2 sqrt 3 sigma 255)."""
        return splitting_draws(self.sigma)

    def check(self, x: Tensor) -> None:
        levels_of(x)

    def fill(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` (..., C, H, W), float32, with a split point of every pixel in steps of 1/255, and return it.

        All pixels of an image share one draw: the next one of ``Draws``, or a random one of any other generator.
        """
        size = prod(out.shape[:-3])
        if isinstance(generator, Draws):
            draws = generator.take(size).to(out.device)
        else:
            draws = torch.randint(self.num_draws, (size,), generator=generator, device=out.device)
        template = _template(self.num_draws, tuple(out.shape[-3:]), out.device)
        points = out.view(size, *out.shape[-3:])
        return points.copy_(draws[:, None, None, None]).add_(template).remainder_(self.num_draws).add_(0.5).view_as(out)

    def add(self, pixels: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
        return out.copy_(self._middle((pixels * LEVELS).round(), self.fill(out, generator)))

    def noisy(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return ``images`` under the split points ``drawn``, with the derivative of the mean over all draws.

        The derivative of a single draw is 0. In the mean, a noisy pixel grows with the pixel by ``slope``.
        """
        images = images.expand(drawn.shape)
        if torch.is_grad_enabled() and images.requires_grad:
            return _Straight.apply(images, drawn, self)
        return self._middle(images * LEVELS, drawn)

    @property
    def slope(self) -> float:
        """Growth of the mean noisy pixel while the pixel grows from 0 to 1."""
        length = self.num_draws / LEVELS
        return 1 - length / 2 if length < 1 else 1 / (2 * length)

    def _middle(self, levels: Tensor, point: Tensor) -> Tensor:
        """Return the middle of the part of each pixel in [0, 1], for pixels ``levels`` in steps of 1/255."""
        draws = self.num_draws
        upper = ((levels - point) / draws).ceil().mul_(draws).add_(point)  # the next split point
        lower = (upper - draws).clamp_(min=0)
        return upper.clamp_(max=LEVELS).add_(lower).div_(2 * LEVELS)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, drawn: Tensor, noise: Splitting) -> Tensor:
        ctx.slope = noise.slope
        return noise._middle(images * LEVELS, drawn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slope * gradient, None, None


@lru_cache(maxsize=16)
def _template(draws: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the template, integers in [0, draws) as float32 of ``shape``, from SHAKE-256 of its name."""
    name = f"rush splitting {draws} {'x'.join(map(str, shape))}"
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * prod(shape)), "<u8")
    return torch.from_numpy((words % draws).astype(np.float32)).view(shape).to(device)
