"""What the audit finds wrong with an evaluation: from measured figures to named findings, and the thresholds of all.

Each function is pure: it takes what ``audit_probes`` measured and says passed, failed, undecided (too few images to
tell) or skipped (nothing to look at). ``ORDER`` runs from causes to symptoms, so that the first failed finding is the
best explanation of a flattering evaluation.

A share of images fails its threshold when its one-sided 95 % Clopper-Pearson lower bound lies above, passes when the
share itself does not, and is undecided between the two: no finding fails because of a few images.

Some findings decide alone: failed, they make an evaluation ``overestimated`` whatever d is (``INVALIDATING``). Each of
them has a proven level in ``LEVELS``, a bound on the probability that it fails on an honest evaluation. Together with
the level of d the levels sum to at most ``OVERESTIMATED_LEVEL``, so that the verdict as a whole has it (union bound).

The thresholds are frozen: they were fixed before the second half of the zoo, the models and evaluations that they are
tested on, was written. Whoever changes one needs a zoo that was made afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from rush.statistics import share_interval

_INTERVALS = 400  # of the probability that is not known, in ``gain_p_value``

Status = Literal["passed", "failed", "undecided", "skipped"]

# A gain below a point is within what another random start finds; the verdict on the evaluation uses the same point.
GAIN = 0.01
# One-sided level of every bound: the two-sided interval of twice the tail.
CONFIDENCE = 0.95
# Bound on the probability of ``overestimated`` for an honest evaluation: it holds what it says within ``GAIN``, and is
# one of this model under this threat model.
OVERESTIMATED_LEVEL = 0.05
# How it is spent. "d": the one-sided bound on the share of newly broken images. The zeros leave nothing to chance on an
# honest model: they are properties of given points, of a deterministic network, or of whether anything is drawn at all.
LEVELS = {"d": 0.04, "input-range": 0.0, "pixel-scale": 0.005, "mode": 0.0, "randomness": 0.0, "noise": 0.005}
# Pixels leave [0, 1] by rounding alone by less than this; a wrong range leaves it by more than a grey level, 0.004.
RANGE_SLACK = 1e-4
# No honest model is 20 points better on pixels of another scale than on those it is evaluated on.
SCALE_GAIN = 0.2
# Relative; float32 rounding at epsilon = 0.5/255 is 3e-5 of epsilon, n/256 instead of n/255 is 4e-3.
BALL_SLACK = 1e-3
# Around 255/256 = 0.9961; the ball itself is 8 such widths away.
BALL_256_WIDTH = 5e-4
# Every attack that can takes some pixel of some held image to the edge of an l-inf ball; [0, 1] may shorten the others.
BALL_USED = {"linf": 0.9, "l2": 0.5, "l1": 0.5}
# Log-probabilities of one image alone and among others: float32 sums in another order differ by less.
NEIGHBOURS = 1e-2
# Two passes of a deterministic float32 model, log-probabilities; atomics on accelerators give 1e-6 to 1e-4.
PASSES_DIFFER = 1e-3
# The sigma that both sides see is estimated to about 2 %.
SIGMA_BAND = 1.1
# Of a foreign random model's outputs. Honest ones have a ratio of 1 where they draw from the process's generators: both
# sides see the same draws.
SPREAD_BAND = 2.0
# Images whose gradient carries nothing: an attack cannot move on them; a point of accuracy is a fifth of this share.
DEAD_SHARE = 0.05
# Cosine between autograd's and the measured slopes; below it the attack keeps less than half of the steepest ascent.
AGREEMENT = 0.5
# Steps that together are shorter than the ball's radius cannot reach its edge.
REACH = 1.0
# An attack that cannot break an image goes to the edge; half of it for most images means that it stopped on the way.
EDGE = 0.5
# Draws that a cosine of 0.5 with the expected gradient needs, over those that the attack averages: with fewer, more of
# each step is noise than ascent.
DRAWS_NEEDED = 1.0
# Attacks that work raise the loss on all images; this leaves room for flat ones.
NOT_RISING = 0.1
# At half of the pixel range every image can be turned into the same grey.
LARGE_EPSILON_HELD = 0.1
# A planted example is linear in the pixels and inside the ball; an attack that optimises finds nearly all.
PLANTED_MISSED = 0.1
# Fewer images than this decide no median.
FEWEST = 5

ORDER = (
    "input-range",
    "pixel-scale",
    "ball",
    "mode",
    "randomness",
    "noise",
    "verdict",
    "frozen-noise",
    "gradient",
    "finite-differences",
    "step-size",
    "signal-to-noise",
    "path",
    # Twice the steps of a random model are twice the draws too: where more draws help, they are what was missing.
    "more-eot-samples",
    "more-steps",
    "more-restarts",
    "other-loss",
    "large-epsilon",
    "planted",
    "fixed-noise-attack",
    "transfer",
    "straight-through",
    "smoothed-surrogate",
    "square",
    "random-search",
    "worst-case",
    "certificates",
)

# Failed, these say that the evaluation was not one of this model under this threat model, whatever its number.
INVALIDATING = frozenset({"input-range", "pixel-scale", "mode", "randomness", "noise"})


@dataclass(frozen=True)
class Finding:
    """One look at an evaluation.

    figure: what was measured, None where nothing was; threshold: what it is held against; evidence: one sentence;
    remedy: what to do if it failed.
    """

    name: str
    status: Status
    figure: float | None
    threshold: float | None
    evidence: str
    remedy: str


def skipped(name: str, reason: str) -> Finding:
    """A finding that had nothing to look at."""
    return Finding(name, "skipped", None, None, reason, "")


def lower_bound(count: int, total: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided Clopper-Pearson lower bound of the share ``count`` / ``total``, by default of 95 %."""
    return share_interval(count, total, 2 * confidence - 1).low


def upper_bound(count: int, total: int) -> float:
    """One-sided 95 % Clopper-Pearson upper bound of the share ``count`` / ``total``."""
    return share_interval(count, total, 2 * CONFIDENCE - 1).high


def share_status(count: int, total: int, threshold: float) -> Status:
    """Failed when the share's lower bound is above ``threshold``, passed when the share is not, else undecided."""
    if lower_bound(count, total) > threshold:
        return "failed"
    return "passed" if count / total <= threshold else "undecided"


def input_range(low: float, high: float) -> Finding:
    """Whether the points of the evaluation, with these extreme pixels, lie in [0, 1]."""
    excess = max(-low, high - 1, 0.0)
    if high > 2:
        looks = "they look like 0 to 255"
    elif low < -RANGE_SLACK:
        looks = "they look normalised"
    else:
        looks = "they were not clipped"
    return Finding(
        "input-range",
        "failed" if excess > RANGE_SLACK else "passed",
        excess,
        RANGE_SLACK,
        f"the evaluation's points have pixels from {low:g} to {high:g}"
        + (f"; {looks}" if excess > RANGE_SLACK else ""),
        "attack pixels in [0, 1] and put scaling and normalisation into the model",
    )


def pixel_scale(total: int, right: int, others: Mapping[str, tuple[int, int]], chance: int | None = None) -> Finding:
    """Return whether the model is evaluated on pixels of the scale that it was made for.

    Failed when the largest gain by another scale exceeds ``SCALE_GAIN`` and an exact paired test shows that the gain of
    the distribution does. Level: ``LEVELS["pixel-scale"]``, shared evenly by the scales (Bonferroni), for images that
    are independent given the draws of a stochastic model.

    Args:
        total: number of clean images; right: how many of them are classified right in [0, 1].
        others: for each other scale how many images are right in that scale alone, and how many in [0, 1] alone.
        chance: for a stochastic network, how many images the best constant answer has right. Pixels of another scale
            can drown its own noise, so that a gain proves nothing where it sees the images as they are; it fails only
            where it is no better than that answer. None for other models.
    """
    scale, (better, worse) = max(others.items(), key=lambda item: item[1][0] - item[1][1])
    gain = (better - worse) / total
    level = LEVELS["pixel-scale"] / len(others)
    shown = gain_p_value(better, worse, total, SCALE_GAIN) <= level
    status: Status = "passed"
    if gain > SCALE_GAIN:
        status = "failed" if shown and (chance is None or right <= chance) else "undecided"
    return Finding(
        "pixel-scale",
        status,
        gain,
        SCALE_GAIN,
        f"{right / total:.1%} of the clean images are classified right, {right / total + gain:.1%} of them as {scale}",
        "wrap the model so that it takes pixels in [0, 1] and scales or normalises them itself",
    )


def gain_p_value(better: int, worse: int, total: int, gain: float) -> float:
    """Return a p-value for the hypothesis that a paired gain is at most ``gain``, valid for every number of images.

    Of ``total`` independent images ``better`` were right on the one side alone and ``worse`` on the other alone, with
    probabilities p and q. Hypothesis: p - q <= gain.

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


def ball(norm: str, shares: Sequence[float], held: Sequence[bool], reach: float | None) -> Finding:
    """Whether the evaluation used the stated ball: no point outside, and no smaller one.

    shares: size of each change over epsilon; held: whether the evaluation held that image; reach: steps x step size of
    its plan, None where unknown (a plan that cannot reach the edge says nothing about the ball: see ``step_size``).
    """
    largest = max(shares)
    kept = max((share for share, own in zip(shares, held, strict=True) if own), default=1.0)
    status: Status = "failed"
    threshold = BALL_USED[norm]
    remedy = "attack with the epsilon that is stated"
    if largest > 1 + BALL_SLACK:
        evidence = f"points are up to {largest:.4f} epsilon away from their images"
        threshold, remedy = 1 + BALL_SLACK, "project the points into the ball before they are judged"
    elif norm == "linf" and abs(largest - 255 / 256) < BALL_256_WIDTH:
        evidence = f"no pixel changes by more than {largest:.4f} epsilon, which is 255/256"
        threshold, remedy = 1 - BALL_SLACK, "images have 256 values but 255 steps: epsilon is n/255, not n/256"
    elif kept < threshold and (reach is None or reach >= REACH):
        evidence = f"the largest change of a held image is {kept:.3f} epsilon: a smaller ball was attacked"
        remedy += "; one in normalised units, or divided by 255 twice, is too small"
        largest = kept
    else:
        status, evidence = "passed", f"the largest change is {largest:.4f} epsilon"
    return Finding("ball", status, largest, threshold, evidence, remedy)


def mode(training: Sequence[str], deviation: float | None) -> Finding:
    """Whether outputs depend on the image alone.

    training: names of layers in training mode; deviation: largest difference of a log-probability between an image
    alone and the same among others, None where the model is random.
    """
    remedy = "call model.eval() before evaluating; batch statistics must not be taken from the attacked batch"
    if training:
        evidence = f"{len(training)} layers are in training mode (the first: {training[0]})"
        return Finding("mode", "failed", float(len(training)), 0.0, evidence, remedy)
    if deviation is None:
        return Finding("mode", "passed", 0.0, 0.0, "no layer is in training mode", remedy)
    status: Status = "failed" if deviation > NEIGHBOURS else "passed"
    evidence = f"log-probabilities of an image alone and among others differ by up to {deviation:.2g}"
    return Finding("mode", status, deviation, NEIGHBOURS, evidence, remedy)


def randomness(declared: bool, difference: float, drew: bool = False, what: str = "a log-probability") -> Finding:
    """Return whether a model is stochastic exactly when it is said to be.

    A model that draws is stochastic however rarely its draws change an output, so that nothing is left to chance.

    Args:
        declared: whether it is evaluated as stochastic.
        difference: largest change of ``what`` between passes over the same images.
        drew: whether a pass moved one of the process's random generators.
    """
    wrong = (difference == 0 and not drew) if declared else difference > PASSES_DIFFER
    evidence = (
        f"the model is evaluated as {'random' if declared else 'deterministic'}; "
        f"passes over the same images differ by up to {difference:.2g} in {what}"
        + (", and draw from the process's generators" if declared and drew and difference == 0 else "")
    )
    remedy = (
        "switch its randomness on, or evaluate it as the deterministic model it is"
        if declared
        else 'say how it decides (decision="vote", "mean" or "single") and attack the expectation over its draws'
    )
    return Finding(
        "randomness", "failed" if wrong else "passed", difference, 0.0 if declared else PASSES_DIFFER, evidence, remedy
    )


def noise(attacker: float, defender: float, kind: Literal["sigma", "spread"], p_value: float = 0.0) -> Finding:
    """Return whether the attacker differentiates the model with the defender's noise.

    Failed when the ratio of the two leaves its band and chance does not explain it.

    Args:
        attacker, defender: standard deviation of the noise on the base classifier's inputs ("sigma"), or of a foreign
            stochastic model's probabilities ("spread"), under the evaluation's attack and in the verdict.
        p_value: of the hypothesis that both sides draw alike; 0 where the band itself is beyond chance ("sigma").
    """
    band = SIGMA_BAND if kind == "sigma" else SPREAD_BAND
    ratio = _ratio(attacker, defender)
    what = "noise of standard deviation" if kind == "sigma" else "outputs that spread by"
    status: Status = "passed"
    if not within(attacker, defender, band):
        status = "failed" if p_value <= LEVELS["noise"] else "undecided"
    return Finding(
        "noise",
        status,
        ratio,
        1 / band if ratio < 1 else band,
        f"the attacker sees {what} {attacker:.4g}, the defender {defender:.4g}",
        "differentiate the model with the noise it is defended with, by EOT over fresh draws",
    )


def within(attacker: float, defender: float, band: float) -> bool:
    """Return whether the ratio of two standard deviations is between 1 / ``band`` and ``band``."""
    return 1 / band <= _ratio(attacker, defender) <= band


def _ratio(attacker: float, defender: float) -> float:
    if defender > 0:
        return attacker / defender
    return 1.0 if attacker == 0 else float(np.finfo(float).max)


def verdict(contradicted: int, total: int) -> Finding:
    """Whether the evaluation's verdicts stand when its own points are judged again.

    contradicted: images held there and broken now, or the reverse, or left undecided there and broken now.
    """
    return _share(
        "verdict",
        contradicted,
        total,
        GAIN,
        "images have another verdict when the evaluation's own points are judged again",
        "decide success by an exact test on many fresh votes: never by one stochastic pass, and with votes enough",
    )


def gradient(dead: int, total: int, saturated: int) -> Finding:
    """Whether the loss has a usable gradient at the images.

    dead: images whose gradient is not finite, zero or lost to underflow; saturated: images whose loss is exactly 0.
    """
    return _share(
        "gradient",
        dead,
        total,
        DEAD_SHARE,
        f"images have a zero or non-finite gradient ({saturated} of them by a saturated softmax)",
        "attack a loss on logits (margin, DLR), or give a differentiable surrogate for what has no gradient (BPDA)",
    )


def finite_differences(agreement: float, ratio: float, images: int) -> Finding:
    """Whether autograd's gradient is the slope of the loss.

    agreement: cosine between autograd's and measured slopes along random directions, pooled over images; ratio: median
    measured slope over autograd's along the gradient itself.
    """
    wrong = agreement < AGREEMENT or ratio <= 0
    return Finding(
        "finite-differences",
        "undecided" if images < FEWEST else ("failed" if wrong else "passed"),
        agreement,
        AGREEMENT,
        f"slopes by autograd and by finite differences agree with cosine {agreement:.2f} along random directions; "
        f"along the gradient the measured slope is {ratio:.2g} of autograd's ({images} images)",
        "find what is detached, rounded or replaced in the backward pass, or give a better surrogate",
    )


def step_size(reach: float | None, median: float, images: int) -> Finding:
    """Whether the attack can get to the edge of the ball, and does.

    reach: steps x step size over epsilon, None where the plan has no fixed step; median: size of the change over
    epsilon, the median of held images.
    """
    remedy = "take steps that together are at least twice epsilon (step size 2.5 epsilon / steps)"
    if reach is not None and reach < REACH:
        evidence = f"all steps together are {reach:.3g} epsilon long"
        return Finding("step-size", "failed", reach, REACH, evidence, remedy)
    if images < FEWEST:
        return Finding("step-size", "passed", median, EDGE, f"{images} images are held", remedy)
    evidence = f"the median change of held images is {median:.3g} epsilon"
    return Finding("step-size", "failed" if median < EDGE else "passed", median, EDGE, evidence, remedy)


def signal_to_noise(needed: Sequence[float], averaged: float) -> Finding:
    """Whether the attack averages enough noise to see a direction.

    needed: for each image the draws after which the gradient has cosine 0.5 with its expectation; averaged: the
    evaluation's draws a gradient, times the steps within a quarter of the ball's radius where steps are shorter.
    """
    median = sorted(needed)[len(needed) // 2]
    figure = median / averaged
    return Finding(
        "signal-to-noise",
        "undecided" if len(needed) < FEWEST else ("failed" if figure > DRAWS_NEEDED else "passed"),
        figure,
        DRAWS_NEEDED,
        f"a gradient of cosine 0.5 takes {median:.3g} draws (median of {len(needed)} images), "
        f"the evaluation averages {averaged:.3g}",
        "raise eot_samples, or take more and smaller steps",
    )


def path(not_rising: int, total: int) -> Finding:
    """Whether the loss is higher at the evaluation's points than at the images, on common random numbers."""
    return _share(
        "path",
        not_rising,
        total,
        NOT_RISING,
        "held images have no higher loss at the evaluation's point than at the image itself",
        "look at the loss along the attack's path: step size, sign of the loss, and noise of the gradient",
    )


def large_epsilon(held: int, total: int, norm: str, epsilon: float) -> Finding:
    """Whether the evaluation's own attack breaks all images once anything is allowed."""
    return _share(
        "large-epsilon",
        held,
        total,
        LARGE_EPSILON_HELD,
        f"images are still held against the evaluation's own attack at {norm} epsilon {epsilon:.3g}",
        "an attack that cannot break a model in half of the pixel range does not optimise; find out why",
    )


def planted(missed: int, total: int) -> Finding:
    """Whether the evaluation's attack finds adversarial examples that were planted (Zimmermann et al. 2022)."""
    return _share(
        "planted",
        missed,
        total,
        PLANTED_MISSED,
        "adversarial examples that were planted into the model were not found by the evaluation's attack",
        "an attack that misses what is known to be there proves nothing by finding nothing; change loss, steps, draws",
    )


def gain(name: str, newly: int, total: int, attack: str) -> Finding:
    """Whether another attack, ``attack``, breaks images that the evaluation held. One sentence serves them all."""
    return _share(name, newly, total, GAIN, f"images that the evaluation held are broken by {attack}", _REMEDIES[name])


def certificates(violations: int, checked: int, allowed: int) -> Finding:
    """Whether proof and attack agree: of ``checked`` certified images ``violations`` are broken inside their radius,
    of which chance explains ``allowed``. Were certified accuracy above attacked accuracy, one of them would be."""
    return Finding(
        "certificates",
        "failed" if violations > allowed else "passed",
        float(violations),
        float(allowed),
        f"{violations} of {checked} certified images are broken inside their radius, {allowed} can be chance",
        "certificate or verdict is wrong: other weights, other noise, other pixels; do not rely on either",
    )


_REMEDIES = {
    "frozen-noise": "draw noise anew at every step: an attack on frozen noise fits those draws and flatters the model",
    "more-steps": "double the steps until the result no longer moves",
    "more-eot-samples": "double eot_samples until the result no longer moves",
    "more-restarts": "add restarts until the result no longer moves",
    "other-loss": "take the worst case over several losses, image by image",
    "fixed-noise-attack": "the gradient's noise hides the direction: raise eot_samples",
    "transfer": "a transferred point beats the gradient attack, so its gradient is masked: attack through a surrogate",
    "straight-through": "steps without a derivative mask the gradient: attack through them as through the identity",
    "smoothed-surrogate": "the gradient is masked or too noisy: take it from the mean over noisy images, or raise "
    "eot_samples",
    "square": "a gradient-free attack beats the gradient attack, so its gradient is masked: change loss or surrogate",
    "random-search": "random points beat the attack, so it does not optimise at all",
    "worst-case": "report the worst case over a suite of attacks, image by image",
}


def _share(name: str, count: int, total: int, threshold: float, what: str, remedy: str) -> Finding:
    if total == 0:
        return skipped(name, "no image to look at")
    return Finding(
        name, share_status(count, total, threshold), count / total, threshold, f"{count} of {total} {what}", remedy
    )
