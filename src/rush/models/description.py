"""The content of ``model.json``, validated field by field before a classifier is built from it."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rush.choices import CompileMode, NoiseName, Precision
from rush.data.labels import MAX_CLASSES, check_class_names
from rush.data.readers.entries import describe_kind
from rush.errors import RunError
from rush.runtime.lines import read_object

FORMAT = 1
NO_NOISE = "none"
_NOISES = (*get_args(NoiseName), NO_NOISE)
FILES = ("model.json", "config.json")
"""Names of the description: in a run folder, and where a hub expects it."""
_MOST_BYTES = 1 << 24
_MOST_VALUES = 1 << 28  # channels x height x width of an image
_MOST_ERRORS = 3
_MOST_ACTIVATIONS = 100_000

Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(ge=1e-30, le=1e6)]
Side = Annotated[int, Field(ge=1, le=65536)]
Channels = Annotated[int, Field(ge=1, le=1024)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Classifier(_Part):
    model_config = ConfigDict(extra="forbid")

    encoder: Annotated[str, Field(max_length=100)]
    width: Annotated[int, Field(ge=1, le=1024)]
    in_channels: Channels
    mean: list[Number]
    std: list[Positive]
    classes: Annotated[list[str], Field(min_length=2, max_length=MAX_CLASSES)]
    stem: Annotated[str, Field(max_length=100)] = "small"

    @model_validator(mode="after")
    def _fit_each_other(self) -> "_Classifier":
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} deviations for {self.in_channels} channels, expected one "
                "per channel"
            )
        check_class_names(self.classes, "classes")
        return self


class _External(_Part):
    """A network whose code is not this library's: it is given when the model is loaded."""

    model_config = ConfigDict(extra="forbid")

    module: Annotated[str, Field(max_length=1000)]


class _Noise(_Part):
    name: str
    sigma: Positive | None = None

    @model_validator(mode="after")
    def _has_a_deviation(self) -> "_Noise":
        if (self.sigma is None) != (self.name == NO_NOISE):
            raise ValueError(f"sigma = {self.sigma} of noise {self.name!r}; a noise has a sigma, {NO_NOISE!r} has none")
        return self


class _Execution(_Part):
    precision: Precision
    tile: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"]
    folded: bool = False
    compile_mode: CompileMode = "none"
    channels_last: bool | None = None  # older versions omit it, and mean True in bfloat16


class _Activations(_Part):
    """Scales of the activations of a network in 8-bit integers, in its order."""

    scales: Annotated[list[Positive], Field(min_length=1, max_length=_MOST_ACTIVATIONS)]
    zero_points: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(max_length=_MOST_ACTIVATIONS)]

    @model_validator(mode="after")
    def _one_each(self) -> "_Activations":
        if len(self.scales) != len(self.zero_points):
            raise ValueError(f"{len(self.scales)} scales and {len(self.zero_points)} zero points, expected as many")
        return self


class _Description(_Part):
    format: int
    classifier: _Classifier | _External
    noise: _Noise
    execution: _Execution
    image_shape: Annotated[list[Side], Field(min_length=3, max_length=3)] | None
    classes: Annotated[list[str], Field(min_length=2, max_length=MAX_CLASSES)] | None = None
    resized: bool = False
    activations: _Activations | None = None

    @model_validator(mode="after")
    def _fit_each_other(self) -> "_Description":
        if (self.activations is None) == (self.execution.precision == "int8"):
            raise ValueError("activations have scales in precision int8, and in no other")
        if isinstance(self.classifier, _External):
            if self.classes is None:
                raise ValueError("classes are missing, which a network of other code does not name")
            check_class_names(self.classes, "classes")
            return self
        if self.image_shape is None:
            raise ValueError("image_shape is missing")
        channels, height, width = self.image_shape
        if channels != self.classifier.in_channels or channels * height * width > _MOST_VALUES:
            raise ValueError(
                f"image_shape is {self.image_shape}, expected [{self.classifier.in_channels}, height, width], at most "
                f"{_MOST_VALUES} values"
            )
        if self.classes is not None and self.classes != self.classifier.classes:
            raise ValueError("classes differ from those of the classifier")
        return self


def read_description(folder: Path) -> dict[str, Any]:
    """Return the validated description of the model in ``folder``, with defaults for fields of newer versions.

    Raises:
        RunError: The file is missing, damaged, of an unknown format, or inconsistent.
    """
    file = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
    if not file.exists():
        raise RunError(f"{file} is missing: {folder} holds no finished model; train one with `rush run RECIPE`")
    content = _read_json(file)
    _check_version(content, file)
    try:
        description = _Description.model_validate(content).model_dump()
    except ValidationError as error:
        entries = error.errors(include_url=False, include_context=False)
        raise damaged(file, "; ".join(map(_explain, entries[:_MOST_ERRORS]))) from error
    execution = description["execution"]
    if execution["channels_last"] is None:
        execution["channels_last"] = execution["precision"] == "bfloat16"
    description["classes"] = description["classifier"].get("classes", description["classes"])
    return description


def damaged(file: Path, reason: object) -> RunError:
    """Return the error for a damaged file of a model, with the reason."""
    text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
    return RunError(f"{file} is damaged ({text}); restore it or fine-tune again")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise damaged(file, f"it is {describe_kind(file)}")
    try:
        return read_object(file, _MOST_BYTES)
    except (OSError, ValueError, MemoryError) as error:
        raise damaged(file, error) from error


def _check_version(content: dict[str, Any], file: Path) -> None:
    """Raise RunError for a description of another version, or one without format or noise."""
    noise = content.get("noise")
    if not isinstance(noise, Mapping) or "format" not in content:
        raise damaged(file, "it has no format and noise")
    if content["format"] != FORMAT:
        raise RunError(
            f"{file} has format {reprlib.repr(content['format'])}, this version reads {FORMAT}; update rush-smoothing"
        )
    if noise.get("name") not in _NOISES:
        raise RunError(
            f"{file} has noise {reprlib.repr(noise.get('name'))}, this version supports {', '.join(_NOISES)}; "
            "update rush-smoothing"
        )


def _explain(entry: Any) -> str:
    field = ".".join(str(part) for part in entry["loc"]) or "the whole"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{field}: {message}, given {_shortened(entry['input'])}"


def _shortened(value: object) -> str:
    """Return a short text for any value of a JSON file."""
    return "a very large integer" if isinstance(value, int) and value.bit_length() > 1000 else reprlib.repr(value)
