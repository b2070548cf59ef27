"""Parts of several benchmarks: their options and records, a run's smoothed classifier, labels, and cached arrays.

Every benchmark has the option --record: it then writes results/benchmarks/NAME.json, from which `make results` builds
the table NAME. A record holds the rows of the table and the conditions under which they were measured. A cell is a
text, a number, or an estimate with its bounds. None is an empty cell.
"""

import argparse
import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rush
from rush.data.images import ImageSet, stratified_subset
from rush.records.folder import commit, versions
from rush.reporting.wording import figure_text
from rush.runtime.execution import Execution
from rush.runtime.files import write_atomically, write_json
from rush.runtime.machine import machine
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise
from rush.statistics import Interval

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results/benchmarks"
Cell = str | int | float | Sequence[float] | None
Row = dict[str, Cell]


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/*.json for `make results`")
    return parser


def record(arguments: argparse.Namespace, name: str, rows: Sequence[Row], conditions: Mapping[str, Cell]) -> None:
    """Write the record ``name`` if the option --record was given.

    Args:
        arguments: of ``benchmark_parser``.
        name: of the record and its table.
        rows: cells by column.
        conditions: what the command does not say and a reader of the table must know, such as the noise.
    """
    if not arguments.record:
        return
    packages = versions()
    content = {
        "command": command(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "processor": machine()["processor"],
        "threads": torch.get_num_threads(),
        "versions": {name: packages[name] for name in ("python", "torch")},
        "conditions": conditions,
        "rows": rows,
    }
    write_json(RECORDS / f"{name}.json", content)
    print(f"recorded in {RECORDS / name}.json; `make results` writes the table")


def command(words: Sequence[str]) -> str:
    """Return the command line, with the name of its option in place of each path outside the repository."""
    result, option = [f"python benchmarks/{Path(words[0]).name}"], ""
    for word in words[1:]:
        option = word.lstrip("-").upper() if word.startswith("--") else option
        path = Path(word).resolve()
        if not path.is_relative_to(ROOT) and (path.exists() or Path(word).is_absolute()):
            result.append(option)
        elif word != "--record":
            result.append(word)
    return " ".join(result)


def printed(row: Row) -> Row:
    """Print ``row`` and return it."""
    print("; ".join(f"{name} {cell_text(value)}" for name, value in row.items() if value is not None), flush=True)
    return row


def cell_text(value: Cell) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else figure_text(value)
    estimate, *bounds = map(cell_text, value)
    return f"{estimate} [{', '.join(bounds)}]"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest of ``values``."""
    return float(np.median(values)), float(min(values)), float(max(values))


def in_percent(interval: Interval) -> tuple[float, float, float]:
    """Return a share or a difference of shares with its bounds, in percent with one decimal."""
    estimate, low, high = (round(100 * value, 1) for value in (interval.estimate, interval.low, interval.high))
    return estimate, low, high


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def smoothed_model(run: Path, compiled: bool = True) -> rush.SmoothedClassifier:
    model = rush.load(run, compiled=compiled)
    if not isinstance(model, rush.SmoothedClassifier):
        raise SystemExit(f"{run} holds a classifier that is not smoothed; give the run of a smoothed one")
    return model


def setting_of(smoothed: rush.SmoothedClassifier) -> Row:
    """Return noise, device and precision of a smoothed classifier, as conditions of a record."""
    execution = smoothed.execution
    return {
        "noise": smoothed.noise.name,
        "sigma": smoothed.sigma,
        "device": execution.device,
        "precision": execution.precision,
    }


def benchmark_images(data: Path, count: int, seed: int = 0) -> ImageSet:
    """Return a stratified subset of the test images of CIFAR-10, drawn by ``seed``."""
    test = rush.load_images("cifar10", split="test", root=data)
    return stratified_subset(test, count, stream(seed, "benchmark", "images"))


def in_another_form(
    smoothed: rush.SmoothedClassifier, execution: Execution, noise: Noise | None = None
) -> rush.SmoothedClassifier:
    """Return a copy of a smoothed classifier that runs by ``execution``, under another noise if one is given."""
    network = copy.deepcopy(smoothed.classifier).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return rush.SmoothedClassifier(
        execution.place(network),
        noise=noise or smoothed.noise,
        num_classes=smoothed.num_classes,
        execution=execution,
        classes=smoothed.classes,
        image_shape=smoothed.image_shape,
    )


def labels_of(images: rush.ImageSet) -> Tensor:
    """Labels (N,) of a set that has them, as the test split of CIFAR-10 does."""
    assert images.labels is not None
    return images.labels


def save_arrays(path: Path, **arrays: NDArray[np.generic] | float) -> None:
    def write(target: Path) -> None:
        with open(target, "wb") as file:  # numpy would add a suffix to a name
            np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})

    write_atomically(path, write)
