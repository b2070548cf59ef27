"""The threat model: what an attacker may change."""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from rush.errors import InputError
from rush.options import Norm


@dataclass(frozen=True)
class ThreatModel:
    """All x' in [0, 1] with ||x' - x|| <= epsilon, in [0, 1] pixel units, up to float32 rounding (6e-8 a pixel).

    norm: "linf" or "l2". epsilon: one number for all images, or a float tensor (N,) with one an image; an l-inf epsilon
    is n/255, so 8/255 and not 8. Raises: InputError for an unknown norm, epsilon <= 0, not finite, or > 1 for l-inf.
    """

    norm: Norm
    epsilon: float | Tensor

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise InputError(f"unknown norm {self.norm!r}; allowed: {', '.join(get_args(Norm))}")
        values = self.epsilon.flatten().tolist() if isinstance(self.epsilon, Tensor) else [self.epsilon]
        wrong = [value for value in values if not _is_positive_number(value)]
        if wrong:
            raise InputError(f"epsilon must be a finite number > 0, got {wrong[0]!r}")
        if self.norm == "linf" and max(values) > 1:
            raise InputError(
                f"l-inf epsilon = {max(values):g} exceeds the pixel range [0, 1]; write {max(values):g}/255"
            )

    def select(self, indices: list[int]) -> "ThreatModel":
        """The threat model of the images at these positions."""
        return ThreatModel(self.norm, self.epsilon[indices]) if isinstance(self.epsilon, Tensor) else self

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """The points (B, C, H, W) moved into the ball around ``x`` and then into [0, 1], which keeps them in the
        ball."""
        delta, epsilon = adversarial - x, self._per_image(x)
        if self.norm == "linf":
            delta = torch.minimum(torch.maximum(delta, -epsilon), epsilon)
        else:
            delta = delta * (epsilon / _l2(delta).clamp(min=1e-12)).clamp(max=1.0)
        return (x + delta).clamp(0.0, 1.0)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of steepest ascent of unit norm: the sign for l-inf, the normalised gradient for l2; 0 where it is
        0."""
        return gradient.sign() if self.norm == "linf" else gradient / _l2(gradient).clamp(min=1e-12)

    def random_start(self, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Points uniform in the ball around each image, moved into [0, 1]; one generator an image."""
        shape = x.shape[1:]
        if self.norm == "linf":
            draws = [torch.rand(shape, generator=g, device=g.device) * 2 - 1 for g in generators]
            delta = torch.stack(draws)
        else:
            draws = [torch.randn(shape, generator=g, device=g.device) for g in generators]
            shares = torch.stack([torch.rand(1, generator=g, device=g.device) for g in generators])
            delta = torch.stack(draws)
            delta = delta / _l2(delta) * shares.view(-1, 1, 1, 1) ** (1 / x[0].numel())
        return (x + delta.to(x.device) * self._per_image(x)).clamp(0.0, 1.0)

    def step(self, gradient: Tensor, share: float) -> Tensor:
        """A step of length ``share`` times epsilon along the steepest ascent."""
        return share * self._per_image(gradient) * self.steepest(gradient)

    def _per_image(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.epsilon, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)


def distances(adversarial: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """l-inf and l2 norms (N,) in float64 of the changes (N, C, H, W)."""
    delta = (adversarial.double() - x.double()).flatten(1)
    return delta.abs().amax(1), delta.norm(dim=1)


def _is_positive_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _l2(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
