"""Threat models: norm balls around images, with their projections, steps and random points."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from rush.attacks.l1 import project_l1, room_towards, sparse_step
from rush.choices import LEVELS, Norm
from rush.errors import InputError
from rush.runtime.numbers import as_real, is_one_of
from rush.runtime.transfer import sent

ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
GRID_TOLERANCE = 1e-4  # in steps of 1/255: the error of an epsilon such as 8/255 in float32
L1_DENSITY = 0.01  # share of the pixels that one l1 step changes (Tramer & Boneh 2019)


@dataclass(frozen=True)
class ThreatModel:
    """The ball of all x' in [0, 1] with ||x' - x|| <= epsilon, up to float32 rounding (6e-8 per pixel).

    Args:
        norm: "linf", "l2" or "l1".
        epsilon: radius in [0, 1] pixel units, one number for all images or a float tensor or array (N,) with one per
            image. An l-inf epsilon is n/255, so 8/255 and not 8. An l1 epsilon is a sum over all pixels and channels,
            so often above 1.

    Raises:
        InputError: The norm is unknown, or epsilon is not finite, not above 0, or above 1 for l-inf.
    """

    norm: Norm
    epsilon: float | Tensor

    def __post_init__(self) -> None:
        if not is_one_of(self.norm, get_args(Norm)):
            raise InputError(f"unknown norm {self.norm!r}; allowed: {', '.join(get_args(Norm))}")
        epsilon = _number_or_tensor(self.epsilon)
        values = epsilon.flatten().tolist() if isinstance(epsilon, Tensor) else [epsilon]
        wrong = [value for value in values if (as_real(value) or 0) <= 0]
        if wrong:
            raise InputError(f"epsilon must be a finite number > 0, got {wrong[0]!r}")
        object.__setattr__(self, "epsilon", epsilon)
        if self.norm == "linf" and max(values, default=0.0) > 1:
            raise InputError(
                f"l-inf epsilon = {max(values):g} exceeds the pixel range [0, 1]; write {max(values):g}/255"
            )

    def select(self, indices: list[int]) -> "ThreatModel":
        """Return the threat model of the images at these positions."""
        return ThreatModel(self.norm, self.epsilon[indices]) if isinstance(self.epsilon, Tensor) else self

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Return the points (B, C, H, W) moved into the ball around ``x`` and into [0, 1], see ``project``."""
        return project(self.norm, adversarial, x, self.radius(x))

    def on_grid(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Return 8-bit images (B, C, H, W) close to the points, within the ball around the 8-bit images ``x``.

        Every pixel is rounded to the nearest multiple of 1/255. Where the result is outside the ball, pixels that were
        moved away from the image are rounded towards it instead, first those for which that makes the least difference.
        """
        levels = (LEVELS * x.double()).round()
        change = LEVELS * adversarial.double() - levels
        rounded = change.round()
        moved = _within(rounded, change, self.norm, LEVELS * self.radius(rounded) + GRID_TOLERANCE)
        return ((levels + moved) / LEVELS).to(adversarial.dtype)

    def step(self, gradient: Tensor, share: float | Tensor, at: Tensor, density: float | Tensor = L1_DENSITY) -> Tensor:
        """Return the step (B, C, H, W) from the points ``at`` along the steepest ascent, 0 where the gradient is 0.

        For l-inf it follows the gradient's sign, for l2 the normalised gradient, for l1 the sign of the largest
        entries: the steepest l1 direction is a single pixel, which makes little progress in few steps. In l1, pixels
        that have reached the end of [0, 1] pass their part to the next largest ones.

        Args:
            gradient: (B, C, H, W).
            share: length of the step as a share of epsilon, one number or (B, 1, 1, 1).
            at: points (B, C, H, W) in [0, 1].
            density: for l1, share of the pixels that the step changes, one number or (B, 1, 1, 1).
        """
        length = share * self.radius(gradient)
        if self.norm == "linf":
            return length * gradient.sign()
        if self.norm == "l2":
            return length * l2_unit(gradient)
        pixels = (_beside(gradient, density) * gradient[0].numel()).floor().clamp(min=1)
        return sparse_step(gradient, room_towards(gradient, at), length, pixels)

    def random_start(self, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Return points (B, C, H, W) uniform in the ball and moved into [0, 1], with one generator per image."""
        return self.random_points(x, generators, 1)[:, 0]

    def random_points(
        self, x: Tensor, generators: list[torch.Generator], count: int, *, surface: bool = False
    ) -> Tensor:
        """Return points (B, count, C, H, W) uniform in the ball around each image, moved into [0, 1].

        With ``surface`` they lie at distance epsilon: corners for l-inf, uniform on the sphere for l2 and on the faces
        for l1.

        Random: one or two draws from each image's generator, whatever the count.
        """
        changes = _unit_ball(self.norm, (count, *x.shape[1:]), generators, surface).to(x.device)
        return (x[:, None] + changes * self.radius(x)[:, None]).clamp(0.0, 1.0)

    def radius(self, x: Tensor) -> Tensor:
        """Return epsilon (1 or B, 1, 1, 1), of the dtype and on the device of ``x``."""
        return _beside(x, self.epsilon)


def project(norm: Norm, adversarial: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
    """Return the points (B, C, H, W) moved into the ball of radius ``epsilon`` (B, 1, 1, 1) and into [0, 1].

    For l-inf and l1 this is the nearest such point (l1: Croce & Hein 2021). For l2 the point is moved into the ball and
    then into [0, 1], which keeps it in the ball but is not always nearest.
    """
    change = adversarial - x
    if norm == "linf":
        change = torch.minimum(torch.maximum(change, -epsilon), epsilon)
    elif norm == "l2":
        change = change * (epsilon / _l2_norm(change).clamp(min=1e-12)).clamp(max=1.0)
    else:
        change = project_l1(change, x, epsilon.expand(len(x), 1, 1, 1))
    return (x + change).clamp(0.0, 1.0)


def _within(rounded: Tensor, change: Tensor, norm: Norm, epsilon: Tensor) -> Tensor:
    """Return integer changes (B, C, H, W) of norm at most ``epsilon`` (1 or B, 1, 1, 1), from ``change`` ``rounded``.

    Rounded entries of an image that are larger than its entries of ``change`` are made smaller by one, the most
    enlarged ones first, until the norm is small enough.
    """
    if norm == "linf":
        return torch.minimum(torch.maximum(rounded, -epsilon.floor()), epsilon.floor())
    power = 2 if norm == "l2" else 1
    size = rounded.abs().flatten(1)
    enlarged, order = (size - change.abs().flatten(1)).sort(1, descending=True)
    gain = (size**power - (size - 1) ** power).gather(1, order) * (enlarged > 0)
    excess = (size**power).sum(1, keepdim=True) - epsilon.flatten(1) ** power
    shrunk = (gain.cumsum(1) - gain < excess) & (enlarged > 0)
    less = torch.zeros_like(size).scatter(1, order, shrunk.to(size.dtype))
    return rounded - rounded.sign() * less.view_as(rounded)


def norms(adversarial: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Return the distances (N,) in float64 between the points and ``x``, both (N, C, H, W)."""
    return change_norm(adversarial.double() - x.double(), norm)


def change_norm(change: Tensor, norm: Norm) -> Tensor:
    """Return the norm (N,) of each change (N, C, H, W), in the dtype of ``change``."""
    return torch.linalg.vector_norm(change.flatten(1), ORDERS[norm], dim=1)


def l2_unit(change: Tensor) -> Tensor:
    """Return the changes (N, C, H, W) scaled to l2 norm 1, 0 where they are 0."""
    return change / _l2_norm(change).clamp(min=1e-12)


def choose(which: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return ``chosen`` (N, ...) for the images where ``which`` (N,) is true, and ``other`` for the rest."""
    return torch.where(which.view(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def stacked_draws(draw: Callable[..., Tensor], shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Return draws (B, *shape) by ``torch.rand`` or ``torch.randn``, one from each generator, on their device."""
    return torch.stack([draw(shape, generator=generator, device=generator.device) for generator in generators])


def _unit_ball(norm: Norm, shape: tuple[int, ...], generators: list[torch.Generator], surface: bool) -> Tensor:
    """Return changes (B, count, C, H, W) uniform in the unit ball or on its surface, for ``shape`` (count, C, H, W)."""
    width = math.prod(shape[1:])
    if norm == "linf":
        changes = stacked_draws(torch.rand, shape, generators) * 2 - 1
        return changes.sign() if surface else changes
    if norm == "l2":
        changes = stacked_draws(torch.randn, shape, generators)
        changes = (changes.flatten(0, 1) / _l2_norm(changes.flatten(0, 1))).view_as(changes)
        if surface:
            return changes
        # The radius of a uniform point in the ball of dimension d is U^(1/d).
        shares = stacked_draws(torch.rand, shape[:1], generators)
        return changes * shares.view(*shares.shape, 1, 1, 1) ** (1 / width)
    # For l1, exponentials over their sum are uniform on the faces. One more exponential in the sum moves them inside.
    signed = stacked_draws(torch.rand, (shape[0], width + 1), generators) * 2 - 1
    sizes = -signed.abs().clamp(min=1e-30).log()
    total = (sizes[..., :width] if surface else sizes).sum(2, keepdim=True)
    return (sizes / total * signed.sign())[..., :width].reshape(len(generators), *shape)


def _beside(x: Tensor, value: float | Tensor) -> Tensor:
    """Return ``value``, one number or one per image, as (1 or B, 1, 1, 1) of the dtype and on the device of ``x``.

    The number is filled in on the device: a copy from pageable memory would wait for it.
    """
    if not isinstance(value, Tensor):
        return x.new_full((1, 1, 1, 1), value)
    return sent(value.to(x.dtype), x.device).reshape(-1, 1, 1, 1)


def _number_or_tensor(epsilon: object) -> object:
    """Return one number as a float and an array of numbers as a float tensor, and anything else unchanged."""
    if isinstance(epsilon, np.ndarray) and epsilon.ndim and epsilon.dtype.kind in "fiu":
        epsilon = torch.from_numpy(epsilon.astype(np.float64 if epsilon.dtype.kind != "f" else epsilon.dtype))
    if isinstance(epsilon, Tensor) and epsilon.ndim:
        return epsilon if epsilon.is_floating_point() or epsilon.dtype == torch.bool else epsilon.double()
    number = as_real(epsilon)
    return epsilon if number is None else number


def _l2_norm(change: Tensor) -> Tensor:
    """Return the l2 norms as (N, 1, 1, 1), to scale changes (N, C, H, W) by."""
    return change_norm(change, "l2").view(-1, 1, 1, 1)
