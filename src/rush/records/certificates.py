"""``certificates.tsv``: one line per image, written as it is certified.

Class, radius, bound and outcome are derived from votes and rule whenever a table is read. The printed values are for
other programs: they are compared with the derived ones and never used.
"""

import base64
import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rush.certification.apply_rule import apply_rule
from rush.certification.bounds import RADIUS_DIGITS
from rush.certification.certificates import UNKNOWN, Certificates
from rush.certification.rule import Rule
from rush.certification.sequential import OUTCOMES
from rush.choices import BLOCK
from rush.errors import RunError
from rush.records.record import FORMATS
from rush.records.tsv import Table
from rush.runtime.files import append_text, cut_file, refuse_links, write_text
from rush.runtime.lines import escape, read_lines, unescape

TABLE = "certificates.tsv"
PUBLIC_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # columns of public logs (locuslab/smoothing)
# The table opens with the public columns, so that existing scripts can read the file.
COLUMNS = (
    *PUBLIC_COLUMNS,
    "id", "p_lower", "num_samples", "outcome", "counts", "selection", "blocks", "rule", "pixels", "model", "format",
)  # fmt: skip
OLDER_COLUMNS = COLUMNS[:-3]  # columns of tables that name neither pictures nor model
TOLERANCE = 1e-6  # how far a printed radius or bound may lie from the derived one
_ENDING = "; move the file away and certify again"
_VOTES = re.compile(r"-?[0-9]{1,15}(,-?[0-9]{1,15})*")


def write_certificates(path: Path, certificates: Certificates, indices: Sequence[int]) -> None:
    """Write ``certificates``, whose images have these ``indices`` in their split, as a table, atomically."""
    columns = _columns(certificates)
    write_text(path, "\t".join(columns) + "\n" + _lines(certificates, indices, columns))


def append_certificates(path: Path, part: Certificates, indices: Sequence[int]) -> None:
    """Append the lines of ``part``, whose images have these ``indices`` in their split. A new file gets a header.

    Radii have six decimals, to which they have been rounded toward zero. ``p_lower`` reads back exactly. Ids are
    escaped if they would break a line. ``blocks`` holds the votes for the selected class by blocks of 100 noise
    samples: uint8, compressed by zlib, in base64. Under the sequential bound with two classes it holds those for every
    class, block after block. ``rule`` defines how the votes were drawn and what alpha covers.
    ``pixels`` is a hash of the image's pixels, and ``model`` is one of the model. ``rule``, ``model`` and ``format``
    are the same in every line.
    """
    columns = _columns(part)
    before = read_lines(path)[:1] if path.is_file() else []  # a table that an older version began keeps its columns
    if before and set(before[0].split("\t")) <= set(COLUMNS):
        columns = tuple(before[0].split("\t"))
    append_text(path, _lines(part, indices, columns), header="\t".join(columns) + "\n")


def read_certificates(path: Path) -> tuple[list[int], Certificates] | None:
    """Return the images' indices in their split and their certificates, or None if the file has none or is missing.

    Class, radius, bound and outcome are derived from votes and rule, as they were when the image was certified.

    Raises:
        RunError: the file has a newer format or is damaged, with the line: votes do not add up, or exceed their block
            or the rule, an image is a duplicate, or a printed value is not the derived one (within 1e-6 for radius and
            bound).
    """
    try:
        lines = read_lines(path) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}{_ENDING}") from error
    if len(lines) < 2:
        return None
    table = Table.parse(path, lines, _ENDING)
    table.check_format(FORMATS[TABLE])
    if tuple(table.cells) not in (COLUMNS, COLUMNS[:-1], (*OLDER_COLUMNS, "format"), OLDER_COLUMNS):
        table.refuse(-1, f"expected the columns {' '.join(COLUMNS)}")
    return table.whole("idx").tolist(), _certificates(table)


def drop_unfinished_line(path: Path) -> None:
    """Truncate a partial last line left by a crash."""
    refuse_links(path)
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            cut_file(path, whole)


def _columns(certificates: Certificates) -> tuple[str, ...]:
    """Return the columns of a new table of these certificates."""
    identified = certificates.pixels is not None and certificates.model is not None
    return COLUMNS if identified else (*OLDER_COLUMNS, "format")


def _lines(certificates: Certificates, indices: Sequence[int], columns: Sequence[str]) -> str:
    cells = (_cells(certificates, row, index) for row, index in enumerate(indices))
    return "".join("\t".join(str(line[name]) for name in columns) + "\n" for line in cells)


def _cells(part: Certificates, row: int, index: int) -> dict[str, object]:
    return {
        "idx": index,
        "label": part.labels[row],
        "predict": part.prediction[row],
        "radius": f"{part.radius[row]:.{RADIUS_DIGITS}f}",
        "correct": int(part.correct[row]),
        "time": f"{part.seconds[row]:.4f}",
        "id": escape(part.ids[row]),
        "p_lower": repr(float(part.p_lower[row])),
        "num_samples": part.num_samples[row],
        "outcome": OUTCOMES[part.outcome[row]],
        "counts": _listed(part.counts[row]),
        "selection": _listed(part.selection[row]),
        "blocks": base64.b64encode(zlib.compress(part.blocks[row].tobytes(), 9)).decode(),
        "rule": part.rule.to_json(),
        "pixels": None if part.pixels is None else part.pixels[row],
        "model": part.model,
        "format": FORMATS[TABLE],
    }


def _listed(values: NDArray[np.int64]) -> str:
    return ",".join(str(value) for value in values)


def _certificates(table: Table) -> Certificates:
    """Return the certificates that votes and rule give, after a comparison with the printed values."""
    rule = _rule(table)
    counts, selection = _votes(table, "counts"), _votes(table, "selection")
    labels, samples = table.whole("label"), table.whole("num_samples")
    drawn = samples - rule.num_selection
    _check_votes(table, rule, counts, selection, drawn, labels)
    selected = selection.argmax(1).astype(np.int64)
    stored = counts if rule.needs_every_class else np.take_along_axis(counts, selected[:, None], 1)
    blocks = _blocks(table, drawn, stored)
    certified, outcome, _, trials = apply_rule(rule, blocks, drawn, selection, counts)
    table.check(trials == drawn, "votes were drawn after its rule had decided")
    derived = Certificates(
        prediction=certified.prediction,
        radius=certified.radius,
        p_lower=certified.p_lower,
        num_samples=samples,
        counts=counts,
        blocks=blocks,
        selection=selection,
        outcome=outcome,
        seconds=table.real("time"),
        labels=labels,
        ids=_ids(table),
        rule=rule,
        pixels=_hashes(table, "pixels", 32),
        model=_model(table),
    )
    _compare(table, derived)
    return derived


def _rule(table: Table) -> Rule:
    rules = table.parsed("rule", cache(Rule.from_json))
    for row, rule in enumerate(rules):
        if rule != rules[0]:
            raise RunError(
                f"{table.path}, line {row + 2}: its rule is not that of line 2; certify again into another folder"
            )
    table.check(np.arange(len(rules)) < rules[0].num_images, f"its rule is one of {rules[0].num_images} images")
    return rules[0]


def _check_votes(
    table: Table,
    rule: Rule,
    counts: NDArray[np.int64],
    selection: NDArray[np.int64],
    drawn: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> None:
    """Refuse votes that the rule cannot have drawn or that contradict each other."""
    wrong_sum = (counts.min(1) > UNKNOWN) & (counts.sum(1) != drawn)
    possible = (drawn > 0) & (drawn <= rule.num_estimation) & (counts.min(1) >= UNKNOWN) & ~wrong_sum
    table.check(possible, "its votes do not add up to num_samples, or exceed the rule's")
    if rule.method != "sequential":
        complete = drawn == rule.num_estimation
        votes = drawn[int(np.argmin(complete))]
        table.check(complete, f"it has {votes} votes instead of num_estimation = {rule.num_estimation}")
    selects = (selection.min(1) >= 0) & (selection.sum(1) == (drawn if rule.exact else rule.num_selection))
    same_classes = counts.shape[1] == selection.shape[1]
    table.check(selects & same_classes, f"its votes do not add up to num_selection = {rule.num_selection}")
    table.check((labels >= 0) & (labels < counts.shape[1]), "its label is not one of the classes that were voted for")


def _blocks(table: Table, drawn: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.uint8], ...]:
    """Return the blocks, which add up to ``counts`` (N, classes): (B,) for one class, else (B, classes)."""
    numbers, classes = -(-drawn // BLOCK), counts.shape[1]
    flat = table.parsed("blocks", _unpacked, (numbers * classes).tolist())
    blocks = [votes.reshape(-1, classes) for votes in flat]
    same = [(votes.sum(0) == count).all() for votes, count in zip(blocks, counts, strict=True)]
    table.check(np.array(same), "blocks do not add up to its counts")
    sizes = [votes.sum(1) for votes in blocks]
    largest, last = (np.array([read(size) for size in sizes]) for read in (np.max, lambda size: size[-1]))
    within = (largest <= BLOCK) & (last <= drawn - (numbers - 1) * BLOCK)
    table.check(within, f"a block holds more than its {BLOCK} votes")
    return tuple(flat if classes == 1 else blocks)


def _ids(table: Table) -> tuple[str, ...]:
    ids = tuple(unescape(text) for text in table.cells["id"])
    table.check_unique("idx", table.cells["idx"])
    table.check_unique("id", ids)
    return ids


def _hashes(table: Table, column: str, digits: int) -> tuple[str, ...] | None:
    hashes = table.cells.get(column)
    if hashes is None:
        return None
    valid = [re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is not None for text in hashes]
    table.check(np.array(valid), f"{column} must be a hash of {digits} hexadecimal digits")
    return tuple(hashes)


def _model(table: Table) -> str | None:
    models = _hashes(table, "model", 64)
    if models is None:
        return None
    table.check(np.array([model == models[0] for model in models]), "its model is not that of line 2")
    return models[0]


def _compare(table: Table, derived: Certificates) -> None:
    """Refuse a printed value that differs from the derived one."""
    for column, exact in (("radius", derived.radius), ("p_lower", derived.p_lower)):
        printed = table.real(column)
        near = np.abs(printed - exact) <= TOLERANCE * (1 + 1e-6)  # one unit in the sixth decimal is within it
        row = int(np.argmin(near))
        table.check(near, f"{column} is {printed[row]:g}, its votes and rule give {exact[row]:.9g}")
    for column, whole in (("predict", derived.prediction), ("correct", derived.correct.astype(np.int64))):
        same = table.whole(column) == whole
        row = int(np.argmin(same))
        table.check(same, f"{column} is {table.whole(column)[row]}, its votes and rule give {whole[row]}")
    names = np.array(OUTCOMES)[derived.outcome]
    same = np.array(table.cells["outcome"]) == names
    row = int(np.argmin(same))
    printed_outcome = table.cells["outcome"][row][:60]
    table.check(same, f"outcome is {printed_outcome!r}, its votes and rule give {str(names[row])!r}")


def _votes(table: Table, column: str) -> NDArray[np.int64]:
    votes = table.parsed(column, _listed_votes)
    complete = np.array([len(row) == len(votes[0]) for row in votes])
    table.check(complete, f"its number of classes in {column} is not that of line 2")
    return np.array(votes, np.int64)


def _listed_votes(text: str) -> list[int]:
    if not _VOTES.fullmatch(text):
        raise ValueError("not a list of whole numbers")
    return [int(number) for number in text.split(",")]


def _unpacked(text: str, number: int) -> NDArray[np.uint8]:
    """Return ``number`` counts of votes. No more than these are unpacked."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(text, validate=True), number + 1)
    if len(content) != number or not unpacker.eof:
        raise ValueError("its blocks do not add up to its counts")
    return np.frombuffer(content, np.uint8)
