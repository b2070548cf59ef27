"""Collectives over processes: rank, world size, turns, a differentiable all-gather and averaged gradients."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from rush.errors import InputError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
_MESSAGE_BYTES = 64 * 2**20


def world_size() -> int:
    """Return the number of processes, 1 where no process group is initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 where no process group is initialised."""
    return distributed.get_rank() if world_size() > 1 else 0


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes started by torchrun in one process group within the context, if torchrun started any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Certification and training may run for hours between two collectives.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield
    except SystemExit as end:
        if not end.code:
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()  # not after an error: it would wait for the other processes


def barrier() -> None:
    """Wait until every process has reached this call."""
    if world_size() > 1:
        distributed.barrier()


def in_turn(work: Callable[[], T]) -> T:
    """Call ``work`` in one process at a time, in rank order, and return this process's result.

    For files that several processes read and write.
    """
    for turn in range(world_size()):
        if turn == rank():
            result = work()
        barrier()
    return result


class _Gather(torch.autograd.Function):
    """Concatenation over ranks, whose backward pass sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]  # W tensors (B, ...)
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # A copy: autograd may hand the same tensor to another branch of the graph, which must not see the sum.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, differentiably, or ``x`` itself with one process.

    The gradient of ``x`` is that of the *sum* of the ranks' losses. ``average_gradients`` then takes the mean over
    ranks, so a loss that is a mean over local rows becomes the mean over the global batch.

    Args:
        x: this rank's rows (B, ...), with the same B on every rank.

    Returns:
        (world_size * B, ...).

    Cost:
        One all-gather forward, one all-reduce backward.
    """
    return _Gather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], extras: Tensor) -> Tensor:
    """Replace every gradient by its mean over ranks, in place, and return the mean of ``extras``.

    Each dtype is averaged as it is (float64 stays float64), in messages of about 64 MB, and every rank ends with the
    same bits. Every rank must call it. With one process nothing changes and ``extras`` itself is returned.

    DistributedDataParallel would hook this into one forward and one backward pass per step. A step of this library may
    have several of each (two views, adversarial inner passes, gradient caching, which calls backward once per
    micro-batch). All of them would trigger reductions or need to be excluded by hand, and the extras would need a
    message of their own. The price is that communication does not overlap with the backward pass.

    Args:
        parameters: tensors whose ``.grad`` is averaged. Those without a gradient are skipped, and must be the same
            ones on all ranks.
        extras: (E,), other values that the ranks must agree on, e.g. a loss or a stop flag. They share the gradients'
            message where dtype and device match.

    Returns:
        The mean of ``extras`` over ranks, (E,).

    Raises:
        InputError: ``extras`` is not one-dimensional.
    """
    if extras.ndim != 1:
        raise InputError(f"extras must be one-dimensional, got shape {tuple(extras.shape)}; stack numbers to (E,)")
    if world_size() == 1:
        return extras
    mean = extras.detach().clone()
    _exchange([*(parameter.grad for parameter in parameters if parameter.grad is not None), mean], _average)
    return mean


@torch.no_grad()
def broadcast_module(module: nn.Module) -> nn.Module:
    """Overwrite the parameters and buffers of ``module`` by those of rank 0, in place, and return it.

    Every rank must call it, with the same architecture. With one process nothing changes.
    """
    if world_size() > 1:
        _exchange([*module.parameters(), *module.buffers()], lambda message: distributed.broadcast(message, src=0))
    return module


def _average(message: Tensor) -> None:
    distributed.all_reduce(message)
    message /= world_size()


def _exchange(tensors: list[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Concatenate ``tensors`` into few flat messages, ``communicate`` each in place, and copy the results back."""
    for bucket in _buckets(tensors):
        # Elements travel in logical order: memory formats may differ between ranks.
        message = torch.cat([tensor.reshape(-1) for tensor in bucket])
        communicate(message)
        for tensor, piece in zip(bucket, message.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group ``tensors`` by dtype and device into buckets of at most one message, or of one larger tensor."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype, tensor.device].append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > _MESSAGE_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def gather_objects(value: T) -> list[T]:
    """Return the ``value`` of every process in rank order."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]
