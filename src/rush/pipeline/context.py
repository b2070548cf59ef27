"""The context that every stage of a run shares: folder, recipe, recorded execution and images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from rush.choices import Stage
from rush.data.images import ImageSet
from rush.data.splits import Splits
from rush.data.streaming import Stream
from rush.recipe.schema import Recipe
from rush.records.folder import RunFolder
from rush.records.published import progress_text
from rush.runtime.distributed import in_turn, rank
from rush.runtime.execution import Execution, decide_execution
from rush.smoothing.discrete import DiscreteGaussian
from rush.smoothing.noise import Gaussian, Noise, make_noise
from rush.training.budget import Budget
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import CheckpointPolicy, Monitor, TrainingSettings


@dataclass(frozen=True)
class StageContext:
    """The folder, recipe, recorded execution and images of a run."""

    run: RunFolder
    recipe: Recipe
    execution: Execution
    splits: Splits

    @classmethod
    def of(cls, run: RunFolder) -> "StageContext":
        """Configure torch as the run has recorded, or as its recipe says, and return the context.

        Raises:
            RunError: on access to images that differ from those the run has used before.
        """
        recipe, config = run.recipe, run.recipe.execution
        torch.set_num_threads(run.recorded("threads") or torch.get_num_threads())
        execution = decide_execution(config.device, config.precision, config.tile, config.deterministic)
        layout = run.recorded("channels_last")
        execution = (execution if layout is None else replace(execution, channels_last=layout)).configure()

        def record(split: str, images: ImageSet | Stream) -> None:
            used = {split: {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}}
            in_turn(lambda: run.record_provenance(execution.as_dict(), used))

        splits = Splits(recipe.data, recipe.seed, execution.device, record, run.loaded, recipe.quick)
        return cls(run, recipe, execution, splits)

    @property
    def noise(self) -> Noise | None:
        """The smoothing noise, or None for a classifier that is not smoothed."""
        return smoothing_noise(self.recipe)

    def log(self, event: str, **values: Any) -> None:
        """Write one event of the run, in the first process."""
        if rank() == 0:
            self.run.log(event, **values)

    def begin(self, stage: Stage) -> None:
        """Log that an attempt at ``stage`` begins, once for all processes."""
        if rank() == 0:
            self.run.begin(stage)

    def training(
        self,
        stage: Stage,
        monitor: Monitor | None,
        name: str | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> TrainingSettings:
        """Return the settings of a training run in ``stage``: they save its state, log, and record its epochs.

        ``name`` distinguishes several training runs of one stage. ``tell`` gets the live figures, one line at a time.
        """

        def log(event: str, **values: Any) -> None:
            self.log(event, **values)
            if event == "monitor":
                figures = {key: value for key, value in values.items() if key not in ("stage", "epoch")}
                tell(progress_text(stage, values["epoch"], figures, self.recipe.data.name))

        config = self.recipe.execution
        file = self.run.path / f"checkpoints/{name or stage}.pt"
        checkpoint = TrainingCheckpoint(file, self.run.fingerprint(stage))
        return TrainingSettings(
            self.recipe.seed,
            self.execution,
            config.compile_training,
            CheckpointPolicy(checkpoint, config.checkpoint_minutes, config.on_nonfinite, partial(self._settle, stage)),
            monitor,
            log,
        )

    def _settle(self, stage: Stage, budget: Budget) -> None:
        """Record the number of epochs of a budget.

        Raises:
            ConfigError: a ramp of the recipe needs more of them.
        """
        budget.require_ramps(self.recipe.training(stage).ramps)
        in_turn(lambda: self.run.settle(stage, budget.figures()))


def smoothing_noise(recipe: Recipe) -> Noise | None:
    """Return the noise of the smoothed classifier, or None if its sigma is 0."""
    smoothing = recipe.smoothing
    return make_noise(smoothing.noise, smoothing.sigma) if smoothing.sigma > 0 else None


def training_noise(recipe: Recipe) -> Noise | None:
    """Return the noise under which the recipe trains, or None if its sigma is 0, see ``noise_in_training``."""
    noise = smoothing_noise(recipe)
    return None if noise is None else noise_in_training(noise)


def noise_in_training(noise: Noise) -> Noise:
    """Return the noise that training draws where ``noise`` smooths.

    In place of discrete noise it is real-valued: the network would hardly differ, and no guarantee rests on training.
    """
    return Gaussian(noise.sigma) if isinstance(noise, DiscreteGaussian) else noise
