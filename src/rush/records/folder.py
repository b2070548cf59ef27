"""The run folder, the interface between stages: recipe, provenance, log and one summary per finished stage."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rush.choices import STAGES, TRAININGS, Stage
from rush.errors import RunError, WriteError
from rush.recipe.load import build_recipe, with_epochs
from rush.recipe.schema import STAGE_SECTIONS, Recipe
from rush.records.log import append_event, read_events
from rush.records.record import Record, with_format
from rush.runtime.files import make_folder, one_process, write_bytes, write_json
from rush.runtime.machine import machine

_FREE_FIELDS = (
    ("data", "root"),
    ("execution", "checkpoint_minutes"),
    ("execution", "on_nonfinite"),
)
# Fields that were added later, with the value that earlier runs had, whatever the default is now. At that value they
# are not part of a fingerprint, so that older checkpoints are still accepted.
_LATER_FIELDS = (
    ("execution", "deterministic", True),
    ("smoothing", "noise", "gaussian"),
    ("certify", "bound", None),
    ("certify", "stopping", "test"),
    ("data", "test_images", 0),
    ("teach", "epochs", 0),
)
REPEATABLE: tuple[Stage, ...] = ("certify", "attack", "audit")
"""The stages that can be repeated with other settings, because no weights follow from them."""
_RESULTS: dict[Stage, tuple[str, ...]] = {
    "certify": ("certificates.tsv", "certificates.parts"),
    "attack": ("attacks", "attacks.tsv"),
    "audit": ("audit.json", "audit-*.json"),
}
_EARLIER = "earlier"
_PRETRAINED = ("checkpoints/encoder.safetensors", "stages/pretrain.json")
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pyarrow", "pillow", "safetensors")


class RunFolder:
    """A folder that holds everything about one run of one recipe.

    ``recipe.json`` is the resolved recipe. ``provenance.json`` holds everything else that the result depends on,
    ``log.jsonl`` the events, and ``stages/<stage>.json`` the figures of a stage once it is finished. When the number of
    epochs of a training stage limited by minutes is known, the recipe holds it, and the provenance holds the minutes.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.loaded: dict[str, Any] = {}  # the images of the splits that this process has read, for the next stage

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """Return the run of ``recipe`` in ``path``, new or resumed.

        Fields of stages that have not begun may still change. A training stage that was begun with the same minutes
        keeps its number of epochs.

        Raises:
            RunError: a stage that has begun has different values, or ``path`` is a file, is not writable or holds
                something other than a run.
        """
        if path.is_file():
            raise RunError(f"{path} is a file; give a folder with --out")
        # An interrupted first write of the recipe leaves nothing but its partial file.
        used = path.is_dir() and any(entry.name != ".recipe.json.partial" for entry in path.iterdir())
        if used and not (path / "recipe.json").exists():
            raise RunError(
                f"{path} is not empty and holds no recipe.json, so it is not a run folder; give another --out"
            )
        recipe = _settled(recipe, path)
        run = cls(path, recipe)
        if (path / "recipe.json").exists():
            run._check_unchanged(cls.open(path).recipe)
        try:
            run._write("recipe.json", recipe.model_dump(mode="json"))
        except WriteError as error:
            raise RunError(
                f"run folder {path} cannot be written: {error.reason}; give another --out, or free space or allow "
                "writing there"
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Return the run in ``path``. Raises: RunError if there is none or its recipe cannot be read."""
        file = path / "recipe.json"
        if not file.is_file():
            raise RunError(
                f"{path} holds no recipe.json, so it is not a run folder; start one with `rush run RECIPE --out {path}`"
            )
        values = _read_object(file, file.name)
        for section, name, earlier in _LATER_FIELDS:
            if isinstance(values.get(section), dict):
                values[section].setdefault(name, earlier)
        return cls(path, _settled(build_recipe(values, source=str(file)), path))

    def branch(self, path: Path, recipe: Recipe) -> "RunFolder":
        """Return a run of ``recipe`` in ``path``, new or resumed, that begins with the pre-trained encoder of this one.

        The name of ``recipe``, the compilation and the way in which samples are judged may differ.

        Raises:
            RunError: this run is not pre-trained, ``recipe`` changes that, or ``path`` holds something else.
        """
        self.require("pretrain")
        recipe = _settled(recipe, self.path, ("pretrain",))
        before, after = _as_trained(self.recipe), _as_trained(recipe)
        changed = [field for field in _changed_fields(before, after, "pretrain") if field != "name"]
        if changed:
            raise RunError(
                f"{self.path} was pre-trained with different values of {', '.join(changed)}; a run that begins with "
                "its encoder may change only later stages: keep them, or start a new run with `rush run`"
            )
        run = RunFolder.create(path, recipe)
        if run.finished("pretrain") is None:
            provenance, budget = _read_provenance(self.path), self.budget("pretrain")
            provenance.pop("budgets", None)  # the branch has its own for fine-tuning
            run._write("provenance.json", provenance | ({"budgets": {"pretrain": budget}} if budget else {}))
            for name in _PRETRAINED:  # the last one marks pre-training as finished
                write_bytes(path / name, (self.path / name).read_bytes())
        return run

    def set_aside(self, stage: Stage) -> Path | None:
        """Move the results of ``stage``, one of ``REPEATABLE``, and of later stages into ``earlier/NUMBER``.

        Returns:
            That folder, or None if there is nothing to move.
        """
        stages = STAGES[STAGES.index(stage) :]
        # The markers of finished stages move first, so that an interruption leaves no marker without its results.
        names = [f"stages/{later}.json" for later in reversed(stages)]
        names += [name for later in stages for name in _RESULTS[later]]
        files = [file for name in names for file in sorted(self.path.glob(name))]
        if not files:
            return None
        with self.alone():
            taken = [int(entry.name) for entry in (self.path / _EARLIER).glob("*") if entry.name.isdecimal()]
            folder = self.path / _EARLIER / str(max(taken, default=0) + 1)
            make_folder(folder / "stages")
            self.log("set aside", stage=stage, folder=str(folder.relative_to(self.path)))
            write_bytes(folder / "recipe.json", (self.path / "recipe.json").read_bytes())
            for file in files:
                os.replace(file, folder / file.relative_to(self.path))
        return folder

    def fingerprint(self, stage: Stage) -> str:
        """Return as JSON every recipe field that determines what ``stage`` computes, including those of earlier stages.

        For a training stage limited by minutes it holds the minutes, before and after the number of epochs is known.
        """
        values, budget = _deciding_values(self.recipe), self.budget(stage)
        if budget is not None:
            values[stage] |= {"epochs": None, "minutes": budget["minutes"]}
        for training in TRAININGS:
            if values[training]["minutes"] is None:
                del values[training]["minutes"]  # so that checkpoints of versions without the field match
        names = [name for earlier in STAGES[: STAGES.index(stage) + 1] for name in STAGE_SECTIONS[earlier]]
        return json.dumps({name: values[name] for name in names if values[name] != {}}, sort_keys=True)

    def budget(self, stage: Stage) -> dict[str, Any] | None:
        """Return the minutes of a training stage, the ``epochs`` that fit by its trial, and the figures of the trial.

        It is None if the number of epochs does not follow from minutes.
        """
        return _budgets(self.path).get(stage)

    def settle(self, stage: Stage, budget: Mapping[str, Any]) -> None:
        """Record the number of epochs of a training stage limited by minutes.

        ``budget``, with the minutes, the epochs and their derivation, goes into the provenance. From then on the recipe
        has only the epochs.
        """
        self._write(
            "provenance.json", {**_read_provenance(self.path), "budgets": {**_budgets(self.path), stage: dict(budget)}}
        )
        self.recipe = with_epochs(self.recipe, stage, budget["epochs"])
        self._write("recipe.json", self.recipe.model_dump(mode="json"))

    def log(self, event: str, **values: Any) -> None:
        """Append one event to ``log.jsonl`` and flush it. A partial last line left by a crash is truncated first.

        Raises:
            RunError: the last line is not the beginning of an event.
            WriteError: the file cannot be written.
        """
        append_event(self.path / "log.jsonl", {"event": event, "time": now(), **values})

    def finished(self, stage: Stage) -> dict[str, Any] | None:
        """Return the figures of ``stage`` if it is finished, else None."""
        file = self.path / "stages" / f"{stage}.json"
        return _read_object(file, "stages") if file.exists() else None

    def begin(self, stage: Stage) -> None:
        """Log that an attempt at ``stage`` begins."""
        self.log("started", stage=stage, commit=commit(), **with_format("log.jsonl", {}))

    def events(self, event: str, stage: str) -> list[dict[str, Any]]:
        """Return the logged events of one kind and stage in their order, without a partial last line.

        Raises: RunError naming a line that is not an event.
        """
        events = read_events(self.path / "log.jsonl").values()
        return [entry for entry in events if entry["event"] == event and entry.get("stage") == stage]

    def finish(self, stage: Stage, seconds: float, **figures: Any) -> None:
        """Record that ``stage`` is finished, with its figures and the ``seconds`` that it took over all attempts."""
        started = self.events("started", stage)  # none if the log was deleted
        values = {
            "stage": stage,
            "started": started[0].get("time") if started else None,
            "finished": now(),
            "seconds": seconds,
            "commit": commit(),
            **figures,
        }
        write_json(self.path / "stages" / f"{stage}.json", with_format("stages", values))
        self.log("finished", stage=stage, seconds=seconds)

    def require(self, stage: Stage) -> dict[str, Any]:
        """Return the figures of ``stage``. Raises: RunError with the command to run if it is not finished."""
        figures = self.finished(stage)
        if figures is None:
            raise RunError(f"{self.path}: stage {stage} is not finished; run `rush {stage} {self.path}` first")
        return figures

    def record_provenance(self, execution: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write ``provenance.json``, or compare it with the current execution and input images.

        Finished parts and parts still to come must be computed by one forward on one data set.

        Raises:
            RunError: execution or images differ from those that the run was started with.
        """
        current = {"seed": self.recipe.seed, **execution, "data": dict(data)}
        before = _read_provenance(self.path)
        if before:
            current |= {"budgets": before["budgets"]} if "budgets" in before else {}
            earlier_data = before["data"]
            before["data"] = {split: earlier_data.get(split, value) for split, value in data.items()}
            differing = [key for key, value in current.items() if before.get(key, value) != value]
            if differing:
                changes = "; ".join(f"{key}: was {before.get(key)}, now {current[key]}" for key in differing)
                raise RunError(
                    f"{self.path} was started with different settings ({changes}); restore them or use another --out"
                )
            current["data"] = {**earlier_data, **data}
        self._write("provenance.json", {"commit": commit(), "versions": versions(), "machine": machine(), **current})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder for this process within the context. Raises: RunError if another process holds the lock."""
        with ExitStack() as locks:
            try:
                locks.enter_context(one_process(self.path, wait=False))
            except BlockingIOError as error:
                raise RunError(
                    f"another process is at work in {self.path}; wait for it or give another --out"
                ) from error
            yield

    def recorded(self, name: str) -> Any:
        """Return a value of ``provenance.json``, or None before the first stage has written it."""
        return _read_provenance(self.path).get(name)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write ``values`` with their format number to the file ``name``."""
        write_json(self.path / name, with_format(name, values))

    def _check_unchanged(self, before: Recipe) -> None:
        for stage in STAGES:
            begun = [later for later in STAGES[STAGES.index(stage) :] if self._begun(later)]
            changed = _changed_fields(before, self.recipe, stage)
            if begun and changed:
                again = f", or begin it again with `{self._redo(begun[0], changed)}`" if stage in REPEATABLE else ""
                raise RunError(
                    f"{self.path} already holds stage {begun[0]} made with different values of {', '.join(changed)}; "
                    f"nothing was overwritten: use another --out, or give the values it was begun with{again}"
                )

    def _redo(self, stage: Stage, changed: Sequence[str]) -> str:
        """Return the command that repeats ``stage`` with the values of this recipe in the ``changed`` fields."""
        values = self.recipe.model_dump(mode="json")
        overrides = (f"--set {shlex.quote(f'{field}={_override(values, field)}')}" for field in changed)
        return f"rush {stage} {shlex.quote(str(self.path))} --redo {' '.join(overrides)}"

    def _begun(self, stage: Stage) -> bool:
        traces = {
            "pretrain": ("checkpoints/pretrain.pt", "checkpoints/encoder.safetensors"),
            "teach": ("checkpoints/teach-[12].pt", "teach"),
            "finetune": ("checkpoints/finetune.pt", "model/model.json"),
            **_RESULTS,
        }[stage]
        has_traces = any(any(self.path.glob(trace)) for trace in traces)
        return has_traces or self.finished(stage) is not None or self.budget(stage) is not None


def _override(values: Mapping[str, Any], field: str) -> str:
    """Return the value of ``section.name`` as --set takes it."""
    section, _, name = field.partition(".")
    value = values[section][name] if name else values[section]
    return value if isinstance(value, str) else json.dumps(value)


def _read_object(file: Path, kind: str) -> dict[str, Any]:
    """Return the JSON object in ``file``. Raises: RunError if it is damaged or has a newer format."""
    return dict(Record.read(file, "restore it or start again in another folder", kind).fields)


def now() -> str:
    """Return the current time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that results depend on."""
    result = {"python": platform.python_version()}
    for name in ("rush-smoothing", *_PACKAGES):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed as a package"
    return result


def commit() -> str | None:
    """Return the git commit of this package's source tree, with ``-dirty`` if files differ, or None without one."""
    source = Path(__file__).resolve().parent
    top = _git(source, "rev-parse", "--show-toplevel")
    if not top or not (Path(top) / "src" / "rush" / "__init__.py").exists():
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def _read_provenance(path: Path) -> dict[str, Any]:
    """Return the content of ``provenance.json`` in ``path``, empty before the first stage has written it."""
    file = path / "provenance.json"
    return _read_object(file, file.name) if file.exists() else {}


def _budgets(path: Path) -> dict[Stage, dict[str, Any]]:
    """Return the budgets that the provenance of the run folder ``path`` records, by training stage."""
    budgets = _read_provenance(path).get("budgets", {})
    try:
        for budget in budgets.values():
            float(budget["minutes"]), int(budget["epochs"])
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        file = path / "provenance.json"
        raise RunError(f"{file}: its budgets are damaged; restore it or start again in another folder") from error
    return {stage: dict(budgets[stage]) for stage in TRAININGS if stage in budgets}


def _settled(recipe: Recipe, path: Path, stages: Iterable[Stage] = TRAININGS) -> Recipe:
    """Return ``recipe`` with the values that it leaves open, as the run begun in ``path`` has them.

    These are the epochs of those ``stages`` that are limited by minutes, and the tile if it is "auto".

    Raises: RunError if a stage was begun with different minutes.
    """
    tile = _read_provenance(path).get("tile", "auto")
    if recipe.execution.tile == "auto" != tile:
        recipe = recipe.replace(execution=recipe.execution.replace(tile=tile))
    for stage in stages:
        minutes = recipe.training(stage).minutes
        budget = None if minutes is None else _budgets(path).get(stage)
        if minutes is None or budget is None:
            continue
        begun, epochs = float(budget["minutes"]), int(budget["epochs"])
        if minutes != begun:
            raise RunError(
                f"{path} was begun with {stage}.minutes = {begun:g}, which gave {epochs} epochs, and not with "
                f"{minutes:g}; nothing was overwritten: use another --out, or keep {stage}.minutes"
            )
        recipe = with_epochs(recipe, stage, epochs)
    return recipe


def _deciding_values(recipe: Recipe) -> dict[str, Any]:
    """Return all fields that a result depends on.

    The path of the data is not among them, because ``provenance.json`` holds the fingerprint of the images.
    """
    values = recipe.model_dump(mode="json")
    for section, name in _FREE_FIELDS:
        values[section].pop(name)
    for section, name, earlier in _LATER_FIELDS:
        if values[section][name] == earlier:
            del values[section][name]
    if not recipe.teach.rounds:
        values["teach"] = {}
    return values


def _as_trained(recipe: Recipe) -> Recipe:
    """Return ``recipe`` without the values that a run may change which begins with a trained encoder."""
    execution = recipe.execution
    precision = "auto" if execution.precision == "int8" else execution.precision
    execution = execution.replace(precision=precision, compile="auto", compile_training="none", tile="auto")
    return recipe.replace(execution=execution)


def _changed_fields(before: Recipe, after: Recipe, stage: Stage) -> list[str]:
    old, new = _deciding_values(before), _deciding_values(after)
    changed = []
    for section in STAGE_SECTIONS[stage]:
        if not isinstance(old[section], dict):
            changed += [section] if old[section] != new[section] else []
            continue
        keys = {**old[section], **new[section]}
        changed += [f"{section}.{key}" for key in keys if old[section].get(key) != new[section].get(key)]
    return changed
