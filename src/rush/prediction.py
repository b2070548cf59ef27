"""Predictions for image files."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rush.errors import DataError
from rush.loading import image_shape, load
from rush.smoothing import ABSTAIN


def predict_files(
    folder: str | PathLike[str],
    files: Sequence[Path],
    *,
    num_samples: int,
    alpha: float,
    seed: int,
    resize: bool,
    compiled: bool = True,
) -> list[tuple[str, str]]:
    """(file, class name or "abstain") for each image file, by the smoothed classifier in ``folder``.

    Raises: DataError when a file is no image, or of another size than the model's and ``resize`` is False.
    """
    smoothed = load(folder, compiled=compiled)
    shape = image_shape(folder)
    x = torch.stack([_read_image(file, shape, resize) for file in files])
    classes = smoothed.predict(x, num_samples=num_samples, alpha=alpha, seed=seed).tolist()
    names = ["abstain" if own == ABSTAIN else smoothed.classes[own] for own in classes]
    return [(str(file), name) for file, name in zip(files, names, strict=True)]


def _read_image(file: Path, shape: tuple[int, int, int], resize: bool) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    if image.size != (width, height):
        if not resize:
            raise DataError(
                f"{file} is {image.width}x{image.height}, the model takes {width}x{height}; give --resize or resize it"
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, np.float32).reshape(height, width, channels))
    return pixels.permute(2, 0, 1) / 255
