"""Models on disk: weights as safetensors, everything else as JSON beside them; nothing is ever unpickled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rush.data.kind import ImageKind, checked_shape
from rush.engine.precision import Execution
from rush.errors import ConfigError, InputError, RunError
from rush.files import write_atomically, write_json
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.noise import Gaussian
from rush.options import EncoderName, Stem
from rush.smoothing import SmoothedClassifier

FORMAT = 1
_GAUSSIAN, _NO_NOISE = "gaussian", "none"
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
    write_atomically(path, lambda target: save_file(tensors, target))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill ``module`` in place from ``path``; RunError when the file is missing, damaged or of another architecture."""
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise RunError(
            f"{path} is missing; the stage that writes it has not finished, or the folder is incomplete"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise RunError(f"{path} does not fit or is damaged: {error}") from error


def save_smoothed(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    sigma: float,
    execution: Execution,
    image_shape: Sequence[int],
) -> None:
    """Write ``model.safetensors`` and ``model.json`` into ``folder``; the JSON last, so that it says the model is
    whole."""
    _save(folder, classifier, spec, {"name": _GAUSSIAN, "sigma": sigma}, execution, image_shape)


def save_plain(
    folder: Path, classifier: Classifier, spec: ClassifierSpec, device: str, image_shape: Sequence[int]
) -> None:
    """Write a classifier that is not smoothed, like ``save_smoothed``; its noise is "none" and its forward
    ``plain_execution``."""
    _save(folder, classifier, spec, {"name": _NO_NOISE}, plain_execution(device), image_shape)


def plain_execution(device: str) -> Execution:
    """The forward of a classifier that is not smoothed: float32 and uncompiled, as deterministic networks are attacked
    and judged (``evaluation.defenders.PlainDefender``)."""
    return Execution(device=device)


def is_plain(description: Mapping[str, Any]) -> bool:
    """Whether the model of a ``model.json`` is not smoothed."""
    return bool(description["noise"]["name"] == _NO_NOISE)


def load_plain(folder: Path, device: str) -> Classifier:
    """The classifier in ``folder`` that is not smoothed, on ``device`` and in evaluation mode.

    Raises: RunError like ``load_smoothed``, and where it is smoothed.
    """
    description = read_description(folder)
    if not is_plain(description):
        raise RunError(f"{folder} holds a smoothed classifier; take rush.load")
    spec = _read_spec(folder, description)
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
    spec = _read_spec(folder, description)
    try:
        noise = Gaussian(description["noise"]["sigma"])
    except InputError as error:
        raise _damaged(folder / "model.json", error) from error
    classifier = _load_classifier(folder, spec)
    execution = replace(execution, **recorded_form(description))
    placed = execution.place(classifier).eval()
    return SmoothedClassifier(
        placed,
        noise=noise,
        num_classes=len(spec.classes),
        execution=execution,
        classes=spec.classes,
        image_shape=description["image_shape"],
    )


def read_description(folder: Path) -> dict[str, Any]:
    """``model.json`` of ``folder``; RunError when it is missing, damaged or of an unknown format."""
    file = folder / "model.json"
    if not file.is_file():
        raise RunError(f"{file} is missing: {folder} holds no finished model; train one with `rush run RECIPE`")
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise RunError(
                f"{file} has format {description['format']}, this version reads {FORMAT}; update rush-smoothing"
            )
        noise = description["noise"]
        if noise["name"] not in (_GAUSSIAN, _NO_NOISE):
            raise RunError(
                f"{file} has noise {noise['name']!r}, this version knows {_GAUSSIAN} and {_NO_NOISE}; update "
                "rush-smoothing"
            )
        _ = (
            description["classifier"],
            is_plain(description) or noise["sigma"],
            description["execution"]["precision"],
            description["execution"]["tile"],
            description["image_shape"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    return description


def recorded_form(description: dict[str, Any]) -> dict[str, Any]:
    """Whether the model's forward is folded and compiled; models written before it was recorded are neither."""
    recorded = description["execution"]
    return {"folded": recorded.get("folded", False), "compile_mode": recorded.get("compile_mode", "none")}


def _save(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    noise: dict[str, Any],
    execution: Execution,
    image_shape: Sequence[int],
) -> None:
    save_weights(classifier, folder / "model.safetensors")
    description = {
        "format": FORMAT,
        "classifier": asdict(spec),
        "noise": noise,
        "execution": {name: getattr(execution, name) for name in _RECORDED},
        "image_shape": list(image_shape),
        "classes": list(spec.classes),
    }
    write_json(folder / "model.json", description)


def _read_spec(folder: Path, description: Mapping[str, Any]) -> ClassifierSpec:
    try:
        return ClassifierSpec(**description["classifier"])
    except (TypeError, ValueError) as error:
        raise _damaged(folder / "model.json", error) from error


def _load_classifier(folder: Path, spec: ClassifierSpec) -> Classifier:
    try:
        classifier = spec.build()
    except ConfigError as error:
        raise RunError(f"{folder / 'model.json'}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise _damaged(folder / "model.json", error) from error
    load_weights(classifier, folder / "model.safetensors")
    return classifier


def _damaged(file: Path, error: Exception) -> RunError:
    return RunError(f"{file} is damaged ({type(error).__name__}: {error}); restore it or fine-tune again")
