"""Losses against slow formulas; FGSM, MI-FGSM, PGD and random search against closed-form distances."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rush
from attacked import (
    Attack,
    Clouded,
    Counted,
    PixelByPixel,
    assert_reaches,
    broken,
    digits,
    distances_to_planes,
    generators,
    half_space_case,
    idle,
    log_probs_of,
    parts_case,
    planes_case,
    valley,
)
from exact_models import assert_in_threat
from rush.attacks.apgd import apgd
from rush.attacks.fgsm import fgsm
from rush.attacks.fmn import fmn
from rush.attacks.gradient import LogProbs, fresh_noise
from rush.attacks.losses import LossName, dlr, named_loss
from rush.attacks.mifgsm import mifgsm
from rush.attacks.pgd import pgd
from rush.attacks.random_search import best_of_proposals, random_search
from rush.attacks.square import square
from rush.attacks.threat import ThreatModel, norms
from rush.choices import Norm
from rush.errors import InputError
from rush.runtime.randomness import stream

Case = tuple[nn.Module, Tensor, Tensor]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": lambda f, x, y, threat: pgd(f, x, y, threat, steps=40, step_size=0.0625)[0],
    "mifgsm": lambda f, x, y, threat: mifgsm(f, x, y, threat, steps=20)[0],
    "apgd": lambda f, x, y, threat: apgd(f, x, y, threat, steps=50)[0],
    "apgd-margin": lambda f, x, y, threat: apgd(f, x, y, threat, steps=50, loss=named_loss("margin", 2))[0],
}
# Where the function is random, what is best of many measured values is luck: PGD and MI-FGSM leave that to the caller.
ATTACKS_ON_NOISE: dict[str, Attack] = {
    **ATTACKS,
    "pgd": lambda f, x, y, threat: pgd(f, x, y, threat, steps=40, step_size=0.0625)[1],
    "mifgsm": lambda f, x, y, threat: mifgsm(f, x, y, threat, steps=20)[1],
}


def _search(log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    return random_search(log_probs, x, y, threat, generators(len(x)), draws=1000)


@pytest.mark.parametrize("case", [half_space_case, planes_case], ids=["half-space", "planes"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_reach_the_closed_form_distance(name: str, norm: Norm, case: Callable[[], Case]) -> None:
    assert_reaches(ATTACKS[name], case(), norm)


@pytest.mark.parametrize("case", [half_space_case, planes_case], ids=["half-space", "planes"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("control", [idle, _search], ids=["idle", "random search"])
def test_neither_an_idle_attack_nor_random_search_passes_that_test(
    control: Attack, norm: Norm, case: Callable[[], Case]
) -> None:
    """64 pixels: of 1,000 random directions none is near the normal. Odds that every image is broken: < 1e-9."""
    with pytest.raises(AssertionError):
        assert_reaches(control, case(), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("loss", "classes"),
    [("cross-entropy", 3), ("margin", 3), ("cross-entropy", 4), ("margin", 4), ("dlr", 4)],
)
def test_targeted_losses_reach_the_distance_of_their_class(loss: LossName, classes: int, norm: Norm) -> None:
    """The linear model of K classes whose second class is alone near; the targeted DLR takes four."""
    model, x, y, targets = parts_case(classes)

    def attack(log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        points, _ = apgd(log_probs, x, y, threat, steps=40, loss=named_loss(loss, classes, targets))
        assert (model(points).argmax(1) == torch.where(broken(model, points, y), targets, y)).all()
        return points

    assert_reaches(attack, (model, x, y), norm)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_a_target_that_is_not_the_nearest_class_is_reached_too(loss: LossName) -> None:
    """The target is drawn past the label, and stops where its own gap closes: 1 % before it is still open."""
    model, x, y, nearest = parts_case(4)
    targets = torch.stack([next(t for t in torch.arange(4) if t not in pair) for pair in zip(y, nearest, strict=True)])
    gaps = (model(x).gather(1, y[:, None]) - model(x).gather(1, targets[:, None]))[:, 0].detach()
    for factor, success in ((1.01, True), (0.99, False)):
        threat = ThreatModel("l2", factor * gaps / (10 * math.sqrt(32)))
        points, _ = apgd(log_probs_of(model), x, y, threat, steps=60, loss=named_loss(loss, 4, targets))
        logits = model(points)
        past = logits.gather(1, targets[:, None]) > logits.gather(1, y[:, None])
        assert past.flatten().tolist() == [success] * len(x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS_ON_NOISE)
@pytest.mark.parametrize("sigma", [0.05, 0.25])
def test_attacks_reach_the_distance_of_a_smoothed_half_space(name: str, norm: Norm, sigma: float) -> None:
    """Beyond 1 % + 4 sigma / sqrt(10,000) in l2, what 10,000 votes tell from the boundary. With one noise draw a step;
    of a plane even that has the true direction, and common random numbers order any two points. The smoothed
    boundary is the plane itself, so points are judged without noise."""
    plane, x, y = half_space_case()
    exact, exact_l2 = distances_to_planes(plane, x, y, norm), distances_to_planes(plane, x, y, "l2")
    noise = [stream(0, "noise", i) for i in range(len(x))]
    log_probs = fresh_noise(rush.SmoothedClassifier(plane, sigma, 2), 1, noise, antithetic=False)
    for sign, success in ((1, True), (-1, False)):
        factor = 1 + sign * (0.01 + 4 * sigma / 100 / exact_l2)
        threat = ThreatModel(norm, (factor.clamp(min=0.1) * exact).float())
        points = ATTACKS_ON_NOISE[name](log_probs, x, y, threat)
        assert_in_threat(points, x, threat)
        assert broken(plane, points, y).tolist() == [success] * len(x)


def _everything(
    log_probs: LogProbs, x: Tensor, y: Tensor, norm: Norm, epsilon: Tensor, own: list[int]
) -> dict[str, Tensor]:
    """The points of every attack, with generators for the images ``own``."""
    threat = ThreatModel(norm, epsilon)
    draws = [[stream(0, name, i) for i in own] for name in ("start", "square", "search")]
    start = threat.random_start(x, draws[0])
    best, last = apgd(log_probs, x, y, threat, steps=25, start=start)
    return {
        "apgd": best,
        "apgd last": last,
        "apgd dlr": apgd(log_probs, x, y, threat, steps=25, loss=dlr)[0],
        "pgd": pgd(log_probs, x, y, threat, steps=10, step_size=0.3, start=start)[0],
        "fgsm": fgsm(log_probs, x, y, threat),
        "mifgsm": mifgsm(log_probs, x, y, threat, steps=10, start=start)[1],
        "square": square(log_probs, x, y, threat, draws[1], queries=150),
        "random search": random_search(log_probs, x, y, threat, draws[2], draws=40),
        "fmn": fmn(log_probs, x, y, norm, steps=30),
    }


@pytest.mark.parametrize("norm", NORMS)
def test_an_images_points_are_the_same_bits_in_any_company(norm: Norm) -> None:
    """On a model whose own bits are the same in any company: 20 images at once, three of them in another order, one."""
    model = PixelByPixel(3 * 6 * 5, 4)
    x = torch.rand((20, 3, 6, 5), generator=stream(0, "x"))
    x = torch.where(torch.rand(x.shape, generator=stream(0, "corners")) < 0.3, x.round(), x)
    y = model(x).argmax(1)
    epsilon = {"linf": 0.05, "l2": 0.5, "l1": 3.0}[norm] * torch.logspace(-2, 0.3, 20)
    whole = _everything(log_probs_of(model), x, y, norm, epsilon, list(range(20)))
    for rows in ([17, 0, 5], [3]):
        part = _everything(log_probs_of(model), x[rows], y[rows], norm, epsilon[rows], rows)
        for name, points in part.items():
            assert torch.equal(points, whole[name][rows]), name
    for name, points in whole.items():
        assert (points != x).flatten(1).any(1).float().mean() > 0.9, name
        if name != "fmn":
            assert_in_threat(points, x, ThreatModel(norm, epsilon))
    assert 0 < broken(model, whole["apgd"], y).sum() < 20


@pytest.mark.parametrize("norm", NORMS)
def test_every_point_that_is_looked_at_lies_in_the_threat(digits_network: nn.Module, norm: Norm) -> None:
    """On digits, most of whose pixels are exactly 0 or 1; also what the network is shown on the way."""
    x, y = digits(30)
    epsilon = {"linf": 0.3, "l2": 2.0, "l1": 6.0}[norm] * torch.linspace(0.1, 1, 30)
    log_probs = Counted(log_probs_of(digits_network))
    found = _everything(log_probs, x, y, norm, epsilon, list(range(30)))
    minimal = found.pop("fmn")
    assert minimal.min() >= 0
    assert minimal.max() <= 1
    assert len(log_probs.points) > 300
    calls_of_fmn = 30 + 1 + 10
    assert (norms(found["pgd"], x, norm) > 0.9 * epsilon).all()
    for points in (*found.values(), *log_probs.points[:-calls_of_fmn]):
        assert_in_threat(points, x, ThreatModel(norm, epsilon))


def _slow(name: LossName, logits: list[float], label: int, target: int | None) -> float:
    best = max(z for i, z in enumerate(logits) if i != label) if target is None else logits[target]
    if name == "margin":
        return best - logits[label]
    if name == "dlr":
        ranked = sorted(logits, reverse=True)
        return (best - logits[label]) / (ranked[0] - (ranked[2] if target is None else (ranked[2] + ranked[3]) / 2))
    total = math.log(sum(math.exp(z) for z in logits))
    return total - logits[label] if target is None else logits[target] - total


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["cross-entropy", "margin", "dlr"])
def test_losses_are_the_textbooks_on_logits_and_on_log_probabilities(name: LossName, targeted: bool) -> None:
    logits = torch.randn((60, 5), generator=stream(0, "logits"), dtype=torch.float64) * 4
    y = torch.randint(5, (60,), generator=stream(0, "y"))
    targets = (y + torch.randint(1, 5, (60,), generator=stream(0, "targets"))) % 5
    loss = named_loss(name, 5, targets if targeted else None)
    expected = [
        _slow(name, row.tolist(), int(label), int(target) if targeted else None)
        for row, label, target in zip(logits, y, targets, strict=True)
    ]
    found = loss(logits.log_softmax(1), y)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    if name == "dlr":  # neither shift nor scale of the logits matters
        torch.testing.assert_close(loss((logits * 1000 - 7).log_softmax(1), y), found, rtol=1e-6, atol=1e-9)
    if name != "cross-entropy" and not targeted:
        assert ((found > 0) == (logits.argmax(1) != y)).all()


def test_losses_that_the_model_cannot_have_are_refused() -> None:
    targets = torch.tensor([0, 1])
    for given, text in (
        (("dlr", 2, None), "dlr compares the 3 most probable classes and the model has 2; use margin"),
        (("dlr", 3, targets), "targeted dlr compares the 4 most probable classes and the model has 3"),
        (("cw", 10, None), "unknown loss 'cw'; allowed: cross-entropy, margin, dlr"),
        (("margin", 2, torch.tensor([0, 2])), "targets must be 0 to 1, got 0 to 2"),
        (("margin", 2, torch.tensor([-1, 1])), "targets must be 0 to 1, got -1 to 1"),
        (("margin", 2, torch.tensor([0.0])), "targets must be int64 (B,), got torch.float32 of shape (1,)"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            named_loss(*given)  # type: ignore[arg-type]


def test_dlr_of_three_equal_logits_is_finite() -> None:
    log_probs = torch.zeros(1, 4).log_softmax(1).requires_grad_(True)
    value = dlr(log_probs, torch.tensor([1]))
    value.sum().backward()
    assert value.item() == 0
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mifgsm_follows_the_decayed_sum_of_scaled_gradients(norm: Norm) -> None:
    """Against the update written slowly, on a bent function with steps too short for the ball's edge."""
    x = torch.rand((3, 1, 4, 4), generator=stream(0, "x")) * 0.2 + 0.4
    model, y = PixelByPixel(16, 3), torch.tensor([0, 1, 2])
    threat, point, total = ThreatModel(norm, 0.2), x, torch.zeros_like(x)
    for _ in range(4):
        point = point.detach().requires_grad_(True)
        nn.functional.cross_entropy(model(point), y, reduction="sum").backward()
        assert point.grad is not None
        total = 0.8 * total + point.grad / point.grad.abs().sum((1, 2, 3), keepdim=True)
        unit = total.sign() if norm == "linf" else total / total.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        point = point + 0.1 * 0.2 * unit
    _, last = mifgsm(log_probs_of(model), x, y, threat, steps=4, step_size=0.1, decay=0.8)
    torch.testing.assert_close(last, point.detach(), rtol=0, atol=1e-5)
    _, without = mifgsm(log_probs_of(model), x, y, threat, steps=4, step_size=0.1, decay=0.0)
    _, plain = pgd(log_probs_of(model), x, y, threat, steps=4, step_size=0.1)
    torch.testing.assert_close(without, plain, rtol=0, atol=1e-6)
    assert (last - plain).abs().max() > 1e-3


@pytest.mark.parametrize("random", [False, True])
def test_random_search_keeps_its_best_draw(random: bool) -> None:
    """With a number added to every call's values, 1,000 times what the points differ in, the same point is kept."""
    x, y, threat = torch.full((6, 1, 1, 1), 0.3), torch.zeros(6, dtype=torch.int64), ThreatModel("linf", 0.3)
    log_probs = Clouded(valley, 100.0) if random else Counted(valley)
    best = random_search(log_probs, x, y, threat, generators(6), draws=60, refresh=7)
    away = (torch.stack(log_probs.points).flatten(2)[..., 0] - 0.56).abs()
    torch.testing.assert_close((best.flatten() - 0.56).abs(), away.amin(0), rtol=0, atol=2e-5 if random else 0)
    assert (log_probs.with_gradient, log_probs.without_gradient) == (0, 61 + (59 // 7 if random else 0))
    assert not isinstance(log_probs, Clouded) or log_probs.draws == 1 + 59 // 7


def test_proposals_stop_for_images_that_are_done_and_change_no_other() -> None:
    """Proposals climb from 0 by 0.01; the first image is done at 0.1, the second never: it sees every proposal."""
    x, y = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)

    def log_probs(points: Tensor) -> Tensor:
        own = torch.tensor([0.1, 9.0]) - points.flatten()
        return torch.stack([own, torch.zeros(2)], 1)

    def climb(_query: int, best: Tensor) -> Tensor:
        return best + 0.01

    counted = Counted(log_probs)
    found = best_of_proposals(counted, y, x, climb, passes=50, loss=named_loss("margin", 2), refresh=1, enough=1e-3)
    assert found.flatten().tolist() == pytest.approx([0.11, 0.49])
    assert counted.without_gradient == 50
    both = Counted(lambda points: log_probs(points * 100))
    best_of_proposals(both, y, x, climb, passes=5000, loss=named_loss("margin", 2), enough=1e-3)
    assert both.without_gradient < 100
