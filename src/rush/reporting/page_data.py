"""The values of every figure and table of a run's report, for the links beside them."""

import itertools
from collections.abc import Iterator

from rush.auditing.report import AuditReport
from rush.certification.certificates import Certificates
from rush.choices import TRAININGS
from rush.records.ladder import Ladder
from rush.records.published import NAMES
from rush.records.read_run import RunResults
from rush.reporting import wording
from rush.reporting.classes import ClassAccuracy, Confusion
from rush.reporting.exports import Data, Value
from rush.reporting.plots import curve_radii, radius_counts
from rush.reporting.walk import Walk
from rush.statistics import Interval


def certified_data(results: RunResults, classes: list[ClassAccuracy], table: Confusion) -> Iterator[Data]:
    """Yield the figures and tables of a run's certificates."""
    certificates = results.certificates
    assert certificates is not None
    sign = wording.NORM_SIGNS[certificates.rule.norm]
    yield Data("certified-curve", "Certified accuracy over the radius", *_curve(certificates, sign), curve=True)
    yield Data("certified", "Certified accuracy by radius", *_certified_table(certificates, sign))
    edges, right, wrong = radius_counts(certificates)
    bins = [tuple(row) for row in zip(edges[:-1].tolist(), right.tolist(), wrong.tolist(), strict=True)]
    yield Data("radii", "Images by certified radius", (f"{sign} radius from", "right class", "another class"), bins)
    at = f"certified at {sign} {wording.radius_text(wording.headline_radius(certificates))}"
    by_class = [(row.name, row.images, row.predicted, row.certified) for row in classes]
    yield Data("classes", "Accuracy by class", ("class", "images", "predicted", at), by_class)
    counts = [(name, *row) for name, row in zip(table.names, table.counts.tolist(), strict=True)]
    yield Data("confusion", "Images by label and prediction", ("label", *table.names, "abstained"), counts)


def attacked_data(
    results: RunResults, floor: Interval | None, floors: tuple[Interval, ...], walk: Walk
) -> Iterator[Data]:
    """Yield the figures and tables of a run's attacks."""
    ladder = results.ladder
    assert ladder is not None
    yield Data("ladder", f"Accuracy under attack at {wording.threat_text(ladder)}", *_ladder_table(ladder, floor))
    if ladder.curve is not None:
        yield Data("epsilon", "Accuracy over epsilon", *_epsilon_table(ladder, floors), curve=True)
    header = ("image", "proved up to", "broken from", "held up to")
    limits = [(image_id, *row) for image_id, row in zip(walk.ids, walk.limits, strict=True)]
    yield Data("images", f"Attacked images, sizes in {wording.NORM_SIGNS[ladder.norm]}", header, limits)


def audited_data(audit: AuditReport) -> Iterator[Data]:
    """Yield the tables of an audit."""
    rows: list[tuple[Value, ...]] = [
        ("evaluation", audit.evaluation),
        ("verdict", audit.verdict),
        ("reported accuracy", wording.share(audit.claimed)),
        ("re-measured accuracy", wording.share(audit.measured)),
        ("d", wording.d_text(audit)),
    ]
    yield Data("audit", "Audit", ("", "value"), rows)
    header = ("finding", "status", "figure", "threshold", "evidence", "remedy")
    findings = [(f.name, f.status, f.figure, f.threshold, f.evidence, f.remedy) for f in wording.sorted_findings(audit)]
    yield Data("findings", "Findings of the audit", header, findings)


def training_data(results: RunResults) -> Iterator[Data]:
    """Yield the curves of the training stages that have any, and the cost by stage."""
    for stage in TRAININGS:
        epochs = [epoch for epoch in results.epochs if epoch.stage == stage]
        watched = [epoch for epoch in results.watched if epoch.stage == stage]
        if epochs:
            rows = [(epoch.number, epoch.loss, epoch.learning_rate) for epoch in epochs]
            yield Data(f"training-{stage}", f"{stage} by epoch", ("epoch", "loss", "learning rate"), rows, curve=True)
        if watched:
            names = list(dict.fromkeys(name for epoch in watched for name in epoch.figures))
            figures = [(epoch.number, *map(epoch.figures.get, names)) for epoch in watched]
            header = ("epoch", *(NAMES.get(name, name) for name in names))
            yield Data(f"watched-{stage}", f"{stage} on held-out images", header, figures, curve=True)
    embedding = results.embedding
    if embedding is not None:
        labels = map(results.class_name, embedding.labels.tolist())
        noisy = [] if embedding.noisy is None else embedding.noisy.tolist()
        places = itertools.zip_longest(labels, embedding.clean.tolist(), noisy, fillvalue=(None, None))
        points: list[tuple[Value, ...]] = [(str(label), *clean, *own) for label, clean, own in places]
        names = ["class", "clean 1", "clean 2", "noisy 1", "noisy 2"]
        yield Data("embedding", "Map of the encoder", tuple(names), points)
    header = ("stage", "objective", "time", "passes per image", "images/s", "peak memory", "energy")
    yield Data("cost", "Cost by stage", header, wording.cost_rows(results))


def origin_data(results: RunResults) -> Iterator[Data]:
    """Yield the tables of the recipe and the provenance."""
    yield Data("recipe", "Recipe", ("field", "value"), wording.nested_rows(results.recipe))
    yield Data("provenance", "Provenance", ("field", "value"), wording.nested_rows(results.provenance))


_Table = tuple[tuple[str, ...], list[tuple[Value, ...]]]


def _curve(certificates: Certificates, sign: str) -> _Table:
    radii = curve_radii(certificates, certificates.largest_radius).tolist()
    shares = [certificates.accuracy_interval(radius) for radius in radii]
    rows: list[tuple[Value, ...]] = [
        (radius, share.estimate, share.low, share.high) for radius, share in zip(radii, shares, strict=True)
    ]
    return (f"{sign} radius", "certified accuracy", "low", "high"), rows


def _certified_table(certificates: Certificates, sign: str) -> _Table:
    rows: list[tuple[Value, ...]] = [
        (radius, certificates.accuracy_interval(radius), certificates.accuracy_lower(radius), *others.values())
        for radius in certificates.table_radii
        for others in [certificates.other_shares(radius) or {}]
    ]
    others = certificates.other_shares(0.0) or {}
    return (f"{sign} radius", "certified accuracy", "true share at least", *others), rows


def _ladder_table(ladder: Ladder, floor: Interval | None) -> _Table:
    rows: list[tuple[Value, ...]] = [
        (rung.label, rung.accuracy, rung.accuracy_lower, rung.undecided, rung.spent("passes_per_image"))
        for rung in ladder.rungs
    ]
    rows.append(("all rows above", ladder.combined, None, None, None))
    if floor is not None:
        rows.append(("certificate: floor for any attack", floor, None, None, None))
    return ("attacker", "accuracy", "held", "undecided", "passes per image"), rows


def _epsilon_table(ladder: Ladder, floors: tuple[Interval, ...]) -> _Table:
    assert ladder.curve is not None
    known: list[Value] = [floor.estimate for floor in floors] or [None] * len(ladder.curve.points)
    rows: list[tuple[Value, ...]] = [
        (point.epsilon, point.accuracy.estimate, point.accuracy.low, point.accuracy.high, held, floor)
        for point, floor in zip(ladder.curve.points, known, strict=True)
        for held in [point.accuracy_lower.estimate]
    ]
    return ("epsilon", "accuracy", "low", "high", "held", "certified floor"), rows
