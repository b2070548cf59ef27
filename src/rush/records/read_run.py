"""Values of a whole run, read from its folder for report and comparison."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rush.auditing.report import AuditReport
from rush.certification.certificates import Certificates
from rush.certification.sequential import UNDECIDED
from rush.choices import CERTIFIED_NORM, STAGES, Norm, Stage
from rush.errors import RunError
from rush.records.attacks import read_attacks, read_samples
from rush.records.audit import read_audit
from rush.records.certificates import TABLE, read_certificates
from rush.records.embedding import Embedding, read_embedding
from rush.records.ladder import Ladder, Sample
from rush.records.log import damaged_event, read_events
from rush.records.record import Record, damaged
from rush.runtime.lines import printable

# Numbers that the record of a stage may contain.
_COST_FIELDS = (
    "passes_per_image",
    "forward_passes_per_image",
    "images_per_second",
    "votes_per_image",
    "peak_memory",
    "joules",
)
NO_FIGURES = ("event", "time", "stage", "epoch")
"""Fields of an event of live figures that are not figures."""
Logged = TypeVar("Logged", "Epoch", "Watched")


@dataclass(frozen=True)
class StageRecord:
    """The record of a finished stage, ``stages/<stage>.json``, with the fields that every stage has checked."""

    stage: Stage
    seconds: float
    finished: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Epoch:
    """One epoch of training as logged: number, mean loss, wall-clock seconds, learning rate of the last step.

    Logs of older versions have no learning rate.
    """

    stage: str
    number: int
    loss: float
    seconds: float
    learning_rate: float | None = None


@dataclass(frozen=True)
class Watched:
    """Live figures after an epoch of training, shares of the held-out images.

    They are "knn", "linear" and "accuracy", each with the suffix "_noisy" if it is measured on noisy images.
    """

    stage: str
    number: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class RunResults:
    """The content of a run folder.

    ``certificates``, ``ladder`` and ``audit`` are None until their stage is finished, and ``certificates`` also if
    there is nothing to certify (``plain``).
    """

    folder: Path
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    classes: tuple[str, ...]
    stages: Mapping[Stage, StageRecord]
    epochs: tuple[Epoch, ...]
    certificates: Certificates | None
    ladder: Ladder | None
    audit: AuditReport | None
    watched: tuple[Watched, ...] = ()
    embedding: Embedding | None = None

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def quick(self) -> bool:
        """Whether the run is the trial of a recipe, whose figures mean nothing."""
        return self.setting("quick") is True

    @property
    def plain(self) -> bool:
        """Whether the classifier is used without noise, so that nothing is certified."""
        return self.setting("smoothing", "sigma") == 0

    @property
    def missing(self) -> tuple[Stage, ...]:
        taught = bool((self.setting("teach", "rounds")) or 0)
        return tuple(stage for stage in STAGES if stage not in self.stages and (taught or stage != "teach"))

    @property
    def threat_certificates(self) -> Certificates | None:
        """The certificates of the attacked images, or of all certified images if an attacked one has none."""
        if self.certificates is None or self.ladder is None:
            return self.certificates
        attacked = set(self.ladder.clean.ids.tolist())
        rows = [row for row, image_id in enumerate(self.certificates.ids) if image_id in attacked]
        return self.certificates.select(rows) if len(rows) == len(attacked) else self.certificates

    @property
    def certified_norm(self) -> Norm:
        """Norm of the run's certificates: by their rule, or by the recipe's noise as long as there are none."""
        if self.certificates is not None:
            return self.certificates.rule.norm
        stated = self.setting("smoothing", "noise")
        return next((norm for noise, norm in CERTIFIED_NORM.items() if noise == stated), "l2")

    def setting(self, *keys: str) -> Any:
        """Return the recipe's entry at ``keys``, or None if there is none."""
        return _entry(self.recipe, keys)

    def class_name(self, index: int) -> str:
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"

    def command(self, stage: str) -> str:
        return stage_command(self.folder, stage)


def read_run(folder: Path | str) -> RunResults:
    """Return the results of the finished stages in the run folder ``folder``.

    Raises: RunError if ``folder`` is not a run folder, or with the remedy if one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "recipe.json").is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no recipe.json. Give the folder that `rush run` wrote (its --out)."
        )
    remedy = "restore it from a copy, or start a new run with `rush run`"
    recipe = Record.read(folder / "recipe.json", remedy, "recipe.json").fields
    stages = {stage: _read_stage(folder, stage) for stage in STAGES if (folder / "stages" / f"{stage}.json").exists()}
    certified = "certify" in stages and stages["certify"].fields.get("certified") is not False
    indices, certificates = _read_certificates(folder, stages["certify"]) if certified else ([], None)
    attack = None
    if "attack" in stages:
        record = Record(folder / "stages" / "attack.json", stages["attack"].fields, _redo(folder, "attack"))
        attack = read_attacks(folder, record, indices, certificates)
    return RunResults(
        folder=folder,
        recipe=recipe,
        provenance=read_provenance(folder),
        classes=_read_classes(folder, recipe),
        stages=stages,
        epochs=_last_records(folder / "log.jsonl", "epoch", _epoch),
        certificates=certificates,
        ladder=attack,
        audit=read_audit(folder / "audit.json", _redo(folder, "audit")) if "audit" in stages else None,
        watched=_last_records(folder / "log.jsonl", "monitor", _watched),
        embedding=_read_embedding(folder, stages),
    )


def read_run_samples(results: RunResults, number: int) -> tuple[Sample, ...]:
    """Return at most ``number`` attacked images of the run, as ``records.attacks.read_samples`` does."""
    return read_samples(results.folder, results.ladder, number, _redo(results.folder, "attack"))


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """Return the provenance of a run, empty if there is none. Raises: RunError if it is damaged."""
    file = folder / "provenance.json"
    return Record.read(file, "delete it; the report is then without it", file.name).fields if file.exists() else {}


def test_fingerprint(provenance: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the test images in ``provenance``, or None if it has none."""
    fingerprint = _entry(provenance, ("data", "test", "fingerprint"))
    return fingerprint if isinstance(fingerprint, str) else None


def _entry(entries: Any, keys: Sequence[str]) -> Any:
    """Return the entry of nested objects at ``keys``, or None if there is none."""
    for key in keys:
        entries = entries.get(key) if isinstance(entries, Mapping) else None
    return entries


def stage_command(folder: Path, stage: str) -> str:
    return f"rush {stage} {shlex.quote(str(folder))}"


def _redo(folder: Path, stage: str) -> str:
    return f"delete it and stages/{stage}.json, then run `{stage_command(folder, stage)}` again"


def _read_classes(folder: Path, recipe: Mapping[str, Any]) -> tuple[str, ...]:
    file = folder / "model" / "model.json"
    remedy = f"delete the folder model/ and stages/finetune.json, then run `{stage_command(folder, 'finetune')}` again"
    model = Record.read(file, remedy).fields if file.exists() else {}
    data = recipe.get("data")
    holders = (model, recipe, data if isinstance(data, dict) else {})
    classes = next((holder["classes"] for holder in holders if isinstance(holder.get("classes"), list)), ())
    return tuple(str(name) for name in classes)


def _read_stage(folder: Path, stage: Stage) -> StageRecord:
    remedy = f"delete it, then run `{stage_command(folder, stage)}` again"
    record = Record.read(folder / "stages" / f"{stage}.json", remedy, "stages")
    record.check_numbers(_COST_FIELDS)
    _check_share(record)
    return StageRecord(stage, record.number("seconds"), str(record.fields.get("finished", "")), record.fields)


def _read_embedding(folder: Path, stages: Mapping[Stage, StageRecord]) -> Embedding | None:
    """Return the map of the encoder in the record of pre-training, or None without one."""
    if "pretrain" not in stages:
        return None
    remedy = "remove the key; the report is then without the map of the encoder"
    return read_embedding(Record(folder / "stages" / "pretrain.json", stages["pretrain"].fields, remedy))


def _check_share(record: Record) -> None:
    share = record.fields.get("knn_accuracy")
    right, total = (share.get("correct"), share.get("total")) if isinstance(share, dict) else (None, None)
    if share is not None and not (isinstance(right, int) and isinstance(total, int) and 0 <= right <= total > 0):
        raise record.damaged(f"knn_accuracy must be null or counts 'correct' <= 'total', got {share!r}")


def _epoch(record: Mapping[str, Any]) -> Epoch:
    rate = record.get("learning_rate")
    return Epoch(
        stage=str(record["stage"]),
        number=int(record["epoch"]),
        loss=float(record["loss"]),
        seconds=float(record["seconds"]),
        learning_rate=None if rate is None else float(rate),
    )


def _watched(record: Mapping[str, Any]) -> Watched:
    figures = {printable(name): float(value) for name, value in record.items() if name not in NO_FIGURES}
    return Watched(str(record["stage"]), int(record["epoch"]), figures)


def _last_records(file: Path, event: str, parse: Callable[[Mapping[str, Any]], Logged]) -> tuple[Logged, ...]:
    """Return the last of the log's events of this name for each epoch, by stage and number."""
    records: dict[tuple[str, int], Logged] = {}
    for number, record in read_events(file).items():
        if record["event"] == event:
            try:
                parsed = parse(record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise damaged_event(file, number, repr(error)) from error
            records[parsed.stage, parsed.number] = parsed
    return tuple(records[key] for key in sorted(records))


def _read_certificates(folder: Path, stage: StageRecord) -> tuple[list[int], Certificates]:
    """Return the images' indices and certificates, after a comparison with the stage's record."""
    file, remedy = folder / TABLE, _redo(folder, "certify")
    if not file.exists():
        raise RunError(f"{file} is missing. Remedy: {remedy}.")
    try:
        read = read_certificates(file)
    except RunError as error:
        raise RunError(f"{error}. Remedy: {remedy}.") from error
    if read is None:
        raise damaged(file, "it holds no images", remedy)
    certificates = read[1]
    derived = {
        **json.loads(certificates.rule.to_json()),
        "images": len(certificates),
        "undecided": int((certificates.outcome == UNDECIDED).sum()),
        "forward_passes_per_image": float(certificates.num_samples.mean()),
    }
    for name, value in derived.items():
        if stage.fields.get(name, value) != value:
            message = f"{name} is {stage.fields[name]!r}, by {file.name} it is {value!r}"
            raise damaged(folder / "stages" / "certify.json", message, remedy)
    return read
