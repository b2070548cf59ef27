"""Splitting noise: exact l1 certificates, against brute force over all images, draws and classifiers."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rush
from certifying import assert_same
from rush import choices
from rush.attacks.threat import ThreatModel, norms
from rush.certification import bounds, rule
from rush.certification.bounds import certify_all_draws
from rush.certification.recertify import recompute
from rush.choices import Stage
from rush.errors import ConfigError, InputError, RunError, SandwichError
from rush.evaluation.attack import verdict
from rush.evaluation.sandwich import check_sandwich
from rush.records.certificates import append_certificates, read_certificates
from rush.records.read_run import read_run
from rush.reporting.page import write_report
from rush.runtime.randomness import stream
from rush.smoothing import discrete, splitting
from rush.smoothing.base import Draws
from rush.smoothing.splitting import Splitting
from tiny import run_tiny, tiny

Radii = Callable[[NDArray[np.int64]], NDArray[np.int64]]

STEPS = 8  # of a pixel in brute force, in place of 255
POINTS = np.array(list(itertools.product(range(STEPS + 1), repeat=2)))  # all images of two pixels
DISTANCES = np.abs(POINTS[:, None] - POINTS).sum(2)


@pytest.fixture
def eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choices, discrete, splitting, bounds, rule):
        monkeypatch.setattr(module, "LEVELS", STEPS)


def sigma_of(draws: int, levels: int = 255) -> float:
    return (draws + 0.5) / (2 * 3**0.5 * levels)


class Lookup(nn.Module):
    """A random class for every pair of noisy pixels, which are multiples of 1 / 32."""

    def __init__(self, table: NDArray[np.int64]) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(table))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        first, second = (4 * STEPS * x.flatten(1)).round().long().unbind(1)
        return nn.functional.one_hot(self.table[first, second], 3).float()


def tables(count: int, seed: int) -> list[NDArray[np.int64]]:
    """Random functions of the noisy pixels, from rough to smooth."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        coarse = random.integers(0, 3, (33 // (size := 1 + 2 * (number % 6)) + 1,) * 2)
        found.append(coarse.repeat(size, 0).repeat(size, 1)[:33, :33])
    return found


def noisy_pixels(noise: Splitting) -> NDArray[np.int64]:
    """The noisy pixels (81, L, 2) of all images under all draws, in steps of 1 / 32."""
    shape = (noise.num_draws, 1, 1, 2)
    pixels = torch.from_numpy(POINTS).float().view(-1, 1, 1, 2) / STEPS
    noisy = torch.stack([noise.add(x, torch.empty(shape), Draws()) for x in pixels])
    steps = (4 * STEPS * noisy).view(len(POINTS), noise.num_draws, 2)
    assert torch.equal(steps, steps.round())
    return steps.long().numpy()


def votes(table: NDArray[np.int64], noisy: NDArray[np.int64]) -> NDArray[np.int64]:
    classes = table[noisy[..., 0], noisy[..., 1]]
    return (classes[..., None] == np.arange(3)).sum(1)


def steps_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The certified radii in steps, from the radii in pixel units that are rounded down."""
    return np.ceil(certify_all_draws(counts).radius * STEPS - 1e-4).astype(np.int64)


def false_and_tight(radii: Radii, draws: int, classifiers: int = 300) -> tuple[int, int]:
    """The number of pairs of images within a radius with unlike classes, and of those one step beyond it."""
    noisy, false, tight = noisy_pixels(Splitting(sigma_of(draws, STEPS))), 0, 0
    for table in tables(classifiers, draws):
        counts = votes(table, noisy)
        unlike = counts.argmax(1)[:, None] != counts.argmax(1)
        false += int((unlike & (radii(counts)[:, None] >= DISTANCES)).sum())
        tight += int((unlike & (radii(counts)[:, None] + 1 == DISTANCES)).sum())
    return false, tight


@pytest.mark.parametrize("draws", [2, 3, 5, 8, 9, 13])
@pytest.mark.usefixtures("eight_steps")
def test_no_certificate_of_any_classifier_is_false_and_some_are_tight(draws: int) -> None:
    false, tight = false_and_tight(steps_of, draws)
    assert false == 0
    assert tight > 0


def ahead(counts: NDArray[np.int64], ties: str) -> NDArray[np.int64]:
    """The least n_A - n_c, less 1 for those classes c that win a tie by the rule ``ties``."""
    winner = counts.argmax(1)
    below = np.arange(counts.shape[1]) < winner[:, None]
    won = {"lower": below, "upper": ~below, "none": np.zeros_like(below)}[ties]
    gaps = counts[np.arange(len(counts)), winner][:, None] - counts - won
    gaps[np.arange(len(counts)), winner] = 10**6
    return gaps.min(1)


@pytest.mark.usefixtures("eight_steps")
def test_brute_force_would_notice_a_wrong_tie_or_rounding() -> None:
    assert false_and_tight(lambda counts: ahead(counts, "lower") // 2, 8)[0] == 0
    assert false_and_tight(lambda counts: ahead(counts, "upper") // 2, 8)[0] > 0
    assert false_and_tight(lambda counts: ahead(counts, "none") // 2, 8)[0] > 0
    assert false_and_tight(lambda counts: -(-ahead(counts, "lower") // 2), 8)[0] > 0
    assert false_and_tight(lambda counts: ahead(counts, "lower"), 8)[0] > 0


@pytest.mark.usefixtures("eight_steps")
def test_certify_and_predict_are_brute_force() -> None:
    noise, x = Splitting(sigma_of(13, STEPS)), torch.from_numpy(POINTS).float().view(-1, 1, 1, 2) / STEPS
    table = tables(4, 0)[3]
    smoothed = rush.SmoothedClassifier(Lookup(table), noise=noise, num_classes=3)
    counts = votes(table, noisy_pixels(noise))
    certificates = rush.certify(smoothed, (x, torch.zeros(len(x), dtype=torch.int64)))
    np.testing.assert_array_equal(certificates.counts, counts)
    np.testing.assert_array_equal(certificates.prediction, counts.argmax(1))
    np.testing.assert_array_equal(smoothed.predict(x).numpy(), counts.argmax(1))
    assert not certificates.abstained.any()
    assert (certificates.num_samples == 13).all()


def textbook(level: int, template: int, draw: int, draws: int) -> Fraction:
    """The noisy pixel by the two cases of the source, in fractions."""
    x, length = Fraction(level, 255), Fraction(draws, 255)
    s = Fraction(2 * ((template + draw) % draws) + 1, 510)
    if length >= 1:
        return (int(x > s) + min(s, Fraction(1))) / 2
    c = ceil((x - s) / length) * length + s
    return (min(c, Fraction(1)) + max(c - length, Fraction(0))) / 2


@pytest.mark.parametrize("draws", [2, 100, 254, 255, 256, 883])
def test_noisy_pixels_are_those_of_the_source(draws: int) -> None:
    noise, levels = Splitting(sigma_of(draws)), [0, 1, 17, 127, 128, 200, 254, 255]
    shape = (1, 1, len(levels))
    template = splitting._template(draws, shape, torch.device("cpu")).view(-1).tolist()
    pixels = torch.tensor(levels).view(shape) / 255
    noisy = noise.add(pixels, torch.empty(draws, *shape), Draws()).view(draws, -1)
    for draw in {0, 1, draws // 2, draws - 1}:
        for place, level in enumerate(levels):
            exact = textbook(level, int(template[place]), draw, draws)
            assert noisy[draw, place].item() == float(np.float32(float(exact)))


@pytest.mark.parametrize("draws", [7, 255, 441])
def test_one_step_of_one_pixel_changes_one_draw_at_most(draws: int) -> None:
    noise, shape = Splitting(sigma_of(draws)), (1, 2, 3)
    x = torch.randint(0, 255, shape, generator=stream(0, "x")).float()
    for place in itertools.product(*map(range, shape)):
        further = x.clone()
        further[place] += 1
        near, far = (noise.add(each / 255, torch.empty(draws, *shape), Draws()) for each in (x, further))
        assert int((near != far).flatten(1).any(1).sum()) <= 1


def test_a_generator_gives_one_random_draw_per_image() -> None:
    noise, x = Splitting(0.5), torch.randint(0, 256, (3, 8, 8), generator=stream(0, "x")) / 255
    everything = noise.add(x, torch.empty(noise.num_draws, 3, 8, 8), Draws())
    drawn = noise.add(x, torch.empty(500, 3, 8, 8), stream(0, "noise"))
    places = (drawn[:, None] == everything).flatten(2).all(2).nonzero()
    assert places[:, 0].tolist() == list(range(500))  # each is one of the L
    assert len(set(places[:, 1].tolist())) > 250  # and they are spread
    sampled = noise.noisy(x, noise.sample((500, 3, 8, 8), stream(0, "noise")))
    assert torch.equal(sampled, drawn)


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 2.0])
def test_the_derivative_is_that_of_the_mean_over_the_draws(sigma: float) -> None:
    noise = Splitting(sigma)
    dark, bright = (
        noise.add(torch.full((1, 1, 1), value), torch.empty(noise.num_draws, 1, 1, 1), Draws()).mean()
        for value in (0.0, 1.0)
    )
    x = torch.full((1, 1, 1), 0.5, requires_grad=True)
    noise.noisy(x, noise.sample((1, 1, 1, 1), stream(0, "noise"))).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(float(bright - dark), abs=1e-5)


def test_the_template_never_changes() -> None:
    """Certificates and networks depend on it."""
    first = splitting._template(441, (3, 32, 32), torch.device("cpu")).flatten()[:8].tolist()
    assert first == [207, 167, 254, 112, 415, 5, 401, 114]


def linear() -> tuple[rush.SmoothedClassifier, tuple[Tensor, Tensor]]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(3, 16, generator=stream(0, "weight")))
    x = torch.randint(0, 256, (40, 1, 4, 4), generator=stream(1, "images")) / 255
    smoothed = rush.SmoothedClassifier(network, noise=rush.Splitting(0.4), num_classes=3)
    return smoothed, (x, smoothed.predict(x))


def test_verdicts_are_exact_and_points_are_8_bit_images_in_the_ball() -> None:
    smoothed, images = linear()
    threat = ThreatModel("l1", 1.0)
    result = rush.attack(smoothed, images, threat=threat, method="pgd", steps=10, eot_samples=8)
    assert result.adversarial is not None
    points = torch.as_tensor(result.adversarial)
    assert torch.equal(points, (points * 255).round() / 255)
    assert (norms(points, images[0], "l1") <= 1 + 1e-4).all()
    np.testing.assert_array_equal(result.broken, (smoothed.predict(points) != images[1]).numpy())
    np.testing.assert_array_equal(result.held, ~result.broken)
    assert 0 < result.broken.sum() < 40


def test_one_violation_of_the_sandwich_is_an_error() -> None:
    smoothed, images = linear()
    certificates = rush.certify(smoothed, images)
    assert (certificates.radius > 0).sum() > 30
    broken = rush.attack(smoothed, images, threat=ThreatModel("l1", 1.0), method="pgd", steps=10, eot_samples=8)
    sandwich = check_sandwich(certificates, [broken], verdict_level=0.001)
    assert (sandwich.violations, sandwich.allowed) == ((), 0)
    sandwich.require()
    row = int(np.flatnonzero(broken.broken)[0])
    radius = certificates.radius.copy()
    radius[row] = float(broken.l1[row]) - 2e-6  # printed radii are rounded down: the point is within
    claimed = check_sandwich(replace(certificates, radius=radius), [broken], verdict_level=0.001)
    assert claimed.violations == (certificates.ids[row],)
    with pytest.raises(SandwichError, match="at most 0 can be chance"):
        claimed.require()


def test_a_table_reads_back_and_what_is_not_from_its_votes_is_refused(tmp_path: Path) -> None:
    smoothed, images = linear()
    certificates = rush.certify(smoothed, images)
    append_certificates(tmp_path / "c.tsv", certificates, range(40))
    read = read_certificates(tmp_path / "c.tsv")
    assert read is not None
    assert_same(certificates, read[1])
    text = (tmp_path / "c.tsv").read_text()
    radius = f"{certificates.radius[0]:.6f}"
    (tmp_path / "c.tsv").write_text(text.replace(f"\t{radius}\t", f"\t{certificates.radius[0] + 1 / 255:.6f}\t", 1))
    with pytest.raises(RunError, match="radius is"):
        read_certificates(tmp_path / "c.tsv")
    with pytest.raises(InputError, match="exact"):
        recompute(certificates, alpha=0.01)


def test_printed_radii_never_exceed_the_exact_ones() -> None:
    counts = np.array([[255 + steps, 255 - steps] for steps in range(256)])
    radius = certify_all_draws(counts).radius
    assert (radius * 255 <= np.arange(256)).all()
    assert (radius * 255 > np.arange(256) - 1e-3).all()
    assert radius[51] == 0.2
    assert radius[255] == 1.0


def test_methods_of_other_noises_and_images_off_the_grid_are_refused() -> None:
    smoothed, (x, y) = linear()
    with pytest.raises(InputError, match="splitting noise"):
        rush.certify(smoothed, (x, y), method="sequential")
    other = rush.SmoothedClassifier(smoothed.classifier, 0.4, 3)
    with pytest.raises(InputError, match="splitting noise"):
        rush.certify(other, (x, y), method="exact")
    with pytest.raises(InputError, match="8-bit"):
        rush.certify(smoothed, (0.9 * x, y))
    with pytest.raises(InputError, match="8-bit"):
        smoothed.predict(0.9 * x)
    for sigma in (0.001, 2000.0):
        with pytest.raises(InputError, match=r"draws, which must be 2 to 1,048,576"):
            Splitting(sigma)


def test_verdicts_on_points_of_other_tools_are_exact() -> None:
    smoothed, (x, y) = linear()
    points = ((x * 255 + torch.randint(-3, 4, x.shape, generator=stream(2, "change"))).clamp(0, 255)) / 255
    result = verdict(smoothed, (x, y), points, threat=ThreatModel("linf", 3 / 255))
    np.testing.assert_array_equal(result.broken, (smoothed.predict(points) != y).numpy())
    assert not result.undecided.any()


def test_a_recipe_trains_certifies_attacks_and_reports(tmp_path: Path) -> None:
    fields = {
        "smoothing.noise": "splitting",
        "smoothing.sigma": "0.3",
        "certify.method": "exact",
        "certify.images": "12",
        "attack.norm": "l1",
        "attack.epsilon": "0.5",
        "attack.images": "8",
        "attack.curve_images": "0",
        "pretrain.epochs": "0",
    }
    stages: tuple[Stage, ...] = ("pretrain", "finetune", "certify", "attack")
    run = run_tiny(tmp_path, *(f"{name}={value}" for name, value in fields.items()), stages=stages)
    read = read_certificates(run.path / "certificates.tsv")
    assert read is not None
    assert_same(rush.certify(rush.load(run.path), rush.load_images("digits", split="test")[read[0]]), read[1])
    results = read_run(run.path)
    assert results.ladder is not None
    assert results.ladder.sandwich.allowed == 0
    assert not any(rung.undecided for rung in results.ladder.rungs)
    page = write_report(run.path).read_text()
    assert "Every certificate is exact" in page
    assert "265, all draws of the noise" in page
    assert "Every verdict is exact" in page


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("smoothing.noise=splitting",), "certify.method = clopper-pearson"),
        (("certify.method=exact",), "smoothing.noise = discrete"),
        (("smoothing.noise=splitting", "certify.method=exact", "finetune.objective=cat-rs"), "cat-rs"),
    ],
)
def test_recipes_that_cannot_be_certified_or_trained_are_refused(
    overrides: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny(tmp_path, *overrides)
