"""Discrete Gaussian noise: exact draws, exact sums, and certificates that float noise would make false."""

import math

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import rush
from rush.attacks.threat import ThreatModel, norms
from rush.certification.rule import Rule, make_rule
from rush.choices import TOTAL_VARIATION, Norm
from rush.errors import InputError
from rush.evaluation.attack import verdict
from rush.runtime.randomness import stream
from rush.smoothing import discrete
from rush.smoothing.discrete import DiscreteGaussian, levels_of

CPU = torch.device("cpu")
SIGMAS = (0.12, 0.25, 1.0)


def pmf(sigma: float, values: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(k = value), by survival functions, which keep their digits in both tails."""
    size = np.abs(values)
    lower, upper = stats.norm.sf((size - 0.5) / (255 * sigma)), stats.norm.sf((size + 0.5) / (255 * sigma))
    return lower - upper


def draws_by_cell(sigma: float, number: int, seed: int = 0) -> NDArray[np.int64]:
    return DiscreteGaussian(sigma).integers(torch.empty(number), stream(seed, "draws")).long().numpy()


def draws_by_search(sigma: float, number: int, seed: int = 0) -> NDArray[np.int64]:
    """Draws as on a device on which every uniform is drawn with all of its bits."""
    generator = stream(seed, "draws")
    high, low = (discrete._uniform(number, 60, generator) for _ in range(2))
    return discrete._thresholds(sigma, CPU).count(high, low).long().numpy()


def chi_square(drawn: NDArray[np.int64], sigma: float) -> float:
    """The p-value of Pearson's test against the exact probabilities; values expected less than 20 times are pooled."""
    last = int(12 * 255 * sigma) + 1
    expected = pmf(sigma, np.arange(-last, last + 1)) * len(drawn)
    observed = np.bincount(drawn + last, minlength=2 * last + 1)
    common = expected >= 20
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


class LastBits(nn.Module):
    """Class 1 where some pixel |z| < 2^-(k + 1) is not a multiple of 2^-(k + 23) (after Voracek and Hein 2023).

    Around 0, float32 noise has finer bits than around 2^-k.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).double()
        scaled = z * 2.0 ** (self.k + 23)
        fine = ((z.abs() < 2.0 ** -(self.k + 1)) & (scaled != scaled.round())).any(1)
        return torch.stack([~fine, fine], 1).float()


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_thresholds_are_exact_to_120_bits(sigma: float) -> None:
    thresholds = discrete._thresholds(sigma, CPU)
    with mpmath.workprec(400):
        for index in range(0, 2 * thresholds.largest, 41):
            z = mpmath.mpf(2 * (index - thresholds.largest) + 1) / (510 * mpmath.mpf(sigma))
            exact = int(mpmath.nint(mpmath.ncdf(z) * mpmath.mpf(2) ** 120))
            assert (int(thresholds.high[index]) << 60) + int(thresholds.low[index]) == exact


@pytest.mark.parametrize("sigma", [*SIGMAS, 14.0, 1e-3, 1e-4])
def test_the_bound_on_the_total_variation_is_that_of_the_tails(sigma: float) -> None:
    thresholds = discrete._thresholds(sigma, CPU)
    assert (thresholds.high.diff() > 0).all()
    with mpmath.workprec(400):
        beyond = 2 * mpmath.ncdf(-mpmath.mpf(2 * thresholds.largest + 1) / (510 * mpmath.mpf(sigma)))
        rounding = thresholds.largest * mpmath.mpf(2) ** -120
        assert 0.999 * float(beyond) < thresholds.total_variation
        assert thresholds.total_variation <= max(float(beyond + rounding) * 1.001, 2.0**-74)
    assert DiscreteGaussian(sigma).total_variation(3072) < TOTAL_VARIATION


@pytest.mark.parametrize("sigma", [*SIGMAS, 1e-3, 1e-4])
def test_sixteen_bits_decide_what_all_bits_decide(sigma: float) -> None:
    """Both ends of every cell, which ``count`` takes in full, against the table by which most values are drawn."""
    thresholds = discrete._thresholds(sigma, CPU)
    first = torch.arange(1 << 16) << 44
    last = first + (1 << 44) - 1
    low, high = torch.zeros_like(first), torch.full_like(first, (1 << 60) - 1)
    smallest, largest = thresholds.count(first, low), thresholds.count(last, high)
    table = thresholds.by_cell
    decided = table > discrete._OPEN
    assert torch.equal(table[decided], smallest[decided])
    assert torch.equal(smallest[decided], largest[decided])
    assert (smallest[~decided] < largest[~decided]).all() or (thresholds.low == 0).any()
    open_index = (discrete._OPEN - table[~decided]).long()
    assert (thresholds.high[open_index] >> 44 == first[~decided] >> 44).all()


@pytest.mark.parametrize("draw", [draws_by_cell, draws_by_search])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_draws_have_the_exact_probabilities(draw: object, sigma: float) -> None:
    assert callable(draw)
    drawn = draw(sigma, 2_000_000)
    assert chi_square(drawn, sigma) > 1e-6
    assert np.abs(drawn).max() < 6.5 * 255 * sigma + 1  # odds of a larger one: 2e-4; in the tails many bits decide
    assert chi_square(drawn, sigma * 1.02) < 1e-6  # two percent less noise would be noticed
    assert chi_square(drawn[drawn != 3], sigma) < 1e-6  # and a value that is never drawn


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5])
def test_a_hundred_million_draws_have_the_exact_probabilities(sigma: float) -> None:
    drawn = np.concatenate([draws_by_cell(sigma, 10_000_000, seed) for seed in range(10)])
    assert chi_square(drawn, sigma) > 1e-6
    assert chi_square(drawn, sigma * 1.003) < 1e-6


def test_equal_generators_draw_equal_noise_and_advance() -> None:
    noise, first, second = DiscreteGaussian(0.25), stream(0, "a"), stream(0, "a")
    one = noise.sample((3, 4), first)
    assert torch.equal(one, noise.fill(torch.empty(3, 4), second))
    assert not torch.equal(one, noise.sample((3, 4), first))


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("shape", [(1,), (2, 1, 3, 7), (16, 3, 8, 8), (2, 3, 110, 110)])
def test_images_drawn_together_have_the_noise_that_each_has_alone(rows: int, shape: tuple[int, ...]) -> None:
    """Twice in a row, into every other row of memory; 40 of the third shape are drawn in two parts."""
    noise = DiscreteGaussian(1.0)
    alone, together = ([stream(0, "together", str(row)) for row in range(rows)] for _ in range(2))
    out = torch.full((rows, 2, *shape), torch.nan)
    for _ in range(2):
        noise.fill_each(out[:, 1], together)
        expected = [noise.sample(shape, generator) for generator in alone]
        assert all(torch.equal(row, each) for row, each in zip(out[:, 1], expected, strict=True))
    assert out[:, 0].isnan().all()


def test_every_integer_sum_reaches_the_network_as_one_float() -> None:
    pixels = (torch.arange(256).repeat(12).view(3, 32, 32)) / 255
    noisy = DiscreteGaussian(0.25).add(pixels, torch.empty(100, 3, 32, 32), stream(0, "sums"))
    sums = (255 * noisy.double()).round()
    assert torch.equal(noisy, (sums / 255).float())
    added = (pixels + DiscreteGaussian(0.25).sample((100, 3, 32, 32), stream(0, "sums"))).double()
    assert torch.equal((255 * added).round(), sums)
    assert len(added.unique()) > len(sums.unique()) == len(noisy.unique())  # added in float32 they are not


@pytest.mark.parametrize("scale", [lambda n: n / 255, lambda n: n * (1 / 255), lambda n: (n.double() / 255).float()])
def test_pixels_of_8_bit_images_may_be_rounded(scale: object) -> None:
    assert callable(scale)
    levels = torch.arange(256).float()
    assert torch.equal(levels_of(scale(levels)), levels)


def test_pixels_off_the_grid_are_refused_at_every_door() -> None:
    smoothed = rush.SmoothedClassifier(LastBits(7), noise=DiscreteGaussian(0.25), num_classes=2)
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    doors = (
        lambda: rush.certify(smoothed, (x, y)),
        lambda: smoothed.predict(x),
        lambda: rush.attack(smoothed, (x, y), ThreatModel("l2", 0.5), "pgd"),
        lambda: verdict(smoothed, (x.round(), y), x, ThreatModel("linf", 0.6)),
    )
    for door in doors:
        with pytest.raises(InputError, match=r"8-bit images.* 0\.002 away from"):
            door()


def test_sizes_and_deviations_for_which_the_bounds_leave_no_room_are_refused() -> None:
    noise = DiscreteGaussian(8.0)
    assert noise.total_variation(4_000_000) > TOTAL_VARIATION
    with pytest.raises(InputError, match="4,000,000 values per image"):
        noise.check(torch.zeros(1, 1, 2000, 2000))
    noise.check(torch.zeros(1, 3, 60, 60))
    with pytest.raises(InputError, match="at most 14"):
        DiscreteGaussian(14.5)


# --- certificates -----------------------------------------------------------------------------------------------------


def test_float_noise_gives_false_certificates_and_discrete_noise_none() -> None:
    """Five almost black images are certified as class 1 at 0.7, but 3/255 on every pixel makes them class 0."""
    x = torch.zeros(5, 3, 32, 32)
    x[:, 0, 0, :5] = torch.arange(1, 6)[:, None] / 255
    y, near = torch.ones(5, dtype=torch.int64), torch.full_like(x, 3 / 255)
    distance = norms(near, x, "l2")
    for noise, label in ((rush.Gaussian(0.25), 1), (DiscreteGaussian(0.25), 0)):
        smoothed = rush.SmoothedClassifier(LastBits(7), noise=noise, num_classes=2)
        certificates = rush.certify(smoothed, (x, y), num_estimation=10_000)
        assert (certificates.prediction == label).all()
        assert (torch.from_numpy(certificates.radius) > distance).all()
        at = smoothed.counts(near, 1000, smoothed.streams(0, "near", [str(row) for row in range(5)]))
        assert (at[:, 0] == 1000).all()  # class 0 always: the certificates of class 1 are false
    broken = verdict(smoothed, (x, y * 0), near, ThreatModel("l2", 0.7)).broken
    assert not broken.any()


class AtLeast(nn.Module):
    """Class 1 where the first pixel is at least ``level`` / 255, class 0 elsewhere."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.threshold = (level - 0.5) / 255
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        above = x[:, 0, 0, 0] > self.threshold
        return torch.stack([~above, above], 1).float()


@pytest.mark.parametrize("method", ["clopper-pearson", "sequential"])
def test_certificates_of_a_known_classifier_never_exceed_its_distance(method: str) -> None:
    """The smoothed classifier changes its class exactly at 128 levels. A radius r reaches floor(255 r) levels."""
    smoothed = rush.SmoothedClassifier(AtLeast(128), noise=DiscreteGaussian(0.25), num_classes=2)
    levels = torch.tensor([0, 40, 100, 126, 127, 128, 129, 150, 200, 255])
    x, y = (levels / 255).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(), (levels >= 128).long()
    certificates = rush.certify(smoothed, (x, y), method=method, num_estimation=20_000, alpha=1e-6)
    levels_away = np.where(levels >= 128, levels - 127, 128 - levels)
    assert (certificates.prediction[[0, 1, 2, 7, 8, 9]] == y.numpy()[[0, 1, 2, 7, 8, 9]]).all()
    assert (np.floor(255 * certificates.radius) < levels_away).all()
    exact = stats.norm.cdf((levels_away - 0.5) / 63.75)
    assert (certificates.p_lower <= np.where(certificates.prediction >= 0, exact, 1)).all()


def test_a_rule_says_its_noise_and_older_rules_mean_gaussian() -> None:
    given = {"sigma": 0.25, "method": "sequential", "alpha": 0.001, "level": "image", "num_images": 1}
    given |= {"num_selection": 100, "num_estimation": 10_000, "radii": (0.0, 0.25), "futility": 0.05}
    drawn, gaussian = make_rule(**given, noise="discrete"), make_rule(**given)
    assert Rule.from_json(drawn.to_json()) == drawn != gaussian
    assert Rule.from_json(gaussian.to_json().replace(',"noise":"gaussian"', "")) == gaussian
    assert drawn.null_probability(0.25) == gaussian.null_probability(0.25) + TOTAL_VARIATION
    with pytest.raises(InputError, match="unknown noise 'cauchy'; allowed: gaussian, discrete"):
        make_rule(**given, noise="cauchy")


# --- attacks ----------------------------------------------------------------------------------------------------------


def random_points(norm: Norm, epsilon: float) -> tuple[Tensor, Tensor, ThreatModel]:
    x = torch.randint(0, 256, (50, 3, 8, 8), generator=stream(0, "x")) / 255
    threat = ThreatModel(norm, epsilon)
    generators = [stream(0, "points", row) for row in range(len(x))]
    return threat.random_points(x, generators, 1, surface=True)[:, 0], x, threat


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8 / 255), ("linf", 8.7 / 255), ("l2", 0.25), ("l1", 2.0)])
def test_rounded_points_are_8_bit_images_in_the_ball_and_lose_little(norm: Norm, epsilon: float) -> None:
    points, x, threat = random_points(norm, epsilon)
    rounded = threat.on_grid(points, x)
    assert torch.equal(rounded, levels_of(rounded) / 255)
    assert ((rounded >= 0) & (rounded <= 1)).all()
    assert (norms(rounded, x, norm) <= epsilon * (1 + 1e-5)).all()
    assert torch.equal(threat.on_grid(rounded, x), rounded)
    towards = x + (255 * (points - x)).trunc() / 255  # what is always in the ball
    assert (norms(rounded, points, "l2") <= norms(towards, points, "l2") + 1e-6).all()
    assert norms(rounded, x, norm).mean() > 0.97 * epsilon - (norm == "linf") * 0.7 / 255


def test_the_pixels_moved_back_are_those_that_rounding_enlarged_most() -> None:
    x = torch.zeros(1, 1, 1, 4)
    points = torch.tensor([1.5001, 1.6, 1.9, 0.4]).view(1, 1, 1, 4) / 255
    size = math.sqrt(sum(value**2 for value in (1.5001, 1.6, 1.9, 0.4))) / 255
    rounded = levels_of(ThreatModel("l2", size).on_grid(points, x)).flatten().tolist()
    assert rounded == [1.0, 1.0, 2.0, 0.0]  # (2, 2, 2, 0) and (1, 2, 2, 0) are too far: 12 and 9 > 8.58
