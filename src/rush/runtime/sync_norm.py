"""BatchNorm over the global batch of several processes, on any device (torch's SyncBatchNorm refuses the CPU).

With n_r values per channel on rank r, local mean m_r and biased variance v_r, the moments of the global batch are
    m = sum_r n_r m_r / n,    v = sum_r n_r (v_r + (m_r - m)^2) / n,    n = sum_r n_r
(Chan, Golub and LeVeque 1983, the pairwise update of moments). ``distributed.gather`` gathers them, with one
collective per layer and direction. Its gradient is that of the *sum* of the ranks' losses: once gradients are averaged
over ranks, training on W shards equals training on the whole batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from rush.errors import InputError, ModelError
from rush.runtime.distributed import gather, world_size


def synchronised(module: nn.Module) -> nn.Module:
    """Make the BatchNorm layers of ``module`` normalize by the global batch, in place, and return it.

    Only training mode changes, and evaluation mode needs no communication. The layers keep their parameters, buffers,
    hooks and names, and their type becomes a subclass of the former one. Output, gradients and running statistics (the
    same bits on all ranks) are those of one process on the whole batch, up to rounding. Moments are computed in
    float32, or in float64 for float64 inputs. The moments are correct also when ranks hold different numbers of rows,
    but a mean over ranks of local mean losses is then not the global mean.

    Every rank must run the same training-mode forward and backward passes in the same order, or all ranks deadlock.
    With one process nothing changes. Calling it again changes nothing.

    Raises:
        ModelError: A layer is a BatchNorm of a type with its own forward. The message names the layer.
    """
    if world_size() == 1:
        return module
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Synchronised | nn.SyncBatchNorm):
            if type(layer) not in _COUNTERPARTS:
                raise ModelError(
                    f"layer {name!r} is a {type(layer).__name__}, whose statistics cannot be shared between processes; "
                    f"use one of {', '.join(f'nn.{plain.__name__}' for plain in _COUNTERPARTS)}, or one process"
                )
            layer.__class__ = _COUNTERPARTS[type(layer)]
            layer.__module__ = nn.__name__  # torch.fx traces layers of torch.nn as one node, which can be folded
    return module


def desynchronised(module: nn.Module) -> nn.Module:
    """Undo ``synchronised`` in place: give the BatchNorm layers their plain types, with the same tensors."""
    plain_types: dict[type[nn.Module], type[nn.Module]] = {synced: plain for plain, synced in _COUNTERPARTS.items()}
    for layer in module.modules():
        if type(layer) in plain_types:
            layer.__class__ = plain_types[type(layer)]
            del layer.__module__
    return module


class _Synchronised(_BatchNorm):
    """A BatchNorm whose training mode uses the moments of the global batch."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if input.numel() == 0:
            raise InputError(f"a batch of shape {tuple(input.shape)} has no mean; give every process at least one row")
        mean, var, count = _combined(gather(_Moments.apply(input)))  # (W, 3, C) gathered, then each (C,)
        if self.track_running_stats:
            self._update(mean.detach(), var.detach() * count / (count - 1))
        weight, bias = (None if value is None else value.to(mean.dtype) for value in (self.weight, self.bias))
        return _Normalize.apply(input, mean, var, weight, bias, self.eps)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Update the running statistics in place, as torch's BatchNorm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.mul_(1 - share).add_(mean * share)
        self.running_var.mul_(1 - share).add_(unbiased_var * share)


class _Synchronised1d(_Synchronised, nn.BatchNorm1d):
    pass


class _Synchronised2d(_Synchronised, nn.BatchNorm2d):
    pass


class _Synchronised3d(_Synchronised, nn.BatchNorm3d):
    pass


_COUNTERPARTS: dict[type[_BatchNorm], type[_Synchronised]] = {
    nn.BatchNorm1d: _Synchronised1d,
    nn.BatchNorm2d: _Synchronised2d,
    nn.BatchNorm3d: _Synchronised3d,
}


def _combined(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and count, each (C,), of the union of ``parts`` (W, 3, C) of the same three.

    The counts travel in the same message, so that unequal shards are weighted correctly without a host synchronisation.
    """
    means, variances, counts = parts.unbind(1)
    counts = counts.detach()
    total = counts.sum(0)
    shares = counts / total
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0), total


class _Moments(torch.autograd.Function):
    """Mean, biased variance and count per channel, (1, 3, C), of x (B, C, ...), in float32 or in float64 like x.

    A separate autograd function, so that the backward pass keeps a bfloat16 ``x`` and not its float32 copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        unused = torch.ones(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # On the CPU, BatchNorm's own reduction is many times as fast as var_mean, and makes no float32 copy of x. It
        # computes in the dtype of the running statistics that it is given.
        mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        ctx.count = x.numel() // x.shape[1]
        ctx.save_for_backward(x, mean)
        return torch.stack([mean, var, torch.full_like(mean, ctx.count)])[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """dm/dx = 1/n and dv/dx = 2 (x - m) / n, so dx = slope x + start: BatchNorm's pass with mean 0, variance 1."""
        x, mean = ctx.saved_tensors
        of_mean, of_var, _ = gradients[0][0] / ctx.count
        slope, start = 2 * of_var, of_mean - 2 * of_var * mean
        zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
        # Call the operator: nn.functional.batch_norm of torch 2.11 refuses eps = 0 also outside training.
        return torch.batch_norm(x, slope, start, zeros, ones, False, 0.0, 0.0, torch.backends.cudnn.enabled)


class _Normalize(torch.autograd.Function):
    """weight (x - mean) / sqrt(var + eps) + bias by torch's own kernels, with gradients also of mean and var (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients: with s = 1 / sqrt(var + eps), dy/dmean = -w s and dy/dvar = -w s^2 xhat / 2.

        The sums over rows of dy and of dy xhat are the gradients of bias and weight.
        """
        x, mean, var, weight = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        factor = torch.ones_like(mean) if weight is None else weight
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, factor, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        of_mean, of_var = -factor * scale * of_bias, -0.5 * factor * scale.square() * of_weight
        needs_weight, needs_bias = ctx.needs_input_grad[3:5]
        return of_x, of_mean, of_var, of_weight if needs_weight else None, of_bias if needs_bias else None, None
