"""Certificates that cost little and differ from image to image, and what it means that two tables are the same."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rush
from exact_models import PixelVote
from rush.certification.certificates import Certificates
from rush.records.certificates import COLUMNS, OLDER_COLUMNS
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

SIGMA = 0.25
METHODS = ("clopper-pearson", "sequential")


def pixel_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 2, 2) for ``PixelVote``, from beaten by a hair to won by far, and their labels, a few wrong."""
    x = 0.4 * torch.rand(count, 4, generator=stream(seed, "pixel images"))
    x[-(count // 5) :] *= 0.1
    winner = torch.arange(count) % 4
    x[torch.arange(count), winner] = torch.linspace(0.35, 1.0, count)
    return x.view(-1, 1, 2, 2), torch.where(torch.arange(count) % 9 == 8, (winner + 1) % 4, winner)


def pixel_vote(tile: int = 256) -> SmoothedClassifier:
    """A classifier whose logits for an image are the same bits in every tile."""
    return SmoothedClassifier(PixelVote(), SIGMA, 4, execution=Execution(tile=tile))


def certified(method: str, images: tuple[Tensor, Tensor], tile: int = 256, **given: Any) -> Certificates:
    """Certificates of ``pixel_vote``; 1,230 votes end in a block of 30."""
    given = {"num_selection": 30, "num_estimation": 1230, "seed": 3, **given}
    return rush.certify(pixel_vote(tile), images, method, **given)  # type: ignore[arg-type]


def as_older(table: Path) -> None:
    """The table keeps the columns of an older version, which named neither pictures nor model."""
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    assert tuple(lines[0]) == COLUMNS
    table.write_text("".join("\t".join(line[: len(OLDER_COLUMNS)]) + "\n" for line in lines))


def assert_same(first: Certificates, second: Certificates, rows: list[int] | None = None, but: str = "") -> None:
    """All but the times agree to the bit; ``rows`` of ``second``. ``but`` names fields that may differ."""
    other = second if rows is None else second.select(rows)
    for name in (field.name for field in fields(Certificates)):
        if name in {"seconds", *but.split()}:
            continue
        one, two = getattr(first, name), getattr(other, name)
        if name == "blocks":
            assert [own.tolist() for own in one] == [own.tolist() for own in two]
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two, err_msg=name)
            assert one.dtype == two.dtype, name
        else:
            assert one == two, name
