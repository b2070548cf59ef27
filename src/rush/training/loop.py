"""The training loop. Pre-training and fine-tuning differ only in the step they pass to it."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rush.choices import OnNonfinite, TrainingCompile
from rush.data.batches import Batch, TrainingImages, batches_per_epoch
from rush.errors import ConfigError, Interrupted, RushError
from rush.recipe.schema import ExecutionConfig, Schedule
from rush.runtime.distributed import average_gradients, barrier, broadcast_module, rank, world_size
from rush.runtime.execution import Execution
from rush.runtime.interruption import StopRequest, stop_requests
from rush.runtime.memory import memory_for
from rush.runtime.progress import Advance, no_progress, progress
from rush.runtime.randomness import restarted, stream
from rush.training import budget
from rush.training.checkpoint import LONG_SAVING, SAVING_SHARE, TrainingCheckpoint
from rush.training.ema import WeightAverage
from rush.training.graphs import CapturedStep
from rush.training.losses import Losses
from rush.training.meter import Cost, Meter, peak_memory
from rush.training.modes import evaluation_mode
from rush.training.optim import build_optimizer, cosine_factor, rate_tensor, representable, set_capturable

Monitor: TypeAlias = Callable[[int], dict[str, Any]]
"""Function from an epoch to live figures."""
Step: TypeAlias = Callable[[Batch, float, torch.Generator], Tensor]
"""Function from the rows of this process, the epochs done so far (for schedules) and a generator, from which all of its
randomness comes, to their mean loss without graph. It adds the gradients of this loss to the parameters' ``grad``."""

_INSPECTED_STEPS = 32  # losses are inspected at this interval, and as many steps late, so that nothing waits for them
_MOST_SKIPPED = 10  # skipped batches of a run; more of them mean that the training itself diverges


@dataclass(frozen=True)
class CheckpointPolicy:
    """The place and interval of a training stage's checkpoints, and the reaction to a non-finite loss.

    Attributes:
        checkpoint: the file. None saves nothing.
        minutes: interval between checkpoints within an epoch. One is also written at the end of an epoch.
        on_nonfinite: "stop" raises an error. "skip" returns to the last checkpoint and omits the batch.
        settled: called with the budget of a run limited by minutes before its first step. An error in it ends the run.

    Raises:
        ConfigError: on_nonfinite = "skip" without a checkpoint.
    """

    checkpoint: TrainingCheckpoint | None = None
    minutes: float = ExecutionConfig().checkpoint_minutes
    on_nonfinite: OnNonfinite = ExecutionConfig().on_nonfinite
    settled: Callable[[budget.Budget], None] | None = None

    def __post_init__(self) -> None:
        if self.on_nonfinite == "skip" and self.checkpoint is None:
            raise ConfigError('on_nonfinite = "skip" returns to the last checkpoint; give a checkpoint')


@dataclass(frozen=True)
class TrainingSettings:
    """The conditions that the two training stages of a run share.

    Attributes:
        compile_mode: torch.compile of the encoder in training, or "graph" to capture the whole step on CUDA
            (``training.graphs``).
        checkpoints, monitor, log: as in ``TrainingRun``.
    """

    seed: int
    execution: Execution
    compile_mode: TrainingCompile = "none"
    checkpoints: CheckpointPolicy = CheckpointPolicy()
    monitor: Monitor | None = None
    log: Callable[..., None] = lambda *_, **__: None

    def training(
        self,
        module: nn.Module,
        step: Step,
        name: str,
        images: TrainingImages,
        schedule: Schedule,
        counted: Sequence[nn.Module],
        head_epochs: int = 0,
    ) -> "TrainingRun":
        """Return the run of the stage ``name`` under these conditions, which counts the passes of ``counted``."""
        return TrainingRun(
            module,
            step,
            name,
            images,
            schedule,
            self.seed,
            meter=Meter(*counted, device=self.execution.device),
            checkpoints=self.checkpoints,
            monitor=self.monitor,
            head_epochs=head_epochs,
            log=self.log,
            captured=self.compile_mode == "graph",
        )


class _NotFiniteError(Exception):
    """A loss or gradient of step ``number`` that is not finite."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class TrainingRun:
    """One run of a training stage. ``run`` trains ``module`` in place along ``schedule``.

    The order of an epoch comes from ``stream(seed, name, "order", epoch)``. The randomness of a step comes from
    ``stream(seed, name, "step", number)``, with the number of the process appended where there are several. A resumed
    run therefore ends with the same bits. Resumed on a different number of processes it continues with the same
    weights, the same global batches in the same order and the same learning rates, but the draws within a step differ,
    and sums over a batch round differently.

    Attributes:
        schedule: a run limited by minutes begins with a trial, which also calls ``monitor(0)``. The number of epochs
            that fit is passed to ``log("budget", ...)`` and stored in the checkpoint, so that a resumed run has the
            same number. The trial leaves no trace: the result has the bits of a run for that number of epochs.
        meter: counts the passes of the run and names its device.
        monitor: maps an epoch to live figures, computed with averaged weights where the schedule asks for them.
        head_epochs: number of first epochs whose steps do different work from the later ones. A trial measures both.
        log: called with ``("epoch", ...)`` after every epoch: mean loss, learning rate of the last step, cost and
            images per second. Called with ``("monitor", ...)`` and the figures of ``monitor``, unless empty, after
            every ``schedule.monitor_epochs`` epochs and after the last.
        captured: whether, on CUDA, the whole step is captured once and replayed (``training.graphs``), with the same
            bits. This needs one process and the optimizer sgd or adamw.
    """

    # ``_state`` holds everything that an interruption must not lose: weights, optimizer, average, position, cost.
    module: nn.Module
    step: Step
    name: str
    images: TrainingImages
    schedule: Schedule
    seed: int
    meter: Meter = field(default_factory=Meter)
    checkpoints: CheckpointPolicy = CheckpointPolicy()
    monitor: Monitor | None = None
    head_epochs: int = 0
    log: Callable[..., None] = lambda *_, **__: None
    captured: bool = False

    def __post_init__(self) -> None:
        self.began = budget.clock(self.device)
        broadcast_module(self.module)  # processes whose weights differ in a bit would drift apart unnoticed
        self.per_epoch = batches_per_epoch(len(self.images), self.schedule.batch_size)
        self.epochs = self.schedule.epochs  # None until a trial has settled those of a run limited by minutes
        self._prepare()

    def _prepare(self) -> None:
        """Set everything to its state before the first step, with the current weights of the module."""
        schedule = self.schedule
        self.optimizer = build_optimizer(
            self.module, schedule.optimizer, schedule.learning_rate, schedule.momentum, schedule.weight_decay
        )
        self.average = WeightAverage(self.module, schedule.ema_decay) if schedule.ema_decay > 0 else None
        self.rate = schedule.learning_rate
        self.graph = self._capturing() if self.captured else None
        self.number = 0  # steps done, including skipped ones
        self.stopping: Tensor | None = None  # (), share of the processes asked to stop, as of the last step
        self.note = ""  # the last loss that the host has read
        self.losses = Losses(self.per_epoch)  # of the current epoch, on the device
        self.epoch_began = replace(self.meter.cost)
        self.skipped: set[int] = set()  # numbers of the steps whose batches are omitted
        self.saved_at = time.monotonic()
        self.kept_at = self.saving_seconds = 0.0  # by the clock that waits for the device
        self.step_passes = (0, 0)  # passes and forward passes of the previous step

    def run(self) -> None:
        """Train from the last checkpoint, if any, which may lie in the middle of an epoch.

        Raises:
            ConfigError: the minutes do not suffice for one epoch, the ``head_epochs`` and one more, or the warm-up; or
                the step cannot be captured.
            RushError: a loss or gradient is not finite. The message names epoch and batch.
            Interrupted: the process was asked to stop. A checkpoint was written before.
            DeviceMemoryError: the device ran out of memory.
        """
        with stop_requests() as stop, self.meter.running():
            self._restore()
            self._settle()
            with self._shown() as advance:
                while self.number < self.total:
                    try:
                        for batch in self._rest_of_epoch(stop, advance):
                            self._one_step(batch, stop)
                    except _NotFiniteError as error:
                        self._recover(error.number)
        if self.average is not None:
            self.average.copy_into(self.module)
        self.graph = None  # refers to the run, whose memory would be held until the next garbage collection

    @property
    def device(self) -> str:
        return self.meter.device

    @property
    def total(self) -> int:
        """Number of steps of the run or, during a trial, of one epoch of each kind of step."""
        return self.per_epoch * (self.head_epochs + 1 if self.epochs is None else self.epochs)

    def _shown(self) -> AbstractContextManager[Advance]:
        """Return a progress bar in the first process."""
        size = self.schedule.batch_size
        if rank() > 0:
            return nullcontext(no_progress)
        return progress(self.name, self.total * size, start=self.number * size)

    def _rest_of_epoch(self, stop: StopRequest, advance: Advance) -> Iterator[Batch]:
        """Yield the remaining batches of the epoch, with the work that is due after each step and at the end."""
        epoch, first = divmod(self.number, self.per_epoch)
        order = stream(self.seed, self.name, "order", epoch)
        self.stopping = None
        for batch in self.images.batches(order, self.schedule.batch_size, first):
            if self.number in self.skipped:
                self.stopping = None
            else:
                yield batch
            self.number += 1
            advance(self.schedule.batch_size, self.note)
            if self.number % self.per_epoch == 0:
                break  # the checkpoint at the end of an epoch comes after its log
            if world_size() == 1 and stop:
                self._answer(stop, None)
            elif self.number % _INSPECTED_STEPS == 0:
                self._look_back(stop)
            if self._save_is_due():
                self._save()
        self._finish_epoch(epoch + 1)
        self._answer(stop, self.stopping)

    def _restore(self) -> None:
        """Load the last checkpoint, if any.

        With on_nonfinite = "skip" and no checkpoint yet, write one, so that there is always a state to return to.
        """
        checkpoint = self.checkpoints.checkpoint
        if checkpoint is None:
            return
        state = checkpoint.load()
        try:
            if state is not None:
                self._load(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.unreadable(error) from error
        barrier()  # no process writes before all have read
        if state is None and self.epochs is not None and self.checkpoints.on_nonfinite == "skip":
            self._save()

    def _settle(self) -> None:
        """Fix the number of epochs of a run limited by minutes, unless a checkpoint has set it."""
        minutes = self.schedule.minutes
        if minutes is None or self.epochs is not None:
            return
        schedule = self.schedule
        plan = budget.Plan(
            self.name, minutes, self.per_epoch, self.head_epochs, schedule.warmup_epochs, schedule.monitor_epochs
        )
        cost = self.meter.read()  # cost of everything before the trial, whose own cost is discarded
        with budget.restored(self.module):
            times = budget.measure(
                plan,
                self._try_step,
                lambda: self.images.batches(stream(self.seed, self.name, "order", 0), schedule.batch_size),
                save=self._try_saving,
                monitor=lambda: self._monitored(0),
                device=self.device,
            )
        self.meter.restart(cost)
        self._prepare()  # the optimizer, the average and the captured graph of the trial are discarded
        spent = budget.slowest(budget.clock(self.device) - self.began)
        settled = plan.fit(times, spent + times.saving)
        if self.checkpoints.settled is not None:
            self.checkpoints.settled(settled)
        self.log("budget", stage=self.name, **settled.figures())
        self.epochs = settled.epochs
        self._save()
        barrier()

    def _recover(self, number: int) -> None:
        """Return to the last checkpoint and omit batch ``number``, which was not finite, or raise the error."""
        epoch, batch = divmod(number, self.per_epoch)
        message = f"{self.name}: loss or gradient is not finite from batch {batch} of epoch {epoch + 1} on"
        remedy = f'Lower {self.name}.learning_rate or use execution.precision = "float32"'
        if self.checkpoints.on_nonfinite == "stop":
            raise RushError(
                f"{message}; the checkpoint before it is kept. {remedy}, or omit such batches with "
                'execution.on_nonfinite = "skip"'
            )
        if len(self.skipped) >= _MOST_SKIPPED:
            raise RushError(f"{message}, after {_MOST_SKIPPED} batches that were skipped for it. {remedy}")
        self._restore()
        self.skipped.add(number)  # after the state is restored, which does not hold it
        self.log("skipped", stage=self.name, epoch=epoch + 1, batch=batch)
        self._save()

    def _one_step(self, batch: Batch, stop: StopRequest) -> None:
        """Train on one batch, and share with the other processes whether this one was asked to stop."""
        epoch = self.number / self.per_epoch
        process = (rank(),) if world_size() > 1 else ()
        names = ("step", self.number, *process)
        self.stopping = None
        self._set_learning_rate()
        with memory_for(f"{self.name}, step {self.number + 1:,}", _memory_fields(self.name)):
            if self.graph is not None:
                before = self.meter.cost.passes, self.meter.cost.forward_passes
                loss = self.graph(batch, epoch, lambda generator: restarted(generator, self.seed, self.name, *names))
                self._count(*before)
            else:
                self.optimizer.zero_grad(set_to_none=True)
                loss = self.step(batch, epoch, stream(self.seed, self.name, *names, device=self.device))
                loss, self.stopping = self._update(loss, bool(stop))
            self.losses.add(loss)
            if self.average is not None:
                self.average.update(self.module)

    def _try_step(self, number: int, batch: Batch) -> None:
        self.number = number
        self.losses.replace(torch.empty(0))  # a trial may take more steps than an epoch has
        self._one_step(batch, StopRequest())

    def _try_saving(self) -> None:
        if self.checkpoints.checkpoint is not None and rank() == 0:
            self.checkpoints.checkpoint.rehearse(self._state())

    def _update(self, loss: Tensor, stop: bool = False) -> tuple[Tensor, Tensor]:
        """Average the gradients over the processes and run the optimizer's step.

        Returns:
            The mean loss, NaN where a gradient is not finite, and the share of the processes that were asked to stop.
        """
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # One reduction carries the gradients, the loss and the stop requests of all processes.
        loss, stopping = average_gradients(trained, torch.stack([loss, torch.full_like(loss, stop)]))
        norm = nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        self.optimizer.step()
        return loss + 0 * norm.to(loss.dtype), stopping  # 0 * inf and 0 * NaN are NaN

    def _capturing(self) -> CapturedStep:
        """Return the step as a captured one, with the learning rate in a tensor."""
        if world_size() > 1:
            raise ConfigError(
                f"{self.name}: a step of {world_size()} processes cannot be captured as a CUDA graph; set "
                'execution.compile_training = "none", or train in one process'
            )
        self.rate_tensor = rate_tensor(self.optimizer, self.device)

        def whole_step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            return self._update(self.step(batch, epoch, generator))[0]

        return CapturedStep(whole_step, self.device, lambda capturing: set_capturable(self.optimizer, capturing))

    def _count(self, passes: int, forward_passes: int) -> None:
        """Count the passes of a replayed step, in which no network is called, as those of the previous step."""
        cost = self.meter.cost
        counted = cost.passes - passes, cost.forward_passes - forward_passes
        if counted == (0, 0):
            cost.passes, cost.forward_passes = passes + self.step_passes[0], forward_passes + self.step_passes[1]
        else:
            self.step_passes = counted

    def _set_learning_rate(self) -> None:
        warmup = round(self.schedule.warmup_epochs * self.per_epoch)
        factor = cosine_factor(self.number, self.total, warmup)
        self.rate = representable(self.schedule.learning_rate * factor, self.device)
        if self.graph is not None:
            self.rate_tensor.fill_(self.rate)  # the captured kernels read it from this memory
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate

    def _look_back(self, stop: StopRequest) -> None:
        """Check the losses, and answer the stop requests, that were sent to the host by the previous call.

        Every process does so at the same steps with the same values, so that all decide alike. Nothing waits for the
        steps since then.
        """
        previous = self.losses.exchange(torch.zeros(()) if self.stopping is None else self.stopping)
        if previous is not None:
            first, losses, requests = previous
            self._check(first, losses)
            self.note = f"loss {float(losses[-1]):.3f}" if len(losses) else self.note
            self._answer(stop, requests)

    def _inspect(self) -> float:
        """Return the mean loss of the epoch so far, NaN before its first step.

        Raises:
            _NotFiniteError: a loss is not finite.

        Cost:
            Waits for the device.
        """
        losses = self.losses.values().double()
        self._check(0, losses)
        return float(losses.mean())

    def _check(self, first: int, losses: Tensor) -> None:
        """Raise _NotFiniteError naming the first step whose loss is not finite.

        Args:
            first: position in the epoch of the first of ``losses``.
        """
        wrong = (~losses.isfinite()).nonzero()  # (number of them, 1)
        if len(wrong):
            # A skipped step has no loss: the position of a loss within the epoch is not that of its step.
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
            learning_rate=self.rate,
            images_per_second=images / cost.seconds,
            peak_memory=peak_memory(self.device),
            processes=world_size(),
            **asdict(cost),
        )
        figures = self._monitored(epoch) if epoch % self.schedule.monitor_epochs == 0 or epoch == self.epochs else {}
        if figures:
            self.log("monitor", stage=self.name, epoch=epoch, **figures)
        # The checkpoint comes after the logs: an interruption in between repeats the epoch's events and omits none.
        self.losses.replace(torch.empty(0))
        self.epoch_began = self.meter.read()
        if self._save_is_worth_it():
            self._save()

    def _save_is_worth_it(self) -> bool:
        """Return whether to write a checkpoint at the end of this epoch.

        A checkpoint that takes long to write is omitted if the last one is so recent that writing would take more than
        ``SAVING_SHARE`` of the time.
        """
        recent = budget.clock(self.device) - self.kept_at < self.saving_seconds / SAVING_SHARE
        return self.number == self.total or self.saving_seconds <= LONG_SAVING or not recent

    def _monitored(self, epoch: int) -> dict[str, Any]:
        """Return the live figures in the first process."""
        if self.monitor is None or rank() > 0:
            return {}
        with _evaluated(self.module, self.average):
            return self.monitor(epoch)

    def _save_is_due(self) -> bool:
        """Return whether a checkpoint within the epoch is due, in the first process."""
        return rank() == 0 and time.monotonic() - self.saved_at >= 60 * self.checkpoints.minutes and self._is_finite()

    def _is_finite(self) -> bool:
        try:
            self._inspect()
        except _NotFiniteError:
            return False  # all processes raise it together at the next inspection
        return True

    def _save(self) -> None:
        began = budget.clock(self.device)
        if self.checkpoints.checkpoint is not None and rank() == 0:
            self.checkpoints.checkpoint.save(self._state())
        self.saved_at, self.kept_at = time.monotonic(), budget.clock(self.device)
        self.saving_seconds = self.kept_at - began

    def _answer(self, stop: StopRequest, stopping: Tensor | None) -> None:
        """End the run if that was requested. Several processes decide alike, by the value they exchanged."""
        requested = bool(stop) if world_size() == 1 else stopping is not None and bool(stopping > 0)
        if not requested:
            return
        self._inspect()  # no checkpoint holds a step that was not checked to be finite
        self._save()
        barrier()
        cause, checkpoint = stop.signal or signal.SIGTERM, self.checkpoints.checkpoint
        resume = "run the same command again to resume"
        saved = f"saved in {checkpoint.path}; {resume}" if checkpoint else "nothing was saved"
        raise Interrupted(
            f"{self.name}: stopped by {cause.name} after {self.number:,} of {self.total:,} steps; {saved}", 128 + cause
        )

    def _state(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "epochs": self.epochs,
            "module": self.module.state_dict(),
            "optimizer": self._optimizer_state(),
            "average": self.average.state_dict() if self.average else {},
            "losses": self.losses.values().clone(),
            "cost": asdict(self.meter.read()),
            "epoch_began": asdict(self.epoch_began),
            "skipped": sorted(self.skipped),
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, with the learning rate as a number also where the step is captured."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": self.rate} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def _load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.graph is not None:
            self.graph = self._capturing()  # the loaded state of the optimizer is elsewhere in memory
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.number = int(state["number"])
        if self.epochs is None:
            self.epochs = int(state["epochs"])
        self.losses.replace(state["losses"].to(self.device))
        self.meter.cost, self.epoch_began = Cost(**state["cost"]), Cost(**state["epoch_began"])
        self.skipped = set(state["skipped"])


def _memory_fields(name: str) -> str:
    """Return the field to lower where a training step does not fit into memory."""
    cached = " or, with the objective simclr, set pretrain.micro_batch to a part of it" if name == "pretrain" else ""
    return f"{name}.batch_size{cached}"


@contextmanager
def _evaluated(module: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """Put ``module`` into its final state within the context: evaluation mode, averaged weights."""
    with evaluation_mode(module):
        if average is None:
            yield
            return
        weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        average.copy_into(module)
        try:
            yield
        finally:
            module.load_state_dict(weights)
