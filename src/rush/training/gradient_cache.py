"""Gradients of a loss over a batch that does not fit into memory at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rush.errors import InputError


def cached_backward(
    encode: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    micro_batch: int,
    loss: Callable[..., Tensor],
    module: nn.Module,
) -> Tensor:
    """Return the detached ``loss(z_1, z_2, ...)`` of the whole batch, and add its gradients to ``.grad``.

    This is the gradient cache of Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup". First the projections z are computed without graph, micro-batch by micro-batch. Then come the loss on all of
    them and its gradient dz. Finally every micro-batch is computed once more with graph, and dz is sent back through
    it.

    Without BatchNorm this equals the plain batch. With it, it equals one graph in which every micro-batch is normalized
    by its own batch statistics. Running statistics change once per micro-batch, in the second pass. The first pass
    restores every buffer of ``module``. With several processes a loss that gathers (``nt_xent``) sees the rows of all
    of them, provided that each holds the same number of rows.

    Args:
        encode: rows (R, ...) -> z (R, D), the same for both passes. It draws nothing at random (noise and augmentation
            belong to the inputs) and opens autocast itself.
        inputs: tensors of the same number of rows B, e.g. two views. Rows of the same numbers go through ``encode``
            together, one input after the other, as in the plain step.
        micro_batch: most rows of each input at a time. If it does not divide B, the sizes of the pieces differ by at
            most one, so that no BatchNorm sees a small remainder.
        loss: one z (B, D) per input -> scalar. Its own parameters get gradients too.
        module: holds every buffer that ``encode`` writes.

    Raises:
        InputError: there are no inputs, their rows differ in number, or micro_batch < 1.

    Cost:
        One more forward pass than the plain step. Memory is that of one micro-batch and of the loss.
    """
    pieces = _micro_batches(inputs, micro_batch)
    with torch.no_grad(), _kept_buffers(module):
        parts = [encode(torch.cat(piece)).chunk(len(inputs)) for piece in pieces]
    # Within an outer autocast some versions of torch keep weights that were cast without graph, which would cut the
    # graph of the second pass.
    torch.clear_autocast_cache()
    projections = [torch.cat(rows).requires_grad_() for rows in zip(*parts, strict=True)]
    value = loss(*projections)
    value.backward()
    gradients = _micro_batches([torch.zeros_like(z) if z.grad is None else z.grad for z in projections], micro_batch)
    for piece, gradient in zip(pieces, gradients, strict=True):
        z = encode(torch.cat(piece))
        if z.requires_grad:  # not where every parameter is frozen
            z.backward(torch.cat(gradient))
    return value.detach()


def _micro_batches(tensors: Sequence[Tensor], micro_batch: int) -> list[tuple[Tensor, ...]]:
    """Return pieces of at most ``micro_batch`` rows, each as one part per tensor."""
    rows = {len(tensor) for tensor in tensors}
    if len(rows) != 1 or rows == {0}:
        raise InputError(f"need inputs of equally many rows (at least one), got {[len(tensor) for tensor in tensors]}")
    if micro_batch < 1:
        raise InputError(f"micro_batch must be >= 1, got {micro_batch!r}")
    pieces = -(-rows.pop() // micro_batch)
    return list(zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True))


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers after the context."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])
