"""Plots as inline SVG, with real text and with colours that follow the page's light or dark scheme."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup, escape

from rush.certification.certificates import Certificates
from rush.records.ladder import CurvePoint, Ladder
from rush.records.published import NAMES, PUBLISHED
from rush.records.read_run import Epoch, Watched
from rush.reporting.wording import NORM_SIGNS, headline_radius, percent, radius_text, threat_text
from rush.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["wide", "narrow"]
Published = Mapping[str, tuple[tuple[int, float], ...]]  # (epochs, accuracy) by kind
# Colour in the figure -> variable of the page's style sheet. The colour itself is the fallback.
_COLOURS = {"#1c2430": "ink", "#5d6876": "muted", "#dde2e8": "rule", "#1f6f8b": "proof", "#b4492d": "attack"}
_INK, _MUTED, _RULE, _PROOF, _ATTACK = _COLOURS
_POINTS = 400  # more steps than pixels would not be visible


def certified_curve(certificates: Certificates, ladder: Ladder | None, name: str, form: Format) -> Markup:
    """Draw certified accuracy over the radius with its pointwise 95 % band, headline radius, threat and ceiling.

    With a grid, its radii are dots, the steps between them are the accuracy at the larger, and the curve ends with it.
    """
    figure, axes = _figure(form, height=3.3)
    end = (certificates.largest_radius or certificates.sigma) * 1.04
    radii = _curve_radii(certificates, end)
    shares = [certificates.accuracy_interval(radius) for radius in radii]
    axes.fill_between(
        radii, [s.low for s in shares], [s.high for s in shares], step="pre", color=_PROOF, alpha=0.18, linewidth=0
    )
    axes.plot(radii, [s.estimate for s in shares], drawstyle="steps-pre", color=_PROOF, linewidth=1.8)
    if certificates.rule.radii is not None:
        tested = [certificates.accuracy_interval(radius).estimate for radius in certificates.rule.radii]
        axes.plot(certificates.rule.radii, tested, "o", color=_PROOF, markersize=4, clip_on=False)
    norm = certificates.rule.norm
    at = headline_radius(certificates)
    accuracy = certificates.accuracy_interval(at)
    where = "σ/2" if at == certificates.sigma / 2 else f"{NORM_SIGNS[norm]} {radius_text(at)}"
    axes.plot([at], [accuracy.estimate], "o", color=_INK, markersize=5)
    _label(axes, f"{percent(accuracy.estimate)} at {where}", (at, accuracy.estimate), (7, 6), color=_INK)
    last = "end of the grid" if certificates.rule.radii else f"ceiling, N = {certificates.num_estimation:,}"
    _radius_mark(axes, certificates.largest_radius, last, end)
    if ladder is not None and ladder.covering_radius(norm) < end:
        _radius_mark(axes, ladder.covering_radius(norm), f"covers {threat_text(ladder)}", end, line=1)
    unit = f"{NORM_SIGNS[norm]} radius, pixels in [0, 1]"
    axes.set(xlim=(0, end), ylim=(0, 1), xlabel=unit, ylabel="certified accuracy")
    _percent_ticks(axes.yaxis)
    ends = f"{percent(shares[0].estimate)} at 0, {percent(accuracy.estimate)} at {where}"
    return _svg(figure, name, f"Certified accuracy over the radius: {ends}")


def ladder_plot(ladder: Ladder, floor: Interval | None, name: str, form: Format) -> Markup:
    """Draw accuracy under each attacker with its 95 % interval, weakest first, and last the certificate's floor."""
    rows = [
        (rung.label, rung.accuracy, rung.accuracy_lower if rung.undecided else None, _ATTACK) for rung in ladder.rungs
    ]
    rows[0] = (*rows[0][:3], _INK)
    if floor is not None:
        rows.append(("certificate: floor for any attack", floor, None, _PROOF))
    figure, axes = _figure(form, height=0.6 + len(rows) * (0.58 if form == "narrow" else 0.36))
    if floor is not None and floor.estimate > 0:
        axes.axvspan(0, floor.estimate, color=_PROOF, alpha=0.1, linewidth=0)
    for place, (label, accuracy, held, colour) in enumerate(rows):
        _ladder_mark(axes, place, accuracy, held, colour)
        if form == "narrow":
            short = textwrap.shorten(label, 50, placeholder=" …")
            axes.annotate(short, (0, place - 0.38), annotation_clip=False, va="center", color=_INK)
    wrapped = [textwrap.shorten(label, 50, placeholder=" …") for label, *_ in rows]
    axes.set_yticks(range(len(rows)), [] if form == "narrow" else wrapped)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.75 if form == "narrow" else -0.5), xlabel="accuracy")
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    _percent_ticks(axes.xaxis)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    return _svg(figure, name, "; ".join(f"{label}: {percent(accuracy.estimate)}" for label, accuracy, *_ in rows))


def epsilon_curve(ladder: Ladder, floors: tuple[Interval, ...], name: str, form: Format) -> Markup:
    """Draw accuracy over epsilon on a logarithmic axis, with 95 % intervals.

    ``floors`` are certified accuracies at the balls around each epsilon, empty without certificates.
    """
    assert ladder.curve is not None
    points = ladder.curve.points
    figure, axes = _figure(form, height=3.3)
    x = [point.epsilon for point in points]
    shares = [point.accuracy for point in points]
    axes.set_xscale("log")
    axes.fill_between(x, [s.low for s in shares], [s.high for s in shares], color=_ATTACK, alpha=0.15, linewidth=0)
    axes.plot(x, [s.estimate for s in shares], color=_ATTACK, linewidth=1.8, marker="o", markersize=5, clip_on=False)
    held = [(point.epsilon, point.accuracy_lower.estimate) for point in points if point.undecided]
    for place, low in held:
        axes.plot([place], [low], "o", markerfacecolor="none", markeredgecolor=_ATTACK, markersize=5, clip_on=False)
    if floors:
        axes.plot(x, [floor.estimate for floor in floors], "s", color=_PROOF, markersize=4, clip_on=False)
    axes.axvline(ladder.epsilon, color=_MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    nearest = min(points, key=lambda point: abs(math.log(point.epsilon / ladder.epsilon)))
    near_top = nearest.accuracy.estimate > 0.7
    end, offset, side = (0, 5, "bottom") if near_top else (1, -3, "top")
    _label(axes, threat_text(ladder), (ladder.epsilon, end), (4, offset), va=side, color=_MUTED)
    axes.set(ylim=(0, 1), xlabel="ε, pixels in [0, 1], logarithmic", ylabel="accuracy")
    _epsilon_ticks(axes, points, most=11 if form == "wide" else 6)
    _percent_ticks(axes.yaxis)
    values = "; ".join(f"{p.epsilon_text}: {percent(s.estimate)}" for p, s in zip(points, shares, strict=True))
    return _svg(figure, name, f"Accuracy over epsilon: {values}")


def training_curve(epochs: tuple[Epoch, ...], title: str, name: str, form: Format) -> Markup:
    """Draw the mean loss of one stage by epoch, without epochs whose loss is not finite."""
    figure, axes = _figure(form, height=2.5)
    shown = [epoch for epoch in epochs if np.isfinite(epoch.loss)]
    numbers, losses = [epoch.number for epoch in shown], [epoch.loss for epoch in shown]
    axes.plot(numbers, losses, color=_INK, linewidth=1.6, marker="o", markersize=2.5)
    axes.set(ylabel="loss", title=title)
    _epoch_ticks(axes)
    ends = f": {shown[0].loss:.3g} to {shown[-1].loss:.3g} in {len(shown)} epochs" if shown else ""
    return _svg(figure, name, f"{title}{ends}")


def watched_curve(
    watched: tuple[Watched, ...], title: str, name: str, form: Format, published: Published | None = None
) -> Markup:
    """Draw live figures by epoch: one colour per kind, dashed if the images are noisy.

    Accuracies ``published`` for a kind, at up to twice as many epochs, are hollow squares.
    """
    figure, axes = _figure(form, height=2.5)
    names = list(dict.fromkeys(figure_name for epoch in watched for figure_name in epoch.figures))
    kinds = list(dict.fromkeys(figure_name.removesuffix("_noisy") for figure_name in names))
    ends = []
    for figure_name in names:
        shown = [(epoch.number, epoch.figures[figure_name]) for epoch in watched if figure_name in epoch.figures]
        colour = (_INK, _PROOF, _ATTACK)[kinds.index(figure_name.removesuffix("_noisy")) % 3]
        style = "--" if figure_name.endswith("_noisy") else "-"
        label = NAMES.get(figure_name, figure_name)
        epochs, shares = zip(*shown, strict=True)
        axes.plot(epochs, shares, style, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
        ends.append(f"{label}: {percent(shown[-1][1])}")
        near = [point for point in (published or {}).get(figure_name, ()) if point[0] <= 2 * max(epochs)]
        if near:
            axes.plot(
                *zip(*near, strict=True), "s", color=colour, markerfacecolor="none", label=f"{label}, {PUBLISHED}"
            )
            ends += [f"{label}, {PUBLISHED}, {at} epochs: {percent(share)}" for at, share in near]
    axes.set(ylim=(0, 1), ylabel="accuracy", title=title)
    _epoch_ticks(axes)
    _percent_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize=axes.xaxis.label.get_fontsize(), labelcolor=_MUTED, loc="best")
    return _svg(figure, name, f"{title}, after the last epoch: {'; '.join(ends)}")


def _curve_radii(certificates: Certificates, end: float) -> np.ndarray:
    """Return ascending radii at which a curve drawn ``steps-pre`` is exact, or too low if they are too many.

    With a grid they are its radii and 0, because nothing was tested beyond its last.
    """
    if certificates.rule.radii is not None:
        return np.unique([0.0, *certificates.rule.radii])
    radii = np.unique(np.concatenate([[0.0, end], certificates.radius[certificates.correct]]))
    return radii if radii.size <= _POINTS else np.linspace(0, radii[-1], _POINTS)


def _radius_mark(axes: "Axes", radius: float, text: str, end: float, line: int = 0) -> None:
    """Draw a vertical line with ``text`` beside it, ``line`` lines below the top."""
    right = radius > 0.6 * end
    axes.axvline(radius, color=_MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    below = -3 - 14 * line
    offset, side = ((-4, below), "right") if right else ((4, below), "left")
    _label(axes, text, (radius, 1), offset, ha=side, va="top", color=_MUTED)


def _label(axes: "Axes", text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write ``text`` at ``offset`` points from the place ``at``."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def _ladder_mark(axes: "Axes", place: int, accuracy: Interval, held: Interval | None, colour: str) -> None:
    axes.plot(
        [accuracy.low, accuracy.high], [place, place], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt"
    )
    axes.plot([accuracy.estimate], [place], "o", color=colour, markersize=6, clip_on=False)
    if held is not None:
        axes.plot([held.estimate], [place], "o", markerfacecolor="none", markeredgecolor=colour, markersize=6)
    right = accuracy.high < 0.86
    anchor, offset, side = (accuracy.high, 5, "left") if right else (accuracy.low, -5, "right")
    if held is not None and not right:
        anchor = min(anchor, held.estimate - 0.01)
    _label(axes, percent(accuracy.estimate), (anchor, place), (offset, 0), ha=side, va="center", color=colour)


def _epoch_ticks(axes: "Axes") -> None:
    """Name the x axis after epochs, with ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _epsilon_ticks(axes: "Axes", points: tuple[CurvePoint, ...], most: int) -> None:
    """Set ticks at the epsilons of the curve, at most ``most``, always including the last."""
    shown = points[:: -math.ceil(len(points) / most)]
    axes.set_xticks([point.epsilon for point in shown], [point.epsilon_text for point in shown])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.04)


def _percent_ticks(axis: object) -> None:
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])  # type: ignore[attr-defined]


def _figure(form: Format, height: float) -> "tuple[Figure, Axes]":
    """Return an empty figure in the report's style, without pyplot and its global state."""
    from matplotlib.figure import Figure

    size = 9.0 if form == "wide" else 10.5
    figure = Figure(figsize=(7.2 if form == "wide" else 4.4, height), dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=_RULE, labelcolor=_MUTED, labelsize=size)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.xaxis.label.set(color=_MUTED, size=size)
    axes.yaxis.label.set(color=_MUTED, size=size)
    axes.title.set(color=_INK, size=size)
    return figure, axes


def _svg(figure: "Figure", name: str, description: str) -> Markup:
    """Return ``figure`` as an <svg> element: ids unique by ``name``, colours as variables, ``description`` as label."""
    import matplotlib

    size = figure.axes[0].xaxis.label.get_fontsize()
    for text in figure.axes[0].texts:
        text.set_fontsize(size)
    buffer = io.StringIO()
    # Text remains text, and a dollar sign in a name does not start a formula. Ids follow from the name, so that equal
    # runs give equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with its own fonts
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), name, description)


def _inline(text: str, name: str, description: str) -> Markup:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    for colour, variable in _COLOURS.items():
        rest = rest.replace(colour, f"var(--{variable}, {colour})")
    rest = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"\n\s*", "\n", rest).replace("xlink:href", "href")
    opening = f'<svg class="plot" role="img" aria-label="{escape(description)}" '
    return Markup(f"{opening}{box.group() if box else ''}>{rest}")
