"""The training loop: the only one. Pre-training and fine-tuning differ in the step they hand in."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rush.data.batches import batches_per_epoch, shuffled_batches
from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.optim import build_optimizer, cosine_factor
from rush.engine.progress import progress
from rush.errors import RushError
from rush.options import OptimizerName
from rush.randomness import stream


class Step(Protocol):
    """One training step: the loss of the images with these indices; all randomness from ``generator``."""

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Schedule:
    """How long, in what batches and by which optimizer a module is trained."""

    epochs: int
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float


def train(
    module: nn.Module,
    step: Step,
    *,
    name: str,
    num_images: int,
    schedule: Schedule,
    seed: int,
    device: str = "cpu",
    checkpoint: TrainingCheckpoint | None = None,
    log: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Train ``module`` in place by ``schedule``; goes on from ``checkpoint`` and saves there after every epoch.

    The order of an epoch comes from ``stream(seed, name, "order", epoch)``, the step's randomness from
    ``stream(seed, name, "step", number)``: a resumed training ends with the same bits. ``log("epoch", ...)`` is called
    once an epoch with mean loss, seconds and images per second.
    Raises: RushError on a non-finite loss, naming epoch and batch.
    """
    optimizer = build_optimizer(
        module, schedule.optimizer, schedule.learning_rate, schedule.momentum, schedule.weight_decay
    )
    first = checkpoint.restore(module, optimizer) if checkpoint else 0
    per_epoch = batches_per_epoch(num_images, schedule.batch_size)
    images_per_epoch = per_epoch * schedule.batch_size
    total = schedule.epochs * images_per_epoch
    with progress(name, total, start=first * images_per_epoch) as advance:
        for epoch in range(first, schedule.epochs):
            started = time.perf_counter()
            order = shuffled_batches(num_images, schedule.batch_size, stream(seed, name, "order", epoch))
            losses = []
            for batch, indices in enumerate(order):
                number = epoch * per_epoch + batch
                _set_learning_rate(optimizer, schedule, number, per_epoch)
                loss = step(indices, stream(seed, name, "step", number, device=device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                advance(schedule.batch_size)
            mean_loss = _finite_mean(losses, name, epoch)
            seconds = time.perf_counter() - started
            log(
                "epoch",
                stage=name,
                epoch=epoch + 1,
                loss=mean_loss,
                seconds=seconds,
                images_per_second=images_per_epoch / seconds,
            )
            # After the log: a kill between the two repeats the epoch and its event, and none is missing.
            if checkpoint:
                checkpoint.save(module, optimizer, epoch + 1)


def _set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, number: int, per_epoch: int) -> None:
    factor = cosine_factor(number, schedule.epochs * per_epoch, round(schedule.warmup_epochs * per_epoch))
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate * factor


def _finite_mean(losses: list[Tensor], name: str, epoch: int) -> float:
    values = torch.stack(losses).double()
    mean = float(values.mean())
    if not math.isfinite(mean):
        first = int((~values.isfinite()).nonzero()[0])
        raise RushError(
            f"{name}: loss is not finite from batch {first} of epoch {epoch + 1} on; "
            "the checkpoint of the last good epoch is kept. "
            f'Lower {name}.learning_rate or use execution.precision = "float32"'
        )
    return mean
