"""The report of a run folder: one self-contained HTML page, for screens of any size, dark mode and paper."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from rush.records.ladder import Ladder, Sample
from rush.records.published import ENCODERS
from rush.records.read_run import RunResults, read_run, read_run_samples
from rush.reporting import plots, wording
from rush.reporting.costs import training_sentence
from rush.runtime.files import write_text
from rush.runtime.lines import printable
from rush.statistics import Interval, share_interval

SAMPLE_COUNT = 9
_TRAININGS = (("pretrain", "Pre-training"), ("finetune", "Fine-tuning"))


@dataclass(frozen=True)
class Picture:
    """One attacked image: three PNG data URIs, its classes and its verdict."""

    label: str
    predicted: str
    verdict: str
    clean: str
    adversarial: str
    difference: str


@dataclass(frozen=True)
class Plot:
    """The same plot for wide and for narrow screens."""

    wide: Markup
    narrow: Markup


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "acr": wording.acr_text,
        "attackers": wording.attackers_text,
        "audited": wording.audited_threat_text,
        "bounds": wording.bounds,
        "budget": wording.budget_text,
        "count": wording.count,
        "count_or_dash": wording.count_or_dash,
        "d": wording.d_text,
        "duration": wording.duration,
        "figure": wording.figure_text,
        "lower": wording.lower_text,
        "level": wording.level_text,
        "method": wording.method_text,
        "percent": wording.percent,
        "points": wording.points,
        "radius": wording.radius_text,
        "samples": wording.samples_text,
        "share": wording.share,
        "verdict": wording.audit_sentence,
    }
    return environment.get_template("page.html.j2").render(_context(results))


def _visible(value: object) -> object:
    """Return ``value`` with characters that cannot be written or that hide escaped, if it is text but not markup."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def png_uri(image: np.ndarray) -> str:
    """Return ``image`` uint8 (C, H, W) as a PNG data URI: RGB for three channels, else grey, the mean over channels."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(axis=0).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def magnification(samples: tuple[Sample, ...]) -> int:
    """Return the largest whole factor, at least 1, at which every pixel difference fits the range around mid-grey."""
    largest = max((float(np.abs(_difference(sample)).max()) for sample in samples), default=0.0)
    return max(1, int(0.5 / largest + 1e-3)) if largest > 0 else 1


def _context(results: RunResults) -> Mapping[str, Any]:
    samples = read_run_samples(results, SAMPLE_COUNT)
    factor = magnification(samples)
    certificates, ladder, audit = results.certificates, results.ladder, results.audit
    floors = _floors(results)
    floor = _floor(results)
    return {
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
        "epsilon_plot": _plots(plots.epsilon_curve, "epsilon", ladder, floors) if ladder and ladder.curve else None,
        "curve_zero": wording.zero_text(ladder) if ladder and ladder.curve else ("", False),
        "curve_rises": wording.rises_text(ladder) if ladder else "",
        "audit": audit,
        "findings": wording.sorted_findings(audit) if audit else [],
        "bar": _bar(ladder, floor) if ladder and floor else None,
        "threat": wording.threat_text(ladder) if ladder else "",
        "not_done": wording.not_done(results),
        "data": results.setting("data", "name") or "unnamed data",
        "model": wording.model_text(results),
        "certified_plot": _plots(plots.certified_curve, "curve", certificates, ladder) if certificates else None,
        "copies": wording.copies_text(certificates) if certificates else "",
        "ladder_plot": _plots(plots.ladder_plot, "ladder", ladder, floor) if ladder else None,
        "own_rows": wording.own_rows(results),
        "unequal": wording.unequal_conditions(results),
        "pictures": [_picture(results, sample, factor) for sample in samples],
        "factor": factor,
        "knn": _knn(results),
        "training_plots": _training_plots(results),
        "cost": wording.cost_rows(results),
        "training_cost": training_sentence(results),
        "recipe": wording.nested_rows(results.recipe),
        "provenance": wording.nested_rows(results.provenance),
    }


def _floor(results: RunResults) -> Interval | None:
    """Return certified accuracy at the smallest ball around the threat, below which no attack within it gets."""
    proved, ladder = results.threat_certificates, results.ladder
    if proved is None or ladder is None:
        return None
    return proved.accuracy_interval(ladder.covering_radius(proved.rule.norm))


def _floors(results: RunResults) -> tuple[Interval, ...]:
    """Return the floor at each epsilon of the curve, () without a curve or certificates."""
    proved, ladder = results.threat_certificates, results.ladder
    if proved is None or ladder is None or ladder.curve is None:
        return ()
    radii = [ladder.around(point.epsilon, proved.rule.norm) for point in ladder.curve.points]
    return tuple(proved.accuracy_interval(radius) for radius in radii)


def _bar(ladder: Ladder, floor: Interval) -> Bar:
    attacked = max(floor.estimate, ladder.strongest.accuracy.estimate)
    clean = max(attacked, ladder.clean.accuracy.estimate)
    return Bar(floor.estimate, attacked - floor.estimate, clean - attacked, 1 - clean)


def _plots(draw: Callable[..., Markup], name: str, *values: Any) -> Plot:
    return Plot(draw(*values, f"{name}-wide", "wide"), draw(*values, f"{name}-narrow", "narrow"))


def _training_plots(results: RunResults) -> list[Markup]:
    """Return loss and live figures of each training stage, narrow on every screen, where two fit side by side."""
    shown = []
    for stage, title in _TRAININGS:
        epochs = tuple(epoch for epoch in results.epochs if epoch.stage == stage)
        if epochs:
            shown.append(plots.training_curve(epochs, title, f"loss-{stage}", "narrow"))
    for stage, title in _TRAININGS:
        watched = tuple(epoch for epoch in results.watched if epoch.stage == stage)
        if watched:
            published = ENCODERS.get(results.setting("data", "name"), {}) if stage == "pretrain" else {}
            name = f"watched-{stage}"
            shown.append(plots.watched_curve(watched, f"{title}, held-out images", name, "narrow", published))
    return shown


def _knn(results: RunResults) -> Interval | None:
    """Return the nearest-neighbour accuracy of the pre-trained encoder, None if it was not measured."""
    counts = results.stages["pretrain"].fields.get("knn_accuracy") if "pretrain" in results.stages else None
    return share_interval(counts["correct"], counts["total"]) if counts else None


def _picture(results: RunResults, sample: Sample, factor: int) -> Picture:
    challenger = results.class_name(sample.challenger)
    predicted = {
        "broken": challenger,
        "held": results.class_name(sample.label),
        "undecided": f"{results.class_name(sample.label)} or {challenger}",
    }
    return Picture(
        label=results.class_name(sample.label),
        predicted=predicted[sample.verdict],
        verdict=sample.verdict,
        clean=png_uri(sample.clean),
        adversarial=png_uri(_bytes(sample.adversarial)),
        difference=png_uri(_bytes(0.5 + factor * _difference(sample))),
    )


def _difference(sample: Sample) -> np.ndarray:
    return sample.adversarial.astype(np.float64) - sample.clean / 255.0


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels * 255.0), 0, 255).astype(np.uint8)
