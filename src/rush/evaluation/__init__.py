"""Exact verdicts on attacked points, and what is attacked by whom."""
