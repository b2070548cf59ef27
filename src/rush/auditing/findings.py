"""Findings of an audit as plain values, and the levels and bounds that its verdict rests on. No torch.

A share of images fails its threshold when its one-sided 95 % Clopper-Pearson lower bound lies above the threshold. It
passes when the share itself does not, and is undecided between the two: no finding fails because of a few images.

Some findings decide alone: if they fail, an evaluation is ``overestimated`` whatever d is (``INVALIDATING``). Each of
them has a proven level in ``LEVELS``, a bound on the probability that it fails on an honest evaluation. Together with
the level of d these levels sum to at most ``OVERESTIMATED_LEVEL``, which is a bound for the verdict (union bound).

All thresholds, including those of ``validity``, ``gradients`` and ``stronger``, are frozen: they were fixed before the
second half of the zoo, the models and evaluations that they are tested on, was written. A changed threshold needs a zoo
that is made afterwards.
"""

from dataclasses import dataclass
from typing import Literal

from rush.statistics import share_interval

Status = Literal["passed", "failed", "undecided", "skipped"]

# A gain below a point is within what another random start finds. The verdict on the evaluation uses the same point.
GAIN = 0.01
# One-sided level of every bound, which is one end of the two-sided interval of twice the tail.
CONFIDENCE = 0.95
# Bound on the probability of ``overestimated`` for an honest evaluation: one whose figure is right within ``GAIN``, and
# that is an evaluation of this model under this threat model.
OVERESTIMATED_LEVEL = 0.05
# The parts of ``OVERESTIMATED_LEVEL``. "d" is the one-sided bound on the share of newly broken images. The zeros leave
# nothing to chance on an honest model: they are properties of given points, of a deterministic network, or of whether
# anything is drawn at all.
LEVELS = {"d": 0.04, "input-range": 0.0, "pixel-scale": 0.005, "mode": 0.0, "randomness": 0.0, "noise": 0.005}
# If these fail, the evaluation was not one of this model under this threat model, whatever its figure.
INVALIDATING = frozenset(LEVELS) - {"d"}
# At half of the pixel range every image can be turned into the same grey.
LARGE_EPSILON_HELD = 0.1


@dataclass(frozen=True)
class Finding:
    """One result of an audit.

    Attributes:
        name: name of the finding, e.g. "step-size".
        figure: measured value, None where nothing was measured.
        threshold: value that the figure is compared with.
        evidence: one sentence.
        remedy: what to do if the finding failed.
    """

    name: str
    status: Status
    figure: float | None
    threshold: float | None
    evidence: str
    remedy: str


def lower_bound(count: int, total: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided Clopper-Pearson lower bound of the share ``count`` / ``total``, by default of 95 %."""
    return share_interval(count, total, 2 * confidence - 1).low


def upper_bound(count: int, total: int) -> float:
    """Return the one-sided 95 % Clopper-Pearson upper bound of the share ``count`` / ``total``."""
    return share_interval(count, total, 2 * CONFIDENCE - 1).high


def share_status(count: int, total: int, threshold: float) -> Status:
    """Return the status of a share.

    It has failed if its lower bound exceeds ``threshold``, passed if the share does not, and is undecided in between.
    """
    if lower_bound(count, total) > threshold:
        return "failed"
    return "passed" if count / total <= threshold else "undecided"
