"""What a run shows, as frozen dataclasses: the report's only source. No torch, no model; only shares are computed."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from rush.evaluation.intervals import Interval, paired_difference, share_interval
from rush.options import STAGES, CertifyMethod, Level, Norm, Stage

SANDWICH = "sandwich"
NOT_CERTIFIABLE = "not certifiable"
OUTCOMES = ("certified", NOT_CERTIFIABLE, "undecided")

AuditVerdict = Literal["holds", "overestimated", "undecided"]
Status = Literal["failed", "undecided", "passed", "skipped"]
STATUSES: tuple[Status, ...] = ("failed", "undecided", "passed", "skipped")  # what asks for a reader first
GAIN = 0.01  # what the audit puts up with for sure: one point, see ``evaluation.findings``
ONE_SIDED = 0.95  # confidence of each bound of the audit


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage says of itself: ``stages/<stage>.json``, with the fields that every stage has checked."""

    stage: Stage
    seconds: float
    finished: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Epoch:
    """One epoch of training as logged: number, mean loss, wall-clock seconds."""

    stage: str
    number: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Watched:
    """Live figures after an epoch of training, shares of the held-out images: "knn", "linear", "accuracy", and each
    with "_noisy" behind it where noise lies on the images."""

    stage: str
    number: int
    figures: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Certificates:
    """The certificates of a run: arrays (N,) over images; ``radius`` in [0, 1] pixel units, 0.0 where abstaining.

    alpha: for each image (level ``image``) or for all ``num_images`` together (``family``); statement: the level in
    words. num_estimation: votes for the bound, with method ``sequential`` the most there may be. radii: the grid of
    which every certified radius is one, ascending; None: any radius. futility: level at which a sequential run gives a
    radius up. num_samples: selection and estimation together; outcome: of the radius after the certified one,
    "certified" where there is none, "not certifiable" or "undecided"; both None where the table has no such column.
    """

    sigma: float
    method: CertifyMethod
    bound: str
    alpha: float
    level: Level
    num_images: int
    num_selection: int
    num_estimation: int
    radii: tuple[float, ...] | None
    futility: float | None
    statement: str
    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    ids: np.ndarray
    num_samples: np.ndarray | None
    outcome: np.ndarray | None

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def image_alpha(self) -> float:
        """The level of each single certificate: alpha, or alpha / num_images for the family."""
        return self.alpha if self.level == "image" else self.alpha / self.num_images

    @property
    def most_samples(self) -> int:
        """Most samples of an image, selection and estimation together."""
        return self.num_selection + self.num_estimation

    @property
    def mean_samples(self) -> float:
        """Samples of an image on average, selection and estimation together."""
        return float(self.most_samples if self.num_samples is None else self.num_samples.mean())

    def accuracy(self, radius: float) -> Interval:
        """Share of images whose class is right and whose certified radius is >= ``radius``, with its 95 % interval.

        With a grid only its radii are ever certified: between two of them this is the accuracy at the larger.
        """
        return share_interval(self._certified_correctly(radius), len(self))

    def accuracy_lower(self, radius: float, confidence: float = 0.95) -> float | None:
        """A lower bound on the true certified accuracy at ``radius`` with ``confidence`` over images *and* noise.

        With s >= low the one-sided Clopper-Pearson bound on the share that is certified correctly, of which at most
        image_alpha comes from false certificates: (low - image_alpha) / (1 - image_alpha), as proved in
        ``certification.certificates``. The images must be independent draws; None where one (id) is there twice.
        """
        if len(np.unique(self.ids)) < len(self.ids):
            return None
        # The lower end of a two-sided interval of confidence 2c - 1 is the one-sided bound of confidence c.
        low = share_interval(self._certified_correctly(radius), len(self), confidence=2 * confidence - 1).low
        return max(0.0, (low - self.image_alpha) / (1 - self.image_alpha))

    def decided(self, radius: float) -> Mapping[str, Interval] | None:
        """How the images divide at ``radius``, their right certificates (``accuracy``) aside: shares certified with
        another class than the label, not certifiable, and undecided; None with a fixed number of samples, which gives
        nothing up, and where the table does not tell.
        """
        if self.method != "sequential" or self.outcome is None or self.radii is None:
            return None
        certified = (self.predict >= 0) & (self.radius >= radius)
        passed = np.where(self.predict >= 0, np.searchsorted(self.radii, self.radius, side="right"), 0)
        following = np.array([*self.radii, math.inf])[passed]  # what is given up, and with it all that is larger
        given_up = (self.outcome == NOT_CERTIFIABLE) & (radius >= following)
        rows = {
            "wrong class": certified & ~self.correct,
            "not certifiable": given_up,
            "undecided": ~certified & ~given_up,
        }
        return {name: share_interval(int(chosen.sum()), len(self)) for name, chosen in rows.items()}

    @property
    def table_radii(self) -> tuple[float, ...]:
        """Where certified accuracy is tabulated: the grid, or the multiples of sigma / 2 up to the ceiling."""
        halves = range(int(2 * self.ceiling / self.sigma) + 1)
        return self.radii or tuple(half * self.sigma / 2 for half in halves)

    @property
    def headline_radius(self) -> float:
        """sigma / 2, or the grid's first radius from there on, its last where there is none."""
        half = self.sigma / 2
        return half if self.radii is None else next((radius for radius in self.radii if radius >= half), self.radii[-1])

    @property
    def acr_name(self) -> str:
        """ "ACR", or "grid ACR" where radii are those of a grid."""
        return "ACR" if self.radii is None else "grid ACR"

    @property
    def acr(self) -> float:
        """Average certified radius, wrong and abstained images counted as 0; of the grid's radii where there is one."""
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def abstained(self) -> int:
        return int((self.predict < 0).sum())

    @property
    def ceiling(self) -> float:
        """No image can be certified beyond: the grid's last radius, or that of N agreeing votes, which is
        sigma * Phi^-1(image_alpha^(1/N)) (Cohen et al. 2019).
        """
        if self.radii is not None:
            return self.radii[-1]
        return self.sigma * NormalDist().inv_cdf(self.image_alpha ** (1 / self.num_estimation))

    def of(self, idx: np.ndarray) -> "Certificates | None":
        """The certificates of the images ``idx``, or None where one of them has none; the family keeps its size."""
        if not np.isin(idx, self.idx).all():
            return None
        rows = np.isin(self.idx, idx)
        arrays: dict[str, Any] = {
            name: array[rows] for name, array in vars(self).items() if isinstance(array, np.ndarray)
        }
        return replace(self, **arrays)

    def _certified_correctly(self, radius: float) -> int:
        return int((self.correct & (self.radius >= radius)).sum())


@dataclass(frozen=True, eq=False)
class Rung:
    """The verdicts under one attacker, sorted by ``idx``: arrays (n,), ``broken`` and ``held`` exclude each other."""

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
        return share_interval(int(self.standing.sum()), len(self))

    @property
    def accuracy_lower(self) -> Interval:
        """Share of held images (``robust_accuracy_lower``), 95 % Clopper-Pearson."""
        return share_interval(int(self.held.sum()), len(self))

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
        return paired_difference(self.standing, other.standing)


@dataclass(frozen=True)
class Sandwich:
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
    sandwich: Sandwich

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
        return share_interval(int(self.standing.sum()), len(self.clean))

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


@dataclass(frozen=True)
class Finding:
    """One look of the audit: ``figure`` is held against ``threshold``, both None where nothing was measured."""

    name: str
    status: Status
    figure: float | None
    threshold: float | None
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Audit:
    """Is an evaluation believable? ``evaluation`` names what was audited, ``here`` the suite that stood against it.

    evaluation_accuracy, accuracy_here: what either leaves of ``images``; newly_broken: how many the evaluation held, or
    left undecided, and the audit broke. tolerance: the share of these that is put up with. images_needed: how many
    would decide an undecided audit, None where no number would. findings: causes before symptoms. alpha: bound on the
    probability of any false verdict on an image.
    """

    verdict: AuditVerdict
    evaluation: str
    evaluation_accuracy: float
    here: str
    accuracy_here: float
    images: int
    newly_broken: int
    tolerance: float
    findings: tuple[Finding, ...]
    norm: Norm
    epsilon: float
    alpha: float
    images_needed: int | None

    @property
    def claimed(self) -> Interval:
        """Robust accuracy that the evaluation claims, with the 95 % interval of as many right images."""
        return share_interval(round(self.evaluation_accuracy * self.images), self.images)

    @property
    def measured(self) -> Interval:
        """Robust accuracy that the audit's attacks leave, likewise."""
        return share_interval(round(self.accuracy_here * self.images), self.images)

    @property
    def d(self) -> Interval:
        """Paired share of images held in the evaluation and broken here; each end is a one-sided 95 % bound."""
        return share_interval(self.newly_broken, self.images, confidence=2 * ONE_SIDED - 1)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The failed findings; the first is the best explanation."""
        return tuple(finding for finding in self.findings if finding.status == "failed")


@dataclass(frozen=True)
class RunResults:
    """All that a run folder says; ``certificates``, ``ladder`` and ``audit`` are None until their stage is finished.

    certificates: None also where there is nothing to certify (``plain``).
    """

    folder: Path
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    classes: tuple[str, ...]
    stages: Mapping[Stage, StageRecord]
    epochs: tuple[Epoch, ...]
    certificates: Certificates | None
    ladder: Ladder | None
    audit: Audit | None
    watched: tuple[Watched, ...] = ()

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def plain(self) -> bool:
        """Whether the classifier itself is used, without noise, so that nothing is certified."""
        return self.setting("smoothing", "sigma") == 0

    @property
    def missing(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in STAGES if stage not in self.stages)

    @property
    def threat_certificates(self) -> Certificates | None:
        """The certificates of the attacked images, or of all certified images where some attacked one has none."""
        if self.certificates is None or self.ladder is None:
            return self.certificates
        return self.certificates.of(self.ladder.clean.idx) or self.certificates

    def setting(self, *keys: str) -> Any:
        """The recipe's entry at ``keys``, None where it has none."""
        entry: Any = self.recipe
        for key in keys:
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        return entry

    def class_name(self, index: int) -> str:
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"

    def command(self, stage: str) -> str:
        return stage_command(self.folder, stage)


@dataclass(frozen=True, eq=False)
class Sample:
    """One attacked image: ``clean`` uint8 and ``adversarial`` float32, both (C, H, W)."""

    id: str
    label: int
    verdict: str
    challenger: int
    clean: np.ndarray
    adversarial: np.ndarray


def stage_command(folder: Path, stage: str) -> str:
    return f"rush {stage} {shlex.quote(str(folder))}"
