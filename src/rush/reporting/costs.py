"""What the trainings of runs cost, side by side: passes, time, memory and energy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rush.choices import TRAININGS
from rush.records.read_run import RunResults, StageRecord
from rush.reporting.attacked import Table, run_names
from rush.reporting.tables import duration, energy_text, memory_text, model_text, passes_text

_NONE = "–"


@dataclass(frozen=True)
class TrainingCost:
    """All trainings of a run together; None where a training does not say it, as in older runs.

    passes_per_image: forward and backward, over the images of the training that draws from most; forward_passes: those
    that only went forward, alike. peak_memory: bytes, the largest of them.
    """

    objectives: str | None
    passes_per_image: float | None
    forward_passes_per_image: float
    seconds: float
    peak_memory: float | None
    joules: float | None


def training_cost(results: RunResults) -> TrainingCost | None:
    """What pre-training and fine-tuning cost together; None before both are finished.

    A pre-training of no epochs is left out.
    """
    finished = [results.stages[stage] for stage in TRAININGS if stage in results.stages]
    if len(finished) < len(TRAININGS):
        return None
    trained = [stage for stage in finished if stage.fields.get("epochs") != 0]  # fine-tuning has at least one
    objectives = [stage.fields.get("objective") for stage in trained]
    memories: list[float] = [stage.fields.get("peak_memory") or 0 for stage in trained]
    return TrainingCost(
        objectives=" + ".join(map(str, objectives)) if all(objectives) else None,
        passes_per_image=_all_passes(trained, "passes_per_image"),
        forward_passes_per_image=_all_passes(trained, "forward_passes_per_image", unsaid=0.0) or 0.0,
        seconds=sum(stage.seconds for stage in trained),
        peak_memory=max(memories) if all(memories) else None,
        joules=known_sum([stage.fields.get("joules") for stage in trained]),
    )


def training_tables(runs: Sequence[RunResults]) -> list[Table]:
    """One table: a column for each run, what its trainings cost in rows; none without runs."""
    costs = [training_cost(run) for run in runs]
    rows: list[tuple[str, Callable[[TrainingCost], str]]] = [
        ("objectives", lambda cost: cost.objectives or _NONE),
        ("passes an image", passes_of),
        ("hours", lambda cost: f"{cost.seconds / 3600:.3g}"),
        ("peak memory", lambda cost: memory_text(cost.peak_memory)),
        ("energy", lambda cost: energy_text(cost.joules)),
    ]
    body = [("network", *map(model_text, runs))]
    body += [(name, *(_NONE if cost is None else text(cost) for cost in costs)) for name, text in rows]
    title = "Cost of training; passes are forward and backward, over the images of the larger training"
    return [(title, ("", *run_names(runs)), body)] if runs else []


def passes_of(cost: TrainingCost) -> str:
    """Passes of all trainings together for an image."""
    if cost.passes_per_image is None:
        return _NONE
    return passes_text(cost.passes_per_image, cost.forward_passes_per_image)


def training_sentence(results: RunResults) -> str:
    """What all trainings took, in a sentence; empty before they are finished."""
    cost = training_cost(results)
    if cost is None:
        return ""
    told = [] if cost.passes_per_image is None else [f"{passes_of(cost)} passes for an image"]
    told += [duration(cost.seconds)]
    told += [f"at most {memory_text(cost.peak_memory)} of memory"] if cost.peak_memory else []
    told += [energy_text(cost.joules)] if cost.joules is not None else []
    return f"Training took {', '.join(told)}."


def _all_passes(stages: Sequence[StageRecord], key: str, unsaid: float | None = None) -> float | None:
    """Passes of all ``stages`` for an image of the largest; a stage that does not say its images has as many.

    unsaid: what a stage without ``key`` counts; None leaves the sum unknown.
    """
    most = max(float(stage.fields.get("images") or 1) for stage in stages)
    shares = [float(stage.fields.get("images") or most) / most for stage in stages]
    made = [stage.fields.get(key, unsaid) for stage in stages]
    return known_sum([None if one is None else share * one for one, share in zip(made, shares, strict=True)])


def known_sum(parts: Sequence[float | None]) -> float | None:
    """The sum; None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
