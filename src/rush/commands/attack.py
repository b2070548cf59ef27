"""``rush attack``: the ladder of a run, or one attack on any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rush.choices import AttackName, parse_fraction
from rush.commands.external import NO_EVALUATION, ExternalEvaluation, verdict_rows
from rush.commands.run_folders import Overrides, Redo, open_run, print_once, rank_of_process, refuse_existing
from rush.commands.terminal import Json, print_json, print_notes, print_table
from rush.errors import ConfigError

if TYPE_CHECKING:
    from rush.evaluation.result import AttackResult


def attack(
    folder: Path | None = None,
    *,
    external: ExternalEvaluation = NO_EVALUATION,
    overrides: Overrides = None,
    redo: Redo = False,
    method: AttackName | None = None,
    steps: int | None = None,
    step_size: str | None = None,
    restarts: int | None = None,
    eot_samples: str | None = None,
    alpha: float = 0.001,
    max_votes: int = 10_000,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Attack test images of a run with a ladder of attackers, and inside every certified ball. Or attack images of any
    model, and write the points with their verdicts.

    Args:
        folder: Run folder; or give --model and --data.
        method: The attack on --model. By default worst-case, the parameter-free suite, which takes none of the next
            four options.
        steps: Number of steps, queries or draws.
        step_size: A number or a fraction such as 2/255, in [0, 1] pixel units.
        restarts: Number of random starts.
        eot_samples: Noise draws per gradient or query of a stochastic model, or auto.
        alpha: Probability of a false verdict, per image.
        max_votes: Largest number of judging votes per point.
        out: File for the points on --model; adversarial.npz by default.
    """
    budget = {"steps": steps, "step_size": step_size, "restarts": restarts, "eot_samples": eot_samples}
    given = {name: value for name, value in budget.items() if value is not None}
    if folder is None:
        if overrides:
            raise ConfigError("--set needs a run folder")
        if external.model is None:
            raise ConfigError("give a run folder, or --model module:function with --data")
        _attack_model(external, method or "worst-case", alpha, max_votes, out or Path("adversarial.npz"), json, **given)
        return
    data = external.data_of_run()
    options = {"method": method, "out": out, **given}
    if any(value is not None for value in options.values()):
        name = next(name for name, value in options.items() if value is not None).replace("_", "-")
        raise ConfigError(f"--{name} belongs to --model; the ladder of a run is set by --set attack.FIELD=...")
    run = open_run(folder, data, overrides, "attack" if redo else None)
    from rush.pipeline.stages import run_stage

    run_stage(run, "attack", print_once)
    if json and rank_of_process() == 0:
        from rush.records.read_run import read_run
        from rush.reporting.values import ladder_value

        ladder = read_run(folder).ladder
        assert ladder is not None
        print_json(ladder_value(ladder))


def _attack_model(
    external: ExternalEvaluation,
    method: AttackName,
    alpha: float,
    max_votes: int,
    out: Path,
    json: bool,
    **given: str | int,
) -> None:
    """Attack the images of a model that belongs to no run, write the points to ``out`` and print the verdicts.

    Raises:
        ConfigError: An option is not a number.
        RunError: ``out`` exists.
    """
    refuse_existing(out)
    budget = {name: _number(name, value) for name, value in given.items()}
    import shutil

    from rush.evaluation.attack import attack

    parts = out.with_name(f"{out.name}.parts")
    result = attack(
        external.classifier,
        external.pixels,
        external.threat,
        method,
        **budget,  # type: ignore[arg-type]
        decision=external.decision,
        surrogate=external.surrogate_module,
        alpha=alpha,
        max_votes=max_votes,
        seed=external.seed or 0,
        resume=parts,
    )
    if rank_of_process() > 0:
        return
    _write_points(out, result)
    shutil.rmtree(parts, ignore_errors=True)
    if json:
        print_json(result.to_dict())
        return
    print_table(
        ("", f"{external.model}, {result.plan.label}, {external.norm} {external.epsilon}"), verdict_rows(result)
    )
    print_notes([f"written to {out}; `rush verdict {out} {external.words}` judges the points again"])


def _number(name: str, value: str | int) -> str | int | float:
    """Return the value of an option as a number, or the word "auto" as it is."""
    if name == "eot_samples" and value != "auto":
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"--eot-samples must be an integer or auto, got {value!r}") from None
    if name != "step_size":
        return value
    try:
        return parse_fraction(value)
    except ValueError as error:
        raise ConfigError(f"--step-size: {error}") from None


def _write_points(file: Path, result: AttackResult) -> None:
    """Write the points (N, C, H, W), ids, labels and verdicts, as ``rush verdict`` reads them."""
    import numpy as np

    from rush.choices import VERDICTS
    from rush.runtime.files import write_arrays

    write_arrays(
        file,
        adversarial=result.adversarial.numpy(),
        ids=np.array(result.ids),
        labels=result.labels,
        verdicts=np.array(VERDICTS)[result.verdict],
    )
