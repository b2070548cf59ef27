"""The training loop: the only one. Pre-training and fine-tuning differ in the step they hand in."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rush.choices import OnNonfinite, OptimizerName
from rush.data.batches import Batch, TrainingImages, batches_per_epoch
from rush.errors import ConfigError, Interrupted, RushError
from rush.runtime.distributed import average_gradients, barrier, broadcast_module, rank, world_size
from rush.runtime.interruption import StopRequest, stop_requests
from rush.runtime.memory import memory_for
from rush.runtime.progress import progress
from rush.runtime.randomness import restarted, stream
from rush.training import budget
from rush.training.checkpoint import LONG_SAVING, SAVING_SHARE, TrainingCheckpoint
from rush.training.ema import WeightAverage
from rush.training.graphs import CapturedStep
from rush.training.losses import Losses
from rush.training.meter import Cost, Meter, peak_memory
from rush.training.modes import evaluation_mode
from rush.training.optim import build_optimizer, cosine_factor, rate_tensor, representable, set_capturable

_INSPECTED_STEPS = 32  # losses are looked at once in so many steps, and as many steps late: nothing waits for them
_MOST_SKIPPED = 10


class Step(Protocol):
    """One training step on the rows of this process; all randomness comes from ``generator``."""

    def __call__(self, batch: Batch, epoch: float, generator: torch.Generator, /) -> Tensor:
        """The mean loss of these rows, without graph; its gradients are added to the parameters' ``grad``.

        epoch: epochs done so far, for schedules.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """How long, in what batches (of all processes together) and by which optimizer a module is trained.

    epochs or minutes: exactly one of them. minutes: of the whole call of ``train``; as many epochs as end within them,
    a number that is fixed at the start (``training.budget``). ema_decay: what comes out is the exponential moving
    average of the weights with this decay; 0 turns it off.
    Raises: ConfigError when neither or both are given, or the minutes are not a positive number.
    """

    epochs: int | None
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    ema_decay: float = 0.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.minutes is None):
            raise ConfigError(f"give epochs or minutes, exactly one; got epochs={self.epochs}, minutes={self.minutes}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"minutes must be a number > 0, got {self.minutes}")


@dataclass(frozen=True)
class Keeping:
    """How a training is kept: where, how often beside the end of every epoch, and what a non-finite loss does.

    "stop" ends the training with an error; "skip" returns to the last checkpoint and leaves the batch out. settled: is
    told the budget of a training by minutes before its first step; what it raises ends the training.
    """

    checkpoint: TrainingCheckpoint | None = None
    minutes: float = 10.0
    on_nonfinite: OnNonfinite = "stop"
    settled: Callable[[budget.Budget], None] | None = None

    def __post_init__(self) -> None:
        if self.on_nonfinite == "skip" and self.checkpoint is None:
            raise ConfigError('on_nonfinite = "skip" returns to the last checkpoint; give a checkpoint')


def train(
    module: nn.Module,
    step: Step,
    *,
    name: str,
    images: TrainingImages,
    schedule: Schedule,
    seed: int,
    device: str = "cpu",
    meter: Meter | None = None,
    keeping: Keeping = Keeping(),
    monitor: Callable[[int], dict[str, Any]] | None = None,
    monitor_epochs: int = 1,
    head_epochs: int = 0,
    log: Callable[..., None] = lambda *_, **__: None,
    captured: bool = False,
) -> None:
    """Train ``module`` in place by ``schedule``; goes on from the checkpoint, in the middle of an epoch if need be.

    The order of an epoch comes from ``stream(seed, name, "order", epoch)``, the step's randomness from
    ``stream(seed, name, "step", number)``, with the process's number behind it where there are several: a resumed
    training ends with the same bits. Resumed on another number of processes it goes on with the same weights, the same
    global batches in the same order and the same learning rates; what a step draws is drawn anew, and sums over a batch
    round otherwise.

    After every epoch ``log("epoch", ...)`` is called with the mean loss, what the epoch cost and images per second;
    after every ``monitor_epochs`` of them and the last one ``log("monitor", ...)`` with what ``monitor(epoch)``
    measures (an empty answer is not logged), with averaged weights where they are asked for.

    A training by minutes begins with a trial, which also calls ``monitor(0)``; the number of epochs that fit is given
    to ``log("budget", ...)`` and kept in the checkpoint, so that a resumed training has the same. The trial leaves no
    trace: the result has the bits of a training for that number of epochs. head_epochs: the first epochs whose steps do
    other work than the later ones; a trial measures both.
    captured: on CUDA the whole step is captured once and replayed (``training.graphs``), with the same bits; one
    process and the optimizers sgd and adamw can.
    Raises: ConfigError where the minutes do not suffice for one epoch, the ``head_epochs`` and one more, or the
    warm-up; RushError on a non-finite loss or gradient, naming epoch and batch; Interrupted when the process was asked
    to stop, after a checkpoint; ConfigError when the step cannot be captured; DeviceMemoryError where memory is short.
    """
    meter = meter or Meter(device=device)
    run = _Run(
        module, step, name, images, schedule, seed, device, meter, keeping, monitor, monitor_epochs, head_epochs, log,
        captured,
    )  # fmt: skip
    with stop_requests() as stop, run.meter.running():
        run.restore()
        run.settle()
        with run.shown() as advance:
            while run.number < run.total:
                try:
                    run.rest_of_epoch(stop, advance)
                except _NotFiniteError as found:
                    run.recover(found.number)
    if run.average is not None:
        run.average.copy_into(module)
    run.graph = None  # refers to the run, whose memory would be held until the next garbage collection


class _NotFiniteError(Exception):
    """Loss or gradients of step ``number`` are not finite."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class _Run:
    """One call of ``train``. What a kill must not lose is in ``_state``: weights, optimizer, average, place, cost."""

    module: nn.Module
    step: Step
    name: str
    images: TrainingImages
    schedule: Schedule
    seed: int
    device: str
    meter: Meter
    keeping: Keeping
    monitor: Callable[[int], dict[str, Any]] | None
    monitor_epochs: int
    head_epochs: int
    log: Callable[..., None]
    captured: bool = False

    def __post_init__(self) -> None:
        self.began = budget.clock(self.device)
        broadcast_module(self.module)  # processes whose weights differ in a bit would drift apart unseen
        self.per_epoch = batches_per_epoch(len(self.images), self.schedule.batch_size)
        self.epochs = self.schedule.epochs  # None until those of a training by minutes are settled
        self._prepare()

    def _prepare(self) -> None:
        """Everything as it is before the first step, with the weights that the module has."""
        schedule = self.schedule
        self.optimizer = build_optimizer(
            self.module, schedule.optimizer, schedule.learning_rate, schedule.momentum, schedule.weight_decay
        )
        self.average = WeightAverage(self.module, schedule.ema_decay) if schedule.ema_decay > 0 else None
        self.rate = schedule.learning_rate
        self.graph = self._capturing() if self.captured else None
        self.number = 0  # steps done
        self.losses = Losses(self.per_epoch)  # of the epoch under way
        self.epoch_began = Cost(**self.meter.cost.as_dict())
        self.skipped: set[int] = set()
        self.saved_at = time.monotonic()
        self.kept_at = self.saving_seconds = 0.0  # by the clock that waits for the device
        self.made = (0, 0)  # passes of a step

    @property
    def total(self) -> int:
        """Steps of the training; in a trial of those of each kind for an epoch."""
        return self.per_epoch * (self.head_epochs + 1 if self.epochs is None else self.epochs)

    def shown(self) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar, in the first process."""
        size = self.schedule.batch_size
        if rank() > 0:
            return nullcontext(lambda _: None)
        return progress(self.name, self.total * size, start=self.number * size)

    def rest_of_epoch(self, stop: StopRequest, advance: Callable[[int], None]) -> None:
        """All steps from here to the end of the epoch, then its log and its checkpoint."""
        epoch, first = divmod(self.number, self.per_epoch)
        order = stream(self.seed, self.name, "order", epoch)
        stopping = None
        for batch in self.images.batches(order, self.schedule.batch_size, first):
            with memory_for(f"{self.name}, step {self.number + 1:,}", _memory_fields(self.name)):
                stopping = None if self.number in self.skipped else self._one_step(batch, stop)
            self.number += 1
            advance(self.schedule.batch_size)
            if self.number % self.per_epoch == 0:
                break  # what is kept at the end of an epoch is kept after its log
            if world_size() == 1 and stop:
                self._answer(stop, stopping)
            elif self.number % _INSPECTED_STEPS == 0:
                self._look_back(stop, stopping)
            if self._save_is_due():
                self._save()
        self._finish_epoch(epoch + 1)
        self._answer(stop, stopping)

    def restore(self) -> None:
        """Take up the last checkpoint, where there is one; with "skip" there is one from now on."""
        checkpoint = self.keeping.checkpoint
        if checkpoint is None:
            return
        state = checkpoint.load()
        try:
            if state is not None:
                self._load(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.unreadable(error) from error
        barrier()  # nobody writes before everybody has read
        if state is None and self.epochs is not None and self.keeping.on_nonfinite == "skip":
            self._save()

    def settle(self) -> None:
        """Fix the number of epochs of a training by minutes, unless a checkpoint has told it."""
        minutes = self.schedule.minutes
        if minutes is None or self.epochs is not None:
            return
        warmup = self.schedule.warmup_epochs
        plan = budget.Plan(self.name, minutes, self.per_epoch, self.head_epochs, warmup, self.monitor_epochs)
        cost = self.meter.read()
        with budget.put_back(self.module):
            times = budget.measure(
                plan,
                self._try_step,
                lambda: self.images.batches(stream(self.seed, self.name, "order", 0), self.schedule.batch_size),
                save=self._try_saving,
                monitor=lambda: self._monitored(0),
                device=self.device,
            )
        self.meter.restart(cost)
        self._prepare()
        spent = budget.slowest(budget.clock(self.device) - self.began)
        settled = plan.fit(times, spent + times.saving)
        if self.keeping.settled is not None:
            self.keeping.settled(settled)
        self.log("budget", stage=self.name, **settled.figures())
        self.epochs = settled.epochs
        self._save()
        barrier()

    def recover(self, number: int) -> None:
        """After a batch that was not finite: back to the last checkpoint and on without the batch, or the error."""
        epoch, batch = divmod(number, self.per_epoch)
        told = f"{self.name}: loss or gradient is not finite from batch {batch} of epoch {epoch + 1} on"
        remedy = f'Lower {self.name}.learning_rate or use execution.precision = "float32"'
        if self.keeping.on_nonfinite == "stop":
            raise RushError(
                f"{told}; the checkpoint before it is kept. {remedy}, or leave such batches out with "
                'execution.on_nonfinite = "skip"'
            )
        if len(self.skipped) >= _MOST_SKIPPED:
            raise RushError(f"{told}, after {_MOST_SKIPPED} batches that were skipped for it. {remedy}")
        self.restore()
        self.skipped.add(number)
        self.log("skipped", stage=self.name, epoch=epoch + 1, batch=batch)
        self._save()

    def _one_step(self, batch: Batch, stop: StopRequest) -> Tensor | None:
        """Train on one batch; how large a share of the processes was asked to stop."""
        epoch = self.number / self.per_epoch
        names: tuple[str | int, ...] = ("step", self.number, *_process_name())
        self._set_learning_rate()
        if self.graph is not None:
            stopping = None
            counted = self.meter.cost.passes, self.meter.cost.forward_passes
            loss = self.graph(batch, epoch, lambda generator: restarted(generator, self.seed, self.name, *names))
            self._count(*counted)
        else:
            generator = stream(self.seed, self.name, *names, device=self.device)
            loss, stopping = self._whole_step(batch, epoch, generator, stop)
        self.losses.add(loss)
        if self.average is not None:
            self.average.update(self.module)
        return stopping

    def _try_step(self, number: int, batch: Batch) -> None:
        self.number = number
        self.losses.replace(torch.empty(0))  # a trial may take more steps than an epoch has
        self._one_step(batch, StopRequest())

    def _try_saving(self) -> None:
        if self.keeping.checkpoint is not None and rank() == 0:
            self.keeping.checkpoint.rehearse(self._state())

    def _whole_step(
        self, batch: Batch, epoch: float, generator: torch.Generator, stop: StopRequest | None = None
    ) -> tuple[Tensor, Tensor]:
        """Forward, backward and the optimizer's step: the loss, NaN where a gradient is not finite, and how large a
        share of the processes was asked to stop."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.step(batch, epoch, generator)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        loss, stopping = average_gradients(trained, torch.stack([loss, torch.full_like(loss, bool(stop))]))
        norm = nn.utils.get_total_norm([own.grad for own in trained if own.grad is not None])
        self.optimizer.step()
        return loss + 0 * norm.to(loss.dtype), stopping

    def _capturing(self) -> CapturedStep:
        """The step as one that is captured, with the learning rate in a tensor."""
        if world_size() > 1:
            raise ConfigError(
                f"{self.name}: a step of {world_size()} processes cannot be captured as a CUDA graph; set "
                'execution.compile_training = "none", or train in one process'
            )
        self.rate_tensor = rate_tensor(self.optimizer, self.device)
        return CapturedStep(
            lambda batch, epoch, generator: self._whole_step(batch, epoch, generator)[0],
            self.device,
            lambda capturing: set_capturable(self.optimizer, capturing),
        )

    def _count(self, passes: int, forward_passes: int) -> None:
        """Count the passes of a replayed step, in which no network is called: those of the step before."""
        cost = self.meter.cost
        made = cost.passes - passes, cost.forward_passes - forward_passes
        if made == (0, 0):
            cost.passes, cost.forward_passes = passes + self.made[0], forward_passes + self.made[1]
        else:
            self.made = made

    def _set_learning_rate(self) -> None:
        warmup = round(self.schedule.warmup_epochs * self.per_epoch)
        factor = cosine_factor(self.number, self.total, warmup)
        self.rate = representable(self.schedule.learning_rate * factor, self.device)
        if self.graph is not None:
            self.rate_tensor.fill_(self.rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate

    def _look_back(self, stop: StopRequest, stopping: Tensor | None) -> None:
        """Judge the losses, and answer the stop requests, that were sent to the host when this was called before.

        Every process does so at the same steps with the same values, so that all of them decide alike. Nothing waits
        for the steps since then.
        """
        seen = self.losses.seen(torch.zeros(()) if stopping is None else stopping)
        if seen is not None:
            first, losses, told = seen
            self._check(first, losses)
            self._answer(stop, told)

    def _inspect(self) -> float:
        """Mean loss of the epoch so far, NaN before its first step; waits for the device. Raises _NotFiniteError."""
        losses = self.losses.values().double()
        self._check(0, losses)
        return float(losses.mean())

    def _check(self, first: int, losses: Tensor) -> None:
        """Raise _NotFiniteError naming the first step whose loss is not finite, of ``losses`` from place ``first`` of
        the epoch on."""
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            start = (self.number - 1) // self.per_epoch * self.per_epoch
            taken = [number for number in range(start, self.number) if number not in self.skipped]
            raise _NotFiniteError(taken[first + int(wrong[0])])

    def _finish_epoch(self, epoch: int) -> None:
        loss, cost = self._inspect(), self.meter.read().minus(self.epoch_began)
        images = self.per_epoch * self.schedule.batch_size
        self.log(
            "epoch",
            stage=self.name,
            epoch=epoch,
            loss=loss,
            images_per_second=images / cost.seconds,
            peak_memory=peak_memory(self.device),
            processes=world_size(),
            **cost.as_dict(),
        )
        figures = self._monitored(epoch) if epoch % self.monitor_epochs == 0 or epoch == self.epochs else {}
        if figures:
            self.log("monitor", stage=self.name, epoch=epoch, **figures)
        # After the logs: a kill between them and here repeats the epoch and its events, and none is missing.
        self.losses.replace(torch.empty(0))
        self.epoch_began = self.meter.read()
        if self._save_is_worth_it():
            self._save()

    def _save_is_worth_it(self) -> bool:
        """Whether to write a checkpoint at the end of this epoch: not where one takes long and the last one is so
        recent that writing would take more than ``SAVING_SHARE`` of the time."""
        recent = budget.clock(self.device) - self.kept_at < self.saving_seconds / SAVING_SHARE
        return self.number == self.total or self.saving_seconds <= LONG_SAVING or not recent

    def _monitored(self, epoch: int) -> dict[str, Any]:
        """The live figures, in the first process."""
        if self.monitor is None or rank() > 0:
            return {}
        with _evaluated(self.module, self.average):
            return self.monitor(epoch)

    def _save_is_due(self) -> bool:
        """Whether it is time for a checkpoint in the middle of an epoch, in the first process."""
        return rank() == 0 and time.monotonic() - self.saved_at >= 60 * self.keeping.minutes and self._is_finite()

    def _is_finite(self) -> bool:
        try:
            self._inspect()
        except _NotFiniteError:
            return False  # all processes meet it together at the next inspection
        return True

    def _save(self) -> None:
        began = budget.clock(self.device)
        if self.keeping.checkpoint is not None and rank() == 0:
            self.keeping.checkpoint.save(self._state())
        self.saved_at, self.kept_at = time.monotonic(), budget.clock(self.device)
        self.saving_seconds = self.kept_at - began

    def _answer(self, stop: StopRequest, stopping: Tensor | None) -> None:
        """End the training if it was asked to; of several processes all or none, by what they told each other."""
        asked = bool(stop) if world_size() == 1 else stopping is not None and bool(stopping > 0)
        if not asked:
            return
        self._inspect()  # no checkpoint holds a step that was not found finite
        self._save()
        barrier()
        cause, kept = stop.signal or signal.SIGTERM, self.keeping.checkpoint
        told = f"kept in {kept.path}; the same command goes on from there" if kept else "nothing was kept"
        raise Interrupted(
            f"{self.name}: stopped by {cause.name} after {self.number:,} of {self.total:,} steps; {told}", 128 + cause
        )

    def _state(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "epochs": self.epochs,
            "module": self.module.state_dict(),
            "optimizer": self._optimizer_state(),
            "average": self.average.state_dict() if self.average else {},
            "losses": self.losses.values().clone(),
            "cost": self.meter.read().as_dict(),
            "epoch_began": self.epoch_began.as_dict(),
            "skipped": sorted(self.skipped),
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, with the learning rate as a number also where the step is captured."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": self.rate} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def _load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.graph is not None:
            self.rate_tensor = rate_tensor(self.optimizer, self.device)
            self.graph.reset()
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.number = int(state["number"])
        if self.epochs is None:
            self.epochs = int(state["epochs"])
        self.losses.replace(state["losses"].to(self.device))
        self.meter.cost, self.epoch_began = Cost(**state["cost"]), Cost(**state["epoch_began"])
        self.skipped = set(state["skipped"])


def _memory_fields(name: str) -> str:
    """What to lower where a training step does not fit into memory."""
    cached = " or, with the objective simclr, set pretrain.micro_batch to a part of it" if name == "pretrain" else ""
    return f"{name}.batch_size{cached}"


def _process_name() -> tuple[int, ...]:
    """What names a process's own streams: nothing where it is alone."""
    return (rank(),) if world_size() > 1 else ()


@contextmanager
def _evaluated(module: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """Within the context ``module`` is as it would come out now: in evaluation mode, with averaged weights."""
    with evaluation_mode(module):
        if average is None:
            yield
            return
        weights = {name: own.detach().clone() for name, own in module.state_dict().items()}
        average.copy_into(module)
        try:
            yield
        finally:
            module.load_state_dict(weights)
