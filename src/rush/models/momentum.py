"""The key network of momentum contrast and the queue of its keys."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.errors import ConfigError, InputError
from rush.runtime.distributed import gather


class KeyNetwork(nn.Module):
    """A slowly moving copy of a query network, with a queue of its latest keys (MoCo: He et al. 2020, section 3.2).

    ``network`` starts as a deep copy of ``query`` whose parameters take no gradients; ``follow`` moves them. Its
    BatchNorm layers keep running statistics of their own, gathered from the keys that it computes in training mode;
    ``follow`` leaves them alone. ``queue`` (queue_size, features) holds unit vectors, at first normal draws scaled to
    norm 1, and ``position`` the slot that is written next. Both are buffers, so that ``state_dict`` holds all that a
    resumed training needs.

    BatchNorm can give a key away: only a query's own key was normalized together with its batch, the queue was not. He
    et al. 2020 (section 3.3) therefore shuffle the keys over the processes' batches; see ``shuffled``.

    query: module (B, ...) -> (B, features). queue_size: a multiple of ``global_batch``, so that every batch of keys
    replaces a whole one. global_batch: keys of one step, over all processes. generator: on the CPU, draws the queue.
    Raises: ConfigError when the sizes do not fit.
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
        """Keys (B, features) of these inputs, without gradient."""
        return self.network(x)

    @torch.no_grad()
    def shuffled(self, x: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        """Keys (B, features) of these inputs, computed in ``groups`` random groups of B / groups rows.

        In training mode every group is normalized by its own batch statistics, so that the queries' statistics do not
        tell which key is whose (the shuffling of He et al. 2020, section 3.3, within one process); running statistics
        are updated once a group. generator: on the device of ``x``; draws one permutation.
        Raises: ConfigError when ``groups`` does not divide B.
        """
        if groups < 1 or len(x) % groups:
            raise ConfigError(f"{len(x)} rows do not part into {groups} groups of one size; use a divisor of {len(x)}")
        order = torch.randperm(len(x), generator=generator, device=x.device)
        keys = torch.cat([self.network(part) for part in x[order].chunk(groups)])
        return keys[order.argsort()]

    @torch.no_grad()
    def follow(self, query: nn.Module, momentum: float) -> None:
        """Move every parameter: key = momentum x key + (1 - momentum) x query (He et al. 2020, equation 2).

        momentum: in [0, 1]; 0.999 in the paper. Buffers stay as they are.
        Raises: InputError for another momentum, or a query network with other parameters.
        """
        if not 0 <= momentum <= 1:
            raise InputError(f"the key network's momentum must lie in [0, 1], got {momentum!r}")
        own: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(query.parameters())
        if [p.shape for p in own] != [p.shape for p in theirs]:
            raise InputError("the query network's parameters have other shapes than those that the key network copied")
        torch._foreach_lerp_(own, theirs, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put the keys of all processes, scaled to unit norm and in rank order, in place of the oldest ones.

        Without gradient and without waiting for the device. Every process ends with the same queue.
        keys: this process's (global_batch / world, features), equally many on every process.
        Raises: InputError when they are not as many.
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
