"""Tables of runs and certification logs side by side, with paired tests on images that are shown to be the same."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy import special

from rush.certification.certificates import Certificates, of_pictures
from rush.certification.rule import Rule
from rush.certification.sequential import UNDECIDED
from rush.errors import ConfigError
from rush.records.ladder import Ladder
from rush.records.public_logs import CertificateTable, read_log, states_sigma
from rush.records.read_run import RunResults, read_run, test_fingerprint
from rush.reporting.costs import TrainingCost, passes_of, training_cost
from rush.reporting.doubts import doubts
from rush.reporting.wording import (
    NORM_SIGNS,
    NOT_CERTIFIED,
    energy_text,
    memory_text,
    model_text,
    percent,
    points,
    share,
    threat_text,
)
from rush.runtime.numbers import as_real
from rush.statistics import Interval, paired_difference

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STEP = 0.25
_MOST_RADII = 40
_NONE = "–"

T = TypeVar("T")
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header and rows, all of them texts."""
Row = tuple[str, Callable[[T], str]]
"""Name of a row, and the text of a column's value in it."""


@dataclass(frozen=True)
class PairedRadius:
    """Certified accuracy of the first log minus that of the second at one radius, over the same images.

    Attributes:
        difference: the difference with its 95 % interval.
        only_first: number of images that only the first log certifies.
        only_second: number of images that only the second log certifies.
        p_value: exact McNemar test of "neither is better".
    """

    radius: float
    difference: Interval
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two logs, or the reason why it is ``refused``.

    Attributes:
        images: number of different pictures.
        assumed: whether the images are the same only by the caller's statement, which no label contradicts.
        notes: further remarks for the reader, such as conditions that differ.
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
    """Logs with different names, the radii at which they are compared, the radius of the classes, and the pairs."""

    logs: tuple[CertificateTable, ...]
    radii: tuple[float, ...]
    radius: float
    pairs: tuple[Paired, ...]


def compare(
    logs: Sequence[CertificateTable],
    radii: Sequence[float] | None = None,
    radius: float | None = None,
    assume_same_images: bool = False,
) -> Comparison:
    """Compare logs side by side, and pair the first of them with every other one.

    A pair requires the same images, and is refused if the data-set fingerprints differ. If they agree, images are
    matched by id, and both logs must hold the same ids, because the missing images might be harder than the others. If
    a fingerprint is missing, the pair is refused unless ``assume_same_images``. Then the images that both logs hold are
    matched by idx, the pair is refused if a label differs, and the notes state the assumption. A pair whose radii are
    in different norms is always refused.

    Args:
        logs: at least one.
        radii: radii at which accuracies are compared. By default, they are the multiples of 0.25 (of 0.5, 1, ... for
            very large radii) up to the largest certified radius.
        radius: radius at which classes are compared. By default, it is half the smallest sigma, or the next larger
            radius in the grids of all logs that have one.
        assume_same_images: whether images without a fingerprint are matched.

    Raises:
        ConfigError: there are no logs, or a radius is not a finite number >= 0.
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
    """Return the tables of ``rush compare`` for the runs and logs in ``paths``, as ``all_tables`` does.

    Args:
        paths: run folders and logs.
        sigma: one value per path in their order, or a single one for every log that does not state its sigma.
        radii: as in ``compare``.
        radius: as in ``compare``.
        assume_same_images: as in ``compare``.

    Raises:
        ConfigError: a number is missing or not allowed.
        DataError: a public log is damaged.
        RunError: a file of a run is damaged.
    """
    return all_tables(*read_comparison(paths, sigma, radii, radius, assume_same_images))


def all_tables(runs: Sequence[RunResults], comparison: Comparison | None) -> list[Table]:
    """Return the tables of ``rush compare``: certificates, accuracy under attack and the cost of training.

    A run without noise has no certificates and appears in the other tables only.
    """
    certified = [] if comparison is None else comparison_tables(comparison)
    return certified + attacked_tables(runs) + training_tables(runs)


def read_comparison(
    paths: Sequence[Path],
    sigma: Sequence[float] | None = None,
    radii: Sequence[float] | None = None,
    radius: float | None = None,
    assume_same_images: bool = False,
) -> tuple[list[RunResults], Comparison | None]:
    """Return the runs among ``paths``, and the comparison of all certificates or None without certificates.

    Arguments and errors are those of ``compare_command``.
    """
    runs = {path: read_run(path) for path in paths if (path / "recipe.json").is_file()}
    plain = {path for path, run in runs.items() if run.plain}
    sigmas = zip(paths, _sigma_of_each(paths, sigma), strict=True)
    logs = [read_log(path, sigma=value) for path, value in sigmas if path not in plain]
    return list(runs.values()), compare(logs, radii, radius, assume_same_images) if logs or not plain else None


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return a comparison as tables: conditions, accuracies, summary, classes, probabilities, pairs, findings.

    Accuracies and average radii have a table for each norm of the radii, with the logs of that norm.
    """
    parts = by_norm(comparison)
    tables = [
        _conditions_table(comparison),
        *map(_accuracy_table, parts),
        *(_summary_table(part, "Summary" if len(parts) == 1 else f"Summary, {_norm(part)} radii") for part in parts),
        *map(_class_table, parts),
        _probability_table(comparison),
        *_pair_tables(comparison),
        _findings_table(comparison),
    ]
    return [table for table in tables if table[2]]


def by_norm(comparison: Comparison) -> list[Comparison]:
    """Return the comparison split by the norm of the radii, in the order in which the norms occur."""
    norms = dict.fromkeys(log.rule.norm for log in comparison.logs)
    return [replace(comparison, logs=tuple(log for log in comparison.logs if log.rule.norm == norm)) for norm in norms]


def _norm(part: Comparison) -> str:
    """Return the sign of the norm of a part that ``by_norm`` made."""
    return NORM_SIGNS[part.logs[0].rule.norm]


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of discordant pairs under Binomial(n, 1/2) (McNemar 1947).

    Without discordant pairs it is 1.
    """
    largest, total = max(only_first, only_second), only_first + only_second
    if total == 0:
        return 1.0
    return min(1.0, 2 * float(special.betainc(largest, total - largest + 1, 0.5)))


def class_accuracies(certificates: Certificates, radius: float) -> dict[int, Interval]:
    """Return the certified accuracy at ``radius`` of each class with images, with exact 95 % intervals."""
    labels = certificates.labels
    return {
        label: certificates.select(np.flatnonzero(labels == label)).accuracy_interval(radius)
        for label in np.unique(labels).tolist()
    }


def probability_quantile(certificates: Certificates, level: float) -> float | None:
    """Return the quantile of ``p_lower`` over the images that do not abstain, or None if all of them abstain.

    It is one of their values.
    """
    values = certificates.p_lower[~certificates.abstained]
    # Rounding of level * n must not select the value after the quantile.
    return float(np.quantile(values, level - 1e-12, method="inverted_cdf")) if len(values) else None


def grid_acr(certificates: Certificates, radii: Sequence[float]) -> float:
    """Return the ACR with every radius rounded down to one of ``radii``, or to 0 below all of them."""
    steps = np.array([0.0, *sorted(radii)])
    lowered = steps[np.searchsorted(steps, certificates.radius, side="right") - 1]
    return float(np.where(certificates.correct, lowered, 0.0).mean())


def _with_different_names(logs: Sequence[CertificateTable]) -> tuple[CertificateTable, ...]:
    """Return the logs with distinct names: their paths where names are equal, with numbers where paths are equal."""
    longer = _names_or_paths([log.name for log in logs], [log.path for log in logs])
    numbered = [name if longer.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(longer, start=1)]
    return tuple(replace(log, name=name) for log, name in zip(logs, numbered, strict=True))


def _default_radii(logs: Sequence[CertificateTable]) -> tuple[float, ...]:
    largest = max(float(log.certificates.radius[log.certificates.correct].max(initial=0.0)) for log in logs)
    step = _STEP
    while largest / step >= _MOST_RADII:
        step *= 2
    return tuple(step * number for number in range(int(largest / step) + 1))


def _default_radius(logs: Sequence[CertificateTable]) -> float:
    half = min(log.rule.sigma for log in logs) / 2
    larger = [radius for log in logs for radius in log.rule.radii or () if radius >= half]
    return min((radius for radius in larger if all(_on_grid(log, radius) for log in logs)), default=half)


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    for radius in radii:
        if (number := as_real(radius)) is None or number < 0:
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
    matched = _different_norms(first, second) or _same_images(first, second, assume_same_images)
    if isinstance(matched, str):
        return Paired(first.name, second.name, matched, 0, False, (), ())
    first_rows, second_rows, notes = matched
    common = [radius for radius in radii if _on_grid(first, radius) and _on_grid(second, radius)]
    pixels = _pixels(first, first_rows) or _pixels(second, second_rows)

    def row(radius: float) -> PairedRadius:
        certified = of_pictures(first.certificates.certified(radius)[first_rows], pixels)
        other = of_pictures(second.certificates.certified(radius)[second_rows], pixels)
        only_first, only_second = int((certified & ~other).sum()), int((other & ~certified).sum())
        p_value = mcnemar_p_value(only_first, only_second)
        return PairedRadius(radius, paired_difference(certified, other), only_first, only_second, p_value)

    pictures = len(first_rows) if pixels is None else len(set(pixels))
    notes += _differing_conditions(first, second)
    if pictures < len(first_rows):
        notes += (f"{len(first_rows) - pictures:,} images are copies of others: each picture is counted once",)
    if len(common) < len(radii):
        notes += ("radii that are not on the grid of both logs are omitted",)
    assumed = first.dataset is None or second.dataset is None
    return Paired(first.name, second.name, None, pictures, assumed, notes, tuple(map(row, common)))


def _pixels(log: CertificateTable, rows: np.ndarray) -> list[str] | None:
    """Return what identifies the pixels of the images in ``rows``, or None if the log does not identify them."""
    pixels = log.certificates.pixels
    return None if pixels is None else [pixels[row] for row in rows.tolist()]


def _different_norms(first: CertificateTable, second: CertificateTable) -> str | None:
    """Return the reason why radii in different norms are not paired, or None if the norms agree."""
    norms = [log.rule.norm for log in (first, second)]
    if norms[0] == norms[1]:
        return None
    return f"their radii are in different norms: {' and '.join(NORM_SIGNS[norm] for norm in norms)}"


def _same_images(
    first: CertificateTable, second: CertificateTable, assume: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | str:
    """Return the rows of both logs that show the same images, with notes, or the reason why there are none."""
    unnamed = [log.name for log in (first, second) if log.dataset is None]
    if not unnamed and first.dataset != second.dataset:
        return "they are from different data: the fingerprints of the test images differ"
    if unnamed and not assume:
        return f"nothing shows that the images are the same: no data-set fingerprint in {' and '.join(unnamed)}"
    keys = (first.idx, second.idx) if unnamed else (first.certificates.ids, second.certificates.ids)
    common, first_rows, second_rows = np.intersect1d(*keys, return_indices=True)
    if not unnamed and not len(common) == len(first) == len(second):
        return (
            f"they hold different images of the same data: {len(first):,} and {len(second):,}, {len(common):,} in "
            "both; certify the same images"
        )
    if not len(common):
        return "no idx is in both logs"
    unequal = np.flatnonzero(first.certificates.labels[first_rows] != second.certificates.labels[second_rows])
    if unequal.size:
        idx = first.idx[first_rows][unequal].min()
        return f"they are not the same images: {unequal.size:,} labels differ, the first at idx {idx}"
    assumed = f"same images assumed: matched by idx, {len(common):,} in both of {len(first):,} and {len(second):,}"
    return first_rows, second_rows, (assumed,) if unnamed else ()


def _differing_conditions(first: CertificateTable, second: CertificateTable) -> tuple[str, ...]:
    """Return the conditions besides the model that may explain a difference."""
    texts = [
        ("sigma", *(f"{log.rule.sigma:g}" for log in (first, second))),
        ("noise", first.rule.noise, second.rule.noise),
        ("N", *(f"{log.rule.num_estimation:,}" for log in (first, second))),
        ("level", *(_level_text(log.rule) for log in (first, second))),
        ("method", first.rule.method, second.rule.method),
    ]
    return tuple(f"{name} differs: {text} vs. {other}" for name, text, other in texts if text != other)


def _on_grid(log: CertificateTable, radius: float) -> bool:
    radii = log.rule.radii
    return radii is None or any(math.isclose(radius, step, abs_tol=1e-9) for step in radii)


def _star(log: CertificateTable, radius: float) -> str:
    return "" if _on_grid(log, radius) else " *"


def _star_note(logs: Sequence[CertificateTable], radii: Sequence[float]) -> str:
    starred = any(_star(log, radius) for log in logs for radius in radii)
    return " (* not on the log's grid: the accuracy at its next larger radius)" if starred else ""


def _table(title: str, corner: str, columns: Sequence[tuple[str, T]], rows: Sequence[Row[T]]) -> Table:
    """Return a table with one column per name and value in ``columns``."""
    body = [(name, *(text(value) for _, value in columns)) for name, text in rows]
    return title, (corner, *(name for name, _ in columns)), body


def _log_table(comparison: Comparison, title: str, corner: str, rows: Sequence[Row[CertificateTable]]) -> Table:
    return _table(title, corner, [(log.name, log) for log in comparison.logs], rows)


def _conditions_table(comparison: Comparison) -> Table:
    rows: list[Row[CertificateTable]] = [
        ("sigma", lambda log: f"{log.rule.sigma:g}"),
        ("noise", lambda log: log.rule.noise),
        *([("norm of the radii", _norm_text)] if len(by_norm(comparison)) > 1 else []),
        ("method", lambda log: _method_text(log.rule)),
        ("level", lambda log: _level_text(log.rule)),
        ("N", lambda log: f"{log.rule.num_estimation:,}" + (" at most" if _stops_early(log) else "")),
        ("images", lambda log: f"{len(log):,}"),
        ("copies of another image, not counted", _copies_text),
        ("data set", lambda log: "not stated" if log.dataset is None else log.dataset[:12]),
    ]
    return _log_table(comparison, "Conditions", "", rows)


def _norm_text(log: CertificateTable) -> str:
    return NORM_SIGNS[log.rule.norm]


def _copies_text(log: CertificateTable) -> str:
    """Return the number of images that no figure counts, because a copy of each is counted."""
    copies = log.certificates.num_copies
    return "not known" if copies is None else f"{copies:,}"


def _accuracy_table(comparison: Comparison) -> Table:
    def cell(radius: float, log: CertificateTable) -> str:
        return share(log.certificates.accuracy_interval(radius)) + _star(log, radius)

    rows = [(f"{radius:g}", partial(cell, radius)) for radius in comparison.radii]
    note = _star_note(comparison.logs, comparison.radii)
    title = f"Certified accuracy by {_norm(comparison)} radius, exact 95 % intervals{note}"
    return _log_table(comparison, title, "radius", rows)


def _summary_table(comparison: Comparison, title: str) -> Table:
    rows: list[Row[CertificateTable]] = [
        ("ACR", lambda log: _NONE if log.rule.radii else _acr_text(log, log.certificates.acr)),
        *_grid_rows(comparison.logs),
        ("abstained", lambda log: share(log.certificates.share(log.certificates.abstained))),
        ("correct at the largest radius", _ceiling_text),
        *([("undecided at the largest N", _undecided_text)] if any(map(_stops_early, comparison.logs)) else []),
        ("samples per image, mean", _samples_text),
        ("seconds per image, mean", lambda log: f"{log.certificates.seconds.mean():.3g}"),
    ]
    return _log_table(comparison, title, "", rows)


def _acr_text(log: CertificateTable, acr: float) -> str:
    return f"{acr:.3f} (N = {log.rule.num_estimation:,})"


def _method_text(rule: Rule) -> str:
    return rule.method if rule.bound == rule.method else f"{rule.method}, {rule.bound}"


def _level_text(rule: Rule) -> str:
    """Return what alpha covers: each certificate, or all of them jointly."""
    if rule.exact:
        return "exact"
    if rule.level == "image":
        return f"each image separately, alpha = {rule.alpha:g}"
    return f"all {rule.num_images:,} images jointly, alpha = {rule.alpha:g}"


def _grid_rows(logs: Sequence[CertificateTable]) -> list[Row[CertificateTable]]:
    """Return a row of ACR per grid: of the logs with this grid and, rounded down to it, of those without a grid."""
    grids = list(dict.fromkeys(log.rule.radii for log in logs if log.rule.radii))

    def cell(grid: tuple[float, ...], log: CertificateTable) -> str:
        return _acr_text(log, grid_acr(log.certificates, grid)) if log.rule.radii in (None, grid) else _NONE

    return [(f"grid ACR, {_grid_text(grid)}", partial(cell, grid)) for grid in grids]


def _grid_text(grid: tuple[float, ...]) -> str:
    head = ", ".join(f"{radius:g}" for radius in grid[:3])
    return f"radii {head}" + (f", … {grid[-1]:g}" if len(grid) > 3 else "")


def _ceiling_text(log: CertificateTable) -> str:
    correct = float((log.certificates.correct & log.at_ceiling).mean())
    return f"{percent(correct)} at {log.rule.largest_radius:.4g}"


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
    accuracies = {log.name: class_accuracies(log.certificates, comparison.radius) for log in comparison.logs}
    labels = sorted({label for by_class in accuracies.values() for label in by_class})

    def cell(label: int, log: CertificateTable) -> str:
        return share(accuracies[log.name][label]) if label in accuracies[log.name] else _NONE

    def worst(log: CertificateTable) -> str:
        label, accuracy = min(accuracies[log.name].items(), key=lambda item: item[1].estimate)
        return f"{percent(accuracy.estimate)} (class {label})" + _star(log, comparison.radius)

    rows: list[Row[CertificateTable]] = [("worst", worst), *((f"{label}", partial(cell, label)) for label in labels)]
    note = _star_note(comparison.logs, [comparison.radius])
    title = f"Certified accuracy by class at {_norm(comparison)} radius {comparison.radius:g}{note}"
    return _log_table(comparison, title, "class", rows)


def _probability_table(comparison: Comparison) -> Table:
    def quantile(level: float, log: CertificateTable) -> str:
        value = probability_quantile(log.certificates, level)
        return _NONE if value is None else f"{value:.5f}"

    def at_ceiling(log: CertificateTable) -> str:
        predicted = int((~log.certificates.abstained).sum())
        return percent(int(log.at_ceiling.sum()) / predicted) if predicted else _NONE

    quantiles = [(f"{100 * level:g} % quantile", partial(quantile, level)) for level in QUANTILES]
    title = "Lower bound on the probability of the predicted class, over the images that do not abstain"
    return _log_table(comparison, title, "", [*quantiles, ("at the largest radius", at_ceiling)])


def _pair_tables(comparison: Comparison) -> list[Table]:
    named = [(f"{pair.first}, {pair.second}", pair) for pair in comparison.pairs]
    notes = [(names, note) for names, pair in named for note in pair.notes]
    refused = [(names, pair.refused) for names, pair in named if pair.refused]
    return [
        *(_pair_table(pair) for pair in comparison.pairs if not pair.refused),
        ("Paired tests: notes", ("logs", "note"), [*notes]),
        ("Paired tests refused", ("logs", "reason"), [*refused]),
    ]


def _pair_table(pair: Paired) -> Table:
    same = "assumed to be the same" if pair.assumed else "the same by fingerprint and id"
    title = f"{pair.first} minus {pair.second}, paired on {pair.images:,} images, {same}; radii are tested separately"
    header = ("radius", "points, 95 %", "only first", "only second", "p (exact McNemar)")
    rows = [
        (f"{row.radius:g}", points(row.difference), f"{row.only_first:,}", f"{row.only_second:,}", _p_text(row.p_value))
        for row in pair.rows
    ]
    return title, header, [*rows]


def _p_text(p_value: float) -> str:
    return "< 1e-12" if p_value < 1e-12 else f"{p_value:.2g}"


def _findings_table(comparison: Comparison) -> Table:
    rows = [(log.name, doubt.name, f"{doubt.count:,}", doubt.text) for log in comparison.logs for doubt in doubts(log)]
    return "Findings", ("log", "finding", "images", "details"), [*rows]


def attacked_tables(runs: Sequence[RunResults]) -> list[Table]:
    """Return accuracy under attack of the ``runs`` that were attacked, and a table of those that are not certified.

    Attackers are identified by their labels, with a dash where a run's ladder has no such rung. With several runs, the
    last row is the paired difference to the first of them, if threat, data and images are the same.
    """
    named = list(zip(run_names(runs), runs, strict=True))
    attacked = [(name, (run, run.ladder)) for name, run in named if run.ladder is not None]
    plain: list[tuple[str, ...]] = [(name, NOT_CERTIFIED) for name, run in named if run.plain]
    tables = [_attacked_table(attacked)] if attacked else []
    return [*tables, ("Without certificates", ("run", "reason"), plain)] if plain else tables


_Attacked = tuple[RunResults, Ladder]


def _attacked_table(attacked: Sequence[tuple[str, _Attacked]]) -> Table:
    labels = dict.fromkeys(rung.label for _, (_, ladder) in attacked for rung in ladder.rungs)
    rows: list[Row[_Attacked]] = [
        ("sigma", lambda run: noise_text(run[0])),
        ("threat", lambda run: threat_text(run[1])),
        ("images", lambda run: f"{len(run[1].clean):,}"),
        *((label, partial(_rung_text, label)) for label in labels),
        ("any of the run's attackers", lambda run: share(run[1].combined)),
    ]
    if len(attacked) > 1:
        name, first = attacked[0]
        rows.append((f"the same minus that of {name}, paired", partial(_difference_text, first)))
    return _table(
        "Accuracy under attack, exact 95 % intervals; upper bounds, each run by its own ladder", "", attacked, rows
    )


def noise_text(run: RunResults) -> str:
    """Return sigma and the name of the noise, which is Gaussian in older runs that do not record it."""
    sigma = run.setting("smoothing", "sigma")
    if run.plain or sigma is None:
        return "none, not smoothed" if run.plain else _NONE
    return f"{sigma:g}, {run.setting('smoothing', 'noise') or 'gaussian'}"


def _rung_text(label: str, run: _Attacked) -> str:
    return next((share(rung.accuracy) for rung in run[1].rungs if rung.label == label), _NONE)


def _difference_text(first: _Attacked, other: _Attacked) -> str:
    """Return the paired difference of two runs, or the reason why there is none."""
    if other is first:
        return _NONE
    (first_run, first_ladder), (run, ladder) = first, other
    if (ladder.norm, ladder.epsilon) != (first_ladder.norm, first_ladder.epsilon):
        return "different threat"
    dataset = test_fingerprint(first_run.provenance)
    if dataset is None or dataset != test_fingerprint(run.provenance):
        return "not known to be the same data"
    if not np.array_equal(first_ladder.clean.ids, ladder.clean.ids):
        return "different images"
    of_pictures = ladder.clean.of_pictures
    return points(paired_difference(of_pictures(ladder.standing), of_pictures(first_ladder.standing)))


def training_tables(runs: Sequence[RunResults]) -> list[Table]:
    """Return a table of the training costs of ``runs``, with a column per run, or no table without runs."""

    def known(text: Callable[[TrainingCost], str]) -> Callable[[RunResults], str]:
        return lambda run: _NONE if (cost := training_cost(run)) is None else text(cost)

    rows: list[Row[RunResults]] = [
        ("network", model_text),
        ("objectives", known(lambda cost: cost.objectives or _NONE)),
        ("passes per image", known(passes_of)),
        ("hours", known(lambda cost: f"{cost.seconds / 3600:.3g}")),
        ("peak memory", known(lambda cost: memory_text(cost.peak_memory))),
        ("energy", known(lambda cost: energy_text(cost.joules))),
    ]
    title = "Cost of training; passes are forward and backward, over the images of the larger training stage"
    return [_table(title, "", list(zip(run_names(runs), runs, strict=True)), rows)] if runs else []


def run_names(runs: Sequence[RunResults]) -> list[str]:
    """Return the names of the folders, or their paths where names are equal."""
    return _names_or_paths([run.folder.resolve().name for run in runs], [run.folder for run in runs])


def _names_or_paths(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else str(path) for name, path in zip(names, paths, strict=True)]
