"""RUSH: contrastive pre-training and randomized smoothing, certified soundly and attacked honestly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rush.attacks.threat import ThreatModel
    from rush.auditing.audit import audit
    from rush.certification.certify import certify
    from rush.certification.features import noisy_features
    from rush.certification.incremental import certify_changed
    from rush.choices import ABSTAIN
    from rush.data.images import ImageSet
    from rush.data.sources import load_images
    from rush.evaluation.attack import attack
    from rush.models.storage import load, save
    from rush.runtime.randomness import stream
    from rush.smoothing.classifier import SmoothedClassifier
    from rush.smoothing.discrete import DiscreteGaussian
    from rush.smoothing.noise import Gaussian, Laplace, Uniform
    from rush.smoothing.splitting import Splitting

__version__ = "0.1.0"

# Modules of the public names. They are imported on first use, so that `rush --help` does not wait for torch.
_HOMES = {
    "ABSTAIN": "rush.choices",
    "DiscreteGaussian": "rush.smoothing.discrete",
    "Gaussian": "rush.smoothing.noise",
    "ImageSet": "rush.data.images",
    "Laplace": "rush.smoothing.noise",
    "SmoothedClassifier": "rush.smoothing.classifier",
    "Splitting": "rush.smoothing.splitting",
    "ThreatModel": "rush.attacks.threat",
    "Uniform": "rush.smoothing.noise",
    "attack": "rush.evaluation.attack",
    "audit": "rush.auditing.audit",
    "certify": "rush.certification.certify",
    "certify_changed": "rush.certification.incremental",
    "load": "rush.models.storage",
    "load_images": "rush.data.sources",
    "noisy_features": "rush.certification.features",
    "save": "rush.models.storage",
    "stream": "rush.runtime.randomness",
}

__all__ = [
    "ABSTAIN",
    "DiscreteGaussian",
    "Gaussian",
    "ImageSet",
    "Laplace",
    "SmoothedClassifier",
    "Splitting",
    "ThreatModel",
    "Uniform",
    "attack",
    "audit",
    "certify",
    "certify_changed",
    "load",
    "load_images",
    "noisy_features",
    "save",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rush' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
