"""The training costs of a run: passes, time, memory and energy."""

from collections.abc import Sequence
from dataclasses import dataclass

from rush.choices import TRAININGS
from rush.records.read_run import RunResults, StageRecord
from rush.reporting.wording import duration, energy_text, memory_text, passes_text


@dataclass(frozen=True)
class TrainingCost:
    """The costs of all training stages of a run together. None stands for what a stage does not record.

    Attributes:
        passes_per_image: forward and backward passes, per image of the stage with the most images.
        forward_passes_per_image: passes that were forward only, per image of the same stage.
        peak_memory: bytes, the largest of any stage.
    """

    objectives: str | None
    passes_per_image: float | None
    forward_passes_per_image: float
    seconds: float
    peak_memory: float | None
    joules: float | None


def training_cost(results: RunResults) -> TrainingCost | None:
    """Return the costs of pre-training, teaching and fine-tuning together, or None before they are finished.

    Pre-training of no epochs is not counted.
    """
    finished = [results.stages[stage] for stage in TRAININGS if stage in results.stages]
    if len(finished) < len(TRAININGS):
        return None
    trained = [stage for stage in finished if stage.fields.get("epochs") != 0]  # fine-tuning has at least one
    memories: list[float] = [stage.fields.get("peak_memory") or 0 for stage in trained]
    if "teach" in results.stages:
        trained.insert(-1, results.stages["teach"])
    objectives = [stage.fields.get("objective") for stage in trained]
    return TrainingCost(
        objectives=" + ".join(map(str, objectives)) if all(objectives) else None,
        passes_per_image=_all_passes(trained, "passes_per_image"),
        forward_passes_per_image=_all_passes(trained, "forward_passes_per_image", default=0.0) or 0.0,
        seconds=sum(stage.seconds for stage in trained),
        peak_memory=max(memories) if all(memories) else None,
        joules=known_sum([stage.fields.get("joules") for stage in trained]),
    )


def passes_of(cost: TrainingCost) -> str:
    """Return the passes per image of all training stages together, or "–" if they are unknown."""
    if cost.passes_per_image is None:
        return "–"
    return passes_text(cost.passes_per_image, cost.forward_passes_per_image)


def training_sentence(results: RunResults) -> str:
    """Return the costs of training as a sentence, empty before it is finished."""
    cost = training_cost(results)
    if cost is None:
        return ""
    parts = [] if cost.passes_per_image is None else [f"{passes_of(cost)} passes per image"]
    parts += [duration(cost.seconds)]
    parts += [f"at most {memory_text(cost.peak_memory)} of memory"] if cost.peak_memory else []
    parts += [energy_text(cost.joules)] if cost.joules is not None else []
    return f"Training took {', '.join(parts)}."


def _all_passes(stages: Sequence[StageRecord], key: str, default: float | None = None) -> float | None:
    """Return the passes of all ``stages`` per image of the largest.

    A stage that does not record its number of images has as many as the largest. One that does not record ``key``
    counts as ``default``, where None makes the sum unknown.
    """
    most = max(float(stage.fields.get("images") or 1) for stage in stages)
    shares = [float(stage.fields.get("images") or most) / most for stage in stages]
    passes = [stage.fields.get(key, default) for stage in stages]
    return known_sum([None if each is None else share * each for each, share in zip(passes, shares, strict=True)])


def known_sum(parts: Sequence[float | None]) -> float | None:
    """Return the sum of ``parts``, or None if one of them is unknown."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
