"""Published accuracies, which are shown beside those of a run on the same data set."""

from collections.abc import Mapping
from dataclasses import dataclass

PUBLISHED = "SimCLR, width 64, published"
"""The encoder that ``ENCODERS`` has figures of: ResNet-18 of width 64, all labels for the linear probe."""
ENCODERS: Mapping[str, Mapping[str, tuple[tuple[int, float], ...]]] = {
    "cifar10": {"linear": ((10, 0.565), (30, 0.663)), "knn": ((100, 0.832),)},
}
"""Accuracies by data set and kind, each as (epochs, accuracy).

The linear probes are those that Tong et al. (2023, EMP-SSL, arXiv 2304.03977) report for SimCLR. The nearest neighbours
(k = 10, cosine) are from the README of a public single-file SimCLR for CIFAR-10.
"""
NAMES = {
    "knn": "nearest neighbours",
    "knn_noisy": "nearest neighbours, noisy",
    "linear": "linear probe",
    "linear_noisy": "linear probe, noisy",
    "accuracy": "classifier",
    "accuracy_noisy": "classifier, noisy",
}
"""Live figures in words."""


@dataclass(frozen=True)
class CertifiedCurve:
    """Published certified accuracy, fractions of all 10,000 test images, at multiples of 0.25 in l2, from 0."""

    method: str
    sigma: float
    accuracy: tuple[float, ...]

    @property
    def radii(self) -> tuple[float, ...]:
        return tuple(0.25 * place for place in range(len(self.accuracy)))

    @property
    def label(self) -> str:
        return f"{self.method}, σ {self.sigma:g}, published"


def _curve(method: str, sigma: float, *percents: float) -> CertifiedCurve:
    return CertifiedCurve(method, sigma, tuple(round(percent / 100, 4) for percent in percents))


_RECORD = "ACR-weakness"
CERTIFIED: Mapping[str, tuple[CertifiedCurve, ...]] = {
    "cifar10": (
        _curve("Gaussian", 0.25, 80.4, 66.8, 50.5, 32.7),
        _curve("CAT-RS", 0.25, 76.3, 68.1, 58.8, 48.2),
        _curve(_RECORD, 0.25, 76.6, 69.0, 59.3, 48.3),
        _curve("Gaussian", 0.5, 68.8, 58.2, 46.2, 34.5, 24.5, 16.3, 10.2, 5.3),
        _curve("CAT-RS", 0.5, 62.3, 56.8, 50.5, 44.6, 38.5, 32.7, 27.1, 20.6),
        _curve(_RECORD, 0.5, 59.3, 54.8, 49.6, 44.4, 38.9, 34.1, 29.0, 23.0),
        _curve("Gaussian", 1.0, 50.9, 43.5, 36.5, 30.1, 23.9, 18.6, 13.7, 9.8, 6.5, 4.1, 2.5),
        _curve("CAT-RS", 1.0, 43.2, 40.2, 37.2, 34.3, 31.0, 28.1, 24.9, 22.0, 19.3, 16.8, 14.2),
        _curve(_RECORD, 1.0, 42.0, 39.4, 36.5, 33.9, 31.1, 28.4, 25.6, 23.1, 20.6, 18.3, 16.1),
    ),
    "cifar100": (
        _curve("Gaussian", 0.25, 48.9, 33.7, 20.9, 12.0),
        _curve("CAT-RS", 0.25, 48.2, 39.8, 31.7, 24.4),
        _curve("Gaussian", 0.5, 36.5, 27.8, 20.4, 14.7, 10.1, 6.8, 4.2),
        _curve("CAT-RS", 0.5, 35.8, 30.5, 25.7, 21.2, 17.5, 14.4, 11.5),
    ),
}
"""Certified l2 accuracy by data set: ResNet-110, N = 100,000, alpha = 0.001 per image, all 10,000 test images.

Computed from the logs in the repositories of the authors: eth-sri/acr-weakness (2025) for CIFAR-10, and
alinlab/smoothing-catrs (2023) for CIFAR-100.
"""
CERTIFIED_SOURCES = {
    "cifar10": "the logs of eth-sri/acr-weakness (2025)",
    "cifar100": "the logs of alinlab/smoothing-catrs (2023)",
}


@dataclass(frozen=True)
class Attacked:
    """A published accuracy under attack, as it is printed."""

    source: str
    clean: str
    robust: str
    attack: str
    data: str
    model: str


_AUTOATTACK = "AutoAttack, ℓ∞ 8/255"
ATTACKED: Mapping[str, tuple[Attacked, ...]] = {
    "cifar10": (
        Attacked("RUSH abstract (arXiv 2207.05127)", "87.9 %", "77.8 %", "PGD, ℓ∞ 8/255", "CIFAR-10", "ResNet-18"),
        Attacked(
            "RobustBench, best of its size (Gowal 2021, generated data)",
            "87.4 %", "58.5 %", _AUTOATTACK, "CIFAR-10", "ResNet-18",
        ),
        Attacked("RobustBench, best of any size", "–", "73.7 %", _AUTOATTACK, "CIFAR-10", "any"),
    ),
    "cifar100": (
        Attacked(
            "RobustBench, best of its size (Rade 2021, generated data)",
            "61.5 %", "28.9 %", _AUTOATTACK, "CIFAR-100", "PreAct ResNet-18",
        ),
    ),
}  # fmt: skip
"""Accuracy under attack by data set, from the abstract and from the README of RobustBench."""


def certified_curves(dataset: str, norm: str, sigma: float) -> tuple[CertifiedCurve, ...]:
    """Return the published l2 curves of a data set at the noise level nearest to ``sigma``, or () if there are none."""
    known = CERTIFIED.get(dataset, ()) if norm == "l2" else ()
    nearest = min((curve.sigma for curve in known), key=lambda level: abs(level - sigma), default=None)
    return tuple(curve for curve in known if curve.sigma == nearest)


def progress_text(stage: str, epoch: int, figures: Mapping[str, float], dataset: str) -> str:
    """Return the live figures after an epoch on one line, each beside what is published for its kind."""
    parts = []
    for kind, share in figures.items():
        known = ENCODERS.get(dataset, {}).get(kind, ()) if stage == "pretrain" else ()
        beside = ", ".join(f"{accuracy:.1%} at {epochs}" for epochs, accuracy in known)
        parts.append(f"{NAMES.get(kind, kind)} {share:.1%}" + (f" ({PUBLISHED}: {beside} epochs)" if beside else ""))
    return f"{stage}, epoch {epoch}, held-out images: {'; '.join(parts)}"
