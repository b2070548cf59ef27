"""The verdict: is a point broken or held? Decided by exact tests on fresh draws, never by one stochastic pass.

A point (x, y) is *broken* when some class c != y is shown to beat y, and *held* when y is shown to beat every other
class. It is *undecided* when the cap of draws is reached first. The model's decision rule defines "beats": by votes, c
beats y when P(f = c) > P(f = y); by means, when E p_c > E p_y.

Level, by votes. The challenger c is chosen on 100 separate votes. The judging votes are then tested after 100, 400,
1,600, ... and at the cap, each look at level / (number of looks). *broken* is one sign test of c against y. *held*
rejects, for every c, that c is at least as likely as y: an intersection-union test, each part at the full level of the
look. If y is the only top class, *broken* alone can be wrong. If another class is the only one, *held* alone can be
wrong. By the union bound over the looks, P(a false verdict) <= level. At an exact tie g is not defined and each of the
two verdicts has probability <= level.

Level, by means. Let D = p_c - p_y in [-1, 1] with E D <= 0 and 0 < b < 1. The product of 1 + b D over independent draws
is a nonnegative supermartingale that starts at 1, and so is the mean of such products over several b fixed beforehand.
It ever passes 1 / level with probability <= level (Ville 1939), so looks cost nothing: there is one after every 100
draws. *broken* and *held* combine such tests as above.

This module draws nothing: the defenders in ``evaluation.model`` provide the votes and name their streams.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.choices import BLOCK, VERDICTS, Decision
from rush.errors import InputError
from rush.runtime.numbers import as_real, as_whole, least_whole, positive_integer
from rush.statistics import sign_test

BROKEN, HELD, UNDECIDED = range(len(VERDICTS))

# Bets b of the mixture: 0.98 wins fastest where one class is nearly certain, 0.0077 where means differ by a percent.
_BETS = 0.98 * 2.0 ** -np.arange(8)

CountVotes = Callable[[list[int], int], NDArray[np.int64]]
DrawProbabilities = Callable[[list[int], int], NDArray[np.float64]]


@dataclass(frozen=True)
class VerdictSettings:
    """The settings by which points are judged.

    Attributes:
        level: bound on the probability that a verdict on an image is false, over all verdicts given on it.
        max_votes: largest number of judging votes per point.
        seed: seed of every stream of an evaluation, of the attack as well as of the verdict.
    """

    level: float
    max_votes: int
    seed: int

    @classmethod
    def checked(cls, alpha: float, max_votes: int, seed: int) -> "VerdictSettings":
        """Return the settings of these numbers.

        Raises:
            InputError: unless 0 < alpha < 0.5, max_votes >= 100 and seed >= 0.
        """
        level, votes, plain_seed = as_real(alpha), positive_integer("max_votes", max_votes), as_whole(seed)
        if level is None or not 0 < level < 0.5 or votes < BLOCK:
            raise InputError(f"need 0 < alpha < 0.5 and max_votes >= {BLOCK}, got {alpha} and {max_votes}")
        if plain_seed is None or plain_seed < 0:
            raise InputError(f"seed must be an integer >= 0, got {seed!r}")
        return cls(level, votes, plain_seed)

    def check_reachable(self, decision: Decision | None, verdicts: int = 1) -> None:
        """Raise InputError when no verdict can be given, even where all ``max_votes`` draws agree.

        Args:
            decision: decision rule of a stochastic model, None for votes.
            verdicts: number of verdicts on each image that share the level.
        """
        fewest = fewest_draws(self.level / verdicts, decision)
        if self.max_votes < fewest:
            shared = f" ({self.level:g} shared by {verdicts} verdicts)" if verdicts > 1 else ""
            raise InputError(
                f"no verdict can be given at the level {self.level / verdicts:g}{shared} with max_votes = "
                f"{self.max_votes}, even when all votes agree; give at least {fewest}, or a larger alpha"
            )


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on N points.

    Attributes:
        verdict: uint8 (N,), index into ``choices.VERDICTS``.
        challenger: int64 (N,), the class that the label was tested against.
        counts: int64 (N, K), judging votes.
        votes: int64 (N,), all votes, including those that chose the challenger.
    """

    verdict: NDArray[np.uint8]
    challenger: NDArray[np.int64]
    counts: NDArray[np.int64]
    votes: NDArray[np.int64]

    @classmethod
    def undecided(cls, points: int, num_classes: int) -> "Verdicts":
        """Return the verdicts on points that have not been judged."""
        zeros = np.zeros(points, np.int64)
        counts = np.zeros((points, num_classes), np.int64)
        return cls(np.full(points, UNDECIDED, np.uint8), zeros, counts, zeros.copy())


def looks(max_votes: int) -> list[int]:
    """Return the numbers of votes at which a verdict is tried: 100, 400, 1,600, ... and ``max_votes``."""
    stops = []
    votes = BLOCK
    while votes < max_votes:
        stops.append(votes)
        votes *= 4
    return [*stops, max_votes]


def fewest_draws(level: float, decision: Decision | None = None) -> int:
    """Return the least ``max_votes`` (>= 100) at which a verdict can be given at ``level`` when all draws agree.

    Args:
        decision: decision rule of a stochastic model, None for the votes of a smoothed classifier, like "vote".
    """
    if decision == "mean":
        agreeing = least_whole(lambda n: bool(_log_mean(n * np.log1p(_BETS)) >= np.log(1 / level)), BLOCK)
    elif decision == "single":
        agreeing = least_whole(lambda n: float(sign_test(n, 0)) <= level, BLOCK)
    else:
        agreeing = least_whole(lambda n: float(sign_test(n, 0)) <= level / len(looks(n)), BLOCK)
    assert agreeing is not None
    return agreeing


def judge_votes(
    count: CountVotes, challenging: NDArray[np.int64], y: NDArray[np.int64], level: float, max_votes: int
) -> Verdicts:
    """Judge N points by votes.

    Args:
        count: (rows, n) -> int64 (len(rows), K), votes of n further draws of the points at ``rows``. It never gives a
            draw twice.
        challenging: int64 (N, K), votes of draws that ``count`` does not give. The challenger is the class other than
            the label with the most votes, or the lowest such class where all votes are for the label.
        y: int64 (N,), labels.
        level: probability of a false verdict, per point.
        max_votes: cap of the judging votes, per point.
    """
    challenger = _best_other(challenging, y)
    counts, verdict = np.zeros_like(challenging), np.full(len(y), UNDECIDED, np.uint8)
    stops = looks(max_votes)
    for before, stop in zip([0, *stops], stops, strict=False):
        rows = np.flatnonzero(verdict == UNDECIDED)  # only these are drawn again
        if not rows.size:
            break
        counts[rows] += count(rows.tolist(), stop - before)
        verdict[rows] = _verdict_of(counts[rows], y[rows], challenger[rows], level / len(stops))
    return Verdicts(verdict, challenger, counts, counts.sum(1) + challenging.sum(1))


def judge_means(
    draw: DrawProbabilities, challenging: NDArray[np.float64], y: NDArray[np.int64], level: float, max_votes: int
) -> Verdicts:
    """Judge N points by mean probabilities.

    Args:
        draw: (rows, n) -> float64 (len(rows), n, K), class probabilities of n further draws of the points at ``rows``.
        challenging: float64 (N, m, K), probabilities of draws that ``draw`` does not give. They choose the challenger.
        y, level, max_votes: as in ``judge_votes``.

    Returns:
        Verdicts whose ``counts`` are votes for the most probable class of each draw.
    """
    num_classes, threshold = challenging.shape[2], np.log(1 / level)
    challenger = _best_other(challenging.mean(1), y)
    counts, verdict = np.zeros((len(y), num_classes), np.int64), np.full(len(y), UNDECIDED, np.uint8)
    # logs of the products over all draws so far: of the challenger over the label (N, bets), and of the label over
    # every class (N, K, bets)
    against, in_favour = np.zeros((len(y), len(_BETS))), np.zeros((len(y), num_classes, len(_BETS)))
    for before in range(0, max_votes, BLOCK):
        rows = np.flatnonzero(verdict == UNDECIDED)
        if not rows.size:
            break
        p = draw(rows.tolist(), min(BLOCK, max_votes - before))  # (R, n, K)
        p_label, p_challenger = (
            np.take_along_axis(p, classes[rows, None, None], axis=2)[:, :, 0] for classes in (y, challenger)
        )  # (R, n)
        counts[rows] += votes_of(p)
        against[rows] += _log_products(p_challenger - p_label)
        in_favour[rows] += _log_products(p_label[:, :, None] - p)
        evidence = _log_mean(in_favour[rows])  # (R, K)
        evidence[np.arange(len(rows)), y[rows]] = np.inf  # the label need not beat itself
        held = evidence.min(1) >= threshold
        broken = _log_mean(against[rows]) >= threshold
        verdict[rows] = _verdicts(broken, held)
    return Verdicts(verdict, challenger, counts, counts.sum(1) + challenging.shape[1])


def judge_single(counts: NDArray[np.int64], challenging_draws: int, y: NDArray[np.int64], level: float) -> Verdicts:
    """Judge N points of a model that is used with one draw, on a fixed number of draws.

    The share of right draws is the result. *broken* and *held* state on which side of one half P(right) is shown to be.

    Args:
        counts: int64 (N, K), votes.
        challenging_draws: further draws per point, which ``votes`` includes.
        y, level: as in ``judge_votes``.
    """
    right = counts[np.arange(len(y)), y]
    wrong = counts.sum(1) - right
    broken, held = sign_test(wrong, right) <= level, sign_test(right, wrong) <= level
    return Verdicts(_verdicts(broken, held), _best_other(counts, y), counts, counts.sum(1) + challenging_draws)


def judge_deterministic(logits: Tensor, y: Tensor) -> Verdicts:
    """Judge N points of a deterministic classifier: broken exactly where its class is not the label.

    Args:
        logits: (N, K), on the CPU.
        y: int64 (N,), labels.
    """
    top = logits.argmax(1)
    others = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    verdict = torch.where(top == y, HELD, BROKEN).to(torch.uint8)
    votes = torch.nn.functional.one_hot(top, logits.shape[1])
    return Verdicts(verdict.numpy(), others.numpy(), votes.numpy(), np.ones(len(y), np.int64))


def judge_exactly(counts: NDArray[np.int64], y: NDArray[np.int64]) -> Verdicts:
    """Judge N points by the votes ``counts`` (N, K) of all draws: broken exactly where the label has not won."""
    verdict = np.where(counts.argmax(1) == y, HELD, BROKEN).astype(np.uint8)
    return Verdicts(verdict, _best_other(counts, y), counts, counts.sum(1))


def votes_of(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the votes (N, K) of draws with class probabilities (N, draws, K)."""
    classes = np.arange(probabilities.shape[2])
    return (probabilities.argmax(2)[:, :, None] == classes).sum(1).astype(np.int64)


def _best_other(scores: NDArray[np.generic], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class (N,) of largest score other than the label, the lowest one in case of a tie."""
    others = scores.astype(np.float64)
    others[np.arange(len(y)), y] = -np.inf
    return others.argmax(1)


def _log_products(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logs of the products of 1 + b D over the draws, axis 1 of ``differences``, with the bets b last."""
    return np.stack([np.log1p(bet * differences).sum(1) for bet in _BETS], axis=-1)


def _log_mean(log_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log of the mean of exp(log_values) over the last axis, minus 1e-6 so that rounding proves nothing."""
    largest = log_values.max(-1)
    return largest + np.log(np.exp(log_values - largest[..., None]).mean(-1)) - 1e-6


def _verdict_of(
    counts: NDArray[np.int64], y: NDArray[np.int64], challenger: NDArray[np.int64], level: float
) -> NDArray[np.uint8]:
    """Return the verdict (N,) of one look at the votes ``counts`` (N, K)."""
    rows = np.arange(len(y))
    label_votes = counts[rows, y]
    broken = sign_test(counts[rows, challenger], label_votes) <= level
    p_values = sign_test(label_votes[:, None], counts)  # (N, K)
    p_values[rows, y] = 0.0  # the label need not beat itself
    held = p_values.max(1) <= level
    return _verdicts(broken, held)


def _verdicts(broken: NDArray[np.bool_], held: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.where(broken, BROKEN, np.where(held, HELD, UNDECIDED)).astype(np.uint8)
