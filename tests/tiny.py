"""A recipe whose whole run takes some seconds, parts of it, and what must be the same bits in two runs of it."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from rush.choices import STAGES, Stage
from rush.pipeline.stages import run_stage
from rush.recipe.load import load_recipe
from rush.recipe.schema import Recipe
from rush.records.folder import RunFolder

TINY = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
EVERY_RUN = tuple(stage for stage in STAGES if stage != "teach")
WRITTEN: dict[str, tuple[str, ...]] = {
    "teach": ("teach",),
    "finetune": ("checkpoints/finetune.pt", "checkpoints/finetune.previous.pt", "model"),
    "certify": ("certificates.tsv",),
    "attack": ("attacks", "attacks.tsv"),
    "audit": ("audit.json",),
}


def tiny(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe with single fields changed; its file is written into ``folder``."""
    return load_recipe(str(write_tiny(folder)), overrides)


def write_tiny(folder: Path) -> Path:
    """The tiny recipe as a file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.toml"
    file.write_text(TINY)
    return file


def run_tiny(folder: Path, *overrides: str, stages: tuple[Stage, ...] | None = None) -> RunFolder:
    """The run of the tiny recipe in ``folder``/run with these stages done, or all that it has."""
    run = RunFolder.create(folder / "run", tiny(folder, *overrides))
    for stage in run.recipe.stages if stages is None else stages:
        run_stage(run, stage)
    return run


def part_of(finished: Path, folder: Path, *lost: str) -> RunFolder:
    """A copy in ``folder`` of a finished run without these files, folders and all that these stages wrote."""
    shutil.copytree(finished, folder)
    for name in lost:
        for part in (*WRITTEN[name], f"stages/{name}.json") if name in WRITTEN else (name,):
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return RunFolder.open(folder)


def results(folder: Path) -> dict[str, object]:
    """Everything of a run that depends on nothing but recipe and machine: weights, votes, points; no times."""
    found = results_of_training(folder)
    for name in ("certificates.tsv", "attacks.tsv"):
        found[name] = without_time((folder / name).read_text())
    found["audit.json"] = (folder / "audit.json").read_text()
    for file in sorted((folder / "attacks").glob("*.npz")):
        with np.load(file) as stored:
            found[f"attacks/{file.name}"] = {
                key: (str(stored[key].dtype), stored[key].shape, stored[key].tobytes()) for key in stored.files
            }
    return found


def differing(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Names of the results that are not the same bits in both."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def results_of_training(folder: Path) -> dict[str, object]:
    """The weights that both trainings left."""
    names = ("checkpoints/encoder.safetensors", "model/model.safetensors")
    weights = {name: load_file(folder / name) for name in names}
    return {
        name: {key: (str(a.dtype), a.shape, a.tobytes()) for key, a in found.items()} for name, found in weights.items()
    }


def without_time(table: str) -> list[list[str]]:
    lines = [line.split("\t") for line in table.splitlines()]
    time = lines[0].index("time")
    return [line[:time] + line[time + 1 :] for line in lines]
