"""The points that an attacker offers for a group of images, and how a plan becomes a call of its attack."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rush.attacks.apgd import apgd
from rush.attacks.fgsm import fgsm
from rush.attacks.fmn import fmn
from rush.attacks.gradient import LogProbs
from rush.attacks.losses import Loss
from rush.attacks.mifgsm import mifgsm
from rush.attacks.pgd import pgd
from rush.attacks.random_search import random_search
from rush.attacks.square import square
from rush.attacks.threat import ThreatModel
from rush.evaluation.plans import Plan

Attack = Callable[[LogProbs, Tensor, Tensor], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidates:
    """One adversarial point per image, the best of its attacker, and its cost.

    Attributes:
        adversarial: float32 (N, C, H, W), on the CPU.
        choice_margin: (N,), margin of the best other class over the label on the draws that choose among an attacker's
            points, or minus infinity where there was nothing to choose.
        passes: forward and backward passes per image.
        forward_passes: forward passes without backward, per image.
    """

    adversarial: Tensor
    choice_margin: Tensor
    passes: float = 0.0
    forward_passes: float = 0.0

    @classmethod
    def unmeasured(cls, adversarial: Tensor, passes: float = 0.0, forward_passes: float = 0.0) -> "Candidates":
        """Return points (N, C, H, W) among which nothing was chosen."""
        return cls(adversarial, torch.full((len(adversarial),), -torch.inf), passes, forward_passes)


def start_of(
    plan: Plan, x: Tensor, best: Tensor | None, threat: ThreatModel, generators: list[torch.Generator]
) -> Tensor | None:
    """Return where the attack of ``plan`` begins, (B, C, H, W), or None for the images ``x`` or a start of its own."""
    if plan.method in ("fgsm", "square", "random") or plan.start == "clean":
        return None
    if plan.start == "best" and best is not None:
        return best.to(x.device)
    return threat.random_start(x, generators)


def attack_of(
    plan: Plan, threat: ThreatModel, loss: Loss, start: Tensor | None, generators: list[torch.Generator]
) -> Attack:
    """Return the attack of ``plan``: (log-probabilities, images, labels) -> one point per image, or a tuple of them.

    Args:
        start: where it begins, see ``start_of``.
        generators: one per image. Square and random search draw from them.
    """
    match plan.method:
        case "fgsm":
            return partial(fgsm, threat=threat, loss=loss)
        case "pgd":
            return partial(pgd, threat=threat, loss=loss, start=start, steps=plan.steps, step_size=plan.step_size)
        case "mifgsm":
            return partial(mifgsm, threat=threat, loss=loss, start=start, steps=plan.steps, step_size=plan.step_size)
        case "apgd":
            return partial(apgd, threat=threat, loss=loss, start=start, steps=plan.steps)
        case "fmn":
            nearest = partial(fmn, norm=threat.norm, loss=loss, start=start, steps=plan.steps)
            return lambda log_probs, x, y: threat.project(nearest(log_probs, x, y), x)
        case "square":
            return partial(square, threat=threat, loss=loss, generators=generators, queries=plan.steps)
        case "random":
            return partial(random_search, threat=threat, loss=loss, generators=generators, draws=plan.steps)
        case _:
            raise AssertionError(f"{plan.method} makes no points")
