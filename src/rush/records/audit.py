"""``audit.json``: the report of an audit on disk."""

from pathlib import Path

from rush.auditing.report import FORMAT, AuditReport
from rush.errors import InputError
from rush.records.record import Record, check_format
from rush.runtime.files import write_json


def write_audit(path: Path, report: AuditReport) -> None:
    """Write ``report`` to ``path``, atomically."""
    write_json(path, report.to_json())


def read_audit(path: Path, remedy: str) -> AuditReport:
    """Return the report in ``path``.

    Raises: RunError naming ``remedy`` if the file is missing, has a different format or contradicts itself.
    """
    record = Record.read(path, remedy)
    check_format(path, record.fields.get("format"), FORMAT)
    try:
        return AuditReport.from_json(record.fields)
    except InputError as error:
        raise record.damaged(str(error)) from error
