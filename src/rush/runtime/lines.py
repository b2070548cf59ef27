"""Escaping of untrusted names for lines, tables and terminals, and readers of text, JSON and event files.

A line ends at a line feed and nowhere else. ``str.splitlines`` would also end it at U+2028, U+0085, U+001C and others,
which a name may contain.
"""

import errno
import json
import re
from pathlib import Path
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, marks that change the writing direction, the byte
# order mark, and surrogates, which stand for bytes of a file name that are not UTF-8.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_CODE = r"x[0-9a-f]{2}|u[0-9a-f]{4}"
_TO_ESCAPE = re.compile(rf"[{_UNSAFE}]|\\(?={_CODE})")
_NOT_PRINTABLE = re.compile(f"[{_UNSAFE}]")
_QUOTED = 300  # characters of a foreign error that are quoted
_ESCAPED = re.compile(rf"\\({_CODE})")


def escape(text: str) -> str:
    r"""Return ``text`` as one line of printable characters, of which ``unescape`` is the inverse.

    Control characters, line separators, marks that change the writing direction and bytes that are not UTF-8 become
    ``\x09`` or ``\u2028``, as Python writes them. A backslash is escaped only where it would start such a code. All
    other text stays the same, byte for byte.
    """
    return _TO_ESCAPE.sub(lambda match: _code(ord(match.group())), text)


def unescape(text: str) -> str:
    """Return the text that ``escape`` turned into ``text``."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1)[1:], 16)), text)


def printable(text: str) -> str:
    """Return ``text`` escaped for display: like ``escape``, but backslashes stay, so that it cannot be reversed."""
    return _NOT_PRINTABLE.sub(lambda match: _code(ord(match.group())), text)


def one_line(error: BaseException) -> str:
    """Return the type and message of a foreign error in one line, the message shortened to 300 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file without line endings, which may be CRLF, and without a byte order mark.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    lines = content_of(path).decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_object(path: Path, max_bytes: int = -1) -> dict[str, Any]:
    """Return the JSON object in ``path``, of at most ``max_bytes`` bytes where that is not negative.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is longer, not UTF-8, or not a JSON object.
    """
    return parse_object(content_of(path, max_bytes).decode("utf-8-sig"))


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, or raise ValueError if it is not one."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def content_of(path: Path, max_bytes: int = -1) -> bytes:
    """Return the bytes of a regular file, of at most ``max_bytes`` bytes where that is not negative.

    Raises:
        OSError: The file cannot be read or is not a regular file.
        ValueError: It is longer.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1 if max_bytes >= 0 else -1)
    if 0 <= max_bytes < len(content):
        raise ValueError(f"more than {max_bytes} bytes")
    return content


def _code(point: int) -> str:
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"
