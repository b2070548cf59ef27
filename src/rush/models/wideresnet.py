"""Wide residual networks (Zagoruyko and Komodakis 2016): three wide stages of pre-activation blocks."""

from rush.models.preact import PreActResNet

_STEM_CHANNELS = 16


def wide_resnet(depth: int, width: int = 160, in_channels: int = 3) -> PreActResNet:
    """Encoder: normalized images (B, C, H, W) -> representations (B, 4 * width).

    ``depth`` = 6 n + 4 convolutions: n blocks of two in each of three stages, the stem and, counted with them as in the
    paper, the 1x1 shortcuts. ``width`` is the first stage's number of channels, 16 times the paper's widening factor k:
    160 with depth 28 is WRN-28-10. The stem has the paper's 16 channels at every width. No dropout.
    """
    repeats = (depth - 4) // 6
    return PreActResNet((repeats, repeats, repeats), width, in_channels, _STEM_CHANNELS)
