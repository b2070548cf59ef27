"""Findings about the attack's ascent: can its gradient, its steps and its noise draws lead it anywhere?"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rush.attacks.gradient import loss_and_gradient, pinned
from rush.attacks.losses import margin
from rush.auditing import measures
from rush.auditing.case import CLOSE, FEW_IMAGES, STEPPING, Case
from rush.auditing.findings import Status
from rush.auditing.probes import FEWEST, NOT_CLIMBING, Outcome, attack_gain, probe, share, skipped
from rush.auditing.validity import REACH
from rush.evaluation.plans import Plan
from rush.runtime.randomness import stream

_DRAWS = 64  # draws of the gradient, at least, for its signal-to-noise ratio
_MOST_DRAWS = 16  # draws in one measured gradient
_COMMON_DRAWS = 64  # common random numbers under which two points are compared
_QUARTER = 0.25  # share of the radius: steps within this distance are averaged


@probe(
    "frozen-noise",
    "draw fresh noise at every step: an attack on frozen noise fits those draws and makes the model look more robust",
)
def frozen_noise(case: Case) -> Outcome:
    """Does fresh noise break images that an attack on frozen noise does not?

    Cost: for an evaluation on frozen noise its passes, on the held images.
    """
    if case.plan is None or case.plan.gradient != "frozen":
        return skipped("the evaluation does not freeze its noise")
    return attack_gain(case, replace(case.plan, name="frozen-noise", gradient="fresh"), "fresh noise draws")


# Images whose gradient carries nothing: an attack cannot move on them; a point of accuracy is a fifth of this share.
DEAD_SHARE = 0.05


@probe(
    "gradient",
    "attack a loss on logits (margin, DLR), or give a differentiable surrogate for what has no gradient (BPDA)",
)
def gradient(case: Case) -> Outcome:
    """Does the loss have a usable gradient at the images: finite, not zero, not lost to underflow?

    Cost: m forward and backward passes on 32 held images.
    """
    if (plan := case.climbing) is None or not case.held:
        return skipped(NOT_CLIMBING)
    dead, saturated, total = 0, 0, 0
    for rows, log_probs, x, y in case.views(plan, case.held[:CLOSE], "gradient"):
        values, slopes = loss_and_gradient(log_probs, x, y, case.loss(plan, rows))
        lost = ~measures.alive(slopes)
        dead, total = dead + int(lost.sum()), total + len(rows)
        saturated += int((lost & (values == 0)).sum())
    what = f"images have a zero or non-finite gradient ({saturated} of them by a saturated softmax)"
    return share(dead, total, DEAD_SHARE, what)


# Cosine between autograd's and the measured slopes; below it the attack keeps less than half of the steepest ascent.
AGREEMENT = 0.5


@probe(
    "finite-differences",
    "find what is detached, rounded or replaced in the backward pass, or give a better surrogate",
)
def finite_differences(case: Case) -> Outcome:
    """Is autograd's gradient the slope of the loss?

    Cost: 1 backward and 102 forward passes of at most 16 draws, on 32 held images.
    """
    if (plan := case.climbing) is None or not case.held:
        return skipped(NOT_CLIMBING)
    few = replace(plan, eot_samples=min(plan.eot_samples, _MOST_DRAWS))
    generator, parts = stream(case.seed, "audit/directions"), []
    for rows, log_probs, x, y in case.views(few, case.held[:CLOSE], "finite-differences"):
        parts.append(measures.slopes_at(pinned(log_probs), x, y, case.threat.select(rows), generator))
    agreement, ratio, images = measures.agreement(parts)
    return decide_slopes(agreement, ratio, images) if images else skipped("no image has a gradient")


def decide_slopes(agreement: float, ratio: float, images: int) -> Outcome:
    """Decide on autograd's slopes.

    Args:
        agreement: cosine between autograd's and measured slopes along random directions, pooled over images.
        ratio: median measured slope over autograd's along the gradient itself.
        images: number of images with a gradient.
    """
    wrong = agreement < AGREEMENT or ratio <= 0
    status: Status = "undecided" if images < FEWEST else ("failed" if wrong else "passed")
    evidence = (
        f"slopes by autograd and by finite differences agree with cosine {agreement:.2f} along random directions; "
        f"along the gradient the measured slope is {ratio:.2g} of autograd's ({images} images)"
    )
    return Outcome(status, agreement, AGREEMENT, evidence)


# An attack that cannot break an image goes to the edge; half of it for most images means that it stopped on the way.
EDGE = 0.5


@probe("step-size", "take steps that together are at least twice epsilon (step size 2.5 epsilon / steps)")
def step_size(case: Case) -> Outcome:
    """Can the attack get to the edge of the ball, and does it? Cost: none."""
    if case.plan is not None and case.plan.method not in (*STEPPING, "apgd"):
        return skipped("the evaluation's attack has no steps of a length")
    if case.unattacked:
        return skipped("the evaluation has no attack")
    held = case.sizes[~case.evaluation.broken]
    return decide_steps(case.reach, float(np.median(held)) if len(held) else 1.0, len(held))


def decide_steps(reach: float | None, median: float, images: int) -> Outcome:
    """Decide on the length of the steps.

    Args:
        reach: steps x step size over epsilon, None where the plan has no fixed step.
        median: median size of the changes of held images, in epsilon.
        images: number of held images.
    """
    if reach is not None and reach < REACH:
        return Outcome("failed", reach, REACH, f"all steps together are {reach:.3g} epsilon long")
    if images < FEWEST:
        return Outcome("passed", median, EDGE, f"{images} images are held")
    evidence = f"the median change of held images is {median:.3g} epsilon"
    return Outcome("failed" if median < EDGE else "passed", median, EDGE, evidence)


# Draws that a cosine of 0.5 with the expected gradient needs, over those that the attack averages: with fewer, more of
# each step is noise than ascent.
DRAWS_NEEDED = 1.0


@probe("signal-to-noise", "raise eot_samples, or take more and smaller steps")
def signal_to_noise(case: Case) -> Outcome:
    """Does the attack average enough noise to have a direction?

    Cost: 64 to 128 forward and backward passes on 32 held images.
    """
    plan = case.climbing
    if plan is None or not case.held:
        return skipped(NOT_CLIMBING)
    if case.defender.kind != "random" or plan.gradient != "fresh" or plan.eot_samples == 0:
        return skipped("the evaluation draws no fresh noise")
    draws, needed = min(plan.eot_samples, _MOST_DRAWS), []
    repeats = max(FEW_IMAGES, -(-_DRAWS // draws))
    for rows, log_probs, x, y in case.views(replace(plan, eot_samples=draws), case.held[:CLOSE], "signal-to-noise"):
        needed += measures.draws_needed(log_probs, x, y, case.loss(plan, rows), draws, repeats)
    steps = _QUARTER / plan.step_size if plan.step_size else 1.0
    return decide_draws(needed, plan.eot_samples * max(1.0, min(plan.steps, steps)))


def decide_draws(needed: Sequence[float], averaged: float) -> Outcome:
    """Decide on the noise draws.

    Args:
        needed: for each image the number of draws after which the gradient has cosine 0.5 with its expectation.
        averaged: draws per gradient of the evaluation, times the steps within a quarter of the ball's radius where
            steps are shorter.
    """
    median = sorted(needed)[len(needed) // 2]
    figure = median / averaged
    status: Status = "undecided" if len(needed) < FEWEST else ("failed" if figure > DRAWS_NEEDED else "passed")
    evidence = (
        f"a gradient of cosine 0.5 takes {median:.3g} draws (median of {len(needed)} images), "
        f"the evaluation averages {averaged:.3g}"
    )
    return Outcome(status, figure, DRAWS_NEEDED, evidence)


# Attacks that work raise the loss on all images; this leaves room for flat ones.
NOT_RISING = 0.1


@probe("path", "look at the loss along the attack's path: step size, sign of the loss, and noise of the gradient")
def path(case: Case) -> Outcome:
    """Is the loss higher at the evaluation's points than at the images, on common random numbers?

    Cost: 2 forward passes of 64 draws on the held images.
    """
    if not case.held:
        return skipped("no image is held")
    common_draws = Plan("path", "64 common draws", "pgd", "fresh", _COMMON_DRAWS)
    not_rising = 0
    for rows, log_probs, x, y in case.views(common_draws, case.held, "path"):
        common, points = pinned(log_probs), case.points[rows].to(x.device)
        before, after = (margin(measures.without_gradient(common, at), y) for at in (x, points))
        not_rising += int((after <= before).sum())
    what = "held images have no higher loss at the evaluation's point than at the image itself"
    return share(not_rising, len(case.held), NOT_RISING, what)
