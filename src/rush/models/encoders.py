"""Construction of every encoder that a recipe or a saved model names."""

from typing import get_args

import torch
from torch import Tensor, nn

from rush.choices import EncoderName, Stem
from rush.errors import ConfigError
from rush.models import pooling
from rush.models.preact import PreActResNet, wide_resnet
from rush.models.resnet import BasicBlock, Bottleneck, ResNet
from rush.runtime.numbers import is_one_of

_RESNETS: dict[str, tuple[tuple[int, int, int, int], type[BasicBlock] | type[Bottleneck]]] = {
    "resnet18": ((2, 2, 2, 2), BasicBlock),
    "resnet34": ((3, 4, 6, 3), BasicBlock),
    "resnet50": ((3, 4, 6, 3), Bottleneck),
}
_WIDE_DEPTHS = {"wideresnet28": 28, "wideresnet34": 34}


class SmallEncoder(nn.Module):
    """Encoder for images of about 8x8: (B, C, H, W) -> (B, features) with ``features`` = 16 * width.

    It has three 3x3 convolutions, of which the second and third halve the side. The last map is pooled to 2x2 and
    flattened, so that the representation keeps position.
    """

    def __init__(self, width: int = 16, in_channels: int = 1) -> None:
        super().__init__()
        self.features = 16 * width
        self.layers = nn.Sequential(
            *_conv(in_channels, width, 1), *_conv(width, 2 * width, 2), *_conv(2 * width, 4 * width, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(pooling.pooled(self.layers(x), 2), 1)


def build_encoder(name: EncoderName, width: int, in_channels: int, stem: Stem = "small") -> nn.Module:
    """Build the encoder ``name``, with torch's default initialization (see ``seeded_init``).

    Args:
        name: the encoder.
        width: number of channels of the first stage, in the published networks 64, in the wide ones 160 ("-10").
        in_channels: number of channels of the images.
        stem: "small", or "standard" (7x7 stride 2 with pooling, for images of 96 pixels and more), which resnet18,
            resnet34 and resnet50 support.

    Returns:
        A module (B, in_channels, H, W) -> (B, features), with the attribute ``features``.

    Raises:
        ConfigError: The name or the stem is unknown, or the encoder does not have this stem.
    """
    if not is_one_of(stem, get_args(Stem)):
        raise ConfigError(f"unknown stem {stem!r}; allowed: {', '.join(get_args(Stem))}")
    if not is_one_of(name, get_args(EncoderName)):
        raise ConfigError(f"unknown encoder {name!r}; allowed: {', '.join(get_args(EncoderName))}")
    if name in _RESNETS:
        blocks, block = _RESNETS[name]
        return ResNet(blocks, width, in_channels, stem, block)
    if stem != "small":
        raise ConfigError(f"encoder {name!r} has no {stem!r} stem, only 'small'; one of {', '.join(_RESNETS)} has both")
    if name == "small":
        return SmallEncoder(width, in_channels)
    if name == "preactresnet18":
        return PreActResNet((2, 2, 2, 2), width, in_channels)
    return wide_resnet(_WIDE_DEPTHS[name], width, in_channels)


def _conv(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
