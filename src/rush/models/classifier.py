"""The classifier that RUSH trains: normalize -> encoder -> head, on pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rush.data.kind import ANY_KIND, ImageKind
from rush.errors import ModelError


class Normalize(nn.Module):
    """The layer (x - mean) / std per channel, so that pixels stay in [0, 1] up to the first layer of every model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # a symbolic trace has no shape
            self._check_channels(x)
        return (x - self.mean) / self.std

    def _check_channels(self, x: Tensor) -> None:
        """Raise ModelError where broadcasting would silently turn one channel into several equal ones."""
        channels = self.mean.shape[1]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ModelError(
                f"images have shape {tuple(x.shape)}, the classifier's normalization takes (B, {channels}, H, W); give "
                f"images of {channels} channels"
            )


class Classifier(nn.Module):
    """Classifier from pixels (B, C, H, W) in [0, 1], or outside after noise, to logits (B, K).

    Args:
        normalize: the first layer.
        encoder: normalized images -> representations (B, features).
        head: representations -> logits.
        kind: shape and class names of the images that it was trained on, as far as they are known.

    Attributes:
        spec: the arguments that built it (``models.storage.ClassifierSpec``), None for one that was built by hand.
    """

    spec: object = None

    def __init__(self, normalize: Normalize, encoder: nn.Module, head: nn.Module, kind: ImageKind = ANY_KIND) -> None:
        super().__init__()
        self.kind = kind
        self.normalize = normalize
        self.encoder = encoder
        self.head = head

    def represent(self, x: Tensor) -> Tensor:
        """Return the representations (B, features) of images (B, C, H, W)."""
        return self.encoder(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.represent(x))


class Represent(nn.Module):
    """Module from pixels (B, C, H, W) to the representations (B, features) of a classifier."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.represent(x)
