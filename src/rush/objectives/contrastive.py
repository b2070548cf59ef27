"""Contrastive objectives on projected views."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.engine.distributed import gather, rank
from rush.errors import InputError


def nt_xent(view_a: Tensor, view_b: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalized temperature-scaled cross-entropy over the global batch (Chen et al. 2020, equation 1 and algorithm 1).

    For every view i with partner j: -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), s the cosine similarity;
    the mean over the 2 B local views, each against all 2 B x world views of all processes.

    view_a, view_b: projections (B, D) of two views of the same B images, row by row; float. temperature: > 0.
    Returns: scalar. Gradients flow through both views, across processes too (see ``gather``).
    Raises: InputError when the shapes differ or the temperature is not positive.
    """
    if view_a.shape != view_b.shape or view_a.ndim != 2:
        raise InputError(f"need two (B, D) tensors of one shape, got {tuple(view_a.shape)} and {tuple(view_b.shape)}")
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature}")
    z = F.normalize(torch.cat([view_a, view_b]), dim=1)
    rows, pairs = len(z), len(view_a)
    similarity = z @ gather(z).T / temperature
    own = torch.arange(rows, device=z.device)
    itself, partner = own + rank() * rows, (own + pairs) % rows + rank() * rows
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarity, partner)
