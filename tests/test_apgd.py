"""Auto-PGD: its step sizes and best point, on random functions too, and beside the original AutoAttack."""

from itertools import pairwise

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from attacked import Clouded, Counted, PixelByPixel, broken, digits, generators, log_probs_of, valley
from exact_models import assert_in_threat
from rush.attacks.apgd import FIRST_STEP, RANDOM_FIRST_STEP, apgd, checkpoints
from rush.attacks.losses import cross_entropy, dlr, margin
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.choices import Norm
from rush.runtime.randomness import stream

ORIGINAL = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def test_checkpoints_are_those_of_the_paper() -> None:
    """Croce & Hein 2020, section 3: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    expected = [round(100 * share) for share in shares[1:-1]]
    assert checkpoints(100, "linf") == checkpoints(100, "l2") == expected == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10, "l2") == [3, 5, 6, 7, 8, 9]
    assert checkpoints(1, "linf") == checkpoints(1, "l1") == []
    assert checkpoints(50, "l1") == list(range(2, 50, 2))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_stated_passes_are_those_that_are_made(steps: int, norm: Norm) -> None:
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    weight = torch.randn((2, 4), generator=stream(0, "weight"))

    def linear(points: Tensor) -> Tensor:
        return (points.flatten(1) @ weight.T).log_softmax(1)

    for function, random in ((Counted(linear), False), (Clouded(linear, 1.0), True)):
        apgd(function, x, y, ThreatModel(norm, 0.1), steps=steps)
        forward = 2 * (len(checkpoints(steps, norm)) + 1) if random else 1
        assert (function.with_gradient, function.without_gradient) == (steps, forward)


def _recorded(seen: list[float], random: float | None = None) -> Clouded | Counted:
    def inner(points: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(points.detach().item())
        return valley(points)

    return Counted(inner) if random is None else Clouded(inner, random)


def test_steps_are_halved_from_the_paper_s_rule_on_a_function_of_one_pixel() -> None:
    """Worked by hand: epsilon 0.1 around 0.5, peak at 0.56, 20 steps, checkpoints after 5, 9, 12, 14, 16, 18.

    With steps of 0.2 the point goes between the ends of the ball: at 5 fewer than 3/4 of the steps rose, so the step is
    0.1 and the image back at its best point. In the end the step is 0.2 / 2^6 at most, and so the distance to the peak.
    """
    seen: list[float] = []
    x = torch.full((1, 1, 1, 1), 0.5)
    best, _ = apgd(_recorded(seen), x, torch.tensor([0]), ThreatModel("linf", 0.1), steps=20)
    assert len(seen) == 20
    assert seen[0] == 0.5
    assert seen[1] == pytest.approx(0.6)  # 0.7, moved into the ball
    assert seen[2] == pytest.approx(0.75 * 0.4 + 0.25 * 0.7)  # down to 0.4; plus a quarter of the move before
    moves = [abs(b - a) for a, b in pairwise(seen)]
    assert max(moves[16:]) < 0.2 / 2**3
    assert abs(best.item() - 0.56) < 0.01
    assert abs(best.item() - 0.56) <= min(abs(value - 0.56) for value in seen) + 1e-6


def _projected(point: Tensor, x: Tensor, norm: Norm, epsilon: float) -> Tensor:
    change = point - x
    if norm == "linf":
        change = change.clamp(-epsilon, epsilon)
    else:
        change = change * min(1.0, epsilon / max(float(change.norm()), 1e-12))
    return (x + change).clamp(0, 1)


def _slow_apgd(model: nn.Module, x: Tensor, label: int, norm: Norm, epsilon: float, steps: int) -> tuple[Tensor, int]:
    """Algorithm 1 of Croce & Hein 2020 for one image (1, C, H, W), one line after the other; how often it went back.

    Going back to the best point also forgets the move that led away from it.
    """

    def measured(point: Tensor) -> tuple[float, Tensor]:
        point = point.detach().requires_grad_(True)
        loss = nn.functional.cross_entropy(model(point), torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, point)
        return float(loss.detach()), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    eta, halved, back = 2 * epsilon, False, 0
    point = before = best = x
    losses: list[float] = []
    best_loss = loss_at_check = -float("inf")
    last_check = rises = 0
    for i in range(steps):
        loss, direction = measured(point)
        rises += bool(losses) and loss > losses[-1]
        if loss > best_loss:
            best, best_loss = point, loss
        if i in checkpoints(steps, norm):
            first, second = rises < 0.75 * (i - last_check), not halved and best_loss == loss_at_check
            halved = first or second
            if halved:
                eta, point, before, back = eta / 2, best, best, back + 1
                loss, direction = measured(point)
            last_check, rises, loss_at_check = i, 0, best_loss
        losses.append(loss)
        stepped = _projected(point + eta * direction, x, norm, epsilon)
        if i > 0:
            stepped = _projected(point + 0.75 * (stepped - point) + 0.25 * (point - before), x, norm, epsilon)
        point, before = stepped, point
    return point, back


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_the_algorithm_of_the_paper_image_by_image(norm: Norm) -> None:
    """In float64, on a bent network, 60 steps: the final point of each image, whose steps were halved 1 to 8 times."""
    model = PixelByPixel(24, 3).double()
    x = torch.rand((8, 1, 4, 6), generator=stream(0, "x"), dtype=torch.float64)
    y = torch.arange(8) % 3
    epsilon = {"linf": 0.2, "l2": 0.7}[norm]
    _, last = apgd(log_probs_of(model), x, y, ThreatModel(norm, epsilon), steps=60)
    slow = [_slow_apgd(model, x[i : i + 1], int(y[i]), norm, epsilon, 60) for i in range(8)]
    assert sum(back for _, back in slow) >= 16
    torch.testing.assert_close(last, torch.cat([point for point, _ in slow]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_common_random_numbers_find_the_best_point_under_any_common_cloud(loss: object) -> None:
    """A number 1,000 times larger than any difference between points is added to each call's losses, the same for all
    points of a call: compared on the same draw it cancels, compared across calls it decides."""
    x, y, threat = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), ThreatModel("linf", 0.1)
    quiet, loud = [], []
    expected, _ = apgd(_recorded(quiet, 0.0), x, y, threat, steps=40, loss=loss)  # type: ignore[arg-type]
    found, _ = apgd(_recorded(loud, 100.0), x, y, threat, steps=40, loss=loss)  # type: ignore[arg-type]
    assert loud == pytest.approx(quiet, abs=1e-4)
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    assert found.item() == pytest.approx(0.56, abs=4e-3)
    luck, _ = pgd(_recorded([], 100.0), x, y, threat, steps=40, step_size=RANDOM_FIRST_STEP["linf"], loss=loss)  # type: ignore[arg-type]
    assert abs(luck.item() - 0.56) > 4e-3


def test_a_random_function_s_candidates_are_points_of_checkpoints_and_the_last() -> None:
    seen: list[float] = []
    x, threat = torch.full((1, 1, 1, 1), 0.5), ThreatModel("linf", 0.1)
    best, last = apgd(_recorded(seen, 1.0), x, torch.tensor([0]), threat, steps=30)
    at_checkpoints = [seen[i] for i in checkpoints(30, "linf")]
    assert any(best.item() == pytest.approx(value, abs=1e-7) for value in (*at_checkpoints, last.item()))


def test_a_misclassified_point_is_kept_before_one_of_larger_loss() -> None:
    """Three classes. Below 0.45 class 1 wins at cross-entropy 0.75; above, class 0 is the most probable at 1.09."""

    def log_probs(points: Tensor) -> Tensor:
        value = points.flatten(1)[:, 0]
        own, nothing = 0.02 - 0.01 * value, torch.zeros_like(value)
        below = torch.stack([own, nothing + 0.1, nothing - 9], 1)
        return torch.where((value < 0.45)[:, None], below, torch.stack([own, nothing, nothing], 1)).log_softmax(1)

    x, y, threat = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), ThreatModel("linf", 0.1)
    best, last = apgd(log_probs, x, y, threat, steps=1, start=torch.full_like(x, 0.44))
    assert last.item() == pytest.approx(0.6)
    assert cross_entropy(log_probs(last), y) > cross_entropy(log_probs(best), y)
    assert best.item() == pytest.approx(0.44)
    assert log_probs(best).argmax(1).item() == 1
    assert log_probs(last).argmax(1).item() == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_best_is_the_largest_measured_loss_among_the_misclassified(digits_network: nn.Module, norm: Norm) -> None:
    x, y = digits(40)
    threat = ThreatModel(norm, {"linf": 0.08, "l2": 0.5, "l1": 1.5}[norm])
    log_probs = Counted(log_probs_of(digits_network))
    best, last = apgd(log_probs, x, y, threat, steps=20)
    found = [digits_network(points).log_softmax(1) for points in log_probs.points]
    ranks = torch.stack([1e6 * (margin(f, y) > 0).double() + cross_entropy(f, y) for f in found]).argmax(0)
    assert torch.equal(best, torch.stack(log_probs.points)[ranks, torch.arange(40)])
    assert torch.equal(last, log_probs.points[-1])
    assert (best != last).flatten(1).any(1).sum() > 3


def test_first_steps_are_two_epsilon_and_one_half_on_random_functions() -> None:
    x, y, threat = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), ThreatModel("linf", 0.04)
    for random, share in ((None, FIRST_STEP["linf"]), (0.0, RANDOM_FIRST_STEP["linf"])):
        seen: list[float] = []
        apgd(_recorded(seen, random), x, y, threat, steps=2)
        assert seen[1] == pytest.approx(0.5 + min(share, 1) * 0.04)


CASES = [("linf", 0.06), ("linf", 0.1), ("l2", 0.4), ("l2", 0.6), ("l1", 1.0), ("l1", 2.0)]


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient:Warning")
@pytest.mark.parametrize("name", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "epsilon"), CASES)
def test_apgd_breaks_as_many_images_as_the_original(
    digits_network: nn.Module, norm: Norm, epsilon: float, name: str
) -> None:
    """400 digits, 40 steps, the same starts, nothing random from there. l-inf and l2: within 1 point (measured: 0 to
    0.5). l1, where the step takes heed of [0, 1] and the original's does not: not 2 points fewer."""
    x, y = digits(400)
    threat = ThreatModel(norm, epsilon)
    start = threat.random_start(x, generators(400))
    original = APGDAttack(digits_network, n_iter=40, norm=ORIGINAL[norm], eps=epsilon, loss=name, device="cpu")
    original.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        theirs = original.attack_single_run(x, y, x_init=start)[3].detach()
    assert_in_threat(theirs, x, threat)
    loss = dlr if name == "dlr" else cross_entropy
    best, _ = apgd(log_probs_of(digits_network), x, y, threat, steps=40, loss=loss, start=start)
    assert_in_threat(best, x, threat)
    found, expected = broken(digits_network, best, y), broken(digits_network, theirs, y)
    assert 0.15 < expected.double().mean() < 0.95
    gained = int((found & ~expected).sum()) - int((expected & ~found).sum())
    assert gained >= (-8 if norm == "l1" else -4)
    assert gained <= (24 if norm == "l1" else 4)
    assert int((expected & ~found).sum()) <= 12


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
def test_apgd_breaks_more_images_than_pgd_of_the_same_cost(
    digits_network: nn.Module, norm: Norm, epsilon: float
) -> None:
    """On the cross-entropy, from the images themselves, nothing random: by 4 points or more."""
    x, y = digits(400)
    threat, log_probs = ThreatModel(norm, epsilon), log_probs_of(digits_network)
    best, _ = apgd(log_probs, x, y, threat, steps=40)
    plain, _ = pgd(log_probs, x, y, threat, steps=40, step_size=0.0625)
    assert broken(digits_network, best, y).sum() >= broken(digits_network, plain, y).sum() + 8
