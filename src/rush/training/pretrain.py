"""Contrastive pre-training: an encoder from images alone; labels are never read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rush.choices import TrainingCompile
from rush.data.batches import Batch, TrainingImages
from rush.data.images import ImageSet
from rush.data.noisy_views import NoiseSchedule
from rush.data.views import Views
from rush.models.branches import NormBranch
from rush.models.classifier import Normalize
from rush.models.heads import projector
from rush.models.momentum import KeyNetwork
from rush.runtime.execution import Execution, compiled
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.training.adversarial_views import adversarial_views
from rush.training.contrastive import info_nce, nt_xent
from rush.training.gradient_cache import cached_backward
from rush.training.loop import Keeping, Schedule, Step, train
from rush.training.meter import Meter
from rush.training.modes import evaluation_mode

Pair = Callable[[Batch, float, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SimCLR:
    """Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations".

    micro_batch: None, or so many images at a time with cached gradients (``cached_backward``).
    Cost: 2 forward+backward passes an image and epoch; with ``micro_batch`` 2 forward passes more.
    """

    temperature: float = 0.5
    micro_batch: int | None = None


@dataclass(frozen=True)
class MoCo:
    """Version 2 of He et al. 2020 (Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning").

    queue: keys that are kept, a multiple of the batch size. key_momentum: of the key network's weights. shuffle_groups:
    a batch's keys are normalized in so many random groups, so that statistics do not tell which key is whose.
    Cost: 1 forward+backward and 1 forward pass an image and epoch.
    """

    temperature: float = 0.2
    queue: int = 4096
    key_momentum: float = 0.99
    shuffle_groups: int = 4


@dataclass(frozen=True)
class ACL:
    """Jiang et al. 2020, "Robust Pre-Training by Adversarial Contrastive Learning", dual stream: the mean of NT-Xent
    between two views and between two adversarial views, each with BatchNorm of its own. The encoder comes back with
    that of the adversarial views.

    epsilon, step_size: l-inf, in [0, 1] pixel units. Cost: 4 + 2 ``steps`` forward+backward passes an image and epoch.
    """

    temperature: float = 0.5
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 5


Method = SimCLR | MoCo | ACL


class ContrastiveNetwork(nn.Module):
    """Pixels (B, C, H, W) -> projections (B, D) float32, in the run's precision and layout."""

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
    images: TrainingImages,
    encoder: nn.Module,
    normalize: Normalize,
    *,
    method: Method,
    views: Views,
    schedule: Schedule,
    projector_hidden: int,
    projector_out: int,
    seed: int,
    execution: Execution,
    noise: NoiseSchedule = NoiseSchedule("none", (0.0, 0.0), 0.0),  # noqa: B008, a frozen value
    compile_mode: TrainingCompile = "none",
    keeping: Keeping = Keeping(),  # noqa: B008, a frozen value
    monitor: Callable[[int], dict[str, Any]] | None = None,
    monitor_epochs: int = 1,
    log: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Train ``encoder`` in place by ``method`` on two ``views`` of each image, with Gaussian ``noise`` on them or not.

    The projector is drawn from ``stream(seed, "pretrain", "projector")``, trained along and dropped. The encoder comes
    back in evaluation mode. With several processes BatchNorm is synchronised and losses span the global batch.
    compile_mode: torch.compile of the encoder in training (not of ACL's, whose BatchNorm changes between calls), or
    "graph": on CUDA the whole step is captured (``training.graphs``).
    keeping, monitor, monitor_epochs, log: as in ``train``.
    Cost: see the methods.
    """
    features = encoder.features
    assert isinstance(features, int)
    head = seeded_init(projector(features, projector_hidden, projector_out), stream(seed, "pretrain", "projector"))
    network = ContrastiveNetwork(encoder, head, normalize, execution)
    synchronised(execution.place(network)).train()

    def pair(batch: Batch, epoch: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        view_a, view_b = views(batch.images, generator), views(batch.images, generator)
        return noise.add(view_a, view_b, epoch, generator)

    module: nn.Module = network
    counted: list[nn.Module] = [network]
    if isinstance(method, SimCLR):
        step = _simclr_step(method, network, pair)
    elif isinstance(method, MoCo):
        keys = KeyNetwork(
            network,
            features=projector_out,
            queue_size=method.queue,
            global_batch=schedule.batch_size,
            generator=stream(seed, "pretrain", "queue"),
        )
        desynchronised(keys.network)
        module, counted = nn.ModuleDict({"query": network, "key": keys}), [network, keys.network]
        step = _moco_step(method, network, keys, pair)
    else:
        branch = NormBranch(network)
        module = nn.ModuleDict({"network": network, "branch": branch})
        step = _acl_step(method, network, branch, pair)
    with compiled(encoder, "none" if isinstance(method, ACL) else compile_mode):
        train(
            execution.place(module),
            step,
            name="pretrain",
            images=images,
            schedule=schedule,
            seed=seed,
            device=execution.device,
            meter=Meter(*counted, device=execution.device),
            keeping=keeping,
            monitor=monitor,
            monitor_epochs=monitor_epochs,
            log=log,
            captured=compile_mode == "graph",
        )
    if isinstance(method, ACL):
        branch.copy_into(network)
    desynchronised(network).eval()


def _simclr_step(method: SimCLR, network: nn.Module, pair: Pair) -> Step:
    def loss_of(view_a: Tensor, view_b: Tensor) -> Tensor:
        return nt_xent(view_a, view_b, method.temperature)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        both = pair(batch, epoch, generator)
        if method.micro_batch is not None:
            return cached_backward(network, both, method.micro_batch, loss_of, network)
        loss = loss_of(*network(torch.cat(both)).chunk(2))
        loss.backward()
        return loss.detach()

    return step


def _moco_step(method: MoCo, network: nn.Module, keys: KeyNetwork, pair: Pair) -> Step:
    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        view_a, view_b = pair(batch, epoch, generator)
        keys.follow(network, method.key_momentum)
        own_keys = keys.shuffled(view_b, method.shuffle_groups, generator)
        loss = info_nce(network(view_a), own_keys, keys.queue, method.temperature)
        loss.backward()
        keys.enqueue(own_keys)
        return loss.detach()

    return step


def _acl_step(method: ACL, network: nn.Module, branch: NormBranch, pair: Pair) -> Step:
    def adversarial(x: Tensor) -> Tensor:
        return branch.call(network, x)

    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        view_a, view_b = pair(batch, epoch, generator)
        with evaluation_mode(network):
            attacked = adversarial_views(
                adversarial,
                view_a,
                view_b,
                method.temperature,
                epsilon=method.epsilon,
                step_size=method.step_size,
                steps=method.steps,
                generator=generator,
            )
        clean_a, clean_b = network(torch.cat([view_a, view_b])).chunk(2)
        robust_a, robust_b = adversarial(torch.cat(attacked)).chunk(2)
        clean = nt_xent(clean_a, clean_b, method.temperature)
        loss = (clean + nt_xent(robust_a, robust_b, method.temperature)) / 2
        loss.backward()
        return loss.detach()

    return step
