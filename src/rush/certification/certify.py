"""Certification of a data set with a fixed number of samples an image."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rush.certification.bounds import certify_counts, largest_radius
from rush.engine.progress import progress
from rush.errors import InputError
from rush.inputs import Images, LabelledPixels, check_positive_integer, labelled_pixels
from rush.options import fewest_samples
from rush.smoothing import SmoothedClassifier

CertifyMethod = Literal["clopper-pearson"]

_GROUP_SAMPLES = 50_000  # images are certified in groups of about so many samples: results come often, tiles stay full


@dataclass(frozen=True)
class Certificates:
    """Certificates of N images, each valid with probability >= 1 - alpha by itself (``certification.bounds``).

    prediction int64 (N,), ABSTAIN (-1) where nothing is certified; radius float64 (N,) in pixel units, 0.0 there;
    p_lower (N,); num_samples int64 (N,), selection and estimation together; counts int64 (N, K) of the estimation
    votes; blocks uint8 (N, num_estimation / 100, K), the same by blocks of 100; selection int64 (N, K); seconds (N,);
    labels int64 (N,); ids.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    num_samples: NDArray[np.int64]
    counts: NDArray[np.int64]
    blocks: NDArray[np.uint8]
    selection: NDArray[np.int64]
    seconds: NDArray[np.float64]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    sigma: float
    alpha: float
    num_selection: int
    num_estimation: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Certified with the label's class, (N,)."""
        return self.prediction == self.labels

    def accuracy(self, radius: float = 0.0) -> float:
        """Certified accuracy: share of images certified with the correct class and a radius >= ``radius``."""
        return float((self.correct & (self.radius >= radius)).mean())

    @property
    def acr(self) -> float:
        """Average certified radius, wrong and abstained images counting 0; depends on ``num_estimation``, print both
        together."""
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def largest_radius(self) -> float:
        """No image can be certified beyond this radius with ``num_estimation`` samples."""
        return largest_radius(self.num_estimation, self.sigma, self.alpha)


def certify(
    smoothed: SmoothedClassifier,
    images: Images,
    method: CertifyMethod = "clopper-pearson",
    num_selection: int = 100,
    num_estimation: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
) -> Certificates:
    """Certificates of all images (Cohen et al. 2019, algorithm CERTIFY), each at level ``alpha``.

    images: an ImageSet with labels, or a pair (float images (N, C, H, W) in [0, 1], labels (N,)).
    The class is selected on ``num_selection`` votes and bounded on ``num_estimation`` others. Noise comes from
    ``stream(seed, "certify-selection", id)`` and ``stream(seed, "certify-estimation", id)``: a certificate depends
    neither on the other images nor on their order. Cost: num_selection + num_estimation forward passes an image.
    Raises: InputError for bad images, labels or numbers; ModelError for a classifier that cannot be certified.
    """
    pixels = labelled_pixels(images, smoothed.num_classes)
    check_certify_arguments(method, num_selection, num_estimation, alpha)
    groups = certify_groups(
        smoothed, pixels, num_selection=num_selection, num_estimation=num_estimation, alpha=alpha, seed=seed
    )
    return join_certificates(list(groups))


def check_certify_arguments(method: str, num_selection: int, num_estimation: int, alpha: float) -> None:
    """Raises InputError when a number or the method is not allowed."""
    if method not in get_args(CertifyMethod):
        raise InputError(f"unknown method {method!r}; allowed: {', '.join(get_args(CertifyMethod))}")
    for name, value in (("num_selection", num_selection), ("num_estimation", num_estimation)):
        check_positive_integer(name, value)
    if not 0 < alpha < 0.5:
        raise InputError(f"alpha must lie in (0, 0.5), got {alpha!r}")
    if num_estimation < fewest_samples(alpha):
        raise InputError(
            f"num_estimation = {num_estimation} certifies nothing at alpha = {alpha}, even when all votes agree; "
            f"give at least {fewest_samples(alpha)}"
        )


def certify_groups(
    smoothed: SmoothedClassifier,
    pixels: LabelledPixels,
    *,
    num_selection: int,
    num_estimation: int,
    alpha: float,
    seed: int,
    start: int = 0,
) -> Iterator[Certificates]:
    """Certificates group by group from image ``start`` on, as soon as each group is done; the checked inside of
    ``certify``."""
    size = max(1, _GROUP_SAMPLES // (num_selection + num_estimation))
    with progress("certify", len(pixels), start=start) as advance:
        for first in range(start, len(pixels), size):
            group = pixels.select(list(range(first, min(first + size, len(pixels)))))
            yield _certify_group(smoothed, group, num_selection, num_estimation, alpha, seed)
            advance(len(group))


def join_certificates(parts: list[Certificates]) -> Certificates:
    """One table of several, in their order; all must have the same parameters."""
    arrays = ("prediction", "radius", "p_lower", "num_samples", "counts", "blocks", "selection", "seconds", "labels")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    head = parts[0]
    return Certificates(
        **joined,
        ids=tuple(own for part in parts for own in part.ids),
        sigma=head.sigma,
        alpha=head.alpha,
        num_selection=head.num_selection,
        num_estimation=head.num_estimation,
    )


def _certify_group(
    smoothed: SmoothedClassifier,
    group: LabelledPixels,
    num_selection: int,
    num_estimation: int,
    alpha: float,
    seed: int,
) -> Certificates:
    started = time.perf_counter()
    selection = smoothed.counts(group.x, num_selection, smoothed.streams(seed, "certify-selection", group.ids)).numpy()
    blocks = smoothed.vote_blocks(
        group.x, num_estimation, smoothed.streams(seed, "certify-estimation", group.ids)
    ).numpy()
    counts = blocks.sum(1)
    certified = certify_counts(selection, counts, smoothed.sigma, alpha)
    return Certificates(
        prediction=certified.prediction,
        radius=certified.radius,
        p_lower=certified.p_lower,
        num_samples=np.full(len(group), num_selection + num_estimation, np.int64),
        counts=counts,
        blocks=blocks.astype(np.uint8),
        selection=selection,
        seconds=np.full(len(group), (time.perf_counter() - started) / len(group)),
        labels=group.y.numpy(),
        ids=group.ids,
        sigma=smoothed.sigma,
        alpha=alpha,
        num_selection=num_selection,
        num_estimation=num_estimation,
    )
