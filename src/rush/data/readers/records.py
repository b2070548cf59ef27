"""Encoded images where they lie: how many, with which labels, and any of them without reading the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from rush.data.images import ImageSet, common_classes, unique_ids
from rush.data.readers.decoding import Encoded, decode_images
from rush.data.readers.resizing import check_size
from rush.errors import DataError


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` that are read together, and the bytes that holding them encoded takes (0: none)."""

    start: int
    stop: int
    held: int


class Records(Protocol):
    """The encoded images of one split in a fixed order, numbered from 0; labels are in memory, pixels on the disk."""

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
        """The id of every row, as in the ImageSet of the same files; text (N,)."""
        ...

    def files(self) -> list[Path]:
        """The files that hold the images."""
        ...

    def blocks(self, limit: int) -> list[Block]:
        """All rows in blocks of at most about ``limit`` bytes. Raises: DataError where one image alone is larger."""
        ...

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        """The encoded images of ``rows``, which ascend. Raises: DataError naming the file that is damaged."""
        ...


@dataclass(frozen=True, eq=False)
class Joined:
    """Several splits of one data set, one after the other; labels are None if any part has none.

    Raises: DataError when the parts share a file or have different classes.
    """

    parts: tuple[Records, ...]

    def __post_init__(self) -> None:
        seen: set[Path] = set()
        for part in self.parts:
            shared = seen.intersection(part.files())
            if shared:
                raise DataError(
                    f"{min(shared)} belongs to more than one part of {self.split!r}; name a split that has it once"
                )
            seen.update(part.files())
        common_classes([part.classes for part in self.parts], f"{self.name}/{self.split}")

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def split(self) -> str:
        return "+".join(part.split for part in self.parts)

    @property
    def classes(self) -> tuple[str, ...]:
        return common_classes([part.classes for part in self.parts], f"{self.name}/{self.split}")

    @cached_property
    def labels(self) -> torch.Tensor | None:
        labels = [part.labels for part in self.parts if part.labels is not None]
        return torch.cat(labels) if len(labels) == len(self.parts) else None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def ids(self) -> np.ndarray:
        return unique_ids([part.ids() for part in self.parts], [part.split for part in self.parts])

    def files(self) -> list[Path]:
        return [file for part in self.parts for file in part.files()]

    def blocks(self, limit: int) -> list[Block]:
        return [
            Block(block.start + offset, block.stop + offset, block.held)
            for part, offset in self._placed()
            for block in part.blocks(limit)
        ]

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        for part, offset in self._placed():
            own = rows[slice(*np.searchsorted(rows, [offset, offset + len(part)]))]
            if own.size:
                yield from part.read(own - offset)

    def _placed(self) -> Iterator[tuple[Records, int]]:
        offset = 0
        for part in self.parts:
            yield part, offset
            offset += len(part)


def join(parts: Sequence[Records]) -> Records:
    """The parts as one; a single part is itself."""
    return parts[0] if len(parts) == 1 else Joined(tuple(parts))


def decoded(records: Records, size: int | None = None) -> ImageSet:
    """All images decoded into memory; ``size`` as in ``decode``. Raises: DataError naming what cannot be decoded."""
    check_size(size)
    images = decode_images(records.read(np.arange(len(records))), len(records), size)
    return ImageSet(images, records.labels, records.classes, records.ids(), records.name, records.split)
