"""The report of a run folder: one self-contained HTML page, for screens of any size, dark mode and paper."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rush.records.ladder import Ladder
from rush.records.published import ATTACKED, CERTIFIED_SOURCES, ENCODERS, certified_curves
from rush.records.read_run import RunResults, read_run
from rush.reporting import page_data, plots, training_plots, wording
from rush.reporting.classes import MOST_CLASSES, accuracy_by_class, confusion
from rush.reporting.costs import training_sentence
from rush.reporting.exports import Data
from rush.reporting.pictures import pictures_of
from rush.reporting.rendering import plots_of, render_page
from rush.reporting.walk import STATES, walk_of
from rush.runtime.files import write_text
from rush.statistics import Interval, share_interval

_TRAININGS = (("pretrain", "Pre-training"), ("finetune", "Fine-tuning"))


@dataclass(frozen=True)
class Bar:
    """Shares of the images, with sum 1: proved, neither proved nor broken, broken by attack, wrong without attack."""

    proved: float
    open: float
    broken: float
    wrong: float


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` into the run folder ``folder`` and return its path.

    Equal files give an equal page. For unfinished stages the page gives the commands that run them. An interruption
    leaves the previous report.

    Raises:
        RunError: ``folder`` is not a run folder, or one of its files is damaged.
    """
    results = read_run(folder)
    page = render(results)
    path = results.folder / "report.html"
    write_text(path, page)
    return path


def render(results: RunResults) -> str:
    """Return the page of ``results`` as HTML, with sample images read from the run folder."""
    return render_page("page.html.j2", _context(results))


def _context(results: RunResults) -> Mapping[str, Any]:
    certificates, ladder, audit = results.certificates, results.ladder, results.audit
    floor, floors, walk = _floor(results), _floors(results), walk_of(results)
    data = [*page_data.training_data(results), *page_data.origin_data(results)]
    if ladder is not None and walk is not None:
        data += page_data.attacked_data(results, floor, floors, walk)
    if audit is not None:
        data += page_data.audited_data(audit)
    published = _published_context(results, data)
    pictures, factor = pictures_of(results, walk)
    return {
        **_certified_context(results, data),
        "run": results,
        "certificates": certificates,
        "rule": certificates.rule if certificates else None,
        "norm": wording.NORM_SIGNS[results.certified_norm],
        "headline": wording.headline_radius(certificates) if certificates else 0.0,
        "ladder": ladder,
        "floor": floor,
        "floors": floors,
        "proved": results.threat_certificates,
        "quick": wording.QUICK,
        "not_certified": wording.NOT_CERTIFIED if results.plain else "",
        "epsilon_plot": plots_of(plots.epsilon_curve, "epsilon", ladder, floors) if ladder and ladder.curve else None,
        "curve_zero": wording.zero_text(ladder) if ladder and ladder.curve else ("", False),
        "curve_rises": wording.rises_text(ladder) if ladder else "",
        "audit": audit,
        "findings": wording.sorted_findings(audit) if audit else [],
        "bar": _bar(ladder, floor) if ladder and floor else None,
        "threat": wording.threat_text(ladder) if ladder else "",
        "not_done": wording.not_done(results),
        "data": results.setting("data", "name") or "unnamed data",
        "model": wording.model_text(results),
        "ladder_plot": plots_of(plots.ladder_plot, "ladder", ladder, floor) if ladder else None,
        **published,
        "pictures": pictures,
        "sign": wording.NORM_SIGNS[ladder.norm] if ladder else "",
        "factor": factor,
        "walk": walk,
        "states": STATES,
        "known": walk.at(walk.epsilon) if walk else [],
        "shares": walk.shares(walk.epsilon) if walk else {},
        "knn": _knn(results),
        "training_plots": _training_plots(results),
        "cost": wording.cost_rows(results),
        "training_cost": training_sentence(results),
        "recipe": wording.nested_rows(results.recipe),
        "provenance": wording.nested_rows(results.provenance),
        "saved": _by_name(data),
    }


def _certified_context(results: RunResults, data: list[Data]) -> Mapping[str, Any]:
    """Return the page's values about certificates, and add their figures and tables to ``data``."""
    certificates = results.certificates
    if certificates is None:
        return {"certified_plot": None, "copies": "", "classes": [], "confusion": None, "published_curves": ()}
    classes, table = accuracy_by_class(results), confusion(results)
    data += page_data.certified_data(results, classes, table)
    name, rule = str(results.setting("data", "name")), certificates.rule
    published = certified_curves(name, rule.norm, rule.sigma)
    at = f"{wording.NORM_SIGNS[rule.norm]} {wording.radius_text(wording.headline_radius(certificates))}"
    shown = classes[:MOST_CLASSES]
    return {
        "certified_plot": plots_of(plots.certified_curve, "curve", certificates, results.ladder, published),
        "radius_plot": plots_of(plots.radius_histogram, "radii", certificates),
        "class_plot": plots_of(plots.class_plot, "classes", shown, at),
        "classes": classes,
        "shown_classes": shown,
        "confusion": table,
        "whole_confusion": len(table.names) <= MOST_CLASSES,
        "copies": wording.copies_text(certificates),
        "published_curves": published,
        "published_source": CERTIFIED_SOURCES.get(name, ""),
    }


def _published_context(results: RunResults, data: list[Data]) -> Mapping[str, Any]:
    """Return the published rows of the run's data set, or () for the user's own data, and the run's rows.

    Their table is added to ``data``.
    """
    name = str(results.setting("data", "name"))
    rows = ATTACKED.get(name, ()) if results.ladder else ()
    own = wording.own_rows(results) if rows else []
    header = ("source", "clean", "robust", "attack", "data", "model")
    data.append(Data("published", "Published results", header, [*map(astuple, rows), *own]))
    return {
        "published_rows": rows,
        "own_rows": own,
        "unequal": wording.unequal_conditions(results) if rows else [],
        "paper": name == wording.PAPER_DATA,
    }


def _by_name(data: Iterable[Data]) -> Mapping[str, Data]:
    return {each.name: each for each in data}


def _floor(results: RunResults) -> Interval | None:
    """Return certified accuracy at the smallest ball around the threat, a floor for every attack within the threat."""
    proved, ladder = results.threat_certificates, results.ladder
    if proved is None or ladder is None:
        return None
    return proved.accuracy_interval(ladder.covering_radius(proved.rule.norm))


def _floors(results: RunResults) -> tuple[Interval, ...]:
    """Return the floor at each epsilon of the curve, or () without a curve or certificates."""
    proved, ladder = results.threat_certificates, results.ladder
    if proved is None or ladder is None or ladder.curve is None:
        return ()
    radii = [ladder.around(point.epsilon, proved.rule.norm) for point in ladder.curve.points]
    return tuple(proved.accuracy_interval(radius) for radius in radii)


def _bar(ladder: Ladder, floor: Interval) -> Bar:
    attacked = max(floor.estimate, ladder.strongest.accuracy.estimate)
    clean = max(attacked, ladder.clean.accuracy.estimate)
    return Bar(floor.estimate, attacked - floor.estimate, clean - attacked, 1 - clean)


def _training_plots(results: RunResults) -> list[tuple[Markup, str]]:
    """Return loss, live figures and rates of training, and maps of the encoder, each with the name of its values.

    They are narrow on every screen, where two fit side by side.
    """
    losses, watched, rates = [], [], []
    for stage, title in _TRAININGS:
        epochs = tuple(epoch for epoch in results.epochs if epoch.stage == stage)
        live = tuple(epoch for epoch in results.watched if epoch.stage == stage)
        values = f"training-{stage}"
        if epochs:
            losses.append((training_plots.training_curve(epochs, title, f"loss-{stage}", "narrow"), values))
        if live:
            published = ENCODERS.get(str(results.setting("data", "name")), {}) if stage == "pretrain" else {}
            name = f"watched-{stage}"
            drawn = training_plots.watched_curve(live, f"{title}, held-out images", name, "narrow", published)
            watched.append((drawn, name))
        if any(epoch.learning_rate is not None for epoch in epochs):
            rate = training_plots.rate_curve(epochs, f"{title}, learning rate", f"rate-{stage}", "narrow")
            rates.append((rate, values))
    return [*losses, *watched, *rates, *_maps(results)]


def _maps(results: RunResults) -> list[tuple[Markup, str]]:
    """Return the maps of the pre-trained encoder, of clean and of noisy images, as far as the run has them."""
    embedding = results.embedding
    if embedding is None:
        return []
    places = {"clean": embedding.clean, "noisy": embedding.noisy}
    return [
        (
            training_plots.embedding_map(
                embedding, own, results.class_name, f"Encoder, {kind} test images", f"map-{kind}", "narrow"
            ),
            "embedding",
        )
        for kind, own in places.items()
        if own is not None
    ]


def _knn(results: RunResults) -> Interval | None:
    """Return the nearest-neighbour accuracy of the pre-trained encoder, or None if it was not measured."""
    counts = results.stages["pretrain"].fields.get("knn_accuracy") if "pretrain" in results.stages else None
    return share_interval(counts["correct"], counts["total"]) if counts else None
