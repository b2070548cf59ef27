"""``certificates.tsv``: one line an image, written as it is certified, read back to the same bits."""

import base64
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rush.certification.bounds import RADIUS_DIGITS
from rush.certification.certify import Certificates
from rush.errors import RunError
from rush.smoothing import BLOCK

# The first six columns are the field's (locuslab/smoothing), so that existing scripts read the file.
COLUMNS = (
    "idx", "label", "predict", "radius", "correct", "time",
    "id", "p_lower", "num_samples", "counts", "selection", "blocks",
)  # fmt: skip


def append_certificates(path: Path, part: Certificates, indices: Sequence[int]) -> None:
    """Append the lines of ``part``, whose images have these ``indices`` in their split; writes the header into a new
    file.

    Radii have six decimals, rounded toward zero already; ``p_lower`` is written so that it reads back exactly;
    ``blocks`` holds the votes by blocks of 100 noise samples, uint8 (blocks, K), compressed by zlib, in base64.
    """
    lines = [_line(part, row, index) for row, index in enumerate(indices)]
    with open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write("\t".join(COLUMNS) + "\n")
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_certificates(
    path: Path, sigma: float, alpha: float, num_selection: int, num_estimation: int
) -> Certificates | None:
    """The certificates in ``path``; None when the file is missing or holds none.

    Raises: RunError naming the line when the file is damaged or was written with other sample numbers.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) < 2:
        return None
    if tuple(lines[0].split("\t")) != COLUMNS:
        raise RunError(
            f"{path}, line 1: expected the columns {' '.join(COLUMNS)}; move the file away and certify again"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(COLUMNS):
            raise RunError(
                f"{path}, line {number}: {len(fields)} fields instead of {len(COLUMNS)}; "
                "delete the line and certify again"
            )
        rows.append(dict(zip(COLUMNS, fields, strict=True)))
    return _certificates(rows, path, sigma, alpha, num_selection, num_estimation)


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a kill left after the last line feed."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            path.write_bytes(whole)


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
        _listed(part.counts[row]),
        _listed(part.selection[row]),
        base64.b64encode(zlib.compress(part.blocks[row].tobytes(), 9)).decode(),
    )
    return "\t".join(str(field) for field in fields) + "\n"


def _certificates(
    rows: list[dict[str, str]], path: Path, sigma: float, alpha: float, num_selection: int, num_estimation: int
) -> Certificates:
    counts = np.array([_numbers(row["counts"]) for row in rows])
    blocks = np.stack([_blocks(row["blocks"], counts.shape[1]) for row in rows])
    if (
        blocks.shape[1] != -(-num_estimation // BLOCK)
        or (blocks.sum(1) != counts).any()
        or (counts.sum(1) != num_estimation).any()
    ):
        raise RunError(
            f"{path}: its votes do not add up to num_estimation = {num_estimation}; "
            "move the file away and certify again"
        )
    return Certificates(
        prediction=np.array([int(row["predict"]) for row in rows], np.int64),
        radius=np.array([float(row["radius"]) for row in rows]),
        p_lower=np.array([float(row["p_lower"]) for row in rows]),
        num_samples=np.array([int(row["num_samples"]) for row in rows], np.int64),
        counts=counts,
        blocks=blocks,
        selection=np.array([_numbers(row["selection"]) for row in rows]),
        seconds=np.array([float(row["time"]) for row in rows]),
        labels=np.array([int(row["label"]) for row in rows], np.int64),
        ids=tuple(row["id"] for row in rows),
        sigma=sigma,
        alpha=alpha,
        num_selection=num_selection,
        num_estimation=num_estimation,
    )


def _listed(values: NDArray[np.int64]) -> str:
    return ",".join(str(value) for value in values)


def _numbers(text: str) -> NDArray[np.int64]:
    return np.array([int(value) for value in text.split(",")], np.int64)


def _blocks(text: str, num_classes: int) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(-1, num_classes)
