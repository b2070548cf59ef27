"""Exact verdicts on attacked points, and the models, images and attackers of an evaluation."""
