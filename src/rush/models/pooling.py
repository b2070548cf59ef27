"""Pooling of the last map of an encoder."""

import torch
from torch import Tensor
from torch.nn import functional as F


# A trace, which folds normalization, sees one function and not its branch, if it is called as ``pooling.pooled``.
@torch.fx.wrap
def pooled(maps: Tensor, side: int) -> Tensor:
    """Return the means (B, C, side, side) of maps (B, C, H, W): the maps themselves where they have this side.

    On a CPU, averaging single values takes as long as the convolutions before it.
    """
    return maps if maps.shape[-2:] == (side, side) else F.adaptive_avg_pool2d(maps, side)
