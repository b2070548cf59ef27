"""Images of any size as squares of one size; the one resampling, for encoded files and for pixels in memory alike."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from rush.errors import InputError
from rush.runtime.numbers import as_whole

if TYPE_CHECKING:
    from PIL import Image


def fit_square(image: "Image.Image", size: int) -> "Image.Image":
    """The central square of ``image`` (mode L or RGB), as wide as its shorter side, resampled to ``size`` x ``size``.

    In other words: the shorter side is brought to ``size`` and the longer one cropped at both ends. Pillow's bilinear
    filter, widened by the reduction (antialiased) and rounded to 8 bits; an image of that size stays as it is, a
    smaller one is enlarged.
    """
    return fit_image(image, size, size)


def fit_image(image: "Image.Image", width: int, height: int) -> "Image.Image":
    """The largest central part of ``image`` with the proportions of ``width`` x ``height``, resampled as by
    ``fit_square``."""
    from PIL.Image import Resampling

    if image.size == (width, height):
        return image
    across, down = image.size
    part_across, part_down = min(across, down * width / height), min(down, across * height / width)
    left, top = (across - part_across) / 2, (down - part_down) / 2
    box = (left, top, left + part_across, top + part_down)
    return image.resize((width, height), Resampling.BILINEAR, box=box)


def resize_images(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """uint8 (N, C, size, size): each image of uint8 (N, C, H, W), C in 1, 3, through ``fit_square``; None: as given."""
    check_size(size)
    if size is None or images.shape[2:] == (size, size):
        return images
    from PIL import Image

    pixels = images.numpy()
    resized = np.empty((*images.shape[:2], size, size), np.uint8)

    def work(row: int) -> None:
        source = pixels[row, 0] if len(pixels[row]) == 1 else np.ascontiguousarray(pixels[row].transpose(1, 2, 0))
        fitted = np.asarray(fit_square(Image.fromarray(source), size))
        resized[row] = fitted if fitted.ndim == 2 else fitted.transpose(2, 0, 1)

    with ThreadPoolExecutor(num_threads()) as pool:
        for _ in pool.map(work, range(len(pixels))):
            pass
    return torch.from_numpy(resized)


def check_size(size: int | None) -> None:
    """Raises: InputError unless ``size`` is None or a positive integer."""
    if size is not None and (as_whole(size) or 0) < 1:
        raise InputError(f"size must be a number of pixels >= 1, or None for images as they are stored, got {size!r}")


def num_threads() -> int:
    """Threads that decode or resize at once: one per processor, at most eight."""
    return min(8, os.cpu_count() or 1)
