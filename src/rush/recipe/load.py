"""Recipes read from TOML, with single fields overridden and the result validated once."""

import reprlib
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rush.choices import TRAININGS, Stage
from rush.errors import ConfigError
from rush.recipe.schema import Recipe, closest, error_text

_MOST_BYTES, _LONGEST_LINE = 1 << 16, 4096  # of a recipe: the parser's memory grows with the square of a dotted key
_DEEPEST = 16  # nesting of tables and lists
_TRIED, _TRIED_AUDITED, _TRIED_VOTES = 10, 3, 1000  # images, audited images and votes of a trial
_LENGTHS = ("epochs", "minutes")  # of a training stage: a value of one replaces an inherited value of the other


def recipe_names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def recipe_text(name_or_path: str) -> str:
    """Return the TOML text of a shipped recipe or of a file.

    Raises:
        ConfigError: there is no such recipe or file, or the file cannot be read.
    """
    if name_or_path in recipe_names():
        return _shipped().joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
    path = Path(name_or_path)
    if path.suffix != ".toml" or not _is_file(path):
        hint = closest(name_or_path, recipe_names())
        raise ConfigError(
            f"no recipe {name_or_path[:200]!r}{hint}; shipped: {', '.join(recipe_names())}; or give the path of a "
            ".toml file"
        )
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        if max(map(len, content.split(b"\n"))) > _LONGEST_LINE:
            raise ValueError(f"it has a line of more than {_LONGEST_LINE} bytes")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}; it must be a short text file in UTF-8") from error


def recipe_headline(name: str) -> str:
    """Return the first comment line of a shipped recipe, a summary in one sentence."""
    return recipe_text(name).split("\n")[0].removeprefix("#").strip()


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), data: str | Sequence[str] | None = None) -> Recipe:
    """Read, override and validate a recipe.

    A recipe with a ``base`` (a shipped recipe, or a file in the same directory) lists only what it changes in that one.

    Args:
        name_or_path: name of a shipped recipe, or path of a TOML file.
        overrides: texts of the form ``section.field=value``, applied in order.
        data: one directory or several that replace ``data.root``.

    Raises:
        ConfigError: names the field, the value given and the values allowed.
    """
    values = recipe_values(name_or_path)
    return build_recipe(values, overrides, data, source=f"recipe {name_or_path}")


def recipe_values(name_or_path: str, _above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a recipe as written, merged over those of its ``base``.

    Raises:
        ConfigError: the text is not TOML, or its base does not name another recipe.
    """
    text = recipe_text(name_or_path)
    try:
        values = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # a ValueError also for an integer of thousands of digits
        raise ConfigError(f"recipe {name_or_path} is not valid TOML: {error or type(error).__name__}") from error
    _check_plain(values, f"recipe {name_or_path}")
    base = values.pop("base", None)
    if base is None:
        return values
    beside = Path(name_or_path).parent / str(base)
    source = str(beside) if _is_file(beside) else base
    if not isinstance(source, str) or source in (*_above, name_or_path):
        raise ConfigError(f"recipe {name_or_path}: base must name another recipe (given: {reprlib.repr(base)})")
    return _merged(recipe_values(source, (*_above, name_or_path)), values)


def build_recipe(
    values: dict[str, Any],
    overrides: Sequence[str] = (),
    data: str | Sequence[str] | None = None,
    source: str = "recipe",
) -> Recipe:
    """Apply ``overrides`` to plain ``values`` and validate them. Arguments and errors are those of ``load_recipe``.

    Args:
        source: name of the values in error messages.
    """
    for override in overrides:
        _apply(values, override)
    _drop_replaced_lengths(values, overrides)
    _check_plain(values, source)
    if data is not None and isinstance(values.setdefault("data", {}), dict):
        values["data"]["root"] = _absolute(data) if isinstance(data, str) else [_absolute(folder) for folder in data]
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {error_text(error, Recipe)}") from None


def quickened(recipe: Recipe) -> Recipe:
    """Return the trial of a recipe: an epoch of each training stage, three audited images, and ten everywhere else.

    It runs every stage on the same data, network and memory. Its figures mean nothing, which ``quick`` marks.
    """
    values = recipe.model_dump(mode="json")
    values |= {"name": f"{recipe.name}-quick", "quick": True}
    for stage in TRAININGS:
        if values[stage]["epochs"] != 0:
            epochs = 2 if values[stage].get("mode") == "linear-then-full" else 1
            values[stage] |= {"epochs": epochs, "minutes": None, "warmup_epochs": 0, "monitor_epochs": 1}
    values["finetune"]["head_epochs"] = min(1, values["finetune"]["head_epochs"])
    values["finetune"]["smoothadv"]["warmup_epochs"] = 0
    values["pretrain"]["noise"]["ramp_epochs"] = 0
    values["certify"] |= {"images": _TRIED, "radii": None}
    values["certify"]["num_estimation"] = min(_TRIED_VOTES, values["certify"]["num_estimation"])
    attack = {"images": _TRIED, "steps": 5, "eot_samples": [1, 4], "strong_steps": 0, "curve_images": 0}
    values["attack"] |= attack | {"max_votes": _TRIED_VOTES}
    cheap = "eot-1" if recipe.smoothing.sigma > 0 else None  # the default plan takes minutes
    values["audit"] |= {"images": _TRIED_AUDITED, "rung": cheap, "max_votes": _TRIED_VOTES}
    return build_recipe(values, source=f"the trial of {recipe.name}")


def with_epochs(recipe: Recipe, stage: Stage, epochs: int) -> Recipe:
    """Return ``recipe`` with ``epochs`` in place of the minutes of the training ``stage``."""
    values = recipe.model_dump(mode="json")
    values[stage] |= {"epochs": epochs, "minutes": None}
    return build_recipe(values, source=f"{epochs} epochs of {stage}")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` updated with the values of ``above``, section by section."""
    if any(name in above for name in _LENGTHS):
        below = {key: value for key, value in below.items() if key not in _LENGTHS}
    both = [key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def _check_plain(values: object, source: str) -> None:
    """Raise ConfigError for deeper nesting than any recipe has, and for integers of more than 64 bits."""
    pending = [(values, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _DEEPEST:
            raise ConfigError(
                f"{source}: tables and lists lie more than {_DEEPEST} deep in each other; recipes need few"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{source}: an integer has {value.bit_length()} bits, allowed are 64; give a smaller one")
        if isinstance(value, dict | list):
            pending += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]


def _is_file(path: Path) -> bool:
    """Return whether ``path`` is a file, and False for a text that the system does not accept as a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _shipped() -> Any:
    return resources.files("rush") / "recipes"


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must read section.field=value, e.g. pretrain.epochs=10")
    target: Any = values
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {key} is a single value, it has no fields")
    target[keys[-1]] = _parse_value(text.strip())


def _drop_replaced_lengths(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Remove the epochs of a stage whose minutes are overridden, and vice versa, unless both are overridden."""
    paths = {override.partition("=")[0].strip() for override in overrides}
    for stage in TRAININGS:
        overridden = [name for name in _LENGTHS if f"{stage}.{name}" in paths]
        if overridden and isinstance(values.get(stage), dict):
            values[stage] = {k: value for k, value in values[stage].items() if k not in _LENGTHS or k in overridden}


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
