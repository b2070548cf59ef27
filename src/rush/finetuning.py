"""Fine-tuning: a classifier on the encoder, trained under the noise it will be smoothed with."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.data.images import ImageSet
from rush.data.views import Views
from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.loop import Schedule, train
from rush.engine.precision import Execution
from rush.errors import DataError
from rush.models.classifier import Classifier
from rush.noise import Gaussian
from rush.options import FinetuneMode


def finetune(
    images: ImageSet,
    classifier: Classifier,
    *,
    noise: Gaussian,
    mode: FinetuneMode,
    views: Views,
    schedule: Schedule,
    seed: int,
    execution: Execution,
    checkpoint: TrainingCheckpoint | None = None,
    log: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Train ``classifier`` in place by cross-entropy on noisy images (Cohen et al. 2019, section 3.3).

    ``full`` trains every weight, ``linear`` the head alone on the encoder as it is, in evaluation mode. ``views`` is
    the weak augmentation before the noise. The classifier comes back in evaluation mode. Cost: one forward+backward
    pass per image and epoch.
    Raises: DataError when the images carry no labels.
    """
    if images.labels is None:
        raise DataError(f"{images.name} ({images.split}) has no labels; fine-tuning needs a labelled training split")
    execution.place(classifier).train()
    if mode == "linear":
        classifier.encoder.eval().requires_grad_(False)
    pixels, labels = images.images.to(execution.device), images.labels.to(execution.device)

    def step(indices: Tensor, generator: torch.Generator) -> Tensor:
        index = indices.to(pixels.device)
        x = views(pixels[index].float() / 255, generator)
        x = x + noise.sample(x.shape, generator)
        return F.cross_entropy(execution.logits(classifier, x), labels[index])

    train(
        classifier,
        step,
        name="finetune",
        num_images=len(images),
        schedule=schedule,
        seed=seed,
        device=execution.device,
        checkpoint=checkpoint,
        log=log,
    )
    classifier.requires_grad_(True).eval()
