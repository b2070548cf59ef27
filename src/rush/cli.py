"""The command line. Imports of torch wait inside the commands, so that help and config errors come at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from rush.errors import ConfigError
from rush.options import STAGES, Level, Stage

if TYPE_CHECKING:
    from rush.config import Recipe
    from rush.engine.runs import RunFolder

app = App(
    name="rush",
    help="Robust image classifiers: pre-trained by contrast, smoothed by noise, certified soundly, attacked honestly.",
    help_format="plaintext",
    version=lambda: _version(),
    suppress_keyboard_interrupt=False,
)

Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set", help="Override one recipe field, e.g. pretrain.epochs=10; may be given often.", negative=()
    ),
]
Data = Annotated[Path | None, Parameter(help="Folder that holds the data set's archives or shards.")]
Out = Annotated[Path | None, Parameter(help="Run folder; runs/RECIPE by default.")]


@app.command
def run(recipe: str, *, out: Out = None, data: Data = None, overrides: Overrides = None) -> None:
    """Do everything: pre-train, fine-tune, certify, attack, report. Started again, it goes on where it stopped.

    Parameters
    ----------
    recipe: str
        Name of a shipped recipe (see `rush recipes`), path of a .toml file, or an existing run folder.
    """
    folder = _create(recipe, out, data, overrides)
    _report_on(folder, STAGES)


@app.command
def pretrain(recipe: str, *, out: Out = None, data: Data = None, overrides: Overrides = None) -> None:
    """Pre-train the encoder of a recipe in a new or existing run folder.

    Parameters
    ----------
    recipe: str
        Name of a shipped recipe, path of a .toml file, or an existing run folder.
    """
    _do(_create(recipe, out, data, overrides), ("pretrain",))


@app.command
def finetune(folder: Path, *, data: Data = None, overrides: Overrides = None) -> None:
    """Fine-tune the pre-trained encoder of a run under noise.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    _do(_reopen(folder, data, overrides), ("finetune",))


@app.command
def certify(
    folder: Path,
    *,
    data: Data = None,
    overrides: Overrides = None,
    recompute: bool = False,
    alpha: float | None = None,
    bound: str | None = None,
    num_estimation: int | None = None,
    radii: Annotated[list[float] | None, Parameter(negative=())] = None,
    level: Level | None = None,
    out: Path | None = None,
) -> None:
    """Certify test images of a run; under torchrun the processes share them. Or recompute certificates from the stored
    votes under another rule, without drawing a sample.

    Parameters
    ----------
    folder: Path
        Run folder; for --recompute also a certificates.tsv.
    recompute: bool
        Apply the options below to the stored votes. What would not be valid is refused.
    alpha: float
        Probability of a false certificate.
    bound: str
        clopper-pearson (only where the number of samples was fixed), or anytime-valid: geometric, beta.
    num_estimation: int
        Use only the first so many votes of each image.
    radii: list[float]
        The grid of radii, in [0, 1] pixel units; may be given often.
    level: str
        image: each certificate by itself; family: all together.
    out: Path
        File for the recomputed certificates; without it they are only shown.
    """
    options = {"alpha": alpha, "bound": bound, "num_estimation": num_estimation, "radii": radii, "level": level}
    given = {name: value for name, value in options.items() if value is not None}
    if not recompute:
        if given or out is not None:
            name = next(iter(given), "out").replace("_", "-")
            raise ConfigError(
                f"--{name} belongs to --recompute; to certify with other values give --set certify.FIELD=..."
            )
        _do(_reopen(folder, data, overrides), ("certify",))
        return
    from rush.recomputation import HEADER, recompute_table

    statement, rows = recompute_table(folder, out, **given)
    _print_wide_table(None, HEADER, rows)
    text = f"{statement}; the last column, with 95 % confidence, is over images and noise together"
    _console().print(text, soft_wrap=True, highlight=False)


@app.command
def attack(folder: Path, *, data: Data = None, overrides: Overrides = None) -> None:
    """Attack test images of a run with the ladder of attackers, and inside every certified ball.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    _do(_reopen(folder, data, overrides), ("attack",))


@app.command
def report(folder: Path) -> None:
    """Write report.html from the files of a run and print its summary.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    _reopen(folder, None, None)
    _print_report(folder)


@app.command
def compare(
    runs_or_logs: list[Path],
    *,
    sigma: Annotated[list[float] | None, Parameter(negative=())] = None,
    radii: Annotated[list[float] | None, Parameter(negative=())] = None,
    class_radius: float | None = None,
    assume_same_images: bool = False,
) -> None:
    """Put the certificates of runs and public certification logs side by side.

    Parameters
    ----------
    runs_or_logs: list[Path]
        Run folders, certificates.tsv files, or logs with the columns idx, label, predict, radius, correct, time.
    sigma: list[float]
        Noise level of the logs, in their order, where their names do not say it.
    radii: list[float]
        Radii at which to compare; multiples of 0.25 by default.
    class_radius: float
        Radius of the figures by class.
    assume_same_images: bool
        Test pairs although nothing but index and label says that the images are the same.
    """
    from rush.reporting.compare import compare_command

    for title, header, rows in compare_command(runs_or_logs, sigma, radii, class_radius, assume_same_images):
        _print_wide_table(title, header, rows)


@app.command
def predict(
    folder: Path,
    images: list[Path],
    *,
    num_samples: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    resize: bool = False,
    eager: bool = False,
) -> None:
    """Predict the class of image files with the smoothed classifier of a run.

    Parameters
    ----------
    folder: Path
        Run folder, or a folder with model.json and model.safetensors.
    images: list[Path]
        Image files of the size the model was trained on.
    num_samples: int
        Noisy copies that vote on each image.
    alpha: float
        Probability of a wrong answer, for each image; where the votes do not decide, the answer is "abstain".
    seed: int
        Seed of the noise.
    resize: bool
        Resize images of another size instead of refusing them.
    eager: bool
        Do not compile the network, even where it was certified compiled: for a machine without a compiler.
    """
    from rush.prediction import predict_files

    rows = predict_files(
        folder, images, num_samples=num_samples, alpha=alpha, seed=seed, resize=resize, compiled=not eager
    )
    _print_table(("image", "class"), rows)


@app.command
def recipes() -> None:
    """List the shipped recipes."""
    from rush.config import recipe_headline, recipe_names

    _print_table(("recipe", "about"), [(name, recipe_headline(name)) for name in recipe_names()])


@app.command
def info(folder: Path) -> None:
    """Show the state of a run: recipe, finished stages, figures.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    from rush.reporting.reading import read_run
    from rush.reporting.tables import summary_rows

    opened = _reopen(folder, None, None)
    states = [(stage, "finished" if opened.finished(stage) else "not finished") for stage in STAGES]
    _print_table((f"{opened.recipe.name}: {folder}", ""), [*states, *summary_rows(read_run(folder))])


def _version() -> str:
    from rush import __version__

    return __version__


def _create(recipe: str, out: Path | None, data: Path | None, overrides: list[str] | None) -> RunFolder:
    from rush.config import load_recipe
    from rush.engine.runs import RunFolder

    if Path(recipe, "recipe.json").is_file():
        if out is not None:
            raise ConfigError(f"{recipe} is a run folder already; leave --out {out} away or give a recipe")
        return _reopen(Path(recipe), data, overrides)
    resolved = load_recipe(recipe, overrides or (), _text(data))
    return RunFolder.create(out or Path("runs") / resolved.name, resolved)


def _reopen(folder: Path, data: Path | None, overrides: list[str] | None) -> RunFolder:
    from rush.config import build_recipe
    from rush.engine.runs import RunFolder

    opened = RunFolder.open(folder)
    if data is None and not overrides:
        return opened
    changed: Recipe = build_recipe(
        opened.recipe.model_dump(mode="json"), overrides or (), _text(data), str(folder / "recipe.json")
    )
    return RunFolder.create(folder, changed)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _do(folder: RunFolder, stages: Iterable[Stage]) -> None:
    from rich.console import Console

    from rush.engine.distributed import joined_processes, rank
    from rush.pipeline import run_stage

    with joined_processes():
        console = Console(stderr=True, quiet=rank() > 0)
        for stage in stages:
            if folder.finished(stage):
                console.print(f"{stage}: finished before, kept", highlight=False)
                continue
            console.print(f"{stage} ...", highlight=False)
            run_stage(folder, stage)
            console.print(f"{stage}: {folder.require(stage)['seconds']:.0f} s", highlight=False)


def _report_on(folder: RunFolder, stages: Iterable[Stage]) -> None:
    """Run the stages, then report; also when the sandwich is violated, so that the report says so."""
    from rush.errors import SandwichError

    try:
        _do(folder, stages)
    except SandwichError:
        _print_report(folder.path)
        raise
    _print_report(folder.path)


def _print_report(folder: Path) -> None:
    from rush.reporting.page import write_report
    from rush.reporting.reading import read_run
    from rush.reporting.tables import summary_rows

    page = write_report(folder)
    _print_table(("", str(folder)), summary_rows(read_run(folder)))
    _console().print(f"report: {page}", soft_wrap=True, highlight=False)


def _print_table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, show_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _print_wide_table(title: str | None, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title, title_justify="left", show_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _console():  # type: ignore[no-untyped-def]  # rich is imported late
    from rich.console import Console

    return Console()
