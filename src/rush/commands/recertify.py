"""``rush certify --recompute``: the certificates of a run under another rule, from its stored votes."""

import math
from pathlib import Path
from typing import Any

from rush.certification.certificates import Certificates
from rush.certification.recertify import recompute
from rush.certification.table import read_certificates, write_certificates
from rush.errors import RunError
from rush.reporting.tables import copies_text
from rush.statistics import share_interval

HEADER = ("", "certified", "true one at least")


def recompute_table(path: Path, out: Path | None, **changes: Any) -> tuple[str, list[tuple[str, str, str]]]:
    """The new rule's statement, and rows under ``HEADER`` for the certificates of a run folder or a table.

    The new certificates go to ``out``, where one is given. Raises: RunError when there are none, or ``out`` exists;
    InputError where the new rule would not be valid.
    """
    table = path / "certificates.tsv" if path.is_dir() else path
    read = read_certificates(table)
    if read is None:
        raise RunError(
            f"{table} is missing or holds no certificates; run `rush certify` first "
            "(a run with smoothing.sigma = 0 has nothing to certify)"
        )
    if out is not None and out.exists():
        raise RunError(f"{out} exists; give another file to --out")
    indices, stored = read
    certificates = recompute(stored, **changes)
    if out is not None:
        write_certificates(out, certificates, indices)
    return certificates.rule.statement, _rows(certificates)


def _rows(certificates: Certificates) -> list[tuple[str, str, str]]:
    rule = certificates.rule
    halves = [half * rule.sigma / 2 for half in range(int(2 * rule.largest_radius / rule.sigma) + 1)]
    samples = f"{certificates.num_samples.mean():,.0f} of at most {rule.num_samples:,}"
    return [
        ("method, bound", f"{rule.method}, {rule.bound}", ""),
        ("samples an image", samples, ""),
        *([("copies", copies_text(certificates), "")] if copies_text(certificates) else []),
        *((f"l2 radius {radius:g}", *_accuracy(certificates, radius)) for radius in rule.radii or halves),
        (certificates.acr_name, f"{certificates.acr:.4f}", ""),
    ]


def _accuracy(certificates: Certificates, radius: float) -> tuple[str, str]:
    """Certified accuracy with its interval, and its lower bound over images and noise, rounded down."""
    interval = share_interval(*certificates.certified_pictures(radius))
    lower = math.floor(1000 * certificates.accuracy_lower(radius)) / 10
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]", f"{lower:.1f} %"
