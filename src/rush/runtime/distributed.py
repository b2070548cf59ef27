"""Processes: rank and world size, taking turns, an all-gather through which gradients flow, one mean of gradients."""

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
    try:
        yield
    except SystemExit as end:
        if not end.code:
            distributed.destroy_process_group()
        raise
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
        # A copy: autograd may hand the same tensor to another branch of the graph, which must not see the sum.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (world * B, ...), differentiable; ``x`` itself with one process.

    The gradient of ``x`` is that of the *sum* of the ranks' losses. ``average_gradients`` then takes the mean over
    ranks, so a loss that is a mean over local rows ends as the mean over the global batch. Every rank must hold equally
    many rows.
    """
    return _Gather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], extras: Tensor) -> Tensor:
    """Mean over ranks of ``extras``; every ``.grad`` of ``parameters`` becomes its mean over ranks, in place.

    extras: (E,), what else the ranks must agree on: a loss, a stop flag. It travels in the gradients' message where it
    has their dtype and device. Each dtype is averaged as it is (float64 stays float64), in messages of about 64 MB, and
    every rank ends with the same bits. Parameters without gradient are skipped and keep none; they must be the same
    ones on all ranks. With one process nothing is done and ``extras`` itself comes back. Every rank must call it.

    DistributedDataParallel would hook this into one forward and one backward pass a step. Here a step may have several
    of each (two views, adversarial inner passes, gradient caching, which calls backward once per micro-batch), and all
    of them would set off reductions or need to be excluded by hand; and the extras would need a message of their own.
    The cost: communication does not overlap with the backward pass.

    Raises: InputError when ``extras`` is not one-dimensional.
    """
    if extras.ndim != 1:
        raise InputError(f"extras must be one-dimensional, got shape {tuple(extras.shape)}; stack numbers to (E,)")
    if world_size() == 1:
        return extras
    mean = extras.detach().clone()
    _exchange([*(own.grad for own in parameters if own.grad is not None), mean], _average)
    return mean


@torch.no_grad()
def broadcast_module(module: nn.Module) -> nn.Module:
    """``module`` itself, its parameters and buffers overwritten in place by those of rank 0.

    Every rank must call it, with the same architecture. With one process nothing is done.
    """
    if world_size() > 1:
        _exchange([*module.parameters(), *module.buffers()], lambda message: distributed.broadcast(message, src=0))
    return module


def _average(message: Tensor) -> None:
    distributed.all_reduce(message)
    message /= world_size()


def _exchange(tensors: list[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Lay ``tensors`` end to end in few flat messages, ``communicate`` each in place, and write the outcome back."""
    for bucket in _buckets(tensors):
        # Elements travel in logical order: memory formats may differ between ranks.
        message = torch.cat([tensor.reshape(-1) for tensor in bucket])
        communicate(message)
        for tensor, piece in zip(bucket, message.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in groups of one dtype and device, none above the size of a message unless it is a single tensor."""
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
    """``value`` of every process in rank order; ``[value]`` with one process."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]
