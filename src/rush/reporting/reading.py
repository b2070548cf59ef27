"""The files of a run folder, checked and read into the results that a report shows."""

import hashlib
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np

from rush.certification.sequential import UNDECIDED
from rush.certification.table import read_certificates
from rush.choices import STAGES, VERDICTS, Norm, Stage
from rush.errors import RunError
from rush.reporting.results import (
    SANDWICH,
    STATUSES,
    TAIL,
    Audit,
    AuditVerdict,
    Certificates,
    CurvePoint,
    Epoch,
    EpsilonCurve,
    Finding,
    Ladder,
    Rung,
    RunResults,
    Sample,
    Sandwich,
    StageRecord,
    Watched,
    stage_command,
)
from rush.runtime.lines import damaged_event, printable, read_events, read_lines, read_object, unescape
from rush.statistics import upper_quantile

# What the tables open with and the report reads; later columns are their writers' own.
ATTACK_COLUMNS = ("rung", "idx", "id", "label", "verdict", "linf", "l2", "challenger")
_JUDGED = ("votes_label", "votes_challenger")
# Numbers that a stage, a rung or the sandwich may give or leave out.
_COST_FIELDS = (
    "passes_per_image",
    "forward_passes_per_image",
    "images_per_second",
    "votes_per_image",
    "peak_memory",
    "joules",
)
_RUNG_FIELDS = ("eot_samples", "passes_per_image", "forward_passes_per_image", "votes_per_image", "seconds")
_AUDIT_FORMAT = 1  # of audit.json
_NO_FIGURES = ("event", "time", "stage", "epoch")  # of a log's event of live figures
Logged = TypeVar("Logged", Epoch, Watched)
Content = TypeVar("Content")


def read_run(folder: Path | str) -> RunResults:
    """The results in the run folder ``folder``; stages that are not finished are left out.

    Raises: RunError when ``folder`` is no run folder or one of its files is damaged, naming the file and the remedy.
    """
    folder = Path(folder)
    if not (folder / "recipe.json").is_file():
        raise RunError(
            f"{folder} is no run folder: it has no recipe.json. Give the folder that `rush run` wrote (its --out)."
        )
    recipe = _read_json(folder / "recipe.json", "restore it from a copy, or start a new run with `rush run`")
    stages = {stage: _read_stage(folder, stage) for stage in STAGES if (folder / "stages" / f"{stage}.json").exists()}
    certified = "certify" in stages and stages["certify"].fields.get("certified") is not False
    certificates = _read_certificates(folder, stages["certify"]) if certified else None
    return RunResults(
        folder=folder,
        recipe=recipe,
        provenance=_read_provenance(folder),
        classes=_read_classes(folder, recipe),
        stages=stages,
        epochs=_read_epochs(folder / "log.jsonl"),
        certificates=certificates,
        ladder=_read_ladder(folder, stages["attack"], certificates) if "attack" in stages else None,
        audit=_read_audit(folder) if "audit" in stages else None,
        watched=_read_watched(folder / "log.jsonl"),
    )


def read_samples(results: RunResults, count: int) -> tuple[Sample, ...]:
    """At most ``count`` images under the strongest attacker, evenly spaced over the attacked set; () without attack, or
    where the whole folder ``attacks`` was left out, as in a run that is kept for its figures.

    Raises: RunError when an image file is missing, damaged or does not hold the images of attacks.tsv.
    """
    attacks = results.folder / "attacks"
    if results.ladder is None or not attacks.is_dir():
        return ()
    rung = results.ladder.strongest
    remedy = _redo(results.folder, "attack")
    stored = _read_arrays(attacks / "images.npz", ("images", "ids"), remedy)
    changed = _read_arrays(attacks / f"{rung.name}.npz", ("adversarial", "ids"), remedy)
    if changed["adversarial"].shape[1:] != stored["images"].shape[1:]:
        raise _damaged(attacks / f"{rung.name}.npz", "its images are not of the shape of those in images.npz", remedy)
    rows = np.unique(np.linspace(0, len(rung) - 1, min(count, len(rung))).round().astype(int))
    return tuple(_sample(rung, row, stored, changed, attacks, remedy) for row in rows)


def _sample(rung: Rung, row: int, stored: dict, changed: dict, attacks: Path, remedy: str) -> Sample:
    name = str(rung.ids[row])
    clean, adversarial = np.flatnonzero(stored["ids"] == name), np.flatnonzero(changed["ids"] == name)
    if not clean.size or not adversarial.size:
        file = attacks / ("images.npz" if not clean.size else f"{rung.name}.npz")
        raise _damaged(file, f"image {name} of attacks.tsv is not in it", remedy)
    return Sample(
        id=name,
        label=int(rung.labels[row]),
        verdict="broken" if rung.broken[row] else "held" if rung.held[row] else "undecided",
        challenger=int(rung.challenger[row]),
        clean=stored["images"][clean[0]],
        adversarial=changed["adversarial"][adversarial[0]],
    )


def _redo(folder: Path, stage: str) -> str:
    return f"delete it and stages/{stage}.json, then run `{stage_command(folder, stage)}` again"


def _damaged(file: Path, what: str, remedy: str) -> RunError:
    return RunError(f"{file} is damaged: {what}. Remedy: {remedy}.")


def _read(file: Path, read: Callable[[Path], Content], remedy: str) -> Content:
    try:
        return read(file)
    except FileNotFoundError:
        raise RunError(f"{file} is missing. Remedy: {remedy}.") from None
    except json.JSONDecodeError as error:
        raise _damaged(file, f"not JSON ({error})", remedy) from error
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error), remedy) from error


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    return _read(file, read_object, remedy)


def _number(fields: Mapping[str, Any], key: str, file: Path, remedy: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise _damaged(file, f"{key!r} must be a finite number, got {value!r}", remedy)
    return value


def _check_optional(fields: Mapping[str, Any], keys: tuple[str, ...], file: Path, remedy: str) -> None:
    for key in keys:
        if fields.get(key) is not None:
            _number(fields, key, file, remedy)


def _count(fields: Mapping[str, Any], key: str, file: Path, remedy: str) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise _damaged(file, f"{key!r} must be a number of images, got {value!r}", remedy)
    return value


def _check_share(share: Any, file: Path, remedy: str) -> None:
    counts = (share.get("correct"), share.get("total")) if isinstance(share, dict) else (None, None)
    right, total = counts
    if share is not None and not (isinstance(right, int) and isinstance(total, int) and 0 <= right <= total > 0):
        raise _damaged(file, f"knn_accuracy must be null or counts 'correct' <= 'total', got {share!r}", remedy)


def _read_provenance(folder: Path) -> dict[str, Any]:
    file = folder / "provenance.json"
    return _read_json(file, "delete it; the report then goes without it") if file.exists() else {}


def _read_classes(folder: Path, recipe: Mapping[str, Any]) -> tuple[str, ...]:
    file = folder / "model" / "model.json"
    remedy = f"delete the folder model/ and stages/finetune.json, then run `{stage_command(folder, 'finetune')}` again"
    model = _read_json(file, remedy) if file.exists() else {}
    data = recipe.get("data")
    holders = (model, recipe, data if isinstance(data, dict) else {})
    found = next((holder["classes"] for holder in holders if isinstance(holder.get("classes"), list)), ())
    return tuple(str(name) for name in found)


def _read_stage(folder: Path, stage: Stage) -> StageRecord:
    file = folder / "stages" / f"{stage}.json"
    remedy = f"delete it, then run `{stage_command(folder, stage)}` again"
    fields = _read_json(file, remedy)
    _check_optional(fields, _COST_FIELDS, file, remedy)
    _check_share(fields.get("knn_accuracy"), file, remedy)
    return StageRecord(stage, _number(fields, "seconds", file, remedy), str(fields.get("finished", "")), fields)


def _read_epochs(file: Path) -> tuple[Epoch, ...]:
    """Epochs by stage and number, the last record of each."""
    return _last_records(
        file,
        "epoch",
        lambda record: Epoch(
            str(record["stage"]), int(record["epoch"]), float(record["loss"]), float(record["seconds"])
        ),
    )


def _read_watched(file: Path) -> tuple[Watched, ...]:
    """Live figures by stage and epoch, the last record of each."""

    def watched(record: Mapping[str, Any]) -> Watched:
        figures = {name: value for name, value in record.items() if name not in _NO_FIGURES}
        return Watched(
            str(record["stage"]),
            int(record["epoch"]),
            {printable(name): float(value) for name, value in figures.items()},
        )

    return _last_records(file, "monitor", watched)


def _last_records(file: Path, event: str, parse: Callable[[Mapping[str, Any]], Logged]) -> tuple[Logged, ...]:
    """The log's events of this name by stage and epoch, the last of each."""
    found: dict[tuple[str, int], Logged] = {}
    for number, record in read_events(file).items():
        if record["event"] == event:
            try:
                parsed = parse(record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise damaged_event(file, number, repr(error)) from error
            found[parsed.stage, parsed.number] = parsed
    return tuple(found[key] for key in sorted(found))


def _read_table(
    file: Path, columns: tuple[str, ...], remedy: str, optional: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """The cells of ``columns``, which the table must open with, and of those of ``optional`` that it has."""
    first, *lines = _read(file, read_lines, remedy) or [""]
    header = first.split("\t")
    width = len(header)
    if tuple(header[: len(columns)]) != columns:
        raise _damaged(file, f"line 1 must open with the tab-separated columns {' '.join(columns)}", remedy)
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != width:
            raise _damaged(file, f"line {number} has {len(row)} fields, expected {width}", remedy)
    if not rows:
        raise _damaged(file, "it holds no image", remedy)
    places = {name: header.index(name) for name in (*columns, *optional) if name in header}
    return {name: [row[place] for row in rows] for name, place in places.items()}


def _numbers(cells: list[str], kind: Callable[[str], float], column: str, file: Path, remedy: str) -> np.ndarray:
    for number, cell in enumerate(cells, start=2):
        try:
            readable = math.isfinite(kind(cell))
        except (ValueError, OverflowError):
            readable = False
        if not readable:
            raise _damaged(
                file,
                f"line {number}, column {column}: {cell[:60]!r} is not a finite {kind.__name__}",
                remedy,
            )
    return np.array([kind(cell) for cell in cells])


def _read_certificates(folder: Path, stage: StageRecord) -> Certificates:
    """The certificates as their votes give them, compared with what the stage's record says of them."""
    file, remedy = folder / "certificates.tsv", _redo(folder, "certify")
    if not file.exists():
        raise RunError(f"{file} is missing. Remedy: {remedy}.")
    try:
        read = read_certificates(file)
    except RunError as error:
        raise RunError(f"{error}. Remedy: {remedy}.") from error
    if read is None:
        raise _damaged(file, "it holds no image", remedy)
    certificates = Certificates(np.array(read[0]), read[1])
    record, rule = folder / "stages" / "certify.json", asdict(read[1].rule)
    derived = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in rule.items()},
        "images": len(certificates),
        "undecided": int((read[1].outcome == UNDECIDED).sum()),
        "forward_passes_per_image": certificates.mean_samples,
    }
    for name, value in derived.items():
        if stage.fields.get(name, value) != value:
            told = f"{name} is {stage.fields[name]!r}, by {file.name} it is {value!r}"
            raise _damaged(record, told, remedy)
    return certificates


def _read_ladder(folder: Path, stage: StageRecord, certificates: Certificates | None) -> Ladder:
    record, remedy = folder / "stages" / "attack.json", _redo(folder, "attack")
    threat, settings = stage.fields.get("threat"), stage.fields.get("rungs")
    if not isinstance(threat, dict) or threat.get("norm") not in get_args(Norm):
        raise _damaged(record, f"'threat' must name a norm ({' or '.join(get_args(Norm))}), got {threat!r}", remedy)
    if not isinstance(settings, list) or not settings or not all(_is_named(rung) for rung in settings):
        raise _damaged(record, "'rungs' must be a list of objects, each with a 'name' that is good for a file", remedy)
    if settings[0].get("method", settings[0]["name"]) not in ("none", "clean"):
        raise _damaged(record, f"'rungs' must begin with the one without attack, got {settings[0]['name']!r}", remedy)
    for rung in settings:
        _check_optional(rung, _RUNG_FIELDS, record, remedy)
    rungs, inside = _read_rungs(folder / "attacks.tsv", settings, remedy)
    pictures = _pictures(folder, rungs[0], certificates, remedy)
    rungs = tuple(replace(rung, pictures=pictures) for rung in rungs)
    for one in rungs:
        _check_attackers(one, record, remedy)
    for one in (*rungs, *inside):
        _check_labels(one, certificates, folder / "attacks.tsv", remedy)
    epsilon = _number(threat, "epsilon", record, remedy)
    return Ladder(
        norm=threat["norm"],
        epsilon=epsilon,
        epsilon_text=printable(str(threat.get("epsilon_text", f"{epsilon:g}"))),
        alpha=_number(stage.fields, "alpha", record, remedy),
        max_votes=int(_number(stage.fields, "max_votes", record, remedy)),
        votes_per_image=stage.fields.get("votes_per_image") or sum(r.get("votes_per_image") or 0.0 for r in settings),
        shape=_image_shape(folder, remedy),
        rungs=rungs,
        curve=_read_curve(stage.fields.get("curve"), record, remedy),
        sandwich=_read_sandwich(record, stage, (*rungs, *inside), certificates, remedy),
    )


def _pictures(folder: Path, rung: Rung, certificates: Certificates | None, remedy: str) -> np.ndarray | None:
    """For each attacked image the hash of its picture, from the stored images, else from the certificates."""
    if (folder / "attacks").is_dir():
        stored = _read_arrays(folder / "attacks" / "images.npz", ("images", "ids"), remedy)
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in stored["images"]]
        by_id = dict(zip(stored["ids"].tolist(), hashes, strict=True))
        return np.array([by_id.get(name, f"id {name}") for name in rung.ids.tolist()])
    if certificates is None or certificates.stored.pixels is None or not np.isin(rung.idx, certificates.idx).all():
        return None
    by_idx = dict(zip(certificates.idx.tolist(), certificates.stored.pixels, strict=True))
    return np.array([by_idx[index] for index in rung.idx.tolist()])


def _check_labels(rung: Rung, certificates: Certificates | None, file: Path, remedy: str) -> None:
    """Raises: RunError where an attacked image has another label or id than the certificate of the same index."""
    if certificates is None:
        return
    stored = zip(certificates.idx.tolist(), certificates.label.tolist(), certificates.stored.ids, strict=True)
    known = {index: (label, image_id) for index, label, image_id in stored}
    for index, label, image_id in zip(rung.idx.tolist(), rung.labels.tolist(), rung.ids.tolist(), strict=True):
        if known.get(index, (label, image_id)) != (label, image_id):
            told = f"the image of idx {index} has label {label} and id {image_id!r}, in certificates.tsv {known[index]}"
            raise _damaged(file, told, remedy)


def _check_attackers(rung: Rung, record: Path, remedy: str) -> None:
    """Raises: RunError unless a suite's attackers together were the first to break as many images as are broken."""
    counts = rung.attackers
    if not rung.suite and not counts:
        return
    if not isinstance(counts, dict) or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise _damaged(record, f"rung {rung.name!r}: 'attackers' must be numbers of images, got {counts!r}", remedy)
    if sum(counts.values()) != rung.broken.sum():
        told = f"by 'attackers' {sum(counts.values())} images of rung {rung.name!r} are broken"
        raise _damaged(record, f"{told}, by attacks.tsv {rung.broken.sum()}", remedy)


def _read_curve(curve: Any, record: Path, remedy: str) -> EpsilonCurve | None:
    if curve is None:
        return None
    points = curve.get("points") if isinstance(curve, dict) else None
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise _damaged(record, "'curve' must be an object with a list 'points' of objects", remedy)
    read = EpsilonCurve(
        printable(str(curve.get("label", ""))), tuple(_curve_point(point, record, remedy) for point in points)
    )
    epsilons = [point.epsilon for point in read.points]
    if epsilons[0] <= 0 or epsilons != sorted(set(epsilons)):
        raise _damaged(record, f"the curve's epsilons must be > 0 and ascending, got {epsilons}", remedy)
    images = {point.images for point in read.points} | {curve.get("images")}
    if images != {read.images} or read.images < 1:
        told = f"broken, held and undecided must be the curve's {curve.get('images')!r} images at each epsilon"
        raise _damaged(record, told, remedy)
    return read


def _curve_point(point: Mapping[str, Any], record: Path, remedy: str) -> CurvePoint:
    epsilon = _number(point, "epsilon", record, remedy)
    counts = {name: _count(point, name, record, remedy) for name in VERDICTS}
    return CurvePoint(epsilon, printable(str(point.get("epsilon_text", f"{epsilon:.4g}"))), **counts)


def _image_shape(folder: Path, remedy: str) -> tuple[int, int, int]:
    """(C, H, W) of the attacked images; from the model's description where the folder ``attacks`` was left out."""
    model = folder / "model" / "model.json"
    if not (folder / "attacks").is_dir() and model.is_file():
        channels, height, width = _read_json(model, remedy).get("image_shape") or (0, 0, 0)
        return int(channels), int(height), int(width)
    channels, height, width = _read_arrays(folder / "attacks" / "images.npz", ("images",), remedy)["images"].shape[1:]
    return channels, height, width


def _is_named(rung: Any) -> bool:
    return isinstance(rung, dict) and re.fullmatch(r"\w[\w.+-]*", str(rung.get("name"))) is not None


def _read_rungs(file: Path, settings: list[dict[str, Any]], remedy: str) -> tuple[tuple[Rung, ...], tuple[Rung, ...]]:
    """The rungs of the ladder, all on the same images, and the sandwich's attack if there is one."""
    table = _read_table(file, ATTACK_COLUMNS, remedy, optional=_JUDGED)
    names = [rung["name"] for rung in settings]
    for number, (rung, verdict) in enumerate(zip(table["rung"], table["verdict"], strict=True), start=2):
        if rung not in (*names, SANDWICH) or verdict not in VERDICTS:
            raise _damaged(file, f"line {number}: unknown rung {rung!r} or verdict {verdict!r}", remedy)
    arrays = {name: _numbers(table[name], int, name, file, remedy) for name in ("idx", "label", "challenger")}
    arrays |= {"l2": _numbers(table["l2"], float, "l2", file, remedy)}
    _check_verdicts(table, arrays, file, remedy)
    arrays |= {name: np.array(table[name]) for name in ("rung", "verdict")}
    arrays["id"] = np.array([unescape(text) for text in table["id"]])
    rungs = tuple(_rung(arrays, fields) for fields in settings)
    for one in rungs:
        if not len(one) or not np.array_equal(one.idx, rungs[0].idx) or len(np.unique(one.idx)) < len(one):
            raise _damaged(file, f"rung {one.name!r} is not on the same images, each once, as {names[0]!r}", remedy)
    inside = _rung(arrays, {"name": SANDWICH})
    return rungs, (inside,) if len(inside) else ()


def _check_verdicts(table: Mapping[str, list[str]], arrays: Mapping[str, np.ndarray], file: Path, remedy: str) -> None:
    """Raises: RunError where a verdict contradicts its own votes. An older table does not hold them."""
    if not set(_JUDGED) <= table.keys():
        return
    for_label, against = (_numbers(table[name], int, name, file, remedy) for name in _JUDGED)
    verdict = np.array(table["verdict"])
    wrong = (verdict == "broken") & ~((against > for_label) & (arrays["challenger"] != arrays["label"]))
    wrong |= (verdict == "held") & ~(for_label > against)
    if wrong.any():
        row = int(wrong.argmax())
        told = f"{for_label[row]} votes for the label and {against[row]} for the challenger are not {verdict[row]}"
        raise _damaged(file, f"line {row + 2}: {told}", remedy)


def _rung(arrays: dict[str, np.ndarray], fields: Mapping[str, Any]) -> Rung:
    rows = np.flatnonzero(arrays["rung"] == fields["name"])
    rows = rows[np.argsort(arrays["idx"][rows], kind="stable")]
    return Rung(
        name=fields["name"],
        label=printable(str(fields.get("label") or fields["name"])),
        settings=fields,
        idx=arrays["idx"][rows],
        ids=arrays["id"][rows],
        labels=arrays["label"][rows],
        broken=arrays["verdict"][rows] == "broken",
        held=arrays["verdict"][rows] == "held",
        l2=arrays["l2"][rows],
        challenger=arrays["challenger"][rows],
    )


def _read_sandwich(
    record: Path, stage: StageRecord, attacks: tuple[Rung, ...], certificates: Certificates | None, remedy: str
) -> Sandwich:
    """The stage's own account, plus every violation that attacks.tsv and certificates.tsv show by themselves.

    Raises: RunError where the numbers of images checked and allowed are not those that the tables and levels give.
    """
    fields = stage.fields.get("sandwich")
    alpha = _number(stage.fields, "alpha", record, remedy)
    if not isinstance(fields, dict) or not isinstance(fields.get("violations"), list):
        raise _damaged(record, "'sandwich' must be an object with a list 'violations'", remedy)
    _check_optional(fields, _RUNG_FIELDS, record, remedy)
    found = {str(name) for name in fields["violations"]}
    found |= {name for attack in attacks for name in _violations(attack, certificates)}
    checked, allowed = (_count(fields, name, record, remedy) for name in ("checked", "allowed"))
    if certificates is not None:
        proved = len({index for attack in attacks for index in attack.idx.tolist()} & _proved(certificates).keys())
        chance = min(1.0, certificates.image_alpha + alpha)
        derived = proved, upper_quantile(proved, chance, TAIL) if proved else 0
        if (checked, allowed) != derived:
            told = f"the sandwich has {checked} images checked and {allowed} allowed, by the tables and levels "
            raise _damaged(record, f"{told}{derived[0]} and {derived[1]}", remedy)
    return Sandwich(
        checked=checked,
        violations=tuple(sorted(found)),
        allowed=allowed,
        passes_per_image=float(fields.get("passes_per_image") or 0.0),
        seconds=float(fields.get("seconds") or 0.0),
    )


def _proved(certificates: Certificates | None) -> dict[int, float]:
    """The radii of the images that are certified with the correct class and a positive radius, by their idx."""
    if certificates is None:
        return {}
    right = certificates.correct & (certificates.radius > 0)
    return dict(zip(certificates.idx[right].tolist(), certificates.radius[right].tolist(), strict=True))


def _violations(attack: Rung, certificates: Certificates | None) -> list[str]:
    proved = _proved(certificates)
    rows = zip(attack.idx, attack.ids, attack.broken, attack.l2, strict=True)
    return [str(name) for i, name, broken, l2 in rows if broken and int(i) in proved and l2 <= proved[int(i)]]


def _read_audit(folder: Path) -> Audit:
    file, remedy = folder / "audit.json", _redo(folder, "audit")
    fields = _read_json(file, remedy)
    if fields.get("format") != _AUDIT_FORMAT:
        raise _damaged(file, f"format {fields.get('format')!r}, this version reads {_AUDIT_FORMAT}", remedy)
    if fields.get("verdict") not in get_args(AuditVerdict) or fields.get("norm") not in get_args(Norm):
        allowed = f"{' or '.join(get_args(AuditVerdict))}, and {' or '.join(get_args(Norm))}"
        got = f"{fields.get('verdict')!r} and {fields.get('norm')!r}"
        raise _damaged(file, f"verdict and norm must be {allowed}, got {got}", remedy)
    numbers = ("evaluation_accuracy", "accuracy_here", "tolerance", "epsilon", "alpha")
    audit = Audit(
        **{name: _number(fields, name, file, remedy) for name in numbers},
        verdict=fields["verdict"],
        norm=fields["norm"],
        evaluation=str(fields.get("evaluation", "")),
        here=str(fields.get("here", "")),
        images=_count(fields, "images", file, remedy),
        newly_broken=_distinct(fields.get("newly_broken"), file, remedy),
        findings=_read_findings(fields.get("findings"), file, remedy),
        images_needed=None if fields.get("images_needed") is None else _count(fields, "images_needed", file, remedy),
    )
    _check_audit(audit, file, remedy)
    return audit


def _distinct(names: Any, file: Path, remedy: str) -> int:
    if not isinstance(names, list) or len(names) != len({str(name) for name in names}):
        raise _damaged(file, "'newly_broken' must be a list of images, each once", remedy)
    return len(names)


def _read_findings(entries: Any, file: Path, remedy: str) -> tuple[Finding, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _damaged(file, "'findings' must be a list of objects", remedy)
    return tuple(_finding(entry, file, remedy) for entry in entries)


def _finding(entry: Mapping[str, Any], file: Path, remedy: str) -> Finding:
    name, status = str(entry.get("name")), entry.get("status")
    if status not in STATUSES:
        raise _damaged(file, f"finding {name!r}: status must be one of {', '.join(STATUSES)}, got {status!r}", remedy)
    figure, threshold = entry.get("figure"), entry.get("threshold")
    if not all(number is None or type(number) in (int, float) for number in (figure, threshold)):  # infinity is one
        told = f"figure and threshold must be numbers or null, got {figure!r} and {threshold!r}"
        raise _damaged(file, f"finding {name!r}: {told}", remedy)
    return Finding(name, status, figure, threshold, str(entry.get("evidence", "")), str(entry.get("remedy", "")))


def _check_audit(audit: Audit, file: Path, remedy: str) -> None:
    """Raises: RunError when the parts of an audit contradict each other."""
    if not audit.newly_broken <= audit.images or audit.images < 1:
        raise _damaged(file, f"{audit.newly_broken} of {audit.images} images cannot be newly broken", remedy)
    if not (0 <= audit.accuracy_here <= 1 and 0 <= audit.evaluation_accuracy <= 1 and 0 < audit.tolerance < 1):
        raise _damaged(file, "accuracies must lie in [0, 1] and the tolerance in (0, 1)", remedy)
    share = audit.newly_broken / audit.images
    if abs(audit.evaluation_accuracy - audit.accuracy_here - share) > 1e-9:
        told = f"{audit.evaluation_accuracy} there and {audit.accuracy_here} here do not differ by the {share} that are"
        raise _damaged(file, f"{told} newly broken", remedy)
    agrees = {
        "holds": not audit.failed and audit.d.high < audit.tolerance,
        "overestimated": bool(audit.failed) or audit.beyond_a_point,
        "undecided": not audit.beyond_a_point and (bool(audit.failed) or audit.d.high >= audit.tolerance),
    }[audit.verdict]
    if not agrees:
        raise _damaged(file, f"{audit.verdict!r} does not agree with its own findings and newly broken images", remedy)


def _read_arrays(file: Path, names: tuple[str, ...], remedy: str) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, never unpickled; image arrays must be (n, C, H, W)."""
    if not file.exists():
        raise RunError(f"{file} is missing. Remedy: {remedy}.")
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(file, f"it cannot be read as arrays {', '.join(names)} ({error})", remedy) from error
    if arrays[names[0]].ndim != 4:
        raise _damaged(file, f"{names[0]} must be (n, C, H, W), got shape {arrays[names[0]].shape}", remedy)
    return arrays
