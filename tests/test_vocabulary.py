"""Plain technical English: phrases that the library's text avoids."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTED = "votes|samples|passes|draws|copies|queries|gradients|generators|noise draws|pixels"
COMPARATIVES = (
    "cheaper|longer|more|less|better|worse|larger|smaller|fewer|nearer|higher|lower|later|earlier|different|doubt"
)

# Each phrase with the wording to use instead.
PHRASES = {
    r"\bleav(?:e|es|ing)\b[^.;:]{1,50}\baway\b": "omit",
    r"\bso many\b": "the number of",
    r"\bgo(?:es|ne|ing)? on\b": "resumes, continues",
    rf"(?<!there )\b(?:is|are|was|were) no (?!(?:{COMPARATIVES})\b)[a-z]": "is not a ..., has no ...",
    rf"\b(?:{COUNTED}) an image\b|\bone an? (?:image|stage|step|file|run|row|line)\b": "per image",
    r"\bbehind a kill\b": "after an interruption",
    r"\bput(?:s|ting)? up with\b": "accepted, tolerated",
    r"\bfor want of\b": "because it lacks",
    r"\bwhoever\b": "a person or program that",
    r"\banew\b": "again",
    r"\bby itself random\b|\brandom by itself\b": "stochastic",
    r"\bis there twice\b": "duplicate",
    r"\bstood against\b": "was compared with",
}
OPENINGS = ("How", "Of", "So", "What", "Where", "Which", "Within")
MOST_SEMICOLONS = 3  # per 1,000 words of all docstrings of the library


def docstrings(code: str) -> Iterator[str]:
    holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, holders) and (text := ast.get_docstring(node)):
            yield text


def strings(code: str) -> Iterator[str]:
    """Yield all string literals, docstrings among them; the values within an f-string become ``{}``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def comments(code: str) -> Iterator[str]:
    """Yield all comments, those on consecutive lines as one."""
    block, last = "", -1
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            text, line = token.string.lstrip("#"), token.start[0]
            if line != last + 1:
                yield block
                block = ""
            block, last = block + text, line
    yield block


def texts(path: Path) -> list[str]:
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [*strings(content), *comments(content)]
    return re.split(r"\n\s*\n", re.sub(r"^\s*#+", "", content, flags=re.MULTILINE))


def faults(text: str) -> list[str]:
    """Return the phrases in ``text`` that are to be avoided, each with what to write instead."""
    line = " ".join(text.split())
    return [
        f"{match.group()!r}: write {instead}"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(phrase, line, re.IGNORECASE)
    ]


def opening_faults(code: str) -> list[str]:
    """Return the beginnings of docstrings that open neither with a verb nor with a noun."""
    return [
        f"docstring opens with {text[:40]!r}: write a verb phrase or a noun phrase"
        for text in docstrings(code)
        if text.split()[0] in OPENINGS
    ]


FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("src/rush/**/*.py", "src/rush/**/*.j2", "src/rush/recipes/*.toml", "*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_avoids_them(name: str) -> None:
    path = ROOT / name
    result = [fault for text in texts(path) for fault in faults(text)]
    if path.suffix == ".py":
        result += opening_faults(path.read_text(encoding="utf-8"))
    assert not result, f"{name}: " + "; ".join(dict.fromkeys(result))


def test_docstrings_have_few_semicolons() -> None:
    modules = [(ROOT / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".py")]
    text = " ".join(text for code in modules for text in docstrings(code))
    ratio = 1000 * text.count(";") / len(text.split())
    assert ratio <= MOST_SEMICOLONS, f"{ratio:.1f} semicolons per 1,000 words of docstrings; write sentences"


@pytest.mark.parametrize(
    "text",
    [
        "leave --out away",
        "It leaves the option\n    away.",
        "So many images are judged.",
        "the run goes on",
        "it has gone on with the next",
        "runs/digits is no folder",
        "names that are no classes",
        "100 votes an image",
        "two forward passes an image",
        "one generator per class, one an image",
        "what a file holds behind a kill",
        "for want of memory",
        "more than can be put up with",
        "Whoever trains",
        "drawn anew",
        "a network that is by itself random",
        "the id is there twice",
    ],
)
def test_each_phrase_is_refused(text: str) -> None:
    assert len(faults(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "there is no folder",
        "it is no longer used",
        "draws of an image",
        "leaves the ball. It goes away",
        "a cathedral of notes",
        "the number of images",
        "one image",
        "it is not a folder",
    ],
)
def test_good_english_is_not(text: str) -> None:
    assert not faults(text)


def test_docstrings_comments_and_strings_are_read() -> None:
    code = '''
def one(path):
    """What is drawn anew."""
    # a comment that goes
    # on
    raise ValueError(f"{path} is no folder; "
                     f"leave {path} away")
'''
    assert len(opening_faults(code)) == 1
    assert [len([fault for text in read(code) for fault in faults(text)]) for read in (strings, comments)] == [4, 1]
