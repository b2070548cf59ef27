"""The form in which a finding of the audit is defined: one decorated function that measures and decides.

``@probe(name, remedy)`` decorates a function of the audited ``Case``. The function's docstring is the question that it
answers and the cost, in passes of one image through the base network. m stands for the evaluation's noise draws per
gradient. Thresholds are defined just above the function, and so is the pure decision where it is more than a share
against a threshold.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rush.auditing.case import Case
from rush.auditing.findings import GAIN, Finding, Status, share_status
from rush.evaluation.model import Defender
from rush.evaluation.plans import Plan

FEWEST = 5  # images that decide a median
NOT_CLIMBING = "no image is held, or the evaluation has no known attack that climbs a gradient"


@dataclass(frozen=True)
class Outcome:
    """Decision of a probe, with the fields of ``Finding``, where ``remedy`` is None for the remedy of the probe."""

    status: Status
    figure: float | None
    threshold: float | None
    evidence: str
    remedy: str | None = None


@dataclass(frozen=True)
class Probe:
    """Definition of a finding: called with a case it measures, decides and returns the finding."""

    name: str
    remedy: str
    decide: Callable[[Case], Outcome]

    def __call__(self, case: Case) -> Finding:
        outcome = self.decide(case)
        remedy = self.remedy if outcome.remedy is None else outcome.remedy
        return Finding(self.name, outcome.status, outcome.figure, outcome.threshold, outcome.evidence, remedy)


def probe(name: str, remedy: str) -> Callable[[Callable[[Case], Outcome]], Probe]:
    """Define the decorated function as the probe of the finding ``name``."""
    return lambda decide: Probe(name, remedy, decide)


def skipped(reason: str) -> Outcome:
    """Return the outcome of a probe that has nothing to measure."""
    return Outcome("skipped", None, None, reason, "")


def share(count: int, total: int, threshold: float, what: str) -> Outcome:
    """Return the outcome of a share of images, see ``findings.share_status``.

    Args:
        count: number of images of which ``what`` is true.
        total: number of images measured.
    """
    if total == 0:
        return skipped("no image to look at")
    status = share_status(count, total, threshold)
    return Outcome(status, count / total, threshold, f"{count} of {total} {what}")


def gain(newly: int, total: int, attack: str) -> Outcome:
    """Return the outcome of an ``attack`` that breaks ``newly`` of the images that the evaluation did not break."""
    return share(newly, total, GAIN, f"images that the evaluation held are broken by {attack}")


def attack_gain(case: Case, plan: Plan, attack: str, climbed: Defender | None = None) -> Outcome:
    """Return the gain of ``plan`` on the held images, as a share of all probed images.

    Args:
        attack: name of the attack in the evidence.
        climbed: defender whose gradient is attacked instead of the model's.
    """
    newly = int(case.attack(plan, case.held, climbed).broken.sum()) if case.held else 0
    return gain(newly, len(case.probed), attack)
