"""Findings about what was evaluated: was it this model, under this threat model, and do its verdicts stand?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from rush.attacks.gradient import LogProbs
from rush.auditing import measures
from rush.auditing.case import FEW_IMAGES, STEPPING, Case
from rush.auditing.findings import GAIN, LEVELS, Status
from rush.auditing.probes import Outcome, probe, share, skipped
from rush.auditing.surrogates import Changed, with_network
from rush.evaluation.model import RandomDefender, SmoothedDefender
from rush.evaluation.plans import Plan
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED
from rush.smoothing.classifier import SmoothedClassifier

_PASSES = 4  # compared with each other
_SCALE_DRAWS = 16
_INTERVALS = 400  # intervals of the unknown probability, in ``gain_p_value``
_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "0 to 255": lambda x: 255 * x,
    "-1 to 1": lambda x: 2 * x - 1,
    "normalised by the mean and deviation of each channel": lambda x: (
        (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    ),
}

# Rounding alone moves pixels out of [0, 1] by less than this; a wrong range does so by more than a grey level, 0.004.
RANGE_SLACK = 1e-4


@probe("input-range", "attack pixels in [0, 1] and put scaling and normalisation into the model")
def input_range(case: Case) -> Outcome:
    """Do the attacked points stay in [0, 1]? Cost: none."""
    points = case.evaluation.adversarial
    return decide_range(float(points.min()), float(points.max()))


def decide_range(low: float, high: float) -> Outcome:
    """Decide on points with the extreme pixels ``low`` and ``high``."""
    excess = max(-low, high - 1, 0.0)
    evidence = f"the evaluation's points have pixels from {low:g} to {high:g}"
    if excess <= RANGE_SLACK:
        return Outcome("passed", excess, RANGE_SLACK, evidence)
    normalised = "they look normalised" if low < -RANGE_SLACK else "they were not clipped"
    return Outcome(
        "failed", excess, RANGE_SLACK, f"{evidence}; {'they look like 0 to 255' if high > 2 else normalised}"
    )


# No honest model is 20 points better on pixels of another scale than on those that it is evaluated on.
SCALE_GAIN = 0.2


@probe("pixel-scale", "wrap the model so that it takes pixels in [0, 1] and scales or normalises them itself")
def pixel_scale(case: Case) -> Outcome:
    """Is the model evaluated on pixels of the scale that it was made for?

    Cost: 4 x 16 forward passes of a stochastic model, 4 of a deterministic one, on the probed images.
    """
    draws = Plan("scale", "clean", "pgd", "fresh", _SCALE_DRAWS)
    right = 0
    pairs = dict.fromkeys(_SCALES, (0, 0))
    for rows, log_probs, x, y in case.views(draws, case.probed, "scale"):
        as_given = _right(log_probs, x, y)
        right += int(as_given.sum())
        for name, rescale in _SCALES.items():
            if isinstance(case.model, SmoothedClassifier):
                # Before the noise, the same noise would be a different share of the pixels' range.
                behind = SmoothedDefender(with_network(case.model, Changed(case.model.classifier, rescale)), None)
                other = behind.log_probs(draws, x, case.pixels.select(rows).ids, case.seed, "audit/scale")
                rescaled = _right(other, x, y)
            else:
                rescaled = _right(log_probs, rescale(x), y)
            better, worse = pairs[name]
            pairs[name] = better + int((rescaled & ~as_given).sum()), worse + int((as_given & ~rescaled).sum())
    foreign = case.defender.kind == "random" and not isinstance(case.model, SmoothedClassifier)
    most_frequent = int(case.pixels.y[case.probed].bincount().max())
    return decide_scale(len(case.probed), right, pairs, most_frequent if foreign else None)


def decide_scale(total: int, right: int, others: Mapping[str, tuple[int, int]], chance: int | None = None) -> Outcome:
    """Decide on the gain of the best other scale.

    It fails when the gain exceeds ``SCALE_GAIN`` and an exact paired test shows that the gain of the distribution does.
    The level is ``LEVELS["pixel-scale"]``, shared evenly by the scales (Bonferroni), for images that are independent
    given the draws of a stochastic model.

    Args:
        total: number of clean images.
        right: number of them that are classified right in [0, 1].
        others: for each other scale the numbers of images that are right in that scale alone, and in [0, 1] alone.
        chance: for a stochastic network, the number of images that the best constant answer gets right. Pixels of
            another scale can drown the network's noise, so that a gain proves nothing where the network uses the images
            as they are. The finding then fails only where the network is no better than that answer. None for other
            models.
    """
    scale, (better, worse) = max(others.items(), key=lambda item: item[1][0] - item[1][1])
    gain = (better - worse) / total
    status: Status = "passed"
    if gain > SCALE_GAIN:
        shown = gain_p_value(better, worse, total, SCALE_GAIN) <= LEVELS["pixel-scale"] / len(others)
        status = "failed" if shown and (chance is None or right <= chance) else "undecided"
    evidence = (
        f"{right / total:.1%} of the clean images are classified right, {right / total + gain:.1%} of them as {scale}"
    )
    return Outcome(status, gain, SCALE_GAIN, evidence)


def gain_p_value(better: int, worse: int, total: int, gain: float) -> float:
    """Return a p-value for the hypothesis that a paired gain is at most ``gain``, valid for every number of images.

    Of ``total`` independent images ``better`` were right on the one side alone and ``worse`` on the other alone, with
    probabilities p and q. The hypothesis is p - q <= gain.

    The statistic T = better - 2 worse never falls when an image moves from the other side or from neither to the one
    side, nor when it moves from the other side to neither. P(T >= t) therefore grows with p and falls with q (couple
    image by image). So its largest value under the hypothesis is taken at p = q + gain, and for q in [a, b] it is at
    most its value at p = b + gain (at most 1 - a), q = a. The p-value is the largest of these bounds over 400 intervals
    that cover all q; like every p-value P(T >= t) it is <= u with probability <= u.
    """
    edges = np.linspace(0, (1 - gain) / 2, _INTERVALS + 1)
    q = edges[:-1, None]
    p = np.minimum(edges[1:, None] + gain, 1 - q)
    losses = np.arange(total + 1)[None]
    others, wins = total - losses, np.maximum(better - 2 * worse + 2 * losses, 0)
    chances = np.exp(
        special.gammaln(total + 1)
        - special.gammaln(losses + 1)
        - special.gammaln(others + 1)
        + special.xlogy(losses, q)
        + special.xlog1py(others, -q)
    )
    possible = wins <= others
    tails = special.betainc(np.maximum(wins, 1), np.where(possible, others - wins + 1, 1), p / (1 - q))
    tails = np.where(wins == 0, 1.0, np.where(possible, tails, 0.0))
    return min(1.0, float((chances * tails).sum(1).max()) * (1 + 1e-9))


# Relative. Float32 rounding at epsilon = 0.5/255 is 3e-5 of epsilon, n/256 instead of n/255 is 4e-3.
BALL_SLACK = 1e-3
# Around 255/256 = 0.9961; the ball itself is 8 such widths away.
BALL_256_WIDTH = 5e-4
# Every attack that can do so moves some pixel of some held image to the edge of an l-inf ball; [0, 1] may shorten
# changes in the other norms.
BALL_USED = {"linf": 0.9, "l2": 0.5, "l1": 0.5}
# Steps that together are shorter than the ball's radius cannot reach its edge.
REACH = 1.0


@probe("ball", "attack with the epsilon that is stated")
def ball(case: Case) -> Outcome:
    """Does the evaluation use the stated ball: no point outside it, and no smaller one? Cost: none."""
    if case.unattacked:
        return skipped("the evaluation has no attack")
    moves = case.plan is None or case.plan.method in (*STEPPING, "apgd")
    held = [moves and not broken for broken in case.evaluation.broken]
    return decide_ball(case.threat.norm, case.sizes.tolist(), held, case.reach)


def decide_ball(norm: str, sizes: Sequence[float], held: Sequence[bool], reach: float | None) -> Outcome:
    """Decide on the sizes of the changes.

    A plan that cannot reach the edge says nothing about the ball (see ``gradients.step_size``).

    Args:
        sizes: size of each image's change, in epsilon.
        held: whether the evaluation held that image.
        reach: length of all steps of the evaluation's attack in epsilon, None where it is not known.
    """
    largest = max(sizes)
    largest_held = max((size for size, is_held in zip(sizes, held, strict=True) if is_held), default=1.0)
    if largest > 1 + BALL_SLACK:
        evidence = f"points are up to {largest:.4f} epsilon away from their images"
        remedy = "project the points into the ball before they are judged"
        return Outcome("failed", largest, 1 + BALL_SLACK, evidence, remedy)
    if norm == "linf" and abs(largest - 255 / 256) < BALL_256_WIDTH:
        evidence = f"no pixel changes by more than {largest:.4f} epsilon, which is 255/256"
        remedy = "images have 256 values but 255 steps: epsilon is n/255, not n/256"
        return Outcome("failed", largest, 1 - BALL_SLACK, evidence, remedy)
    if largest_held < BALL_USED[norm] and (reach is None or reach >= REACH):
        evidence = f"the largest change of a held image is {largest_held:.3f} epsilon: a smaller ball was attacked"
        remedy = f"{ball.remedy}; one in normalised units, or divided by 255 twice, is too small"
        return Outcome("failed", largest_held, BALL_USED[norm], evidence, remedy)
    return Outcome("passed", largest, BALL_USED[norm], f"the largest change is {largest:.4f} epsilon")


# Log-probabilities of one image alone and among others: float32 sums in another order differ by less.
NEIGHBOURS = 1e-2


@probe("mode", "call model.eval() before evaluating; batch statistics must not be taken from the attacked batch")
def mode(case: Case) -> Outcome:
    """Do outputs depend on the image alone?

    Cost: twice 8 forward passes, and those of ``randomness``, since draws would look like an effect of the batch.
    """
    if case.training_layers or case.defender.kind == "random" or randomness(case).status == "failed":
        return decide_mode(case.training_layers, None)
    log_probs, x, _ = case.view(Plan("mode", "no attack", "none"), case.probed[:FEW_IMAGES], "mode")
    with torch.no_grad():
        together, alone = log_probs(x), torch.cat([log_probs(image) for image in x.split(1)])
    return decide_mode((), measures.relative_difference(together, alone))


def decide_mode(training_layers: Sequence[str], deviation: float | None) -> Outcome:
    """Decide on layers in training mode, and on the dependence of an image on the rest of the batch.

    That is the largest difference of a log-probability between an image alone and among others, None for a stochastic
    model.
    """
    if training_layers:
        evidence = f"{len(training_layers)} layers are in training mode (the first: {training_layers[0]})"
        return Outcome("failed", float(len(training_layers)), 0.0, evidence)
    if deviation is None:
        return Outcome("passed", 0.0, 0.0, "no layer is in training mode")
    evidence = f"log-probabilities of an image alone and among others differ by up to {deviation:.2g}"
    return Outcome("failed" if deviation > NEIGHBOURS else "passed", deviation, NEIGHBOURS, evidence)


# Two passes of a deterministic float32 model, log-probabilities; atomics on accelerators give 1e-6 to 1e-4.
PASSES_DIFFER = 1e-3


@probe(
    "randomness",
    'say how it decides (decision="vote", "mean" or "single") and attack the expectation over its draws',
)
def randomness(case: Case) -> Outcome:
    """Is the model stochastic exactly when it is evaluated as stochastic?

    Cost: 4 forward passes of a foreign model on 8 images, none of a smoothed one.
    """
    images = case.pixels.select(case.probed[:FEW_IMAGES])
    if not isinstance(case.model, SmoothedClassifier):
        difference, drew = measures.passes_differ(case.model, case.defender.execution, images.x, case.seed, _PASSES)
        return decide_randomness(case.defender.kind == "random", difference, drew)
    # Compare its noise, not its outputs: a base network of few outputs gives the same ones under other noise.
    generators = case.model.streams(case.seed, "audit/randomness", images.ids)
    first, *others = [case.model.sample_noise(images.x, 1, generators) for _ in range(_PASSES)]
    return decide_randomness(True, max(float((first - other).abs().max()) for other in others), what="a pixel")


def decide_randomness(
    declared: bool, difference: float, drew: bool = False, what: str = "a log-probability"
) -> Outcome:
    """Decide on whether passes differ.

    A model that draws is stochastic however rarely its draws change an output, so that nothing is left to chance.

    Args:
        declared: whether the model is evaluated as stochastic.
        difference: largest change of ``what`` between passes over the same images.
        drew: whether a pass moved one of the process's random generators.
    """
    evidence = (
        f"the model is evaluated as {'stochastic' if declared else 'deterministic'}; "
        f"passes over the same images differ by up to {difference:.2g} in {what}"
    )
    if not declared:
        return Outcome("failed" if difference > PASSES_DIFFER else "passed", difference, PASSES_DIFFER, evidence)
    if drew and difference == 0:
        evidence += ", and draw from the process's generators"
    remedy = "switch its randomness on, or evaluate it as the deterministic model it is"
    return Outcome("passed" if difference or drew else "failed", difference, 0.0, evidence, remedy)


# The sigma on both sides is estimated to about 2 %.
SIGMA_BAND = 1.1
# For the outputs of a foreign stochastic model. Honest ones have a ratio of 1 where they draw from the process's
# generators: both sides have the same draws.
SPREAD_BAND = 2.0


@probe("noise", "differentiate the model with the noise it is defended with, by EOT over fresh draws")
def noise(case: Case) -> Outcome:
    """Does the attacker differentiate the model under the defender's noise?

    Cost: about 16,384 / pixels forward passes for the attacker's noise and 800 for the defender's; of a foreign model
    32 + 32 on 8 images.
    """
    if case.defender.kind != "random":
        return skipped("the model is deterministic")
    plan = case.plan
    if plan is None:
        return skipped("the evaluation's attack is not known")
    if isinstance(case.model, SmoothedClassifier):
        return decide_noise(*measures.sigmas(case.model, plan, case.pixels.x.shape[1:], case.seed), "sigma")
    defender = case.defender
    assert isinstance(defender, RandomDefender)
    images = case.pixels.select(case.probed[:FEW_IMAGES])
    x = images.x.to(defender.execution.device)
    spreads = measures.spreads(defender, plan, x, images.ids, case.seed)
    return decide_noise(*spreads, "spread", lambda: measures.spreads_p_value(defender, plan, x, images.ids, case.seed))


def decide_noise(
    attacker: float, defender: float, kind: Literal["sigma", "spread"], p_value: Callable[[], float] = lambda: 0.0
) -> Outcome:
    """Decide on the ratio of two deviations, which fails when it leaves its band and chance does not explain that.

    Args:
        attacker: standard deviation of the noise on the base classifier's inputs ("sigma"), or of a foreign stochastic
            model's probabilities ("spread"), under the evaluation's attack.
        defender: the same in the verdict.
        p_value: p-value of the hypothesis that both sides draw alike, called outside the band only. It is 0 where the
            band itself is beyond chance ("sigma").
    """
    band, what = {
        "sigma": (SIGMA_BAND, "noise of standard deviation"),
        "spread": (SPREAD_BAND, "outputs that spread by"),
    }[kind]
    ratio = attacker / defender if defender > 0 else (1.0 if attacker == 0 else float(np.finfo(float).max))
    status: Status = "passed"
    if not 1 / band <= ratio <= band:
        status = "failed" if p_value() <= LEVELS["noise"] else "undecided"
    evidence = f"the attacker sees {what} {attacker:.4g}, the defender {defender:.4g}"
    return Outcome(status, ratio, 1 / band if ratio < 1 else band, evidence)


@probe(
    "verdict",
    "decide success by an exact test on many fresh votes, never by one stochastic pass, and allow enough votes",
)
def verdict(case: Case) -> Outcome:
    """Do the evaluation's verdicts stand when its own points are judged again?

    An image that was left undecided and is broken now contradicts its verdict too.

    Cost: the second judgement, 200 to ``max_votes`` forward passes of a stochastic model, 1 of a deterministic one.
    """
    if case.rejudged is None:
        return skipped("the audit itself ran and judged the evaluation")
    contradictions = [(BROKEN, HELD), (HELD, BROKEN), (UNDECIDED, BROKEN)]
    pairs = zip(case.evaluation.verdict.tolist(), case.rejudged.verdict.tolist(), strict=True)
    what = "images have another verdict when the evaluation's own points are judged again"
    return share(sum(pair in contradictions for pair in pairs), len(case.pixels), GAIN, what)


def _right(log_probs: LogProbs, x: Tensor, y: Tensor) -> Tensor:
    """Return which of the images ``x`` are given their label, (B,)."""
    return (measures.without_gradient(log_probs, x).argmax(1) == y).cpu()
