"""Auto-PGD: projected gradient ascent that sets its own step sizes (Croce & Hein 2020; for l1 Croce & Hein 2021)."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rush.attacks.gradient import LogProbs, is_random, loss_and_gradient, pinned
from rush.attacks.losses import Loss, cross_entropy, margin
from rush.attacks.threat import ThreatModel
from rush.choices import Norm

MOMENTUM = 0.75  # share of the projected step, the rest is the move before
RHO = 0.75  # share of steps that must raise the loss, or the step is halved
FIRST_STEP = {"linf": 2.0, "l2": 2.0, "l1": 1.0}  # in epsilon
# On a random function shorter steps average more noise: 0.5 was measured better than 2 and 1 on smoothed networks.
RANDOM_FIRST_STEP = {"linf": 0.5, "l2": 0.5, "l1": 1.0}
# Checkpoints in hundredths of the steps: the periods fall from 22 by 3 to 6; for l1 a period of 4.
_PERIODS = {"linf": (22, 19, 16, 13, 10, 7, 6, 6), "l2": (22, 19, 16, 13, 10, 7, 6, 6), "l1": (4,) * 24}
L1_FIRST_DENSITY = 0.2  # share of the pixels that a step changes
L1_THINNING = 1.5  # the share is this much below that of the best change so far
L1_SMALLEST_STEP = 0.01


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
    """Two candidates for each image, (best, last), both (B, C, H, W) in the ball and in [0, 1].

    Steps of 2 epsilon (0.5 on a random function) with momentum; at checkpoints the step is halved, and the image goes
    back to its best point, the move before forgotten, where fewer than RHO of the steps since the last checkpoint
    raised the loss, or where neither the step nor the largest loss has changed since then (algorithm 1). For l1 there
    is no momentum: steps change ever fewer pixels, ``L1_THINNING`` times fewer than the best change so far, and shrink
    where that number has settled.

    On a function that is not random ``best`` is a misclassified point if there was one, and among these, or else among
    all, the one of largest loss. On a random one a measured maximum is luck: there best and current point are compared
    on common random numbers, at the checkpoints and at the end alone; the step is halved where the current point is
    not the better one; points between checkpoints are never returned.

    x: (B, C, H, W) in [0, 1]; y: (B,); start: where to begin, ``x`` by default. No gradient of CE is left at a
    confident point (p_y = 1 in float32): begin elsewhere, or take margin or DLR.
    Cost: ``apgd_passes``. Nothing here is random but ``log_probs``.
    """
    point = x if start is None else threat.project(start, x)
    climb = _climb_random if is_random(log_probs) else _climb
    return climb(log_probs, x, y, threat, steps, loss, point)


def apgd_passes(steps: int, random: bool, norm: Norm = "linf") -> tuple[int, int]:
    """Passes of one image through ``log_probs``: (forward and backward, forward alone)."""
    return steps, 2 * (len(checkpoints(steps, norm)) + 1) if random else 1


def checkpoints(steps: int, norm: Norm) -> list[int]:
    """After how many steps the step size is reviewed, each once, those at the end left out."""
    shares = accumulate(_PERIODS[norm])
    return sorted({-(-share * steps // 100) for share in shares} - {0, steps})


def _climb(
    log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, loss: Loss, point: Tensor
) -> tuple[Tensor, Tensor]:
    pace = _Pace.first(x, threat.norm, FIRST_STEP[threat.norm])
    due, watched = checkpoints(steps, threat.norm), _Watched(loss)
    found, best = _Best.none(x), _Best.none(x)
    best_gradient, previous = torch.zeros_like(x), point
    value_before = torch.full((len(x),), torch.inf, device=x.device)
    rises, last_due, value_at_due = torch.zeros_like(value_before), 0, -value_before
    for i in range(steps):
        values, gradient = loss_and_gradient(log_probs, point, y, watched)
        found, _ = found.or_better(point, values, watched.broken)
        best, better = best.or_better(point, values, torch.zeros_like(watched.broken))
        best_gradient = _where(better, gradient, best_gradient)
        rises += values > value_before
        if i in due:
            unsteady, stalled = rises < RHO * (i - last_due), best.values <= value_at_due
            pace, again = pace.reviewed(unsteady, stalled, best.point, x)
            point, gradient = _where(again, best.point, point), _where(again, best_gradient, gradient)
            previous, values = _where(again, point, previous), torch.where(again, best.values, values)
            rises, last_due, value_at_due = torch.zeros_like(rises), i, best.values
        previous, point = point, _next(threat, x, point, previous, gradient, pace, first=i == 0)
        value_before = values
    with torch.no_grad():
        values = watched(log_probs(point), y)
    found, _ = found.or_better(point, values, watched.broken)
    return found.point, point


def _climb_random(
    log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, loss: Loss, point: Tensor
) -> tuple[Tensor, Tensor]:
    pace = _Pace.first(x, threat.norm, RANDOM_FIRST_STEP[threat.norm])
    due = checkpoints(steps, threat.norm)
    best = previous = point
    for i in range(steps):
        if i in due:
            better = _beats(log_probs, point, best, y, loss)
            best = _where(better, point, best)
            pace, again = pace.reviewed(~better, ~better, best, x)
            point, previous = _where(again, best, point), _where(again, best, previous)
        _, gradient = loss_and_gradient(log_probs, point, y, loss)
        previous, point = point, _next(threat, x, point, previous, gradient, pace, first=i == 0)
    return _where(_beats(log_probs, point, best, y, loss), point, best), point


def _next(
    threat: ThreatModel, x: Tensor, point: Tensor, previous: Tensor, gradient: Tensor, pace: "_Pace", first: bool
) -> Tensor:
    """The point after ``point``: equations 2 and 3 of Croce & Hein 2020; for l1 a sparse step alone."""
    stepped = threat.project(point + threat.step(gradient, pace.share, point, pace.density), x)
    if first or threat.norm == "l1":
        return stepped
    return threat.project(point + MOMENTUM * (stepped - point) + (1 - MOMENTUM) * (point - previous), x)


@dataclass(frozen=True)
class _Pace:
    """What a step is now: its length as a ``share`` of epsilon and, for l1, the ``density`` of the pixels it changes,
    each (B, 1, 1, 1); whether the last review halved it; in how many ``pixels`` the best change was then."""

    norm: Norm
    share: Tensor
    density: Tensor
    halved: Tensor
    pixels: Tensor

    @classmethod
    def first(cls, x: Tensor, norm: Norm, share: float) -> "_Pace":
        one = torch.ones((len(x), 1, 1, 1), dtype=x.dtype, device=x.device)
        unhalved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return cls(norm, share * one, L1_FIRST_DENSITY * one, unhalved, x[0].numel() * one)

    def reviewed(self, unsteady: Tensor, stalled: Tensor, best: Tensor, x: Tensor) -> "tuple[_Pace, Tensor]":
        """The pace from a checkpoint on and which images (B,) go back to their best point."""
        if self.norm == "l1":
            return self._thinned(stalled, best, x)
        halve = unsteady | (stalled & ~self.halved)
        share = torch.where(halve.view(-1, 1, 1, 1), self.share / 2, self.share)
        return _Pace(self.norm, share, self.density, halve, self.pixels), halve

    def _thinned(self, stalled: Tensor, best: Tensor, x: Tensor) -> "tuple[_Pace, Tensor]":
        pixels = (best != x).flatten(1).sum(1).to(x.dtype).view(-1, 1, 1, 1)
        fewer = pixels < 0.95 * self.pixels
        share = torch.where(fewer, FIRST_STEP["l1"], (self.share / L1_THINNING).clamp(min=L1_SMALLEST_STEP))
        base = torch.where(stalled.view(-1, 1, 1, 1), self.density, pixels / x[0].numel())
        return _Pace(self.norm, share, base / L1_THINNING, self.halved, pixels), fewer.flatten()


@dataclass(frozen=True)
class _Best:
    """The best ``point`` of each image so far: one that is ``broken`` before one that is not, then by ``values``."""

    point: Tensor
    values: Tensor
    broken: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "_Best":
        nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return cls(x, torch.full((len(x),), -torch.inf, device=x.device), nothing)

    def or_better(self, point: Tensor, values: Tensor, broken: Tensor) -> "tuple[_Best, Tensor]":
        better = (broken & ~self.broken) | ((broken == self.broken) & (values > self.values))
        values = torch.where(better, values, self.values)
        return _Best(_where(better, point, self.point), values, broken | self.broken), better


class _Watched:
    """``loss``, keeping which images (B,) were misclassified at its last call."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.broken = torch.zeros(0, dtype=torch.bool)

    def __call__(self, log_probs: Tensor, y: Tensor) -> Tensor:
        self.broken = margin(log_probs.detach(), y) > 0
        return self.loss(log_probs, y)


def _beats(log_probs: LogProbs, point: Tensor, best: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Where ``point`` has the larger loss on one new draw of noise, the same for both."""
    same = pinned(log_probs)
    with torch.no_grad():
        return loss(same(point), y) > loss(same(best), y)


def _where(which: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), chosen, other)
