"""Batches of 8-bit training images on the training device, in an order drawn from a generator."""

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
    """Images uint8 (B, C, H, W) and their labels, if any, on one device.

    Labels are int64 (B,), or float32 (B, K): a probability of each class, whose sum is the weight of the image. They
    are None if there are none.
    """

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


class TrainingImages(Protocol):
    """Images to train on, in memory or streamed."""

    def __len__(self) -> int: ...

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """Yield this process's rows of the global batches of one epoch.

        An incomplete last batch is dropped. Process r of W gets rows r B / W to (r + 1) B / W of a batch of B.

        Args:
            order: draws the order, which alone decides the images of a batch.
            batch_size: number of images per global batch, B.
            first: number of the first batch to yield, as in an epoch that resumes.

        Raises:
            ConfigError: ``batch_size`` exceeds the number of images or is not a multiple of the number of processes.
        """
        ...


class Resident:
    """All images of a data set on the training device, where a batch is selected without waiting for the host.

    Args:
        targets: soft labels float32 (N, K), in place of the labels of the images, see ``Batch``.
    """

    def __init__(
        self,
        images: ImageSet,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
        targets: Tensor | None = None,
    ) -> None:
        labels = images.labels if targets is None else targets
        self._images = images.images.to(device)
        self._labels = None if labels is None else labels.to(device)
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """Yield positions k B to (k + 1) B of one random permutation as batch k, see ``TrainingImages.batches``."""
        per_epoch, share = batches_per_epoch(len(self), batch_size), share_of(batch_size, self._rank, self._processes)
        permutation = sent(torch.randperm(len(self), generator=order), self._images.device)
        for number in range(first, per_epoch):
            rows = permutation[number * batch_size : (number + 1) * batch_size][share]
            yield Batch(self._images[rows], None if self._labels is None else self._labels[rows])


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of full batches, or raise ConfigError if there is none."""
    if num_images < batch_size:
        raise ConfigError(
            f"batch_size = {batch_size} exceeds the {num_images} training images; lower it to at most {num_images}"
        )
    return num_images // batch_size


def share_of(batch_size: int, rank: int, processes: int) -> slice:
    """Return the rows of a global batch that belong to process ``rank``; raise ConfigError if shares are not equal."""
    if batch_size % processes:
        raise ConfigError(
            f"batch_size = {batch_size} cannot be shared equally by {processes} processes; "
            f"make it a multiple of {processes}"
        )
    size = batch_size // processes
    return slice(rank * size, (rank + 1) * size)
