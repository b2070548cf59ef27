"""Processes: rank and world size, and an all-gather through which gradients flow."""

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes, 1 where no process group is initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 where no process group is initialised."""
    return distributed.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; the backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (world * B, ...), differentiable; ``x`` itself with one process.

    The gradient of ``x`` is that of the *sum* of the ranks' losses. DistributedDataParallel then takes the mean over
    ranks, so a loss that is a mean over local rows ends as the mean over the global batch. Every rank must hold equally
    many rows.
    """
    return _Gather.apply(x) if world_size() > 1 else x
