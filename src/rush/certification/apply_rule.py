"""From the votes of a path to its certificate, one image or many: the only place where a rule is applied."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rush.certification.bounds import Certified, certify_votes
from rush.certification.rule import Rule, null_probability
from rush.certification.sequential import CERTIFIED, UNDECIDED
from rush.choices import ABSTAIN, BLOCK


class Decider:
    """Follows B images under one rule, block by block; the state is the number of radii an image has passed (B,)."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._tests = rule.tests() if rule.method == "sequential" else None

    def look(
        self, passed: NDArray[np.int64], successes: NDArray[np.int64], trials: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
        """One look after every block: radii passed, outcome, and whether the image needs no more votes, each (B,)."""
        if self._tests is None:
            outcome = np.full(len(passed), UNDECIDED, np.uint8)
        else:
            passed, outcome = self._tests.look(passed, successes, trials)
        return passed, outcome, (outcome != UNDECIDED) | (trials >= self.rule.num_estimation)

    def conclude(
        self,
        selected: NDArray[np.int64],
        successes: NDArray[np.int64],
        trials: NDArray[np.int64],
        passed: NDArray[np.int64],
        outcome: NDArray[np.uint8],
    ) -> tuple[Certified, NDArray[np.uint8]]:
        """The certificates at the end of the paths, and the outcomes; all arguments and results (B,)."""
        if self._tests is None:
            certified = _conclude_fixed(self.rule, selected, successes, trials)
            last = 0.0 if self.rule.radii is None else self.rule.radii[-1]
            done = (certified.prediction != ABSTAIN) & (certified.radius >= last)
            return certified, np.where(done, CERTIFIED, UNDECIDED).astype(np.uint8)
        assert self.rule.radii is not None
        radii = np.array([0.0, *self.rule.radii])
        p_lower = np.array([0.0, *(null_probability(radius, self.rule.sigma) for radius in self.rule.radii)])
        prediction = np.where(passed > 0, selected, ABSTAIN).astype(np.int64)
        return Certified(prediction, radii[passed], p_lower[passed]), outcome


def follow(
    rule: Rule, paths: Sequence[NDArray[np.uint8]], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Follow stored paths, B images in step: ``paths`` are votes for the selected class by blocks, ``lengths`` (B,) all
    votes of each.

    Returns radii passed, outcome, and successes and trials at the stop, each (B,). A path that ends before the rule
    decides is undecided.
    """
    decider = Decider(rule)
    stop = np.minimum(lengths, rule.num_estimation)
    votes = np.zeros((len(paths), max((len(path) for path in paths), default=0)), np.uint8)
    for row, path in enumerate(paths):
        votes[row, : len(path)] = path
    passed, outcome = np.zeros(len(paths), np.int64), np.full(len(paths), UNDECIDED, np.uint8)
    successes, trials = np.zeros(len(paths), np.int64), np.zeros(len(paths), np.int64)
    alive = np.flatnonzero(stop > 0)
    for block in range(votes.shape[1]):
        successes[alive] += votes[alive, block]
        trials[alive] = np.minimum((block + 1) * BLOCK, stop[alive])
        passed[alive], outcome[alive], done = decider.look(passed[alive], successes[alive], trials[alive])
        alive = alive[~done & (trials[alive] < stop[alive])]
        if not alive.size:
            break
    return passed, outcome, successes, trials


def apply_rule(
    rule: Rule, paths: Sequence[NDArray[np.uint8]], lengths: NDArray[np.int64], selected: NDArray[np.int64]
) -> tuple[Certified, NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Return what ``rule`` makes of stored paths with the ``selected`` classes (B,), as it would have on drawing them.

    That is certificates, outcomes, and successes and trials where each path stops, all of B images.
    """
    passed, outcome, successes, trials = follow(rule, paths, lengths)
    certified, outcome = Decider(rule).conclude(selected, successes, trials, passed, outcome)
    return certified, outcome, successes, trials


def _conclude_fixed(
    rule: Rule, selected: NDArray[np.int64], successes: NDArray[np.int64], trials: NDArray[np.int64]
) -> Certified:
    """Clopper-Pearson; with a grid the radius is the largest of it within the bound's."""
    free = certify_votes(selected, successes, trials, rule.sigma, rule.image_alpha)
    if rule.radii is None:
        return free
    places = np.where(free.p_lower > 0.5, np.searchsorted(rule.radii, free.radius, side="right"), 0)
    radius = np.array([0.0, *rule.radii])[places]
    return Certified(np.where(places > 0, selected, ABSTAIN).astype(np.int64), radius, free.p_lower)
