"""The classifier that RUSH trains: normalize -> encoder -> head, on pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that pixels stay in [0, 1] up to the first layer of every model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Pixels (B, C, H, W) in [0, 1], noise allowed to leave that range -> logits (B, K)."""

    def __init__(self, normalize: Normalize, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.encoder = encoder
        self.head = head

    def represent(self, x: Tensor) -> Tensor:
        """Representations (B, features)."""
        return self.encoder(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.represent(x))
