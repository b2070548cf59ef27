"""The knowledge about each attacked image at every size of the threat."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rush.records.ladder import Ladder
from rush.records.read_run import RunResults

Known = Literal["proved", "held", "open", "broken", "wrong"]
STATES: Mapping[Known, str] = {
    "proved": "proved right",
    "held": "held under every attacker",
    "open": "open",
    "broken": "broken",
    "wrong": "wrong without attack",
}
"""Names of what is known about an image."""
_STEPS = 200
_BEYOND = 1.25  # the walk ends at this multiple of the threat or beyond


@dataclass(frozen=True)
class Walk:
    """The sizes of the threat, in its norm, at which the knowledge about each of n attacked images changes.

    Attributes:
        ids: ids of the images.
        proved: largest epsilon whose ball is within the certified ball, (n,), -1.0 without a certificate of the label.
        broken: size of the smallest change found that breaks the image, (n,), 0.0 if it is wrong without attack,
            infinite if none was found.
        held: epsilon of the ladder if the image was shown to hold under every attacker, (n,), else -1.0.
        epsilon: epsilon of the ladder.
        end: largest epsilon of the walk.
    """

    ids: tuple[str, ...]
    proved: np.ndarray
    broken: np.ndarray
    held: np.ndarray
    epsilon: float
    end: float

    def at(self, epsilon: float) -> list[Known]:
        """Return what is known about each image at ``epsilon``.

        The first statement that applies counts: wrong without attack, proved, broken, held. An image that is only
        broken by a larger change, or attacked in a smaller ball, is open.
        """
        conditions = [self.broken == 0, epsilon <= self.proved, self.broken <= epsilon, epsilon <= self.held]
        names: list[Known] = ["wrong", "proved", "broken", "held"]
        return np.select(conditions, names, "open").tolist()

    def shares(self, epsilon: float) -> dict[Known, float]:
        """Return the share of the images in each state at ``epsilon``."""
        known = self.at(epsilon)
        return {state: known.count(state) / len(known) for state in STATES}

    @property
    def step(self) -> float:
        return self.end / _STEPS

    @property
    def limits(self) -> list[list[float | None]]:
        """Sizes [proved, broken, held] for each image, None for an infinite one."""
        rows = zip(self.proved.tolist(), self.broken.tolist(), self.held.tolist(), strict=True)
        # Only the first is shortened, downwards: the others are compared with epsilon itself.
        return [[math.floor(p * 1e7) / 1e7, None if np.isinf(b) else b, h] for p, b, h in rows]


def walk_of(results: RunResults) -> Walk | None:
    """Return the walk through the attacked images of a run, or None before they are attacked."""
    ladder = results.ladder
    if ladder is None:
        return None
    proved = _proved(results, ladder)
    return Walk(
        ids=tuple(ladder.clean.ids.tolist()),
        proved=proved,
        broken=ladder.smallest_broken,
        held=np.where(ladder.held, ladder.epsilon, -1.0),
        epsilon=ladder.epsilon,
        end=max(_BEYOND * ladder.epsilon, float(proved.max())),
    )


def _proved(results: RunResults, ladder: Ladder) -> np.ndarray:
    certificates = results.certificates
    if certificates is None:
        return np.full(len(ladder.clean), -1.0)
    stretch = ladder.around(1.0, certificates.rule.norm)
    sizes = np.where(certificates.correct, certificates.radius / stretch, -1.0)
    by_id = dict(zip(certificates.ids, sizes.tolist(), strict=True))
    return np.array([by_id.get(image_id, -1.0) for image_id in ladder.clean.ids.tolist()])
