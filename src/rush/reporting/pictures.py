"""Attacked images of a run as pictures in the report."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rush.choices import Norm
from rush.records.ladder import Ladder, Sample
from rush.records.read_run import RunResults, read_run_samples
from rush.reporting.walk import Walk
from rush.reporting.wording import NORM_SIGNS, radius_text

SAMPLE_COUNT = 9


@dataclass(frozen=True)
class Picture:
    """One attacked image: three PNG data URIs, its classes, its verdict and its sizes.

    Attributes:
        radius: certified radius in words, empty without a certificate.
        change: size of the change in the norms of the threat and of the certificates, in words.
        place: position in the walk through the attacked images.
    """

    label: str
    predicted: str
    verdict: str
    clean: str
    adversarial: str
    difference: str
    radius: str
    change: str
    place: int


def pictures_of(results: RunResults, walk: Walk | None) -> tuple[list[Picture], int]:
    """Return the stored attacked images of a run, if any, and the factor that magnifies their differences.

    Raises:
        RunError: the stored images are damaged.
    """
    samples = read_run_samples(results, SAMPLE_COUNT)
    factor = magnification(samples)
    ladder = results.ladder
    if ladder is None or walk is None:
        return [], factor
    return [_picture(results, ladder, walk, sample, factor) for sample in samples], factor


def png_uri(image: np.ndarray) -> str:
    """Return ``image`` uint8 (C, H, W) as a PNG data URI: RGB for three channels, else grey, the mean over channels."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(axis=0).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def magnification(samples: tuple[Sample, ...]) -> int:
    """Return the largest whole factor, at least 1, at which every pixel difference fits the range around mid-grey."""
    largest = max((float(np.abs(_difference(sample)).max()) for sample in samples), default=0.0)
    return max(1, int(0.5 / largest + 1e-3)) if largest > 0 else 1


def _picture(results: RunResults, ladder: Ladder, walk: Walk, sample: Sample, factor: int) -> Picture:
    challenger = results.class_name(sample.challenger)
    predicted = {
        "broken": challenger,
        "held": results.class_name(sample.label),
        "undecided": f"{results.class_name(sample.label)} or {challenger}",
    }
    return Picture(
        label=results.class_name(sample.label),
        predicted=predicted[sample.verdict],
        verdict=sample.verdict,
        clean=png_uri(sample.clean),
        adversarial=png_uri(_bytes(sample.adversarial)),
        difference=png_uri(_bytes(0.5 + factor * _difference(sample))),
        radius=_radius_text(results, sample.id),
        change=_change_text((ladder.norm, results.certified_norm), _difference(sample)),
        place=walk.ids.index(sample.id),
    )


def _radius_text(results: RunResults, image_id: str) -> str:
    """Return the certified radius of an image, or what is certified instead, empty without certificates."""
    certificates = results.certificates
    if certificates is None or image_id not in certificates.ids:
        return ""
    row = certificates.ids.index(image_id)
    if certificates.abstained[row]:
        return "abstained"
    sign = NORM_SIGNS[certificates.rule.norm]
    wrong = "" if certificates.correct[row] else f", as {results.class_name(int(certificates.prediction[row]))}"
    radius = math.floor(1000 * certificates.radius[row]) / 1000
    return f"certified {sign} radius {radius_text(radius)}{wrong}"


def _change_text(norms: Sequence[Norm], difference: np.ndarray) -> str:
    """Return the size of a change in each of the norms."""
    flat = np.abs(difference).ravel()
    sizes = {"linf": float(flat.max()), "l2": float(np.sqrt((flat**2).sum())), "l1": float(flat.sum())}
    return ", ".join(f"{NORM_SIGNS[norm]} {sizes[norm]:.3g}" for norm in dict.fromkeys(norms))


def _difference(sample: Sample) -> np.ndarray:
    return sample.adversarial.astype(np.float64) - sample.clean / 255.0


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels * 255.0), 0, 255).astype(np.uint8)
