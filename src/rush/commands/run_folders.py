"""Run folders on the command line: options that commands share, opening a run, and lines on its progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rush.commands.terminal import print_notes
from rush.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rush.choices import Stage
    from rush.recipe.schema import Recipe
    from rush.records.folder import RunFolder

Data = Annotated[
    list[Path] | None,
    Parameter(help="Folder with the archives or shards of the data set; repeatable, shards of all folders are joined."),
]
Overrides = Annotated[
    list[str] | None, Parameter(name="--set", help="Override one recipe field, e.g. pretrain.epochs=10; repeatable.")
]
Redo = Annotated[
    bool,
    Parameter(
        negative=(),
        help="Begin the stage again, e.g. with other values of --set. The results so far, also of later stages, are "
        "moved to the folder earlier/ of the run.",
    ),
]


def create_run(
    recipe: str, out: Path | None, data: list[Path] | None, overrides: list[str] | None, quick: bool = False
) -> RunFolder:
    """Create the run of a recipe in ``out``, by default ``runs/NAME``, or open the run folder that ``recipe`` names.

    With ``quick`` it is the run of the recipe's trial.

    Raises:
        ConfigError: The recipe is not valid, or is a run folder and ``out`` is given.
        RunError: The folder holds something else, or finished stages made with other values.
    """
    from rush.recipe.load import load_recipe, quickened
    from rush.records.folder import RunFolder

    if Path(recipe, "recipe.json").is_file():
        if out is not None:
            raise ConfigError(f"{recipe} is already a run folder; omit --out {out}, or give a recipe")
        if quick:
            raise ConfigError(f"--quick is for recipes, and {recipe} is a run folder; omit it, or give a recipe")
        return open_run(Path(recipe), data, overrides)
    resolved = load_recipe(recipe, overrides or (), data_roots(data))
    resolved = quickened(resolved) if quick else resolved
    return _in_turn(lambda: RunFolder.create(out or Path("runs") / resolved.name, resolved))


def open_run(
    folder: Path, data: list[Path] | None = None, overrides: list[str] | None = None, redo: Stage | None = None
) -> RunFolder:
    """Open a run folder, and change its recipe by ``data`` and ``overrides``.

    The results of the stage ``redo`` and of later ones are set aside first, so that the stage is run again.
    """
    from rush.records.folder import RunFolder

    run = RunFolder.open(folder)
    if data is None and not overrides and redo is None:
        return run
    recipe = _changed(run, data, overrides)

    def changed() -> RunFolder:
        aside = None if redo is None else run.set_aside(redo)
        if aside is not None:
            print_notes([f"{redo}: the results so far are in {aside}"])
        return RunFolder.create(folder, recipe)

    return _in_turn(changed)


def branch_run(folder: Path, out: Path, data: list[Path] | None, overrides: list[str] | None) -> RunFolder:
    """Create a run in ``out`` that begins with the encoder of the run in ``folder``."""
    from rush.records.folder import RunFolder

    run = RunFolder.open(folder)
    return _in_turn(lambda: run.branch(out, _changed(run, data, overrides)))


def _changed(run: RunFolder, data: list[Path] | None, overrides: list[str] | None) -> Recipe:
    from rush.recipe.load import build_recipe

    values = run.recipe.model_dump(mode="json")
    return build_recipe(values, overrides or (), data_roots(data), str(run.path / "recipe.json"))


def data_roots(paths: list[Path] | None) -> str | list[str] | None:
    """Return one folder as text and several as a list, as ``recipe.json`` stores them."""
    if paths is None:
        return None
    return str(paths[0]) if len(paths) == 1 else list(map(str, paths))


def print_once(text: str) -> None:
    """Print one line on standard error, in the first process only."""
    if rank_of_process() == 0:
        print_notes([text])


def refuse_existing(path: Path, option: str = "out", what: str = "file") -> None:
    """Raise RunError if ``path``, which ``option`` names, exists: nothing is overwritten."""
    if path.exists():
        raise RunError(f"{path} exists; give another {what} to --{option}")


def rank_of_process() -> int:
    """Return the number of this process among those that torchrun started, without importing torch."""
    return int(os.environ.get("RANK", "0"))


def several_processes() -> bool:
    """Return whether torchrun started more than one process, without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _in_turn(work: Callable[[], RunFolder]) -> RunFolder:
    """Return ``work()``, called in one process after another: all of them write the same file."""
    if not several_processes():
        return work()
    from rush.runtime.distributed import in_turn

    return in_turn(work)
