"""Order of the images in training: shuffled batches of indices from an explicit generator."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rush.errors import ConfigError


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    """Number of full batches; ConfigError when there is none."""
    if num_images < batch_size:
        raise ConfigError(
            f"batch_size = {batch_size} exceeds the {num_images} training images; lower it to at most {num_images}"
        )
    return num_images // batch_size


def shuffled_batches(num_images: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors (batch_size,) int64 that visit the images in random order once; the incomplete last batch is
    dropped."""
    order = torch.randperm(num_images, generator=generator)
    for batch in range(batches_per_epoch(num_images, batch_size)):
        yield order[batch * batch_size : (batch + 1) * batch_size]
