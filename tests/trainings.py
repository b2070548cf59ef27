"""Trainings of a second or less: one of the training loop alone that keeps what it did, and those of both stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from rush.data.batches import Batch, Resident
from rush.data.images import ImageSet
from rush.data.sources import load_images
from rush.data.views import random_view
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import SmallEncoder
from rush.models.heads import linear_head
from rush.recipe.schema import FinetuneConfig, PretrainConfig, Schedule, Views
from rush.runtime.distributed import rank, world_size
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.finetune import finetune
from rush.training.loop import CheckpointPolicy, TrainingRun, TrainingSettings
from rush.training.meter import Meter
from rush.training.pretrain import pretrain

Disturb = Callable[[int, Tensor], Tensor]
"""Function from the number of a step and its loss to the loss that the training continues with."""
View = Callable[[Tensor, Views, torch.Generator], Tensor]

SCHEDULE = Schedule(
    epochs=3,
    batch_size=8,
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-3,
    warmup_epochs=1,
    ema_decay=0.9,
    monitor_epochs=1,
)
PER_EPOCH = 5  # steps on 43 images
NEVER, ALWAYS = 1e9, 0.0  # minutes between checkpoints


def images(count: int = 43, kind: type[Resident] = Resident) -> Resident:
    """Return the rows of this process of ``count`` random images of three classes."""
    pixels = torch.randint(0, 256, (count, 1, 2, 3), generator=stream(0, "pixels")).to(torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=stream(0, "labels"))
    names = np.arange(count).astype(str)
    return kind(ImageSet(pixels, labels, ("a", "b", "c"), names, "random", "train"), "cpu", rank(), world_size())


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def kept(folder: Path, minutes: float = NEVER, **options: Any) -> CheckpointPolicy:
    """Return the policy that keeps a checkpoint in ``folder``."""
    return CheckpointPolicy(TrainingCheckpoint(folder / "state.pt", "recipe"), minutes, **options)


class BreakingCheckpoint(TrainingCheckpoint):
    """Breaks the training off right after it was written ``saves`` times."""

    def __init__(self, path: Path, saves: int) -> None:
        super().__init__(path, "recipe")
        self.saves = saves

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        self.saves -= 1
        if self.saves == 0:
            raise KeyboardInterrupt


class Clock:
    """A clock that stands still but for what a test lets pass."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, _device: str) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


class Training:
    """A small noisy training with BatchNorm. ``steps`` are the numbers of those that it took."""

    def __init__(
        self,
        checkpoints: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008, a frozen value
        disturb: Disturb = lambda _, loss: loss,
        per_epoch: int = PER_EPOCH,
    ) -> None:
        self.module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        seeded_init(self.module, stream(0, "weights"))
        self.checkpoints, self.disturb, self.per_epoch = checkpoints, disturb, per_epoch
        self.meter = Meter(self.module)
        self.steps: list[int] = []
        self.events: list[dict[str, Any]] = []

    def loss(self, batch: Batch, generator: torch.Generator, spread: float | Tensor = 1.0) -> Tensor:
        """Return the cross-entropy under noise of standard deviation ``spread``."""
        assert batch.labels is not None
        x = batch.images.flatten(1) / 255
        x = x + spread * torch.randn(x.shape, generator=generator)
        return nn.functional.cross_entropy(self.module(x), batch.labels)

    def step(self, batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        self.steps.append(round(epoch * self.per_epoch))
        loss = self.disturb(self.steps[-1], self.loss(batch, generator))
        loss.backward()
        return loss.detach()

    def log(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    def run(self, schedule: Schedule = SCHEDULE, **options: Any) -> Self:
        given = {"name": "pretrain", "images": images(8 * self.per_epoch + 3), "seed": 0, **options}
        TrainingRun(
            self.module,
            self.step,
            schedule=schedule,
            meter=self.meter,
            checkpoints=self.checkpoints,
            log=self.log,
            **given,
        ).run()
        return self

    @property
    def bits(self) -> dict[str, bytes]:
        return bits(self.module)

    def logged(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name."""
        return [event for event in self.events if event["event"] == name]

    @property
    def epochs(self) -> list[tuple[int, float, int, int]]:
        """Number, loss, passes and forward passes of every logged epoch, by the last event of each."""
        told = {own["epoch"]: own for own in self.logged("epoch")}
        return [(number, own["loss"], own["passes"], own["forward_passes"]) for number, own in sorted(told.items())]


# --- the two stages on digits -----------------------------------------------------------------------------------------

STAGE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 32,  # three batches of 100 images
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
    "warmup_epochs": 1,
    "monitor_epochs": 1,
}
SIMCLR = PretrainConfig(
    **STAGE, projector_hidden=16, projector_out=8, views=Views(crop_scale=(0.5, 1.0), greyscale=0.0)
)
FINETUNE = FinetuneConfig(**STAGE, shift=1, flip=0.0)


def digits(rows: int = 100) -> ImageSet:
    return load_images("digits", "train")[slice(rows)]


def classifier() -> Classifier:
    encoder = SmallEncoder(width=4)
    built = Classifier(Normalize([0.3], [0.38]), encoder, linear_head(encoder.features, 10))
    seeded_init(built, stream(0, "weights"))
    return built


def pretrained(
    config: PretrainConfig = SIMCLR,
    images: ImageSet | None = None,
    view: View = random_view,
    start: Classifier | None = None,
    seed: int = 0,
    **settings: Any,
) -> Classifier:
    """Return ``start``, or the classifier of these tests, with its encoder pre-trained on ``images``, or on digits."""
    trained = start or classifier()
    source = Resident(digits().without_labels() if images is None else images, "cpu", rank(), world_size())
    with patch("rush.training.pretrain.random_view", view):
        pretrain(source, trained.encoder, trained.normalize, config, TrainingSettings(seed, Execution(), **settings))
    return trained


def finetuned(
    config: FinetuneConfig = FINETUNE,
    images: ImageSet | None = None,
    view: View = random_view,
    start: Classifier | None = None,
    seed: int = 0,
    noise: Gaussian = Gaussian(0.25),  # noqa: B008, a frozen value
    **settings: Any,
) -> Classifier:
    """Return ``start``, or the classifier of these tests, fine-tuned on ``images``, or on digits."""
    trained = start or classifier()
    source = digits() if images is None else images
    with patch("rush.training.finetune.random_view", view):
        finetune(source, trained, config, TrainingSettings(seed, Execution(), **settings), noise=noise)
    return trained
