"""``certificates.tsv``: one line per image, written as it is certified.

What a table says of an image is derived from its votes and its rule whenever it is read. The printed class, radius,
bound and outcome are for other readers: they are compared with the derived ones and never used.
"""

import base64
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from rush.certification.apply_rule import apply_rule
from rush.certification.bounds import RADIUS_DIGITS
from rush.certification.certificates import UNKNOWN, Certificates
from rush.certification.rule import Rule
from rush.certification.sequential import OUTCOMES
from rush.choices import BLOCK
from rush.errors import RunError
from rush.runtime.files import append_text, cut_file, refuse_links, write_text
from rush.runtime.lines import escape, read_lines, unescape

# The first six columns are the field's (locuslab/smoothing), so that existing scripts read the file.
COLUMNS = (
    "idx", "label", "predict", "radius", "correct", "time",
    "id", "p_lower", "num_samples", "outcome", "counts", "selection", "blocks", "rule", "pixels", "model",
)  # fmt: skip
OLDER_COLUMNS = COLUMNS[:-2]  # of tables that name neither pictures nor model
TOLERANCE = 1e-6  # how far a printed radius or bound may lie from the derived one
_OTHER_BLOCKS = "its blocks do not add up to its counts"
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_VOTES = re.compile(r"-?[0-9]{1,15}(,-?[0-9]{1,15})*")
_REAL = re.compile(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?")
T = TypeVar("T")


def write_certificates(path: Path, certificates: Certificates, indices: Sequence[int]) -> None:
    """Write the table of ``certificates``, whose images have these ``indices`` in their split, whole or not at all."""
    write_text(path, _header(certificates) + _lines(certificates, indices))


def append_certificates(path: Path, part: Certificates, indices: Sequence[int]) -> None:
    """Append the lines of ``part``, whose images have these ``indices`` in their split; writes the header into a new
    file.

    Radii have six decimals, rounded toward zero already; ``p_lower`` is written so that it reads back exactly; ids are
    escaped where they would break a line; ``blocks`` holds the votes for the selected class by blocks of 100 noise
    samples, uint8, compressed by zlib, in base64; ``rule``, the same in every line, says how the votes were drawn and
    which level speaks; ``pixels`` is a hash of the image's pixels, ``model`` one of the model, the same in every line.
    """
    append_text(path, _lines(part, indices), header=_header(part))


def read_certificates(path: Path) -> tuple[list[int], Certificates] | None:
    """Return the indices of the images in their split, and their certificates; None when the file is missing or holds
    none.

    Class, radius, bound and outcome are derived from votes and rule, as they were when the image was certified.
    Raises: RunError naming the line when the file is damaged: votes that do not add up or exceed their block or the
    rule, an image that is there twice, or a printed value that is not the derived one (1e-6 for radius and bound).
    """
    table = _Table.read(path)
    return None if table is None else (table.whole("idx").tolist(), table.certificates())


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a kill left after the last line feed."""
    refuse_links(path)
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            cut_file(path, whole)


def _header(certificates: Certificates) -> str:
    return "\t".join(OLDER_COLUMNS if certificates.pixels is None or certificates.model is None else COLUMNS) + "\n"


def _lines(certificates: Certificates, indices: Sequence[int]) -> str:
    return "".join(_line(certificates, row, index) for row, index in enumerate(indices))


def _line(part: Certificates, row: int, index: int) -> str:
    fields = (
        index,
        part.labels[row],
        part.prediction[row],
        f"{part.radius[row]:.{RADIUS_DIGITS}f}",
        int(part.correct[row]),
        f"{part.seconds[row]:.4f}",
        escape(part.ids[row]),
        repr(float(part.p_lower[row])),
        part.num_samples[row],
        OUTCOMES[part.outcome[row]],
        _listed(part.counts[row]),
        _listed(part.selection[row]),
        base64.b64encode(zlib.compress(part.blocks[row].tobytes(), 9)).decode(),
        part.rule.to_json(),
        *(() if part.pixels is None or part.model is None else (part.pixels[row], part.model)),
    )
    return "\t".join(str(field) for field in fields) + "\n"


def _listed(values: NDArray[np.int64]) -> str:
    return ",".join(str(value) for value in values)


class _Table:
    """The cells of a table by column."""

    def __init__(self, path: Path, cells: dict[str, list[str]]) -> None:
        self.path, self._cells = path, cells

    @classmethod
    def read(cls, path: Path) -> "_Table | None":
        try:
            lines = read_lines(path) if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path} cannot be read: {error}; move the file away and certify again") from error
        if len(lines) < 2:
            return None
        columns = tuple(lines[0].split("\t"))
        table = cls(path, {})
        if columns not in (COLUMNS, OLDER_COLUMNS):
            table.refuse(-1, f"expected the columns {' '.join(COLUMNS)}")
        rows = [line.split("\t") for line in lines[1:]]
        for row, fields in enumerate(rows):
            if len(fields) != len(columns):
                table.refuse(row, f"{len(fields)} fields instead of {len(columns)}")
        table._cells = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        return table

    def certificates(self) -> Certificates:
        """The certificates that votes and rule give, compared with what is printed."""
        rule = self._rule()
        counts, selection = self._votes("counts"), self._votes("selection")
        samples = self.whole("num_samples")
        drawn = samples - rule.num_selection
        self._check_votes(rule, counts, selection, drawn)
        selected = selection.argmax(1).astype(np.int64)
        blocks = self._blocks(drawn, counts[np.arange(len(counts)), selected])
        certified, outcome, _, trials = apply_rule(rule, blocks, drawn, selection)
        self.check(trials == drawn, "votes were drawn after its rule had decided")
        derived = Certificates(
            prediction=certified.prediction,
            radius=certified.radius,
            p_lower=certified.p_lower,
            num_samples=samples,
            counts=counts,
            blocks=blocks,
            selection=selection,
            outcome=outcome,
            seconds=self._real("time"),
            labels=self.whole("label"),
            ids=self._ids(),
            rule=rule,
            pixels=self._hashes("pixels", 32),
            model=self._model(),
        )
        self._compare(derived)
        return derived

    def _rule(self) -> Rule:
        texts = self._cells["rule"]
        rules: dict[str, Rule] = {}
        for row, text in enumerate(texts):
            if text not in rules:
                rules[text] = self._parsed(row, Rule.from_json, text)
            if rules[text] != rules[texts[0]]:
                raise RunError(
                    f"{self.path}, line {row + 2}: its rule is not that of line 2; certify again into another folder"
                )
        rule = rules[texts[0]]
        self.check(np.arange(len(texts)) < rule.num_images, f"its rule is one of {rule.num_images} images")
        return rule

    def _check_votes(
        self, rule: Rule, counts: NDArray[np.int64], selection: NDArray[np.int64], drawn: NDArray[np.int64]
    ) -> None:
        """Refuse votes that the rule cannot have drawn or that contradict each other."""
        wrong_sum = (counts.min(1) > UNKNOWN) & (counts.sum(1) != drawn)
        possible = (drawn > 0) & (drawn <= rule.num_estimation) & (counts.min(1) >= UNKNOWN) & ~wrong_sum
        self.check(possible, "its votes do not add up to num_samples, or exceed the rule's")
        if rule.method == "clopper-pearson":
            complete = drawn == rule.num_estimation
            votes = drawn[int(np.argmin(complete))]
            self.check(complete, f"it has {votes} votes instead of num_estimation = {rule.num_estimation}")
        selects = (selection.min(1) >= 0) & (selection.sum(1) == rule.num_selection)
        same_classes = counts.shape[1] == selection.shape[1]
        self.check(selects & same_classes, f"its votes do not add up to num_selection = {rule.num_selection}")
        labels = self.whole("label")
        self.check((labels >= 0) & (labels < counts.shape[1]), "its label is none of the classes that were voted for")

    def _blocks(self, drawn: NDArray[np.int64], successes: NDArray[np.int64]) -> tuple[NDArray[np.uint8], ...]:
        numbers = -(-drawn // BLOCK)
        packed = zip(self._cells["blocks"], numbers.tolist(), strict=True)
        blocks = tuple(self._parsed(row, _unpacked, *cell) for row, cell in enumerate(packed))
        sums = np.array([block.sum(dtype=np.int64) for block in blocks])
        self.check(sums == successes, _OTHER_BLOCKS)
        largest = np.array([block.max() for block in blocks])
        last = np.array([block[-1] for block in blocks])
        self.check(
            (largest <= BLOCK) & (last <= drawn - (numbers - 1) * BLOCK), f"a block holds more than its {BLOCK} votes"
        )
        return blocks

    def _ids(self) -> tuple[str, ...]:
        ids = [unescape(text) for text in self._cells["id"]]
        for column, values in (("idx", self._cells["idx"]), ("id", ids)):
            self.check(_first_of_each(values), f"the image is there twice, by its {column}")
        return tuple(ids)

    def _hashes(self, column: str, digits: int) -> tuple[str, ...] | None:
        hashes = self._cells.get(column)
        if hashes is None:
            return None
        self.check(
            np.array([re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is not None for text in hashes]),
            f"{column} must be a hash of {digits} hexadecimal digits",
        )
        return tuple(hashes)

    def _model(self) -> str | None:
        models = self._hashes("model", 64)
        if models is None:
            return None
        self.check(np.array([model == models[0] for model in models]), "it is of another model than line 2")
        return models[0]

    def _compare(self, derived: Certificates) -> None:
        """Refuse a printed value that is not the one that votes and rule give."""
        for column, exact in (("radius", derived.radius), ("p_lower", derived.p_lower)):
            printed = self._real(column)
            near = np.abs(printed - exact) <= TOLERANCE * (1 + 1e-6)  # one in the sixth decimal is within it
            row = int(np.argmin(near))
            self.check(near, f"{column} is {printed[row]:g}, its votes and rule give {exact[row]:.9g}")
        for column, given in (("predict", derived.prediction), ("correct", derived.correct.astype(np.int64))):
            same = self.whole(column) == given
            row = int(np.argmin(same))
            self.check(same, f"{column} is {self.whole(column)[row]}, its votes and rule give {given[row]}")
        names = np.array(OUTCOMES)[derived.outcome]
        same = np.array(self._cells["outcome"]) == names
        row = int(np.argmin(same))
        told = self._cells["outcome"][row][:60]
        self.check(same, f"outcome is {told!r}, its votes and rule give {str(names[row])!r}")

    def whole(self, column: str) -> NDArray[np.int64]:
        return np.array([self._parsed(row, _whole, text) for row, text in enumerate(self._cells[column])], np.int64)

    def _real(self, column: str) -> NDArray[np.float64]:
        return np.array([self._parsed(row, _real, text) for row, text in enumerate(self._cells[column])])

    def _votes(self, column: str) -> NDArray[np.int64]:
        votes = [self._parsed(row, _votes, text) for row, text in enumerate(self._cells[column])]
        self.check(
            np.array([len(row) == len(votes[0]) for row in votes]), f"{column} is not of as many classes as in line 2"
        )
        return np.array(votes, np.int64)

    def _parsed(self, row: int, parse: Callable[..., T], *arguments: object) -> T:
        try:
            return parse(*arguments)
        except (ValueError, TypeError, ArithmeticError, RecursionError, zlib.error) as error:
            self.refuse(row, str(error))

    def check(self, right: NDArray[np.bool_], what: str) -> None:
        """Refuse the first line where ``right`` (N,) is false."""
        if not right.all():
            self.refuse(int(np.argmin(right)), what)

    def refuse(self, row: int, what: str) -> NoReturn:
        raise RunError(f"{self.path}, line {row + 2}: {what}; move the file away and certify again")


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a whole number")
    return int(text)


def _real(text: str) -> float:
    if not _REAL.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{text[:60]!r} is not a finite number >= 0")
    return float(text)


def _votes(text: str) -> list[int]:
    if not _VOTES.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a list of whole numbers")
    return [int(number) for number in text.split(",")]


def _unpacked(text: str, number: int) -> NDArray[np.uint8]:
    """The votes of ``number`` blocks; no more than these are unpacked."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(text, validate=True), number + 1)
    if len(content) != number or not unpacker.eof:
        raise ValueError(_OTHER_BLOCKS)
    return np.frombuffer(content, np.uint8)


def _first_of_each(values: Sequence[str]) -> NDArray[np.bool_]:
    first = np.zeros(len(values), bool)
    first[np.unique(np.array(values, object), return_index=True)[1]] = True
    return first
