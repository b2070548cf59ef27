"""Randomized smoothing of a classifier."""

from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier

__all__ = ["ABSTAIN", "SmoothedClassifier"]
