"""The verdict: is a point broken or held? Decided by exact tests on fresh votes, never by one stochastic pass.

A point (x, y) is *broken* when some class c != y is shown to beat y, P(f(x + noise) = c) > P(f(x + noise) = y), *held*
when y is shown to beat every other class, else *undecided* at the cap of votes.

Level. The challenger c is chosen on 100 votes of its own. Votes are then looked at after 100, 400, 1,600, ... and at
the cap, each look at level / (number of looks). *broken* is one sign test of c against y. *held* rejects, for every c,
that c is at least as likely as y: an intersection-union test, each part at the full level of the look. If y really is
the only top class, just *broken* can be wrong; if some other class is the only one, just *held*; hence, by the union
bound over the looks, P(a false verdict) <= level. At an exact tie g is not defined and each of the two verdicts has
probability <= level.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.binomial import sign_test
from rush.inputs import LabelledPixels
from rush.options import VERDICTS
from rush.smoothing import BLOCK, SmoothedClassifier

BROKEN, HELD, UNDECIDED = range(len(VERDICTS))


@dataclass(frozen=True)
class Verdicts:
    """verdict uint8 (N,): index into ``VERDICTS``; challenger int64 (N,); counts int64 (N, K) of the judging votes;
    votes int64 (N,) in all."""

    verdict: NDArray[np.uint8]
    challenger: NDArray[np.int64]
    counts: NDArray[np.int64]
    votes: NDArray[np.int64]


def looks(max_votes: int) -> list[int]:
    """Numbers of votes at which a verdict is tried: 100, 400, 1,600, ... and ``max_votes``, all multiples of 100 but
    the last."""
    found = []
    votes = BLOCK
    while votes < max_votes:
        found.append(votes)
        votes *= 4
    return [*found, max_votes]


def judge(
    smoothed: SmoothedClassifier, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int
) -> Verdicts:
    """Verdicts on ``points``, each wrong with probability <= ``level`` (see the module).

    Noise comes from ``stream(seed, "challenger/<purpose>", id)`` and ``stream(seed, "verdict/<purpose>", id)``: other
    streams than any attack's. Cost: 200 to 100 + ``max_votes`` forward passes a point.
    """
    challenger = _challengers(smoothed, points, purpose, seed)
    generators = smoothed.streams(seed, f"verdict/{purpose}", points.ids)
    counts = torch.zeros(len(points), smoothed.num_classes, dtype=torch.int64)
    verdict = np.full(len(points), UNDECIDED, np.uint8)
    stops = looks(max_votes)
    for before, now in zip([0, *stops], stops, strict=False):
        waiting = np.flatnonzero(verdict == UNDECIDED).tolist()
        if not waiting:
            break
        counts[waiting] += smoothed.counts(points.x[waiting], now - before, [generators[i] for i in waiting])
        verdict[waiting] = _decide(
            counts[waiting].numpy(), points.y[waiting].numpy(), challenger[waiting], level / len(stops)
        )
    return Verdicts(verdict, challenger, counts.numpy(), counts.sum(1).numpy() + BLOCK)


def judge_deterministic(logits: Tensor, y: Tensor) -> Verdicts:
    """Verdicts on points of a deterministic classifier from its ``logits`` (N, K): broken exactly where its class is
    not ``y``."""
    top = logits.argmax(1)
    others = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    verdict = torch.where(top == y, HELD, BROKEN).to(torch.uint8)
    votes = torch.nn.functional.one_hot(top, logits.shape[1])
    return Verdicts(verdict.numpy(), others.numpy(), votes.numpy(), np.ones(len(y), np.int64))


def _challengers(smoothed: SmoothedClassifier, points: LabelledPixels, purpose: str, seed: int) -> NDArray[np.int64]:
    """The most voted class but the label on 100 votes; the lowest other class where all votes go to the label."""
    votes = smoothed.counts(points.x, BLOCK, smoothed.streams(seed, f"challenger/{purpose}", points.ids))
    return votes.scatter(1, points.y[:, None], -1).argmax(1).numpy()


def _decide(
    counts: NDArray[np.int64], y: NDArray[np.int64], challenger: NDArray[np.int64], level: float
) -> NDArray[np.uint8]:
    rows = np.arange(len(y))
    own = counts[rows, y]
    broken = sign_test(counts[rows, challenger], own) <= level
    worst = sign_test(own[:, None], counts)
    worst[rows, y] = 0.0
    held = worst.max(1) <= level
    return np.where(broken, BROKEN, np.where(held, HELD, UNDECIDED)).astype(np.uint8)
