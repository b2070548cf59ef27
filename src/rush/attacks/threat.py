"""The threat model: what an attacker may change."""

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from rush.attacks.l1 import project_l1, room_towards, sparse_step
from rush.choices import Norm
from rush.errors import InputError
from rush.runtime.numbers import as_real
from rush.runtime.transfer import sent

ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
L1_DENSITY = 0.01  # share of the pixels that one l1 step changes (Tramer & Boneh 2019)


@dataclass(frozen=True)
class ThreatModel:
    """All x' in [0, 1] with ||x' - x|| <= epsilon, in [0, 1] pixel units, up to float32 rounding (6e-8 a pixel).

    norm: "linf", "l2" or "l1". epsilon: one number for all images, or a float tensor or array (N,) with one
    per image; an l-inf epsilon is n/255, so 8/255 and not 8, an l1 epsilon is the sum over all pixels and channels, so
    often above 1.
    Raises: InputError for an unknown norm, epsilon <= 0, not finite, or > 1 for l-inf.
    """

    norm: Norm
    epsilon: float | Tensor

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
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
        """The threat model of the images at these positions."""
        return ThreatModel(self.norm, self.epsilon[indices]) if isinstance(self.epsilon, Tensor) else self

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """The points (B, C, H, W) moved into the ball around ``x`` and [0, 1], see ``project``."""
        return project(self.norm, adversarial, x, self.radius(x))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of ascent of unit norm, 0 where the gradient is: for l-inf its sign, for l2 the normalised
        gradient, for l1 the sign of the ``L1_DENSITY`` largest entries.

        The steepest l1 direction is one pixel alone, and steps of one pixel get nowhere in few steps.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            return gradient / _l2(gradient).clamp(min=1e-12)
        return sparse_step(gradient, torch.full_like(gradient, math.inf), gradient.new_ones(1), _pixels(gradient))

    def step(self, gradient: Tensor, share: float | Tensor, at: Tensor, density: float | Tensor = L1_DENSITY) -> Tensor:
        """A step of length ``share`` times epsilon from the points ``at`` along the steepest ascent.

        In l1, pixels that have reached the end of [0, 1] hand their part on to the next ones, and ``density`` is the
        share of the pixels that the step changes. share, density: one number, or (B, 1, 1, 1).
        """
        length = share * self.radius(gradient)
        if self.norm != "l1":
            return length * self.steepest(gradient)
        return sparse_step(gradient, room_towards(gradient, at), length, _pixels(gradient, density))

    def random_start(self, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Points uniform in the ball around each image, moved into [0, 1]; one generator an image."""
        return self.random_points(x, generators, 1)[:, 0]

    def random_points(
        self, x: Tensor, generators: list[torch.Generator], count: int, *, surface: bool = False
    ) -> Tensor:
        """Points (B, count, C, H, W) uniform in the ball around each image, moved into [0, 1].

        With ``surface`` they lie at epsilon: corners for l-inf, uniform on the sphere for l2 and the faces for l1.
        One generator an image, drawn from once or twice whatever the count.
        """
        changes = _unit_ball(self.norm, (count, *x.shape[1:]), generators, surface).to(x.device)
        return (x[:, None] + changes * self.radius(x)[:, None]).clamp(0.0, 1.0)

    def radius(self, x: Tensor) -> Tensor:
        """Epsilon (1 or B, 1, 1, 1), of the type and on the device of ``x``."""
        return _beside(x, self.epsilon)


def project(norm: Norm, adversarial: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
    """The points (B, C, H, W) moved into the ball of radius ``epsilon`` (B, 1, 1, 1) around ``x`` and into [0, 1].

    For l-inf and l1 the nearest such point (l1: Croce & Hein 2021). For l2 first into the ball and then into [0, 1],
    which keeps it in the ball.
    """
    change = adversarial - x
    if norm == "linf":
        change = torch.minimum(torch.maximum(change, -epsilon), epsilon)
    elif norm == "l2":
        change = change * (epsilon / _l2(change).clamp(min=1e-12)).clamp(max=1.0)
    else:
        change = project_l1(change, x, epsilon.expand(len(x), 1, 1, 1))
    return (x + change).clamp(0.0, 1.0)


def distances(adversarial: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """l-inf and l2 norms (N,) in float64 of the changes (N, C, H, W)."""
    delta = (adversarial.double() - x.double()).flatten(1)
    return delta.abs().amax(1), delta.norm(dim=1)


def norms(adversarial: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Sizes (N,) in float64 of the changes (N, C, H, W) in this norm."""
    return torch.linalg.vector_norm((adversarial.double() - x.double()).flatten(1), ORDERS[norm], dim=1)


def _unit_ball(norm: Norm, shape: tuple[int, ...], generators: list[torch.Generator], surface: bool) -> Tensor:
    """Changes (B, *shape) uniform in the unit ball or on its surface, the first of ``shape`` being their number.

    l1: exponentials over their sum, which one more exponential takes from the surface into the ball.
    """
    if norm == "linf":
        changes = torch.stack([torch.rand(shape, generator=g, device=g.device) * 2 - 1 for g in generators])
        return changes.sign() if surface else changes
    if norm == "l2":
        changes = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
        changes = (changes.flatten(0, 1) / _l2(changes.flatten(0, 1))).view_as(changes)
        if surface:
            return changes
        shares = torch.stack([torch.rand(shape[0], generator=g, device=g.device) for g in generators])
        return changes * shares.view(*shares.shape, 1, 1, 1) ** (1 / math.prod(shape[1:]))
    width = math.prod(shape[1:])
    draws = [torch.rand((shape[0], width + 1), generator=g, device=g.device) * 2 - 1 for g in generators]
    signed = torch.stack(draws)
    sizes = -signed.abs().clamp(min=1e-30).log()
    total = (sizes[..., :width] if surface else sizes).sum(2, keepdim=True)
    return (sizes / total * signed.sign())[..., :width].reshape(len(generators), *shape)


def _pixels(gradient: Tensor, density: float | Tensor = L1_DENSITY) -> Tensor:
    """How many entries of an image are this share of all, at least one; (1 or B, 1, 1, 1)."""
    return (_beside(gradient, density) * gradient[0].numel()).floor().clamp(min=1)


def _beside(x: Tensor, value: float | Tensor) -> Tensor:
    """Return ``value``, one number or one per image, as (1 or B, 1, 1, 1) of the type and on the device of ``x``.

    Nothing waits for the device, as it would where a number is copied there.
    """
    if not isinstance(value, Tensor):
        return x.new_full((1, 1, 1, 1), value)
    return sent(value.to(x.dtype), x.device).reshape(-1, 1, 1, 1)


def _number_or_tensor(epsilon: object) -> object:
    """One number as a float, numbers of images as a float tensor; anything else as it is."""
    if isinstance(epsilon, np.ndarray) and epsilon.ndim and epsilon.dtype.kind in "fiu":
        epsilon = torch.from_numpy(epsilon.astype(np.float64 if epsilon.dtype.kind != "f" else epsilon.dtype))
    if isinstance(epsilon, Tensor) and epsilon.ndim:
        return epsilon if epsilon.is_floating_point() or epsilon.dtype == torch.bool else epsilon.double()
    number = as_real(epsilon)
    return epsilon if number is None else number


def _l2(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
