"""``rush predict``: the classes of image files, and how far each is certain."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from rush.choices import ABSTAIN, NoiseName, Norm
from rush.commands.run_folders import refuse_existing
from rush.commands.terminal import Json, print_csv, print_json, print_lines, print_notes, print_rows
from rush.errors import ConfigError, DataError, InputError
from rush.runtime.lines import printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from rush.data.kind import Shape
    from rush.evaluation.model import Model

HEADER = ("image", "class", "votes", "probability at least", "radius", "runner-up")
STDIN = "standard input"
_DRAWN = 64  # images in a picture
_SELECTION = 10  # one vote in ten selects the class, and the others bound its probability


@dataclass(frozen=True)
class Prediction:
    """The answer of a classifier for one image file.

    Attributes:
        image: the file.
        label: index of the class, None where the votes do not decide.
        name: name of the class, "abstain" where the votes do not decide.
        share: the share of the estimation votes for the class with the most, None without noise.
        probability: lower bound on the probability of the class under noise, None without noise.
        radius: radius within which the smoothed classifier provably predicts the class, in pixel units. None without
            noise.
        norm: norm of the radius.
        runner_up: name of the class with the next most votes, None without noise or without such votes.
        runner_up_share: its share of the votes.
    """

    image: str
    label: int | None
    name: str
    share: float | None = None
    probability: float | None = None
    radius: float | None = None
    norm: Norm | None = None
    runner_up: str | None = None
    runner_up_share: float | None = None


@dataclass(frozen=True)
class Source:
    """A model with what is known of its images.

    Attributes:
        names: names of its classes, None where they are not known.
        shape: (C, H, W) of its images, None where it is not known.
        resized: whether its training images were resampled to this shape.
    """

    model: Model
    names: tuple[str, ...] | None
    shape: Shape | None
    resized: bool


def predict(
    paths: Annotated[list[str] | None, Parameter(name="run-and-images")] = None,
    *,
    model: str | None = None,
    sigma: float | None = None,
    noise: NoiseName = "gaussian",
    num_classes: int = 10,
    classes: list[str] | None = None,
    size: int | None = None,
    num_samples: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    resize: bool = False,
    eager: bool = False,
    stdin: bool = False,
    picture: Path | None = None,
    json: Json = False,
    csv: bool = False,
) -> None:
    """Predict the class of images with the classifier of a run, or with any model, smoothed or not. A smoothed
    classifier also gives a lower bound on the probability of the class under noise, and the certified radius.

    Args:
        paths: A run folder, or a folder with model.json and model.safetensors; then image files, folders of them, which
            are searched. With --model, images only.
            Images are read like the training images, and resized if these were (data.size). A file that cannot be read
            is named, and the others are answered.
        model: module:function that returns a torch.nn.Module (pixels to logits) or SmoothedClassifier; or a run folder.
        sigma: Smooth the module with noise of this standard deviation.
        noise: Kind of that noise.
        num_classes: Number of classes of the module, where --classes does not name them.
        classes: Names of the classes of the module, in order; repeatable, or separated by commas.
        size: Resample the central square of images to this side, for a module.
        num_samples: Number of noisy copies that vote on each image.
        alpha: Probability of a wrong statement, per image; if the votes do not decide, the answer is "abstain".
        seed: Seed of the noise.
        resize: Resample the central square of images of another size instead of refusing them.
            Without it, this happens only if the training images were resized.
        eager: Do not compile the network, even if it was certified compiled; for a machine without a compiler.
        picture: A new file, .png, .svg or .pdf, that shows the images with their answers, at most 64 of them.
        stdin: Read one image from standard input, too.
        csv: Print comma-separated values.
    """
    if json and csv:
        raise ConfigError("give --json or --csv, not both")
    paths = paths or []
    if model is None and not paths:
        raise ConfigError("give a run folder, or --model module:function, and images")
    folder = paths[0] if model is None else None
    files = [*_files(paths if model is not None else paths[1:]), *([STDIN] if stdin else [])]
    if not files:
        raise ConfigError(f"give image files or folders of them{'' if model else ' after the run folder'}")
    if picture is not None:
        refuse_existing(picture, "picture")
    names = tuple(name for text in classes for name in text.split(",")) if classes else None
    if folder is not None:
        if sigma is not None or noise != "gaussian" or names or size:
            raise ConfigError("--sigma, --noise, --classes and --size belong to --model; a run has its own")
        source = source_of_run(folder, compiled=not eager)
    else:
        assert model is not None
        source = _source_of(model, sigma, noise, num_classes, names, size)
    answers = predict_files(source, files, num_samples=num_samples, alpha=alpha, seed=seed, resize=resize)
    found = [answer for answer in answers if isinstance(answer, Prediction)]
    errors = [answer for answer in answers if isinstance(answer, DataError)]
    if json or csv:
        objects = [_object(file, answer) for file, answer in zip(files, answers, strict=True)]
        if json:
            print_json(objects)
        else:
            print_csv(list(objects[0]), [tuple(each.values()) for each in objects])
    elif found:
        smoothed = found[0].norm is not None
        print_rows(HEADER if smoothed else HEADER[:2], [_cells(answer)[: None if smoothed else 2] for answer in found])
    if picture is not None and found:
        _draw(picture, found)
        print_notes([f"written to {picture}"])
    print_lines([f"rush: {error}" for error in errors[:-1]], stderr=True)
    if errors:
        raise errors[-1]


def source_of_run(folder: str | PathLike[str], compiled: bool = True) -> Source:
    """Return the model in a run folder, or in a folder with ``model.json`` and ``model.safetensors``.

    Raises:
        RunError: as ``rush.load``.
    """
    from rush.models.storage import class_names, image_form, load

    model, form = load(folder, compiled=compiled), image_form(folder)
    return Source(model, class_names(folder), form.shape, form.resized)


def predict_files(
    source: Source, files: Sequence[str | Path], *, num_samples: int, alpha: float, seed: int, resize: bool
) -> list[Prediction | DataError]:
    """Return for each image file, in order, the prediction, or why it cannot be read.

    The files are read by the reader of training images (``rush.data.readers.decoding``). If ``data.size`` resized
    these, the files are resampled in the same way, from their central square. A file that cannot be read does not
    affect the others. A classifier that is not smoothed never abstains.

    Args:
        source: The model. Its images have the shape of the first that can be read if none is known.
        files: Image files; greyscale ones are repeated over the channels of a colour model.
        num_samples: Number of votes per image. Like ``alpha`` and ``seed`` it is for smoothed classifiers only.
        alpha: Probability of a wrong statement per image.
        seed: Seed of the noise.
        resize: Also resample if the training images were taken as they were stored.
    """
    import numpy as np
    import torch

    from rush.data.images import as_pixels
    from rush.smoothing.classifier import SmoothedClassifier

    shape, read = source.shape, []
    for file in files:
        image = _read(file, shape, source.resized or resize)
        read.append(image)
        if shape is None and isinstance(image, np.ndarray):
            shape = image.shape
    pixels = [image for image in read if isinstance(image, np.ndarray)]
    if not pixels:
        return [image for image in read if isinstance(image, DataError)]
    x = as_pixels(torch.from_numpy(np.stack(pixels)))
    named = [str(file) for file, image in zip(files, read, strict=True) if isinstance(image, np.ndarray)]
    if isinstance(source.model, SmoothedClassifier):
        source.model.execution.configure()
        answers = iter(_certified(source.model, source.names, x, named, num_samples, alpha, seed))
    else:
        answers = iter(_classified(source.model, source.names, x, named))
    return [image if isinstance(image, DataError) else next(answers) for image in read]


def _certified(
    smoothed: Any, names: tuple[str, ...] | None, x: Tensor, files: list[str], num_samples: int, alpha: float, seed: int
) -> Iterator[Prediction]:
    """Yield the predictions of a smoothed classifier for the images ``x``, whose certificates hold at ``alpha``."""
    import torch

    from rush.certification.certify import certify
    from rush.choices import CERTIFIED_NORM, fewest_samples

    norm, exact = CERTIFIED_NORM[smoothed.noise.name], smoothed.noise.name == "splitting"
    selection = max(1, num_samples // _SELECTION)
    least = fewest_samples(alpha / 2 if norm == "l2" else alpha) if 0 < alpha < 1 else 0
    if not exact and num_samples - selection < least:
        needed = next(total for total in itertools.count(least) if total - max(1, total // _SELECTION) >= least)
        raise InputError(f"num_samples = {num_samples} cannot decide at alpha = {alpha:g}; give at least {needed}")
    unknown = torch.zeros(len(x), dtype=torch.int64)  # certificates do not depend on the labels
    certificates = certify(
        smoothed,
        (x, unknown),
        num_selection=selection,
        num_estimation=num_samples - selection,
        alpha=alpha,
        seed=seed,
        bound="two-classes" if norm == "l2" else None,
    )
    for row, file in enumerate(files):
        counts, label = certificates.counts[row], int(certificates.prediction[row])
        order = (-counts).argsort(kind="stable")
        first, second = (int(order[0]), int(order[1])) if label == ABSTAIN else (label, _other(order, label))
        yield Prediction(
            file,
            None if label == ABSTAIN else label,
            "abstain" if label == ABSTAIN else _name(names, label),
            share=float(counts[first] / counts.sum()),
            probability=float(certificates.p_lower[row]),
            radius=float(certificates.radius[row]),
            norm=norm,
            runner_up=_name(names, second) if counts[second] else None,
            runner_up_share=float(counts[second] / counts.sum()),
        )


def _classified(model: nn.Module, names: tuple[str, ...] | None, x: Tensor, files: list[str]) -> Iterator[Prediction]:
    """Yield the predictions of a classifier that is not smoothed."""
    from rush.evaluation.model import plain_logits
    from rush.models.storage import plain_execution
    from rush.runtime.execution import device_of

    logits = plain_logits(model, plain_execution(device_of(model)), x)
    if names is not None and len(names) != logits.shape[1]:
        raise ConfigError(f"--classes names {len(names)} classes, and the model has {logits.shape[1]}")
    labels = logits.argmax(1)
    for file, label in zip(files, labels.tolist(), strict=True):
        yield Prediction(file, label, _name(names, label))


def _source_of(
    name: str, sigma: float | None, noise: NoiseName, num_classes: int, names: tuple[str, ...] | None, size: int | None
) -> Source:
    """Return the model that ``--model`` names."""
    from rush.commands.external import load_model
    from rush.data.checks import kind_of

    if ":" not in name:
        if names or size:
            raise ConfigError(f"{name} is a run folder and has its own classes and size; omit --classes and --size")
        run = source_of_run(name)
        return run if sigma is None else replace(run, model=load_model(name, sigma, num_classes, noise))
    model = load_model(name, sigma, len(names) if names else num_classes, noise)
    kind = kind_of(model)
    shape = kind.shape if size is None else ((3, size, size) if kind.shape is None else (kind.shape[0], size, size))
    return Source(model, names or kind.classes, shape, size is not None)


def _files(paths: Sequence[str]) -> Iterator[str]:
    """Yield the image files that the paths name, those of a folder in the order of their names."""
    from rush.data.readers.folders import SUFFIXES

    for path in paths:
        if not Path(path).is_dir():
            yield path
            continue
        inside = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        yield from map(str, inside) if inside else [path]  # the reader refuses the path of an empty folder


def _read(file: str | Path, shape: Shape | None, resized: bool) -> np.ndarray | DataError:
    """Return the image as uint8 in the shape of the model's images, or the error if that is not possible."""
    import numpy as np

    from rush.data.readers.decoding import decode

    encoded = (STDIN, sys.stdin.buffer.read()) if file is STDIN else (str(file), Path(file))
    try:
        image = decode(encoded, shape[1:] if shape is not None and resized else None)
    except DataError as error:
        return error
    if shape is None:
        return image
    channels, height, width = shape
    if image.shape[1:] != (height, width):
        size = f"{image.shape[2]}x{image.shape[1]}"
        return DataError(f"{encoded[0]} is {size}, the model takes {width}x{height}; give --resize or resize it")
    if len(image) == 3 and channels == 1:
        return DataError(f"{encoded[0]} is in colour, the model takes greyscale; convert it to greyscale first")
    if len(image) not in (1, channels):
        return DataError(
            f"{encoded[0]} has {len(image)} channels, the model takes {channels}; give images with {channels}"
        )
    return image if len(image) == channels else np.repeat(image, channels, axis=0)


def _draw(file: Path, answers: Sequence[Prediction]) -> None:
    """Draw the images of the first answers with class, bound and radius, and write the picture."""
    from matplotlib import pyplot

    from rush.data.readers.decoding import decode

    shown = [answer for answer in answers if answer.image != STDIN][:_DRAWN]
    columns = min(8, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.8 * columns, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, answer in zip(axes.flat, shown, strict=False):
        pixels = decode((answer.image, Path(answer.image)))
        axis.imshow(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0], cmap="gray", vmin=0, vmax=255)
        lines = [answer.name]
        if answer.label is not None and answer.radius is not None:
            lines.append(f"{answer.norm} {answer.radius:.3f}")
        axis.set_title("\n".join(map(printable, lines)), fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)


def _object(file: str, answer: Prediction | DataError) -> dict[str, Any]:
    """Return the fields of a prediction with ``error`` None, or None in all of them and why the file was not read."""
    if isinstance(answer, Prediction):
        return {**asdict(answer), "error": None}
    return {**dict.fromkeys(Prediction.__annotations__), "image": file, "error": str(answer)}


def _cells(answer: Prediction) -> tuple[str, ...]:
    from rush.reporting.wording import percent

    if answer.share is None or answer.probability is None or answer.runner_up_share is None:
        return (answer.image, answer.name, "", "", "", "")
    runner_up = "–" if answer.runner_up is None else f"{answer.runner_up} ({percent(answer.runner_up_share)})"
    radius = "–" if answer.label is None else f"{answer.norm} {answer.radius:.3f}"
    least = "–" if answer.label is None else percent(answer.probability)
    return (answer.image, answer.name, percent(answer.share), least, radius, runner_up)


def _name(names: tuple[str, ...] | None, label: int) -> str:
    return str(label) if names is None else names[label]


def _other(order: np.ndarray, label: int) -> int:
    """Return the first class in ``order`` that is not ``label``."""
    return int(order[0] if order[0] != label else order[1])
