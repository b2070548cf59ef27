"""``certificates.tsv``: one line an image, written as it is certified, read back to the same bits."""

import base64
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rush.certification.bounds import RADIUS_DIGITS
from rush.certification.certificates import UNKNOWN, Certificates, join_certificates
from rush.certification.rules import Rule
from rush.certification.sequential import OUTCOMES
from rush.errors import RunError
from rush.files import write_text
from rush.voting import BLOCK

# The first six columns are the field's (locuslab/smoothing), so that existing scripts read the file.
COLUMNS = (
    "idx", "label", "predict", "radius", "correct", "time",
    "id", "p_lower", "num_samples", "outcome", "counts", "selection", "blocks", "rule",
)  # fmt: skip


def write_certificates(path: Path, certificates: Certificates, indices: Sequence[int]) -> None:
    """Write the table of ``certificates``, whose images have these ``indices`` in their split, whole or not at all."""
    lines = [_line(certificates, row, index) for row, index in enumerate(indices)]
    write_text(path, "\t".join(COLUMNS) + "\n" + "".join(lines))


def append_certificates(path: Path, part: Certificates, indices: Sequence[int]) -> None:
    """Append the lines of ``part``, whose images have these ``indices`` in their split; writes the header into a new
    file.

    Radii have six decimals, rounded toward zero already; ``p_lower`` is written so that it reads back exactly;
    ``blocks`` holds the votes for the selected class by blocks of 100 noise samples, uint8, compressed by zlib, in
    base64; ``rule``, the same in every line, says how the votes were drawn and which level speaks.
    """
    lines = [_line(part, row, index) for row, index in enumerate(indices)]
    with open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write("\t".join(COLUMNS) + "\n")
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_certificates(path: Path) -> tuple[list[int], Certificates] | None:
    """The indices of the images in their split, and their certificates; None when the file is missing or holds none.

    Raises: RunError naming the line when the file is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) < 2:
        return None
    if tuple(lines[0].split("\t")) != COLUMNS:
        raise RunError(
            f"{path}, line 1: expected the columns {' '.join(COLUMNS)}; move the file away and certify again"
        )
    indices: list[int] = []
    parts: list[Certificates] = []
    rules: dict[str, Rule] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            index, part = _certificate(line.split("\t"), rules)
        except (ValueError, OverflowError, zlib.error) as error:
            raise RunError(f"{path}, line {number}: {error}; move the file away and certify again") from error
        if part.rule != (parts or [part])[0].rule:
            raise RunError(f"{path}, line {number}: its rule is not that of line 2; certify again into another folder")
        indices.append(index)
        parts.append(part)
    return indices, join_certificates(parts)


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a kill left after the last line feed."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            os.truncate(path, len(whole))


def _line(part: Certificates, row: int, index: int) -> str:
    fields = (
        index,
        part.labels[row],
        part.prediction[row],
        f"{part.radius[row]:.{RADIUS_DIGITS}f}",
        int(part.correct[row]),
        f"{part.seconds[row]:.4f}",
        part.ids[row],
        repr(float(part.p_lower[row])),
        part.num_samples[row],
        OUTCOMES[part.outcome[row]],
        _listed(part.counts[row]),
        _listed(part.selection[row]),
        base64.b64encode(zlib.compress(part.blocks[row].tobytes(), 9)).decode(),
        part.rule.to_json(),
    )
    return "\t".join(str(field) for field in fields) + "\n"


def _certificate(fields: list[str], rules: dict[str, Rule]) -> tuple[int, Certificates]:
    """Index and certificate of one image; ValueError when a field is damaged or the votes do not add up."""
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} fields instead of {len(COLUMNS)}")
    row = dict(zip(COLUMNS, fields, strict=True))
    rule = rules[row["rule"]] if row["rule"] in rules else rules.setdefault(row["rule"], Rule.from_json(row["rule"]))
    counts, selection = _numbers(row["counts"]), _numbers(row["selection"])
    blocks = np.frombuffer(zlib.decompress(base64.b64decode(row["blocks"])), np.uint8)
    samples = int(row["num_samples"])
    drawn = samples - rule.num_selection
    if not 0 < drawn <= rule.num_estimation or (counts.min() > UNKNOWN and counts.sum() != drawn):
        raise ValueError(f"its votes do not add up to num_samples = {samples}, or exceed the rule's")
    if rule.method == "clopper-pearson" and drawn != rule.num_estimation:
        raise ValueError(f"it has {drawn} votes instead of num_estimation = {rule.num_estimation}")
    if len(selection) != len(counts) or selection.sum() != rule.num_selection:
        raise ValueError(f"its votes do not add up to num_selection = {rule.num_selection}")
    if len(blocks) != -(-drawn // BLOCK) or blocks.sum(dtype=np.int64) != counts[selection.argmax()]:
        raise ValueError("its blocks do not add up to its counts")
    return int(row["idx"]), Certificates(
        prediction=_numbers(row["predict"]),
        radius=np.array([float(row["radius"])]),
        p_lower=np.array([float(row["p_lower"])]),
        num_samples=np.array([samples], np.int64),
        counts=counts[None],
        blocks=(blocks,),
        selection=selection[None],
        outcome=np.array([OUTCOMES.index(row["outcome"])], np.uint8),
        seconds=np.array([float(row["time"])]),
        labels=_numbers(row["label"]),
        ids=(row["id"],),
        rule=rule,
    )


def _listed(values: NDArray[np.int64]) -> str:
    return ",".join(str(value) for value in values)


def _numbers(text: str) -> NDArray[np.int64]:
    return np.array([int(value) for value in text.split(",")], np.int64)
