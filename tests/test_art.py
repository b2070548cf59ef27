"""Certificates against those of the Adversarial Robustness Toolbox (ART): the same statement, other code, other noise.

The exact p-values and the variance of a difference of votes are those of the hypergeometric distribution: when two
samples of n votes come from one classifier, the votes of the first, given those of both together, are
Hypergeometric(2n, votes of both, n), whatever the unknown probability is.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import rush
from exact_models import square_half_space, square_images
from rush.certification.certify import Certificates
from rush.data.sources import load_images
from rush.runtime.execution import Execution
from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier

SIGMA, ALPHA, SELECTION, ESTIMATION = 0.25, 1e-4, 150, 2000  # none a default of either library
TAIL = 1e-6
LIMIT = float(stats.norm.isf(TAIL / 2))

Votes = NDArray[np.int64]


@dataclass(frozen=True)
class Certified:
    """prediction and radius (N,) of one library; votes (N,): those the radius was computed from, -1 on abstention."""

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    votes: Votes


@pytest.fixture(scope="module")
def art_smoothing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ART's class. Its import writes settings into the user's home, so it is given another home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    return PyTorchRandomizedSmoothing


def _radii(sigma: float = SIGMA, alpha: float = ALPHA) -> NDArray[np.float64]:
    """The radius for 0, 1, ... ``ESTIMATION`` votes, from SciPy's beta and normal quantiles; 0 where none."""
    votes = np.arange(1, ESTIMATION + 1)
    p_lower = stats.beta.ppf(alpha, votes, ESTIMATION - votes + 1)
    return np.concatenate([[0.0], sigma * stats.norm.ppf(np.maximum(p_lower, 0.5))])


def _votes(radius: NDArray[np.float64], tolerance: float) -> Votes:
    """The votes behind each radius; asserts that it is the radius of a whole number of votes, to ``tolerance``."""
    table = _radii()
    votes = np.abs(radius[:, None] - table).argmin(1)
    np.testing.assert_allclose(radius, table[votes], rtol=0, atol=tolerance)
    return np.where(radius > 0, votes, -1)


def _from_art(art_smoothing: Any, network: nn.Module, classes: int, x: Tensor) -> Certified:
    """ART's certificates. It draws from NumPy's global generator, for which a seeded one stands in."""
    noise = np.random.default_rng(0)
    start = noise.bit_generator.state
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(np.random, "normal", noise.normal)
        smoothed = art_smoothing(
            model=network,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=classes,
            device_type="cpu",
            sample_size=SELECTION,
            scale=SIGMA,
            alpha=ALPHA,
        )
        prediction, radius = smoothed.certify(x.numpy(), n=ESTIMATION, batch_size=ESTIMATION)
    assert noise.bit_generator.state != start
    assert ((prediction == ABSTAIN) == (radius == 0)).all()
    return Certified(prediction, radius, _votes(radius, 1e-9))


def _certificates(network: nn.Module, classes: int, x: Tensor, sigma: float, alpha: float) -> Certificates:
    smoothed = SmoothedClassifier(network, sigma, classes, execution=Execution(tile=1000))
    labelled = (x, torch.zeros(len(x), dtype=torch.int64))
    return rush.certify(smoothed, labelled, "clopper-pearson", SELECTION, ESTIMATION, alpha, seed=0)


def _from_rush(network: nn.Module, classes: int, x: Tensor) -> Certified:
    found = _certificates(network, classes, x, SIGMA, ALPHA)
    votes = _votes(found.radius, 1.01e-6)
    counted = np.take_along_axis(found.counts, found.selection.argmax(1)[:, None], 1)[:, 0]
    np.testing.assert_array_equal(votes, np.where(_radii()[counted] > 0, counted, -1))
    np.testing.assert_array_equal(found.prediction == ABSTAIN, votes < 0)
    return Certified(found.prediction, found.radius, votes)


def _deviations(first: Votes, second: Votes) -> NDArray[np.float64]:
    """Differences of the votes in standard errors, for the images that both certify and whose votes can vary."""
    both = first + second
    kept = (first >= 0) & (second >= 0) & (both < 2 * ESTIMATION)
    both = both[kept]
    variance = both * (2 * ESTIMATION - both) / (4 * (2 * ESTIMATION - 1))
    return (first[kept] - both / 2) / np.sqrt(variance)


def _pooled(deviations: NDArray[np.float64]) -> float:
    return float(deviations.sum() / np.sqrt(len(deviations)))


def _assert_equal_within_sampling_error(ours: Certified, theirs: Certified) -> None:
    """Odds of failing by chance for two equal classifiers: 3e-6, and less than ``ALPHA``^2 an image for its class."""
    certified = (ours.votes >= 0) & (theirs.votes >= 0)
    np.testing.assert_array_equal(ours.prediction[certified], theirs.prediction[certified])
    first, both = ours.votes[certified], (ours.votes + theirs.votes)[certified]
    drawn = stats.hypergeom(2 * ESTIMATION, both, ESTIMATION)
    p_value = 2 * np.minimum(drawn.cdf(first), drawn.sf(first - 1))
    assert p_value.min() >= TAIL / certified.sum()
    deviations = _deviations(ours.votes, theirs.votes)
    assert abs(_pooled(deviations)) < LIMIT
    assert (deviations**2).sum() < stats.chi2.isf(TAIL, len(deviations))


STEEP = 300


class Plane:
    """Certificates of both libraries on a half-space. ``STEEP`` images at probabilities of 0.88 to 0.97 on either side
    of it, where votes tell most about sigma; 10 on the plane, where every certificate is false; 30 near it."""

    def __init__(self, art_smoothing: Any) -> None:
        self.half_space = square_half_space()
        side = np.resize([1.0, -1.0], STEEP)
        steep, near = np.linspace(1.2, 1.9, STEEP) * side, np.linspace(-0.25, 0.25, 30)
        self.margins = SIGMA * np.concatenate([steep, np.zeros(10), near])
        self.x = square_images(self.margins, seed=0)
        self.probability = self.half_space.probability(self.x, SIGMA)
        self.theirs = _from_art(art_smoothing, self.half_space, 2, self.x)
        self.ours = _from_rush(self.half_space, 2, self.x)

    def chance_of_a_certificate(self) -> NDArray[np.float64]:
        """P(certified, for either class), (N,). The first class is selected when the selection ties."""
        fewest = np.flatnonzero(_radii() > 0)[0]
        of_1, of_0 = (stats.binom.sf(fewest - 1, ESTIMATION, p) for p in (self.probability, 1 - self.probability))
        selects_1 = stats.binom.sf(SELECTION // 2, SELECTION, self.probability)
        return selects_1 * of_1 + (1 - selects_1) * of_0


@pytest.fixture(scope="module")
def plane(art_smoothing: Any) -> Plane:
    return Plane(art_smoothing)


def test_certificates_of_a_half_space_equal_arts(plane: Plane) -> None:
    assert len(_deviations(plane.ours.votes, plane.theirs.votes)) >= STEEP
    _assert_equal_within_sampling_error(plane.ours, plane.theirs)


def test_certificates_of_a_network_equal_arts(art_smoothing: Any, digits_network: nn.Module) -> None:
    """Real images, from those where both abstain to those where nearly every vote agrees."""
    x = load_images("digits", split="test")[:40].pixels()
    theirs, ours = _from_art(art_smoothing, digits_network, 10, x), _from_rush(digits_network, 10, x)
    for found in (theirs, ours):
        assert len(np.unique(found.prediction)) >= 9
        assert {found.votes.min(), *(found.votes // 200)} >= {-1, 6, 7, 8, 9}
    _assert_equal_within_sampling_error(ours, theirs)


@pytest.mark.parametrize("library", ["ours", "theirs"])
def test_certificates_of_a_half_space_are_what_its_probabilities_say(plane: Plane, library: str) -> None:
    """Tells which library is wrong when they differ. Odds of failing by chance: 3e-6. Noise of a sigma 2 % off would
    pass with probability < 1e-9."""
    found: Certified = getattr(plane, library)
    exact = np.maximum(plane.probability, 1 - plane.probability)[:STEEP]
    deviations = (found.votes[:STEEP] - ESTIMATION * exact) / np.sqrt(ESTIMATION * exact * (1 - exact))
    assert abs(_pooled(deviations)) < LIMIT
    certified = found.votes >= 0
    right = (found.prediction == 1) == (plane.margins > 0)
    false = certified & (~right | (found.radius > np.abs(plane.margins)))
    assert false.sum() <= stats.binom.isf(TAIL, len(false), ALPHA)
    number = reduce(np.convolve, [np.array([1 - chance, chance]) for chance in plane.chance_of_a_certificate()])
    assert min(number[: certified.sum() + 1].sum(), number[certified.sum() :].sum()) > TAIL / 2


def test_noise_two_percent_off_is_caught(plane: Plane) -> None:
    """Our noise at 1.02 sigma against ART's at sigma. The expected pooled deviation, 8.3, is computed here; with
    probability < 4e-4 it is too small to be seen."""
    off = _certificates(plane.half_space, 2, plane.x[:STEEP], 1.02 * SIGMA, ALPHA)
    votes = off.counts.max(1)
    p, p_off = (stats.norm.cdf(np.abs(plane.margins[:STEEP]) / sigma) for sigma in (SIGMA, 1.02 * SIGMA))
    mean = (p + p_off) / 2
    expected = np.sqrt(ESTIMATION) * (p_off - p) / np.sqrt(2 * mean * (1 - mean))
    assert stats.norm.cdf(LIMIT - abs(_pooled(expected))) < 4e-4
    assert abs(_pooled(_deviations(votes, plane.theirs.votes[:STEEP]))) > LIMIT


@pytest.mark.parametrize(("sigma", "alpha"), [(1.02 * SIGMA, ALPHA), (SIGMA, 2 * ALPHA), (SIGMA, ALPHA / 2)])
def test_radii_of_another_sigma_or_level_are_caught(plane: Plane, sigma: float, alpha: float) -> None:
    """Radii are those of whole votes at the stated sigma and level, or of none: no luck is needed."""
    votes = plane.ours.votes[:STEEP]
    np.testing.assert_array_equal(_votes(_radii()[votes], 1.01e-6), votes)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _votes(_radii(sigma, alpha)[votes], 1.01e-6)
