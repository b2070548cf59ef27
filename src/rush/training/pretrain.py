"""Contrastive pre-training of an encoder from images alone. Labels are never read."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rush.data.batches import Batch, TrainingImages
from rush.data.images import ImageSet
from rush.data.noisy_views import add_noise
from rush.data.views import random_view
from rush.models.branches import NormBranch
from rush.models.classifier import Normalize
from rush.models.heads import projector
from rush.models.momentum import KeyNetwork
from rush.recipe.schema import PretrainConfig
from rush.runtime.execution import Execution, compiled
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.training.adversarial_views import adversarial_views
from rush.training.contrastive import info_nce, nt_xent
from rush.training.gradient_cache import cached_backward
from rush.training.loop import Step, TrainingSettings
from rush.training.modes import evaluation_mode

Pair = Callable[[Batch, float, torch.Generator], tuple[Tensor, Tensor]]


class ContrastiveNetwork(nn.Module):
    """Network from pixels (B, C, H, W) to projections (B, D) float32, in the run's precision and layout."""

    def __init__(self, encoder: nn.Module, head: nn.Module, normalize: Normalize, execution: Execution) -> None:
        super().__init__()
        self.encoder, self.head, self.normalize = encoder, head, normalize
        self._layout, self._autocast = execution.layout, execution.autocast

    def forward(self, x: Tensor) -> Tensor:
        with self._autocast():
            z = self.head(self.encoder(self._layout(self.normalize(x))))
        assert isinstance(z, Tensor)
        return z.float()


def channel_statistics(images: ImageSet) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, in [0, 1] units. The latter is 1 for a constant channel."""
    mean, square = 0.0, 0.0
    for part in images.images.split(1000):
        pixels = part.double() / 255
        mean = mean + pixels.mean((2, 3)).sum(0) / len(images)
        square = square + (pixels**2).mean((2, 3)).sum(0) / len(images)
    assert isinstance(mean, Tensor)
    std = (square - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def pretrain(
    images: TrainingImages,
    encoder: nn.Module,
    normalize: Normalize,
    config: PretrainConfig,
    settings: TrainingSettings,
) -> None:
    """Train ``encoder`` in place on two noisy or plain views of each image, by the objective of ``config``.

    The projector is drawn from ``stream(seed, "pretrain", "projector")``, trained with the encoder and dropped
    afterwards. The encoder is returned in evaluation mode. After ACL it has the BatchNorm of the adversarial views.
    With several processes BatchNorm is synchronised and losses span the global batch.

    Args:
        images: the rows of this process.
        encoder: normalized pixels (B, C, H, W) -> representations (B, ``encoder.features``).
        normalize: the first layer.
        config: objective, views and schedule.
        settings: conditions of the run. The encoder of ACL is not compiled, since its BatchNorm changes between calls.

    Raises:
        RushError: as ``TrainingRun.run``.

    Cost:
        Passes per image and epoch. SimCLR: 2 forward and backward, with ``micro_batch`` 2 more forward. MoCo: 1 forward
        and backward, 1 forward. ACL: 4 + 2 ``adversary.steps`` forward and backward.
    """
    features, seed, execution = encoder.features, settings.seed, settings.execution
    assert isinstance(features, int)
    head = projector(features, config.projector_hidden, config.projector_out)
    network = ContrastiveNetwork(
        encoder, seeded_init(head, stream(seed, "pretrain", "projector")), normalize, execution
    )
    synchronised(execution.place(network)).train()

    def pair(batch: Batch, epoch: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        view_a, view_b = (random_view(batch.images, config.views, generator) for _ in range(2))
        return add_noise(view_a, view_b, config.noise, epoch, generator)

    module: nn.Module = network
    counted: list[nn.Module] = [network]
    if config.objective == "simclr":
        step = _simclr_step(config, network, pair)
    elif config.objective == "moco":
        keys = KeyNetwork(
            network,
            features=config.projector_out,
            queue_size=config.queue,
            global_batch=config.batch_size,
            generator=stream(seed, "pretrain", "queue"),
        )
        desynchronised(keys.network)
        module, counted = nn.ModuleDict({"query": network, "key": keys}), [network, keys.network]
        step = _moco_step(config, network, keys, pair)
    else:
        branch = NormBranch(network)
        module = nn.ModuleDict({"network": network, "branch": branch})
        step = _acl_step(config, network, branch, pair)
    with compiled(encoder, "none" if config.objective == "acl" else settings.compile_mode):
        settings.training(execution.place(module), step, "pretrain", images, config, counted).run()
    if config.objective == "acl":
        branch.copy_into(network)
    desynchronised(network).eval()


def _simclr_step(config: PretrainConfig, network: nn.Module, pair: Pair) -> Step:
    def loss_of(view_a: Tensor, view_b: Tensor) -> Tensor:
        return nt_xent(view_a, view_b, config.temperature)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        both = pair(batch, epoch, generator)
        if config.micro_batch is not None:
            return cached_backward(network, both, config.micro_batch, loss_of, network)
        loss = loss_of(*network(torch.cat(both)).chunk(2))
        loss.backward()
        return loss.detach()

    return step


def _moco_step(config: PretrainConfig, network: nn.Module, keys: KeyNetwork, pair: Pair) -> Step:
    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        view_a, view_b = pair(batch, epoch, generator)
        keys.follow(network, config.key_momentum)
        new_keys = keys.shuffled(view_b, config.shuffle_groups, generator)
        loss = info_nce(network(view_a), new_keys, keys.queue, config.temperature)
        loss.backward()
        keys.enqueue(new_keys)
        return loss.detach()

    return step


def _acl_step(config: PretrainConfig, network: nn.Module, branch: NormBranch, pair: Pair) -> Step:
    def adversarial(x: Tensor) -> Tensor:
        return branch.call(network, x)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        view_a, view_b = pair(batch, epoch, generator)
        with evaluation_mode(network):
            attacked = adversarial_views(
                adversarial,
                view_a,
                view_b,
                config.temperature,
                **config.adversary.budget,
                generator=generator,
            )
        clean_a, clean_b = network(torch.cat([view_a, view_b])).chunk(2)
        robust_a, robust_b = adversarial(torch.cat(attacked)).chunk(2)
        clean = nt_xent(clean_a, clean_b, config.temperature)
        loss = (clean + nt_xent(robust_a, robust_b, config.temperature)) / 2
        loss.backward()
        return loss.detach()

    return step
