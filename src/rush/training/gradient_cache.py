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
    """Return the detached ``loss(z_1, z_2, ...)`` of the whole batch; add its gradients to the parameters' ``.grad``.

    Gradient cache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"):
    the projections z without graph, micro-batch by micro-batch; the loss on all of them and its gradient dz; then
    every micro-batch once more with graph, and dz sent back through it. Memory is that of one micro-batch and of the
    loss; cost is one forward pass more than the plain step.

    Without BatchNorm this equals the plain batch. With it, it equals one graph in which every micro-batch is normalized
    by its own batch statistics; running statistics move once a micro-batch, in the second pass: the first leaves every
    buffer of ``module`` as it was. With several processes a loss that gathers (``nt_xent``) sees all of them, provided
    that each holds equally many rows.

    encode: rows (R, ...) -> z (R, D), the same for both passes: it draws nothing at random (noise and augmentation
    belong to the inputs) and opens autocast itself. inputs: tensors of equally many rows B, e.g. two views; the rows of
    all of them with the same numbers go through ``encode`` together, one input after the other, as in the plain step.
    micro_batch: most rows of each input at a time; B that does not divide is cut into pieces whose sizes differ by one
    at most, so that no BatchNorm sees a small rest. loss: one z (B, D) per input -> scalar; parameters of its own get
    their gradients too. module: holds every buffer that ``encode`` writes.
    Raises: InputError when there are no inputs, their rows differ in number or micro_batch < 1.
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
    gradients = _micro_batches([_gradient(z) for z in projections], micro_batch)
    for piece, gradient in zip(pieces, gradients, strict=True):
        z = encode(torch.cat(piece))
        if z.requires_grad:  # not where every parameter is frozen
            z.backward(torch.cat(gradient))
    return value.detach()


def _micro_batches(tensors: Sequence[Tensor], micro_batch: int) -> list[tuple[Tensor, ...]]:
    """Yield the rows of all tensors in pieces of at most ``micro_batch``: for every piece one part of each tensor."""
    rows = {len(tensor) for tensor in tensors}
    if len(rows) != 1 or rows == {0}:
        raise InputError(f"need inputs of equally many rows (at least one), got {[len(tensor) for tensor in tensors]}")
    if micro_batch < 1:
        raise InputError(f"micro_batch must be >= 1, got {micro_batch!r}")
    pieces = -(-rows.pop() // micro_batch)
    return list(zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True))


def _gradient(z: Tensor) -> Tensor:
    return torch.zeros_like(z) if z.grad is None else z.grad


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers after the context."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])
