"""Contrastive objectives on projected views."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.errors import InputError
from rush.runtime.distributed import gather, rank


def nt_xent(view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
    """Return the normalized temperature-scaled cross-entropy over the global batch.

    For every view i with partner j this is -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), with s the cosine
    similarity (Chen et al. 2020, equation 1 and algorithm 1). The result is the mean over the 2 B local views, each
    compared with all 2 B x world views of all processes.

    Args:
        view_a, view_b: float projections (B, D) of two views of the same B images, row by row.
        temperature: t > 0.

    Returns:
        A scalar. Gradients flow through both views, across processes too (see ``gather``).

    Raises:
        InputError: the shapes differ or the temperature is not positive.
    """
    if view_a.shape != view_b.shape or view_a.ndim != 2:
        raise InputError(f"need two (B, D) tensors of one shape, got {tuple(view_a.shape)} and {tuple(view_b.shape)}")
    _check_temperature(temperature)
    z = F.normalize(torch.cat([view_a, view_b]), dim=1)
    rows, pairs = len(z), len(view_a)
    similarity = z @ gather(z).T / temperature
    local = torch.arange(rows, device=z.device)  # view i of this process is column i + rank * rows of all
    itself, partner = local + rank() * rows, (local + pairs) % rows + rank() * rows
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarity, partner)


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each query's key among the queue (MoCo: He et al. 2020, equation 1 and algorithm 1).

    For every query q with key k this is -log(exp(s(q, k) / t) / (exp(s(q, k) / t) + sum over n of exp(s(q, n) / t))),
    with n the rows of the queue and s the cosine similarity. The result is the mean over the B queries of this process.
    The other keys of the batch do not count as negatives.

    Args:
        queries, keys: projections (B, D) of two views of the same B images, row by row, of any norm.
        queue: (Q, D), Q >= 1, of the same floating type.
        temperature: t > 0. It is 0.07 in He et al. 2020 and 0.2 in version 2 (Chen et al. 2020, "Improved Baselines
            with Momentum Contrastive Learning").

    Returns:
        A scalar. Gradients flow into the queries alone. The queue may be overwritten before the backward pass.

    Raises:
        InputError: the shapes do not match or the temperature is not positive.
    """
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise InputError(
            f"need queries and keys (B, D) of one shape, got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queue.ndim != 2 or len(queue) == 0 or queue.shape[1] != queries.shape[1]:
        raise InputError(f"need a queue (Q, {queries.shape[1]}) with Q >= 1, got {tuple(queue.shape)}")
    _check_temperature(temperature)
    q = F.normalize(queries, dim=1)
    positive = (q * F.normalize(keys.detach(), dim=1)).sum(1, keepdim=True)
    similarity = torch.cat([positive, q @ F.normalize(queue.detach(), dim=1).T], dim=1) / temperature
    return F.cross_entropy(similarity, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature}")
