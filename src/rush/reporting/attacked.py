"""Attacked accuracies of several runs side by side, smoothed or not."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from rush.records.ladder import Ladder
from rush.records.read_run import RunResults, test_fingerprint
from rush.reporting.tables import NOT_CERTIFIED, points, share, threat_text
from rush.statistics import paired_difference

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header and rows, all of them texts."""

_NONE = "–"


def attacked_tables(runs: Sequence[RunResults]) -> list[Table]:
    """What attacks leave of those of ``runs`` whose attack stage is finished, and which of all are not certified.

    Attackers are told by their labels: a dash stands where a run's ladder has no such rung. The last row, with several
    runs, is the paired difference to the first of them where threat, data and images are the same.
    """
    named = list(zip(run_names(runs), runs, strict=True))
    ladders = [(name, run, run.ladder) for name, run in named if run.ladder is not None]
    plain = [(name, NOT_CERTIFIED) for name, run in named if run.plain]
    return [*([_attacked_table(ladders)] if ladders else []), *([_plain_table(plain)] if plain else [])]


def _attacked_table(ladders: Sequence[tuple[str, RunResults, Ladder]]) -> Table:
    first = ladders[0]
    labels = dict.fromkeys(rung.label for _, _, ladder in ladders for rung in ladder.rungs)
    rows: list[tuple[str, Callable[[RunResults, Ladder], str]]] = [
        ("sigma", lambda run, _: _sigma_text(run)),
        ("threat", lambda _, ladder: threat_text(ladder)),
        ("images", lambda _, ladder: f"{len(ladder.clean):,}"),
        *((label, lambda _, ladder, label=label: _rung_text(ladder, label)) for label in labels),
        ("any of the run's attackers", lambda _, ladder: share(ladder.combined)),
    ]
    if len(ladders) > 1:
        told = f"the same minus that of {first[0]}, paired"
        rows.append((told, lambda run, ladder: _difference_text(first[1], first[2], run, ladder)))
    body = [(name, *(text(run, ladder) for _, run, ladder in ladders)) for name, text in rows]
    title = "Accuracy under attack, exact 95 % intervals; upper bounds, each run by its own ladder"
    return title, ("", *(name for name, _, _ in ladders)), body


def _plain_table(rows: Sequence[tuple[str, str]]) -> Table:
    return "Without certificates", ("run", "why"), [tuple(row) for row in rows]


def _sigma_text(run: RunResults) -> str:
    sigma = run.setting("smoothing", "sigma")
    return "none, not smoothed" if run.plain else _NONE if sigma is None else f"{sigma:g}"


def _rung_text(ladder: Ladder, label: str) -> str:
    return next((share(rung.accuracy) for rung in ladder.rungs if rung.label == label), _NONE)


def _difference_text(first: RunResults, first_ladder: Ladder, run: RunResults, ladder: Ladder) -> str:
    """The paired difference, or why there is none."""
    if run is first:
        return _NONE
    if (ladder.norm, ladder.epsilon) != (first_ladder.norm, first_ladder.epsilon):
        return "another threat"
    dataset = test_fingerprint(first.provenance)
    if dataset is None or dataset != test_fingerprint(run.provenance):
        return "not known to be the same data"
    if not np.array_equal(first_ladder.clean.ids, ladder.clean.ids):
        return "other images"
    of_pictures = ladder.clean.of_pictures
    return points(paired_difference(of_pictures(ladder.standing), of_pictures(first_ladder.standing)))


def run_names(runs: Sequence[RunResults]) -> list[str]:
    """Names of folders; where two are equal, their paths."""
    names = [run.folder.resolve().name for run in runs]
    return [name if Counter(names)[name] == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]
