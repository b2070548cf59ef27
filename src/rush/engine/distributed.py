"""Processes: rank and world size, taking turns, and an all-gather through which gradients flow."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

_PATIENCE = timedelta(days=7)


def world_size() -> int:
    """Number of processes, 1 where no process group is initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 where no process group is initialised."""
    return distributed.get_rank() if world_size() > 1 else 0


@contextmanager
def joined_processes() -> Iterator[None]:
    """Within the context the processes that torchrun started know of each other; without torchrun nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Certification and training leave the processes alone for hours between two meetings.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    yield
    distributed.destroy_process_group()  # not after an error: the others would be waited for


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        distributed.barrier()


def in_turn(work: Callable[[], T]) -> T:
    """``work()`` in one process after the other, in rank order: for files that several of them read and write."""
    for turn in range(world_size()):
        if turn == rank():
            result = work()
        barrier()
    return result


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


def gather_objects(value: T) -> list[T]:
    """``value`` of every process in rank order; ``[value]`` with one process."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]
