"""``rush certify --recompute``: the certificates of a run under another rule, from its stored votes."""

from pathlib import Path
from typing import Any

from rush.certification.certificates import Certificates
from rush.certification.recertify import recompute
from rush.errors import RunError
from rush.records.certificates import TABLE, read_certificates, write_certificates
from rush.reporting.tables import copies_text, lower_text, share

HEADER = ("", "certified", "true one at least")


def recompute_table(path: Path, out: Path | None, **changes: Any) -> tuple[str, list[tuple[str, str, str]]]:
    """The new rule's statement, and rows under ``HEADER`` for the certificates of a run folder or a table.

    The new certificates go to ``out``, where one is given. Raises: RunError when there are none, or ``out`` exists;
    InputError where the new rule would not be valid.
    """
    table = path / TABLE if path.is_dir() else path
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
    samples = f"{certificates.num_samples.mean():,.0f} of at most {rule.num_samples:,}"
    return [
        ("method, bound", f"{rule.method}, {rule.bound}", ""),
        ("samples an image", samples, ""),
        *([("copies", copies_text(certificates), "")] if copies_text(certificates) else []),
        *((f"l2 radius {radius:g}", *_accuracy(certificates, radius)) for radius in certificates.table_radii),
        (certificates.acr_name, f"{certificates.acr:.4f}", ""),
    ]


def _accuracy(certificates: Certificates, radius: float) -> tuple[str, str]:
    """Return the certified accuracy with its interval, and its lower bound over images and noise, rounded down."""
    return share(certificates.accuracy_interval(radius)), lower_text(certificates, radius)
