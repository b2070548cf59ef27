"""Adversarial views against a slow loop over pixels, and what they must and must not touch."""

import math

import pytest
import torch
from torch import Tensor, nn

from rush.errors import InputError
from rush.runtime.randomness import seeded_init, stream
from rush.training.adversarial_views import adversarial_views
from rush.training.contrastive import nt_xent

EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 5


def network() -> nn.Module:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
    return seeded_init(layers, stream(0, "network")).double().eval()


def views(count: int = 3) -> tuple[Tensor, Tensor]:
    """Images with some pixels at the ends of the range."""
    generator = stream(0, "views")
    view_a, view_b = (torch.rand(count, 3, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return (view_a * 1.4 - 0.2).clamp(0, 1), view_b


def attack(
    project: nn.Module,
    pair: tuple[Tensor, Tensor],
    steps: int = STEPS,
    *,
    epsilon: float = EPSILON,
    step_size: float = STEP,
) -> tuple[Tensor, Tensor]:
    start = stream(0, "start")
    return adversarial_views(project, *pair, 0.5, epsilon=epsilon, step_size=step_size, steps=steps, generator=start)


def textbook_loss(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent as a double loop; the first half of the rows are the first views."""
    count, total = len(z) // 2, torch.zeros((), dtype=z.dtype)
    unit = [row / (row @ row).sqrt() for row in z]
    for i in range(len(z)):
        others = sum((unit[i] @ unit[k] / temperature).exp() for k in range(len(z)) if k != i)
        total = total - ((unit[i] @ unit[(i + count) % len(z)] / temperature).exp() / others).log()
    return total / len(z)


def textbook(project: nn.Module, pair: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """The attack pixel by pixel over plain numbers."""
    x = torch.cat(pair)
    clean = x.flatten().tolist()
    uniform = torch.rand(x.shape, generator=stream(0, "start"), dtype=torch.float64).flatten().tolist()

    def inside(value: float, pixel: float) -> float:
        return min(max(value, pixel - EPSILON, 0.0), pixel + EPSILON, 1.0)

    point = [inside(p - EPSILON + 2 * EPSILON * u, p) for p, u in zip(clean, uniform, strict=True)]
    for _ in range(steps):
        tensor = torch.tensor(point, dtype=torch.float64).view(x.shape).requires_grad_()
        gradient = torch.autograd.grad(textbook_loss(project(tensor), 0.5), tensor)[0].flatten().tolist()
        signs = [0.0 if g == 0 else math.copysign(1.0, g) for g in gradient]
        point = [inside(value + STEP * s, p) for value, s, p in zip(point, signs, clean, strict=True)]
    return point


@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_projected_gradient_ascent_written_slowly(steps: int) -> None:
    found = torch.cat(attack(network(), views(), steps)).flatten()
    expected = torch.tensor(textbook(network(), views(), steps), dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_loss_rises_far_above_that_of_random_points_in_the_ball() -> None:
    project, pair = network(), views(8)

    def loss(view_a: Tensor, view_b: Tensor) -> float:
        return nt_xent(project(view_a), project(view_b), 0.5).item()

    clean, attacked = loss(*pair), loss(*attack(project, pair))
    generator = stream(1, "random points")
    draws = [(torch.rand(2, *pair[0].shape, generator=generator) * 2 - 1) * EPSILON for _ in range(20)]
    rises = [loss(*((torch.stack(pair) + draw).clamp(0, 1))) - clean for draw in draws]
    # the loss is nearly linear in so small a ball: a random point moves it by a sum of many small terms of either sign,
    # the attack by the sum of their sizes. Seeded, so no chance.
    assert attacked - clean > 3 * max(map(abs, rises))


def test_points_stay_in_the_ball_and_in_the_pixel_range() -> None:
    pair = views(8)
    for changed, original in zip(attack(network(), pair, 20), pair, strict=True):
        assert changed.shape == original.shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        size = (changed - original).abs()
        assert size.max() <= EPSILON + 1e-15
        assert (size > 0.99 * EPSILON).double().mean() > 0.5  # steps enough to reach the border


def test_nothing_but_the_points_changes() -> None:
    project = network()
    pair = views()
    pair[0].requires_grad_()
    kept = [view.detach().clone() for view in pair]
    state = {name: value.clone() for name, value in project.state_dict().items()}
    with torch.no_grad():
        found = attack(project, pair)
    assert all(not view.requires_grad for view in found)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in project.parameters())
    assert pair[0].grad is None
    assert all(torch.equal(view, old) for view, old in zip(pair, kept, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in project.state_dict().items())
    for view, again in zip(found, attack(project, pair), strict=True):
        assert torch.equal(view, again)


def test_the_start_is_random_in_the_ball() -> None:
    class Flat(nn.Module):
        """Gradients of zero: the attack stays where it starts."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 2, dtype=x.dtype) + 0 * x.sum()

    pair = (torch.full((40, 3, 3, 3), 0.5), torch.full((40, 3, 3, 3), 0.5))
    change = torch.cat(attack(Flat(), pair)) - 0.5
    # 2160 uniform values: the mean's standard deviation is epsilon / sqrt(3 x 2160); six of them pass with odds of
    # 2e-9, and none beyond 0.99 epsilon on one side with odds of (1 - 0.005)^2160 = 2e-5
    assert change.mean().abs() < 6 * EPSILON / math.sqrt(3 * change.numel())
    assert change.max() > 0.99 * EPSILON
    assert change.min() < -0.99 * EPSILON


def test_budgets_out_of_range_are_refused() -> None:
    for epsilon in (0.0, 8.0, float("nan")):
        with pytest.raises(InputError, match=r"epsilon must lie in \(0, 1\] pixel units"):
            attack(network(), views(), epsilon=epsilon)
    with pytest.raises(InputError, match="step_size must be > 0"):
        attack(network(), views(), step_size=0.0)
    with pytest.raises(InputError, match="steps must be >= 1, got 0"):
        attack(network(), views(), steps=0)
    with pytest.raises(InputError, match=r"two views of one shape, got \(3, 3, 3, 3\) and \(2, 3, 3, 3\)"):
        attack(network(), (views()[0], views()[1][:2]))
