"""Coverage: how often certificates of exactly known classifiers are false, for every bound, level and noise.

Each cell puts a class at the worst probabilities. Its votes are simulated and go through ``apply_rule``, or are those
of a network of one pixel that goes through ``rush.certify``. The number of false certificates must be within the
1 - 1e-6 quantile of the level, and within both quantiles of the exact probability, which is known in closed form for a
fixed number of votes and by dynamic programming for a sequential one. Planted mistakes must show.
"""

import itertools
import math
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import rush
from rush.certification import bounds
from rush.certification.apply_rule import apply_rule
from rush.certification.rule import Rule
from rush.choices import ABSTAIN, BLOCK, CERTIFIED_NORM, CertifyBound, Level, NoiseName
from rush.data.images import ImageSet
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.discrete import DiscreteGaussian
from rush.smoothing.noise import RealNoise, make_noise
from rush.statistics import lower_bound
from stored import rule_of
from test_sequential import exactly, single

ALPHA, TAIL, FAMILY = 0.05, 1e-6, 20
TRUE, ABOVE = 128.5 / 255, 0.503922  # the distance of a white pixel from a step, and the next radius of six decimals
SELECTION, FIXED, FUTILITY = 100, 100, 0.05
AGREEING = 90  # of the fixed number of votes, which certify about TRUE
SIMULATED, CERTIFIED = 2000, 500  # the caps of a sequential cell
Z = {SIMULATED: 2.5, CERTIFIED: 1.5}  # of its null, where the level is nearly used up
UNIT = {
    "gaussian": stats.norm(),
    "discrete": stats.norm(),
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "laplace": stats.laplace(scale=1 / math.sqrt(2)),
}
METHOD = {
    "clopper-pearson": "clopper-pearson", "two-classes": "clopper-pearson",
    "geometric": "sequential", "beta": "sequential",
}  # fmt: skip

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    bound: CertifyBound
    level: Level
    noise: NoiseName

    @property
    def alpha(self) -> float:
        """Level of one certificate."""
        return ALPHA if self.level == "image" else ALPHA / FAMILY

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def __str__(self) -> str:
        return f"{self.bound}-{self.level}-{self.noise}"


@dataclass(frozen=True)
class Place:
    """An image: probabilities of its classes, of which the last one is right within ``radius``.

    votes: of the estimation, at most.
    exact: the probability that a certificate is false, where it is known.
    """

    probabilities: tuple[float, ...]
    radius: float
    sigma: float
    votes: int
    exact: float | None = None


CELLS = [
    Cell(bound, level, noise)  # type: ignore[arg-type]
    for bound, level, noise in itertools.product(METHOD, ("image", "family"), UNIT)
    if bound != "two-classes" or CERTIFIED_NORM[noise] == "l2"  # type: ignore[index]
]
FEW = [
    Cell("clopper-pearson", "image", "laplace"),
    Cell("two-classes", "image", "discrete"),
    Cell("geometric", "family", "gaussian"),
    Cell("beta", "image", "uniform"),
]


@cache
def places(cell: Cell, cap: int) -> dict[str, Place]:
    """The places of a cell by name, those of a sequential one for at most ``cap`` votes.

    full: a hair below the probability that ``ABOVE`` needs, which is false.
    rounded: a hair above the bound of ``AGREEING`` votes. They are right, and false if their radius is rounded up.
    tie: two classes of equal probability, where every certificate is false.
    spread: one class against several.
    """
    return _sequential_places(cell, cap) if METHOD[cell.bound] == "sequential" else _fixed_places(cell)


def _sequential_places(cell: Cell, cap: int) -> dict[str, Place]:
    def exact(null: float, p: float) -> float:
        return exactly(single(null, cell.bound, cell.alpha, cap, FUTILITY), p, cap).passed  # type: ignore[arg-type]

    null = float(stats.norm.cdf(Z[cap]))
    sigma = ABOVE / UNIT[cell.noise].ppf(null)
    p = float(UNIT[cell.noise].cdf(TRUE / sigma))
    return {
        "full": Place((1 - p, p), TRUE, sigma, cap, exact(null, p)),
        "tie": Place((0.5, 0.5), 0.0, 0.25, cap, exact(0.5, 0.5)),
    }


def _fixed_places(cell: Cell) -> dict[str, Place]:
    """With two classes and the bound for them, both bounds fail together, at half of the level."""
    law, two = UNIT[cell.noise], cell.bound == "two-classes"
    agreeing = np.arange(1, FIXED + 1)
    lower = stats.beta.ppf(cell.alpha / (1 + two), agreeing, FIXED - agreeing + 1)
    unit = law.ppf(lower[AGREEING - 1])
    beyond, within = ABOVE * (1 + 1e-8) / unit, TRUE * (1 - 1e-8) / unit
    made = {"tie": Place((0.5, 0.5), 0.0, 0.25, FIXED, float(stats.binom.sf(np.sum(lower <= 0.5), FIXED, 0.5)))}
    for name, sigma, right in (("full", beyond, AGREEING - 1), ("rounded", within, AGREEING)):
        p = float(law.cdf(TRUE / sigma))
        made[name] = Place((1 - p, p), TRUE, sigma, FIXED, float(stats.binom.sf(right, FIXED, p)))
    if two:
        for number, probabilities in enumerate([(0.2, 0.3, 0.5), (*[0.7 / 19] * 19, 0.3)]):
            gap = stats.norm.ppf(probabilities[-1]) - stats.norm.ppf(probabilities[-2])
            made[f"spread {number}"] = Place(probabilities, 0.25 / 2 * gap, 0.25, FIXED)
    return made


def given_at(cell: Cell, place: Place) -> dict[str, Any]:
    """Arguments of a rule and of ``rush.certify``."""
    grid = (0.0, ABOVE) if place.radius else (0.0,)
    return {
        "method": METHOD[cell.bound], "bound": cell.bound, "level": cell.level, "alpha": ALPHA, "futility": FUTILITY,
        "radii": grid if METHOD[cell.bound] == "sequential" else None,
        "num_selection": SELECTION, "num_estimation": place.votes,
    }  # fmt: skip


def false_at(place: Place, prediction: NDArray[np.int64], radius: NDArray[np.float64]) -> Bools:
    """Which certificates are false: of a wrong class, or of a radius that is too large."""
    right = prediction == len(place.probabilities) - 1
    return (prediction != ABSTAIN) & (~right | (radius > place.radius) | (place.radius == 0))


def simulated(cell: Cell, place: Place, draws: int) -> Bools:
    """Which of ``draws`` certificates are false whose votes are drawn from exact probabilities."""
    rule = rule_of(**given_at(cell, place), sigma=place.sigma, noise=cell.noise, num_images=FAMILY)
    rng = np.random.default_rng(cell.seed)
    selection = rng.multinomial(SELECTION, place.probabilities, draws)
    votes = rng.multinomial(BLOCK, place.probabilities, (draws, rule.num_estimation // BLOCK))
    paths = votes[np.arange(draws), :, selection.argmax(1)].astype(np.uint8)
    lengths = np.full(draws, rule.num_estimation)
    certified = apply_rule(rule, [*paths], lengths, selection, votes.sum(1))[0]
    return false_at(place, certified.prediction, certified.radius)


class Step(nn.Module):
    """Class 1 where the pixel is above ``threshold``. With ``grid``, also where it is not the float of an integer sum.

    Under discrete noise every pixel is one, so that both give the same votes.
    """

    def __init__(self, threshold: float, grid: bool) -> None:
        super().__init__()
        self.threshold, self.grid = threshold, grid
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, 0]
        above = pixel > self.threshold
        if self.grid:
            above |= pixel != (255 * pixel).round().div(255)
        return torch.stack([~above, above], 1).float()


def through_certify(cell: Cell, place: Place, draws: int) -> Bools:
    """Which of ``draws`` certificates of ``rush.certify`` are false, of a network of one pixel."""
    threshold = 1 - TRUE if place.radius else 1.0
    network = Step(threshold, cell.noise == "discrete")
    smoothed = rush.SmoothedClassifier(network, noise=make_noise(cell.noise, place.sigma), num_classes=2)
    ids, ones = np.arange(draws).astype(str), torch.ones(draws, dtype=torch.int64)
    images = ImageSet(torch.full((draws, 1, 1, 1), 255, dtype=torch.uint8), ones, ("0", "1"), ids, "step", "test")
    size = draws if cell.level == "image" else FAMILY
    false = []
    for first in range(0, draws, size):
        found = rush.certify(smoothed, images[first : first + size], **given_at(cell, place), seed=cell.seed)
        false.append(false_at(place, found.prediction, found.radius))
    return np.concatenate(false)


def counted(cell: Cell, false: Bools) -> tuple[int, int, int]:
    """False certificates, or families with one; of how many; and how many the level allows."""
    failures = false if cell.level == "image" else false.reshape(-1, FAMILY).any(1)
    return int(failures.sum()), len(failures), int(stats.binom.isf(TAIL, len(failures), ALPHA))


def covers(cell: Cell, place: Place, false: Bools) -> bool:
    """Whether the level is kept, and the exact probability of a failure met from both sides. By chance not: 3e-6."""
    failures, trials, allowed = counted(cell, false)
    if place.exact is None:
        return failures <= allowed
    exact = place.exact if cell.level == "image" else 1 - (1 - place.exact) ** FAMILY
    low, high = stats.binom.isf([1 - TAIL, TAIL], trials, exact)
    return exact <= ALPHA and failures <= allowed and bool(low <= failures <= high)


def certified_places(cell: Cell) -> dict[str, Place]:
    """The places that a network of one pixel can take. A sum of integers never meets its threshold."""
    beyond = {"spread 0", "spread 1"} | ({"tie"} if cell.noise == "discrete" else set())
    return {name: place for name, place in places(cell, CERTIFIED).items() if name not in beyond}


# ---- Levels.


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_levels_are_kept(cell: Cell) -> None:
    """10,000 simulated certificates at each place, and 400 through ``rush.certify``."""
    for name, place in places(cell, SIMULATED).items():
        assert covers(cell, place, simulated(cell, place, 10_000)), name
    place = places(cell, CERTIFIED)["full"]
    assert covers(cell, place, through_certify(cell, place, 400))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_all_levels_are_kept(cell: Cell) -> None:
    """100,000 simulated certificates at each place, and 2,000 through ``rush.certify``."""
    for name, place in places(cell, SIMULATED).items():
        assert covers(cell, place, simulated(cell, place, 100_000)), name
    for name, place in certified_places(cell).items():
        assert covers(cell, place, through_certify(cell, place, 2_000)), name


# ---- Planted mistakes. Places are computed before; each is missed by chance with probability < 1e-3, by the counts.


@pytest.mark.parametrize("bound", ["clopper-pearson", "two-classes", "geometric", "beta"])
def test_a_doubled_level_is_caught(bound: CertifyBound, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(bound, "image", "gaussian")
    place = places(cell, SIMULATED)["full"]
    assert covers(cell, place, simulated(cell, place, 10_000))
    monkeypatch.setattr(Rule, "image_alpha", 2 * ALPHA)
    assert not covers(cell, place, simulated(cell, place, 10_000))


@pytest.mark.parametrize("bound", ["clopper-pearson", "geometric"])
def test_a_family_whose_images_each_have_its_level_is_caught(
    bound: CertifyBound, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(bound, "family", "gaussian")
    place = places(cell, SIMULATED)["full"]
    monkeypatch.setattr(Rule, "image_alpha", ALPHA)
    assert not covers(cell, place, simulated(cell, place, 10_000))


def test_half_of_the_level_for_two_bounds_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("two-classes", "image", "gaussian")
    place = places(cell, SIMULATED)["full"]
    monkeypatch.setattr(bounds, "lower_bound", lambda successes, trials, half: lower_bound(successes, trials, 2 * half))
    assert not covers(cell, place, simulated(cell, place, 10_000))


@pytest.mark.parametrize("bound", ["clopper-pearson", "two-classes"])
def test_a_radius_rounded_up_is_caught(bound: CertifyBound, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(bound, "image", "gaussian")
    place = places(cell, SIMULATED)["rounded"]
    monkeypatch.setattr(bounds, "_rounded_down", lambda radius: np.ceil(1e6 * radius) / 1e6)
    assert not covers(cell, place, simulated(cell, place, 10_000))


def test_a_class_selected_on_the_votes_that_bound_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams are one, and both numbers of votes equal. Either of two equal classes may then be certified."""
    cell, streams = Cell("clopper-pearson", "image", "gaussian"), SmoothedClassifier.streams
    monkeypatch.setattr(SmoothedClassifier, "streams", lambda self, seed, _, ids: streams(self, seed, "one", ids))
    place = places(cell, CERTIFIED)["tie"]
    assert SELECTION == FIXED
    assert not covers(cell, place, through_certify(cell, place, 2_000))


def test_discrete_noise_that_is_added_in_float32_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("clopper-pearson", "image", "discrete")
    place = places(cell, CERTIFIED)["full"]
    monkeypatch.setattr(DiscreteGaussian, "add", RealNoise.add)
    assert not covers(cell, place, through_certify(cell, place, 400))
