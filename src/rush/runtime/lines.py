"""Text within lines: names from outside that cannot break a line, a table or a terminal, and files read line by line.

A line ends at a line feed and nowhere else. ``str.splitlines`` also ends it at U+2028, U+0085, U+001C and others, which
a name may hold.
"""

import errno
import json
import re
from pathlib import Path
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separator, what changes the direction of writing, the byte order
# mark, and halves of surrogate pairs, which stand for bytes of a file name that are not UTF-8.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_CODE = r"x[0-9a-f]{2}|u[0-9a-f]{4}"
_TO_ESCAPE = re.compile(rf"[{_UNSAFE}]|\\(?={_CODE})")
_NOT_PRINTABLE = re.compile(f"[{_UNSAFE}]")
_QUOTED = 300  # characters of somebody else's error that are quoted
_ESCAPED = re.compile(rf"\\({_CODE})")


def escape(text: str) -> str:
    r"""Return ``text`` in one line of printable characters; ``unescape`` gives it back.

    Control characters, line separators, marks that change the direction of writing and bytes that are not UTF-8 become
    ``\x09`` or ``\u2028``, as Python writes them. A backslash is escaped only where it would be read as the beginning
    of such a code. Every other text stays as it is, to the byte.
    """
    return _TO_ESCAPE.sub(lambda match: _code(ord(match.group())), text)


def unescape(text: str) -> str:
    """Return the text of which ``text`` is the escaped form."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1)[1:], 16)), text)


def printable(text: str) -> str:
    """Return ``text`` for a reader: as ``escape``, but not to be read back, so that backslashes stay as they are."""
    return _NOT_PRINTABLE.sub(lambda match: _code(ord(match.group())), text)


def one_line(error: BaseException) -> str:
    """Return the type and the text of somebody else's error in one line, the text shortened to 300 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without their ends; a byte order mark and CRLF ends are accepted.

    Raises: OSError where the file cannot be read; UnicodeDecodeError where it is not UTF-8.
    """
    lines = content_of(path).decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises: OSError where the file cannot be read; ValueError where it is not UTF-8 or not a JSON object.
    """
    return parse_object(content_of(path).decode("utf-8-sig"))


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in ``text``; ValueError where it is none."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def content_of(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises: OSError where it cannot be read or is not a regular file."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def _code(point: int) -> str:
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"
