"""Gaussian noise of a random, scheduled size on one or both views of a contrastive pair."""

import torch
from torch import Tensor

from rush.data.views import gaussian_noise
from rush.recipe.schema import NoiseSchedule
from rush.runtime.schedules import scheduled


def add_noise(
    view_a: Tensor, view_b: Tensor, noise: NoiseSchedule, epoch: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the two views with their noise, which is not clipped. The arguments are not modified.

    Args:
        view_a, view_b: (B, C, H, W), float32. With ``noise.views = "one"`` the noise is on view_b.
        epoch: epochs done so far (fractional).
        generator: on the device of the views.

    Raises:
        InputError: the views are not images, or the generator is missing or on another device.

    Random:
        For each noisy view, view_a first, one uniform value per image and then one normal value per pixel. With
        ``noise.views = "none"`` nothing is drawn, and the views themselves are returned.
    """
    if noise.views == "none":
        return view_a, view_b
    if noise.views == "both":
        view_a = _noisy(view_a, noise, epoch, generator)
    return view_a, _noisy(view_b, noise, epoch, generator)


@torch.no_grad()
def _noisy(view: Tensor, noise: NoiseSchedule, epoch: float, generator: torch.Generator) -> Tensor:
    low, highest = noise.sigma[0], scheduled(noise.highest, epoch)
    sigma = low + (highest - low) * torch.rand(len(view), generator=generator, device=view.device)
    return gaussian_noise(view, sigma, generator)
