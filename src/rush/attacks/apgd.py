"""Auto-PGD: projected gradient ascent that sets its own step sizes (Croce & Hein 2020; for l1 Croce & Hein 2021)."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, is_random, loss_and_gradient, pinned
from rush.attacks.losses import Loss, cross_entropy, margin
from rush.attacks.threat import ThreatModel, choose
from rush.choices import Norm

MOMENTUM = 0.75  # weight of the projected step; the rest is the previous move
RHO = 0.75  # the step is halved unless this share of steps raised the loss
FIRST_STEP = {"linf": 2.0, "l2": 2.0, "l1": 1.0}  # in epsilon
# On a stochastic function shorter steps average more noise: 0.5 was better than 2 and 1 when measured on smoothed
# networks.
RANDOM_FIRST_STEP = {"linf": 0.5, "l2": 0.5, "l1": 1.0}
# Periods between checkpoints in hundredths of the steps: from 22 by 3 down to 6; for l1 always 4.
_PERIODS = {"linf": (22, 19, 16, 13, 10, 7, 6, 6), "l2": (22, 19, 16, 13, 10, 7, 6, 6), "l1": (4,) * 24}
L1_FIRST_DENSITY = 0.2  # share of the pixels that a step changes
L1_THINNING = 1.5  # the share is this many times smaller than that of the best change so far
L1_SMALLEST_STEP = 0.01  # in epsilon


def apgd(
    log_probs: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    loss: Loss = cross_entropy,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximise ``loss`` in the ball by projected steps with momentum, whose size is reviewed at checkpoints.

    Steps begin at 2 epsilon (0.5 on a stochastic function). A checkpoint halves the step, returns the image to its best
    point and forgets the previous move if fewer than RHO of the steps since the last checkpoint raised the loss, or if
    neither the step nor the largest loss has changed since then (algorithm 1). For l1 there is no momentum: each review
    sets the number of pixels that a step changes to 1 / ``L1_THINNING`` of those of the best change so far, and the
    step shrinks once that number has settled.

    On a deterministic function ``best`` has the largest loss among the misclassified points or, if there are none,
    among all. On a stochastic function the largest of many measured losses is partly luck. There the best and the
    current point are compared on common random numbers, only at the checkpoints and at the end. The step is halved
    where the current point loses, and points between checkpoints are never returned.

    Args:
        log_probs: the attacked function, (B, C, H, W) -> (B, K).
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        threat: the ball.
        steps: number of gradient steps.
        loss: the objective. Cross-entropy has no gradient at a confident point (p_y = 1 in float32): start elsewhere,
            or use margin or DLR.
        start: first point (default ``x``), projected into the ball.

    Returns:
        Two candidates per image, (best, last), both (B, C, H, W) in the ball and in [0, 1].

    Random: nothing but ``log_probs``.

    Cost: ``steps`` forward and backward passes through ``log_probs`` and one more forward pass, or, where it is
    stochastic, two more for each of the ``checkpoints`` and for the end.
    """
    point = x if start is None else threat.project(start, x)
    climb = _climb_random if is_random(log_probs) else _climb
    return climb(log_probs, x, y, threat, steps, loss, point)


def checkpoints(steps: int, norm: Norm) -> list[int]:
    """Return the numbers of steps after which the step size is reviewed, without duplicates and without the end."""
    shares = accumulate(_PERIODS[norm])
    return sorted({-(-share * steps // 100) for share in shares} - {0, steps})


def _climb(
    log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, loss: Loss, point: Tensor
) -> tuple[Tensor, Tensor]:
    pace = _Pace.first(x, threat.norm, FIRST_STEP[threat.norm])
    reviews, judged_loss = checkpoints(steps, threat.norm), _JudgedLoss(loss)
    # The result prefers misclassified points. The ascent returns to the largest loss, whatever the class.
    result, best = _Best.none(x), _Best.none(x)
    best_gradient, previous = torch.zeros_like(x), point  # (B, C, H, W)
    value_before = torch.full((len(x),), torch.inf, device=x.device)  # (B,)
    rises, last_review, value_at_review = torch.zeros_like(value_before), 0, -value_before
    for i in range(steps):
        values, gradient = loss_and_gradient(log_probs, point, y, judged_loss)  # (B,), (B, C, H, W)
        result, _ = result.or_better(point, values, judged_loss.broken)
        best, better = best.or_better(point, values, torch.zeros_like(judged_loss.broken))
        best_gradient = choose(better, gradient, best_gradient)
        rises += values > value_before
        if i in reviews:
            unsteady, stalled = rises < RHO * (i - last_review), best.values <= value_at_review
            pace, returns = pace.reviewed(unsteady, stalled, best.point, x)
            # The gradient at the best point is known, so that going back costs no pass.
            point, gradient = choose(returns, best.point, point), choose(returns, best_gradient, gradient)
            previous, values = choose(returns, point, previous), choose(returns, best.values, values)
            rises, last_review, value_at_review = torch.zeros_like(rises), i, best.values
        previous, point = point, _next(threat, x, point, previous, gradient, pace, first=i == 0)
        value_before = values
    with torch.no_grad():
        values = judged_loss(log_probs(point), y)
    result, _ = result.or_better(point, values, judged_loss.broken)
    return result.point, point


def _climb_random(
    log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, loss: Loss, point: Tensor
) -> tuple[Tensor, Tensor]:
    pace = _Pace.first(x, threat.norm, RANDOM_FIRST_STEP[threat.norm])
    reviews = checkpoints(steps, threat.norm)
    best = previous = point
    for i in range(steps):
        if i in reviews:
            # Losses of single steps are too noisy to count rises: one comparison stands for both conditions.
            better = _beats(log_probs, point, best, y, loss)  # (B,)
            best = choose(better, point, best)
            pace, returns = pace.reviewed(~better, ~better, best, x)
            point, previous = choose(returns, best, point), choose(returns, best, previous)
        # Even after a return the gradient is computed on fresh noise: steps average over draws.
        _, gradient = loss_and_gradient(log_probs, point, y, loss)
        previous, point = point, _next(threat, x, point, previous, gradient, pace, first=i == 0)
    return choose(_beats(log_probs, point, best, y, loss), point, best), point


def _next(
    threat: ThreatModel, x: Tensor, point: Tensor, previous: Tensor, gradient: Tensor, pace: "_Pace", first: bool
) -> Tensor:
    """Return the next point (B, C, H, W): equations 2 and 3 of Croce & Hein 2020, for l1 only a sparse step."""
    stepped = threat.project(point + threat.step(gradient, pace.share, point, pace.density), x)
    if first or threat.norm == "l1":
        return stepped
    return threat.project(point + MOMENTUM * (stepped - point) + (1 - MOMENTUM) * (point - previous), x)


@dataclass(frozen=True)
class _Pace:
    """Step size of each image.

    Attributes:
        norm: norm of the threat model.
        share: length of a step as a share of epsilon, (B, 1, 1, 1).
        density: for l1, share of the pixels that a step changes, (B, 1, 1, 1).
        halved: whether the last review halved the step, (B,).
        pixels: for l1, number of pixels of the best change at the last review, (B, 1, 1, 1).
    """

    norm: Norm
    share: Tensor
    density: Tensor
    halved: Tensor
    pixels: Tensor

    @classmethod
    def first(cls, x: Tensor, norm: Norm, share: float) -> "_Pace":
        ones = torch.ones((len(x), 1, 1, 1), dtype=x.dtype, device=x.device)
        unhalved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return cls(norm, share * ones, L1_FIRST_DENSITY * ones, unhalved, x[0].numel() * ones)

    def reviewed(self, unsteady: Tensor, stalled: Tensor, best: Tensor, x: Tensor) -> "tuple[_Pace, Tensor]":
        """Return the pace after a checkpoint, and which images (B,) return to their best point."""
        if self.norm == "l1":
            return self._thinned(stalled, best, x)
        # A stalled image whose step was just halved gets one more period at that step.
        halve = unsteady | (stalled & ~self.halved)
        return _Pace(self.norm, choose(halve, self.share / 2, self.share), self.density, halve, self.pixels), halve

    def _thinned(self, stalled: Tensor, best: Tensor, x: Tensor) -> "tuple[_Pace, Tensor]":
        pixels = (best != x).flatten(1).sum(1).to(x.dtype).view(-1, 1, 1, 1)
        # While the best change keeps losing pixels, steps stay long and start from it.
        fewer = pixels < 0.95 * self.pixels
        share = torch.where(fewer, FIRST_STEP["l1"], (self.share / L1_THINNING).clamp(min=L1_SMALLEST_STEP))
        base = choose(stalled, self.density, pixels / x[0].numel())
        return _Pace(self.norm, share, base / L1_THINNING, self.halved, pixels), fewer.flatten()


@dataclass(frozen=True)
class _Best:
    """The best ``point`` of each image so far: ``broken`` points (B,) before others, then by their ``values`` (B,)."""

    point: Tensor
    values: Tensor
    broken: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "_Best":
        unbroken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return cls(x, torch.full((len(x),), -torch.inf, device=x.device), unbroken)

    def or_better(self, point: Tensor, values: Tensor, broken: Tensor) -> "tuple[_Best, Tensor]":
        better = (broken & ~self.broken) | ((broken == self.broken) & (values > self.values))
        values = choose(better, values, self.values)
        return _Best(choose(better, point, self.point), values, broken | self.broken), better


class _JudgedLoss:
    """A loss that records which images (B,) were misclassified in its last call, so that judging costs no pass."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.broken = torch.zeros(0, dtype=torch.bool)

    def __call__(self, log_probs: Tensor, y: Tensor) -> Tensor:
        self.broken = margin(log_probs.detach(), y) > 0
        return self.loss(log_probs, y)


def _beats(log_probs: LogProbs, point: Tensor, best: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Return where ``point`` has the larger loss (B,) on one new draw of noise, the same for both points."""
    same = pinned(log_probs)
    with torch.no_grad():
        return loss(same(point), y) > loss(same(best), y)
