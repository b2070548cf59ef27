"""What a training draws from: batches of 8-bit images on the training device, in an order given by a generator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rush.data.images import ImageSet
from rush.errors import ConfigError
from rush.runtime.transfer import sent


@dataclass(frozen=True)
class Batch:
    """Images uint8 (B, C, H, W) and labels int64 (B,), or None where there are none, on one device."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


class TrainingImages(Protocol):
    """Images to train on, in memory or streamed."""

    def __len__(self) -> int: ...

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """This process's rows of the global batches of one epoch, from number ``first`` on.

        ``order`` alone decides which images a batch holds; the incomplete last one is dropped. Of ``batch_size`` images
        process r of W gets the rows from r B / W to (r + 1) B / W.
        """
        ...


class Resident:
    """All images of a data set on the training device; a batch is a selection there and waits for nothing."""

    def __init__(self, images: ImageSet, device: torch.device | str = "cpu", rank: int = 0, processes: int = 1) -> None:
        self._images = images.images.to(device)
        self._labels = None if images.labels is None else images.labels.to(device)
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """As ``TrainingImages.batches``: batch k holds places k B to (k + 1) B of one random permutation."""
        per_epoch, own = batches_per_epoch(len(self), batch_size), own_rows(batch_size, self._rank, self._processes)
        permutation = sent(torch.randperm(len(self), generator=order), self._images.device)
        for number in range(first, per_epoch):
            chosen = permutation[number * batch_size : (number + 1) * batch_size][own]
            yield Batch(self._images[chosen], None if self._labels is None else self._labels[chosen])


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    """Number of full batches; ConfigError when there is none."""
    if num_images < batch_size:
        raise ConfigError(
            f"batch_size = {batch_size} exceeds the {num_images} training images; lower it to at most {num_images}"
        )
    return num_images // batch_size


def own_rows(batch_size: int, rank: int, processes: int) -> slice:
    """The rows of a global batch that process ``rank`` works on; ConfigError where they cannot be equally many."""
    if batch_size % processes:
        raise ConfigError(
            f"batch_size = {batch_size} cannot be shared equally by {processes} processes; "
            f"make it a multiple of {processes}"
        )
    share = batch_size // processes
    return slice(rank * share, (rank + 1) * share)
