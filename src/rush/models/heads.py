"""Heads on a representation: the contrastive projector (dropped after pre-training) and the linear classifier."""

from torch import nn


def projector(features: int, hidden: int, out: int) -> nn.Module:
    """Build a projector (B, features) -> (B, out) of two layers with BatchNorm and ReLU (Chen et al. 2020, B.9)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
    )


def linear_head(features: int, num_classes: int) -> nn.Linear:
    """Build a linear classifier (B, features) -> logits (B, num_classes)."""
    return nn.Linear(features, num_classes)
