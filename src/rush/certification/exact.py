"""Exact certification under splitting noise: all draws vote, and nothing is sampled."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from rush.certification.bounds import certify_all_draws
from rush.certification.certificates import Certificates
from rush.certification.rule import Rule
from rush.certification.sequential import CERTIFIED
from rush.data.checks import LabelledPixels, pixel_ids
from rush.smoothing.classifier import SmoothedClassifier

_TOGETHER = 8  # images, whose last tile is shared


def certify_all(
    smoothed: SmoothedClassifier, pixels: LabelledPixels, rule: Rule, positions: Sequence[int]
) -> Iterator[tuple[int, Certificates]]:
    """Yield (position, certificate) for the images at ``positions``, as ``certify_each`` does.

    Cost: ``rule.num_estimation`` forward passes per image.
    """
    model = smoothed.fingerprint()
    for start in range(0, len(positions), _TOGETHER):
        rows, began = list(positions[start : start + _TOGETHER]), time.perf_counter()
        x = pixels.x[rows]
        blocks = smoothed.all_votes(x).numpy()  # (B, blocks, K)
        counts = blocks.sum(1)
        certified = certify_all_draws(counts)
        paths = zip(blocks, certified.prediction, strict=True)
        group = Certificates(
            prediction=certified.prediction,
            radius=certified.radius,
            p_lower=certified.p_lower,
            num_samples=np.full(len(rows), rule.num_samples),
            counts=counts,
            blocks=tuple(votes[:, selected].astype(np.uint8) for votes, selected in paths),
            selection=counts,
            outcome=np.full(len(rows), CERTIFIED, np.uint8),
            seconds=np.full(len(rows), (time.perf_counter() - began) / len(rows)),
            labels=pixels.y[rows].numpy().astype(np.int64),
            ids=tuple(pixels.ids[row] for row in rows),
            rule=rule,
            pixels=tuple(pixel_ids(x)),
            model=model,
        )
        for row, position in enumerate(rows):
            yield position, group.select([row])
