"""Names from outside in lines of text, and files read line by line."""

import json
import random
from pathlib import Path

import pytest

from rush.errors import RunError
from rush.records.log import read_events
from rush.runtime.lines import escape, printable, read_lines, read_object, unescape

# What ends a line, moves the cursor, hides or is not UTF-8; and what looks like an escape.
NASTY = (
    "a\tb", "a\nb", "a\rb", "a\x0bb", "a\x0cb", "a\x1cb", "a\x1db", "a\x1eb", "a\x85b", "a\u2028b", "a\u2029b", "\0",
    "\x1b[31mred", "\x7f\x9b", "caf\udce9.png", "\udc80\udcff", "\ud800", "x\u202egnp.exe", "\u2066x", "\ufeffid",
    r"\x09", r"\x5c", r"\x5cx09", r"\u2028", r"\\x09", "\\\t", "\\\\\n", r"\x\x09", "\\x0\t9", "\\",
)  # fmt: skip
PLAIN = (
    "img-1.png", "test/3/a b.png", r"C:\images\new.png", "50 % [x] $y$ |z|", "größe 猫 🐈 é", "a\u0301", "",
    r"\X09", r"\u20",
)  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_an_escaped_name_is_one_printable_line_and_comes_back(name: str) -> None:
    written = escape(name)
    assert unescape(written) == name
    assert len(f"x{written}x".splitlines()) == 1
    assert "\t" not in written
    assert written.encode("utf-8").decode("utf-8") == written
    assert all(character.isprintable() for character in written)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_stays_to_the_byte(name: str) -> None:
    assert escape(name) == unescape(name) == printable(name) == name


def test_random_names_come_back_and_never_meet() -> None:
    """200,000 names of pieces that escapes are made of; none of chance: the seed is fixed."""
    generator = random.Random(0)
    pieces = ["\\", "x", "u", "5", "c", "0", "9", "2028", "\t", "\n", "\u2028", "\udce9", "a"]
    names = {"".join(generator.choices(pieces, k=generator.randint(0, 8))) for _ in range(200_000)}
    written = {escape(name) for name in names}
    assert len(written) == len(names)
    assert all(unescape(escape(name)) == name for name in names)


def test_what_a_reader_sees_is_not_escaped_twice() -> None:
    assert printable("a\x1b\n\udce9") == r"a\x1b\x0a\udce9"
    assert printable(printable("a\x1b")) == printable("a\x1b")
    assert printable(r"\x1b") == r"\x1b"


def test_lines_end_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes("\ufeffone\u2028\x85\x1c\r\ntwo\r\n\nthree".encode())
    assert read_lines(file) == ["one\u2028\x85\x1c", "two", "", "three"]
    for content, lines in ((b"", []), (b"\n", [""]), (b"a\n", ["a"]), (b"a", ["a"])):
        file.write_bytes(content)
        assert read_lines(file) == lines


def test_an_object_is_read_behind_a_byte_order_mark_and_nothing_else_is_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_object(file) == {"a": 1}
    size = len(file.read_bytes())
    assert read_object(file, max_bytes=size) == {"a": 1}
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes"):
        read_object(file, max_bytes=size - 1)
    for content in (b"[1]", b"", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"found list|Expecting|decode|too deeply|digits"):
            read_object(file)


EVENT = b'{"event": "epoch", "stage": "pretrain", "epoch": 1}\n'


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x80\x81\x00\xff\n",
        b"not JSON\n",
        b"[1, 2]\n",
        b'"epoch"\n',
        b"{}\n",
        b'{"event": 3}\n',
        b'{"stage": "pretrain"}\n',
        b'{"event": "epo\n',
        b"[" * 100_000 + b"\n",
        b"garbage at the end without a line feed",
        b"\xff\xfe",
    ],
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, garbage: bytes) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(EVENT + garbage)
    with pytest.raises(RunError, match=r"log\.jsonl is damaged: line 2 cannot be read .* lose a point"):
        read_events(file)


def test_a_beginning_that_a_kill_left_and_empty_lines_are_omitted(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    event = json.loads(EVENT)
    assert read_events(file) == {}
    for left in (b"", b"\n\n", EVENT[:1], EVENT[:-2], b"\0\0\0", EVENT[:20] + b"\0\0"):
        file.write_bytes(EVENT + left)
        assert read_events(file) == {1: event}
    file.write_bytes(b"\xef\xbb\xbf" + EVENT.replace(b"\n", b"\r\n") + EVENT[:-1])
    assert read_events(file) == {1: event, 2: event}
