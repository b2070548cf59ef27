"""The verdict rule of an audit on the paired share d, and the report with its machine-readable form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from scipy import special

from rush.auditing.findings import CONFIDENCE, GAIN, INVALIDATING, LEVELS, Finding, Status, lower_bound, upper_bound
from rush.choices import AuditVerdict, Norm
from rush.errors import InputError
from rush.runtime.numbers import as_real, least_whole
from rush.statistics import Interval, share_interval

FORMAT = 1  # format of audit.json
# Names of fields in audit.json, where they differ.
_STORED_AS = {"reference": "here", "reference_accuracy": "accuracy_here"}
_MOST_IMAGES = 10_000_000  # beyond it no number of images is named


def decide(newly: int, total: int, tolerance: float, failed: Sequence[str]) -> AuditVerdict:
    """Return the verdict on an evaluation that held ``newly`` of ``total`` images which the audit broke.

    ``overestimated``: the one-sided lower bound of d = newly / total, at the level ``findings.LEVELS["d"]``, exceeds
    one point, or a failed finding shows that the evaluation is invalid. ``holds``: the 95 % upper bound of d is below
    ``tolerance`` and no finding failed. Each of the two is wrong with probability <= 5 %, over the draw of the images
    and the audit's own draws, for the share that these attacks break: the levels of d and of all findings that decide
    alone sum to ``findings.OVERESTIMATED_LEVEL``.
    """
    if _exceeds_a_point(newly, total) or INVALIDATING.intersection(failed):
        return "overestimated"
    if upper_bound(newly, total) < tolerance and not failed:
        return "holds"
    return "undecided"


def images_needed(newly: int, total: int, tolerance: float, failed: Sequence[str]) -> int | None:
    """Return the fewest images at which an undecided audit would be decided if d stayed the same, or None.

    The Clopper-Pearson bounds of the share d of n images use n d even where it is not an integer. At d between one
    point and the tolerance the answer would be ``overestimated``. With a failed finding ``holds`` is out of reach. The
    result is None if there is no such number.
    """
    share = newly / total

    def overestimated(n: int) -> bool:
        return newly > 0 and float(special.betaincinv(share * n, n - share * n + 1, LEVELS["d"])) > GAIN

    def holds(n: int) -> bool:
        return newly < total and float(special.betaincinv(share * n + 1, n - share * n, CONFIDENCE)) < tolerance

    rules = [overestimated] if failed else [overestimated, holds]
    return min((images for rule in rules if (images := _fewest(rule)) is not None), default=None)


def images_to_hold(tolerance: float) -> int | None:
    """Return the fewest images for which ``decide`` can return ``holds``, if the audit breaks none of them, or None."""
    return _fewest(lambda n: float(upper_bound(0, n)) < tolerance)


def reach_statement(images: int, tolerance: float) -> str | None:
    """Return the sentence that an audit of ``images`` images cannot end with ``holds``, or None if it can."""
    fewest = images_to_hold(tolerance)
    if fewest is not None and images >= fewest:
        return None
    needed = "no number of them can" if fewest is None else f"that takes at least {fewest}"
    return (
        f"{images} images can show `overestimated`, but not `holds` at tolerance {tolerance:g}, even when nothing more "
        f"is broken by the audit: {needed}"
    )


@dataclass(frozen=True)
class AuditReport:
    """Report of an audit: can the evaluation be trusted?

    Attributes:
        verdict: see ``decide``.
        evaluation: what was audited, with ``evaluation_accuracy``, the robust accuracy that it reports.
        reference: name and version of the reference suite.
        reference_accuracy: re-measured robust accuracy, 1 - the share of images that are broken by the evaluation, the
            reference suite or a probe.
        images: number of images.
        newly_broken: ids of the images that the evaluation held, or left undecided, and that are broken by the audit.
        tolerance: the largest acceptable share of these.
        findings: the findings, from causes to symptoms.
        norm: norm of the threat model.
        epsilon: epsilon of the threat model, the largest one where images have their own.
        alpha: bound on the probability of any false verdict on an image.
    """

    verdict: AuditVerdict
    evaluation: str
    evaluation_accuracy: float
    reference: str
    reference_accuracy: float
    images: int
    newly_broken: tuple[str, ...]
    tolerance: float
    findings: tuple[Finding, ...]
    norm: str
    epsilon: float
    alpha: float
    max_votes: int
    seed: int

    @property
    def d(self) -> float:
        """Share of images that are newly broken. ``d_low`` and ``d_high`` are its one-sided 95 % bounds."""
        return len(self.newly_broken) / self.images

    @property
    def d_low(self) -> float:
        return lower_bound(len(self.newly_broken), self.images)

    @property
    def d_high(self) -> float:
        return upper_bound(len(self.newly_broken), self.images)

    @property
    def claimed(self) -> Interval:
        """Robust accuracy that the evaluation claims, with the 95 % interval of the same number of correct images."""
        return share_interval(round(self.evaluation_accuracy * self.images), self.images)

    @property
    def measured(self) -> Interval:
        """Robust accuracy that the audit's attacks leave, with its 95 % interval likewise."""
        return share_interval(round(self.reference_accuracy * self.images), self.images)

    @property
    def beyond_a_point(self) -> bool:
        """Whether d is shown to exceed one point, at the level that decides for ``overestimated``."""
        return _exceeds_a_point(len(self.newly_broken), self.images)

    @property
    def failed_findings(self) -> tuple[Finding, ...]:
        """The failed findings. The first is the best explanation."""
        return tuple(finding for finding in self.findings if finding.status == "failed")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of ``failed_findings``."""
        return tuple(finding.name for finding in self.failed_findings)

    @property
    def images_needed(self) -> int | None:
        if self.verdict != "undecided":
            return None
        return images_needed(len(self.newly_broken), self.images, self.tolerance, self.failed)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the fields, and what follows from them for readers without this library."""
        derived = {"d": self.d, "d_low": self.d_low, "d_high": self.d_high, "failed": list(self.failed)}
        plain = {_STORED_AS.get(name, name): value for name, value in asdict(self).items()}
        plain["newly_broken"] = list(self.newly_broken)
        plain["findings"] = [asdict(finding) for finding in self.findings]
        return {"format": FORMAT, **plain, **derived, "images_needed": self.images_needed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AuditReport":
        """Return the report that ``to_json`` gave. What follows from the fields is derived again, not read.

        Raises: InputError for another format, or for fields that are missing, not allowed or contradict each other.
        """
        if value.get("format") != FORMAT:
            raise InputError(f"audit of format {value.get('format')!r}, this version reads {FORMAT}; audit again")
        entries, newly = value.get("findings"), value.get("newly_broken")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError("'findings' must be a list of objects")
        if not isinstance(newly, list) or len(newly) != len({str(name) for name in newly}):
            raise InputError("'newly_broken' must be a list of images, each once")
        try:
            fields = {name: value[_STORED_AS.get(name, name)] for name in cls.__dataclass_fields__}
            fields["findings"] = tuple(Finding(**entry) for entry in entries)
        except (KeyError, TypeError) as error:
            raise InputError(f"the audit is not complete ({type(error).__name__}: {error}); audit again") from error
        report = cls(**{**fields, "newly_broken": tuple(map(str, newly))})
        report._check()
        return report

    def _check(self) -> None:
        """Raise InputError where a field is not allowed, or the fields contradict each other."""
        if self.verdict not in get_args(AuditVerdict) or self.norm not in get_args(Norm):
            allowed = f"{' or '.join(get_args(AuditVerdict))}, and {' or '.join(get_args(Norm))}"
            raise InputError(f"verdict and norm must be {allowed}, got {self.verdict!r} and {self.norm!r}")
        for name in ("evaluation_accuracy", "reference_accuracy", "tolerance", "epsilon", "alpha"):
            if as_real(getattr(self, name)) is None:
                stored = _STORED_AS.get(name, name)
                raise InputError(f"{stored!r} must be a finite number, got {getattr(self, name)!r}")
        for finding in self.findings:
            _check_finding(finding)
        if type(self.images) is not int or not max(1, len(self.newly_broken)) <= self.images:
            raise InputError(f"{len(self.newly_broken)} of {self.images!r} images cannot be newly broken")
        if not (0 <= self.reference_accuracy <= 1 and 0 <= self.evaluation_accuracy <= 1 and 0 < self.tolerance < 1):
            raise InputError("accuracies must lie in [0, 1] and the tolerance in (0, 1)")
        if abs(self.evaluation_accuracy - self.reference_accuracy - self.d) > 1e-9:
            accuracies = f"accuracies of {self.evaluation_accuracy} and {self.reference_accuracy}"
            raise InputError(f"{accuracies} do not differ by the {self.d} that are newly broken")
        open_question = self.failed or self.d_high >= self.tolerance
        agrees = {
            "holds": not open_question,
            "overestimated": self.failed or self.beyond_a_point,
            "undecided": open_question and not self.beyond_a_point,
        }
        if not agrees[self.verdict]:
            raise InputError(f"{self.verdict!r} does not agree with its own findings and newly broken images")

    def summary(self) -> list[str]:
        """Return lines for a terminal: the verdict, the two accuracies, d, and every finding that did not pass."""
        lines = [
            f"{self.verdict}: {self.evaluation} ({self.norm} {self.epsilon:.4g}, {self.images} images)",
            f"robust accuracy: reported {self.evaluation_accuracy:.1%}, re-measured {self.reference_accuracy:.1%} "
            f"({self.reference})",
            f"reported robust but broken: {self.d:.1%}, one-sided 95 % bounds {self.d_low:.1%} and {self.d_high:.1%}",
        ]
        if self.verdict == "undecided":
            needed = self.images_needed
            lines.append("more images will not decide" if needed is None else f"{needed} images would decide")
            lines += filter(None, [reach_statement(self.images, self.tolerance)])
        for finding in self.findings:
            if finding.status in ("failed", "undecided"):
                lines.append(f"{finding.status}: {finding.name}: {finding.evidence}")
            if finding.status == "failed":
                lines.append(f"  {finding.remedy}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.summary())


def _exceeds_a_point(newly: int, total: int) -> bool:
    return lower_bound(newly, total, 1 - LEVELS["d"]) > GAIN


def _check_finding(finding: Finding) -> None:
    if finding.status not in get_args(Status):
        allowed = ", ".join(get_args(Status))
        raise InputError(f"finding {finding.name!r}: status must be one of {allowed}, got {finding.status!r}")
    for number in (finding.figure, finding.threshold):
        if number is not None and type(number) not in (int, float):  # infinity is one
            figures = f"{finding.figure!r} and {finding.threshold!r}"
            raise InputError(f"finding {finding.name!r}: figure and threshold must be numbers or null, got {figures}")


def _fewest(rule: Callable[[int], bool]) -> int | None:
    """Return the least number of images at and above which ``rule`` is true, or None beyond ten million."""
    images = least_whole(rule)
    return images if images is not None and images <= _MOST_IMAGES else None
