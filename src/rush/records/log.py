"""``log.jsonl``: the events of a run, one JSON object per line."""

import json
from pathlib import Path
from typing import Any

from rush.errors import RunError
from rush.records.record import FORMATS, check_format
from rush.runtime.files import append_text, cut_file, refuse_links
from rush.runtime.lines import content_of, parse_object


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Append ``event`` to the log ``path``. A partial last line left by a crash is truncated first.

    Raises:
        RunError: the last line is not the beginning of an event.
        WriteError: the file cannot be written.
    """
    _mend_last_line(path)
    append_text(path, json.dumps(event) + "\n")


def read_events(path: Path) -> dict[int, dict[str, Any]]:
    """Return the events of a ``log.jsonl`` by line number, none if the file is missing.

    A partial last line left by a crash is omitted.

    Raises:
        RunError: another line is not an event, or the file cannot be read or has a newer format.
    """
    try:
        content = content_of(path) if path.exists() else b""
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); allow it, or restore the file from a copy"
        ) from error
    events = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            event = parse_object(line.decode("utf-8"))
            if not isinstance(event.get("event"), str):
                raise ValueError("it does not name its event")
        except ValueError as error:
            if _is_cut_off(line) and content.endswith(line):
                break
            raise damaged_event(path, number, f"{error}: {line[:60]!r}") from error
        check_format(path, event.pop("format", None), FORMATS["log.jsonl"])
        events[number] = event
    return events


def damaged_event(path: Path, number: int, why: str) -> RunError:
    """Return the error for the damaged line ``number`` of a log."""
    return RunError(
        f"{path} is damaged: line {number} cannot be read ({why}). Remedy: restore the file from a copy, or delete the "
        "line; only the training curves lose a point."
    )


def _mend_last_line(file: Path) -> None:
    """Make ``file`` end with a line feed: complete a whole last line, and truncate the beginning of one.

    Raises: RunError if the last line is anything else, which is not deleted.
    """
    refuse_links(file)
    content = file.read_bytes() if file.is_file() else b""
    last = content[content.rfind(b"\n") + 1 :]
    if not last:
        return
    if _is_json(last):
        append_text(file, "\n")
    elif _is_cut_off(last):
        cut_file(file, len(content) - len(last))
    else:
        raise RunError(
            f"{file}: its last line is not the beginning of an event: {last[:60]!r}; delete the line, or restore the "
            "file from a copy"
        )


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_cut_off(line: bytes) -> bool:
    """Return whether ``line`` is the beginning of a log's event."""
    opening, written = b'{"event": "', line.rstrip(b"\0")  # a power cut may leave zeros
    return written.startswith(opening) or opening.startswith(written)
