"""Fine-tuning: a classifier on the encoder, trained under the noise it will be smoothed with, if it will be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rush.choices import FinetuneMode, TrainingCompile
from rush.data.batches import Batch
from rush.data.images import ImageSet
from rush.data.streaming import Stream, training_source
from rush.data.views import Views, unit_float
from rush.errors import ConfigError, DataError, InputError
from rush.models.classifier import Classifier
from rush.runtime.distributed import rank, world_size
from rush.runtime.execution import Execution, compiled
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.smoothing.noise import Gaussian
from rush.training.loop import Keeping, Schedule, train
from rush.training.meter import Meter
from rush.training.modes import evaluation_mode


@dataclass(frozen=True)
class Examples:
    """What an objective is given: the network, a batch and the noise of the smoothed classifier.

    logits: pixels -> logits float32, in training mode. evaluated: the same weights in evaluation mode, for attacks. x:
    (B, C, H, W) float32 in [0, 1], weakly augmented. y: (B,) int64. smoothing: None where the classifier will not be
    smoothed. epoch: epochs done so far.
    """

    logits: Callable[[Tensor], Tensor]
    evaluated: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    smoothing: Gaussian | None
    generator: torch.Generator
    epoch: float

    @property
    def noise(self) -> Gaussian:
        """The noise to train under. Raises: InputError where there is none."""
        if self.smoothing is None:
            raise InputError(
                "this objective trains under the noise of the smoothed classifier, and there is none: give noise, or "
                "an objective that draws none (standard, pgd-at, trades)"
            )
        return self.smoothing


Objective = Callable[[Examples], Tensor]


def finetune(
    images: ImageSet | Stream,
    classifier: Classifier,
    *,
    objective: Objective,
    noise: Gaussian | None,
    mode: FinetuneMode,
    views: Views,
    schedule: Schedule,
    seed: int,
    execution: Execution,
    head_epochs: int = 0,
    compile_mode: TrainingCompile = "none",
    keeping: Keeping = Keeping(),  # noqa: B008, a frozen value
    monitor: Callable[[int], dict[str, Any]] | None = None,
    monitor_epochs: int = 1,
    log: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Train ``classifier`` in place by ``objective``, the mean loss of a batch of ``Examples``.

    ``full`` trains every weight, ``linear`` the head alone on the encoder as it is, in evaluation mode,
    ``linear-then-full`` the head alone for ``head_epochs`` and then every weight (Kumar et al. 2022), along one
    learning-rate schedule. ``views`` is the weak augmentation before noise and attack. noise: None for a classifier
    that will not be smoothed. keeping, monitor, monitor_epochs, log: as in ``train``. The classifier comes back in
    evaluation mode. Cost: see the objectives; under ``linear`` all passes of the encoder are forward ones.
    compile_mode: as in ``pretrain``; "graph" not with ``linear-then-full``, whose step changes in between.
    Raises: DataError when the images carry no labels; InputError when ``objective`` needs noise and there is none;
    ConfigError for a step that cannot be captured.
    """
    if images.labels is None:
        raise DataError(f"{images.name} ({images.split}) has no labels; fine-tuning needs a labelled training split")
    if mode == "linear-then-full" and compile_mode == "graph":
        raise ConfigError(
            "a training that changes from the head alone to every weight cannot be captured as one CUDA graph; set "
            'execution.compile_training = "none", or finetune.mode to linear or full'
        )
    synchronised(execution.place(classifier)).train()
    if mode == "linear":
        classifier.encoder.requires_grad_(False)

    def trained(x: Tensor) -> Tensor:
        return execution.logits(classifier, x)

    def head_alone(x: Tensor) -> Tensor:
        with evaluation_mode(classifier.encoder):
            return execution.logits(classifier, x)

    def evaluated(x: Tensor) -> Tensor:
        with evaluation_mode(classifier):
            return execution.logits(classifier, x)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        assert batch.labels is not None
        frozen = mode == "linear" or (mode == "linear-then-full" and epoch < head_epochs)
        classifier.encoder.requires_grad_(not frozen)
        x = views(unit_float(batch.images), generator)
        logits = head_alone if frozen else trained
        loss = objective(Examples(logits, evaluated, x, batch.labels, noise, generator, epoch))
        loss.backward()
        return loss.detach()

    with compiled(classifier.encoder, compile_mode):
        train(
            classifier,
            step,
            name="finetune",
            images=training_source(images, execution.device, rank(), world_size()),
            schedule=schedule,
            seed=seed,
            device=execution.device,
            meter=Meter(classifier.encoder, device=execution.device),
            keeping=keeping,
            monitor=monitor,
            monitor_epochs=monitor_epochs,
            head_epochs=head_epochs if mode == "linear-then-full" else 0,
            log=log,
            captured=compile_mode == "graph",
        )
    desynchronised(classifier).requires_grad_(True).eval()
