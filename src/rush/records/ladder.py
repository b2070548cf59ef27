"""The values of an attack stage: verdicts under each attacker, accuracy against epsilon and the sandwich."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rush.certification.certificates import of_pictures
from rush.choices import Norm
from rush.statistics import Interval, paired_difference, share_interval

SANDWICH = "sandwich"  # the rung of the attacks inside certified balls


@dataclass(frozen=True, eq=False)
class Rung:
    """The verdicts under one attacker, sorted by ``idx``: arrays (n,), ``broken`` and ``held`` exclude each other.

    pictures: text that is equal for copies of one picture, None where these are not known. Accuracies count each
    picture once, by the worst of its copies.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    idx: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    broken: np.ndarray
    held: np.ndarray
    l2: np.ndarray
    challenger: np.ndarray
    pictures: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def standing(self) -> np.ndarray:
        return ~self.broken

    @property
    def undecided(self) -> int:
        return int((~self.broken & ~self.held).sum())

    @property
    def accuracy(self) -> Interval:
        """1 - share of broken images (``robust_accuracy``), 95 % Clopper-Pearson."""
        return self.share(self.standing)

    def share(self, flags: np.ndarray) -> Interval:
        """The share of pictures whose copies all have ``flags`` (n,), 95 % Clopper-Pearson."""
        pictures = self.of_pictures(flags)
        return share_interval(int(pictures.sum()), len(pictures))

    def of_pictures(self, flags: np.ndarray) -> np.ndarray:
        """For each different picture whether ``flags`` (n,) holds for all of its copies."""
        return of_pictures(flags, None if self.pictures is None else self.pictures.tolist())

    @property
    def num_pictures(self) -> int:
        return len(self) if self.pictures is None else len(np.unique(self.pictures))

    @property
    def accuracy_lower(self) -> Interval:
        """Share of held images (``robust_accuracy_lower``), 95 % Clopper-Pearson."""
        return self.share(self.held)

    @property
    def eot_samples(self) -> int:
        """Noise draws per gradient; 0 for an attacker that does not see the noise."""
        return int(self.settings.get("eot_samples") or 0)

    @property
    def is_noisy_pgd(self) -> bool:
        """Whether the attacker is PGD on noisy gradients. A record without methods is of a ladder of PGD alone."""
        return self.settings.get("method", "pgd") == "pgd" and self.eot_samples > 0

    @property
    def suite(self) -> str:
        """Version of the suite whose worst case this is, empty for a single attacker."""
        return str(self.settings.get("suite") or "")

    @property
    def attackers(self) -> Mapping[str, int]:
        """Of a suite: how many images each of its attackers was the first to break, in their order."""
        return self.settings.get("attackers") or {}

    def above(self, other: "Rung") -> Interval:
        """By how much the accuracy under this attacker lies above that under ``other``, paired over the same images."""
        return paired_difference(self.of_pictures(self.standing), self.of_pictures(other.standing))


@dataclass(frozen=True)
class SandwichFigures:
    """Images attacked inside their own certified radius: how many, which were broken, how many the levels allow."""

    checked: int
    violations: tuple[str, ...]
    allowed: int
    passes_per_image: float
    seconds: float


@dataclass(frozen=True)
class CurvePoint:
    """How many images one attacker broke at one epsilon, and how many were shown to hold or stayed undecided."""

    epsilon: float
    epsilon_text: str
    broken: int
    held: int
    undecided: int

    @property
    def images(self) -> int:
        return self.broken + self.held + self.undecided

    @property
    def accuracy(self) -> Interval:
        """1 - share of broken images, 95 % Clopper-Pearson."""
        return share_interval(self.held + self.undecided, self.images)

    @property
    def accuracy_lower(self) -> Interval:
        """Share of held images, 95 % Clopper-Pearson."""
        return share_interval(self.held, self.images)


@dataclass(frozen=True)
class EpsilonCurve:
    """The same images under the same attacker at rising epsilon."""

    label: str
    points: tuple[CurvePoint, ...]

    @property
    def images(self) -> int:
        return self.points[0].images

    @property
    def last(self) -> CurvePoint:
        return self.points[-1]

    @property
    def rises(self) -> tuple[tuple[CurvePoint, CurvePoint], ...]:
        """Neighbours of which the larger ball, which contains the smaller, left more images standing."""
        pairs = zip(self.points[:-1], self.points[1:], strict=True)
        return tuple((before, after) for before, after in pairs if after.broken < before.broken)


@dataclass(frozen=True)
class Ladder:
    """One threat model, its attackers from weakest to strongest as planned (the first is no attack), the sandwich.

    curve: accuracy against epsilon, None where it was not measured.
    """

    norm: Norm
    epsilon: float
    epsilon_text: str
    alpha: float
    max_votes: int
    votes_per_image: float
    shape: tuple[int, int, int]
    rungs: tuple[Rung, ...]
    curve: EpsilonCurve | None
    sandwich: SandwichFigures

    @property
    def clean(self) -> Rung:
        return self.rungs[0]

    @property
    def strongest(self) -> Rung:
        """The attacker that left the lowest accuracy, the later one at a tie."""
        return min(reversed(self.rungs[1:] or self.rungs), key=lambda rung: int(rung.standing.sum()))

    @property
    def last_eot(self) -> Rung | None:
        """The PGD rung that was planned as the strongest: the last with noisy gradients. Not chosen by its result."""
        return next((rung for rung in reversed(self.rungs) if rung.is_noisy_pgd), None)

    @property
    def worst_case(self) -> Rung | None:
        """The worst case of a suite of attackers, where the ladder ends with one."""
        return next((rung for rung in reversed(self.rungs) if rung.suite), None)

    @property
    def reference(self) -> Rung:
        """What a weaker evaluation is measured against: a suite's worst case, else the strongest attacker."""
        return self.worst_case or self.strongest

    @property
    def flattering(self) -> Rung | None:
        """The noise-aware PGD rung that leaves most images standing, if beyond chance above the reference."""
        aware = [rung for rung in self.rungs[1:] if rung.is_noisy_pgd]
        weakest = max(aware, key=lambda rung: int(rung.standing.sum()), default=None)
        return weakest if weakest is not None and weakest.above(self.reference).low > 0 else None

    @property
    def standing(self) -> np.ndarray:
        """Which images no rung of the ladder broke."""
        return np.logical_and.reduce([rung.standing for rung in self.rungs])

    @property
    def combined(self) -> Interval:
        """Share of images that no rung of the ladder broke."""
        return self.clean.share(self.standing)

    def around(self, epsilon: float) -> float:
        """Radius of the smallest l2 ball around the threat's ball of ``epsilon``: that of a corner for l-inf, epsilon *
        sqrt(C*H*W), and epsilon for l2 and l1."""
        return epsilon * math.sqrt(math.prod(self.shape)) if self.norm == "linf" else epsilon

    @property
    def covering_radius(self) -> float:
        """Radius of the smallest l2 ball around the threat."""
        return self.around(self.epsilon)

    @property
    def inner_radius(self) -> float:
        """Radius of the largest l2 ball inside the threat: to the middle of a face for l1, epsilon / sqrt(C*H*W)."""
        return self.epsilon / math.sqrt(math.prod(self.shape)) if self.norm == "l1" else self.epsilon

    @property
    def grey_epsilon(self) -> float:
        """From here on every image in [0, 1] can be turned into the same mid-grey."""
        pixels = math.prod(self.shape)
        return 0.5 * {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[self.norm]


@dataclass(frozen=True, eq=False)
class Sample:
    """One attacked image: ``clean`` uint8 and ``adversarial`` float32, both (C, H, W)."""

    id: str
    label: int
    verdict: str
    challenger: int
    clean: np.ndarray
    adversarial: np.ndarray
