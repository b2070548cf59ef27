"""Noise as a view: Gaussian noise of a random, scheduled size on one or both views of a contrastive pair."""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from rush.choices import NoisyViewsOption
from rush.data.views import gaussian_noise
from rush.errors import ConfigError
from rush.runtime.numbers import as_real
from rush.runtime.schedules import scheduled


@dataclass(frozen=True)
class NoiseSchedule:
    """Which views carry noise, and of what standard deviation at which epoch.

    Every noised image has a sigma of its own, uniform in [low, high(epoch)], so that one encoder learns to serve every
    sigma in the range. high(epoch) rises linearly from low to high over the first ``ramp_epochs``.

    views: "none"; "one", the second view only, so that clean and noisy images are drawn together; "both", each view
    with its own sigma and noise. sigma: (low, high) in [0, 1] pixel units, 0 <= low <= high, and high > 0 where there
    is noise. ramp_epochs: >= 0; 0 is the whole range at once.
    Raises: ConfigError when a value is out of its range.
    """

    views: NoisyViewsOption
    sigma: tuple[float, float]
    ramp_epochs: float

    def __post_init__(self) -> None:
        if self.views not in get_args(NoisyViewsOption):
            raise ConfigError(f"unknown noise views {self.views!r}; allowed: {', '.join(get_args(NoisyViewsOption))}")
        pair = isinstance(self.sigma, tuple | list) and len(self.sigma) == 2 and all(map(_is_number, self.sigma))
        if not pair or not 0 <= self.sigma[0] <= self.sigma[1]:
            raise ConfigError(f"sigma must be a pair (low, high) with 0 <= low <= high, got {self.sigma!r}")
        if self.views != "none" and self.sigma[1] == 0:
            raise ConfigError(
                f'views = "{self.views}" needs a sigma above 0, got {self.sigma!r}; or set views = "none"'
            )
        if not _is_number(self.ramp_epochs) or self.ramp_epochs < 0:
            raise ConfigError(f"ramp_epochs must be a number >= 0, got {self.ramp_epochs!r}")

    def highest(self, epoch: float) -> float:
        """The greatest sigma after ``epoch`` epochs (fractional, 0 at the start)."""
        low, high = self.sigma
        share = min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs > 0 else 1.0
        return low + (high - low) * share

    def add(self, view_a: Tensor, view_b: Tensor, epoch: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The two views (B, C, H, W), float32, with their noise, which is not clipped; the given ones stay as they are.

        For each noised view, view_a first, one uniform value an image and then one normal value a pixel are drawn; with
        "none" nothing is drawn and the views themselves come back. generator: on the device of the views.
        Raises: InputError when the views are no images or the generator is missing or elsewhere.
        """
        if self.views == "none":
            return view_a, view_b
        if self.views == "both":
            view_a = self._noised(view_a, epoch, generator)
        return view_a, self._noised(view_b, epoch, generator)

    @torch.no_grad()
    def _noised(self, view: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        low, highest = self.sigma[0], scheduled(self.highest, epoch)
        sigma = low + (highest - low) * torch.rand(len(view), generator=generator, device=view.device)
        return gaussian_noise(view, sigma, generator)


def _is_number(value: object) -> bool:
    return as_real(value) is not None
