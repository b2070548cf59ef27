"""Every encoder by name: one place that builds what a recipe or a saved model describes."""

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.errors import ConfigError
from rush.models.resnet import ResNet
from rush.options import EncoderName

_RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class SmallEncoder(nn.Module):
    """Three 3x3 convolutions for images of about 8x8: (B, C, H, W) -> (B, features) with ``features`` = 16 * width.

    The second and third halve the side; the last map is pooled to 2x2 and flattened, so that the representation knows
    where.
    """

    def __init__(self, width: int = 16, in_channels: int = 1) -> None:
        super().__init__()
        self.features = 16 * width
        self.layers = nn.Sequential(
            *_conv(in_channels, width, 1), *_conv(width, 2 * width, 2), *_conv(2 * width, 4 * width, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 2), 1)


def build_encoder(name: EncoderName, width: int, in_channels: int) -> nn.Module:
    """The encoder called ``name`` with attribute ``features``, uninitialised beyond torch's defaults (see
    ``seeded_init``).

    Raises: ConfigError for an unknown name.
    """
    if name == "small":
        return SmallEncoder(width, in_channels)
    if name in _RESNET_BLOCKS:
        return ResNet(_RESNET_BLOCKS[name], width, in_channels)
    raise ConfigError(f"unknown encoder {name!r}; allowed: {', '.join(get_args(EncoderName))}")


def _conv(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
