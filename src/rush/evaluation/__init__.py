"""Verdicts on attacked points by exact tests, and the models, images and attackers of an evaluation."""
