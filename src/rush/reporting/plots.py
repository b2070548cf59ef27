"""Plots of the report."""

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from rush.certification.certificates import Certificates
from rush.records.ladder import CurvePoint, Ladder
from rush.records.published import CertifiedCurve
from rush.reporting.classes import ClassAccuracy
from rush.reporting.svg import ATTACK, INK, MUTED, PROOF, Format, new_figure, percent_ticks, to_svg
from rush.reporting.wording import NORM_SIGNS, headline_radius, percent, radius_text, threat_text
from rush.runtime.lines import printable
from rush.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400  # more steps than pixels would not be visible
_BINS = 20
_ENLARGED = 0.5  # a wider range of accuracies is legible in the whole plot
_Row = tuple[str, Interval, Interval | None, str]  # label, accuracy, share held, colour


def certified_curve(
    certificates: Certificates, ladder: Ladder | None, published: Sequence[CertifiedCurve], name: str, form: Format
) -> Markup:
    """Draw certified accuracy over the radius with its pointwise 95 % band, headline radius, threat and ceiling.

    With a grid, its radii are dots. Each step between two of them is the accuracy at the larger one, and the curve ends
    with the grid. Curves ``published`` for the same data are drawn behind the run's curve.
    """
    figure, (axes,) = new_figure(form, height=3.3)
    end = (certificates.largest_radius or certificates.sigma) * 1.04
    radii = curve_radii(certificates, end)
    shares = [certificates.accuracy_interval(radius) for radius in radii]
    _draw_published(axes, published)
    axes.fill_between(
        radii, [s.low for s in shares], [s.high for s in shares], step="pre", color=PROOF, alpha=0.18, linewidth=0
    )
    axes.plot(radii, [s.estimate for s in shares], drawstyle="steps-pre", color=PROOF, linewidth=1.8)
    if certificates.rule.radii is not None:
        tested = [certificates.accuracy_interval(radius).estimate for radius in certificates.rule.radii]
        axes.plot(certificates.rule.radii, tested, "o", color=PROOF, markersize=4, clip_on=False)
    norm = certificates.rule.norm
    at = headline_radius(certificates)
    accuracy = certificates.accuracy_interval(at)
    where = "σ/2" if at == certificates.sigma / 2 else f"{NORM_SIGNS[norm]} {radius_text(at)}"
    axes.plot([at], [accuracy.estimate], "o", color=INK, markersize=5)
    _label(axes, f"{percent(accuracy.estimate)} at {where}", (at, accuracy.estimate), (7, 6), color=INK)
    last = "end of the grid" if certificates.rule.radii else f"ceiling, N = {certificates.num_estimation:,}"
    _radius_mark(axes, certificates.largest_radius, last, end)
    if ladder is not None and ladder.covering_radius(norm) < end:
        _radius_mark(axes, ladder.covering_radius(norm), f"covers {threat_text(ladder)}", end, line=1)
    unit = f"{NORM_SIGNS[norm]} radius, pixels in [0, 1]"
    axes.set(xlim=(0, end), ylim=(0, 1), xlabel=unit, ylabel="certified accuracy")
    percent_ticks(axes.yaxis)
    ends = f"{percent(shares[0].estimate)} at 0, {percent(accuracy.estimate)} at {where}"
    ends += "".join(f"; {curve.label}: {percent(curve.accuracy[0])} at {curve.radii[0]:g}" for curve in published)
    return to_svg(figure, name, f"Certified accuracy over the radius: {ends}")


def radius_histogram(certificates: Certificates, name: str, form: Format) -> Markup:
    """Draw the number of images by certified radius, those with the right class below those with another."""
    figure, (axes,) = new_figure(form, height=2.6)
    edges, right, wrong = radius_counts(certificates)
    axes.bar(edges[:-1], right, np.diff(edges), align="edge", color=PROOF, alpha=0.75, label="right class")
    axes.bar(edges[:-1], wrong, np.diff(edges), right, align="edge", color=ATTACK, alpha=0.75, label="another class")
    norm = NORM_SIGNS[certificates.rule.norm]
    axes.set(xlim=(0, edges[-1]), xlabel=f"{norm} radius, pixels in [0, 1]", ylabel="images")
    _legend(axes)
    outside = f"{int(certificates.abstained.sum()):,} abstained"
    return to_svg(figure, name, f"Images by certified radius: {right.sum()} right, {wrong.sum()} wrong, {outside}")


def radius_counts(certificates: Certificates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the edges (B + 1,) of a histogram's bins, and the numbers of images with the right and with another class.

    Images that abstain are in no bin. A bin includes its lower edge, and the last bin also the largest radius.
    """
    end = certificates.largest_radius or certificates.sigma
    edges = np.linspace(0, end, _BINS + 1)
    decided = ~certificates.abstained
    parts = (decided & certificates.correct, decided & ~certificates.correct)
    right, wrong = (np.histogram(certificates.radius[part], edges)[0] for part in parts)
    return edges, right, wrong


def class_plot(classes: Sequence[ClassAccuracy], radius: str, name: str, form: Format) -> Markup:
    """Draw the accuracy of each class: predicted as a ring, certified at ``radius`` as a dot with 95 % interval."""
    narrow = form == "narrow"
    figure, (axes,) = new_figure(form, height=0.7 + len(classes) * (0.56 if narrow else 0.3))
    axes.set(xlim=(0, 1), xlabel=f"accuracy: predicted (ring), certified at {radius} (dot)")
    for place, row in enumerate(classes):
        ring: Any = {"markerfacecolor": "none", "markeredgecolor": INK, "markersize": 7, "clip_on": False}
        axes.plot([row.predicted.estimate], [place], "o", **ring)
        axes.plot([row.certified.low, row.certified.high], [place, place], color=PROOF, linewidth=2.2, alpha=0.45)
        axes.plot([row.certified.estimate], [place], "o", color=PROOF, markersize=6, clip_on=False)
    _row_labels(axes, [row.name for row in classes], narrow)
    percent_ticks(axes.xaxis)
    said = "; ".join(f"{row.name}: {percent(row.certified.estimate)}" for row in classes)
    return to_svg(figure, name, f"Certified accuracy by class at {radius}: {said}")


def certified_curves(logs: Sequence[tuple[str, Certificates]], name: str, form: Format) -> Markup:
    """Draw certified accuracy over the radius of several named logs, whose radii are in one norm, each to its end."""
    figure, (axes,) = new_figure(form, height=3.6)
    ends = []
    for (log_name, certificates), style in zip(logs, _styles(), strict=False):
        radii = curve_radii(certificates, certificates.largest_radius)
        shares = [certificates.accuracy(radius) for radius in radii]
        line: Any = {
            "linewidth": 1.6,
            "markersize": 4,
            "marker": "" if certificates.rule.radii is None else "o",
            **style,
        }
        axes.plot(radii, shares, drawstyle="steps-pre", label=printable(log_name), **line)
        ends.append(f"{log_name}: {percent(shares[0])} at 0")
    norm = NORM_SIGNS[logs[0][1].rule.norm]
    axes.set(xlim=(0, None), ylim=(0, 1), xlabel=f"{norm} radius, pixels in [0, 1]", ylabel="certified accuracy")
    percent_ticks(axes.yaxis)
    _legend(axes, loc="upper right")
    return to_svg(figure, name, f"Certified accuracy over the radius: {'; '.join(ends)}")


def epsilon_curves(ladders: Sequence[tuple[str, Ladder]], name: str, form: Format) -> Markup:
    """Draw accuracy over epsilon, on a logarithmic axis, of named runs that have a curve under threats of one norm."""
    figure, (axes,) = new_figure(form, height=3.6)
    axes.set_xscale("log")
    ends = []
    for (run_name, ladder), style in zip(ladders, _styles(), strict=False):
        assert ladder.curve is not None
        points = ladder.curve.points
        shares = [point.accuracy.estimate for point in points]
        x = [point.epsilon for point in points]
        axes.plot(x, shares, linewidth=1.6, marker="o", markersize=4, label=printable(run_name), **style)
        ends.append(f"{run_name}: {percent(shares[0])} at {points[0].epsilon_text}")
    longest = max((ladder.curve.points for _, ladder in ladders if ladder.curve is not None), key=len)
    _epsilon_ticks(axes, longest, most=11 if form == "wide" else 6)
    axes.set(ylim=(0, 1), xlabel=f"{NORM_SIGNS[ladders[0][1].norm]} ε, logarithmic", ylabel="accuracy")
    percent_ticks(axes.yaxis)
    _legend(axes, loc="upper right")
    return to_svg(figure, name, f"Accuracy over epsilon: {'; '.join(ends)}")


def ladder_plot(ladder: Ladder, floor: Interval | None, name: str, form: Format) -> Markup:
    """Draw accuracy under each attacker with its 95 % interval, weakest first, and last the certificate's floor.

    Where the attackers are close together, a second panel enlarges their range.
    """
    rows = [
        (rung.label, rung.accuracy, rung.accuracy_lower if rung.undecided else None, ATTACK) for rung in ladder.rungs
    ]
    rows[0] = (*rows[0][:3], INK)
    attacked = rows[1:]
    if floor is not None:
        rows.append(("certificate: floor for any attack", floor, None, PROOF))
    panels: list[tuple[list[_Row], tuple[float, float]]] = [(rows, (0.0, 1.0))]
    span = zoomed_range([accuracy for _, accuracy, *_ in attacked])
    if span is not None:
        panels.append((attacked if form == "narrow" else rows[: len(attacked) + 1], span))
    figure, drawn = _ladder_panels([len(shown) for shown, _ in panels], form)
    for axes, (shown, limits) in zip(drawn, panels, strict=True):
        _draw_rows(axes, shown, limits, narrow=form == "narrow")
    if floor is not None and floor.estimate > 0:
        drawn[0].axvspan(0, floor.estimate, color=PROOF, alpha=0.1, linewidth=0)
    if span is not None:
        drawn[0].axvspan(*span, color=ATTACK, alpha=0.08, linewidth=0)
        drawn[1].set(xlabel="the attackers’ range, enlarged")
        if form == "wide":
            drawn[1].set(yticks=[], ylim=drawn[0].get_ylim())
    return to_svg(figure, name, "; ".join(f"{label}: {percent(accuracy.estimate)}" for label, accuracy, *_ in rows))


def zoomed_range(accuracies: Sequence[Interval]) -> tuple[float, float] | None:
    """Return the range of the intervals, widened to full percents, or None if enlarging it would not help."""
    if len(accuracies) < 2:
        return None
    low, high = min(a.low for a in accuracies), max(a.high for a in accuracies)
    low, high = math.floor(100 * low) / 100, math.ceil(100 * high) / 100
    return (low, high) if 0 < high - low <= _ENLARGED else None


def epsilon_curve(ladder: Ladder, floors: tuple[Interval, ...], name: str, form: Format) -> Markup:
    """Draw accuracy over epsilon on a logarithmic axis, with 95 % intervals.

    ``floors`` are certified accuracies at the balls around each epsilon, empty without certificates.
    """
    assert ladder.curve is not None
    points = ladder.curve.points
    figure, (axes,) = new_figure(form, height=3.3)
    x = [point.epsilon for point in points]
    shares = [point.accuracy for point in points]
    axes.set_xscale("log")
    axes.fill_between(x, [s.low for s in shares], [s.high for s in shares], color=ATTACK, alpha=0.15, linewidth=0)
    axes.plot(x, [s.estimate for s in shares], color=ATTACK, linewidth=1.8, marker="o", markersize=5, clip_on=False)
    held = [(point.epsilon, point.accuracy_lower.estimate) for point in points if point.undecided]
    for place, low in held:
        axes.plot([place], [low], "o", markerfacecolor="none", markeredgecolor=ATTACK, markersize=5, clip_on=False)
    if floors:
        axes.plot(x, [floor.estimate for floor in floors], "s", color=PROOF, markersize=4, clip_on=False)
    axes.axvline(ladder.epsilon, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    nearest = min(points, key=lambda point: abs(math.log(point.epsilon / ladder.epsilon)))
    near_top = nearest.accuracy.estimate > 0.7
    end, offset, side = (0, 5, "bottom") if near_top else (1, -3, "top")
    _label(axes, threat_text(ladder), (ladder.epsilon, end), (4, offset), va=side, color=MUTED)
    axes.set(ylim=(0, 1), xlabel="ε, pixels in [0, 1], logarithmic", ylabel="accuracy")
    _epsilon_ticks(axes, points, most=11 if form == "wide" else 6)
    percent_ticks(axes.yaxis)
    values = "; ".join(f"{p.epsilon_text}: {percent(s.estimate)}" for p, s in zip(points, shares, strict=True))
    return to_svg(figure, name, f"Accuracy over epsilon: {values}")


def curve_radii(certificates: Certificates, end: float) -> np.ndarray:
    """Return ascending radii at which a curve drawn ``steps-pre`` is exact, or too low if there are too many radii.

    With a grid they are its radii and 0, because nothing was tested beyond its last radius.
    """
    if certificates.rule.radii is not None:
        return np.unique([0.0, *certificates.rule.radii])
    radii = np.unique(np.concatenate([[0.0, end], certificates.radius[certificates.correct]]))
    return radii if radii.size <= _POINTS else np.linspace(0, radii[-1], _POINTS)


def _radius_mark(axes: "Axes", radius: float, text: str, end: float, line: int = 0) -> None:
    """Draw a vertical line with ``text`` beside it, ``line`` lines below the top."""
    right = radius > 0.6 * end
    axes.axvline(radius, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    below = -3 - 14 * line
    offset, side = ((-4, below), "right") if right else ((4, below), "left")
    _label(axes, text, (radius, 1), offset, ha=side, va="top", color=MUTED)


def _label(axes: "Axes", text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write ``text`` at ``offset`` points from the place ``at``."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def _styles() -> Iterator[dict[str, Any]]:
    """Yield distinct line styles without end: by colour, then by dashes."""
    for dashes in itertools.cycle(("-", "--", ":", "-.")):
        for colour in (PROOF, ATTACK, INK, MUTED):
            yield {"color": colour, "linestyle": dashes}


def _draw_published(axes: "Axes", published: Sequence[CertifiedCurve]) -> None:
    for curve, style in zip(published, ("-", "--", ":"), strict=False):
        axes.plot(curve.radii, curve.accuracy, style, color=MUTED, linewidth=1.1, marker=".", label=curve.label)
    if published:
        _legend(axes, loc="lower left")


def _legend(axes: "Axes", loc: Literal["best", "lower left", "upper right"] = "best") -> None:
    axes.legend(frameon=False, fontsize=axes.xaxis.label.get_fontsize(), labelcolor=MUTED, loc=loc)


def _ladder_panels(rows: list[int], form: Format) -> "tuple[Figure, list[Axes]]":
    """Return a figure with a panel per number of rows: side by side, or below each other if it is narrow."""
    if form == "wide":
        ratios = [3, 2][: len(rows)]
        return new_figure(form, 0.6 + max(rows) * 0.36, ncols=len(rows), width_ratios=ratios)
    return new_figure(form, 0.6 * len(rows) + sum(rows) * 0.58, nrows=len(rows), height_ratios=[n + 1 for n in rows])


def _draw_rows(axes: "Axes", rows: Sequence[_Row], limits: tuple[float, float], narrow: bool) -> None:
    """Draw the rows of a ladder whose accuracies are within the limits, and omit the others."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=limits, xlabel="accuracy")
    for place, (_, accuracy, held, colour) in enumerate(rows):
        if limits[0] <= accuracy.estimate <= limits[1]:
            _ladder_mark(axes, place, accuracy, held, colour)
    _row_labels(axes, [label for label, *_ in rows], narrow)
    if limits == (0, 1):
        percent_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def _row_labels(axes: "Axes", labels: Sequence[str], narrow: bool) -> None:
    """Label the rows of a plot from top to bottom: beside its axis or, if it is narrow, within it above each row."""
    short = [textwrap.shorten(printable(label), 50, placeholder=" …") for label in labels]
    axes.set_yticks(range(len(short)), [] if narrow else short)
    axes.set(ylim=(len(short) - 0.5, -0.75 if narrow else -0.5))
    for place, label in enumerate(short if narrow else []):
        start = (axes.get_xlim()[0], place - 0.38)
        axes.annotate(label, start, annotation_clip=False, va="center", color=INK)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def _ladder_mark(axes: "Axes", place: int, accuracy: Interval, held: Interval | None, colour: str) -> None:
    axes.plot(
        [accuracy.low, accuracy.high], [place, place], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt"
    )
    axes.plot([accuracy.estimate], [place], "o", color=colour, markersize=6, clip_on=False)
    if held is not None:
        axes.plot([held.estimate], [place], "o", markerfacecolor="none", markeredgecolor=colour, markersize=6)
    low, high = axes.get_xlim()
    right = accuracy.high < low + 0.86 * (high - low)
    anchor, offset, side = (accuracy.high, 5, "left") if right else (accuracy.low, -5, "right")
    if held is not None and not right:
        anchor = min(anchor, held.estimate - 0.01 * (high - low))
    _label(axes, percent(accuracy.estimate), (anchor, place), (offset, 0), ha=side, va="center", color=colour)


def _epsilon_ticks(axes: "Axes", points: tuple[CurvePoint, ...], most: int) -> None:
    """Set ticks at the epsilons of the curve, at most ``most``, always including the last."""
    shown = points[:: -math.ceil(len(points) / most)]
    axes.set_xticks([point.epsilon for point in shown], [point.epsilon_text for point in shown])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.04)
