"""Values of an attack stage: verdicts under each attacker, accuracy over epsilon and the sandwich."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rush.certification.certificates import of_pictures
from rush.choices import Norm
from rush.statistics import Interval, paired_difference, share_interval

SANDWICH = "sandwich"  # the rung of the attacks inside certified balls
_TWICE_INVERSE: Mapping[Norm, int] = {"linf": 0, "l2": 1, "l1": 2}  # 2 / p of the norm l-p


@dataclass(frozen=True, eq=False)
class Rung:
    """The verdicts under one attacker, sorted by ``idx``, as arrays (n,). ``broken`` and ``held`` exclude each other.

    Accuracies count each picture once, by the worst of its copies.

    Attributes:
        size: size of the change, in the norm of the run's certificates, or in l2 if it has none.
        threat_size: size of the change, in the norm of the threat, or None if the table does not hold it.
        pictures: text that is equal for copies of one picture, None if copies are not known.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    idx: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    broken: np.ndarray
    held: np.ndarray
    size: np.ndarray
    challenger: np.ndarray
    pictures: np.ndarray | None = None
    threat_size: np.ndarray | None = None

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
        """1 - share of broken images (``robust_accuracy``), with its 95 % Clopper-Pearson interval."""
        return self.share(self.standing)

    def share(self, flags: np.ndarray) -> Interval:
        """Return the share of pictures whose copies all have ``flags`` (n,), with its 95 % Clopper-Pearson interval."""
        pictures = self.of_pictures(flags)
        return share_interval(int(pictures.sum()), len(pictures))

    def of_pictures(self, flags: np.ndarray) -> np.ndarray:
        """Return for each distinct picture whether ``flags`` (n,) holds for all of its copies."""
        return of_pictures(flags, None if self.pictures is None else self.pictures.tolist())

    @property
    def num_pictures(self) -> int:
        return len(self) if self.pictures is None else len(np.unique(self.pictures))

    @property
    def accuracy_lower(self) -> Interval:
        """Share of held images (``robust_accuracy_lower``), with its 95 % Clopper-Pearson interval."""
        return self.share(self.held)

    def spent(self, key: str) -> float:
        """Return a cost from ``settings``, such as ``passes_per_image`` or ``seconds``; 0.0 if it is not recorded."""
        return float(self.settings.get(key) or 0)

    @property
    def eot_samples(self) -> int:
        """Noise draws per gradient, 0 for an attacker that does not see the noise."""
        return int(self.settings.get("eot_samples") or 0)

    @property
    def is_noisy_pgd(self) -> bool:
        """Whether the attacker is PGD on noisy gradients. Ladders of records without methods consist of PGD alone."""
        return self.settings.get("method", "pgd") == "pgd" and self.eot_samples > 0

    @property
    def suite(self) -> str:
        """Version of the suite whose worst case this is, empty for a single attacker."""
        return str(self.settings.get("suite") or "")

    @property
    def attackers(self) -> Mapping[str, int]:
        """The number of images that each attacker of a suite was the first to break, in their order."""
        return self.settings.get("attackers") or {}

    def above(self, other: "Rung") -> Interval:
        """Return the accuracy under this attacker minus that under ``other``, paired over the same images."""
        return paired_difference(self.of_pictures(self.standing), self.of_pictures(other.standing))


@dataclass(frozen=True)
class SandwichFigures:
    """Images attacked within their certified radius: number, those broken, and the number that the levels allow."""

    checked: int
    violations: tuple[str, ...]
    allowed: int
    passes_per_image: float
    seconds: float


@dataclass(frozen=True)
class CurvePoint:
    """Numbers of images that one attacker broke at one epsilon, that were shown to hold, and that stayed undecided."""

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
        """1 - share of broken images, with its 95 % Clopper-Pearson interval."""
        return share_interval(self.held + self.undecided, self.images)

    @property
    def accuracy_lower(self) -> Interval:
        """Share of held images, with its 95 % Clopper-Pearson interval."""
        return share_interval(self.held, self.images)


@dataclass(frozen=True)
class EpsilonCurve:
    """The same images under the same attacker at increasing epsilon."""

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
        """Neighbouring points of which the larger ball, which contains the smaller, left more images unbroken."""
        pairs = zip(self.points[:-1], self.points[1:], strict=True)
        return tuple((before, after) for before, after in pairs if after.broken < before.broken)


@dataclass(frozen=True)
class Ladder:
    """Attackers under one threat model, from weakest to strongest as planned, and the sandwich.

    Attributes:
        rungs: the first is without attack.
        curve: accuracy over epsilon, None if it was not measured.
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
        """The attacker with the lowest accuracy, the later one at a tie."""
        return min(reversed(self.rungs[1:] or self.rungs), key=lambda rung: int(rung.standing.sum()))

    @property
    def last_eot(self) -> Rung | None:
        """The last PGD rung with noisy gradients, which is planned as the strongest and so not chosen by its result."""
        return next((rung for rung in reversed(self.rungs) if rung.is_noisy_pgd), None)

    @property
    def worst_case(self) -> Rung | None:
        """The worst case of a suite of attackers, or None if the ladder has none."""
        return next((rung for rung in reversed(self.rungs) if rung.suite), None)

    @property
    def reference(self) -> Rung:
        """The rung that weaker evaluations are compared with: a suite's worst case, else the strongest attacker."""
        return self.worst_case or self.strongest

    @property
    def flattering(self) -> Rung | None:
        """The noise-aware PGD rung with the highest accuracy, if that exceeds the reference beyond chance."""
        aware = [rung for rung in self.rungs[1:] if rung.is_noisy_pgd]
        weakest = max(aware, key=lambda rung: int(rung.standing.sum()), default=None)
        return weakest if weakest is not None and weakest.above(self.reference).low > 0 else None

    @property
    def standing(self) -> np.ndarray:
        """Whether no rung of the ladder broke the image, (n,)."""
        return np.logical_and.reduce([rung.standing for rung in self.rungs])

    @property
    def smallest_broken(self) -> np.ndarray:
        """The smallest size, in the threat's norm, of a change that broke the image, (n,).

        0.0 if it is wrong without attack, infinite if no rung broke it. A size that is not known counts as epsilon.
        """
        sizes = np.full(len(self.clean), np.inf)
        for rung in self.rungs[1:]:
            known = self.epsilon if rung.threat_size is None else np.minimum(rung.threat_size, self.epsilon)
            sizes = np.where(rung.broken, np.minimum(sizes, known), sizes)
        return np.where(self.clean.broken, 0.0, sizes)

    @property
    def held(self) -> np.ndarray:
        """Whether the image was shown to hold under every rung of the ladder, (n,)."""
        return np.logical_and.reduce([rung.held for rung in self.rungs])

    @property
    def combined(self) -> Interval:
        """Share of images that no rung of the ladder broke."""
        return self.clean.share(self.standing)

    def around(self, epsilon: float, norm: Norm) -> float:
        """Return the radius of the smallest ball of ``norm`` that contains the threat's ball of radius ``epsilon``.

        For a threat in l-p and a ball in l-q it is epsilon * (C*H*W)^(1/q - 1/p) where q < p, and else epsilon. In l2
        the l-inf ball's corner is at the distance epsilon * sqrt(C*H*W). In l1 the l-inf ball's corner is at epsilon *
        C*H*W, and the farthest points of the l2 ball are at epsilon * sqrt(C*H*W).
        """
        return epsilon * self._stretch(norm, self.norm)

    def covering_radius(self, norm: Norm) -> float:
        """Return the radius of the smallest ball of ``norm`` that contains the threat."""
        return self.around(self.epsilon, norm)

    def inner_radius(self, norm: Norm) -> float:
        """Return the radius of the largest ball of ``norm`` inside the threat.

        In l2 it is the distance to an l1 ball's face, epsilon / sqrt(C*H*W). Each l1 ball of radius epsilon is inside
        the l2 and the l-inf ball of that radius.
        """
        return self.epsilon / self._stretch(self.norm, norm)

    def _stretch(self, norm: Norm, other: Norm) -> float:
        """Return the largest ratio, at least 1, of a change's ``norm`` to its ``other`` norm."""
        return math.sqrt(math.prod(self.shape) ** max(0, _TWICE_INVERSE[norm] - _TWICE_INVERSE[other]))

    @property
    def grey_epsilon(self) -> float:
        """Smallest epsilon at which every image in [0, 1] can be turned into the same mid-grey."""
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
