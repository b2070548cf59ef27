"""What a run shows, as frozen dataclasses: the report's only source. No torch, no model; only shares are computed."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rush.auditing.findings import CONFIDENCE, GAIN, LEVELS, lower_bound
from rush.certification.certificates import Certificates as StoredCertificates
from rush.certification.certificates import of_pictures
from rush.certification.sequential import CERTIFIED, NOT_CERTIFIABLE, OUTCOMES, UNDECIDED
from rush.choices import STAGES, CertifyMethod, Level, Norm, Stage
from rush.statistics import Interval, paired_difference, share_interval

SANDWICH = "sandwich"

AuditVerdict = Literal["holds", "overestimated", "undecided"]
Status = Literal["failed", "undecided", "passed", "skipped"]
STATUSES: tuple[Status, ...] = ("failed", "undecided", "passed", "skipped")  # what asks for a reader first
TAIL = 1e-6  # probability that more images violate the sandwich by chance, see ``evaluation.sandwich``


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
    """The certificates of a run: ``stored``, of images that have the indices ``idx`` (N,) in their split.

    Accuracies count each picture once, as certified correctly only if all of its copies are.
    """

    idx: np.ndarray
    stored: StoredCertificates

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def sigma(self) -> float:
        return self.stored.rule.sigma

    @property
    def method(self) -> CertifyMethod:
        return self.stored.rule.method

    @property
    def bound(self) -> str:
        return self.stored.rule.bound

    @property
    def level(self) -> Level:
        return self.stored.rule.level

    @property
    def num_selection(self) -> int:
        return self.stored.rule.num_selection

    @property
    def num_estimation(self) -> int:
        return self.stored.rule.num_estimation

    @property
    def radii(self) -> tuple[float, ...] | None:
        return self.stored.rule.radii

    @property
    def alpha(self) -> float:
        return self.stored.rule.alpha

    @property
    def futility(self) -> float:
        return self.stored.rule.futility

    @property
    def image_alpha(self) -> float:
        """The level of each single certificate."""
        return self.stored.rule.image_alpha

    @property
    def statement(self) -> str:
        """Which level speaks, in a sentence."""
        return self.stored.rule.statement

    @property
    def label(self) -> np.ndarray:
        return self.stored.labels

    @property
    def radius(self) -> np.ndarray:
        return self.stored.radius

    @property
    def correct(self) -> np.ndarray:
        return self.stored.correct

    @property
    def most_samples(self) -> int:
        """Most samples of an image, selection and estimation together."""
        return self.stored.rule.num_samples

    @property
    def mean_samples(self) -> float:
        """Samples of an image on average, selection and estimation together."""
        return float(self.stored.num_samples.mean())

    @property
    def num_pictures(self) -> int:
        """Number of different pictures, over which accuracies are; of images where they are not told apart."""
        return len(self) - (self.stored.num_copies or 0)

    def accuracy(self, radius: float) -> Interval:
        """Share of pictures whose class is right and whose certified radius is >= ``radius``, with its 95 % interval.

        With a grid only its radii are ever certified: between two of them this is the accuracy at the larger.
        """
        return share_interval(*self.stored.certified_pictures(radius))

    def accuracy_lower(self, radius: float, confidence: float = 0.95) -> float:
        """A lower bound on the true certified accuracy at ``radius`` with ``confidence`` over images *and* noise, as
        proved in ``certification.certificates``."""
        return self.stored.accuracy_lower(radius, confidence)

    def decided(self, radius: float) -> Mapping[str, Interval] | None:
        """How the images divide at ``radius``, their right certificates (``accuracy``) aside: shares certified with
        another class than the label, not certifiable, and undecided; None with a fixed number of samples, which gives
        nothing up.
        """
        if self.method != "sequential":
            return None
        decision = self.stored.decision(radius)
        rows = {
            "wrong class": (decision == OUTCOMES[CERTIFIED]) & ~self.correct,
            OUTCOMES[NOT_CERTIFIABLE]: decision == OUTCOMES[NOT_CERTIFIABLE],
            OUTCOMES[UNDECIDED]: decision == OUTCOMES[UNDECIDED],
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
        return self.stored.acr_name

    @property
    def acr(self) -> float:
        """Average certified radius, wrong and abstained images counted as 0; of the grid's radii where there is one."""
        return self.stored.acr

    @property
    def abstained(self) -> int:
        return int((self.stored.prediction < 0).sum())

    @property
    def ceiling(self) -> float:
        """No image can be certified beyond: the grid's last radius, or that of N agreeing votes."""
        return self.stored.largest_radius

    def of(self, idx: np.ndarray) -> "Certificates | None":
        """The certificates of the images ``idx``, or None where one of them has none; the family keeps its size."""
        if not np.isin(idx, self.idx).all():
            return None
        rows = np.flatnonzero(np.isin(self.idx, idx))
        return Certificates(self.idx[rows], self.stored.select(rows))


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
        return share_interval(self.newly_broken, self.images, confidence=2 * CONFIDENCE - 1)

    @property
    def beyond_a_point(self) -> bool:
        """Whether d is shown to exceed one point, at the level that decides for ``overestimated``."""
        return lower_bound(self.newly_broken, self.images, 1 - LEVELS["d"]) > GAIN

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
