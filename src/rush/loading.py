"""``rush.load``: a trained classifier from a folder, smoothed or not."""

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from rush.engine.precision import decide_execution
from rush.errors import RunError
from rush.models.classifier import Classifier
from rush.models.description import read_description
from rush.saving import is_plain, load_plain, load_smoothed
from rush.smoothing import SmoothedClassifier


@dataclass(frozen=True)
class ImageForm:
    """How the images of a model were made: their ``shape`` (C, H, W), and whether they were ``resized`` to it."""

    shape: tuple[int, int, int]
    resized: bool


def load(folder: str | PathLike[str], device: str = "auto", compiled: bool = True) -> SmoothedClassifier | Classifier:
    """The SmoothedClassifier of a run folder, or of a folder with ``model.json`` and ``model.safetensors``.

    Of a run without noise (``smoothing.sigma = 0``, e.g. of adversarial training) the classifier itself: an nn.Module
    in evaluation mode from [0, 1] pixels (B, C, H, W) to logits (B, K), in float32, on ``device``.
    A smoothed one runs in the precision, tile and form that it was certified with, on ``device``. Nothing is unpickled.
    compiled: False runs it without torch.compile where it was certified with it, e.g. on a machine without a compiler;
    in a few of many thousand votes the last bits of the logits then decide otherwise.
    Raises: RunError when there is no model, or its files are damaged; ConfigError when the device is not there.
    """
    model = _model_folder(folder)
    description = read_description(model)
    if is_plain(description):
        return load_plain(model, decide_execution(device).device)
    recorded = description["execution"]
    smoothed = load_smoothed(model, decide_execution(device, recorded["precision"], recorded["tile"]))
    if not compiled:
        smoothed.execution = replace(smoothed.execution, compile_mode="none")
    return smoothed


def image_form(folder: str | PathLike[str]) -> ImageForm:
    """How the images that the model in ``folder`` was trained on were made; not resized where it is not recorded."""
    description = read_description(_model_folder(folder))
    channels, height, width = description["image_shape"]
    return ImageForm((channels, height, width), description["resized"])


def class_names(folder: str | PathLike[str]) -> tuple[str, ...]:
    """Names of the classes that the model in ``folder`` tells apart."""
    return tuple(read_description(_model_folder(folder))["classifier"]["classes"])


def _model_folder(folder: str | PathLike[str]) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise RunError(f"{path} is no folder; give a run folder such as runs/digits")
    return path / "model" if (path / "model").is_dir() else path
