"""Randomized smoothing of a classifier."""

from rush.choices import ABSTAIN
from rush.smoothing.classifier import SmoothedClassifier

__all__ = ["ABSTAIN", "SmoothedClassifier"]
