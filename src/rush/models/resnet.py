"""Residual networks (He et al. 2016) for small and standard images, with a width factor."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stem = Literal["small", "standard"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Encoder: normalized images (B, C, H, W) -> representations (B, features) with ``features`` = 8 * width.

    ``blocks`` per stage: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34. ``width`` is the first stage's number of
    channels; 64 is the published network. The ``small`` stem is one 3x3 convolution without pooling (the custom at
    32x32), the ``standard`` one 7x7 stride 2 with pooling.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], width: int = 64, in_channels: int = 3, stem: Stem = "small"
    ) -> None:
        super().__init__()
        self.features = 8 * width
        self.stem = _stem(stem, in_channels, width)
        stages: list[nn.Module] = []
        channels = width
        for stage, repeats in enumerate(blocks):
            for block in range(repeats):
                out_channels = width * 2**stage
                stages.append(BasicBlock(channels, out_channels, stride=2 if stage > 0 and block == 0 else 1))
                channels = out_channels
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1), 1)


def _stem(stem: Stem, in_channels: int, width: int) -> nn.Module:
    if stem == "small":
        return nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
