"""Published accuracies of contrastive pre-training, beside which a run's live figures are shown."""

from collections.abc import Mapping

PUBLISHED = "SimCLR, width 64, published"
"""What ``ENCODERS`` are figures of: ResNet-18 of width 64, all labels for the linear probe."""
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


def progress_text(stage: str, epoch: int, figures: Mapping[str, float], dataset: str) -> str:
    """Return the live figures after an epoch on one line, each beside what is published for its kind."""
    parts = []
    for kind, share in figures.items():
        known = ENCODERS.get(dataset, {}).get(kind, ()) if stage == "pretrain" else ()
        beside = ", ".join(f"{accuracy:.1%} at {epochs}" for epochs, accuracy in known)
        parts.append(f"{NAMES.get(kind, kind)} {share:.1%}" + (f" ({PUBLISHED}: {beside} epochs)" if beside else ""))
    return f"{stage}, epoch {epoch}, held-out images: {'; '.join(parts)}"
