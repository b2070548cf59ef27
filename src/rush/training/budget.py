"""Training for a number of minutes: a trial times the parts of a training stage and fixes the number of epochs."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from rush.data.batches import Batch
from rush.errors import ConfigError
from rush.runtime.distributed import gather_objects
from rush.training.checkpoint import LONG_SAVING, SAVING_SHARE

WARMUP_STEPS = 4  # compilation, and the capture of a CUDA graph, end before the last of them
RESERVE = 0.05  # share of the minutes for what a trial does not see: a processor that slows down, other programs
_FEWEST, _MOST = 3, 50  # timed steps of a kind
_SHARE = 0.02  # share of the minutes for the timed steps of a kind, where the fewest take less


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a training stage.

    Attributes:
        step: one step.
        head_step: one step of the first ``head_epochs``.
        opening: wait until the first batch of an epoch is available.
        saving: one checkpoint.
        monitoring: one measurement of the live figures.
    """

    step: float
    head_step: float = 0.0
    opening: float = 0.0
    saving: float = 0.0
    monitoring: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A training stage of ``minutes``: the facts that determine its number of epochs.

    Attributes:
        name: section of the recipe, for errors.
        per_epoch: steps per epoch.
        head_epochs: number of first epochs whose steps do different work from the later ones.
        warmup_epochs: warm-up epochs of the learning rate.
        monitor_epochs: number of epochs between live figures, which also come after the last one.
    """

    name: str
    minutes: float
    per_epoch: int
    head_epochs: int = 0
    warmup_epochs: float = 0.0
    monitor_epochs: int = 1

    def seconds(self, epochs: int, times: Times) -> float:
        """Return the seconds of the first ``epochs`` epochs: steps, first batches, checkpoints and live figures."""
        head = min(epochs, self.head_epochs)
        steps = self.per_epoch * (head * times.head_step + (epochs - head) * times.step)
        figures = math.ceil(epochs / self.monitor_epochs)
        trained = steps + epochs * times.opening + figures * times.monitoring
        saved = epochs * times.saving
        if times.saving > LONG_SAVING:  # then not every epoch ends with a checkpoint
            saved = min(saved, (1 + trained * SAVING_SHARE // times.saving) * times.saving)
        return trained + saved

    def fit(self, times: Times, spent: float = 0.0) -> "Budget":
        """Return the largest number of epochs that end within the minutes, minus ``RESERVE`` of them.

        Args:
            times: seconds of the parts.
            spent: seconds already used.

        Raises:
            ConfigError: there is no time for one epoch, or for more epochs than ``head_epochs`` and ``warmup_epochs``.
                The message states how many minutes one epoch takes.
        """
        left = 60 * self.minutes * (1 - RESERVE) - spent
        shortest = self.per_epoch * min(times.step, times.head_step or times.step)
        most = max(0, math.floor(left / max(1e-9, shortest)))
        epochs = bisect_right(range(1, most + 1), left, key=lambda number: self.seconds(number, times))
        budget = Budget(self, times, spent, epochs)
        if epochs < 1:
            raise ConfigError(
                f"{self.name}.minutes = {self.minutes:g} is too little: one epoch takes {budget.epoch_minutes:.3g} "
                f"minutes here ({self.per_epoch:,} steps of {times.head_step or times.step:.3g} s, and its end) and "
                f"the trial that showed it took {spent / 60:.3g}; give at least {budget.needed(1)} minutes"
            )
        budget.require("head_epochs", self.head_epochs, self.head_epochs + 1)
        budget.require("warmup_epochs", self.warmup_epochs, math.floor(self.warmup_epochs) + 1)
        return budget


@dataclass(frozen=True)
class Budget:
    """The number of epochs that end within the minutes of a plan, and the measurements that it follows from.

    Attributes:
        spent: seconds of the trial and of everything before it in the same call.
    """

    plan: Plan
    times: Times
    spent: float
    epochs: int

    @property
    def epoch_minutes(self) -> float:
        """Minutes of the first epoch."""
        return self.plan.seconds(1, self.times) / 60

    def require(self, field: str, value: float, least: int) -> None:
        """Raise ConfigError if fewer than ``least`` epochs fit, the fewest that ``field`` = ``value`` allows."""
        if self.epochs >= least:
            return
        name = self.plan.name
        raise ConfigError(
            f"{name}.{field} = {value:g} needs at least {least} epochs, and {self.epochs} end within {name}.minutes = "
            f"{self.plan.minutes:g} here (the first takes {self.epoch_minutes:.3g} minutes); lower {name}.{field}, or "
            f"give at least {name}.minutes = {self.needed(least)}"
        )

    def require_ramps(self, ramps: Mapping[str, float]) -> None:
        """Raise ConfigError if a ramp of ``ramps``, the number of epochs by field, needs more epochs than fit."""
        for field, epochs in ramps.items():
            self.require(field, epochs, math.ceil(epochs))

    def needed(self, epochs: int) -> str:
        """Return the minutes, rounded up, within which this number of epochs would have ended."""
        minutes = (self.spent + self.plan.seconds(epochs, self.times)) / (1 - RESERVE) / 60
        unit = 10.0 ** (math.floor(math.log10(max(minutes, 1e-9))) - 1)
        return f"{math.ceil(minutes / unit) * unit:.3g}"

    def figures(self) -> dict[str, Any]:
        """Return plain values for log and record."""
        return {
            "minutes": self.plan.minutes,
            "epochs": self.epochs,
            "seconds_per_step": self.times.step,
            "seconds_per_epoch": self.plan.seconds(self.epochs, self.times) / self.epochs,
            "trial_seconds": self.spent,
        }


def clock(device: str) -> float:
    """Return the seconds of a steady clock after all work queued on ``device`` is done."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def slowest(seconds: float) -> float:
    """Return the largest ``seconds`` of all processes, which is the same number in each."""
    return max(gather_objects(seconds))


def measure(
    plan: Plan,
    step: Callable[[int, Batch], object],
    batches: Callable[[], Iterator[Batch]],
    *,
    save: Callable[[], object],
    monitor: Callable[[], object],
    device: str,
) -> Times:
    """Time the parts of a training stage, in the slowest process. All processes must call it.

    Each kind of step is timed separately, after ``WARMUP_STEPS`` that are not timed: the first steps of the stage and,
    after ``plan.head_epochs``, the first of the others. Checkpoint and live figures are timed once, and a second time
    if the first was short, since imports may have taken most of it.

    Args:
        plan: the training stage.
        step: takes the step of this number on this batch.
        batches: returns the batches of an epoch.
        save: saves a checkpoint, in the process that does so.
        monitor: measures the live figures, in the process that does so.
        device: where the steps are computed.
    """
    source = _Source(batches, device)
    with closing(source.batches()) as taken:

        def seconds_of(start: int, count: int) -> float:
            """Return the seconds of ``count`` steps beginning with number ``start``, without the openings of epochs."""
            began, opened = clock(device), source.opened
            for number, batch in enumerate(islice(taken, count)):
                step(start + number % plan.per_epoch, batch)
            return clock(device) - began - (source.opened - opened)

        head_step = _seconds_per_step(partial(seconds_of, 0), plan) if plan.head_epochs else 0.0
        full_step = _seconds_per_step(partial(seconds_of, plan.head_epochs * plan.per_epoch), plan)
    saved, monitored = (_seconds(part, plan, device) for part in (save, monitor))
    times = Times(full_step, head_step, source.opened / source.epochs, saved, monitored)
    return Times(*map(max, zip(*gather_objects(astuple(times)), strict=True)))


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restore all tensors of ``module``, and which of them require gradients, in place after the context."""
    values = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(module).items():
                tensor.copy_(values[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])
        module.zero_grad(set_to_none=True)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Source:
    """The batches of successive epochs, with ``opened``, the seconds spent waiting for the first batch of each."""

    def __init__(self, batches: Callable[[], Iterator[Batch]], device: str) -> None:
        self._batches, self._device = batches, device
        self.opened, self.epochs = 0.0, 0

    def batches(self) -> Generator[Batch, None, None]:
        while True:
            began = clock(self._device)
            epoch = self._batches()
            first = next(epoch)
            self.opened += clock(self._device) - began
            self.epochs += 1
            yield first
            yield from epoch


def _seconds_per_step(seconds_of: Callable[[int], float], plan: Plan) -> float:
    """Return the seconds of a step after the warm-up, or of its last step if not even one epoch would fit."""
    seconds_of(WARMUP_STEPS - 1)
    rough = max(1e-9, slowest(seconds_of(1)))  # every process must take the same number of steps
    if rough * plan.per_epoch > 60 * plan.minutes:
        return rough
    count = min(_MOST, max(_FEWEST, int(_SHARE * 60 * plan.minutes / rough)))
    return seconds_of(count) / count


def _seconds(part: Callable[[], object], plan: Plan, device: str) -> float:
    """Return the seconds of ``part``. A short one is timed a second time."""
    for _ in range(2):
        began = clock(device)
        part()
        seconds = clock(device) - began
        if seconds > RESERVE * 60 * plan.minutes:
            break
    return seconds
