"""Key network and queue of keys for momentum contrast (He et al. 2020)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.errors import ConfigError, InputError
from rush.runtime.distributed import gather


class KeyNetwork(nn.Module):
    """A slowly moving copy of a query network, with a queue of its latest keys (MoCo: He et al. 2020, section 3.2).

    ``network`` starts as a deep copy of ``query`` whose parameters take no gradients but are moved by ``follow``. Its
    BatchNorm layers keep separate running statistics, of the keys that it computes in training mode. ``follow`` does
    not change them. ``queue`` (queue_size, features) holds unit vectors, at first normal draws scaled to norm 1, and
    ``position`` is the slot that is written next. Both are buffers, so that ``state_dict`` is all that a resumed run
    needs.

    BatchNorm can reveal the positive key: unlike the queue, it was normalized together with the batch of its query. He
    et al. 2020 (section 3.3) therefore shuffle the keys over the processes' batches (see ``shuffled``).

    Args:
        query: module (B, ...) -> (B, features).
        features: length of a key.
        queue_size: a multiple of ``global_batch``, so that every batch of keys replaces a whole one.
        global_batch: number of keys per step, over all processes.
        generator: generator on the CPU that draws the queue.

    Raises:
        ConfigError: ``queue_size`` is not a multiple of ``global_batch``, or one of them is below 1.
    """

    queue: Tensor
    position: Tensor

    def __init__(
        self, query: nn.Module, *, features: int, queue_size: int, global_batch: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if global_batch < 1 or queue_size < 1 or queue_size % global_batch:
            raise ConfigError(
                f"the queue must hold a multiple of the global batch ({global_batch} images), got {queue_size}; "
                f"use for example {max(1, queue_size // max(1, global_batch)) * global_batch}"
            )
        self.network = copy.deepcopy(query).requires_grad_(False)
        self.global_batch = global_batch
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, features, generator=generator), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the keys (B, features) of inputs ``x`` (B, ...), without gradient."""
        return self.network(x)

    @torch.no_grad()
    def shuffled(self, x: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        """Return the keys (B, features) of inputs ``x`` (B, ...), computed in random groups of B / groups rows.

        In training mode every group is normalized by its own batch statistics, so that the statistics do not reveal
        which key belongs to a query (the shuffling of He et al. 2020, section 3.3, within one process). Running
        statistics are updated once per group.

        Args:
            x: inputs (B, ...).
            groups: number of groups, a divisor of B.
            generator: generator on the device of ``x`` that draws one permutation.

        Raises:
            ConfigError: ``groups`` does not divide B.
        """
        if groups < 1 or len(x) % groups:
            raise ConfigError(f"{len(x)} rows cannot be split into {groups} equal groups; use a divisor of {len(x)}")
        order = torch.randperm(len(x), generator=generator, device=x.device)
        keys = torch.cat([self.network(part) for part in x[order].chunk(groups)])
        return keys[order.argsort()]

    @torch.no_grad()
    def follow(self, query: nn.Module, momentum: float) -> None:
        """Move every parameter: key = momentum x key + (1 - momentum) x query (He et al. 2020, equation 2).

        Buffers do not change.

        Args:
            query: the query network.
            momentum: momentum in [0, 1] (0.999 in the paper).

        Raises:
            InputError: ``momentum`` is out of range, or the parameters of ``query`` have different shapes.
        """
        if not 0 <= momentum <= 1:
            raise InputError(f"the key network's momentum must lie in [0, 1], got {momentum!r}")
        key_parameters: list[Tensor] = list(self.network.parameters())
        query_parameters: list[Tensor] = list(query.parameters())
        if [p.shape for p in key_parameters] != [p.shape for p in query_parameters]:
            raise InputError("the query network's parameters differ in shape from those that the key network copied")
        torch._foreach_lerp_(key_parameters, query_parameters, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by those of all processes, scaled to unit norm and in rank order.

        No gradient is kept and nothing waits for the device. Every process ends with the same queue.

        Args:
            keys: keys of this process, (global_batch / world_size, features).

        Raises:
            InputError: The keys of all processes are not (global_batch, features).
        """
        rows = gather(F.normalize(keys.detach().to(self.queue.dtype), dim=1))
        if rows.shape != (self.global_batch, self.queue.shape[1]):
            raise InputError(
                f"need {self.global_batch} keys of {self.queue.shape[1]} features over all processes, got "
                f"{tuple(rows.shape)}"
            )
        slots = self.position + torch.arange(len(rows), device=rows.device)
        self.queue.index_copy_(0, slots, rows)
        self.position.add_(len(rows)).remainder_(len(self.queue))
