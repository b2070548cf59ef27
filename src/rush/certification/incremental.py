"""Certification of a changed network from the certificates of the old one and the votes in which the two differ.

Let A be the class that an old certificate selected for an image, p = P(old(x + noise) = A), p' the same for the new
network, and d = P(old = A and new != A) on the same noise. Then

    p' >= P(old = A and new = A) = p - d.

This is the theorem of Ugare et al. 2024 ("Incremental Randomized Smoothing Certification", ICLR) with the one-sided
difference d in place of P(old != new) >= d. Votes that change to A, or between two other classes, cost nothing.

The old bound. With probability >= 1 - alpha the stored p_lower is below p. For a fixed number of votes it is a lower
confidence bound (``bounds``). Under a sequential rule it is the null probability p_r of the largest radius that was
passed: if it is not below p, a true hypothesis H_r: p <= p_r was rejected, which has probability <= alpha
(``sequential``). Both hold given A, which separate votes selected.

The difference is counted on pairs of votes, one of each network on one noise sample. Their noise is drawn from separate
streams, so that it is independent of the old certificates. If the new network is fixed without regard to this noise,
then, given A and p_lower, the number D of differing pairs among n is Binomial(n, d).

Fixed number of pairs. U, the Clopper-Pearson upper bound of d at alpha_difference, fails with probability <=
alpha_difference. Where neither bound fails, p' >= p_lower - U, and ``bounds.certified_radius`` of that is certified:
false with probability <= alpha + alpha_difference (union bound). The noise could even be that of the old votes.

Sequential. Radius r is certified by rejecting d >= p_lower - p_r, that is, that a pair does not differ with a
probability q = 1 - d <= 1 - p_lower + p_r. Given p_lower these nulls are fixed, and they ascend with r. So
``sequential.FixedSequence`` rejects a true one of them with probability <= alpha_difference, whenever it stops. If no
true one is rejected and p_lower <= p, then a certified r has p' >= p - d > p - p_lower + p_r >= p_r. This needs noise
that is independent of p_lower. With a margin m = p_lower - p_r > d it takes about ln(1 / alpha_difference) / m pairs if
d is small, where votes of the new network alone need about 2 p (1 - p) ln(1 / alpha) / m^2.

Cost. The new network votes first. Where it votes for A the pair does not differ whatever the old one votes, so the old
network votes on the other samples only. n pairs cost about n (2 - p') forward passes, and not 2 n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.certification.bounds import certified_radius
from rush.certification.certificates import Certificates, certified_correctly, first_difference
from rush.certification.rule import Rule, check_grid
from rush.certification.sequential import UNDECIDED, FixedSequence, reachable
from rush.choices import ABSTAIN, BLOCK, CertifyMethod, SequentialBound, fewest_samples
from rush.data.checks import Images, LabelledPixels, labelled_pixels, pixel_ids
from rush.errors import InputError, ModelError
from rush.recipe.schema import CertifyConfig
from rush.runtime.numbers import positive_integer, probability
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.outputs import noisy_copies
from rush.statistics import lower_bound

_DEFAULTS = CertifyConfig()
_BOUND: SequentialBound = "geometric"


@dataclass(frozen=True)
class ChangedCertificates:
    """Certificates of N images for a changed network.

    Attributes:
        prediction: int64 (N,), ABSTAIN (-1) where nothing is certified.
        radius: float64 (N,) in pixel units, 0.0 where nothing is certified.
        p_lower: float64 (N,), lower bound on the new network's probability of the selected class.
        differing: int64 (N,), pairs in which the old network voted for the selected class and the new one did not.
        pairs: int64 (N,), pairs of votes on one noise sample. 0 where the old certificate leaves no margin.
        num_samples: int64 (N,), votes of both networks that were drawn for them.
        labels: int64 (N,).
        ids: ids of the images.
        rule: rule of the old certificates.
        alpha_difference: level of the difference.
        model: fingerprint of the new smoothed classifier.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    differing: NDArray[np.int64]
    pairs: NDArray[np.int64]
    num_samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    rule: Rule
    alpha_difference: float
    model: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def alpha(self) -> float:
        """Probability of a false certificate: that of an old one plus the level of the difference."""
        return self.rule.alpha + self.alpha_difference

    @property
    def statement(self) -> str:
        """A clause that states whether alpha covers each certificate or all of them jointly."""
        return self.rule.statement_at(self.alpha)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the label's class is certified, bool (N,)."""
        return self.prediction == self.labels

    def certified(self, radius: float = 0.0) -> NDArray[np.bool_]:
        """Return whether each image is certified with the correct class and a radius >= ``radius``, (N,)."""
        return certified_correctly(self.correct, self.radius, radius)

    def accuracy(self, radius: float = 0.0) -> float:
        """Return the certified accuracy: the share of images certified correctly with a radius >= ``radius``."""
        return float(self.certified(radius).mean())


def certify_changed(
    certificates: Certificates,
    old: SmoothedClassifier,
    new: SmoothedClassifier,
    images: Images,
    method: CertifyMethod = _DEFAULTS.method,
    num_pairs: int = 1000,
    alpha_difference: float = _DEFAULTS.alpha,
    radii: Sequence[float] | None = None,
    futility: float = _DEFAULTS.futility,
    seed: int = 0,
) -> ChangedCertificates:
    """Certify a changed network (quantized, pruned, fine-tuned a little) from the old one's certificates.

    Each certificate is false with probability at most ``certificates.alpha + alpha_difference``. At level ``family``
    all hold together with probability at least 1 - that (see the module's docstring). No p_lower exceeds the old one.

    **The new network must be fixed without regard to the noise of this seed**: do not train or choose it by these
    results.

    Args:
        certificates: certificates of the old network. Under the bound ``two-classes``, p_lower alone is used.
        old: the network that they belong to, as it was certified.
        new: the changed network, with the same noise and classes. The noise is drawn on its device.
        images: those of the certificates, in the same order, with the same labels.
        method: ``clopper-pearson`` draws ``num_pairs`` pairs per image and certifies any radius. ``sequential`` draws
            until the radii are decided, at most ``num_pairs``.
        num_pairs: pairs of votes per image.
        alpha_difference: level of the bound on the difference.
        radii: for ``sequential``, a grid in pixel units. None means that of the certificates, or 0 and the multiples of
            sigma / 2. A radius for which the old certificate of an image leaves no margin is not tested. Old sequential
            certificates leave none at their own radius.
        futility: level at which ``sequential`` gives up a radius. Giving up is never unsound.
        seed: seed of the noise of the pairs.

    Raises:
        InputError: bad images or numbers, images other than those of the certificates, or networks that cannot be
            compared.
        ModelError: the certificates do not belong to ``old``, or a network cannot be certified.

    Cost: per pair one pass of ``new``, and one of ``old`` where ``new`` does not vote for the selected class. All
        passes run in one process.

    Random: ``stream(seed, "certify-difference", id)`` for each image.

    Example:
        >>> import copy, rush, torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> rounded = copy.deepcopy(network).bfloat16().float()
        >>> old, new = (rush.SmoothedClassifier(each, sigma=0.25, num_classes=10) for each in (network, rounded))
        >>> images = rush.load_images("digits", split="test")[:5]
        >>> certificates = rush.certify(old, images, num_estimation=1000)
        >>> changed = rush.certify_changed(certificates, old, new, images)
        >>> changed.alpha, bool((changed.radius <= certificates.radius).all())
        (0.002, True)
    """
    pixels = labelled_pixels(images, new.num_classes, new.kind)
    num_pairs = positive_integer("num_pairs", num_pairs)
    level = probability("alpha_difference", alpha_difference, 0.5)
    futility = probability("futility", futility, 0.5)
    _check_networks(certificates, old, new)
    _check_images(certificates, pixels)
    new.check_shape(pixels.x.shape[1:])
    new.noise.check(pixels.x)
    rule = certificates.rule
    image_level = level if rule.level == "image" else level / rule.num_images
    fewest = fewest_samples(image_level)
    if num_pairs < fewest:
        raise InputError(
            f"num_pairs = {num_pairs} certifies nothing at level {image_level:g} per image, even if no vote differs; "
            f"give at least {fewest}"
        )
    if method == "clopper-pearson":
        if radii is not None:
            raise InputError('radii are a grid for method="sequential"; omit them, any radius is certified')
        decision: _Fixed | _Sequential = _Fixed(certificates, image_level, num_pairs)
    elif method == "sequential":
        grid = certificates.table_radii if radii is None else check_grid(radii)
        decision = _Sequential(certificates, grid, image_level, futility, num_pairs)
    else:
        raise InputError(f"unknown method {method!r}; allowed: clopper-pearson, sequential")
    differing, pairs, num_samples = _draw(old, new, pixels, certificates.selected, decision, seed)
    prediction, radius, p_lower = decision.conclude(differing, pairs)
    return ChangedCertificates(
        prediction=prediction,
        radius=radius,
        p_lower=p_lower,
        differing=differing,
        pairs=pairs,
        num_samples=num_samples,
        labels=certificates.labels,
        ids=certificates.ids,
        rule=rule,
        alpha_difference=level,
        model=new.fingerprint(),
    )


_Certified = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]  # prediction, radius, p_lower


class _Fixed:
    """A bound on the difference from a fixed number of pairs. Pairs are drawn for ``open`` images alone."""

    def __init__(self, old: Certificates, level: float, num_pairs: int) -> None:
        self._old, self._level, self._num_pairs = old, level, num_pairs
        none_differ = changed_p_lower(old.p_lower, np.zeros(len(old)), np.full(len(old), num_pairs), level)
        self.open = self._radius(none_differ) > 0

    def next_pairs(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full_like(pairs, self._num_pairs)

    def look(self, row: int, differing: int, pairs: int) -> None:  # noqa: ARG002 - as _Sequential
        self.open[row] = False

    def conclude(self, differing: NDArray[np.int64], pairs: NDArray[np.int64]) -> _Certified:
        p_lower = np.where(
            pairs > 0, changed_p_lower(self._old.p_lower, differing, np.maximum(pairs, 1), self._level), 0.0
        )
        radius = self._radius(p_lower)
        return np.where(radius > 0, self._old.selected, ABSTAIN), radius, p_lower

    def _radius(self, p_lower: NDArray[np.float64]) -> NDArray[np.float64]:
        return certified_radius(p_lower, self._old.rule.sigma, self._old.rule.noise)


class _Sequential:
    """Tests of the difference against the margins that each old certificate leaves at the radii of a grid."""

    def __init__(
        self, old: Certificates, radii: Sequence[float], level: float, futility: float, num_pairs: int
    ) -> None:
        self._old, self._radii, self._num_pairs = old, np.array([0.0, *radii]), num_pairs
        self._nulls = np.array([0.0, *(old.rule.null_probability(radius) for radius in radii)])
        self._passed = np.zeros(len(old), np.int64)
        self._tests: list[FixedSequence | None] = []
        for p_lower in old.p_lower:
            within = partial(reachable, _BOUND, level=level, cap=num_pairs)
            nulls = list(takewhile(within, 1 - p_lower + self._nulls[1:]))
            options = {"bound": _BOUND, "level": level, "futility": futility, "cap": num_pairs}
            self._tests.append(FixedSequence(nulls, **options) if nulls else None)  # type: ignore[arg-type]
        self.open = np.array([test is not None for test in self._tests])

    def next_pairs(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return 100 pairs, or a quarter of those that have been drawn, in whole blocks."""
        return np.minimum(BLOCK * (1 + pairs // (4 * BLOCK)), self._num_pairs - pairs)

    def look(self, row: int, differing: int, pairs: int) -> None:
        test = self._tests[row]
        assert test is not None
        passed, outcome = test.look(self._passed[row : row + 1], [pairs - differing], [pairs])
        self._passed[row] = passed[0]
        self.open[row] = outcome[0] == UNDECIDED and pairs < self._num_pairs

    def conclude(self, differing: NDArray[np.int64], pairs: NDArray[np.int64]) -> _Certified:  # noqa: ARG002
        prediction = np.where(self._passed > 0, self._old.selected, ABSTAIN)
        return prediction, self._radii[self._passed], self._nulls[self._passed]


def changed_p_lower(
    p_lower: NDArray[np.float64],
    differing: NDArray[np.float64] | NDArray[np.int64],
    pairs: NDArray[np.int64],
    level: float,
) -> NDArray[np.float64]:
    """Return p_lower - U, at least 0, U the Clopper-Pearson upper bound at ``level`` on the one-sided difference.

    ``lower_bound`` rounds 1 - U down by 1e-10 of itself, which covers the subtraction and, under discrete noise,
    ``TOTAL_VARIATION``.
    """
    return np.maximum(p_lower - (1 - lower_bound(pairs - differing, pairs, level)), 0.0)


def _draw(
    old: SmoothedClassifier,
    new: SmoothedClassifier,
    pixels: LabelledPixels,
    selected: NDArray[np.int64],
    decision: _Fixed | _Sequential,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw pairs until no image is open, and return the numbers of differing pairs, pairs and votes, each (N,)."""
    differing, pairs, votes = (np.zeros(len(pixels), np.int64) for _ in range(3))
    rows = np.flatnonzero(decision.open)
    streams = dict(zip(rows, new.streams(seed, "certify-difference", [pixels.ids[row] for row in rows]), strict=True))
    while rows.size:
        added = decision.next_pairs(pairs[rows])
        owner = np.repeat(np.arange(len(rows)), added)
        parts = (
            part
            for row, number in zip(rows, added, strict=True)
            for part in noisy_copies(
                pixels.x[row].to(new.execution.device, torch.float32), int(number), new.noise, streams[row]
            )
        )
        left, lost = _compare(old, new, parts, torch.from_numpy(selected[rows][owner]))
        differing[rows] += np.bincount(owner[lost], minlength=len(rows))
        votes[rows] += added + np.bincount(owner[left], minlength=len(rows))
        pairs[rows] += added
        for row in rows:
            decision.look(int(row), int(differing[row]), int(pairs[row]))
        rows = np.flatnonzero(decision.open)
    new.recheck()
    old.recheck()
    return differing, pairs, votes


def _compare(
    old: SmoothedClassifier, new: SmoothedClassifier, parts: Iterator[Tensor], selected: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Compare two networks on noisy images, each with the class that an old certificate ``selected`` (R,).

    Returns:
        Whether ``new`` votes for another class, and whether ``old`` votes for the selected one where ``new`` does not,
        each bool (R,).
    """
    leaves: list[Tensor] = []

    def left_by_new() -> Iterator[Tensor]:
        start = 0
        for rows, logits in new.outputs(parts):
            leaves.append(logits.argmax(1).cpu() != selected[start : start + len(rows)])
            start += len(rows)
            yield rows[leaves[-1].to(rows.device)]

    old_classes = [logits.argmax(1).cpu() for _, logits in old.outputs(left_by_new())]
    left = torch.cat(leaves)
    lost = torch.zeros_like(left)
    if old_classes:
        lost[left] = torch.cat(old_classes) == selected[left]
    return left.numpy(), lost.numpy()


def _check_networks(certificates: Certificates, old: SmoothedClassifier, new: SmoothedClassifier) -> None:
    rule, classes = certificates.rule, certificates.selection.shape[1]
    if rule.exact:
        raise InputError("these certificates are exact, and leave no margin for a change: certify the new network")
    for name, network in (("old", old), ("new", new)):
        if (network.noise.name, network.sigma) != (rule.noise, rule.sigma):
            raise InputError(
                f"{name} is smoothed by {network.noise.name} noise of sigma {network.sigma:g}, the certificates by "
                f"{rule.noise} noise of sigma {rule.sigma:g}; both networks must have the noise of the certificates"
            )
        if network.num_classes != classes:
            raise InputError(f"{name} has {network.num_classes} classes, the certificates {classes}; they must agree")
    if certificates.model not in (None, old.fingerprint()):
        raise ModelError(
            "the certificates are not those of old: its weights, noise or execution differ from those that were "
            "certified; give the network that was certified"
        )


def _check_images(certificates: Certificates, pixels: LabelledPixels) -> None:
    if pixels.ids != certificates.ids:
        raise InputError(
            f"the {len(pixels)} images are not those of the {len(certificates)} certificates, by their ids; give "
            "the same images in the same order"
        )
    different = first_difference(certificates, pixels.ids, pixels.y.tolist(), pixel_ids(pixels.x))
    if different is not None:
        raise InputError(
            f"image {different!r} has another label or other pixels than in the certificates; give the images that "
            "were certified"
        )
