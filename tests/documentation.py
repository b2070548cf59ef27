"""The code blocks of README.md, CONTRIBUTING.md, SECURITY.md and docs/, and the marks before them.

A mark is an HTML comment on the line before a block, which no reader of the page sees:

- ``<!-- given: smoothed, images -->``: names that the block uses and the text around it describes.
- ``<!-- run by: tests/test_models.py -->``: another test runs the block.
- ``<!-- not run: REASON -->``: one of ``REASONS``.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *_DOCS)
REASONS = (
    "needs a GPU",
    "needs several machines",
    "needs a package index",
    "needs a network connection",
    "needs the reader's own files",
    "changes the checkout",
    "takes minutes",
)
_BLOCK = re.compile(
    r"^(?:[ ]*<!-- (?P<mark>given|run by|not run): (?P<text>[^\n]+?) -->\n)?"
    r"(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MENTION = re.compile(r"`(rush [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page, line: where it begins.
        mark, text: kind and text of the mark before it, "" without one.
    """

    page: str
    line: int
    language: str
    code: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(self.text.split(", ")) if self.mark == "given" else ()


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the blocks of a page, given by its path in the repository, or of ``text`` in its place."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    return [
        Block(
            page,
            text.count("\n", 0, match.end("indent")) + 1,
            match["language"],
            re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            match["mark"] or "",
            match["text"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def block_with(page: str, words: str) -> str:
    """Return the code of the one block of a page that contains ``words``."""
    (code,) = (block.code for block in blocks(page) if words in block.code)
    return code


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of every command of a shell block, without comments, redirection and what follows a pipe."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        joined = "\0".join(re.sub(r"^(?:&&|;)$", "\n", word) for word in lexer)
        for command in joined.split("\n"):
            if words := [word for word in re.split(r"\0(?:\||>)\0", command)[0].split("\0") if word]:
                yield words


def mentions(page: str) -> Iterator[list[str]]:
    """Yield the words of every ``rush`` command within the text of a page."""
    text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for mention in _MENTION.findall(text):
        yield from commands(mention.replace("\n", " "))


def links(page: str) -> Iterator[tuple[Path, str]]:
    """Yield file and anchor, "" without one, of every link of a page into the repository."""
    text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            yield ((ROOT / page).parent / path if path else ROOT / page), anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
