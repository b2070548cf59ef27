"""Fine-tuning of a classifier on the encoder, under the noise it will be smoothed with, if any."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from rush.choices import FinetuneObjective
from rush.data.batches import Batch, Resident, TrainingImages
from rush.data.images import ImageSet
from rush.data.streaming import Stream, training_source
from rush.data.views import random_view, unit_float
from rush.errors import ConfigError, DataError
from rush.models.classifier import Classifier
from rush.recipe.schema import FinetuneConfig
from rush.runtime.distributed import rank, world_size
from rush.runtime.execution import compiled
from rush.runtime.schedules import scheduled
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.smoothing.noise import Noise
from rush.training.loop import TrainingSettings
from rush.training.modes import evaluation_mode
from rush.training.supervised import Examples, cat_rs, consistency, gaussian, pgd_at, smoothadv, standard, trades

Objective = Callable[[Examples], Tensor]


def objective_of(config: FinetuneConfig) -> Objective:
    """Return the objective that ``config`` names, with its options."""
    budget, adv = config.adversary.budget, config.smoothadv

    def warmed_up_smoothadv(examples: Examples) -> Tensor:
        epsilon = scheduled(adv.epsilon_at, examples.epoch)
        return smoothadv(examples, draws=adv.draws, epsilon=epsilon, steps=adv.steps)

    objectives: dict[FinetuneObjective, Objective] = {
        "standard": standard,
        "gaussian": gaussian,
        "consistency": partial(consistency, **dict(config.consistency)),
        "smoothadv": warmed_up_smoothadv,
        "cat-rs": partial(cat_rs, **dict(config.cat_rs)),
        "pgd-at": partial(pgd_at, **budget),
        "trades": partial(trades, **budget, beta=config.trades.beta),
    }
    return objectives[config.objective]


def finetune(
    images: ImageSet | Stream,
    classifier: Classifier,
    config: FinetuneConfig,
    settings: TrainingSettings,
    *,
    noise: Noise | None,
    targets: Tensor | None = None,
    name: str = "finetune",
) -> None:
    """Train ``classifier`` in place by the objective of ``config``, and leave it in evaluation mode.

    Every mode follows one learning-rate schedule. A head trained alone sees the encoder in evaluation mode.

    Args:
        images: labelled images, in memory or streamed, the same in all processes.
        classifier: pixels in [0, 1] -> logits.
        config: objective, mode and schedule.
        settings: conditions of the run. The compile mode "graph" excludes the mode ``linear-then-full``, whose step
            changes in between.
        noise: None for a classifier that will not be smoothed.
        targets: soft labels to train on in place of the labels of the images, which are then in memory: float32 (N, K),
            a probability of each class, whose sum is the weight of the image.
        name: name of the training stage, which names its random streams.

    Raises:
        DataError: the images have no labels.
        InputError: the objective needs noise and ``noise`` is None.
        ConfigError: the step cannot be captured.
        RushError: as ``TrainingRun.run``.

    Cost:
        That of the objective. With the mode ``linear`` all passes of the encoder are forward passes.
    """
    mode, views, objective = config.mode, config.views, objective_of(config)
    execution, compile_mode = settings.execution, settings.compile_mode
    head_epochs = config.head_epochs if mode == "linear-then-full" else 0
    if images.labels is None and targets is None:
        raise DataError(f"{images.name} ({images.split}) has no labels; fine-tuning needs a labelled training split")
    if mode == "linear-then-full" and compile_mode == "graph":
        raise ConfigError(
            "a training stage that changes from the head alone to every weight cannot be captured as one CUDA graph; "
            'set execution.compile_training = "none", or finetune.mode to linear or full'
        )
    synchronised(execution.place(classifier)).train()
    if mode == "linear":
        classifier.encoder.requires_grad_(False)

    def logits(x: Tensor, evaluated: nn.Module | None = None) -> Tensor:
        """Return the logits of images, with the part ``evaluated`` of the classifier in evaluation mode."""
        with nullcontext() if evaluated is None else evaluation_mode(evaluated):
            return execution.logits(classifier, x)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        assert batch.labels is not None
        frozen = mode == "linear" or (mode == "linear-then-full" and epoch < head_epochs)
        classifier.encoder.requires_grad_(not frozen)
        x = random_view(unit_float(batch.images), views, generator)
        trained = partial(logits, evaluated=classifier.encoder if frozen else None)
        attacked = partial(logits, evaluated=classifier)
        loss = objective(Examples(trained, attacked, x, batch.labels, noise, generator, epoch))
        loss.backward()
        return loss.detach()

    with compiled(classifier.encoder, compile_mode):
        source = _source(images, targets, execution.device)
        counted = [classifier.encoder]
        settings.training(classifier, step, name, source, config, counted, head_epochs).run()
    desynchronised(classifier).requires_grad_(True).eval()


def _source(images: ImageSet | Stream, targets: Tensor | None, device: str) -> TrainingImages:
    if targets is None:
        return training_source(images, device, rank(), world_size())
    assert isinstance(images, ImageSet)
    return Resident(images, device, rank(), world_size(), targets)
