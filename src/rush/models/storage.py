"""Models on disk: weights as safetensors, everything else as JSON beside them; nothing is ever unpickled."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rush.choices import EncoderName, Stem
from rush.data.kind import ImageKind, checked_shape
from rush.data.readers.entries import describe_kind
from rush.errors import ConfigError, RunError
from rush.models.classifier import Classifier, Normalize
from rush.models.description import FORMAT, GAUSSIAN, NO_NOISE, damaged, read_description
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.files import write_atomically, write_json
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian

_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_RECORDED = ("precision", "tile", "folded", "compile_mode")


@dataclass(frozen=True)
class ClassifierSpec:
    """What builds an untrained ``Classifier``: encoder by name, its width, input and stem, normalization, classes.

    Descriptions written before there was a choice of stem name none and mean the small one.
    """

    encoder: EncoderName
    width: int
    in_channels: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    stem: Stem = "small"

    def build(self) -> Classifier:
        """Raises: ConfigError for an encoder or a stem that does not exist."""
        encoder = build_encoder(self.encoder, self.width, self.in_channels, self.stem)
        features = encoder.features
        assert isinstance(features, int)
        return Classifier(Normalize(self.mean, self.std), encoder, linear_head(features, len(self.classes)))


def save_weights(module: nn.Module, path: Path) -> None:
    """Weights and buffers of ``module`` to ``path`` as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}

    def write(target: Path) -> None:
        try:
            save_file(tensors, target)
        except SafetensorError as error:  # what the system says comes as one of its own errors
            raise OSError(str(error)) from error

    write_atomically(path, write)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill ``module`` in place from ``path``; RunError when the file is missing, damaged or of another architecture."""
    _check_weights(module, path)
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _unfit(path, error) from error


def _check_weights(module: nn.Module, path: Path) -> None:
    """Raise RunError unless the header of ``path`` names the tensors of ``module`` (which may be on the meta device),
    with their shapes and types; no tensor is read."""
    if not path.exists():
        raise RunError(f"{path} is missing; the stage that writes it has not finished, or the folder is incomplete")
    if not path.is_file():
        raise RunError(f"{path} is {describe_kind(path)}, not a file of weights; restore it")
    try:
        with safe_open(path, "pt") as stored:
            found = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
    except Exception as error:  # the reader of the header may raise anything on a damaged one
        raise _unfit(path, error) from error
    expected = {name: (tuple(tensor.shape), _TYPES.get(tensor.dtype)) for name, tensor in module.state_dict().items()}
    wrong = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if wrong:
        given, wanted = shapes.get(wrong[0], "not there"), expected.get(wrong[0], "none")
        raise _unfit(path, f"{wrong[0]!r} is {given}, expected is {wanted} ({len(wrong)} such tensors)")


def _unfit(path: Path, reason: object) -> RunError:
    return RunError(f"{path} does not fit or is damaged: {reason}; restore it, or train again in another folder")


def save_smoothed(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    sigma: float,
    execution: Execution,
    image_shape: Sequence[int],
    resized: bool = False,
) -> None:
    """Write ``model.safetensors`` and ``model.json`` into ``folder``; the JSON last, so that it says the model is
    whole.

    image_shape: (C, H, W) of the images it was trained on. resized: whether these were made from images of any size
    (``data.size``), so that others are made the same way for it.
    """
    _save(folder, classifier, spec, {"name": GAUSSIAN, "sigma": sigma}, execution, image_shape, resized)


def save_plain(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    device: str,
    image_shape: Sequence[int],
    resized: bool = False,
) -> None:
    """Write a classifier that is not smoothed, like ``save_smoothed``; its noise is "none" and its forward
    ``plain_execution``."""
    _save(folder, classifier, spec, {"name": NO_NOISE}, plain_execution(device), image_shape, resized)


def plain_execution(device: str) -> Execution:
    """The forward of a classifier that is not smoothed: float32 and uncompiled, as deterministic networks are attacked
    and judged (``evaluation.model.PlainDefender``)."""
    return Execution(device=device)


def is_plain(description: Mapping[str, Any]) -> bool:
    """Whether the model of a ``model.json`` is not smoothed."""
    return bool(description["noise"]["name"] == NO_NOISE)


def load_plain(folder: Path, device: str) -> Classifier:
    """The classifier in ``folder`` that is not smoothed, on ``device`` and in evaluation mode.

    Raises: RunError like ``load_smoothed``, and where it is smoothed.
    """
    description = read_description(folder)
    if not is_plain(description):
        raise RunError(f"{folder} holds a smoothed classifier; take rush.load")
    spec = _read_spec(description)
    classifier = _load_classifier(folder, spec)
    classifier.kind = ImageKind(checked_shape(description["image_shape"]), tuple(spec.classes))
    plain_execution(device).place(classifier)
    return classifier.eval()


def load_smoothed(folder: Path, execution: Execution) -> SmoothedClassifier:
    """The smoothed classifier in ``folder`` (``model.json`` and ``model.safetensors``), placed and in evaluation mode.

    Its forward has the form that is recorded with it: folded or not, compiled or not.
    Raises: RunError when a file is missing, damaged or written by a newer version, or the classifier is not smoothed.
    """
    description = read_description(folder)
    if is_plain(description):
        raise RunError(
            f"{folder} holds a classifier that is not smoothed (smoothing.sigma = 0); rush.load gives it as it is, and "
            "rush.SmoothedClassifier puts noise on it"
        )
    spec = _read_spec(description)
    classifier = _load_classifier(folder, spec)
    execution = replace(execution, **recorded_form(description))
    placed = execution.place(classifier).eval()
    return SmoothedClassifier(
        placed,
        noise=Gaussian(description["noise"]["sigma"]),
        num_classes=len(spec.classes),
        execution=execution,
        classes=spec.classes,
        image_shape=description["image_shape"],
    )


def recorded_form(description: dict[str, Any]) -> dict[str, Any]:
    """Whether the model's forward is folded and compiled; models written before it was recorded are neither."""
    return {name: description["execution"][name] for name in ("folded", "compile_mode")}


def _save(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    noise: dict[str, Any],
    execution: Execution,
    image_shape: Sequence[int],
    resized: bool,
) -> None:
    save_weights(classifier, folder / "model.safetensors")
    description = {
        "format": FORMAT,
        "classifier": asdict(spec),
        "noise": noise,
        "execution": {name: getattr(execution, name) for name in _RECORDED},
        "image_shape": list(image_shape),
        "resized": resized,
        "classes": list(spec.classes),
    }
    write_json(folder / "model.json", description)


def _read_spec(description: Mapping[str, Any]) -> ClassifierSpec:
    return ClassifierSpec(**description["classifier"])


def _load_classifier(folder: Path, spec: ClassifierSpec) -> Classifier:
    """Return the classifier with its weights, which takes memory only after the weights are known to fit."""
    weights = folder / "model.safetensors"
    try:
        with torch.device("meta"):
            outline = spec.build()
        _check_weights(outline, weights)
        classifier = spec.build()
    except ConfigError as error:
        raise RunError(f"{folder / 'model.json'}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged(folder / "model.json", error) from error
    load_weights(classifier, weights)
    return classifier


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
