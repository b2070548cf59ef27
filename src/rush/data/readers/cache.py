"""Decoded images in the user's cache folder, so that a machine decodes a data set once and not in every process."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rush.data.images import ImageSet
from rush.data.readers.decoding import decode_images
from rush.data.readers.encoded import EncodedImages
from rush.runtime.user_cache import cache_file, keep

_WORTHWHILE = 5_000  # images; fewer are decoded in about a second
_FORMAT = 1  # format of the decoder, increased whenever its pixels change


def cached_file(encoded: EncodedImages, size: int | None) -> Path | None:
    """Return the file for these images, or None where they are not kept.

    Its name changes with the files that hold the images, by path, size and modification time, and with the decoder.
    """
    if len(encoded) < _WORTHWHILE:
        return None
    stats = [(str(file.resolve()), file.stat()) for file in encoded.files()]
    facts = {
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "split": [encoded.name, encoded.split, len(encoded)],
        "decoder": [_FORMAT, version("pillow"), size],
    }
    return cache_file("decoded", facts, ".npy")


def read_cached(file: Path, images: int) -> Tensor | None:
    """Return the images uint8 (N, C, H, W) in ``file``, or None if it is missing, damaged or has another number."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.dtype != np.uint8 or found.ndim != 4 or len(found) != images:
        return None
    return torch.from_numpy(found)


def write_cached(file: Path, images: Tensor) -> None:
    """Write ``images`` to ``file``. Where this is not possible, nothing is kept."""

    def write(target: Path) -> None:
        with open(target, "wb") as stream:
            np.save(stream, images.numpy(), allow_pickle=False)

    keep(file, write)


def decode_all(encoded: EncodedImages, size: int | None = None) -> ImageSet:
    """Return all images in memory, each decoded by ``decode`` with this ``size``, now or by an earlier process.

    Raises:
        DataError: an image cannot be decoded, or has a different size from the first. The message names the image.
    """
    file = cached_file(encoded, size)
    images = None if file is None else read_cached(file, len(encoded))
    if images is None:
        images = decode_images(encoded.read(np.arange(len(encoded))), len(encoded), size)
        if file is not None:
            write_cached(file, images)
    return ImageSet(images, encoded.labels, encoded.classes, encoded.ids(), encoded.name, encoded.split)
