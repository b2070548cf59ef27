"""Figures as inline SVG, with real text and with colours that follow the page's light or dark scheme."""

import io
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup, escape

from rush.runtime.lines import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["wide", "narrow"]
# Colour in the figure -> variable of the page's style sheet. The colour itself is the fallback.
_COLOURS = {"#1c2430": "ink", "#5d6876": "muted", "#dde2e8": "rule", "#1f6f8b": "proof", "#b4492d": "attack"}
INK, MUTED, RULE, PROOF, ATTACK = _COLOURS


def percent_ticks(axis: object) -> None:
    """Set ticks at the quarters of the whole range."""
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])  # type: ignore[attr-defined]


def new_figure(form: Format, height: float, **grid: Any) -> "tuple[Figure, list[Axes]]":
    """Return an empty figure in the report's style, without pyplot and its global state, and its panels.

    Args:
        form: "wide" for large screens, "narrow" for small ones.
        height: height in inches.
        grid: arguments of ``Figure.subplots``, for more than one panel.
    """
    from matplotlib.figure import Figure

    size = 9.0 if form == "wide" else 10.5
    figure = Figure(figsize=(7.2 if form == "wide" else 4.4, height), dpi=72, layout="constrained")
    panels = np.atleast_1d(figure.subplots(**grid)).ravel().tolist()
    for axes in panels:
        _style(axes, size)
    return figure, panels


def _style(axes: "Axes", size: float) -> None:
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=RULE, labelcolor=MUTED, labelsize=size)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.xaxis.label.set(color=MUTED, size=size)
    axes.yaxis.label.set(color=MUTED, size=size)
    axes.title.set(color=INK, size=size)


def to_svg(figure: "Figure", name: str, description: str) -> Markup:
    """Return ``figure`` as an <svg> element: ids unique by ``name``, colours as variables, ``description`` as label."""
    import matplotlib

    size = figure.axes[0].xaxis.label.get_fontsize()
    for text in (text for axes in figure.axes for text in axes.texts):
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
    opening = f'<svg class="plot" data-name="{name}" role="img" aria-label="{escape(printable(description))}" '
    return Markup(f"{opening}{box.group() if box else ''}>{rest}")
