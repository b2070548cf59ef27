"""Residual networks (He et al. 2016) for small and standard images, with a width factor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.choices import Stem
from rush.models import pooling


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: (B, in, H, W) -> (B, channels, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions: (B, in, H, W) -> (B, 4 * channels, H / stride, W / stride).

    The 3x3 convolution has the stride, as in Goyal et al. (2017) and in most published weights since. In He et al.
    (2016) the first 1x1 convolution has the stride, which skips three of four pixels.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Encoder: normalized images (B, C, H, W) -> representations (B, features).

    ``features`` is 8 * width, or 32 * width with bottlenecks.

    Args:
        blocks: number of blocks per stage: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34 and, with ``Bottleneck``,
            ResNet-50.
        width: number of channels of the first stage's 3x3 convolutions, 64 in the published network.
        in_channels: number of channels of the images.
        stem: "small" is one 3x3 convolution without pooling, as is usual at 32x32, and "standard" is 7x7 stride 2 with
            pooling.
        block: the type of block.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        width: int = 64,
        in_channels: int = 3,
        stem: Stem = "small",
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    ) -> None:
        super().__init__()
        self.features = 8 * width * block.expansion
        self.blocks = blocks
        self.stem = _stem(stem, in_channels, width)
        self.stages = residual_stages(block, blocks, width, width, block.expansion)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(pooling.pooled(self.stages(self.stem(x)), 1), 1)


def residual_stages(
    block: Callable[[int, int, int], nn.Module], blocks: Sequence[int], in_channels: int, width: int, expansion: int = 1
) -> nn.Sequential:
    """Build the stages of a residual network. Each after the first has twice as many channels at half the side.

    Args:
        block: (input channels, channels, stride) -> a block with channels * expansion output channels.
        blocks: number of blocks per stage.
        in_channels: number of channels of the stem's output.
        width: number of channels of the first stage.
        expansion: ratio of the output channels of a block to its channels.
    """
    stages: list[nn.Module] = []
    for stage, repeats in enumerate(blocks):
        channels = width * 2**stage
        for repeat in range(repeats):
            stages.append(block(in_channels, channels, 2 if stage > 0 and repeat == 0 else 1))
            in_channels = channels * expansion
    return nn.Sequential(*stages)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build the identity or, where sizes differ, a normalized 1x1 convolution (option B of He et al. 2016)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stem(stem: Stem, in_channels: int, width: int) -> nn.Module:
    if stem == "small":
        return nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
