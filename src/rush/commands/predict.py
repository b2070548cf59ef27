"""``rush predict``: the classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rush.choices import ABSTAIN
from rush.commands.terminal import print_lines, print_table
from rush.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from rush.models.storage import ImageForm


def predict(
    folder: Path,
    images: list[Path],
    *,
    num_samples: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    resize: bool = False,
    eager: bool = False,
) -> None:
    """Predict the class of image files with the classifier of a run, smoothed or not.

    Args:
        folder: Run folder, or a folder with model.json and model.safetensors.
        images: Image files. They are read like the training images, and resized if these were (data.size).
            A file that cannot be read is named, and the others are answered.
        num_samples: Number of noisy copies that vote on each image.
        alpha: Probability of a wrong answer, per image; if the votes do not decide, the answer is "abstain".
        seed: Seed of the noise.
        resize: Resample the central square of images of another size instead of refusing them.
            Without it, this happens only if the training images were resized.
        eager: Do not compile the network, even if it was certified compiled; for a machine without a compiler.
    """
    answers = predict_files(
        folder, images, num_samples=num_samples, alpha=alpha, seed=seed, resize=resize, compiled=not eager
    )
    answered = [(str(file), answer) for file, answer in zip(images, answers, strict=True) if isinstance(answer, str)]
    if answered:
        print_table(("image", "class"), answered)
    errors = [answer for answer in answers if isinstance(answer, DataError)]
    print_lines([f"rush: {error}" for error in errors[:-1]], stderr=True)
    if errors:
        raise errors[-1]


def predict_files(
    folder: str | PathLike[str],
    files: Sequence[Path],
    *,
    num_samples: int,
    alpha: float,
    seed: int,
    resize: bool,
    compiled: bool = True,
) -> list[str | DataError]:
    """Return for each image file, in order, its class name or "abstain", or why it cannot be read.

    The files are read by the reader of training images (``rush.data.readers.decoding``). If ``data.size`` resized
    these, the files are resampled in the same way, from their central square. A file that cannot be read does not
    affect the others. A classifier that is not smoothed never abstains.

    Args:
        folder: A run folder, or a folder with ``model.json`` and ``model.safetensors``.
        files: Image files; greyscale ones are repeated over the channels of a colour model.
        num_samples: Number of votes per image. Like ``alpha`` and ``seed`` it is for smoothed classifiers only.
        alpha: Probability of a wrong answer per image.
        seed: Seed of the noise.
        resize: Also resample if the training images were taken as they were stored.
        compiled: As in ``rush.load``.
    """
    import numpy as np
    import torch

    from rush.data.images import as_pixels
    from rush.evaluation.model import plain_logits
    from rush.models.storage import class_names, image_form, load, plain_execution
    from rush.runtime.execution import device_of
    from rush.smoothing.classifier import SmoothedClassifier

    model, names, form = load(folder, compiled=compiled), class_names(folder), image_form(folder)
    read = [_read(Path(file), form, resize) for file in files]
    pixels = [image for image in read if isinstance(image, np.ndarray)]
    if not pixels:
        return [image for image in read if isinstance(image, DataError)]
    x = as_pixels(torch.from_numpy(np.stack(pixels)))
    if isinstance(model, SmoothedClassifier):
        model.execution.configure()
        classes = model.predict(x, num_samples=num_samples, alpha=alpha, seed=seed)
    else:
        classes = plain_logits(model, plain_execution(device_of(model)), x).argmax(1)
    answers = iter("abstain" if index == ABSTAIN else names[index] for index in classes.tolist())
    return [image if isinstance(image, DataError) else next(answers) for image in read]


def _read(file: Path, form: ImageForm, resize: bool) -> np.ndarray | DataError:
    """Return the image as uint8 in the shape of the model's images, or the error if it cannot be."""
    import numpy as np

    from rush.data.readers.decoding import decode

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
        return DataError(f"{file} has {len(image)} channels, the model takes {channels}; give images with {channels}")
    return image if len(image) == channels else np.repeat(image, channels, axis=0)
