"""Models on disk: weights as safetensors, all else as JSON beside them. Nothing is ever unpickled."""

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
from rush.data.kind import ImageKind
from rush.data.readers.entries import describe_kind
from rush.errors import ConfigError, InputError, ModelError, RunError
from rush.models.classifier import Classifier, Normalize
from rush.models.description import FILES, FORMAT, NO_NOISE, damaged, read_description
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.runtime.execution import Execution, check_integers, decide_execution, device_of, in_precision
from rush.runtime.extras import optional
from rush.runtime.files import make_folder, write_atomically, write_json
from rush.runtime.lines import one_line, printable
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Noise, make_noise
from rush.smoothing.quantized import with_ranges, without_ranges

_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
SHIPPED = ("cifar10-small",)
"""Names of the models that come with this library, see docs/models.md."""
HUB = "hf://"
"""Beginning of the name of a model on the Hugging Face hub."""
_FORWARD = ("tile", "folded", "compile_mode", "channels_last")


@dataclass(frozen=True)
class ClassifierSpec:
    """Arguments that build an untrained ``Classifier``: encoder, normalization and classes.

    Attributes:
        encoder: name of the encoder, see ``build_encoder``.
        width: number of channels of its first stage.
        in_channels: number of channels of the images.
        mean: mean of the pixels, per channel.
        std: standard deviation of the pixels, per channel.
        classes: names of the classes.
        stem: stem of the encoder. Descriptions of older versions omit it and mean "small".
    """

    encoder: EncoderName
    width: int
    in_channels: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    stem: Stem = "small"

    def build(self) -> Classifier:
        """Build the classifier, or raise ConfigError if the encoder or the stem does not exist."""
        encoder = build_encoder(self.encoder, self.width, self.in_channels, self.stem)
        features = encoder.features
        assert isinstance(features, int)
        classifier = Classifier(Normalize(self.mean, self.std), encoder, linear_head(features, len(self.classes)))
        classifier.spec = self
        return classifier


def save_weights(module: nn.Module, path: Path) -> None:
    """Write weights and buffers of ``module`` to ``path`` as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}

    def write(target: Path) -> None:
        try:
            save_file(tensors, target)
        except SafetensorError as error:  # safetensors wraps the errors of the system
            raise OSError(str(error)) from error

    write_atomically(path, write)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load ``module`` in place from ``path``, or raise RunError if the file is missing, damaged or does not fit."""
    _check_weights(module, path)
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _unfit(path, error) from error


def _check_weights(module: nn.Module, path: Path) -> None:
    """Raise RunError unless the header of ``path`` lists the tensors of ``module`` with their shapes and types.

    No tensor is read, and ``module`` may be on the meta device.
    """
    if not path.exists():
        raise RunError(f"{path} is missing; the stage that writes it has not finished, or the folder is incomplete")
    if not path.is_file():
        raise RunError(f"{path} is {describe_kind(path)}, not a file of weights; restore it")
    try:
        with safe_open(path, "pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except Exception as error:  # the reader may raise anything on a damaged header
        raise _unfit(path, error) from error
    expected = {name: (tuple(tensor.shape), _TYPES.get(tensor.dtype)) for name, tensor in module.state_dict().items()}
    wrong = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if wrong:
        stored_shape, expected_shape = shapes.get(wrong[0], "missing"), expected.get(wrong[0], "none")
        raise _unfit(path, f"{wrong[0]!r} is {stored_shape}, expected {expected_shape} ({len(wrong)} such tensors)")


def _unfit(path: Path, reason: object) -> RunError:
    return RunError(f"{path} does not fit or is damaged: {reason}; restore it, or train again in another folder")


def save(model: SmoothedClassifier | Classifier, folder: str | PathLike[str]) -> None:
    """Write a classifier into a folder from which ``rush.load`` and the commands load it.

    For a network that this library did not build, the weights are written and the code is not: ``rush.load`` then takes
    the network as ``classifier``.

    Args:
        model: a SmoothedClassifier, or a classifier that ``rush.load`` returned.
        folder: a new or empty folder. It gets ``model.json`` and ``model.safetensors``.

    Raises:
        InputError: ``model`` is something else.
        RunError: ``folder`` is not empty.
        WriteError: a file cannot be written.

    Example:
        >>> import rush, tempfile, torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> folder = tempfile.mkdtemp()
        >>> rush.save(rush.SmoothedClassifier(network, sigma=0.25, num_classes=10), folder)
        >>> rush.load(folder, classifier=network).sigma
        0.25
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists and is not an empty folder; give a new one")
    if isinstance(model, SmoothedClassifier):
        classifier, noise, execution, shape = model.classifier, model.noise, model.execution, model.image_shape
    elif isinstance(model, Classifier):
        classifier, noise, shape = model, None, model.kind.shape
        execution = plain_execution(device_of(model))
    else:
        raise InputError(
            f"a SmoothedClassifier or a classifier of this library can be saved, got {type(model).__name__}; wrap a "
            "network with rush.SmoothedClassifier"
        )
    built_from = classifier.spec if isinstance(classifier, Classifier) else None
    spec = built_from if isinstance(built_from, ClassifierSpec) else None
    if spec is None and noise is None:
        raise InputError("the classifier was not built by this library; wrap it with rush.SmoothedClassifier")
    if spec is not None and shape is None:
        raise InputError("the shape of the images is not known; give SmoothedClassifier(..., image_shape=(C, H, W))")
    if spec is not None and model.kind.classes is not None:
        spec = replace(spec, classes=model.kind.classes)
    if spec is not None:
        described, names = asdict(spec), spec.classes
    else:
        assert isinstance(model, SmoothedClassifier)
        described, names = {"module": f"{type(classifier).__module__}.{type(classifier).__qualname__}"}, model.classes
    make_folder(path)
    _write_model(path, classifier, described, names, noise, execution, shape, False)


def save_smoothed(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    noise: Noise | None,
    execution: Execution,
    image_shape: Sequence[int],
    resized: bool = False,
) -> None:
    """Write ``model.safetensors`` and then ``model.json``, whose presence marks the model as complete, into ``folder``.

    Args:
        folder: where the model is written.
        classifier: the base classifier.
        spec: the arguments that built it.
        noise: smoothing noise, None for a classifier that is not smoothed.
        execution: the forward of its judged samples.
        image_shape: (C, H, W) of the images that it was trained on.
        resized: whether these were resized from images of any size (``data.size``), as its inputs then are too.

    Raises:
        WriteError: A file cannot be written.
    """
    _write_model(folder, classifier, asdict(spec), spec.classes, noise, execution, image_shape, resized)


def _write_model(
    folder: Path,
    classifier: nn.Module,
    described: Mapping[str, Any],
    classes: Sequence[str],
    noise: Noise | None,
    execution: Execution,
    image_shape: Sequence[int] | None,
    resized: bool,
) -> None:
    """Write weights and description. ``described`` is the description of the base classifier."""
    classifier, ranges = without_ranges(classifier)
    save_weights(classifier, folder / "model.safetensors")
    tile = execution.tile if image_shape is None else execution.rows(image_shape)
    description = {
        "format": FORMAT,
        "classifier": dict(described),
        "noise": {"name": noise.name, "sigma": noise.sigma} if noise else {"name": NO_NOISE},
        "execution": {name: getattr(execution, name) for name in ("precision", *_FORWARD)} | {"tile": tile},
        "image_shape": None if image_shape is None else list(image_shape),
        "resized": resized,
        "classes": list(classes),
    }
    if ranges is not None:
        scales, zero_points = map(list, zip(*ranges, strict=True))
        description["activations"] = {"scales": scales, "zero_points": zero_points}
    write_json(folder / "model.json", description)


def save_plain(
    folder: Path,
    classifier: Classifier,
    spec: ClassifierSpec,
    device: str,
    image_shape: Sequence[int],
    resized: bool = False,
) -> None:
    """Write a classifier that is not smoothed, like ``save_smoothed``, with ``plain_execution`` as its forward."""
    save_smoothed(folder, classifier, spec, None, plain_execution(device), image_shape, resized)


def plain_execution(device: str) -> Execution:
    """Return the forward of a classifier that is not smoothed: float32 and uncompiled.

    Deterministic networks are attacked and judged in this form (``evaluation.model.PlainDefender``).
    """
    return Execution(device=device)


def load_plain(folder: Path, device: str) -> Classifier:
    """Return the classifier in ``folder`` that is not smoothed, on ``device`` and in evaluation mode.

    Raises:
        RunError: as for ``load_smoothed``, or the classifier is smoothed.
    """
    description = read_description(folder)
    if not _is_plain(description):
        raise RunError(f"{folder} holds a smoothed classifier; use rush.load")
    classifier = _load_classifier(folder, description)
    assert isinstance(classifier, Classifier)
    classifier.kind = ImageKind(tuple(description["image_shape"]), tuple(description["classes"]))
    plain_execution(device).place(classifier)
    return classifier.eval()


def load_smoothed(folder: Path, execution: Execution, classifier: nn.Module | None = None) -> SmoothedClassifier:
    """Return the smoothed classifier in ``folder``, placed by ``execution`` and in evaluation mode.

    Its forward is folded and compiled, and has the tile and the precision, as recorded with it.

    Args:
        folder: folder of the model.
        execution: gives the device.
        classifier: the network of a model whose code is not this library's. It gets the weights.

    Raises:
        RunError: A file is missing, damaged or written by a newer version, or the classifier is not smoothed.
    """
    description = read_description(folder)
    if _is_plain(description):
        raise RunError(
            f"{folder} holds a classifier that is not smoothed (smoothing.sigma = 0); rush.load returns it as it is, "
            "and rush.SmoothedClassifier adds noise to it"
        )
    recorded = description["execution"]
    recorded["channels_last"] |= torch.device(execution.device).type == "cuda"
    execution = in_precision(execution, recorded["precision"])
    execution = replace(execution, **{name: recorded[name] for name in _FORWARD})
    network = execution.place(_load_classifier(folder, description, classifier)).eval()
    if description["activations"] is not None:
        check_integers(execution.device)
        activations = description["activations"]
        ranges = list(zip(activations["scales"], activations["zero_points"], strict=True))
        try:
            network = with_ranges(network, ranges)
        except ModelError as error:
            raise damaged(folder / "model.json", error) from error
    return SmoothedClassifier(
        network,
        noise=make_noise(**description["noise"]),
        num_classes=len(description["classes"]),
        execution=execution,
        classes=description["classes"],
        image_shape=description["image_shape"],
    )


def _is_plain(description: Mapping[str, Any]) -> bool:
    return description["noise"]["name"] == NO_NOISE


def _load_classifier(folder: Path, description: Mapping[str, Any], classifier: nn.Module | None = None) -> nn.Module:
    """Return the classifier with its weights, allocated only after the header of the weights is known to fit."""
    module = description["classifier"].get("module")
    if (classifier is None) != (module is None):
        raise RunError(
            f"{folder} holds the weights of {printable(module)}, whose code is not this library's; give the network: "
            "rush.load(folder, classifier=network); commands take --model module:function of a function that returns it"
            if classifier is None
            else f"{folder} holds a network of this library; omit classifier"
        )
    if classifier is not None:
        load_weights(classifier, folder / "model.safetensors")
        return classifier
    spec, weights = ClassifierSpec(**description["classifier"]), folder / "model.safetensors"
    try:
        with torch.device("meta"):
            outline = spec.build()
        _check_weights(outline, weights)
        built = spec.build()
    except ConfigError as error:
        raise RunError(f"{folder / 'model.json'}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged(folder / "model.json", error) from error
    load_weights(built, weights)
    return built


@dataclass(frozen=True)
class ImageForm:
    """Form of a model's images: their ``shape`` (C, H, W), if known, and whether they were ``resized`` to it."""

    shape: tuple[int, int, int] | None
    resized: bool


def load(
    folder: str | PathLike[str],
    device: str = "auto",
    compiled: bool = True,
    classifier: nn.Module | None = None,
) -> SmoothedClassifier | Classifier:
    """Load the classifier of a run folder, of a folder with ``model.json`` and ``model.safetensors``, or a shipped one.

    Nothing is unpickled.

    Args:
        folder: a run folder, a folder with a saved model, the name of a shipped model (``SHIPPED``), or
            "hf://owner/name" or "hf://owner/name@revision" for a model on the Hugging Face hub.
        device: a device of torch, or "auto" for cuda, else mps, else cpu.
        compiled: whether a model that was certified with torch.compile runs compiled. False is for machines without a
            compiler. Compilation changes the last bits of the logits, so a few votes in many thousands may differ.
        classifier: the network of a saved model whose code is not this library's (``rush.save``). It gets the weights.

    Returns:
        The SmoothedClassifier, in the precision, tile and form that it was certified with. For a run without noise
        (``smoothing.sigma = 0``, e.g. adversarial training), it is the classifier itself: an nn.Module in evaluation
        mode from pixels (B, C, H, W) in [0, 1] to logits (B, K), in float32.

    Raises:
        RunError: The folder holds no model, or its files are damaged.
        ConfigError: The device is not available.

    Example:
        >>> import rush
        >>> model = rush.load("runs/digits")
        >>> model.sigma, model.num_classes, model.image_shape
        (0.25, 10, (1, 8, 8))
        >>> x = rush.load_images("digits", split="test")[:3].pixels()
        >>> model.predict(x, num_samples=100).shape
        torch.Size([3])
    """
    model = _model_folder(folder)
    description = read_description(model)
    if _is_plain(description):
        return load_plain(model, decide_execution(device).device)
    if description["execution"]["precision"] == "int8" and device == "auto":
        device = "cpu"
    smoothed = load_smoothed(model, decide_execution(device), classifier)
    if not compiled:
        smoothed.execution = replace(smoothed.execution, compile_mode="none")
    return smoothed


def load_pretrained(
    name: str | PathLike[str], device: str = "auto", classifier: nn.Module | None = None
) -> SmoothedClassifier:
    """Return ``load`` of a smoothed classifier, where "owner/name" that is not a folder stands for "hf://owner/name".

    Raises:
        RunError: as ``load``, or the classifier is not smoothed.
    """
    text = str(name)
    on_hub = text.count("/") == 1 and not text.startswith((HUB, ".", "/")) and not Path(name).is_dir()
    model = load(HUB + text if on_hub else name, device, classifier=classifier)
    if not isinstance(model, SmoothedClassifier):
        raise RunError(f"{name} holds a classifier that is not smoothed; rush.load loads it")
    return model


def image_form(folder: str | PathLike[str]) -> ImageForm:
    """Return the form of the images that the model in ``folder`` was trained on, not resized unless recorded."""
    description = read_description(_model_folder(folder))
    shape = description["image_shape"]
    return ImageForm(None if shape is None else tuple(shape), description["resized"])


def class_names(folder: str | PathLike[str]) -> tuple[str, ...]:
    """Return the names of the classes of the model in ``folder``."""
    return tuple(read_description(_model_folder(folder))["classes"])


def _model_folder(folder: str | PathLike[str]) -> Path:
    """Return the folder of a model's files: that of a run, the folder itself, or a shipped model's by its name."""
    path = Path(folder)
    if str(folder).startswith(HUB):
        return _from_hub(str(folder).removeprefix(HUB))
    if not path.is_dir():
        if str(folder) in SHIPPED:
            return _shipped(str(folder))
        raise RunError(
            f"{path} is not a directory; give a run folder such as runs/digits, or the name of a shipped model: "
            f"{', '.join(SHIPPED)}"
        )
    return path / "model" if (path / "model").is_dir() else path


def _from_hub(repository: str) -> Path:
    """Return the folder into which the files of "owner/name" or "owner/name@revision" are downloaded.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        RunError: the hub has no such model, or cannot be reached.
    """
    hub = optional("huggingface_hub", f"loading {HUB}{repository}")
    name, _, revision = repository.partition("@")
    try:
        return Path(
            hub.snapshot_download(name, revision=revision or None, allow_patterns=[*FILES, "model.safetensors"])
        )
    except (OSError, ValueError) as error:  # errors of the hub are among them
        raise RunError(f"{HUB}{repository} cannot be loaded: {one_line(error)}") from error


def _shipped(name: str) -> Path:
    """Return the folder of a shipped model: in an installed package, or in the source tree."""
    package = Path(__file__).parents[1]
    places = (package / "shipped" / name, package.parents[1] / "results" / name / "model")
    found = next((place for place in places if (place / "model.json").is_file()), None)
    if found is None:
        raise RunError(f"the files of the shipped model {name} are missing from this installation; install it again")
    return found
