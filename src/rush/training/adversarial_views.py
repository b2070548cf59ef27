"""Adversarial views: the worst case of a contrastive pair within an l-inf ball."""

from collections.abc import Callable

import torch
from torch import Tensor

from rush.errors import InputError
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
    """Both views moved within epsilon so that the NT-Xent loss of their projections grows: (adv_a, adv_b), detached.

    Projected gradient ascent in l-inf on both views at once from a uniform random start in the ball, as in ACL (Jiang
    et al. 2020, "Robust Pre-Training by Adversarial Contrastive Learning", algorithm 1): step_size times the sign
    of the gradient, then back into the ball and into [0, 1]. Returned is the last point. ACL trains with epsilon 8/255,
    step size 2/255, 5 steps and temperature 0.5; its authors' code takes these steps in evaluation mode, with the
    running statistics of the adversarial normalization, and so should ``project``: in training mode every step would
    update them.

    project: [0, 1] pixels (2 B, C, H, W), the rows of view_a before those of view_b -> z (2 B, D), float.
    view_a, view_b: (B, C, H, W) in [0, 1], row by row; not checked, that would wait for the device, so no noisy views.
    epsilon: in (0, 1]; step_size: > 0, in the same pixel units; steps: >= 1. generator: on the device of the views; one
    uniform value a pixel is drawn.
    Gradients are taken with respect to the views alone: no parameter's ``.grad`` changes. With several processes the
    loss is that of the global batch, every process attacks its own rows.
    Cost: ``steps`` forward and backward passes through ``project``.
    Raises: InputError when the budget is out of its range or the shapes differ.
    """
    _check_budget(epsilon, step_size, steps)
    if view_a.shape != view_b.shape:
        raise InputError(f"need two views of one shape, got {tuple(view_a.shape)} and {tuple(view_b.shape)}")
    x = torch.cat([view_a, view_b]).detach()
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    start = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
    point = torch.clamp(x + epsilon * (2 * start - 1), lower, upper)
    for _ in range(steps):
        gradient = _gradient(project, point, temperature)
        point = torch.clamp(point + step_size * gradient.sign(), lower, upper)
    adv_a, adv_b = point.chunk(2)
    return adv_a, adv_b


def _gradient(project: Callable[[Tensor], Tensor], point: Tensor, temperature: float) -> Tensor:
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        z_a, z_b = project(point).chunk(2)
        return torch.autograd.grad(nt_xent(z_a, z_b, temperature), point)[0]


def _check_budget(epsilon: float, step_size: float, steps: int) -> None:
    if not 0 < epsilon <= 1:
        raise InputError(f"epsilon must lie in (0, 1] pixel units, for example 8/255, got {epsilon!r}")
    if not step_size > 0:
        raise InputError(f"step_size must be > 0 in pixel units, for example 2/255, got {step_size!r}")
    if steps < 1:
        raise InputError(f"steps must be >= 1, got {steps!r}")
