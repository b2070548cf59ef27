"""``certificates.tsv``: one line an image, written as it is certified, read back to the same bits."""

import base64
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rush.certification.bounds import RADIUS_DIGITS
from rush.certification.certify import Certificates, join_certificates
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
    parts = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            parts.append(_certificate(line.split("\t"), sigma, alpha, num_selection, num_estimation))
        except (ValueError, OverflowError, zlib.error) as error:
            raise RunError(f"{path}, line {number}: {error}; move the file away and certify again") from error
    return join_certificates(parts)


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
        _listed(part.counts[row]),
        _listed(part.selection[row]),
        base64.b64encode(zlib.compress(part.blocks[row].tobytes(), 9)).decode(),
    )
    return "\t".join(str(field) for field in fields) + "\n"


def _certificate(
    fields: list[str], sigma: float, alpha: float, num_selection: int, num_estimation: int
) -> Certificates:
    """The certificate of one image; ValueError when a field is damaged or the votes do not add up."""
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} fields instead of {len(COLUMNS)}")
    row = dict(zip(COLUMNS, fields, strict=True))
    counts, selection = _numbers(row["counts"]), _numbers(row["selection"])
    blocks = _blocks(row["blocks"], len(counts))
    whole = len(blocks) == -(-num_estimation // BLOCK) and (blocks.sum(0, dtype=np.int64) == counts).all()
    if not whole or counts.sum() != num_estimation:
        raise ValueError(f"its votes do not add up to num_estimation = {num_estimation}")
    if len(selection) != len(counts) or selection.sum() != num_selection:
        raise ValueError(f"its votes do not add up to num_selection = {num_selection}")
    return Certificates(
        prediction=_numbers(row["predict"]),
        radius=np.array([float(row["radius"])]),
        p_lower=np.array([float(row["p_lower"])]),
        num_samples=_numbers(row["num_samples"]),
        counts=counts[None],
        blocks=blocks[None],
        selection=selection[None],
        seconds=np.array([float(row["time"])]),
        labels=_numbers(row["label"]),
        ids=(row["id"],),
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
