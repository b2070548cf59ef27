"""Adversarial views, the worst case of a contrastive pair within an l-inf ball."""

from collections.abc import Callable

import torch
from torch import Tensor

from rush.errors import InputError
from rush.training.ascent import signed_ascent
from rush.training.contrastive import nt_xent


def adversarial_views(
    project: Callable[[Tensor], Tensor],
    view_a: Tensor,
    view_b: Tensor,
    temperature: float,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return both views moved within epsilon so that the NT-Xent loss of their projections grows.

    This is projected gradient ascent in l-inf on both views at once from a uniform random start in the ball, as in ACL
    (Jiang et al. 2020, "Robust Pre-Training by Adversarial Contrastive Learning", algorithm 1): step_size times the
    sign of the gradient, then back into the ball and into [0, 1]. ACL trains with epsilon 8/255, step size 2/255, 5
    steps and temperature 0.5. Its authors' code takes these steps in evaluation mode, with the running statistics of
    the adversarial normalization, and so should ``project``: in training mode every step would update these statistics.
    Gradients are taken with respect to the views alone: no parameter's ``.grad`` changes. With several processes the
    loss is that of the global batch, and every process attacks its own rows.

    Args:
        project: [0, 1] pixels (2 B, C, H, W), the rows of view_a before those of view_b -> z (2 B, D), float.
        view_a, view_b: (B, C, H, W) in [0, 1], row by row, without noise. The range is not checked, which would wait
            for the device.
        epsilon: radius of the ball in (0, 1], in pixel units.
        step_size: > 0, in pixel units.
        steps: >= 1.
        generator: on the device of the views.

    Returns:
        The last point (adv_a, adv_b), detached.

    Raises:
        InputError: the budget is out of its range or the shapes differ.

    Random:
        One uniform value per pixel.

    Cost:
        ``steps`` forward and backward passes through ``project``.
    """
    _check_budget(epsilon, step_size, steps)
    if view_a.shape != view_b.shape:
        raise InputError(f"need two views of one shape, got {tuple(view_a.shape)} and {tuple(view_b.shape)}")
    x = torch.cat([view_a, view_b]).detach()
    uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
    start = (x + epsilon * (2 * uniform - 1)).clamp(x - epsilon, x + epsilon).clamp(0.0, 1.0)

    def loss(points: Tensor) -> Tensor:
        z_a, z_b = project(points).chunk(2)
        return nt_xent(z_a, z_b, temperature)

    adv_a, adv_b = signed_ascent(loss, start, x, epsilon, step_size, steps).chunk(2)
    return adv_a, adv_b


def _check_budget(epsilon: float, step_size: float, steps: int) -> None:
    if not 0 < epsilon <= 1:
        raise InputError(f"epsilon must lie in (0, 1] pixel units, for example 8/255, got {epsilon!r}")
    if not step_size > 0:
        raise InputError(f"step_size must be > 0 in pixel units, for example 2/255, got {step_size!r}")
    if steps < 1:
        raise InputError(f"steps must be >= 1, got {steps!r}")
