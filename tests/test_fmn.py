"""The fast minimum-norm attack: closed-form distances, boundaries, random functions, and beside two other libraries."""

import foolbox
import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

import rush
from attacked import (
    Clouded,
    Counted,
    broken,
    digits,
    distances_to_planes,
    half_space_case,
    log_probs_of,
    parts_case,
    planes_case,
)
from exact_models import HalfSpace
from rush.attacks.fmn import BISECTIONS, fmn
from rush.attacks.gradient import fresh_noise
from rush.attacks.losses import margin, named_loss
from rush.attacks.threat import norms
from rush.choices import Norm
from rush.runtime.randomness import stream

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def _parts() -> tuple[nn.Module, Tensor, Tensor]:
    return parts_case(3)[:3]


def assert_nearest(points: Tensor, case: tuple[nn.Module, Tensor, Tensor], norm: Norm, excess: float = 0.01) -> None:
    """All points are misclassified pixels, none nearer than the closed form allows, none farther than by ``excess``."""
    model, x, y = case
    assert points.min() >= 0
    assert points.max() <= 1
    assert broken(model, points, y).all()
    ratio = norms(points, x, norm) / distances_to_planes(model, x, y, norm)
    assert (ratio > 1 - 1e-4).all()
    assert (ratio < 1 + excess).all()


@pytest.mark.parametrize("case", [half_space_case, planes_case, _parts], ids=["half-space", "planes", "three classes"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_points_are_within_one_percent_of_the_closed_form_distance(norm: Norm, case: object, loss: str) -> None:
    model, x, y = case()  # type: ignore[operator]
    classes = model(x).shape[1]
    if loss == "dlr" and classes < 3:
        loss = "margin"
    named = named_loss(loss, classes)  # type: ignore[arg-type]
    assert_nearest(fmn(log_probs_of(model), x, y, norm, steps=100, loss=named), (model, x, y), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_an_idle_attack_and_a_single_step_do_not_pass_that_test(norm: Norm) -> None:
    model, x, y = half_space_case()
    with pytest.raises(AssertionError):
        assert_nearest(x, (model, x, y), norm)
    corners = torch.where(model.weight.detach() * (1 - 2.0 * y.view(-1, 1, 1, 1)) > 0, 1.0, 0.0)
    with pytest.raises(AssertionError):
        assert_nearest(corners, (model, x, y), norm)


def test_images_at_corners_of_the_box_are_left_by_the_pixels_that_can_move() -> None:
    """Half of the pixels, of 30 times the weight, cannot move in the direction that helps; over the others the distance
    is closed-form."""
    plane, _, _ = half_space_case()
    stuck = torch.arange(64) % 2 == 0
    weight = plane.weight.detach().flatten() * torch.where(stuck, 30.0, 1.0)
    x = torch.where(stuck, (weight < 0).float(), torch.full((64,), 0.5))
    free = weight * ~stuck
    model = HalfSpace(weight.view(1, 8, 8), float(-(weight @ x)) + 0.8)  # class 1 by a score of 0.8
    expected = {"linf": 0.8 / free.abs().sum(), "l2": 0.8 / free.norm(), "l1": 0.8 / free.abs().max()}
    for norm in NORMS:
        points = fmn(log_probs_of(model), x.view(1, 1, 8, 8), torch.tensor([1]), norm)
        assert broken(model, points, torch.tensor([1])).all()
        found = norms(points, x.view(1, 1, 8, 8), norm).item()
        assert float(expected[norm]) * (1 - 1e-4) <= found <= float(expected[norm]) * 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_misclassified_images_and_those_without_a_boundary_come_back_as_they_are(norm: Norm) -> None:
    model, x, y = half_space_case()
    wrong = torch.where(torch.arange(16) < 8, 1 - y, y)
    points = fmn(log_probs_of(model), x, wrong, norm, steps=40)
    assert torch.equal(points[:8], x[:8])
    assert (points[8:] != x[8:]).flatten(1).any(1).all()

    def certain(points: Tensor) -> Tensor:
        own = -1 - (points - 0.5).flatten(1).square().sum(1)
        return torch.stack([torch.zeros_like(own), own], 1)

    assert torch.equal(fmn(certain, x, torch.zeros_like(y), norm, steps=40), x)

    def flat(points: Tensor) -> Tensor:
        return torch.tensor([[0.0, -1.0]]).expand(len(points), 2) + 0 * points.flatten(1).sum(1, keepdim=True)

    assert torch.equal(fmn(flat, x, torch.zeros_like(y), norm, steps=10), x)


@pytest.mark.parametrize("norm", NORMS)
def test_confidence_moves_the_boundary_by_what_it_says(norm: Norm) -> None:
    """The margin of log-probabilities is twice the score, so 1.0 is a score of 0.5, by l2 a distance of 0.05."""
    model, x, y = half_space_case()
    points = fmn(log_probs_of(model), x, y, norm, confidence=1.0)
    reached = margin(log_probs_of(model)(points).detach(), y)
    assert (reached > 1).all()
    assert (reached < 1.2).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_beyond_the_boundary_is_brought_back_to_it(norm: Norm) -> None:
    model, x, y = half_space_case()
    start = x - 0.2 * (2.0 * y - 1).view(-1, 1, 1, 1) * model.weight.detach().sign()
    assert broken(model, start, y).all()
    assert_nearest(fmn(log_probs_of(model), x, y, norm, start=start, steps=300), (model, x, y), norm)


@pytest.mark.parametrize("steps", [1, 30])
def test_the_stated_passes_are_those_that_are_made(steps: int) -> None:
    model, x, y = half_space_case()
    for function, random in ((Counted(log_probs_of(model)), False), (Clouded(log_probs_of(model), 0.0), True)):
        fmn(function, x, y, "l2", steps=steps)
        assert (function.with_gradient, function.without_gradient) == (steps, BISECTIONS + (2 if random else 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sigma", [0.05, 0.25])
def test_points_reach_the_boundary_of_a_smoothed_half_space(sigma: float, norm: Norm) -> None:
    """Its boundary is the plane itself. The point is put where the mean of 64 independent draws turns, so in l2 off the
    plane by about sigma / sqrt(64) times a factor below 2; 5 of that, along with 2 %, for 16 images: odds < 1e-5."""
    plane, x, y = half_space_case()
    noise = [stream(0, "noise", i) for i in range(16)]
    log_probs = fresh_noise(rush.SmoothedClassifier(plane, sigma, 2), 64, noise, antithetic=False)
    points = fmn(log_probs, x, y, norm, steps=60)
    moved = (points != x).flatten(1).any(1)
    exact, exact_l2 = distances_to_planes(plane, x, y, norm), distances_to_planes(plane, x, y, "l2")
    slack = 0.02 + 10 * sigma / 8 / exact_l2
    ratio = norms(points, x, norm) / exact
    assert ((ratio - 1).abs() < slack)[moved].all()
    assert moved[exact_l2 > 5 * sigma].all()


@pytest.mark.parametrize("norm", NORMS)
def test_points_are_as_near_as_those_of_fab_and_foolbox_at_equal_gradients(
    digits_network: nn.Module, norm: Norm
) -> None:
    """150 digits, 100 gradients each; FAB takes ten a step. Nearer by 1 % on twice as many images as farther (measured:
    three to nine times), and FAB begins at x, so nothing is random. Beside foolbox's own FMN (l-inf; in l2 and l1 it
    stops short where pixels are at the end of their range): nearer or as near on 9 of 10 images."""
    x, y = digits(150)
    points = fmn(log_probs_of(digits_network), x, y, norm, steps=100)
    assert broken(digits_network, points, y).all()
    ours = norms(points, x, norm)
    fab = FABAttack_PT(
        digits_network, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], n_iter=10, eps=100.0, device="cpu"
    )
    with torch.random.fork_rng(devices=[]):
        theirs = fab.perturb(x, y)
    found = torch.where(broken(digits_network, theirs, y), norms(theirs, x, norm), torch.inf)
    assert (ours < 0.99 * found).sum() > 2 * (ours > 1.01 * found).sum()
    if norm == "linf":
        model = foolbox.PyTorchModel(digits_network, bounds=(0, 1), device="cpu")
        _, points, success = foolbox.attacks.LInfFMNAttack(steps=100)(model, x, y, epsilons=None)
        assert success.all()
        assert (ours <= 1.01 * norms(points, x, norm)).double().mean() >= 0.9
