"""Attacks against closed-form distances, an independent implementation and their own accounts."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import eagerpy
import foolbox
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import rush
from attacked import (
    Counted,
    Parts,
    assert_same,
    broken,
    digits,
    distances_to_planes,
    generators,
    half_space,
    half_space_case,
    log_probs_of,
    near_plane,
    valley,
)
from exact_models import DOOR_TILES, Recorder, assert_in_threat
from rush.attacks.gradient import loss_and_gradient
from rush.attacks.losses import cross_entropy, margin
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.choices import Gradient, Norm
from rush.data.checks import labelled_pixels
from rush.data.images import ImageSet
from rush.data.sources import load_images
from rush.errors import InputError
from rush.evaluation.evaluation import GROUP, Evaluation
from rush.evaluation.model import Model, defend
from rush.evaluation.plans import Plan
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

Attack = Callable[[Model, tuple[Tensor, Tensor], ThreatModel], AttackResult]


def _linear_case(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A plane; or three classes, the second of which is at a third of the distance of the third."""
    if kind == "half-space":
        return half_space_case()
    order = torch.tensor([[a, b, 3 - a - b] for a in range(3) for b in range(3) if a != b] * 2)
    levels = torch.zeros(12, 3).scatter(1, order, torch.tensor([[0.56, 0.54, 0.50]]).expand(12, 3))
    spread = torch.rand((12, 63), generator=stream(0, "spread")) * 0.01
    return Parts(3, 21), (levels.repeat_interleave(21, 1) + spread).view(12, 1, 7, 9), order[:, 0]


_pgd_attack = partial(rush.attack, method="pgd", steps=40)
_fgsm_attack = partial(rush.attack, method="fgsm")
_none = partial(rush.attack, method="none")


def _without_steps(model: Model, images: tuple[Tensor, Tensor], threat: ThreatModel) -> AttackResult:
    plan = Plan("idle", "steps of no length", "pgd", "fresh", 4, steps=10, step_size=0.0)
    return _evaluation(model, images, threat, level=0.001, max_votes=10_000).run(plan)


def _evaluation(
    model: Model, images: ImageSet | tuple[Tensor, Tensor], threat: ThreatModel, **settings: float
) -> Evaluation:
    """The evaluation of ``model`` without a look at it, so that what it sees is the attack's alone."""
    chosen = {"level": 0.01, "max_votes": 100, "seed": 0, **settings}
    return Evaluation(defend(model), labelled_pixels(images), threat, VerdictSettings(**chosen))  # type: ignore[arg-type]


def assert_reaches_the_distance(attack: Attack, model: Model, x: Tensor, y: Tensor, norm: Norm, excess: float) -> None:
    """``attack`` breaks every image within (1 + excess) of its closed-form distance and none within (1 - excess)."""
    base = model.classifier if isinstance(model, SmoothedClassifier) else model
    exact = distances_to_planes(base, x, y, norm)
    beyond = attack(model, (x, y), ThreatModel(norm, ((1 + excess) * exact).float()))
    assert_in_threat(beyond.adversarial, x, beyond.threat)
    assert beyond.broken.all()
    within = attack(model, (x, y), ThreatModel(norm, ((1 - excess) * exact).float()))
    assert_in_threat(within.adversarial, x, within.threat)
    assert within.held.all()


LINEAR_CASES = [
    (_pgd_attack, "half-space", "linf"),
    (_pgd_attack, "half-space", "l2"),
    (_pgd_attack, "three classes", "linf"),
    (_pgd_attack, "three classes", "l2"),
    (_fgsm_attack, "half-space", "linf"),
    (_fgsm_attack, "half-space", "l2"),
    (_fgsm_attack, "three classes", "linf"),
]


@pytest.mark.parametrize(("attack", "kind", "norm"), LINEAR_CASES)
def test_attacks_reach_the_closed_form_distance_of_a_linear_model(attack: Attack, kind: str, norm: Norm) -> None:
    assert_reaches_the_distance(attack, *_linear_case(kind), norm=norm, excess=0.01)


@pytest.mark.parametrize("kind", ["half-space", "three classes"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("idle", [_none, _without_steps])
def test_an_attack_that_does_nothing_does_not_pass_that_test(idle: Attack, norm: Norm, kind: str) -> None:
    with pytest.raises(AssertionError, match="broken"):
        assert_reaches_the_distance(idle, *_linear_case(kind), norm=norm, excess=0.01)


def _smoothed_case() -> tuple[SmoothedClassifier, Tensor, Tensor]:
    """The smoothed half-space: its boundary is the same plane. Images at 6 sigma, so that 2 % is 0.12 sigma."""
    plane = half_space()
    return SmoothedClassifier(plane, 0.05, 2), *near_plane(plane, [0.3] * 12)


@pytest.mark.parametrize("gradient", ["fresh", "frozen", "transfer"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_reach_the_distance_of_a_smoothed_linear_model(norm: Norm, gradient: Gradient) -> None:
    """Judged on votes at p = 0.5 +- 0.047. Odds of failing by chance: 24 undecided or false verdicts at 10,000 votes,
    each < 1e-8."""
    attack = partial(_pgd_attack, eot_samples=None if gradient == "transfer" else 4, gradient=gradient)
    assert_reaches_the_distance(attack, *_smoothed_case(), norm=norm, excess=0.02)


@pytest.mark.parametrize("idle", [_none, _without_steps])
def test_an_attack_that_does_nothing_does_not_pass_the_smoothed_test(idle: Attack) -> None:
    with pytest.raises(AssertionError, match="broken"):
        assert_reaches_the_distance(idle, *_smoothed_case(), norm="l2", excess=0.02)


def test_fgsm_on_a_smoothed_model_is_one_step_along_the_mean_gradient() -> None:
    attack = partial(_fgsm_attack, eot_samples=4)
    assert_reaches_the_distance(attack, *_smoothed_case(), norm="linf", excess=0.02)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm: Norm) -> None:
    """3,000 starts of 4 pixels. Odds of failing by chance: a Kolmogorov-Smirnov test at 1e-6 each."""
    x = torch.full((3000, 1, 2, 2), 0.5)
    start = ThreatModel(norm, 0.2).random_start(x, generators(3000))
    change = ((start - x) / 0.2).flatten(1).double().numpy()
    if norm == "linf":
        assert stats.kstest(change.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-6
    else:
        assert stats.kstest(np.linalg.norm(change, axis=1) ** 4, "uniform").pvalue > 1e-6
    assert abs(np.corrcoef(change.T) - np.eye(4)).max() < 5 / math.sqrt(3000)


def _starts(network: nn.Module, images: tuple[Tensor, Tensor], threat: ThreatModel, seed: int = 0) -> Tensor:
    plan = Plan("pgd", "starts alone", "pgd", steps=1, step_size=0.0)
    return _evaluation(network, images, threat, seed=seed).run(plan).adversarial


def test_random_starts_differ_by_image_and_seed_alone() -> None:
    x = torch.full((5, 1, 8, 8), 0.5) + torch.arange(5).view(-1, 1, 1, 1) * 0.01
    plane, y, threat = half_space(), torch.zeros(5, dtype=torch.int64), ThreatModel("linf", 0.1)
    first = _starts(plane, (x, y), threat)
    assert (first - x).abs().amax((1, 2, 3)).min() > 0.09
    assert len(((first - x) * 1e4).round().flatten(1).unique(dim=0)) == 5
    assert torch.equal(first, _starts(plane, (x, y), threat))
    assert torch.equal(first[3:4], _starts(plane, (x[3:4], y[3:4]), threat))
    assert (first != _starts(plane, (x, y), threat, seed=1)).float().mean() > 0.99


def test_pgd_keeps_the_best_point_where_the_last_is_worse() -> None:
    """Steps of 0.025 around a peak at 0.56: 0.5, 0.525, 0.55, 0.575, 0.55, 0.575; the nearest is 0.55."""
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    best, last = pgd(valley, x, y, ThreatModel("linf", 0.1), steps=5, step_size=0.25)
    assert best.item() == pytest.approx(0.55)
    assert last.item() == pytest.approx(0.575)
    best, _ = pgd(valley, torch.full_like(x, 0.56), y, ThreatModel("linf", 0.1), steps=5, step_size=0.7)
    assert best.item() == pytest.approx(0.56)  # the start itself


def test_the_best_point_is_the_argmax_of_all_measured_losses_image_by_image(digits_network: nn.Module) -> None:
    x, y = digits(30)
    log_probs = Counted(log_probs_of(digits_network))
    best, last = pgd(log_probs, x, y, ThreatModel("l2", 1.0), steps=6, step_size=1.9)  # so long that it oscillates
    assert len(log_probs.points) == 7
    losses = torch.stack([cross_entropy(log_probs.inner(points), y) for points in log_probs.points])
    expected = torch.stack(log_probs.points)[losses.argmax(0), torch.arange(30)]
    assert torch.equal(best, expected)
    assert torch.equal(last, log_probs.points[-1])
    assert not torch.equal(best, last)


def test_steps_have_the_length_that_was_asked_for_in_pixels() -> None:
    plane = half_space()
    x, y = near_plane(plane, [0.3] * 6)
    threat = ThreatModel("linf", 0.01)
    start = _starts(plane, (x, y), threat)
    moved = rush.attack(plane, (x, y), threat, steps=1, step_size=0.002).adversarial
    free = (start - x).abs() < 0.0079  # not stopped by the ball
    torch.testing.assert_close((moved - start).abs()[free], torch.full((int(free.sum()),), 0.002), rtol=1e-3, atol=0)
    assert free.float().mean() > 0.6


def test_gradients_are_per_image(digits_network: nn.Module) -> None:
    x, labels = digits(4)
    model = log_probs_of(digits_network)
    values, gradients = loss_and_gradient(model, x, labels, cross_entropy)
    for i in range(4):
        value, gradient = loss_and_gradient(model, x[i : i + 1], labels[i : i + 1], cross_entropy)
        torch.testing.assert_close(values[i : i + 1], value)
        torch.testing.assert_close(gradients[i : i + 1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "epsilon", "text"),
    [
        ("linf", 8, "l-inf epsilon = 8 exceeds the pixel range [0, 1]; write 8/255"),
        ("linf", torch.tensor([0.1, 4.0]), "l-inf epsilon = 4 exceeds"),
        ("linf", -0.1, "epsilon must be a finite number > 0, got -0.1"),
        ("l2", 0, "epsilon must be a finite number > 0, got 0"),
        ("l2", math.nan, "epsilon must be a finite number > 0, got nan"),
        ("l2", math.inf, "epsilon must be a finite number > 0, got inf"),
        ("l2", torch.tensor([0.5, math.nan]), "epsilon must be a finite number > 0, got nan"),
        ("l2", True, "epsilon must be a finite number > 0, got True"),
        ("l2", "8/255", "epsilon must be a finite number > 0, got '8/255'"),
        ("l2", None, "epsilon must be a finite number > 0, got None"),
        ("Linf", 0.5, "unknown norm 'Linf'; allowed: linf, l2, l1"),
    ],
)
def test_threats_that_make_no_sense_are_refused(norm: Norm, epsilon: float | Tensor, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        ThreatModel(norm, epsilon)


@pytest.mark.parametrize(
    ("smoothed", "given", "text"),
    [
        (False, {"method": "cw"}, "unknown method 'cw'"),
        (True, {"gradient": "mean"}, "gradient 'mean'"),
        (False, {"eot_samples": 4}, "eot_samples=4 was given, but method 'pgd'"),
        (True, {"eot_samples": 4, "gradient": "transfer"}, "eot_samples=4 was given"),
        (True, {"method": "none", "steps": 5}, "steps=5 was given, but method 'none'"),
        (True, {"method": "fgsm", "restarts": 2}, "restarts=2 was given, but method 'fgsm'"),
        (False, {"steps": 0}, "steps must be an integer >= 1, got 0"),
        (False, {"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        (False, {"step_size": -0.1}, "step_size must be a finite number > 0, got -0.1"),
        (False, {"step_size": math.nan}, "step_size must be a finite number > 0, got nan"),
        (False, {"restarts": 0}, "restarts must be an integer >= 1, got 0"),
        (True, {"eot_samples": 0}, "eot_samples must be an integer >= 1, got 0"),
        (True, {"max_votes": 150.5}, "max_votes must be an integer >= 1, got 150.5"),
        (True, {"alpha": 0.0}, "0 < alpha < 0.5"),
        (True, {"alpha": 0.5}, "0 < alpha < 0.5"),
        (True, {"max_votes": 99}, "max_votes >= 100"),
    ],
)
def test_arguments_an_attack_does_not_take_are_refused(smoothed: bool, given: dict[str, object], text: str) -> None:
    model, x, y = _smoothed_case()
    with pytest.raises(InputError, match=re.escape(text)):
        rush.attack(model if smoothed else model.classifier, (x, y), ThreatModel("l2", 0.1), **given)  # type: ignore[arg-type]


STEPS, SHARE = 20, 0.1


def _foolbox(network: nn.Module, images: ImageSet, norm: Norm, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Foolbox's starts, points and successes with ``STEPS`` steps of ``SHARE`` epsilon."""
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=SHARE * epsilon, steps=STEPS, random_start=True)
    x = images.pixels()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = attack.get_random_start(eagerpy.astensor(x), epsilon).raw.clamp(0, 1)
        torch.manual_seed(0)
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        _, points, broken = attack(model, x, images.labels, epsilons=epsilon)
    assert_in_threat(points, x, ThreatModel(norm, epsilon))
    return start, points, broken


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.08), ("linf", 0.12), ("l2", 0.4), ("l2", 0.8)])
def test_pgd_from_foolboxs_starts_breaks_the_images_that_foolbox_breaks(
    digits_network: nn.Module, norm: Norm, epsilon: float
) -> None:
    """400 digits at equal budget. Both are deterministic from there; the best iterate may only add to the last one."""
    images = load_images("digits", split="test")
    y = images.labels
    assert y is not None
    start, _, theirs = _foolbox(digits_network, images, norm, epsilon)

    x, threat = images.pixels(), ThreatModel(norm, epsilon)
    best, last = pgd(log_probs_of(digits_network), x, y, threat, steps=STEPS, step_size=SHARE, start=start)
    assert 0.2 < theirs.float().mean() < 0.95
    broken_last, broken_best = (broken(digits_network, points, y) for points in (last, best))
    assert (broken_last != theirs).sum() <= 4
    assert -0.01 <= broken_best.double().mean() - theirs.double().mean() <= 0.02


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.08), ("l2", 0.4)])
def test_the_attack_on_a_data_set_breaks_as_many_images_as_foolbox(
    digits_network: nn.Module, norm: Norm, epsilon: float
) -> None:
    """Here each takes its own starts, on 400 digits: from start to start the share varies by 0.004 (measured over four
    seeds), so that two runs differ by more than 0.02 with probability < 1e-3."""
    images = load_images("digits", split="test")
    _, _, theirs = _foolbox(digits_network, images, norm, epsilon)
    threat = ThreatModel(norm, epsilon)
    ours = rush.attack(digits_network, images, threat, steps=STEPS, step_size=SHARE * epsilon)
    assert abs(ours.broken.mean() - theirs.double().mean().item()) <= 0.02


def test_more_restarts_break_every_image_that_fewer_break(digits_network: nn.Module) -> None:
    """The first restart is the same in both runs and the worst candidate is kept."""
    images, threat = load_images("digits", split="test")[:128], ThreatModel("linf", 0.1)
    one = rush.attack(digits_network, images, threat, steps=3, step_size=0.05)
    four = rush.attack(digits_network, images, threat, steps=3, step_size=0.05, restarts=4)
    assert four.broken[one.broken].all()
    with torch.no_grad():
        y = torch.from_numpy(one.labels)
        first, best = (margin(digits_network(r.adversarial).log_softmax(1), y) for r in (one, four))
    assert (best >= first - 1e-4).all()
    assert (best > first + 1e-3).float().mean() > 0.5


def _digits_attacked(model: Model, images: ImageSet) -> AttackResult:
    eot = 4 if isinstance(model, SmoothedClassifier) else 0
    plan = Plan("pgd", "PGD", "pgd", "fresh", eot, steps=3, step_size=0.25)
    return _evaluation(model, images, ThreatModel("linf", 0.1), max_votes=400).run(plan)


@pytest.fixture(scope="module", params=["plain", "smoothed"])
def whole_attack(request: pytest.FixtureRequest, digits_network: nn.Module) -> tuple[Model, ImageSet, AttackResult]:
    images = load_images("digits", split="test")[:150]
    model = digits_network if request.param == "plain" else SmoothedClassifier(digits_network, 0.1, 10)
    return model, images, _digits_attacked(model, images)


@pytest.mark.parametrize("rows", [[70, 3, 149], [0], list(range(149, 60, -1))])
def test_a_point_does_not_depend_on_the_other_images(
    whole_attack: tuple[Model, ImageSet, AttackResult], rows: list[int]
) -> None:
    model, images, whole = whole_attack
    assert len(whole.adversarial.flatten(1).unique(dim=0)) == 150
    assert_same(_digits_attacked(model, images[np.array(rows)]), whole.select(rows))


def test_a_group_has_the_points_that_it_has_in_the_whole(whole_attack: tuple[Model, ImageSet, AttackResult]) -> None:
    model, images, whole = whole_attack
    for start in (GROUP, 2 * GROUP):
        assert_same(_digits_attacked(model, images[start:]), whole.select(list(range(start, 150))))


def test_each_image_has_its_own_epsilon() -> None:
    """Also across batches, groups and padding: 70 images, each at its own l2 distance."""
    plane, distances = half_space(), torch.linspace(0.02, 0.3, 70)
    epsilon = torch.linspace(0.01, 0.4, 70)
    result = rush.attack(plane, near_plane(plane, distances.tolist()), ThreatModel("l2", epsilon))
    np.testing.assert_allclose(result.l2, epsilon, rtol=2e-3)
    assert result.broken.tolist() == (epsilon > distances).tolist()


PLANS = [
    Plan("none", "", "none"),
    Plan("fgsm", "", "fgsm", "fresh", 4, 1, 1.0),
    Plan("pgd", "", "pgd", "fresh", 4, 5, 0.1),
    Plan("pgd", "", "pgd", "fresh", 2, 3, 0.1, restarts=3),
    Plan("pgd", "", "pgd", "frozen", 4, 5, 0.1),
    Plan("pgd", "", "pgd", "transfer", 0, 5, 0.1, restarts=2),
]


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.method}-{plan.gradient}-{plan.restarts}")
def test_the_stated_passes_are_those_that_the_network_sees(plan: Plan, smoothed: bool) -> None:
    """64 images far from the plane, a full group, of which every verdict takes 200 votes; odds of more: < 1e-12."""
    plane = half_space()
    x, y = near_plane(plane, [0.3] * 64)
    recorder = Recorder(plane)
    plan = plan if smoothed else replace(plan, eot_samples=0)
    model = SmoothedClassifier(recorder, 0.02, 2) if smoothed else recorder
    threat = ThreatModel("l2", 0.01)
    result = _evaluation(model, (x, y), threat, level=0.001, max_votes=1000).run(plan)
    assert (result.votes == (200 if smoothed else 1)).all()
    assert recorder.backward_rows == 64 * plan.passes_per_image
    # PGD's last loss, and what chooses between its two candidates
    losses = plan.restarts * max(1, plan.eot_samples) if plan.method == "pgd" else 0
    choices = 2 * plan.restarts if plan.method == "pgd" else 0
    forward = losses + choices * (100 if smoothed else 1)
    tiles = (2 + choices) * -(-64 * 100 // 255) + DOOR_TILES if smoothed else 1  # of 255 votes; or one padded tile
    rows = 64 * (plan.passes_per_image + losses + (0 if smoothed else choices)) + 256 * tiles
    assert rows <= recorder.forward_rows <= rows + 256 * (tiles // 16 + 1) * smoothed  # images that are asked for again
    assert result.budget["passes_per_image"] == plan.passes_per_image
    assert result.budget["forward_passes_per_image"] == forward
    assert result.budget["votes_per_image"] == (200 if smoothed else 1)


def test_sizes_of_changes_are_those_of_the_points(whole_attack: tuple[Model, ImageSet, AttackResult]) -> None:
    _, images, result = whole_attack
    change = result.adversarial.numpy().astype(np.float64) - images.pixels().numpy()
    np.testing.assert_allclose(result.linf, np.abs(change).max((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(result.l2, np.sqrt((change**2).sum((1, 2, 3))), rtol=1e-12)
    assert result.linf.max() <= 0.1 * (1 + 1e-6)


def test_frozen_noise_is_the_same_at_every_call_and_fresh_noise_is_not() -> None:
    """Seen by the network: inputs minus points, at the first and the second step of an attack that stands still."""
    plane = half_space()
    x, y = near_plane(plane, [0.3])

    def noises(gradient: Gradient) -> Iterator[Tensor]:
        recorder = Recorder(plane)
        plan = Plan("pgd", "", "pgd", gradient, 4, steps=2, step_size=0.0)
        _evaluation(SmoothedClassifier(recorder, 0.1, 2), (x, y), ThreatModel("l2", 1e-6)).candidates(plan)
        return iter(recorder.inputs[:3])

    first, *others = noises("frozen")
    assert all(torch.equal(first, other) for other in others)
    first, second, third = noises("fresh")
    assert (first - second).abs().mean() > 0.05
    assert (second - third).abs().mean() > 0.05
