"""Plots of training: loss, live figures and learning rate by epoch."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from rush.records.embedding import Embedding
from rush.records.published import NAMES, PUBLISHED
from rush.records.read_run import Epoch, Watched
from rush.reporting.svg import ATTACK, INK, MUTED, PROOF, Format, new_figure, percent_ticks, to_svg
from rush.reporting.wording import percent
from rush.runtime.lines import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of classes, legible on light and on dark backgrounds.
_CLASSES = (
    "#4c8fd6", "#e07b39", "#3fa35f", "#d6525c", "#9673c9", "#a0765b", "#d873b5", "#8a8f98", "#b5a52f", "#33b3bf",
)  # fmt: skip
Published = Mapping[str, tuple[tuple[int, float], ...]]  # (epochs, accuracy) by kind


def training_curve(epochs: tuple[Epoch, ...], title: str, name: str, form: Format) -> Markup:
    """Draw the mean loss of one stage by epoch, without epochs whose loss is not finite."""
    figure, (axes,) = new_figure(form, height=2.5)
    shown = [epoch for epoch in epochs if np.isfinite(epoch.loss)]
    numbers, losses = [epoch.number for epoch in shown], [epoch.loss for epoch in shown]
    axes.plot(numbers, losses, color=INK, linewidth=1.6, marker="o", markersize=2.5)
    axes.set(ylabel="loss", title=title)
    _epoch_ticks(axes)
    ends = f": {shown[0].loss:.3g} to {shown[-1].loss:.3g} in {len(shown)} epochs" if shown else ""
    return to_svg(figure, name, f"{title}{ends}")


def watched_curve(
    watched: tuple[Watched, ...], title: str, name: str, form: Format, published: Published | None = None
) -> Markup:
    """Draw live figures by epoch: one colour per kind, dashed if the images are noisy.

    Accuracies ``published`` for a kind, at up to twice as many epochs, are drawn as hollow squares.
    """
    figure, (axes,) = new_figure(form, height=2.5)
    names = list(dict.fromkeys(figure_name for epoch in watched for figure_name in epoch.figures))
    kinds = list(dict.fromkeys(figure_name.removesuffix("_noisy") for figure_name in names))
    ends = []
    for figure_name in names:
        shown = [(epoch.number, epoch.figures[figure_name]) for epoch in watched if figure_name in epoch.figures]
        colour = (INK, PROOF, ATTACK)[kinds.index(figure_name.removesuffix("_noisy")) % 3]
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
    percent_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize=axes.xaxis.label.get_fontsize(), labelcolor=MUTED, loc="best")
    return to_svg(figure, name, f"{title}, after the last epoch: {'; '.join(ends)}")


def rate_curve(epochs: tuple[Epoch, ...], title: str, name: str, form: Format) -> Markup:
    """Draw the learning rate of the last step of each epoch for which the log has one."""
    figure, (axes,) = new_figure(form, height=2.5)
    shown = [(epoch.number, epoch.learning_rate) for epoch in epochs if epoch.learning_rate is not None]
    axes.plot(*zip(*shown, strict=True), color=INK, linewidth=1.6, marker="o", markersize=2.5)
    axes.set(ylabel="learning rate", title=title, ylim=(0, None))
    _epoch_ticks(axes)
    return to_svg(figure, name, f"{title}: {shown[0][1]:.3g} to {shown[-1][1]:.3g} in {len(shown)} epochs")


def embedding_map(
    embedding: Embedding, places: np.ndarray, names: Callable[[int], str], title: str, name: str, form: Format
) -> Markup:
    """Draw ``places`` (n, 2) of the images on the map of an encoder, within the range of clean and noisy ones.

    The ten most frequent classes have colours of their own.
    """
    figure, (axes,) = new_figure(form, height=3.6)
    labels, counts = np.unique(embedding.labels, return_counts=True)
    shown = sorted(labels[np.argsort(-counts, kind="stable")][: len(_CLASSES)].tolist())
    rest = ~np.isin(embedding.labels, shown)
    axes.plot(*places[rest].T, "o", color=MUTED, markersize=2.5, alpha=0.5)
    for label, colour in zip(shown, _CLASSES, strict=False):
        own = places[embedding.labels == label]
        axes.plot(*own.T, "o", color=colour, markersize=3.5, alpha=0.8, label=printable(names(label)))
    every = np.concatenate([embedding.clean, embedding.clean if embedding.noisy is None else embedding.noisy])
    low, high = every.min(0), every.max(0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    axes.set(
        title=title, xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1])
    )
    axes.set(
        **{
            f"{axis}label": f"component {n}, {percent(share)}"
            for axis, n, share in zip("xy", (1, 2), embedding.explained, strict=True)
        }
    )
    size = axes.xaxis.label.get_fontsize()
    axes.legend(
        frameon=False,
        fontsize=size,
        labelcolor=MUTED,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=4,
        handletextpad=0,
        columnspacing=0.8,
    )
    return to_svg(figure, name, f"{title}: {len(places)} images of {len(labels)} classes in two dimensions")


def _epoch_ticks(axes: "Axes") -> None:
    """Label the x axis with "epoch", and set its ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
