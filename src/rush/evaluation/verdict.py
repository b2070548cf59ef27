"""The verdict: is a point broken or held? Decided by exact tests on fresh draws, never by one stochastic pass.

A point (x, y) is *broken* when some class c != y is shown to beat y, *held* when y is shown to beat every other class,
else *undecided* at the cap of draws. What beats what is the model's rule: by votes, c beats y when P(f = c) > P(f = y);
by means, when E p_c > E p_y.

Level, by votes. The challenger c is chosen on 100 votes of its own. Votes are then looked at after 100, 400, 1,600, ...
and at the cap, each look at level / (number of looks). *broken* is one sign test of c against y. *held* rejects, for
every c, that c is at least as likely as y: an intersection-union test, each part at the full level of the look. If y
really is the only top class, just *broken* can be wrong; if some other class is the only one, just *held*; hence, by
the union bound over the looks, P(a false verdict) <= level. At an exact tie g is not defined and each of the two
verdicts has probability <= level.

Level, by means. For D = p_c - p_y in [-1, 1] with E D <= 0 and 0 < b < 1, the product of 1 + b D over independent draws
is a nonnegative supermartingale that starts at 1, and so is the mean of such products over several b fixed beforehand;
it ever passes 1 / level with probability <= level (Ville 1939), so that looks cost nothing: there is one after every
100 draws. *broken* and *held* combine such tests as above.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.choices import VERDICTS, Decision
from rush.data.checks import LabelledPixels, pixel_ids
from rush.runtime.numbers import least_whole
from rush.smoothing.classifier import BLOCK, SmoothedClassifier
from rush.statistics import sign_test

BROKEN, HELD, UNDECIDED = range(len(VERDICTS))

_BETS = 0.98 * 2.0 ** -np.arange(8)  # the b of the mixture, from a near-certain class to a difference of one percent

CountVotes = Callable[[list[int], int], NDArray[np.int64]]
DrawProbabilities = Callable[[list[int], int], NDArray[np.float64]]


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


def fewest_draws(level: float, decision: Decision | None = None) -> int:
    """Return the least ``max_votes`` (>= 100) at which a verdict can be given at ``level`` when all draws agree.

    decision: of a model that is stochastic; None: the votes of a smoothed classifier, like "vote".
    """
    if decision == "mean":
        agreeing = least_whole(lambda n: bool(_log_mean(n * np.log1p(_BETS)) >= np.log(1 / level)), BLOCK)
    elif decision == "single":
        agreeing = least_whole(lambda n: float(sign_test(n, 0)) <= level, BLOCK)
    else:
        agreeing = least_whole(lambda n: float(sign_test(n, 0)) <= level / len(looks(n)), BLOCK)
    assert agreeing is not None
    return agreeing


def judge(
    smoothed: SmoothedClassifier, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int
) -> Verdicts:
    """Verdicts on ``points``, each wrong with probability <= ``level`` (see the module).

    Noise comes from ``stream(seed, "challenger/<purpose>", id, hash)`` and ``stream(seed, "verdict/<purpose>", id,
    hash)``, the hash that of the point's float32 pixels: no attack draws from these streams, and no point can be fitted
    to noise that changes with it. Cost: 200 to 100 + ``max_votes`` forward passes per point.
    """
    hashes = pixel_ids(points.x)
    votes = smoothed.counts(points.x, BLOCK, smoothed.streams(seed, f"challenger/{purpose}", points.ids, hashes))
    generators = smoothed.streams(seed, f"verdict/{purpose}", points.ids, hashes)

    def count(rows: list[int], number: int) -> NDArray[np.int64]:
        return smoothed.counts(points.x[rows], number, [generators[row] for row in rows]).numpy()

    return judge_votes(count, votes.numpy(), points.y.numpy(), level, max_votes)


def judge_votes(
    count: CountVotes, challenging: NDArray[np.int64], y: NDArray[np.int64], level: float, max_votes: int
) -> Verdicts:
    """Verdicts by votes on N points with labels ``y`` (N,).

    count: (rows, n) -> votes int64 (rows, K) of n further draws of the points in these rows; draws that it gave are not
    given again. challenging: votes (N, K) of draws that ``count`` does not give; the challenger is the most voted class
    but the label, the lowest other class where all votes are for the label.
    """
    challenger = _best_other(challenging, y)
    counts, verdict = np.zeros_like(challenging), np.full(len(y), UNDECIDED, np.uint8)
    stops = looks(max_votes)
    for before, now in zip([0, *stops], stops, strict=False):
        waiting = np.flatnonzero(verdict == UNDECIDED)
        if not waiting.size:
            break
        counts[waiting] += count(waiting.tolist(), now - before)
        verdict[waiting] = _decide(counts[waiting], y[waiting], challenger[waiting], level / len(stops))
    return Verdicts(verdict, challenger, counts, counts.sum(1) + challenging.sum(1))


def judge_means(
    draw: DrawProbabilities, challenging: NDArray[np.float64], y: NDArray[np.int64], level: float, max_votes: int
) -> Verdicts:
    """Verdicts by means on N points with labels ``y`` (N,).

    draw: (rows, n) -> probabilities (rows, n, K) of n further draws. challenging: probabilities (N, m, K) of draws that
    ``draw`` does not give. ``counts`` are votes for the most probable class of each draw.
    """
    classes = challenging.shape[2]
    challenger = _best_other(challenging.mean(1), y)
    counts, verdict = np.zeros((len(y), classes), np.int64), np.full(len(y), UNDECIDED, np.uint8)
    against, in_favour = np.zeros((len(y), len(_BETS))), np.zeros((len(y), classes, len(_BETS)))
    for before in range(0, max_votes, BLOCK):
        waiting = np.flatnonzero(verdict == UNDECIDED)
        if not waiting.size:
            break
        p = draw(waiting.tolist(), min(BLOCK, max_votes - before))
        at = np.arange(len(waiting))[:, None], np.arange(p.shape[1])[None]
        own = p[(*at, y[waiting, None])]
        rival = p[(*at, challenger[waiting, None])]
        counts[waiting] += (p.argmax(2)[:, :, None] == np.arange(classes)).sum(1)
        against[waiting] += _log_products(rival - own)
        in_favour[waiting] += _log_products(own[:, :, None] - p)
        shown = _log_mean(in_favour[waiting])
        shown[np.arange(len(waiting)), y[waiting]] = np.inf
        held = shown.min(1) >= np.log(1 / level)
        broken = _log_mean(against[waiting]) >= np.log(1 / level)
        verdict[waiting] = np.where(broken, BROKEN, np.where(held, HELD, UNDECIDED))
    return Verdicts(verdict, challenger, counts, counts.sum(1) + challenging.shape[1])


def judge_deterministic(logits: Tensor, y: Tensor) -> Verdicts:
    """Verdicts on points of a deterministic classifier from its ``logits`` (N, K): broken exactly where its class is
    not ``y``."""
    top = logits.argmax(1)
    others = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    verdict = torch.where(top == y, HELD, BROKEN).to(torch.uint8)
    votes = torch.nn.functional.one_hot(top, logits.shape[1])
    return Verdicts(verdict.numpy(), others.numpy(), votes.numpy(), np.ones(len(y), np.int64))


def _best_other(scores: NDArray[np.generic], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of largest score but the label."""
    others = scores.astype(np.float64)
    others[np.arange(len(y)), y] = -np.inf
    return others.argmax(1)


def _log_products(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logs of the products of 1 + b D over the draws, axis 1 of ``differences``, the bets b last."""
    return np.stack([np.log1p(bet * differences).sum(1) for bet in _BETS], axis=-1)


def _log_mean(log_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the mean of exp(log_values) over the last axis, a hair below, so that rounding proves nothing."""
    largest = log_values.max(-1)
    return largest + np.log(np.exp(log_values - largest[..., None]).mean(-1)) - 1e-6


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
