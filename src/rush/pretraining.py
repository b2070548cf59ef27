"""Contrastive pre-training: an encoder from images alone; labels are never read."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rush.data.images import ImageSet
from rush.data.views import Views
from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.loop import Schedule, train
from rush.engine.precision import Execution
from rush.models.classifier import Normalize
from rush.models.heads import projector
from rush.objectives.contrastive import nt_xent
from rush.randomness import seeded_init, stream


def channel_statistics(images: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels, in [0, 1] units; 1 where a channel is constant."""
    mean, square = 0.0, 0.0
    for part in images.images.split(1000):
        pixels = part.double() / 255
        mean = mean + pixels.mean((2, 3)).sum(0) / len(images)
        square = square + (pixels**2).mean((2, 3)).sum(0) / len(images)
    assert isinstance(mean, Tensor)
    std = (square - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def pretrain(
    images: ImageSet,
    encoder: nn.Module,
    normalize: Normalize,
    *,
    views: Views,
    schedule: Schedule,
    temperature: float,
    projector_hidden: int,
    projector_out: int,
    seed: int,
    execution: Execution,
    checkpoint: TrainingCheckpoint | None = None,
    log: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Train ``encoder`` in place by SimCLR (Chen et al. 2020): two views of each image, NT-Xent between their
    projections.

    The projector is drawn from ``stream(seed, "pretrain", "projector")``, trained along and dropped. The encoder comes
    back in evaluation mode. Cost: two forward+backward passes per image and epoch.
    """
    features = encoder.features
    assert isinstance(features, int)
    head = seeded_init(projector(features, projector_hidden, projector_out), stream(seed, "pretrain", "projector"))
    module = execution.place(nn.ModuleList([encoder, head])).train()
    normalize = normalize.to(execution.device)
    pixels = images.images.to(execution.device)

    def step(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = pixels[indices.to(pixels.device)].float() / 255
        both = torch.cat([views(x, generator), views(x, generator)])
        with execution.autocast():
            z = head(encoder(execution.layout(normalize(both))))
        view_a, view_b = z.float().chunk(2)
        return nt_xent(view_a, view_b, temperature)

    train(
        module,
        step,
        name="pretrain",
        num_images=len(images),
        schedule=schedule,
        seed=seed,
        device=execution.device,
        checkpoint=checkpoint,
        log=log,
    )
    module.eval()
