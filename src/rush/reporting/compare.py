"""Runs and certification logs side by side; a paired test only where the images are shown to be the same."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import special

from rush.certification.certificates import Certificates, of_pictures
from rush.certification.rule import Rule
from rush.certification.sequential import UNDECIDED
from rush.errors import ConfigError
from rush.records.public_logs import CertificateTable, read_log, states_sigma
from rush.records.read_run import read_run
from rush.reporting.attacked import Table, attacked_tables
from rush.reporting.costs import training_tables
from rush.reporting.doubts import doubts
from rush.reporting.tables import percent, points, share
from rush.runtime.lines import printable
from rush.statistics import Interval, paired_difference

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STEP = 0.25
_MOST_RADII = 40
_NONE = "–"


@dataclass(frozen=True)
class PairedRadius:
    """Certified accuracy of the first log minus that of the second at one radius, over the same images.

    difference: with its 95 % interval. only_first, only_second: images that one of them certifies and the other does
    not. p_value: exact McNemar test of "neither is better".
    """

    radius: float
    difference: Interval
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two logs, by name, on ``images`` different images, or why it is ``refused``.

    assumed: that the images are the same was the caller's word, and no label contradicts it.
    notes: what else a reader must know, such as conditions that differ.
    """

    first: str
    second: str
    refused: str | None
    images: int
    assumed: bool
    notes: tuple[str, ...]
    rows: tuple[PairedRadius, ...]


@dataclass(frozen=True)
class Comparison:
    """Logs with different names, the radii at which they are compared, one for the classes, and the pairs."""

    logs: tuple[CertificateTable, ...]
    radii: tuple[float, ...]
    radius: float
    pairs: tuple[Paired, ...]


@dataclass(frozen=True, eq=False)
class Ecdf:
    """Empirical distribution: ``values`` ascending (M,), ``shares`` (M,) of what is at most as large."""

    values: np.ndarray
    shares: np.ndarray


def compare(
    logs: Sequence[CertificateTable],
    radii: Sequence[float] | None = None,
    radius: float | None = None,
    assume_same_images: bool = False,
) -> Comparison:
    """The logs side by side, and the first of them paired with every other one.

    radii: where accuracies are compared; by default the multiples of 0.25 (of 0.5, 1, ... for very large ones) up to
    the largest certified radius. radius: where classes are compared; by default half the smallest sigma, or the
    next larger radius that all logs with a grid hold.

    A pair needs the same images. Data-set fingerprints that differ refuse it. Where they agree, images are matched by
    id, and both logs must hold the same ids: which images a log lacks might depend on how hard they are. Where one is
    missing, the pair is refused unless ``assume_same_images``: then images are matched by idx, on those that both logs
    hold, and refused where a label differs; the notes say that sameness was assumed.
    Raises: ConfigError without logs, or for a radius that is not a finite number >= 0.
    """
    if not logs:
        raise ConfigError("there is nothing to compare; give at least one run folder or log")
    named = _with_different_names(logs)
    grid = _default_radii(named) if radii is None else _checked_radii(radii)
    return Comparison(
        logs=named,
        radii=grid,
        radius=_default_radius(named) if radius is None else _checked_radii([radius])[0],
        pairs=tuple(_paired(named[0], other, grid, assume_same_images) for other in named[1:]),
    )


def compare_command(
    paths: Sequence[Path],
    sigma: Sequence[float] | None = None,
    radii: Sequence[float] | None = None,
    radius: float | None = None,
    assume_same_images: bool = False,
) -> list[Table]:
    """The tables of ``rush compare``: run folders and logs at ``paths``, of attacks where runs were attacked, of what
    training cost.

    A run without noise has no certificates and stands among the attacked ones alone.
    sigma: one value for each path in order, or a single one for every log that does not say its sigma.
    Raises: ConfigError for numbers that are not allowed or missing; DataError and RunError for damaged files.
    """
    runs = {path: read_run(path) for path in paths if (path / "recipe.json").is_file()}
    plain = {path for path, run in runs.items() if run.plain}
    sigmas = zip(paths, _sigma_of_each(paths, sigma), strict=True)
    logs = [read_log(path, sigma=value) for path, value in sigmas if path not in plain]
    certified = comparison_tables(compare(logs, radii, radius, assume_same_images)) if logs or not plain else []
    return certified + attacked_tables(list(runs.values())) + training_tables(list(runs.values()))


def comparison_tables(comparison: Comparison) -> list[Table]:
    """All that is compared, as texts: conditions, accuracies, summary, classes, probabilities, pairs, findings."""
    tables = [
        _conditions_table(comparison),
        _accuracy_table(comparison),
        _summary_table(comparison),
        _class_table(comparison),
        _probability_table(comparison),
        *_pair_tables(comparison),
        _findings_table(comparison),
    ]
    return [table for table in tables if table[2]]


def markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown, also readable as plain text; one title above each."""
    return "\n".join(_markdown_table(table) for table in tables)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of the discordant pairs under Binomial(n, 1/2) (McNemar 1947, exact form); 1 for none."""
    largest, total = max(only_first, only_second), only_first + only_second
    if total == 0:
        return 1.0
    return min(1.0, 2 * float(special.betainc(largest, total - largest + 1, 0.5)))


def class_accuracies(certificates: Certificates, radius: float) -> dict[int, Interval]:
    """Return the certified accuracy at ``radius`` of each class that there are images of, with exact 95 % intervals."""
    labels = certificates.labels
    return {
        label: certificates.select(np.flatnonzero(labels == label)).accuracy_interval(radius)
        for label in np.unique(labels).tolist()
    }


def probability_ecdf(certificates: Certificates) -> Ecdf:
    """Return the distribution of the lower bound on the predicted class's probability over the images that do not
    abstain."""
    values, counts = np.unique(certificates.p_lower[~certificates.abstained], return_counts=True)
    return Ecdf(values, counts.cumsum() / max(1, counts.sum()))


def grid_acr(certificates: Certificates, radii: Sequence[float]) -> float:
    """Return the ACR with every radius lowered to the next one of ``radii``, to 0 below all of them."""
    steps = np.array([0.0, *sorted(radii)])
    lowered = steps[np.searchsorted(steps, certificates.radius, side="right") - 1]
    return float(np.where(certificates.correct, lowered, 0.0).mean())


def _with_different_names(logs: Sequence[CertificateTable]) -> tuple[CertificateTable, ...]:
    """Logs of equal names get their paths, equal paths their number."""
    names = Counter(log.name for log in logs)
    longer = [log.name if names[log.name] == 1 else str(log.path) for log in logs]
    numbered = [name if longer.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(longer, start=1)]
    return tuple(replace(log, name=name) for log, name in zip(logs, numbered, strict=True))


def _default_radii(logs: Sequence[CertificateTable]) -> tuple[float, ...]:
    largest, step = (
        max(float(log.certificates.radius[log.certificates.correct].max(initial=0.0)) for log in logs),
        _STEP,
    )
    while largest / step >= _MOST_RADII:
        step *= 2
    return tuple(step * number for number in range(int(largest / step) + 1))


def _default_radius(logs: Sequence[CertificateTable]) -> float:
    half = min(log.rule.sigma for log in logs) / 2
    held = [radius for log in logs for radius in log.rule.radii or () if radius >= half]
    return min((radius for radius in held if all(_on_grid(log, radius) for log in logs)), default=half)


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    for radius in radii:
        if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 <= radius < math.inf:
            raise ConfigError(f"a radius must be a finite number >= 0 in [0, 1] pixel units, got {radius!r}")
    if not radii:
        raise ConfigError("no radius was given; give at least one, or omit the option")
    return tuple(sorted({float(radius) for radius in radii}))


def _sigma_of_each(paths: Sequence[Path], sigma: Sequence[float] | None) -> list[float | None]:
    if not sigma:
        return [None] * len(paths)
    if len(sigma) == len(paths):
        return list(sigma)
    if len(sigma) > 1:
        raise ConfigError(f"{len(sigma)} values of sigma for {len(paths)} logs; give one for each, or a single one")
    return [None if states_sigma(path) else sigma[0] for path in paths]


def _paired(
    first: CertificateTable, second: CertificateTable, radii: tuple[float, ...], assume_same_images: bool
) -> Paired:
    matched = _same_images(first, second, assume_same_images)
    if isinstance(matched, str):
        return Paired(first.name, second.name, matched, 0, False, (), ())
    here, there, notes = matched
    shown = [radius for radius in radii if _on_grid(first, radius) and _on_grid(second, radius)]
    pixels = _pixels(first, here) or _pixels(second, there)

    def row(radius: float) -> PairedRadius:
        certified = (first.certificates.certified(radius)[here], second.certificates.certified(radius)[there])
        return _paired_radius(radius, *(of_pictures(flags, pixels) for flags in certified))

    pictures = len(here) if pixels is None else len(set(pixels))
    notes += _differing_conditions(first, second)
    if pictures < len(here):
        notes += (f"{len(here) - pictures:,} images are copies of others: each picture is counted once",)
    if len(shown) < len(radii):
        notes += ("radii that are not on the grid of both logs are left out",)
    assumed = first.dataset is None or second.dataset is None
    return Paired(first.name, second.name, None, pictures, assumed, notes, tuple(map(row, shown)))


def _pixels(log: CertificateTable, rows: np.ndarray) -> list[str] | None:
    """The pictures of the images in ``rows``, None where the log does not tell them apart."""
    pixels = log.certificates.pixels
    return None if pixels is None else [pixels[row] for row in rows.tolist()]


def _same_images(
    first: CertificateTable, second: CertificateTable, assume: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | str:
    """Rows of both logs that show the same images, with notes; or the reason why there are none."""
    if first.dataset is not None and second.dataset is not None:
        if first.dataset != second.dataset:
            return "they are from different data: the fingerprints of the test images differ"
        return _matched_by_id(first, second)
    if not assume:
        silent = " and ".join(log.name for log in (first, second) if log.dataset is None)
        return f"nothing shows that the images are the same: no data-set fingerprint in {silent}"
    return _matched_by_idx(first, second)


def _matched_by_id(
    first: CertificateTable, second: CertificateTable
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | str:
    common, here, there = np.intersect1d(first.certificates.ids, second.certificates.ids, return_indices=True)
    if not len(common) == len(first) == len(second):
        return (
            f"they hold different images of the same data: {len(first):,} and {len(second):,}, {len(common):,} in "
            "both; certify the same images"
        )
    return _with_equal_labels(first, second, here, there, ())


def _matched_by_idx(
    first: CertificateTable, second: CertificateTable
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | str:
    common, here, there = np.intersect1d(first.idx, second.idx, return_indices=True)
    if not len(common):
        return "no idx is in both logs"
    note = f"same images assumed: matched by idx, {len(common):,} in both of {len(first):,} and {len(second):,}"
    return _with_equal_labels(first, second, here, there, (note,))


def _with_equal_labels(
    first: CertificateTable, second: CertificateTable, here: np.ndarray, there: np.ndarray, notes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | str:
    unequal = np.flatnonzero(first.certificates.labels[here] != second.certificates.labels[there])
    if unequal.size:
        place = first.idx[here][unequal].min()
        return f"they are not the same images: {unequal.size:,} labels differ, the first at idx {place}"
    return here, there, notes


def _paired_radius(radius: float, first: np.ndarray, second: np.ndarray) -> PairedRadius:
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = mcnemar_p_value(only_first, only_second)
    return PairedRadius(radius, paired_difference(first, second), only_first, only_second, p_value)


def _differing_conditions(first: CertificateTable, second: CertificateTable) -> tuple[str, ...]:
    """What else than the model may make the difference."""
    shown: dict[str, Callable[[CertificateTable], str]] = {
        "sigma": lambda log: f"{log.rule.sigma:g}",
        "N": lambda log: f"{log.rule.num_estimation:,}",
        "level": lambda log: _level_text(log.rule),
        "method": lambda log: log.rule.method,
    }
    texts = {name: (text(first), text(second)) for name, text in shown.items()}
    return tuple(f"{name} differs: {ours} against {theirs}" for name, (ours, theirs) in texts.items() if ours != theirs)


def _on_grid(log: CertificateTable, radius: float) -> bool:
    radii = log.rule.radii
    return radii is None or any(math.isclose(radius, step, abs_tol=1e-9) for step in radii)


def _star(log: CertificateTable, radius: float) -> str:
    return "" if _on_grid(log, radius) else " *"


def _star_note(logs: Sequence[CertificateTable], radii: Sequence[float]) -> str:
    starred = any(_star(log, radius) for log in logs for radius in radii)
    return " (* not on the log's grid: what is certified at its next larger radius)" if starred else ""


def _table(
    comparison: Comparison, title: str, corner: str, rows: Sequence[tuple[str, Callable[[CertificateTable], str]]]
) -> Table:
    """One column a log, one row an entry of ``rows``: its name and what it says of a log."""
    body = [(name, *(text(log) for log in comparison.logs)) for name, text in rows]
    return title, (corner, *(log.name for log in comparison.logs)), body


def _conditions_table(comparison: Comparison) -> Table:
    return _table(
        comparison,
        "Conditions",
        "",
        [
            ("sigma", lambda log: f"{log.rule.sigma:g}"),
            ("method", lambda log: _method_text(log.rule)),
            ("level", lambda log: _level_text(log.rule)),
            ("N", lambda log: f"{log.rule.num_estimation:,}" + (" at most" if log.rule.method == "sequential" else "")),
            ("images", lambda log: f"{len(log):,}"),
            ("copies of another image, not counted", lambda log: _copies_text(log)),
            ("data set", lambda log: "not said" if log.dataset is None else log.dataset[:12]),
        ],
    )


def _copies_text(log: CertificateTable) -> str:
    """How many images each figure leaves out, since their picture is counted already."""
    copies = log.certificates.num_copies
    return "not known" if copies is None else f"{copies:,}"


def _accuracy_table(comparison: Comparison) -> Table:
    def cell(log: CertificateTable, radius: float) -> str:
        return share(log.certificates.accuracy_interval(radius)) + _star(log, radius)

    rows = [(f"{radius:g}", lambda log, radius=radius: cell(log, radius)) for radius in comparison.radii]
    title = "Certified accuracy by ℓ2 radius, exact 95 % intervals" + _star_note(comparison.logs, comparison.radii)
    return _table(comparison, title, "radius", rows)


def _summary_table(comparison: Comparison) -> Table:
    return _table(
        comparison,
        "Summary",
        "",
        [
            ("ACR", lambda log: _NONE if log.rule.radii else _acr_text(log, log.certificates.acr)),
            *_grid_rows(comparison.logs),
            ("abstained", lambda log: share(log.certificates.share(log.certificates.abstained))),
            ("right, at the largest radius", _ceiling_text),
            *([("undecided at the largest N", _undecided_text)] if any(map(_stops_early, comparison.logs)) else []),
            ("samples an image, mean", _samples_text),
            ("seconds an image, mean", lambda log: f"{log.certificates.seconds.mean():.3g}"),
        ],
    )


def _acr_text(log: CertificateTable, acr: float) -> str:
    return f"{acr:.3f} (N = {log.rule.num_estimation:,})"


def _method_text(rule: Rule) -> str:
    return rule.method if rule.bound == rule.method else f"{rule.method}, {rule.bound}"


def _level_text(rule: Rule) -> str:
    """Return what alpha covers: each certificate, or all of them jointly."""
    if rule.level == "image":
        return f"each image by itself, alpha = {rule.alpha:g}"
    return f"all {rule.num_images:,} images together, alpha = {rule.alpha:g}"


def _grid_rows(logs: Sequence[CertificateTable]) -> list[tuple[str, Callable[[CertificateTable], str]]]:
    """A row of ACR for each grid that a log has: its own, and what the logs without a grid have on it."""
    grids = list(dict.fromkeys(log.rule.radii for log in logs if log.rule.radii))

    def cell(log: CertificateTable, grid: tuple[float, ...]) -> str:
        return _acr_text(log, grid_acr(log.certificates, grid)) if log.rule.radii in (None, grid) else _NONE

    return [
        (f"grid ACR, {_grid_text(grid)}", lambda log, grid=grid: cell(log, grid))  # type: ignore[misc]
        for grid in grids
    ]


def _grid_text(grid: tuple[float, ...]) -> str:
    head = ", ".join(f"{radius:g}" for radius in grid[:3])
    return f"radii {head}" + (f", … {grid[-1]:g}" if len(grid) > 3 else "")


def _ceiling_text(log: CertificateTable) -> str:
    right = float((log.certificates.correct & log.at_ceiling).mean())
    return f"{percent(right)} at {log.rule.largest_radius:.4g}"


def _stops_early(log: CertificateTable) -> bool:
    return log.rule.method == "sequential"


def _undecided_text(log: CertificateTable) -> str:
    certificates = log.certificates
    return share(certificates.share(certificates.outcome == UNDECIDED)) if _stops_early(log) else _NONE


def _samples_text(log: CertificateTable) -> str:
    return (
        f"{log.rule.num_estimation:,} + selection" if log.published else f"{log.certificates.num_samples.mean():,.0f}"
    )


def _class_table(comparison: Comparison) -> Table:
    found = {log.name: class_accuracies(log.certificates, comparison.radius) for log in comparison.logs}
    labels = sorted({label for accuracies in found.values() for label in accuracies})

    def cell(log: CertificateTable, label: int) -> str:
        return share(found[log.name][label]) if label in found[log.name] else _NONE

    def worst(log: CertificateTable) -> str:
        label, accuracy = min(found[log.name].items(), key=lambda item: item[1].estimate)
        return f"{percent(accuracy.estimate)} (class {label})" + _star(log, comparison.radius)

    rows: list[tuple[str, Callable[[CertificateTable], str]]] = [("worst", worst)]
    rows += [(f"{label}", lambda log, label=label: cell(log, label)) for label in labels]  # type: ignore[misc]
    note = _star_note(comparison.logs, [comparison.radius])
    title = f"Certified accuracy by class at ℓ2 radius {comparison.radius:g}{note}"
    return _table(comparison, title, "class", rows)


def _probability_table(comparison: Comparison) -> Table:
    def quantile(log: CertificateTable, level: float) -> str:
        ecdf = probability_ecdf(log.certificates)
        if not len(ecdf.values):
            return _NONE
        return f"{ecdf.values[np.argmax(ecdf.shares >= level - 1e-12)]:.5f}"

    def at_ceiling(log: CertificateTable) -> str:
        predicted = int((~log.certificates.abstained).sum())
        return percent(int(log.at_ceiling.sum()) / predicted) if predicted else _NONE

    rows: list[tuple[str, Callable[[CertificateTable], str]]] = [
        (f"{100 * level:g} % quantile", lambda log, level=level: quantile(log, level))  # type: ignore[misc]
        for level in QUANTILES
    ]
    rows.append(("at the largest radius", at_ceiling))
    title = "Lower bound on the probability of the predicted class, over the images that do not abstain"
    return _table(comparison, title, "", rows)


def _pair_tables(comparison: Comparison) -> list[Table]:
    refused = [(f"{pair.first}, {pair.second}", pair.refused) for pair in comparison.pairs if pair.refused]
    tables: list[Table] = [_pair_table(pair) for pair in comparison.pairs if not pair.refused]
    notes = [(f"{pair.first}, {pair.second}", note) for pair in comparison.pairs for note in pair.notes]
    tables.append(("Paired tests: what to know", ("logs", "note"), [tuple(row) for row in notes]))
    tables.append(("Paired tests refused", ("logs", "reason"), [tuple(row) for row in refused]))
    return tables


def _pair_table(pair: Paired) -> Table:
    sure = "assumed to be the same" if pair.assumed else "the same by fingerprint and id"
    title = (
        f"{pair.first} minus {pair.second}, paired on {pair.images:,} images, {sure}; each radius is tested by itself"
    )
    header = ("radius", "points, 95 %", "only first", "only second", "p (exact McNemar)")
    rows = [
        (f"{row.radius:g}", points(row.difference), f"{row.only_first:,}", f"{row.only_second:,}", _p_text(row.p_value))
        for row in pair.rows
    ]
    return title, header, [tuple(row) for row in rows]


def _p_text(p_value: float) -> str:
    return "< 1e-12" if p_value < 1e-12 else f"{p_value:.2g}"


def _findings_table(comparison: Comparison) -> Table:
    rows = [(log.name, doubt.name, f"{doubt.count:,}", doubt.text) for log in comparison.logs for doubt in doubts(log)]
    return "Findings", ("log", "finding", "images", "what"), [tuple(row) for row in rows]


def _markdown_table(table: Table) -> str:
    title, header, rows = table
    lines = [header, tuple("---" for _ in header), *rows]
    body = "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{printable(title)}**\n\n{body}\n"
