"""Predictions for image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from rush.data.images import as_pixels
from rush.data.readers.decoding import decode
from rush.errors import DataError
from rush.evaluation.model import plain_logits
from rush.models.storage import ImageForm, class_names, image_form, load, plain_execution
from rush.runtime.execution import device_of
from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier


@dataclass(frozen=True)
class FilePrediction:
    """The answer for one image file: a class name or "abstain"; or None, and why it cannot be read."""

    file: Path
    answer: str | None
    error: str | None = None


def predict_files(
    folder: str | PathLike[str],
    files: Sequence[Path],
    *,
    num_samples: int,
    alpha: float,
    seed: int,
    resize: bool,
    compiled: bool = True,
) -> list[FilePrediction]:
    """Return the answer of the classifier in ``folder`` for each image file, in order.

    The files are read as the training images were: by the same reader (``rush.data.readers.decoding``), and where
    ``data.size`` made the training images of images of any size, by the same resampling of the central square. One
    file that cannot be read keeps no other from its answer. A classifier that is not smoothed never abstains.

    Args:
        folder: A run folder, or a folder with ``model.json`` and ``model.safetensors``.
        files: Image files; greyscale ones are repeated over the channels of a colour model.
        num_samples: Votes per image, of a smoothed classifier, as are ``alpha`` and ``seed``.
        alpha: Probability of a wrong answer per image.
        seed: Seed of the noise.
        resize: Also resample where the training images were taken as they were stored.
        compiled: As in ``rush.load``.
    """
    model, names, form = load(folder, compiled=compiled), class_names(folder), image_form(folder)
    read = [_read(Path(file), form, resize) for file in files]
    pixels = [image for image in read if isinstance(image, np.ndarray)]
    if not pixels:
        return [FilePrediction(Path(file), None, str(error)) for file, error in zip(files, read, strict=True)]
    x = as_pixels(torch.from_numpy(np.stack(pixels)))
    if isinstance(model, SmoothedClassifier):
        model.execution.configure()
        classes = model.predict(x, num_samples=num_samples, alpha=alpha, seed=seed)
    else:
        classes = plain_logits(model, plain_execution(device_of(model)), x).argmax(1)
    answers = iter("abstain" if index == ABSTAIN else names[index] for index in classes.tolist())
    return [
        FilePrediction(Path(file), None, str(image))
        if isinstance(image, DataError)
        else FilePrediction(Path(file), next(answers))
        for file, image in zip(files, read, strict=True)
    ]


def _read(file: Path, form: ImageForm, resize: bool) -> np.ndarray | DataError:
    """Return the image as uint8 in the shape of the model's images, or what keeps it from being one."""
    channels, height, width = form.shape
    try:
        image = decode((str(file), file), (height, width) if form.resized or resize else None)
    except DataError as error:
        return error
    if image.shape[1:] != (height, width):
        size = f"{image.shape[2]}x{image.shape[1]}"
        return DataError(f"{file} is {size}, the model takes {width}x{height}; give --resize or resize it")
    if len(image) == 3 and channels == 1:
        return DataError(f"{file} is in colour, the model takes greyscale; convert it to greyscale first")
    if len(image) not in (1, channels):
        return DataError(f"{file} has {len(image)} channels, the model takes {channels}; give images of that many")
    return image if len(image) == channels else np.repeat(image, channels, axis=0)
