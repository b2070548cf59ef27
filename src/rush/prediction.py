"""Predictions for image files."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rush.errors import DataError
from rush.evaluation.defenders import device_of, plain_logits
from rush.loading import class_names, image_shape, load
from rush.saving import plain_execution
from rush.smoothing import ABSTAIN, SmoothedClassifier


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
    """(file, class name or "abstain") for each image file, by the classifier in ``folder``.

    One that is not smoothed never abstains; ``num_samples``, ``alpha`` and ``seed`` are for smoothed ones.
    Raises: DataError when a file is no image, or of another size than the model's and ``resize`` is False.
    """
    model, known = load(folder, compiled=compiled), class_names(folder)
    shape = image_shape(folder)
    x = torch.stack([_read_image(file, shape, resize) for file in files])
    if isinstance(model, SmoothedClassifier):
        classes = model.predict(x, num_samples=num_samples, alpha=alpha, seed=seed)
    else:
        classes = plain_logits(model, plain_execution(device_of(model)), x).argmax(1)
    names = ["abstain" if own == ABSTAIN else known[own] for own in classes.tolist()]
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
