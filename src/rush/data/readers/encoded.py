"""Encoded images on disk: their number, labels and ids, and access to any image without reading the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from rush.data.images import common_classes, unique_ids
from rush.data.indexing import split_rows
from rush.data.readers.decoding import Encoded
from rush.errors import DataError


@dataclass(frozen=True)
class Block:
    """Rows start..stop - 1, which are read together.

    num_bytes: memory that the encoded rows take. It is 0 for image files, which are opened one by one.
    """

    start: int
    stop: int
    num_bytes: int


class EncodedImages(Protocol):
    """The encoded images of one split, in rows numbered from 0. Labels are in memory, pixels on disk."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> torch.Tensor | None: ...

    def __len__(self) -> int: ...

    def ids(self) -> np.ndarray:
        """Return the id of every row, text (N,), the same as in the ImageSet of these files."""
        ...

    def files(self) -> list[Path]:
        """Return the files that hold the images."""
        ...

    def blocks(self, limit: int) -> list[Block]:
        """Return all rows in blocks of at most about ``limit`` bytes.

        Raises:
            DataError: one image alone is larger than ``limit``.
        """
        ...

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        """Yield the encoded images of the ascending ``rows``.

        Raises:
            DataError: a file is damaged. The message names it.
        """
        ...


@dataclass(frozen=True, eq=False)
class JoinedImages:
    """Several splits of one data set, one after the other. Labels are None if any part has none.

    Raises:
        DataError: two parts share a file or have different classes.
    """

    parts: tuple[EncodedImages, ...]

    def __post_init__(self) -> None:
        earlier: set[Path] = set()
        for part in self.parts:
            shared = earlier.intersection(part.files())
            if shared:
                raise DataError(
                    f"{min(shared)} belongs to more than one part of {self.split!r}; name a split that has it once"
                )
            earlier.update(part.files())
        _ = self.classes  # raises where the parts differ

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def split(self) -> str:
        return "+".join(part.split for part in self.parts)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return common_classes([part.classes for part in self.parts], f"{self.name}/{self.split}")

    @cached_property
    def labels(self) -> torch.Tensor | None:
        labels = [part.labels for part in self.parts if part.labels is not None]
        return torch.cat(labels) if len(labels) == len(self.parts) else None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def ids(self) -> np.ndarray:
        return unique_ids([part.ids() for part in self.parts], [part.split for part in self.parts])

    def files(self) -> list[Path]:
        return [file for part in self.parts for file in part.files()]

    def blocks(self, limit: int) -> list[Block]:
        offsets = accumulate(map(len, self.parts), initial=0)
        return [
            Block(block.start + offset, block.stop + offset, block.num_bytes)
            for part, offset in zip(self.parts, offsets, strict=False)  # one offset more than parts
            for block in part.blocks(limit)
        ]

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        for number, rows_of_part in split_rows(rows, map(len, self.parts)):
            yield from self.parts[number].read(rows_of_part)


def join(parts: Sequence[EncodedImages]) -> EncodedImages:
    """Return the parts as one. A single part is returned as it is."""
    return parts[0] if len(parts) == 1 else JoinedImages(tuple(parts))
