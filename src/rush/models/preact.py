"""Pre-activation residual networks (He et al. 2016b) and wide ones (Zagoruyko and Komodakis 2016) for small images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.models import pooling
from rush.models.resnet import residual_stages

_WIDE_STEM_CHANNELS = 16


class PreActBlock(nn.Module):
    """Residual block with pre-activation: (B, in, H, W) -> (B, out, H / stride, W / stride).

    It computes conv2(relu(norm2(conv1(a)))) + shortcut with a = relu(norm1(x)) and 3x3 convolutions. The shortcut is x
    itself or, where sizes differ, a 1x1 convolution of a: only the identity bypasses the activation (He et al. 2016b,
    section 4.1 and appendix).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + shortcut


class PreActResNet(nn.Module):
    """Encoder: normalized images (B, C, H, W) -> representations (B, features).

    Each stage after the first has twice as many channels at half the side. BatchNorm and ReLU follow the last block.

    Args:
        blocks: number of blocks per stage, (2, 2, 2, 2) for PreActResNet-18.
        width: number of channels of the first stage, 64 in the published network. ``features`` is that of the last.
        in_channels: number of channels of the images.
        stem_channels: number of channels of the stem, one 3x3 convolution, by default ``width``.
    """

    def __init__(
        self, blocks: tuple[int, ...], width: int = 64, in_channels: int = 3, stem_channels: int | None = None
    ) -> None:
        super().__init__()
        channels = width if stem_channels is None else stem_channels
        self.features = width * 2 ** (len(blocks) - 1)
        self.stem = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.stages = residual_stages(PreActBlock, blocks, channels, width)
        self.norm = nn.BatchNorm2d(self.features)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(self.stages(self.stem(x))))
        return torch.flatten(pooling.pooled(out, 1), 1)


def wide_resnet(depth: int, width: int, in_channels: int) -> PreActResNet:
    """Build a wide residual network of three stages: normalized images (B, C, H, W) -> representations (B, 4 * width).

    See Zagoruyko and Komodakis 2016. The stem has the paper's 16 channels at every width. There is no dropout.

    Args:
        depth: number of convolutions, 6 n + 4: n blocks of two in each of three stages, the stem and, counted as in the
            paper, the three 1x1 shortcuts.
        width: number of channels of the first stage, 16 times the paper's widening factor k: 160 with depth 28 is
            WRN-28-10.
        in_channels: number of channels of the images.
    """
    repeats = (depth - 4) // 6
    return PreActResNet((repeats, repeats, repeats), width, in_channels, _WIDE_STEM_CHANNELS)
