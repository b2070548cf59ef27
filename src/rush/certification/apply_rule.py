"""The step from the votes of an image to its certificate: the only place where a rule is applied."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rush.certification.bounds import (
    Certified,
    certify_all_draws,
    certify_counts,
    certify_two_classes,
    least_probability,
)
from rush.certification.rule import TWO_CLASSES, Rule
from rush.certification.sequential import CERTIFIED, UNDECIDED
from rush.choices import ABSTAIN, BLOCK


class Decider:
    """The application of a rule to B images, block by block. Its state is the number of radii passed by each, (B,)."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._tests = rule.tests() if rule.method == "sequential" else None

    def look(
        self,
        passed: NDArray[np.int64],
        successes: NDArray[np.int64],
        trials: NDArray[np.int64],
        rivals: tuple[ArrayLike, ArrayLike] = (0, 1),
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the radii passed after another block, the outcome, and whether no more votes are needed, each (B,).

        ``rivals`` of a rule that needs every class are those of ``rivals_of``.
        """
        if self._tests is None:
            outcome = np.full(len(passed), UNDECIDED, np.uint8)
        else:
            passed, outcome = self._tests.look(passed, successes, trials, rivals)
        return passed, outcome, (outcome != UNDECIDED) | (trials >= self.rule.num_estimation)

    def conclude(
        self,
        selection: NDArray[np.int64],
        estimation: NDArray[np.int64],
        passed: NDArray[np.int64],
        outcome: NDArray[np.uint8],
    ) -> tuple[Certified, NDArray[np.uint8]]:
        """Return certificates and outcomes (B,) once all votes, (B, K) each, have been read."""
        if self.rule.exact:
            return certify_all_draws(estimation), np.full(len(estimation), CERTIFIED, np.uint8)
        if self._tests is None:
            sigma, alpha = self.rule.sigma, self.rule.image_alpha
            if self.rule.bound == TWO_CLASSES:
                certified = certify_two_classes(selection, estimation, sigma, alpha)
            else:
                certified = certify_counts(selection, estimation, sigma, alpha, self.rule.noise)
            if self.rule.radii is not None:
                certified = _on_grid(certified, selection.argmax(1), self.rule.radii)
            last = 0.0 if self.rule.radii is None else self.rule.radii[-1]
            done = (certified.prediction != ABSTAIN) & (certified.radius >= last)
            return certified, np.where(done, CERTIFIED, UNDECIDED).astype(np.uint8)
        assert self.rule.radii is not None
        radii = np.array([0.0, *self.rule.radii])
        nulls = np.array([0.0, *(self.rule.null_probability(radius) for radius in self.rule.radii)])
        p_lower = nulls
        if self.rule.needs_every_class:
            sigma, classes = self.rule.sigma, selection.shape[1]
            p_lower = np.array([0.0, *(least_probability(radius, sigma, classes) for radius in self.rule.radii)])
        prediction = np.where(passed > 0, selection.argmax(1), ABSTAIN).astype(np.int64)
        return Certified(prediction, radii[passed], p_lower[passed], 1 - nulls[passed]), outcome


def rivals_of(selection: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the largest count of a class other than the selected one, and the weight of that class, (B,) each.

    The weights of an image's other classes sum to 1 and depend on ``selection`` (B, K) alone: one half is shared by
    its votes, the other half equally.
    """
    rows, selected, others = np.arange(len(counts)), selection.argmax(1), counts.copy()
    others[rows, selected] = -1
    rival = others.argmax(1)
    rest = selection.sum(1) - selection[rows, selected]
    weight = (selection[rows, rival] + (rest + 1) / (selection.shape[1] - 1)) / (2 * rest + 1)
    return others[rows, rival], weight


def follow(
    rule: Rule, paths: Sequence[NDArray[np.uint8]], lengths: NDArray[np.int64], selection: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Apply ``rule`` to stored votes up to the block at which it stops.

    A path that ends before the rule decides is undecided.

    Args:
        rule: rule to apply.
        paths: for each of B images the votes by blocks of 100, uint8: (blocks,) for its selected class, or (blocks, K)
            if the rule needs every class.
        lengths: int (B,), all votes of each path.
        selection: int (B, K), the votes that selected the class of each image.

    Returns:
        Radii passed, outcomes, successes and trials where each path stops, each (B,).
    """
    decider = Decider(rule)
    stop = np.minimum(lengths, rule.num_estimation)
    longest = max((len(path) for path in paths), default=0)
    passed, outcome = np.zeros(len(paths), np.int64), np.full(len(paths), UNDECIDED, np.uint8)
    successes, trials = np.zeros(len(paths), np.int64), np.zeros(len(paths), np.int64)
    rivals: tuple[ArrayLike, ArrayLike] = (0, 1)
    selected, counts = selection.argmax(1), np.zeros_like(selection)
    if not rule.needs_every_class:
        votes = np.zeros((len(paths), longest), np.uint8)
        for row, path in enumerate(paths):
            votes[row, : len(path)] = path
    alive = np.flatnonzero(stop > 0)
    for block in range(longest):
        if rule.needs_every_class:
            counts[alive] += np.stack([paths[row][block] for row in alive.tolist()])
            successes[alive] = counts[alive, selected[alive]]
            rivals = rivals_of(selection[alive], counts[alive])
        else:
            successes[alive] += votes[alive, block]
        trials[alive] = np.minimum((block + 1) * BLOCK, stop[alive])
        passed[alive], outcome[alive], done = decider.look(passed[alive], successes[alive], trials[alive], rivals)
        alive = alive[~done & (trials[alive] < stop[alive])]
        if not alive.size:
            break
    return passed, outcome, successes, trials


def apply_rule(
    rule: Rule,
    paths: Sequence[NDArray[np.uint8]],
    lengths: NDArray[np.int64],
    selection: NDArray[np.int64],
    counts: NDArray[np.int64] | None = None,
) -> tuple[Certified, NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Certify stored votes under ``rule``, as it would have certified them while they were drawn.

    Args:
        rule: rule to apply.
        paths: as in ``follow``.
        lengths: as in ``follow``.
        selection: int (B, K), the votes that selected the class of each image.
        counts: int (B, K), all votes of each path. Exact rules need them, as does the bound with two classes on a fixed
            number of votes.

    Returns:
        Certificates, outcomes, and successes and trials where each path stops, each for B images.
    """
    passed, outcome, successes, trials = follow(rule, paths, lengths, selection)
    if rule.exact or (rule.bound == TWO_CLASSES and rule.method == "clopper-pearson"):
        assert counts is not None
        estimation = counts
    else:
        rows, selected = np.arange(len(selection)), selection.argmax(1)
        estimation = np.zeros_like(selection)
        estimation[rows, selected - 1] = trials - successes  # a path does not record which other classes got them
        estimation[rows, selected] = successes
    certified, outcome = Decider(rule).conclude(selection, estimation, passed, outcome)
    return certified, outcome, successes, trials


def _on_grid(certified: Certified, selected: NDArray[np.int64], radii: tuple[float, ...]) -> Certified:
    """Round radii down to the grid ``radii``, of which 0 is certified where p_lower > p_upper."""
    places = np.where(certified.p_lower > certified.p_upper, np.searchsorted(radii, certified.radius, side="right"), 0)
    prediction = np.where(places > 0, selected, ABSTAIN).astype(np.int64)
    return replace(certified, prediction=prediction, radius=np.array([0.0, *radii])[places])
