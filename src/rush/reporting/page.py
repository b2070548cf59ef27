"""The report: one self-contained HTML page of a run folder, readable offline, on a phone, in the dark and on paper."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from rush.records.ladder import Sample
from rush.records.read_run import RunResults, read_run, read_run_samples
from rush.reporting import plots, tables
from rush.reporting.costs import training_sentence
from rush.runtime.files import write_text
from rush.runtime.lines import printable
from rush.statistics import Interval, share_interval

SAMPLE_COUNT = 9
_TRAININGS = (("pretrain", "Pre-training"), ("finetune", "Fine-tuning"))


@dataclass(frozen=True)
class Picture:
    """One attacked image as shown: three PNG data URIs and what is said of it."""

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
    """Shares of the images, summing to 1: proved, neither proved nor broken, broken by attack, wrong without one."""

    proved: float
    open: float
    broken: float
    wrong: float


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` into the run folder ``folder`` and return its path. A kill leaves the old report.

    Equal files give an equal page. Stages that are not finished are named with the command that makes them.
    Raises: RunError when ``folder`` is no run folder or one of its files is damaged.
    """
    results = read_run(folder)
    page = render(results)
    path = results.folder / "report.html"
    write_text(path, page)
    return path


def render(results: RunResults) -> str:
    """The page of ``results`` as HTML text; reads the sample images from the run folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": tables.percent,
        "bounds": tables.bounds,
        "share": tables.share,
        "points": tables.points,
        "radius": tables.radius_text,
        "samples": tables.samples_text,
        "method": tables.method_text,
        "attackers": tables.attackers_text,
        "verdict": tables.audit_sentence,
        "audited": tables.audited_threat_text,
        "d": tables.d_text,
    }
    return environment.get_template("page.html.j2").render(_context(results))


def _shown(value: object) -> object:
    """``value`` as the page holds it: text from outside without characters that cannot be written or that hide."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def png_uri(image: np.ndarray) -> str:
    """``image`` uint8 (C, H, W) as a PNG data URI: RGB for three channels, else the mean over channels in grey."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(axis=0).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def magnification(samples: tuple[Sample, ...]) -> int:
    """The largest whole factor, at least 1, with which every pixel difference still fits the range around mid-grey."""
    largest = max((float(np.abs(_difference(sample)).max()) for sample in samples), default=0.0)
    return max(1, int(0.5 / largest + 1e-3)) if largest > 0 else 1


def _context(results: RunResults) -> Mapping[str, Any]:
    samples = read_run_samples(results, SAMPLE_COUNT)
    factor = magnification(samples)
    return {
        "run": results,
        "certificates": results.certificates,
        "rule": results.certificates.rule if results.certificates else None,
        "headline": tables.headline_radius(results.certificates) if results.certificates else 0.0,
        "ladder": results.ladder,
        "floor": _floor(results),
        "floor_lower": _floor_lower(results),
        "not_certified": tables.NOT_CERTIFIED if results.plain else "",
        "proved_on": len(results.threat_certificates) if results.threat_certificates else 0,
        "inner": _inner(results),
        "grown": _grown_plot(results),
        "curve_rows": tables.curve_rows(results),
        "curve_zero": tables.zero_text(results.ladder) if results.ladder and results.ladder.curve else ("", False),
        "curve_rises": tables.rises_text(results.ladder) if results.ladder else "",
        "audit": results.audit,
        "finding_rows": tables.finding_rows(results.audit) if results.audit else [],
        "bar": _bar(results),
        "threat": tables.threat_text(results.ladder) if results.ladder else "",
        "not_done": tables.not_done(results),
        "data": results.setting("data", "name") or "unnamed data",
        "model": tables.model_text(results),
        "curve": _curve_plot(results),
        "certified_rows": tables.certified_rows(results),
        "decided_names": _decided_names(results),
        "acr": tables.acr_text(results),
        "copies": tables.copies_text(results.certificates) if results.certificates else "",
        "ladder_plot": _ladder_plot(results),
        "ladder_rows": tables.ladder_rows(results.ladder) if results.ladder else [],
        "comparison": tables.comparison_rows(results),
        "unequal": tables.unequal_conditions(results),
        "pictures": [_picture(results, sample, factor) for sample in samples],
        "factor": factor,
        "knn": _knn(results),
        "votes": results.ladder.votes_per_image if results.ladder else 0.0,
        "training": _training_plots(results),
        "cost": tables.cost_rows(results),
        "training_told": training_sentence(results),
        "recipe": tables.nested_rows(results.recipe),
        "provenance": tables.nested_rows(results.provenance),
    }


def _floor(results: RunResults) -> Interval | None:
    """Certified accuracy at the smallest l2 ball around the threat: no attack within the threat leaves less."""
    proved = results.threat_certificates
    return (
        None if proved is None or results.ladder is None else proved.accuracy_interval(results.ladder.covering_radius)
    )


def _floor_lower(results: RunResults) -> str:
    """The same with 95 % confidence for the distribution, as text; empty without one."""
    proved, ladder = results.threat_certificates, results.ladder
    return "" if proved is None or ladder is None else tables.lower_text(proved, ladder.covering_radius)


def _inner(results: RunResults) -> Interval | None:
    """Certified accuracy at the largest l2 ball inside the threat: proves less than the threat asks."""
    proved = results.threat_certificates
    return None if proved is None or results.ladder is None else proved.accuracy_interval(results.ladder.inner_radius)


def _decided_names(results: RunResults) -> tuple[str, ...]:
    """Names of the further shares in each row of certified accuracy."""
    return tuple(results.certificates.other_shares(0.0) or ()) if results.certificates is not None else ()


def _bar(results: RunResults) -> Bar | None:
    floor, ladder = _floor(results), results.ladder
    if floor is None or ladder is None:
        return None
    attacked = max(floor.estimate, ladder.strongest.accuracy.estimate)
    clean = max(attacked, ladder.clean.accuracy.estimate)
    return Bar(floor.estimate, attacked - floor.estimate, clean - attacked, 1 - clean)


def _curve_plot(results: RunResults) -> Plot | None:
    certificates, ladder = results.certificates, results.ladder
    if certificates is None:
        return None
    wide = plots.certified_curve(certificates, ladder, "curve-wide", "wide")
    return Plot(wide, plots.certified_curve(certificates, ladder, "curve-narrow", "narrow"))


def _ladder_plot(results: RunResults) -> Plot | None:
    ladder = results.ladder
    if ladder is None:
        return None
    floor = _floor(results)
    wide = plots.ladder_plot(ladder, floor, "ladder-wide", "wide")
    return Plot(wide, plots.ladder_plot(ladder, floor, "ladder-narrow", "narrow"))


def _grown_plot(results: RunResults) -> Plot | None:
    ladder, proved = results.ladder, results.threat_certificates
    if ladder is None or ladder.curve is None:
        return None
    balls = [ladder.around(point.epsilon) for point in ladder.curve.points]
    floors = tuple(proved.accuracy_interval(radius) for radius in balls) if proved is not None else ()
    wide = plots.epsilon_curve(ladder, floors, "epsilon-wide", "wide")
    return Plot(wide, plots.epsilon_curve(ladder, floors, "epsilon-narrow", "narrow"))


def _training_plots(results: RunResults) -> list[Markup]:
    """Loss and live figures of each trained stage, narrow on every screen: two stand side by side on a wide one."""
    shown = []
    for stage, title in _TRAININGS:
        epochs = tuple(epoch for epoch in results.epochs if epoch.stage == stage)
        if epochs:
            shown.append(plots.training_curve(epochs, title, f"loss-{stage}", "narrow"))
    for stage, title in _TRAININGS:
        watched = tuple(one for one in results.watched if one.stage == stage)
        if watched:
            shown.append(plots.watched_curve(watched, f"{title}, held-out images", f"watched-{stage}", "narrow"))
    return shown


def _knn(results: RunResults) -> Interval | None:
    """Accuracy of nearest neighbours on the pre-trained encoder's representations, None where it was not measured."""
    found = results.stages["pretrain"].fields.get("knn_accuracy") if "pretrain" in results.stages else None
    return share_interval(found["correct"], found["total"]) if found else None


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
