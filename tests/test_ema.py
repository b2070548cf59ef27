"""The weight average against its closed form, and going on from a saved state with the same bits."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rush.errors import ConfigError
from rush.runtime.randomness import stream
from rush.training.ema import WeightAverage


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Parameters, running statistics and an integer buffer."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)).to(dtype)


@torch.no_grad()
def move(module: nn.Module, step: int) -> None:
    """Other weights and statistics, named by their number, and one batch more counted."""
    generator = stream(0, "ema", step)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        else:
            tensor.add_(1)


def averaged(average: WeightAverage, module: nn.Module) -> dict[str, Tensor]:
    other = copy.deepcopy(module)
    average.copy_into(other)
    return other.state_dict()


def warm(decay: float, number: int) -> float:
    return min(decay, (1 + number) / (10 + number))


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.999])
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(decay: float) -> None:
    """Weights k of N get (1 - d_k) times the product of the later d; what began gets the product of all."""
    module = network()
    move(module, 0)
    seen = [copy.deepcopy(module.state_dict())]
    average = WeightAverage(module, decay)
    for step in range(1, 13):
        move(module, step)
        average.update(module)
        seen.append(copy.deepcopy(module.state_dict()))
    factors = [warm(decay, number) for number in range(12)]
    shares = [math.prod(factors)] + [(1 - d) * math.prod(factors[k + 1 :]) for k, d in enumerate(factors)]
    assert math.isclose(sum(shares), 1)
    for name, found in averaged(average, module).items():
        if found.is_floating_point():
            expected = sum(share * state[name] for share, state in zip(shares, seen, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(found, seen[-1][name])
    assert average.updates == 12


def test_the_decay_grows_to_its_value_and_stays() -> None:
    """The average of a number that jumps from 0 to 1 is 1 - d at once: 0.9, then by d = 2/11, ..., at last d = 0.4."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    average = WeightAverage(module, 0.4)
    nn.init.ones_(module.weight)
    gap = 1.0
    for decay in (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4, 0.4):
        average.update(module)
        gap *= decay
        assert averaged(average, module)["weight"].item() == pytest.approx(1 - gap, rel=1e-14)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_weights_that_do_not_move_keep_their_bits(decay: float) -> None:
    module = network(torch.float32)
    move(module, 0)
    average = WeightAverage(module, decay)
    for _ in range(30):
        average.update(module)
    before = module.state_dict()
    assert all(torch.equal(found, before[name]) for name, found in averaged(average, module).items())


def test_the_average_shares_nothing_with_the_network_and_changes_it_only_when_asked() -> None:
    module = network()
    average = WeightAverage(module, 0.9)
    before = copy.deepcopy(module.state_dict())
    move(module, 1)
    now = copy.deepcopy(module.state_dict())
    assert all(torch.equal(found, before[name]) for name, found in averaged(average, module).items())
    average.update(module)
    assert all(torch.equal(tensor, now[name]) for name, tensor in module.state_dict().items())
    average.copy_into(module)
    kept = copy.deepcopy(module.state_dict())
    assert not any(torch.equal(tensor, now[name]) for name, tensor in kept.items() if tensor.is_floating_point())
    average.update(module)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())


def test_no_gradient_flows_into_the_average_and_trained_parameters_stay_trainable() -> None:
    module = network()
    average = WeightAverage(module, 0.9)
    average.update(module)
    assert not any(tensor.requires_grad for tensor in average.state_dict()["average"].values())
    average.copy_into(module)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in module.parameters())


def test_an_update_asks_for_no_value() -> None:
    """Tensors without values do: whatever waits for the device, as item() or bool() do, fails on them."""
    module = network().to("meta")
    average = WeightAverage(module, 0.9)
    for _ in range(2):
        average.update(module)
    average.copy_into(module)


def test_a_resumed_average_goes_on_with_the_same_bits() -> None:
    """Also during the warm-up of the decay, whose count is saved; a dictionary of tensors and an int is all it is."""
    module = network(torch.float32)
    through, first = WeightAverage(module, 0.99), WeightAverage(module, 0.99)
    for step in range(6):
        move(module, step)
        through.update(module)
        if step < 3:
            first.update(module)
    state = copy.deepcopy(first.state_dict())
    move(module, 77)
    second = WeightAverage(module, 0.99)
    second.load_state_dict(state)
    for step in range(3, 6):
        move(module, step)
        second.update(module)
    expected, found = through.state_dict(), second.state_dict()
    assert found["updates"] == expected["updates"] == 6
    for name, tensor in averaged(through, module).items():
        if tensor.is_floating_point():
            assert torch.equal(averaged(second, module)[name], tensor)


def test_a_network_without_buffers_or_with_integers_alone_is_averaged() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3))

    for module in (nn.Linear(2, 2), Counter(), nn.Identity()):
        average = WeightAverage(module, 0.5)
        for tensor in module.state_dict().values():
            tensor.add_(1)
        average.update(module)
    assert int(average.updates) == 1
    counter = Counter()
    average = WeightAverage(counter, 0.5)
    counter.get_buffer("count").fill_(8)
    average.update(counter)
    assert averaged(average, counter)["count"].item() == 8


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"decay of the weight average must be >= 0 and < 1, got"):
        WeightAverage(network(), decay)
