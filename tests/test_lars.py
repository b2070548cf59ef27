"""LARS against the update of its papers written slowly, one number and one tensor at a time."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rush.errors import ConfigError
from rush.runtime.randomness import stream
from rush.training.lars import LARS

SHAPES = ((4, 3, 3, 3), (5, 7), (6,), (1,))


def tensors(*names: str | int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = stream(0, "lars", *names)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors("weights", dtype=dtype)]


def groups(own: list[nn.Parameter], weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Matrices adapted and decayed, vectors not."""
    return [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "adapt": False},
    ]


def descend(optimizer: LARS, own: list[nn.Parameter], steps: range) -> None:
    """Steps along gradients that are named by their number, at a rate that changes."""
    for step in steps:
        for parameter, gradient in zip(own, tensors("gradient", step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


def rate(step: int) -> float:
    return 2.0 / (1 + step)


def slowly(steps: int, momentum: float, weight_decay: float, trust: float) -> Iterator[list[float]]:
    """All numbers after each step: loops over tensors and over numbers, nothing but plain floats."""
    weights = [tensor.flatten().tolist() for tensor in tensors("weights")]
    velocities = [[0.0] * len(tensor) for tensor in weights]
    for step in range(steps):
        gradients = [tensor.flatten().tolist() for tensor in tensors("gradient", step)]
        for shape, weight, gradient, velocity in zip(SHAPES, weights, gradients, velocities, strict=True):
            update, ratio = list(gradient), 1.0
            if len(shape) > 1:
                update = [g + weight_decay * w for g, w in zip(gradient, weight, strict=True)]
                ratio = trust * math.hypot(*weight) / math.hypot(*update)
            for place, part in enumerate(update):
                velocity[place] = momentum * velocity[place] + rate(step) * ratio * part
                weight[place] -= velocity[place]
        yield [number for weight in weights for number in weight]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_is_that_of_the_papers(momentum: float, weight_decay: float) -> None:
    own = parameters()
    optimizer = LARS(groups(own, weight_decay), 1.0, momentum=momentum, trust_coefficient=0.05)
    for step, expected in enumerate(slowly(3, momentum, weight_decay, 0.05)):
        descend(optimizer, own, range(step, step + 1))
        found = torch.cat([parameter.detach().flatten() for parameter in own])
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_first_two_steps_of_one_number_in_closed_form() -> None:
    """w = 3 and g = 4 first: u = 4 + 0.5 * 3 = 5.5, r = 0.1 * 3 / 5.5, so v = 0.3 lr whatever the gradient's size."""
    weight = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = LARS([weight], 2.0, momentum=0.5, weight_decay=0.5, trust_coefficient=0.1)
    weight.grad = torch.tensor([4.0], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(3 - 0.6, rel=1e-14)
    weight.grad = torch.tensor([-1e6], dtype=torch.float64)
    optimizer.step()  # v = 0.5 * 0.6 - 2 * 0.1 * 2.4
    assert weight.item() == pytest.approx(2.4 - (0.3 - 0.48), rel=1e-14)


def test_a_step_asks_for_no_value() -> None:
    """Tensors without values do: whatever waits for the device, as item() or bool() do, fails on them."""
    with torch.device("meta"):
        own = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
    optimizer = LARS(groups(own), 1.0)
    for parameter in own:
        parameter.grad = torch.empty_like(parameter)
    for _ in range(2):
        optimizer.step()


def test_an_unadapted_group_is_torchs_own_momentum_at_a_constant_rate() -> None:
    own, other = parameters(), parameters()
    lars = LARS([{"params": own, "adapt": False}], 0.1, momentum=0.9)
    sgd = torch.optim.SGD(other, lr=0.1, momentum=0.9)
    for step in range(4):
        for one, two, gradient in zip(own, other, tensors("gradient", step), strict=True):
            one.grad, two.grad = gradient, gradient.clone()
        lars.step()
        sgd.step()
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("weight", "gradient", "expected"), [(0.0, 1.0, -0.5), (2.0, 0.0, 2.0), (0.0, 0.0, 0.0)])
def test_where_a_norm_is_zero_the_step_is_the_plain_one_and_finite(
    weight: float, gradient: float, expected: float
) -> None:
    own = nn.Parameter(torch.full((2, 2), weight))
    own.grad = torch.full((2, 2), gradient)
    LARS([own], 0.5).step()
    assert torch.equal(own.detach(), torch.full((2, 2), expected))


def test_a_step_does_not_depend_on_the_scale_of_the_gradient() -> None:
    """Without decay, by a power of two: the same bits."""
    found = []
    for scale in (1.0, 2.0**20):
        own = nn.Parameter(tensors("weights", dtype=torch.float32)[0])
        own.grad = tensors("gradient", 0, dtype=torch.float32)[0] * scale
        LARS([own], 1.0).step()
        found.append(own.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], tensors("weights", dtype=torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_optimizer_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    through, before = parameters(dtype), parameters(dtype)
    descend(LARS(groups(through), 1.0), through, range(5))
    first = LARS(groups(before), 1.0)
    descend(first, before, range(2))
    state = copy.deepcopy(first.state_dict())
    after = [nn.Parameter(parameter.detach().clone()) for parameter in before]
    second = LARS(groups(after, weight_decay=0.0), 7.0, momentum=0.1, trust_coefficient=1.0)
    second.load_state_dict(state)
    descend(second, after, range(2, 5))
    assert all(torch.equal(one, two) for one, two in zip(through, after, strict=True))


def test_parameters_without_gradient_are_left_alone_and_hold_no_state() -> None:
    own = parameters()
    own[0].grad = tensors("gradient", 0)[0]
    optimizer = LARS(groups(own), 1.0)
    optimizer.step()
    assert [list(optimizer.state[parameter]) for parameter in own[:1]] == [["velocity"]]
    assert all(torch.equal(parameter, old) for parameter, old in zip(own[1:], tensors("weights")[1:], strict=True))
    assert len(optimizer.state) == 1


def test_gradients_are_not_changed_by_a_step() -> None:
    own = parameters()
    optimizer = LARS(groups(own), 1.0)
    descend(optimizer, own, range(2))
    for parameter, gradient in zip(own, tensors("gradient", 1), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_closure_is_called_with_gradients_before_the_step() -> None:
    own = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([own], 1.0, trust_coefficient=0.1)

    def closure() -> float:
        loss = own.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 7.0
    expected = torch.tensor([3.0, 4.0]) - 0.1 * 5 / math.sqrt(2)
    torch.testing.assert_close(own.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr of LARS must be >= 0, got -1.0"),
        ({"lr": math.nan}, "lr of LARS must be >= 0, got nan"),
        ({"momentum": 1.0}, "momentum of LARS must be >= 0 and < 1, got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay of LARS must be >= 0, got -0.1"),
        ({"trust_coefficient": 0.0}, "trust_coefficient of LARS must be > 0, got 0.0"),
        ({"adapt": False, "weight_decay": 0.1}, "adapt=False is not decayed, got weight_decay 0.1; give 0 or adapt"),
    ],
)
def test_numbers_out_of_their_range_are_refused_for_all_and_for_one_group(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LARS(parameters(), **{"lr": 1.0, **options})
    group: dict[str, Any] = {"params": parameters(), **options}
    with pytest.raises(ConfigError, match=text):
        LARS([group], 1.0)


def test_the_optimizers_own_decay_is_for_adapted_groups_only() -> None:
    matrices, vectors = parameters()[:2], parameters()[2:]
    given: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "adapt": False}]
    optimizer = LARS(given, 1.0, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
