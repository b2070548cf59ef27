"""Attacks of a run on disk: ``attacks.tsv``, ``attacks/*.npz`` and the figures in ``stages/attack.json``."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from rush.certification.certificates import Certificates
from rush.certification.rule import Rule
from rush.choices import VERDICTS, Norm
from rush.records.arrays import read_arrays
from rush.records.ladder import SANDWICH, CurvePoint, EpsilonCurve, Ladder, Rung, Sample, SandwichFigures
from rush.records.record import FORMATS, Record, damaged, read_file
from rush.records.tsv import Table
from rush.runtime.files import write_arrays, write_text
from rush.runtime.lines import escape, printable, read_lines, unescape

if TYPE_CHECKING:
    from rush.data.checks import LabelledPixels
    from rush.evaluation.result import AttackResult

TABLE = "attacks.tsv"
COLUMNS = (
    "rung", "idx", "id", "label", "verdict", "linf", "l2",
    "challenger", "votes", "votes_label", "votes_challenger", "time", "l1", "format",
)  # fmt: skip
_READ = COLUMNS[:8]  # columns of every table; later tables also hold the votes of each verdict
_JUDGED = ("votes_label", "votes_challenger")
_Arrays = Mapping[str, np.ndarray]
# Numbers that a rung or the sandwich may give or omit.
_RUNG_FIELDS = ("eot_samples", "passes_per_image", "forward_passes_per_image", "votes_per_image", "seconds")


def write_attacks(
    run: Path, results: "Sequence[AttackResult]", index_of: Mapping[str, int], clean: "LabelledPixels"
) -> None:
    """Write the results of an attack stage.

    That is ``attacks.tsv``, ``attacks/<rung>.npz`` (adversarial float32, ids) and ``attacks/images.npz`` (uint8 images,
    labels, ids).
    """
    for result in results:
        write_arrays(
            run / f"attacks/{result.plan.name}.npz", adversarial=result.adversarial.numpy(), ids=np.array(result.ids)
        )
    pixels = (clean.x * 255).round().numpy().astype(np.uint8)
    write_arrays(run / "attacks/images.npz", images=pixels, labels=clean.y.numpy(), ids=np.array(clean.ids))
    write_text(run / TABLE, attack_table(results, index_of))


def attack_table(results: "Sequence[AttackResult]", index_of: Mapping[str, int]) -> str:
    """Return the text of ``attacks.tsv``: a header and one line per image and result.

    Args:
        results: results on one model, one per attacker.
        index_of: position of each image in the split, by id.
    """
    lines = ["\t".join(COLUMNS)] + [_line(result, row, index_of) for result in results for row in range(len(result))]
    return "\n".join(lines) + "\n"


def _line(result: "AttackResult", row: int, index_of: Mapping[str, int]) -> str:
    label, challenger = result.labels[row], result.challenger[row]
    values = (
        result.plan.name,
        index_of[result.ids[row]],
        escape(result.ids[row]),
        label,
        VERDICTS[result.verdict[row]],
        f"{result.linf[row]:.6f}",
        f"{result.l2[row]:.6f}",
        challenger,
        result.votes[row],
        result.counts[row, label],
        result.counts[row, challenger],
        f"{result.seconds[row]:.4f}",
        f"{result.l1[row]:.6f}",
        FORMATS[TABLE],
    )
    return "\t".join(str(value) for value in values)


def read_attacks(folder: Path, record: Record, indices: Sequence[int], certificates: Certificates | None) -> Ladder:
    """Return the ladder of the run in ``folder``, after a check of its verdicts against their votes and certificates.

    Args:
        folder: the run folder.
        record: the record of the attack stage.
        indices: positions of the certified images in the split, empty without ``certificates``.
        certificates: those of the run, if it has any.

    Raises:
        RunError: ``attacks.tsv``, the stored images or ``record`` are damaged or contradict each other.
    """
    threat, settings = record.fields.get("threat"), record.fields.get("rungs")
    if not isinstance(threat, dict) or threat.get("norm") not in get_args(Norm):
        raise record.damaged(f"'threat' must name a norm ({' or '.join(get_args(Norm))}), got {threat!r}")
    if not isinstance(settings, list) or not settings or not all(_is_named(rung) for rung in settings):
        raise record.damaged("'rungs' must be a list of objects, each with a 'name' usable as a file name")
    if settings[0].get("method", settings[0]["name"]) not in ("none", "clean"):
        raise record.damaged(f"'rungs' must begin with the one without attack, got {settings[0]['name']!r}")
    for rung in settings:
        record.at(rung).check_numbers(_RUNG_FIELDS)
    proof = _Proof.of(indices, certificates)
    rungs, inside = _read_rungs(folder / TABLE, settings, proof.norm, threat["norm"], record.remedy)
    pictures = _pictures(folder, rungs[0], proof, record.remedy)
    rungs = tuple(replace(rung, pictures=pictures) for rung in rungs)
    for rung in rungs:
        _check_attackers(rung, record)
    for rung in (*rungs, *inside):
        proof.check_labels(rung, folder / TABLE, record.remedy)
    epsilon = record.at(threat).number("epsilon")
    votes = record.fields.get("votes_per_image") or sum(rung.get("votes_per_image") or 0.0 for rung in settings)
    return Ladder(
        norm=threat["norm"],
        epsilon=epsilon,
        epsilon_text=printable(str(threat.get("epsilon_text", f"{epsilon:g}"))),
        alpha=record.number("alpha"),
        max_votes=int(record.number("max_votes")),
        votes_per_image=votes,
        shape=_image_shape(folder, record.remedy),
        rungs=rungs,
        curve=_read_curve(record),
        sandwich=_read_sandwich(record, (*rungs, *inside), proof),
    )


def read_verdicts(folder: Path) -> dict[str, dict[str, tuple[str, int, int]]]:
    """Return for each rung of a run and each image id the verdict, the number of votes, and that for the label.

    Raises:
        RunError: ``attacks.tsv`` is damaged, or was written by a version that did not store the votes.
    """
    path = folder / TABLE
    table = Table.parse(path, read_lines(path), "; restore it from a copy")
    votes, right = table.whole("votes"), table.whole("votes_label")
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for row, (rung, image_id, verdict) in enumerate(
        zip(*(table.cells[name] for name in ("rung", "id", "verdict")), strict=True)
    ):
        found.setdefault(rung, {})[unescape(image_id)] = (verdict, int(votes[row]), int(right[row]))
    return found


def read_samples(folder: Path, ladder: Ladder | None, number: int, remedy: str) -> tuple[Sample, ...]:
    """Return at most ``number`` images under the strongest attacker, evenly spaced over the attacked set.

    There are none without a ladder, or if the whole folder ``attacks`` is missing, as in a run kept for its figures.

    Raises:
        RunError: an image file is missing, is damaged or does not hold the images of ``attacks.tsv``.
    """
    attacks = folder / "attacks"
    if ladder is None or not attacks.is_dir():
        return ()
    rung = ladder.strongest
    stored = _read_images(attacks / "images.npz", ("images", "ids"), remedy)
    changed = _read_images(attacks / f"{rung.name}.npz", ("adversarial", "ids"), remedy)
    if changed["adversarial"].shape[1:] != stored["images"].shape[1:]:
        raise damaged(attacks / f"{rung.name}.npz", "its images differ in shape from those in images.npz", remedy)
    rows = np.unique(np.linspace(0, len(rung) - 1, min(number, len(rung))).round().astype(int))
    return tuple(_sample(rung, row, stored, changed, attacks, remedy) for row in rows)


def _sample(rung: Rung, row: int, stored: _Arrays, changed: _Arrays, attacks: Path, remedy: str) -> Sample:
    image_id = str(rung.ids[row])
    clean, adversarial = np.flatnonzero(stored["ids"] == image_id), np.flatnonzero(changed["ids"] == image_id)
    if not clean.size or not adversarial.size:
        file = attacks / ("images.npz" if not clean.size else f"{rung.name}.npz")
        raise damaged(file, f"image {image_id} of attacks.tsv is not in it", remedy)
    return Sample(
        id=image_id,
        label=int(rung.labels[row]),
        verdict="broken" if rung.broken[row] else "held" if rung.held[row] else "undecided",
        challenger=int(rung.challenger[row]),
        clean=stored["images"][clean[0]],
        adversarial=changed["adversarial"][adversarial[0]],
    )


@dataclass(frozen=True)
class _Proof:
    """The certificates of a run by each image's index in the split, empty without certificates.

    Attributes:
        images: label and id.
        pixels: hash of the pixels, if these are known.
        radii: radii of the images that are certified with the correct class and a positive radius.
        rule: rule of the certificates, None without them.
    """

    images: Mapping[int, tuple[int, str]]
    pixels: Mapping[int, str]
    radii: Mapping[int, float]
    rule: Rule | None

    @property
    def norm(self) -> Norm:
        """Norm of the radii, l2 without certificates."""
        return "l2" if self.rule is None else self.rule.norm

    @classmethod
    def of(cls, indices: Sequence[int], certificates: Certificates | None) -> "_Proof":
        if certificates is None:
            return cls({}, {}, {}, None)
        images = zip(certificates.labels.tolist(), certificates.ids, strict=True)
        rows = zip(indices, certificates.radius.tolist(), certificates.correct, strict=True)
        return cls(
            images=dict(zip(indices, images, strict=True)),
            pixels=dict(zip(indices, certificates.pixels or (), strict=False)),
            radii={index: radius for index, radius, correct in rows if correct and radius > 0},
            rule=certificates.rule,
        )

    def check_labels(self, rung: Rung, file: Path, remedy: str) -> None:
        """Raise RunError if label or id of an attacked image differ from those of the certificate of the same index."""
        for index, label, image_id in zip(rung.idx.tolist(), rung.labels.tolist(), rung.ids.tolist(), strict=True):
            certified = self.images.get(index, (label, image_id))
            if certified != (label, image_id):
                attacked = f"the image of idx {index} has label {label} and id {image_id!r}"
                raise damaged(file, f"{attacked}, in certificates.tsv {certified}", remedy)

    def violations(self, rung: Rung) -> list[str]:
        """Return the images that are broken within their certified radius."""
        if self.rule is None:
            return []
        rows, slack = zip(rung.idx.tolist(), rung.ids.tolist(), rung.broken, rung.size, strict=True), self.rule.slack
        return [
            image_id
            for index, image_id, broken, size in rows
            if broken and index in self.radii and size <= self.radii[index] + slack
        ]


def _pictures(folder: Path, rung: Rung, proof: _Proof, remedy: str) -> np.ndarray | None:
    """Return the hash of each attacked image's pixels, from the stored images, else from the certificates."""
    if (folder / "attacks").is_dir():
        stored = _read_images(folder / "attacks" / "images.npz", ("images", "ids"), remedy)
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in stored["images"]]
        by_id = dict(zip(stored["ids"].tolist(), hashes, strict=True))
        return np.array([by_id.get(image_id, f"id {image_id}") for image_id in rung.ids.tolist()])
    indices = rung.idx.tolist()
    return np.array([proof.pixels[index] for index in indices]) if proof.pixels.keys() >= set(indices) else None


def _check_attackers(rung: Rung, record: Record) -> None:
    """Raise RunError unless the images that each attacker of a suite broke first add up to all broken images."""
    counts = rung.attackers
    if not rung.suite and not counts:
        return
    if not isinstance(counts, dict) or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise record.damaged(f"rung {rung.name!r}: 'attackers' must be numbers of images, got {counts!r}")
    if sum(counts.values()) != rung.broken.sum():
        message = f"by 'attackers' {sum(counts.values())} images of rung {rung.name!r} are broken"
        raise record.damaged(f"{message}, by attacks.tsv {rung.broken.sum()}")


def _read_curve(record: Record) -> EpsilonCurve | None:
    curve = record.fields.get("curve")
    if curve is None:
        return None
    points = curve.get("points") if isinstance(curve, dict) else None
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise record.damaged("'curve' must be an object with a list 'points' of objects")
    label = printable(str(curve.get("label", "")))
    read = EpsilonCurve(label, tuple(_curve_point(record.at(point)) for point in points))
    epsilons = [point.epsilon for point in read.points]
    if epsilons[0] <= 0 or epsilons != sorted(set(epsilons)):
        raise record.damaged(f"the curve's epsilons must be > 0 and ascending, got {epsilons}")
    images = {point.images for point in read.points} | {curve.get("images")}
    if images != {read.images} or read.images < 1:
        number = curve.get("images")
        raise record.damaged(f"broken, held and undecided must be the curve's {number!r} images at each epsilon")
    return read


def _curve_point(point: Record) -> CurvePoint:
    epsilon = point.number("epsilon")
    text = printable(str(point.fields.get("epsilon_text", f"{epsilon:.4g}")))
    return CurvePoint(epsilon, text, **{name: point.count(name) for name in VERDICTS})


def _image_shape(folder: Path, remedy: str) -> tuple[int, int, int]:
    """Return (C, H, W) of the attacked images, from the model's description if the folder ``attacks`` is missing."""
    model = folder / "model" / "model.json"
    if not (folder / "attacks").is_dir() and model.is_file():
        channels, height, width = Record.read(model, remedy).fields.get("image_shape") or (0, 0, 0)
        return int(channels), int(height), int(width)
    channels, height, width = _read_images(folder / "attacks" / "images.npz", ("images",), remedy)["images"].shape[1:]
    return channels, height, width


def _is_named(rung: Any) -> bool:
    return isinstance(rung, dict) and re.fullmatch(r"\w[\w.+-]*", str(rung.get("name"))) is not None


def _read_rungs(
    file: Path, settings: list[dict[str, Any]], norm: Norm, threat_norm: Norm, remedy: str
) -> tuple[tuple[Rung, ...], tuple[Rung, ...]]:
    """Return the rungs of the ladder, all on the same images, and the sandwich's attack if there is one.

    ``norm`` is that of the certificates. Older tables hold no l1 changes, and then l1 certificates cannot be checked.
    """
    table = Table.parse(file, read_file(file, read_lines, remedy) or [""], f". Remedy: {remedy}.")
    table.check_format(FORMATS[TABLE])
    if tuple(table.cells)[: len(_READ)] != _READ:
        table.refuse(-1, f"the table must open with the tab-separated columns {' '.join(_READ)}")
    if norm not in table.cells:
        table.refuse(-1, f"the certificates are in {norm}, and the table has no column {norm} to compare with them")
    names = [rung["name"] for rung in settings]
    for row, (name, verdict) in enumerate(zip(table.cells["rung"], table.cells["verdict"], strict=True)):
        if name not in (*names, SANDWICH) or verdict not in VERDICTS:
            table.refuse(row, f"unknown rung {name[:60]!r} or verdict {verdict[:60]!r}")
    arrays: dict[str, np.ndarray] = {name: table.whole(name) for name in ("idx", "label", "challenger")}
    if threat_norm in table.cells:
        arrays["threat_size"] = table.real(threat_norm)
    arrays |= {"size": table.real(norm), **{name: np.array(table.cells[name]) for name in ("rung", "verdict")}}
    arrays["id"] = np.array([unescape(text) for text in table.cells["id"]])
    _check_verdicts(table, arrays)
    rungs = tuple(_rung(arrays, fields) for fields in settings)
    for rung in rungs:
        if not len(rung) or not np.array_equal(rung.idx, rungs[0].idx) or len(np.unique(rung.idx)) < len(rung):
            raise damaged(file, f"rung {rung.name!r} is not on the same images, each once, as {names[0]!r}", remedy)
    inside = _rung(arrays, {"name": SANDWICH})
    return rungs, (inside,) if len(inside) else ()


def _check_verdicts(table: Table, arrays: _Arrays) -> None:
    """Refuse a verdict that contradicts its votes, which older tables do not hold."""
    if not set(_JUDGED) <= table.cells.keys():
        return
    for_label, against = (table.whole(name) for name in _JUDGED)
    verdict = arrays["verdict"]
    wrong = (verdict == "broken") & ~((against > for_label) & (arrays["challenger"] != arrays["label"]))
    wrong |= (verdict == "held") & ~(for_label > against)
    row = int(wrong.argmax())
    votes = f"{for_label[row]} votes for the label and {against[row]} for the challenger"
    table.check(~wrong, f"{votes} are not {verdict[row]}")


def _rung(arrays: _Arrays, fields: Mapping[str, Any]) -> Rung:
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
        size=arrays["size"][rows],
        challenger=arrays["challenger"][rows],
        threat_size=arrays["threat_size"][rows] if "threat_size" in arrays else None,
    )


def _read_sandwich(record: Record, attacks: tuple[Rung, ...], proof: _Proof) -> SandwichFigures:
    """Return the figures of the stage's record, with every further violation that the tables show.

    Raises: RunError if the numbers of images checked and allowed differ from those that the tables and levels give.
    """
    alpha, fields = record.number("alpha"), record.fields.get("sandwich")
    if not isinstance(fields, dict) or not isinstance(fields.get("violations"), list):
        raise record.damaged("'sandwich' must be an object with a list 'violations'")
    record.at(fields).check_numbers(_RUNG_FIELDS)
    violations = {str(name) for name in fields["violations"]}
    violations |= {name for attack in attacks for name in proof.violations(attack)}
    checked, allowed = (record.at(fields).count(name) for name in ("checked", "allowed"))
    if proof.rule is not None:
        proved = len({index for attack in attacks for index in attack.idx.tolist()} & proof.radii.keys())
        derived = proved, proof.rule.allowed_violations(proved, alpha)
        if (checked, allowed) != derived:
            message = f"the sandwich has {checked} images checked and {allowed} allowed, by the tables and levels "
            raise record.damaged(f"{message}{derived[0]} and {derived[1]}")
    return SandwichFigures(
        checked=checked,
        violations=tuple(sorted(violations)),
        allowed=allowed,
        passes_per_image=float(fields.get("passes_per_image") or 0.0),
        seconds=float(fields.get("seconds") or 0.0),
    )


def _read_images(file: Path, names: tuple[str, ...], remedy: str) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file, the first of which must be images (n, C, H, W)."""
    arrays = read_arrays(file, names, remedy)
    if arrays[names[0]].ndim != 4:
        raise damaged(file, f"{names[0]} must be (n, C, H, W), got shape {arrays[names[0]].shape}", remedy)
    return arrays
