"""Resampling of images to squares of one size, the same for encoded files and for pixels in memory."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from rush.errors import InputError
from rush.runtime.numbers import as_whole

if TYPE_CHECKING:
    from PIL import Image


def fit_image(image: "Image.Image", width: int, height: int) -> "Image.Image":
    """Resample the largest central part of ``image`` with the proportions of ``width`` x ``height`` to this size.

    The filter is Pillow's bilinear one, antialiased and rounded to 8 bits. An image (mode L or RGB) of this size is
    returned unchanged, and a smaller one is enlarged.
    """
    from PIL.Image import Resampling

    if image.size == (width, height):
        return image
    full_width, full_height = image.size
    box_width = min(full_width, full_height * width / height)
    box_height = min(full_height, full_width * height / width)
    left, top = (full_width - box_width) / 2, (full_height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Resampling.BILINEAR, box=box)


def resize_images(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """Resample each image of uint8 (N, C, H, W), C in 1, 3, by ``fit_image`` to (N, C, size, size).

    With ``size`` None, or images of this size, the tensor is returned as it is.
    """
    if size is None or images.shape[2:] == (size, size):
        return images
    from PIL import Image

    pixels = images.numpy()
    resized = np.empty((*images.shape[:2], size, size), np.uint8)

    def resize(row: int) -> None:
        source = pixels[row, 0] if len(pixels[row]) == 1 else np.ascontiguousarray(pixels[row].transpose(1, 2, 0))
        fitted = np.asarray(fit_image(Image.fromarray(source), size, size))
        resized[row] = fitted if fitted.ndim == 2 else fitted.transpose(2, 0, 1)

    with ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(resize, range(len(pixels))))  # raises what a thread raised
    return torch.from_numpy(resized)


def check_size(size: int | None) -> None:
    """Raise InputError unless ``size`` is None or a positive integer."""
    if size is not None and (as_whole(size) or 0) < 1:
        raise InputError(f"size must be a number of pixels >= 1, or None for images as they are stored, got {size!r}")


def num_threads() -> int:
    """Return the number of threads that decode or resize: one per processor, at most eight."""
    return min(8, os.cpu_count() or 1)
