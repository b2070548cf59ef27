"""The store of the full-size run: its clock, its items in a work folder, and the few files that it publishes."""

import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rush.errors import RunError
from rush.runtime.files import write_bytes, write_json, write_text

LAST_START = 0.9  # share of the minutes after which nothing starts; the allotments fill it, the rest is a reserve
_RESULTS, _TABLES = "results.json", "tables.tar.gz"
T = TypeVar("T")


@dataclass
class Clock:
    """The seconds of one phase, over all of its starts.

    Attributes:
        minutes: what the phase may take.
        used: seconds of earlier starts.
    """

    minutes: float
    used: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self.used + time.monotonic() - self._began

    @property
    def until_last_start(self) -> float:
        """Seconds after which nothing starts any more, negative when they are over."""
        return LAST_START * 60 * self.minutes - self.elapsed

    def allotted(self, share: float, shares: float) -> float:
        """Return the seconds of an item with this ``share`` of the ``shares`` of all items that are left."""
        return max(0.0, self.until_last_start) * share / shares


def in_rounds(
    jobs: dict[str, Callable[[list[int]], T]], *, wanted: int, minimum: int, seconds: float, clock: Clock
) -> tuple[int, dict[str, list[T]]]:
    """Run all ``jobs`` on the first images, round by round, for about ``seconds``.

    Every job has seen the same images when a round ends, and a round that the last start cuts short is dropped. The
    first round takes ``minimum`` images, a later one at most as many as were done before, and no more than the seconds
    that are left suffice for.

    Args:
        jobs: functions of the positions of a round's images.
        wanted: number of images at most.
        minimum: number of images of the first round.
        seconds: time for all rounds.
        clock: the clock of the phase.

    Returns:
        The number of images, 0 where not even the first round was finished, and the answers of each job by round.
    """
    answers: dict[str, list[T]] = {name: [] for name in jobs}
    began, done, size = clock.elapsed, 0, min(minimum, wanted)
    while size > 0:
        rows, found = list(range(done, done + size)), {}
        for name, job in jobs.items():
            if clock.until_last_start < 0:
                return done, answers
            found[name] = job(rows)
        for name, answer in found.items():
            answers[name].append(answer)
        done += size
        spent = clock.elapsed - began
        size = min(done, wanted - done, int((seconds - spent) / max(spent / done, 1e-9)))
    return done, answers


class Store:
    """Finished items in ``work``, and what is published of them in ``out``.

    ``out`` holds ``plan.json``, ``results.json`` (all items so far), ``results.md``, ``tables.tar.gz`` (a table per
    model and method, with a line per image) and weights in float16, in shards. No file has more than ``max_file_mb``
    (2**20 bytes each), and there are at most ``max_files``; what does not fit is named in ``results.json``.
    """

    def __init__(self, out: Path, work: Path, max_file_mb: float, max_files: int) -> None:
        self.out, self.work = out, work
        self._most_bytes, self._most_files = int(max_file_mb * 2**20), max_files

    def begin(self, conditions: dict[str, Any]) -> None:
        """Note what the run is of. Raises: RunError where ``work`` holds a run of something else."""
        file = self.work / "conditions.json"
        if not file.exists():
            write_json(file, conditions)
            return
        before = json.loads(file.read_text())
        differing = [name for name in conditions if before.get(name) != conditions[name]]
        if differing:
            told = "; ".join(f"{name}: was {before.get(name)}, now {conditions[name]}" for name in differing)
            raise RunError(
                f"{self.work} holds a run under other conditions ({told}); give another --out or restore them"
            )

    def item(self, name: str) -> dict[str, Any] | None:
        """Return the finished item ``name``, done, omitted or failed; None when it is not finished."""
        file = self.work / "items" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, name: str, figures: dict[str, Any]) -> None:
        """Keep the figures of an item, which is then finished."""
        write_json(self.work / "items" / f"{name}.json", figures)

    def table(self, name: str, text: str) -> None:
        """Keep the lines of one model and method."""
        write_text(self.work / "tables" / name, text)

    def used(self, phase: str) -> float:
        """Return the seconds that earlier starts of ``phase`` have used."""
        file = self.work / f"{phase}-seconds.json"
        return float(json.loads(file.read_text())) if file.exists() else 0.0

    def keep_time(self, phase: str, clock: Clock) -> None:
        """Keep how long ``phase`` has taken so far."""
        write_json(self.work / f"{phase}-seconds.json", clock.elapsed)

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_json(self.out / "plan.json", plan)

    def plan(self) -> dict[str, Any] | None:
        file = self.out / "plan.json"
        return json.loads(file.read_text()) if file.exists() else None

    def publish(self, items: Sequence[str], page: str) -> None:
        """Write the results so far to ``out``: figures, the page, the tables, and the weights that fit."""
        found = {name: item for name in items if (item := self.item(name)) is not None}
        tables = sorted((self.work / "tables").glob("*")) if (self.work / "tables").exists() else []
        packed = _packed(tables)
        left_out = [] if len(packed) <= self._most_bytes else [f"{_TABLES}: {len(packed):,} bytes"]
        if not left_out:
            write_bytes(self.out / _TABLES, packed)
        files = sum(1 for file in self.out.iterdir() if not file.name.startswith("weights-") and file.is_file())
        room = self._most_files - files - sum(not (self.out / name).exists() for name in (_RESULTS, "results.md"))
        for weights in sorted((self.work / "weights").glob("*.safetensors")):
            shards = _shards(load_file(weights), self._most_bytes)
            if len(shards) > room:
                left_out.append(f"{weights.name}: {len(shards)} files")
                continue
            room -= len(shards)
            for number, shard in enumerate(shards, start=1):
                write_bytes(self.out / f"weights-{weights.stem}-{number}-of-{len(shards)}.safetensors", shard)
        write_text(self.out / "results.md", page)
        write_json(self.out / _RESULTS, {"items": found, "left_out": left_out})

    def keep_weights(self, name: str, module: nn.Module) -> None:
        """Keep the weights of ``module`` in float16, to be published."""
        halves = {key: _halved(tensor) for key, tensor in module.state_dict().items()}
        write_bytes(self.work / "weights" / f"{name}.safetensors", save(halves))


def load_shards(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the published weights ``name``, in float32, from their shards in ``folder``."""
    shards = sorted(folder.glob(f"weights-{name}-*-of-*.safetensors"))
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _halved(tensor: Tensor) -> Tensor:
    found = tensor.detach().cpu().contiguous()
    return found.to(torch.float16) if found.is_floating_point() else found


def _shards(tensors: dict[str, Tensor], most_bytes: int) -> list[bytes]:
    """The tensors as safetensors files, each of at most ``most_bytes`` unless a single tensor has more."""
    parts: list[dict[str, Tensor]] = [{}]
    size = header = 4096  # what a file holds beside the tensors is far less
    for name, tensor in tensors.items():
        added = tensor.nbytes + 256
        if parts[-1] and size + added > most_bytes:
            parts, size = [*parts, {}], header
        parts[-1][name] = tensor
        size += added
    return [save(part) for part in parts]


def _packed(files: Sequence[Path]) -> bytes:
    """A compressed archive of ``files``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in files:
            archive.add(file, arcname=file.name)
    return buffer.getvalue()
