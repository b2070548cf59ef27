"""RUSH: contrastive pre-training and randomized smoothing, certified soundly and attacked honestly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rush.attacks.threat import ThreatModel
    from rush.certification.certify import certify
    from rush.data.images import ImageSet
    from rush.data.sources import load_images
    from rush.evaluation.audit import audit
    from rush.evaluation.robust import attack
    from rush.loading import load
    from rush.noise import Gaussian
    from rush.smoothing import ABSTAIN, SmoothedClassifier

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that `rush --help` does not wait for torch.
_HOMES = {
    "ABSTAIN": "rush.smoothing",
    "Gaussian": "rush.noise",
    "ImageSet": "rush.data.images",
    "SmoothedClassifier": "rush.smoothing",
    "ThreatModel": "rush.attacks.threat",
    "attack": "rush.evaluation.robust",
    "audit": "rush.evaluation.audit",
    "certify": "rush.certification.certify",
    "load": "rush.loading",
    "load_images": "rush.data.sources",
}

__all__ = [
    "ABSTAIN",
    "Gaussian",
    "ImageSet",
    "SmoothedClassifier",
    "ThreatModel",
    "attack",
    "audit",
    "certify",
    "load",
    "load_images",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rush' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
