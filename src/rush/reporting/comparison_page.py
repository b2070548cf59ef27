"""The page of ``rush compare --html``: the tables of the terminal with curves, in the style of the report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rush.errors import ConfigError
from rush.records.ladder import Ladder
from rush.records.read_run import RunResults
from rush.reporting import plots
from rush.reporting.compare import Comparison, all_tables, by_norm, run_names
from rush.reporting.exports import Data, Value
from rush.reporting.plots import curve_radii
from rush.reporting.rendering import Plot, plots_of, render_page
from rush.reporting.wording import NORM_SIGNS
from rush.runtime.files import write_text

_ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class Curves:
    """A figure of several logs or runs, with the values that are drawn."""

    title: str
    caption: str
    plot: Plot
    data: Data


def check_name(path: Path) -> None:
    """Check that ``path`` has the name of an HTML file, so that no log is overwritten by mistake.

    Raises:
        ConfigError: it has another ending, or is a directory.
    """
    if path.suffix.lower() not in _ENDINGS or path.is_dir():
        raise ConfigError(f"--html must name a file that ends with .html, got {path}; give, for example, compare.html")


def write_comparison(path: Path, runs: Sequence[RunResults], comparison: Comparison | None) -> None:
    """Write the page to ``path``, an HTML file, whose missing parent folders are created.

    Raises:
        ConfigError: ``path`` does not end with .html.
        WriteError: the file cannot be written.
    """
    check_name(path)
    write_text(path, render_comparison(runs, comparison))


def render_comparison(runs: Sequence[RunResults], comparison: Comparison | None) -> str:
    """Return the page of a comparison and its runs as HTML. Equal files give an equal page."""
    tables = [
        Data(f"table-{number}", title, header, rows)
        for number, (title, header, rows) in enumerate(all_tables(runs, comparison), start=1)
    ]
    names = run_names(runs)
    logs = [] if comparison is None else [log.name for log in comparison.logs]
    compared = list(dict.fromkeys([*logs, *names]))
    curves = [*_certified_curves(comparison), *_epsilon_curves(names, runs)]
    return render_page("comparison.html.j2", {"compared": compared, "tables": tables, "curves": curves})


def _certified_curves(comparison: Comparison | None) -> Iterator[Curves]:
    """Yield a figure per norm of the radii."""
    for part in by_norm(comparison) if comparison is not None else ():
        logs = [(log.name, log.certificates) for log in part.logs]
        norm = part.logs[0].rule.norm
        sign = NORM_SIGNS[norm]
        rows: list[tuple[Value, ...]] = [
            (name, radius, certificates.accuracy(radius))
            for name, certificates in logs
            for radius in curve_radii(certificates, certificates.largest_radius).tolist()
        ]
        title = f"Certified accuracy over the {sign} radius"
        yield Curves(
            title=title,
            caption=(
                "Each curve ends at the largest radius that its rule can certify. Where only the radii of a grid were "
                "tested, they are dots, and the accuracy between two of them is that at the larger."
            ),
            plot=plots_of(plots.certified_curves, f"certified-{norm}", logs),
            data=Data(f"certified-{norm}", title, ("log", f"{sign} radius", "certified accuracy"), rows),
        )


def _epsilon_curves(names: Sequence[str], runs: Sequence[RunResults]) -> Iterator[Curves]:
    """Yield a figure per norm of the threats of the runs that have accuracy over epsilon."""
    measured: list[tuple[str, Ladder]] = [
        (name, run.ladder) for name, run in zip(names, runs, strict=True) if run.ladder is not None and run.ladder.curve
    ]
    for norm in dict.fromkeys(ladder.norm for _, ladder in measured):
        own = [(name, ladder) for name, ladder in measured if ladder.norm == norm]
        rows: list[tuple[Value, ...]] = [
            (name, point.epsilon, point.accuracy, point.accuracy_lower)
            for name, ladder in own
            for point in (ladder.curve.points if ladder.curve is not None else ())
        ]
        title = f"Accuracy over {NORM_SIGNS[norm]} epsilon"
        yield Curves(
            title=title,
            caption="Accuracy = 1 − share broken, each run by its own attacker and on its own images.",
            plot=plots_of(plots.epsilon_curves, f"epsilon-{norm}", own),
            data=Data(f"epsilon-{norm}", title, ("run", "epsilon", "accuracy", "held"), rows),
        )
