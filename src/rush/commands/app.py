"""The command line. Imports of torch wait inside the commands, so that help and config errors come at once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import App, Parameter

from rush.choices import STAGES, TRAININGS, Decision, Level, Norm, Stage
from rush.commands.terminal import print_lines, print_table, print_wide_table
from rush.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rush.commands.external import Subject
    from rush.recipe.schema import Recipe
    from rush.records.folder import RunFolder

T = TypeVar("T")

app = App(
    name="rush",
    help="Robust image classifiers: pre-trained by contrast, smoothed by noise, certified soundly, attacked honestly. "
    "Errors are one line; --traceback, with any command, shows where one was raised.",
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
Data = Annotated[
    list[Path] | None,
    Parameter(
        help="Folder that holds the data set's archives or shards; given several times, their shards are joined.",
        negative=(),
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class AnyModel:
    """A model from outside a run, and the images and threat model it is tried in.

    Parameters
    ----------
    model: str
        module:function that gives a torch.nn.Module from [0, 1] pixels to logits, or a rush.SmoothedClassifier; or a
        run folder.
    data: list[str]
        Images: a name or path as for recipes. For a run folder where its data set lies, as in `rush run`.
    root: list[Path]
        Folder that holds the data set's archives or shards; given several times, their shards are joined.
    split: str
        Split of the data set.
    images: int
        So many images of the split, the first of an order fixed by the seed.
    norm: str
        Threat model; a run has its own.
    epsilon: str
        A number or a fraction such as 8/255, in [0, 1] pixel units.
    sigma: float
        Smooth the module with Gaussian noise of this deviation.
    num_classes: int
        Number of classes, where it is not that of the data set.
    decision: str
        For a module that is random by itself, what it is used for: vote, mean or single.
    surrogate: str
        module:function of a module whose derivative stands in for the model's (BPDA).
    seed: int
        Seed of attacks and verdicts: 0 unless given; verdict draws one from the system unless given.
    """

    model: str | None = None
    data: Annotated[list[str] | None, Parameter(negative=())] = None
    root: Annotated[list[Path] | None, Parameter(negative=())] = None
    split: str = "test"
    images: int = 200
    norm: Norm = "linf"
    epsilon: str = "8/255"
    sigma: float | None = None
    num_classes: int | None = None
    decision: Decision | None = None
    surrogate: str | None = None
    seed: int | None = None

    def subject(self, every_image: bool = False) -> Subject:
        """The model and its images, loaded."""
        if self.model is None or self.data is None:
            raise ConfigError(
                "give a run folder, or --model module:function with --data (a name such as cifar10, or a path)"
            )
        if len(self.data) > 1:
            raise ConfigError(
                f"--data names one data set, got {', '.join(self.data)}; give the folders that hold it with --root"
            )
        from rush.commands.external import Subject

        return Subject.of(
            self.model,
            self.data[0],
            self.norm,
            self.epsilon,
            split=self.split,
            root=_folders(self.root),
            images=None if every_image else self.images,
            sigma=self.sigma,
            num_classes=self.num_classes,
            decision=self.decision,
            surrogate=self.surrogate,
            seed=self.seed or 0,
        )


_NO_MODEL = AnyModel()
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
    from rush.pipeline.stages import check_run

    check_run(folder)
    if several_processes():
        _do(folder, STAGES[:-1])
        _leader_says(f"audit and report run in one process; start `rush run {folder.path}` without torchrun for them")
        return
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
def finetune(
    folder: Path,
    *,
    out: Annotated[Path | None, Parameter(help="New run folder that begins with the encoder of this one.")] = None,
    data: Data = None,
    overrides: Overrides = None,
) -> None:
    """Fine-tune the pre-trained encoder of a run; with --out in a run of its own, e.g. with fewer labels or another
    objective.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    run_ = _reopen(folder, data, overrides) if out is None else _branch(folder, out, data, overrides)
    _do(run_, ("finetune",))


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
    from rush.commands.recertify import HEADER, recompute_table

    statement, rows = recompute_table(folder, out, **given)
    print_wide_table(None, HEADER, rows)
    print_lines([f"{statement}; the last column, with 95 % confidence, is over images and noise together"])


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
def ladder(folder: Path | None = None, *, given: AnyModel = _NO_MODEL, overrides: Overrides = None) -> None:
    """Put attackers of rising strength on a model, one rung after the other: on that of a run (its attack stage, kept
    and shown), or on any model.

    Parameters
    ----------
    folder: Path
        Run folder; or give --model and --data.
    """
    if folder is not None:
        _do(_reopen_for(folder, given, overrides), ("attack",))
        _print_ladder(folder)
        return
    from rush.commands.external import LADDER_HEADER, ladder_rows
    from rush.reporting.tables import percent

    subject, results = given.subject(), []
    for result in subject.climb(given.seed or 0):
        results.append(result)
        print_lines([f"{result.plan.label}: {percent(result.robust_accuracy)}"], stderr=True)
    title = f"{given.model}, {given.norm} {given.epsilon}, {len(results[0])} images"
    print_wide_table(title, LADDER_HEADER, ladder_rows(results))


@app.command
def audit(
    folder: Path | None = None,
    *,
    given: AnyModel = _NO_MODEL,
    rung: str | None = None,
    tolerance: float = 0.05,
    out: Path | None = None,
    overrides: Overrides = None,
) -> None:
    """Say whether an evaluation can be believed: of a run, of one rung of its ladder, or the default one (PGD-20, for
    random models EOT 20) of any model.

    Parameters
    ----------
    folder: Path
        Run folder; or give --model and --data.
    rung: str
        Audit the evaluation that stops at this rung of the run's ladder, e.g. frozen; written to audit-RUNG.json.
    tolerance: float
        Share of images, held there and broken here, that is put up with. A run's recipe has its own.
    out: Path
        File for the machine-readable audit of --model; audit.json by default.
    """
    if folder is not None:
        _audit_run(_reopen_for(folder, given, overrides), rung)
        return
    if rung is not None:
        raise ConfigError("--rung belongs to a run folder; give RUN --rung NAME")
    from rush.auditing.report import reach_statement
    from rush.records.audit import write_audit

    subject = given.subject()
    statement = reach_statement(len(subject.images), tolerance) if 0 < tolerance < 1 else None
    if statement is not None:
        print_lines([statement], stderr=True)
    report_ = subject.audit(tolerance, given.seed or 0)
    file = out or Path("audit.json")
    write_audit(file, report_)
    print_lines([*report_.summary(), f"written to {file}"])


@app.command
def verdict(file: Path, *, given: AnyModel = _NO_MODEL, alpha: float = 0.001, max_votes: int = 10_000) -> None:
    """Judge adversarial images that any tool has made: broken, held or undecided, on fresh noise.

    The noise depends on the point and on a seed that is drawn now, after the points are fixed, and printed, so that
    nobody can have tried points against it. --seed repeats a verdict.

    Parameters
    ----------
    file: Path
        An .npz with adversarial (N, C, H, W), float in [0, 1] or uint8; and ids of images of --data, or images and
        labels of its own.
    alpha: float
        Probability of a false verdict, for each image.
    max_votes: int
        Most votes of a verdict.
    """
    from rush.commands.external import judge_file, load_model, threat_model
    from rush.reporting.tables import percent, share

    if given.model is None:
        raise ConfigError("give --model: a run folder, or module:function")
    subject = given.subject(every_image=True) if given.data is not None else None
    model = subject.model if subject else load_model(given.model, given.sigma, given.num_classes or 10)
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    options = {"decision": given.decision, "alpha": alpha, "max_votes": max_votes, "seed": seed}
    result = judge_file(file, subject, model, threat_model(given.norm, given.epsilon), **options)
    undecided = int(result.undecided.sum())
    rows = [
        ("images", f"{len(result):,}"),
        ("robust accuracy, 1 - broken", share(result.interval)),
        ("held", share(result.interval_lower)),
        ("undecided", f"{undecided} ({percent(undecided / len(result))})"),
        ("largest change", f"l-inf {result.linf.max():.5f}, l2 {result.l2.max():.4f}, l1 {result.l1.max():.3f}"),
        ("votes per image", f"{result.votes.mean():,.0f}"),
        ("seed", f"{seed}" if given.seed is not None else f"{seed}, drawn after the points; --seed {seed} repeats it"),
    ]
    print_table(("", str(file)), rows)


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
        Radius of the figures by class; half the smallest sigma, or the next one of the logs' grids, by default.
    assume_same_images: bool
        Test pairs although nothing but index and label says that the images are the same.
    """
    from rush.reporting.compare import compare_command

    for title, header, rows in compare_command(runs_or_logs, sigma, radii, class_radius, assume_same_images):
        print_wide_table(title, header, rows)


@app.command
def cost(
    recipes_: Annotated[list[str], Parameter(name="recipes")],
    *,
    steps: int | None = None,
    file: Annotated[Path | None, Parameter(name="--json")] = None,
    data: Data = None,
    overrides: Overrides = None,
) -> None:
    """Say what training recipes would take on this machine: measured steps times the steps of the recipe. No data are
    needed where the recipe names its data set.

    Parameters
    ----------
    recipes_: list[str]
        Names of shipped recipes or paths of .toml files; ratios are to the first.
    steps: int
        So many steps of each training are measured, after as many that warm up; 4 by default.
    file: Path
        File for all figures as JSON.
    """
    from rush.recipe.schema import load_recipe

    resolved = [load_recipe(name, overrides or (), _folders(data)) for name in recipes_]
    from rush.commands.cost import COST_HEADER, STAGE_HEADER, STEPS, cost_rows, measure_each, stage_rows, write_costs

    costs = list(measure_each(resolved, STEPS if steps is None else steps))
    conditions = dict.fromkeys(one.conditions for one in costs)
    title = f"Cost of training, every figure extrapolated (steps measured: {costs[0].measured_steps})"
    print_wide_table(title, COST_HEADER, cost_rows(costs))
    print_wide_table("By training, every figure extrapolated", STAGE_HEADER, stage_rows(costs))
    print_lines(f"extrapolated from steps measured on {text}" for text in conditions)
    if file is not None:
        write_costs(file, costs)
        print_lines([f"written to {file}"])


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
    """Predict the class of image files with the classifier of a run, smoothed or not.

    Parameters
    ----------
    folder: Path
        Run folder, or a folder with model.json and model.safetensors.
    images: list[Path]
        Image files. They are read like the training images; where these were resized (data.size), so are they. A
        file that cannot be read is named, and the others are answered.
    num_samples: int
        Noisy copies that vote on each image.
    alpha: float
        Probability of a wrong answer, for each image; where the votes do not decide, the answer is "abstain".
    seed: int
        Seed of the noise.
    resize: bool
        Resample the central part of images of another size instead of refusing them, also where the training images
        were not resized.
    eager: bool
        Do not compile the network, even where it was certified compiled: for a machine without a compiler.
    """
    from rush.commands.predict import predict_files

    predictions = predict_files(
        folder, images, num_samples=num_samples, alpha=alpha, seed=seed, resize=resize, compiled=not eager
    )
    answered = [(str(one.file), one.answer) for one in predictions if one.answer is not None]
    if answered:
        print_table(("image", "class"), answered)
    errors = [one.error for one in predictions if one.error is not None]
    print_lines([f"rush: {error}" for error in errors[:-1]], stderr=True)
    if errors:
        raise DataError(errors[-1])


@app.command
def recipes() -> None:
    """List the shipped recipes."""
    from rush.recipe.schema import recipe_headline, recipe_names

    print_table(("recipe", "about"), [(name, recipe_headline(name)) for name in recipe_names()])


@app.command
def info(folder: Path) -> None:
    """Show the state of a run: recipe, finished stages, figures.

    Parameters
    ----------
    folder: Path
        Run folder.
    """
    from rush.records.read_run import read_run
    from rush.reporting.tables import summary_rows

    opened = _reopen(folder, None, None)
    states = [(stage, _state(opened, stage)) for stage in STAGES]
    print_table((f"{opened.recipe.name}: {folder}", ""), [*states, *summary_rows(read_run(folder))])


def _state(opened: RunFolder, stage: Stage) -> str:
    """Whether a stage is finished and, of a training by minutes, how many epochs end within them."""
    state = "finished" if opened.finished(stage) else "not finished"
    if stage not in TRAININGS:
        return state
    budget, minutes = opened.budget(stage), opened.recipe.training(stage).minutes
    if budget is not None:
        state += f", {budget['epochs']} epochs for {budget['minutes']:g} minutes"
    return state if minutes is None else f"{state}, as many epochs as end within {minutes:g} minutes"


def _version() -> str:
    from rush import __version__

    return __version__


def _create(recipe: str, out: Path | None, data: list[Path] | None, overrides: list[str] | None) -> RunFolder:
    from rush.recipe.schema import load_recipe
    from rush.records.folder import RunFolder

    if Path(recipe, "recipe.json").is_file():
        if out is not None:
            raise ConfigError(f"{recipe} is a run folder already; leave --out {out} away or give a recipe")
        return _reopen(Path(recipe), data, overrides)
    resolved = load_recipe(recipe, overrides or (), _folders(data))
    return _in_turn(lambda: RunFolder.create(out or Path("runs") / resolved.name, resolved))


def _reopen(folder: Path, data: list[Path] | None, overrides: list[str] | None) -> RunFolder:
    from rush.records.folder import RunFolder

    opened = RunFolder.open(folder)
    if data is None and not overrides:
        return opened
    return _in_turn(lambda: RunFolder.create(folder, _changed(opened, data, overrides)))


def _branch(folder: Path, out: Path, data: list[Path] | None, overrides: list[str] | None) -> RunFolder:
    from rush.records.folder import RunFolder

    opened = RunFolder.open(folder)
    return _in_turn(lambda: opened.branch(out, _changed(opened, data, overrides)))


def _changed(opened: RunFolder, data: list[Path] | None, overrides: list[str] | None) -> Recipe:
    from rush.recipe.schema import build_recipe

    values = opened.recipe.model_dump(mode="json")
    return build_recipe(values, overrides or (), _folders(data), str(opened.path / "recipe.json"))


def several_processes() -> bool:
    """Whether torchrun started more than this one; known without torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _process_number() -> int:
    return int(os.environ.get("RANK", "0"))


def _in_turn(work: Callable[[], T]) -> T:
    """``work()``, of several processes in one after the other: they would write the same file."""
    if not several_processes():
        return work()
    from rush.runtime.distributed import in_turn

    return in_turn(work)


def _leader_says(text: str) -> None:
    """One line on standard error, from the first process."""
    print_lines([text], stderr=True, quiet=_process_number() > 0)


def _folders(paths: list[Path] | None) -> str | list[str] | None:
    """One folder as a text, so that recipe.json has it as always; several as a list."""
    if paths is None:
        return None
    return str(paths[0]) if len(paths) == 1 else list(map(str, paths))


def _do(folder: RunFolder, stages: Iterable[Stage]) -> None:
    from rush.pipeline.stages import run_stage

    for stage in stages:
        if folder.finished(stage):
            _leader_says(f"{stage}: finished before, kept")
            continue
        _leader_says(f"{stage} ...")
        run_stage(folder, stage)
        _leader_says(f"{stage}: {folder.require(stage)['seconds']:.0f} s")


def _reopen_for(folder: Path, given: AnyModel, overrides: list[str] | None) -> RunFolder:
    """The run of a command that also takes any model; its images and threat model are the recipe's."""
    foreign = [name for name, value in vars(given).items() if name != "data" and value != getattr(_NO_MODEL, name)]
    if foreign:
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} belongs to --model; a run folder has its own, see `--set` for its fields"
        )
    return _reopen(folder, None if given.data is None else list(map(Path, given.data)), overrides)


def _audit_run(opened: RunFolder, rung: str | None) -> None:
    from rush.records.audit import read_audit, write_audit

    file = opened.path / ("audit.json" if rung is None else f"audit-{rung}.json")
    if rung is None:
        _do(opened, ("audit",))
    elif not file.exists():
        from rush.pipeline.attack import audit_run

        write_audit(file, audit_run(opened, rung))
    report_ = read_audit(file, "delete it and audit again")
    print_lines([*report_.summary(), f"in {file}"])


def _print_ladder(folder: Path) -> None:
    from rush.records.read_run import read_run
    from rush.reporting.tables import ladder_rows

    ladder_ = read_run(folder).ladder
    assert ladder_ is not None
    header = ("attacker", "passes", "accuracy", "held", "undecided", "minus the one before", "time")
    rows = [
        (row.label, row.passes, row.accuracy, row.held, row.undecided, row.step, row.seconds)
        for row in ladder_rows(ladder_)
    ]
    print_wide_table(str(folder), header, rows)


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
    from rush.records.read_run import read_run
    from rush.reporting.page import write_report
    from rush.reporting.tables import summary_rows

    page = write_report(folder)
    print_table(("", str(folder)), summary_rows(read_run(folder)))
    print_lines([f"report: {page}"])
