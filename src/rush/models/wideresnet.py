"""Wide residual networks (Zagoruyko and Komodakis 2016): three wide stages of pre-activation blocks."""

from rush.models.preact import PreActResNet

_STEM_CHANNELS = 16


def wide_resnet(depth: int, width: int = 160, in_channels: int = 3) -> PreActResNet:
    """Build an encoder: normalized images (B, C, H, W) -> representations (B, 4 * width).

    The stem has the paper's 16 channels at every width. There is no dropout.

    Args:
        depth: number of convolutions, 6 n + 4: n blocks of two in each of three stages, the stem and, counted as in the
            paper, the three 1x1 shortcuts.
        width: number of channels of the first stage, 16 times the paper's widening factor k: 160 with depth 28 is
            WRN-28-10.
        in_channels: number of channels of the images.
    """
    repeats = (depth - 4) // 6
    return PreActResNet((repeats, repeats, repeats), width, in_channels, _STEM_CHANNELS)
