"""Certificates through the whole pipeline, judged by classifiers whose probabilities are known exactly; the engine."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import rush
from certifying import METHODS, SIGMA, assert_same, certified, pixel_images, pixel_vote
from exact_models import (
    DOOR_TILES,
    HalfSpace,
    PixelVote,
    Recorder,
    bins_with,
    square_half_space,
    square_images,
)
from rush.certification.certificates import Certificates
from rush.certification.certify import certify_each
from rush.certification.sequential import CERTIFIED, GIVEN_UP, OUTCOMES, UNDECIDED
from rush.choices import CertifyMethod
from rush.data.checks import labelled_pixels
from rush.data.images import ImageSet
from rush.errors import InputError, ModelError
from rush.models.classifier import Normalize
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier
from stored import rule_of

ALPHA, TAIL = 0.05, 1e-6


def test_selection_estimation_and_images_share_no_noise() -> None:
    recorder = Recorder(square_half_space())
    x = square_images(np.array([0.3, -0.2, 0.0]), seed=0)
    rush.certify(
        SmoothedClassifier(recorder, SIGMA, 2), (x, torch.zeros(3, dtype=torch.int64)), "clopper-pearson", 60, 90
    )
    seen = torch.cat([recorder.inputs[0], *recorder.inputs[1 + DOOR_TILES :]])[:450]
    noise = [own - x[i] for i, own in enumerate(seen.split(150))]
    rounded = (torch.cat(noise) * 1e4).round().flatten(1)
    assert rounded.shape == (450, 4)
    assert len(rounded.unique(dim=0)) == 450
    assert rounded.abs().max() < 6e4 * SIGMA  # the rows are the images that they are taken for


def test_the_radius_is_in_pixel_units_when_the_classifier_normalizes() -> None:
    """A half-space behind a normalization by 0.1: its plane is ten times nearer in pixels than in its own units.

    Odds of failing by chance: 1e-9 for the upper limit (alpha), far less for the lower.
    """
    normalized = nn.Sequential(Normalize([0.5], [0.1]), HalfSpace(torch.full((1, 2, 2), 0.5), 0.0)).eval()
    x = square_images(np.array([0.3]), seed=0)
    certificates = rush.certify(
        SmoothedClassifier(normalized, SIGMA, 2), (x, torch.tensor([1])), num_estimation=20_000, alpha=1e-9
    )
    assert 0.27 < certificates.radius[0] <= 0.3


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest) -> Certificates:
    """40 images, all of them in flight, of which every outcome and several radii come."""
    certificates = certified(request.param, pixel_images(40))
    assert len({tuple(counts) for counts in certificates.counts.tolist()}) == 40
    assert 0.3 < (certificates.prediction != ABSTAIN).mean() < 1
    assert len(set(certificates.radius.tolist())) >= 4
    if request.param == "sequential":
        assert set(certificates.outcome.tolist()) == {CERTIFIED, GIVEN_UP, UNDECIDED}
        assert len(set(certificates.num_samples.tolist())) >= 4
    return certificates


@pytest.mark.parametrize("in_flight", [1, 2, 7, 64])
def test_certificates_depend_on_no_number_in_flight(whole: Certificates, in_flight: int) -> None:
    assert_same(certified(whole.rule.method, pixel_images(40), in_flight=in_flight), whole)


@pytest.mark.parametrize("tile", [7, 32, 100, 1000])
def test_certificates_depend_on_no_tile(whole: Certificates, tile: int) -> None:
    """Of a classifier whose logits are the same bits whatever the tile; the number in flight follows the tile."""
    other = certified(whole.rule.method, pixel_images(40), tile=tile)
    assert_same(other, whole, but="model")
    assert other.model != whole.model  # the tile is part of the execution


def test_certificates_depend_on_neither_order_nor_subset(whole: Certificates) -> None:
    x, y = pixel_images(40)
    for rows in (torch.randperm(40, generator=stream(0, "order")).tolist(), [7], [35, 2, 19], [*range(0, 40, 2)]):
        part = certified(whole.rule.method, (x[rows], y[rows]), in_flight=3)
        assert part.rule.num_images == len(rows)
        assert_same(part, whole, rows, but="rule")


def test_a_certificate_follows_the_seed_and_not_the_label(whole: Certificates) -> None:
    x, y = pixel_images(40)
    assert_same(certified(whole.rule.method, (x, (y + 1) % 4)), whole, but="labels")
    other = certified(whole.rule.method, (x, y), seed=4)
    assert (other.selection != whole.selection).any(1).sum() > 30
    assert (other.counts != whole.counts).any(1).sum() > 30


@pytest.mark.parametrize("num_selection", [1, 100, 250])
@pytest.mark.parametrize("method", METHODS)
def test_selection_and_estimation_are_drawn_from_streams_of_their_own(method: str, num_selection: int) -> None:
    """More votes for the selection leave those of the estimation as they are."""
    x, y = pixel_images(40)
    rows = list(range(25, 40))  # whose class is selected by any number of votes
    whole = certified(method, (x[rows], y[rows]), num_selection=30)
    found = certified(method, (x[rows], y[rows]), num_selection=num_selection)
    assert (found.selection.sum(1) == num_selection).all()
    alike = np.flatnonzero(found.selected == whole.selected).tolist()
    assert len(alike) >= 8
    but = "selection num_samples rule"
    assert_same(found.select(alike), whole, alike, but=but)
    assert (found.num_samples - num_selection == whole.num_samples - 30)[alike].all()


@pytest.mark.parametrize("method", METHODS)
def test_images_of_equal_pixels_share_their_noise_in_a_pair_and_not_in_an_image_set(method: str) -> None:
    x, y = pixel_images(40)
    twice = certified(method, (x[[20, 20]], y[[20, 20]]))
    assert_same(twice.select([0]), twice.select([1]))
    pixels = (255 * x[[20, 20]]).round().to(torch.uint8)
    images = ImageSet(pixels, y[[20, 20]], tuple("abcd"), np.array(["one", "other"]), "own", "test")
    found = rush.certify(pixel_vote(), images, method, 30, 1230)  # type: ignore[arg-type]
    assert found.ids == ("one", "other")
    assert (found.counts[0] != found.counts[1]).any()


def test_more_samples_go_on_where_fewer_ended() -> None:
    """The blocks of a run are the first blocks of a longer one, so that a prefix can stand for a shorter run."""
    fewer, more = (certified("clopper-pearson", pixel_images(6), num_estimation=n) for n in (200, 450))
    for short, long in zip(fewer.blocks, more.blocks, strict=True):
        assert (len(short), len(long)) == (2, 5)
        np.testing.assert_array_equal(short, long[:2])


def test_blocks_hold_the_votes_for_the_selected_class(whole: Certificates) -> None:
    estimation = whole.num_samples - 30
    for row, blocks in enumerate(whole.blocks):
        assert blocks.dtype == np.uint8
        assert len(blocks) == math.ceil(estimation[row] / 100)
        assert blocks.sum(dtype=np.int64) == whole.counts[row, whole.selected[row]]
        assert blocks[:-1].max(initial=0) <= 100
        assert blocks[-1] <= estimation[row] - 100 * (len(blocks) - 1)
    np.testing.assert_array_equal(whole.counts.sum(1), estimation)
    if whole.rule.method == "clopper-pearson":
        assert (estimation == 1230).all()
    else:
        assert ((estimation % 100 == 0) | (estimation == 1230)).all()


# A textbook: one image and one block at a time, one noisy copy at a time, numbers of Python.


def _textbook_votes(pixels: list[float], purpose: str, own: str, seed: int, sigma: float) -> Iterator[int]:
    generator = stream(seed, purpose, own)
    while True:
        for noise in (torch.randn((100, 1, 2, 2), generator=generator) * sigma).flatten(1).tolist():
            noisy = [float(np.float32(a) + np.float32(b)) for a, b in zip(pixels, noise, strict=True)]
            yield noisy.index(max(noisy))


def _textbook_evidence(null: float, level: float, cap: int, k: float, n: int) -> float:
    """Against p <= null after k of n votes: twelve points at two thirds, the binomial test at the cap at one third."""
    needed = int(stats.binom.isf(level / 3 * (1 - 1e-9), cap, null)) + 1
    at_cap = float(stats.binom.sf(needed - k - 1, cap - n, null)) if needed - k > 0 else 1.0
    return 2 / 3 * _textbook_mixture(null, level, cap, k, n) + at_cap / level


def _textbook_mixture(null: float, level: float, cap: int, k: float, n: int, side: int = 1) -> float:
    room = 1 - null if side > 0 else null
    least = min(math.sqrt(2 * null * (1 - null) * math.log(1 / level) / cap), room / 2)
    ratio = (0.999 * room / least) ** (1 / 11)
    distances = [least * ratio**i for i in range(12)]
    weights = [distance**-0.75 for distance in distances]
    logs = [k * math.log(1 + side * d / null) + (n - k) * math.log(1 - side * d / (1 - null)) for d in distances]
    return sum(w * math.exp(min(own, 700)) for w, own in zip(weights, logs, strict=True)) / sum(weights)


@dataclass
class Textbook:
    """The certificate of one image."""

    selection: list[int]
    counts: list[int]
    blocks: list[int]
    prediction: int
    radius: float
    p_lower: float
    outcome: str


def _textbook_hope(null: float, alpha: float, futility: float, cap: int, k: int, n: int) -> bool:
    """Whether the (1 - futility) quantile of the votes at the cap, by a beta-binomial prediction, passes the test."""
    left, a, b = cap - n, k + 0.5, n - k + 0.5
    mean, variance = (function(left, a, b) for function in (stats.betabinom.mean, stats.betabinom.var))
    best = min(k + mean + 0.5 + stats.norm.isf(futility) * math.sqrt(variance), k + left)
    return _textbook_evidence(null, alpha, cap, best, cap) >= 1 / alpha


def _textbook(
    method: str, stopping: str, pixels: list[float], own: str, sizes: tuple[int, int], alpha: float, futility: float
) -> Textbook:
    """Cohen et al. 2019, algorithm CERTIFY, or its sequential form."""
    selecting, voting = (
        _textbook_votes(pixels, f"certify-{purpose}", own, 3, SIGMA) for purpose in ("selection", "estimation")
    )
    first = [next(selecting) for _ in range(sizes[0])]
    selection = [first.count(c) for c in range(4)]
    top, cap = selection.index(max(selection)), sizes[1]
    votes, blocks = list[int](), list[int]()
    grid = [half * SIGMA / 2 for half in range(9)]
    grid = [r for r in grid if _textbook_evidence(stats.norm.cdf(r / SIGMA), alpha, cap, cap, cap) >= 1 / alpha]
    radius, prediction, outcome = 0.0, ABSTAIN, "undecided"
    while outcome == "undecided" and len(votes) < cap:
        block = [next(voting) for _ in range(min(100, cap - len(votes)))]
        votes += block
        blocks.append(block.count(top))
        k, n = sum(blocks), len(votes)
        if method == "clopper-pearson":
            continue
        while grid and _textbook_evidence(stats.norm.cdf(grid[0] / SIGMA), alpha, cap, k, n) >= 1 / alpha:
            radius, prediction = grid.pop(0), top
        if not grid:
            outcome = "certified"
        elif stopping == "power":
            hopeless = n < cap and not _textbook_hope(stats.norm.cdf(grid[0] / SIGMA), alpha, futility, cap, k, n)
            outcome = "given up" if hopeless else outcome
        elif _textbook_mixture(stats.norm.cdf(grid[0] / SIGMA), futility, cap, k, n, side=-1) >= 1 / futility:
            outcome = "not certifiable"
    p_lower = float(stats.norm.cdf(radius / SIGMA)) if prediction != ABSTAIN else 0.0
    if method == "clopper-pearson":
        p_lower = float(stats.beta.ppf(alpha, k, n - k + 1)) if k else 0.0
        if p_lower > 0.5:
            radius, prediction, outcome = SIGMA * float(stats.norm.ppf(p_lower)), top, "certified"
    return Textbook(selection, [votes.count(c) for c in range(4)], blocks, prediction, radius, p_lower, outcome)


@pytest.mark.parametrize(("sizes", "alpha"), [((30, 1230), 0.001), ((130, 400), 0.05)])
@pytest.mark.parametrize(("method", "stopping"), [(METHODS[0], "power"), (METHODS[1], "power"), (METHODS[1], "test")])
def test_certificates_are_those_of_the_textbook(
    method: str, stopping: str, sizes: tuple[int, int], alpha: float
) -> None:
    x, y = pixel_images(40)
    rows = list(range(0, 40, 3))
    given = {
        "num_selection": sizes[0],
        "num_estimation": sizes[1],
        "alpha": alpha,
        "futility": 0.05,
        "stopping": stopping,
    }
    found = certified(method, (x[rows], y[rows]), **given)
    for row, own in enumerate(found.ids):
        slow = _textbook(method, stopping, x[rows[row]].flatten().tolist(), own, sizes, alpha, 0.05)
        assert found.selection[row].tolist() == slow.selection
        assert found.counts[row].tolist() == slow.counts
        assert found.blocks[row].tolist() == slow.blocks
        assert found.num_samples[row] == sizes[0] + sum(slow.counts)
        assert found.prediction[row] == slow.prediction
        assert OUTCOMES[found.outcome[row]] == slow.outcome
        if method == "sequential":
            assert found.radius[row] == slow.radius
            assert found.p_lower[row] == pytest.approx(slow.p_lower, rel=1e-11, abs=0)
        else:
            assert slow.radius - 1.1e-6 <= found.radius[row] <= slow.radius
            assert slow.p_lower * (1 - 1e-9) <= found.p_lower[row] <= slow.p_lower
    assert len(set(found.radius.tolist())) >= 4
    assert len(set(found.outcome.tolist())) >= 2
    assert method == "sequential" or {ABSTAIN, 0, 1, 2, 3} <= set(found.prediction.tolist())


def test_certificates_come_as_soon_as_they_are_decided() -> None:
    """In the end each position once; an image that is won by far does not wait for a close one that came before it."""
    pixels = labelled_pixels(pixel_images(40), 4)
    rule = rule_of(
        sigma=SIGMA, method="sequential", num_images=40, num_selection=30, num_estimation=20_000, radii=(0.125,)
    )
    found = list(certify_each(pixel_vote(), pixels, rule, 3, list(range(5, 40)), in_flight=4))
    positions = [position for position, _ in found]
    assert sorted(positions) == list(range(5, 40))
    assert any(first > second for first, second in pairwise(positions))
    for position, certificate in found:
        assert certificate.ids == (pixels.ids[position],)
        assert certificate.seconds[0] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_network_sees_full_tiles_and_few_votes_that_nobody_counts(method: CertifyMethod) -> None:
    """With 40 images in flight: at most the padding of each round and a fourth more than what was looked at, one row in
    64 that is in every tile, and one tile in 16 at which images are asked for again."""
    recorder = Recorder(PixelVote())
    smoothed = SmoothedClassifier(recorder, SIGMA, 4, execution=Execution(tile=64))
    certificates = rush.certify(smoothed, pixel_images(40), method, 30, 3000)
    assert {len(batch) for batch in recorder.inputs} == {64}
    votes = int(certificates.num_samples.sum())
    rounds = 2 * math.ceil(certificates.num_samples.max() / 100)
    most = votes if method == "clopper-pearson" else 1.25 * votes
    assert votes <= recorder.forward_rows - 64 * DOOR_TILES <= (most + 64 * rounds) * (64 / 63) * (1 + 1 / 16)


def test_an_abstention_is_wrong_for_every_label_and_counts_no_radius() -> None:
    """Class 0 included, which tools that return zeros on abstention would count as right."""
    model, _ = bins_with([0.5, 0.5], SIGMA)
    x = torch.stack([torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.9), torch.full((1, 1, 1), 0.1)])
    certificates = rush.certify(SmoothedClassifier(model, SIGMA, 2), (x, torch.tensor([0, 1, 1])), num_estimation=1000)
    assert certificates.prediction.tolist() == [ABSTAIN, 1, 0]
    assert certificates.correct.tolist() == [False, True, False]
    assert certificates.radius[0] == 0
    assert certificates.accuracy() == pytest.approx(1 / 3)
    assert certificates.acr == pytest.approx(certificates.radius[1] / 3)
    assert certificates.accuracy(certificates.radius[1]) == pytest.approx(1 / 3)
    assert certificates.accuracy(certificates.radius[1] + 1e-6) == 0


def test_unanimous_votes_give_the_largest_radius_and_none_is_larger() -> None:
    model, _ = bins_with([0.5, 0.5], 0.01)
    x = torch.tensor([0.9, 0.1, 0.505]).view(3, 1, 1, 1)
    certificates = rush.certify(SmoothedClassifier(model, 0.01, 2), (x, torch.tensor([1, 0, 1])), num_estimation=700)
    assert certificates.radius[0] == certificates.radius[1] == certificates.largest_radius > certificates.radius[2]
    assert certificates.largest_radius == pytest.approx(0.01 * stats.norm.ppf(0.001 ** (1 / 700)), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "wald"}, "unknown method 'wald'; allowed: clopper-pearson"),
        ({"num_selection": 0}, "num_selection must be an integer >= 1, got 0"),
        ({"num_estimation": 1e5}, "num_estimation must be an integer >= 1, got 100000.0"),
        ({"alpha": 0.0}, "alpha must lie in (0, 0.5), got 0.0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer >= 0, got 0.5"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(given: dict[str, object], text: str) -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    images = (torch.full((1, 1, 2, 2), 0.5), torch.tensor([1]))
    with pytest.raises(InputError, match=re.escape(text)):
        rush.certify(smoothed, images, **{"num_estimation": 100, **given})  # type: ignore[arg-type]


def test_images_and_networks_that_cannot_be_certified_are_refused() -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(InputError, match="labels must be 0 to 1, got 2 to 2"):
        rush.certify(smoothed, (x, torch.tensor([2])))
    with pytest.raises(InputError, match="divide images of 0 to 255 by 255"):
        rush.certify(smoothed, (255 * x, torch.tensor([1])))
    smoothed.classifier.train()
    with pytest.raises(ModelError, match="training mode"):
        rush.certify(smoothed, (x, torch.tensor([1])), num_estimation=100)


def test_pixels_of_any_float_type_give_the_same_certificates() -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    x = square_images(np.array([0.2, -0.3]), seed=5)
    labels = torch.tensor([1, 0])
    first, second = (
        rush.certify(smoothed, (pixels, labels), num_selection=10, num_estimation=100) for pixels in (x.double(), x)
    )
    assert_same(first, second)
