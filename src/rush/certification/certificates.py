"""Certificates of many images, and the statements about the classifier that follow from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rush.certification.rule import Rule
from rush.certification.sequential import CERTIFIED, ENDS, OUTCOMES, UNDECIDED
from rush.errors import InputError
from rush.runtime.extras import axes_or_new, data_frame
from rush.runtime.numbers import as_real
from rush.statistics import Interval, lower_bound, share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNKNOWN = -1


@dataclass(frozen=True, repr=False)
class Certificates:
    """Certificates of N images under one ``rule``.

    Attributes:
        prediction: int64 (N,), ABSTAIN (-1) where nothing is certified.
        radius: float64 (N,) in pixel units, 0.0 where nothing is certified. With a grid ``rule.radii`` it is the
            largest certified radius of the grid.
        p_lower: float64 (N,), lower bound on the probability of the selected class.
        num_samples: int64 (N,), selection and estimation together.
        counts: int64 (N, K), estimation votes. After recertification from the first votes of a path, classes other than
            the selected one are UNKNOWN (-1).
        blocks: for each image uint8 (B,), the votes for the selected class in each block of 100, or uint8 (B, K), those
            for every class, if ``rule.needs_every_class``.
        selection: int64 (N, K), selection votes. With the method ``exact`` these are the estimation votes.
        outcome: uint8 (N,), index into ``OUTCOMES``, of the radius after the certified one.
        seconds: float64 (N,).
        labels: int64 (N,).
        ids: ids of the images.
        rule: rule under which the images were certified.
        pixels: for each image the hash of its pixels (``data.checks.pixel_ids``), by which copies of one picture are
            recognized, None if the table was written without them.
        model: fingerprint of the smoothed classifier (``SmoothedClassifier.fingerprint``), None like ``pixels``.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    num_samples: NDArray[np.int64]
    counts: NDArray[np.int64]
    blocks: tuple[NDArray[np.uint8], ...]
    selection: NDArray[np.int64]
    outcome: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    rule: Rule
    pixels: tuple[str, ...] | None = None
    model: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sigma(self) -> float:
        return self.rule.sigma

    @property
    def alpha(self) -> float:
        return self.rule.alpha

    @property
    def num_selection(self) -> int:
        return self.rule.num_selection

    @property
    def num_estimation(self) -> int:
        """Estimation samples per image. The largest number if the rule is sequential."""
        return self.rule.num_estimation

    @property
    def selected(self) -> NDArray[np.int64]:
        """The tested class, int64 (N,): the one with the most selection votes, the lowest in case of a tie."""
        return self.selection.argmax(1).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the label's class is certified, bool (N,)."""
        return self.prediction == self.labels

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """Whether nothing is certified, bool (N,)."""
        return self.prediction < 0

    @property
    def largest_radius(self) -> float:
        """The largest radius that an image can be certified at under the rule."""
        return self.rule.largest_radius

    def certified(self, radius: float = 0.0) -> NDArray[np.bool_]:
        """Return whether each image is certified with the correct class and a radius >= ``radius``, (N,)."""
        return certified_correctly(self.correct, self.radius, radius)

    def accuracy(self, radius: float = 0.0) -> float:
        """Return the certified accuracy: the share of images certified correctly with a radius >= ``radius``.

        Between two radii of a grid it is the accuracy at the larger one.
        """
        return float(self.certified(radius).mean())

    def accuracy_interval(self, radius: float = 0.0) -> Interval:
        """Return the certified accuracy over pictures with its exact 95 % interval.

        Each picture counts once, as certified only if all of its copies are.
        """
        return self.share(self.certified(radius))

    def share(self, flags: NDArray[np.bool_]) -> Interval:
        """Return the share of pictures whose copies all have ``flags`` (N,), with its exact 95 % interval."""
        pictures = of_pictures(flags, self.pixels)
        return share_interval(int(pictures.sum()), len(pictures))

    def accuracy_lower(self, radius: float = 0.0, confidence: float = 0.95) -> float:
        """Return a lower bound on the true certified accuracy, over the draw of the images *and* the noise.

        The true certified accuracy is a = P(g(X) = Y and the exact radius of the smoothed classifier at X is >=
        ``radius``) for (X, Y) from the distribution of the images. Copies of one picture (equal ``pixels``) count as
        one draw, which is certified correctly only if all of its copies are. Without ``pixels``, copies cannot be
        recognized.

        Assumption: the pictures are independent draws from the distribution, and each image has its own noise (their
        ids differ).

        Proof: whether a picture is certified correctly is then an independent coin of probability s. Either the picture
        is one of those counted by a, or its first copy has a false certificate, which has probability at most alpha_i,
        the level of a single certificate, given the picture. Further copies can only turn a success into a failure. So
        s <= a + (1 - a) alpha_i, and a >= (s - alpha_i) / (1 - alpha_i). With the Clopper-Pearson bound in place of s,
        the inequality holds with probability >= ``confidence``. No correction for the number of pictures is needed.

        Raises:
            InputError: ``confidence`` is not in (0, 1), or an id is a duplicate.
        """
        if not 0 < confidence < 1:
            raise InputError(f"confidence must lie in (0, 1), got {confidence!r}")
        if len(set(self.ids)) < len(self.ids):
            raise InputError("duplicate image id: the bound assumes independent images")
        share = float(lower_bound(*self.certified_pictures(radius), 1 - confidence))
        return max(0.0, (share - self.rule.image_alpha) / (1 - self.rule.image_alpha))

    def certified_pictures(self, radius: float = 0.0) -> tuple[int, int]:
        """Return the numbers of distinct pictures with all copies certified correctly at ``radius``, and of all.

        Without ``pixels`` every image is a picture.
        """
        pictures = of_pictures(self.certified(radius), self.pixels)
        return int(pictures.sum()), len(pictures)

    @property
    def num_copies(self) -> int | None:
        """Number of images beyond the first of each picture, or None without ``pixels``."""
        return None if self.pixels is None else len(self) - len(set(self.pixels))

    @property
    def num_pictures(self) -> int:
        """Number of distinct pictures, or of images where ``pixels`` is None."""
        return len(self) - (self.num_copies or 0)

    def decision(self, radius: float) -> NDArray[np.str_]:
        """Return the outcome for each image at ``radius``, (N,): one of ``OUTCOMES``.

        "certified" means with the selected class. "not certifiable" is wrong for an image with probability at most the
        rule's level ``futility``, and "given up" says nothing about the radius (``Rule.stopping``). A fixed number of
        samples leaves everything undecided that it does not certify.
        """
        certified = (self.prediction >= 0) & (self.radius >= radius)
        grid = np.array([*(self.rule.radii or ()), np.inf])
        passed = np.where(self.prediction >= 0, np.searchsorted(grid[:-1], self.radius, side="right"), 0)
        given_up = np.isin(self.outcome, list(ENDS.values())) & (radius >= grid[passed])
        return np.array(OUTCOMES)[np.where(certified, CERTIFIED, np.where(given_up, self.outcome, UNDECIDED))]

    def other_shares(self, radius: float) -> dict[str, Interval] | None:
        """Return how the images divide at ``radius``, except for those certified with the right class.

        These are the shares of images certified with a class other than the label, given up, and undecided, each with
        its exact 95 % interval. The result is None with a fixed number of samples, where nothing is given up.
        """
        if self.rule.method != "sequential":
            return None
        decision = self.decision(radius)
        ended = OUTCOMES[ENDS[self.rule.stopping]]
        rows = {
            "wrong class": (decision == OUTCOMES[CERTIFIED]) & ~self.correct,
            ended: decision == ended,
            OUTCOMES[UNDECIDED]: decision == OUTCOMES[UNDECIDED],
        }
        return {name: share_interval(int(chosen.sum()), len(self)) for name, chosen in rows.items()}

    @property
    def table_radii(self) -> tuple[float, ...]:
        """Radii at which certified accuracy is tabulated: the grid, or the multiples of sigma / 2 within reach."""
        halves = range(int(2 * self.largest_radius / self.sigma) + 1)
        return self.rule.radii or tuple(half * self.sigma / 2 for half in halves)

    @property
    def acr(self) -> float:
        """Average certified radius, in which wrong and abstained images count 0.

        It depends on ``num_estimation``. With ``rule.radii`` it is the average over that grid. Print it with
        ``acr_name``.
        """
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def acr_name(self) -> str:
        """Name of ``acr``: "ACR", or "grid ACR" if the radii are those of a grid."""
        return "ACR" if self.rule.radii is None else "grid ACR"

    def to_dict(self, radii: Sequence[float] | None = None) -> dict[str, Any]:
        """Return the figures as plain numbers and text, shares of pictures as fractions with exact 95 % intervals.

        ``rush certify --json`` prints it. ``true_at_least`` is ``accuracy_lower`` with 95 % confidence.

        Args:
            radii: radii at which accuracies are given, ``table_radii`` by default.
        """
        rule = self.rule
        return {
            "images": len(self),
            "copies": self.num_copies,
            **{name: getattr(rule, name) for name in ("noise", "sigma", "norm", "method", "bound", "alpha", "level")},
            "num_selection": self.num_selection,
            "num_estimation": self.num_estimation,
            "samples_per_image": float(self.num_samples.mean()),
            "abstained": int(self.abstained.sum()),
            "undecided": int((self.outcome == UNDECIDED).sum()),
            "acr": self.acr,
            "accuracy": [
                {
                    "radius": float(radius),
                    "certified": asdict(self.accuracy_interval(radius)),
                    "true_at_least": self.accuracy_lower(radius),
                }
                for radius in (self.table_radii if radii is None else radii)
            ],
            "statement": rule.statement,
        }

    def summary(self) -> str:
        """Return the figures as lines of text."""
        figures = self.to_dict()
        method = " with the bound ".join(dict.fromkeys((figures["method"], figures["bound"])))
        lines = [
            f"{figures['images']:,} images, {figures['noise']} noise of sigma {self.sigma:g}, {method}, "
            f"{figures['samples_per_image']:,.0f} samples per image",
            *(
                f"certified at {figures['norm']} {row['radius']:g}: {self.accuracy_interval(row['radius'])}"
                for row in figures["accuracy"]
            ),
            f"{self.acr_name} {self.acr:.4f}, {figures['abstained']:,} abstentions",
            figures["statement"],
        ]
        return "\n".join(lines)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per image.

        Its columns are id, label, prediction, radius, correct, p_lower, num_samples, outcome and seconds.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        columns = {
            "id": self.ids,
            "label": self.labels,
            "prediction": self.prediction,
            "radius": self.radius,
            "correct": self.correct,
            "p_lower": self.p_lower,
            "num_samples": self.num_samples,
            "outcome": np.array(OUTCOMES)[self.outcome],
            "seconds": self.seconds,
        }
        return data_frame(columns)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Plot certified accuracy against the radius, with the exact 95 % interval, and return the axes.

        Args:
            axes: axes of matplotlib, by default those of a new figure.
        """
        radii = np.linspace(0, self.largest_radius, 201) if self.rule.radii is None else np.array(self.rule.radii)
        shares = [self.accuracy_interval(radius) for radius in radii]
        axes = axes_or_new(axes)
        step: Literal["pre", "post"] = (
            "post" if self.rule.radii is None else "pre"
        )  # between two radii of a grid the larger one counts
        name = f"sigma {self.sigma:g}, {self.rule.noise}"
        (line,) = axes.step(radii, [share.estimate for share in shares], where=step, label=name)
        lows, highs = ([getattr(share, end) for share in shares] for end in ("low", "high"))
        axes.fill_between(radii, lows, highs, step=step, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set(xlabel=f"{self.rule.norm} radius", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, None))
        return axes

    def __repr__(self) -> str:
        first, *_ = self.table_radii
        return (
            f"Certificates({len(self)} images, {self.rule.noise} noise, sigma {self.sigma:g}, {self.rule.method}: "
            f"{self.accuracy(first):.1%} at {self.rule.norm} {first:g}, {self.acr_name} {self.acr:.3f})"
        )

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> "Certificates":
        """Return the certificates of ``rows``, in their order. The rule, and so the size of the family, stays."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in _ARRAYS}
        blocks, ids = (tuple(getattr(self, name)[row] for row in rows) for name in ("blocks", "ids"))
        pixels = None if self.pixels is None else tuple(self.pixels[row] for row in rows)
        return replace(self, **arrays, blocks=blocks, ids=ids, pixels=pixels)


def certified_correctly(correct: NDArray[np.bool_], certified: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Return which images have the ``correct`` class and a ``certified`` radius >= ``radius``, each (N,)."""
    number = as_real(radius)
    if number is None or number < 0:
        raise InputError(f"radius must be a finite number >= 0 in [0, 1] pixel units, got {radius!r}")
    return correct & (certified >= number)


def join_certificates(parts: Sequence[Certificates]) -> Certificates:
    """Concatenate certificates. Raises: InputError unless all have one rule and one model."""
    if any(part.rule != parts[0].rule for part in parts):
        raise InputError("certificates of different rules cannot be joined; certify all images under one rule")
    if any(part.model != parts[0].model for part in parts):
        raise InputError("certificates of different models cannot be joined; certify all images with one model")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    blocks = tuple(path for part in parts for path in part.blocks)
    ids = tuple(image_id for part in parts for image_id in part.ids)
    known = all(part.pixels is not None for part in parts)
    pixels = tuple(picture for part in parts for picture in part.pixels or ()) if known else None
    return replace(parts[0], **arrays, blocks=blocks, ids=ids, pixels=pixels)


def first_difference(
    certificates: Certificates, ids: Sequence[str], labels: Sequence[int], pixels: Sequence[str]
) -> str | None:
    """Return the id of the first image whose label or pixels differ in ``certificates``, or None if there is none.

    Images that are not in both are ignored.
    """
    rows = {image_id: row for row, image_id in enumerate(certificates.ids)}
    for image_id, label, picture in zip(ids, labels, pixels, strict=True):
        row = rows.get(image_id)
        if row is None:
            continue
        certified = picture if certificates.pixels is None else certificates.pixels[row]
        if (label, picture) != (certificates.labels[row], certified):
            return image_id
    return None


def of_pictures(flags: NDArray[np.bool_], pixels: Sequence[str] | None) -> NDArray[np.bool_]:
    """Return for each distinct picture whether ``flags`` (N,) holds for all of its copies.

    ``pixels`` names the picture of each image. Without it ``flags`` is returned.
    """
    if pixels is None:
        return flags
    _, picture = np.unique(np.array(pixels, object), return_inverse=True)
    failed = np.zeros(picture.max(initial=-1) + 1, bool)
    failed[picture[~flags]] = True
    return ~failed


_ARRAYS = tuple(
    field.name for field in fields(Certificates) if field.name not in ("blocks", "ids", "rule", "pixels", "model")
)
