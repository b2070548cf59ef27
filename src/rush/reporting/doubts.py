"""Doubts about a certification log: radii beyond its ceiling, rounded radii and missing images."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from rush.certification.bounds import RADIUS_DIGITS
from rush.records.public_logs import CertificateTable

_UNIT = 10.0**-RADIUS_DIGITS  # certified radii are rounded down to its multiples, as is the largest of a rule
_TIE_STEP = 0.25  # accuracies are published at multiples of it


@dataclass(frozen=True)
class Doubt:
    """A fault or caveat of a log that ``count`` images show."""

    name: str
    text: str
    count: int


def doubts(log: CertificateTable) -> tuple[Doubt, ...]:
    """Return the faults of ``log`` and the caveats to its figures.

    Certificates of this library are derived from their votes, so missing images are the only fault they can have.
    """
    published = (_beyond_ceiling(log), *_rounded(log), *_odd_radii(log)) if log.published else ()
    return tuple(doubt for doubt in (*published, _unfinished(log)) if doubt.count)


def _beyond_ceiling(log: CertificateTable) -> Doubt:
    rule, radius = log.rule, log.certificates.radius
    ceiling = rule.largest_radius
    count = int((radius > ceiling + _UNIT).sum())
    text = (
        f"{count:,} of {len(log):,} radii, up to {radius.max():g}, are larger than {ceiling:.6g}, the largest that "
        f"N = {rule.num_estimation:,} samples can certify at level {rule.image_alpha:g}"
    )
    least = float((radius - log.slack).max())
    if least > ceiling + _UNIT:
        logarithm = float(special.log_ndtr(least / rule.sigma))
        text += (
            "; rounding does not explain it, so sigma, alpha or N are not as stated: this needs alpha >= "
            f"{math.exp(rule.num_estimation * logarithm):.2g} or N >= {math.log(rule.image_alpha) / logarithm:,.0f}"
        )
    return Doubt("beyond-ceiling", text, count)


def _rounded(log: CertificateTable) -> tuple[Doubt, ...]:
    """Return how far rounded radii may exceed the certified ones, and the radii at which this changes accuracies."""
    if log.rounding is None:
        return ()
    text = (
        "radii are printed with few digits, rounded to the nearest unless their source states otherwise: each may "
        f"exceed the certified one by half a unit of its last digit, here up to {log.rounding.max():.2g}"
    )
    radius = log.certificates.radius
    below = np.floor((radius + 1e-12) / _TIE_STEP) * _TIE_STEP
    ties = log.certificates.correct & (below > 0) & (radius - log.rounding < below)
    worst = max(np.unique(below[ties], return_counts=True)[1], default=0)
    tied = (
        f"{ties.sum():,} correct images reach a multiple of {_TIE_STEP:g} only if their radius was not rounded up: "
        f"up to {100 * worst / len(log):.2f} points of certified accuracy at one radius"
    )
    return Doubt("rounded", text, int((log.rounding > 0).sum())), Doubt("grid-ties", tied, int(ties.sum()))


def _odd_radii(log: CertificateTable) -> tuple[Doubt, ...]:
    abstained, radius = log.certificates.abstained, log.certificates.radius
    with_radius, without = int((abstained & (radius > 0)).sum()), int((~abstained & (radius == 0)).sum())
    return (
        Doubt("abstained-with-radius", "images abstain but have a radius above 0", with_radius),
        Doubt("predicted-without-radius", "images have a class but the radius 0", without),
    )


def _unfinished(log: CertificateTable) -> Doubt:
    missing = max(0, log.rule.num_images - len(log))
    return Doubt("unfinished", f"{missing:,} of the {log.rule.num_images:,} planned images are missing", missing)
