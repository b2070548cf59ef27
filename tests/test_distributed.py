"""Mean of gradients, the gather's gradient and the broadcast of a module, in one process and in three."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import on_ranks
from rush.errors import InputError
from rush.runtime import distributed
from rush.runtime.distributed import average_gradients, broadcast_module, gather, rank
from rush.runtime.randomness import stream

WORLD = 3
SHAPES = ((4, 3), (5,), (2, 3, 2, 2), (7,), (1,))


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def gradients_of(number: int, dtype: torch.dtype) -> list[Tensor]:
    generator = stream(0, "gradients", number)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def averaged(dtype: torch.dtype, extras: Tensor) -> dict[str, Any]:
    """What this rank's gradients and extras become; the second parameter has no gradient, one is channels_last."""
    own = parameters(dtype)
    for number, (parameter, gradient) in enumerate(zip(own, gradients_of(rank(), dtype), strict=True)):
        if number != 1:
            last = gradient.ndim == 4
            parameter.grad = gradient.contiguous(memory_format=torch.channels_last) if last else gradient
    before = [parameter.grad for parameter in own]
    mean = average_gradients((parameter for parameter in own), extras)
    return {
        "gradients": [parameter.grad for parameter in own],
        "in place": all(parameter.grad is old for parameter, old in zip(own, before, strict=True)),
        "mean": mean,
        "extras": extras,
    }


def shared_gradient() -> list[Tensor]:
    """Gradients of two summands, one gathered, the other not: autograd hands both the same tensor."""
    x, other = torch.ones(2, 2, requires_grad=True), torch.ones(2 * WORLD, 2, requires_grad=True)
    weight = torch.arange(1.0, 1 + 2 * WORLD)[:, None].expand(-1, 2) * (rank() + 1)
    doubled = 2 * other  # made before the gather, so its backward comes after the gather's
    ((gather(x) + doubled) * weight).sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    return [x.grad, other.grad]


def module_of(number: int) -> nn.Module:
    """Parameters and buffers that differ from rank to rank, of several types."""
    conv = nn.Conv2d(2, 3, 3)
    module = nn.Sequential(conv, nn.BatchNorm2d(3), nn.Linear(3, 2).double())
    module.register_buffer("queue", torch.zeros(3, 2))
    module.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
    with torch.no_grad():
        for position, tensor in enumerate([*module.parameters(), *module.buffers()]):
            tensor.fill_((number + 1) * (position + 1) if tensor.dtype != torch.bool else number == 0)
    layout = torch.channels_last if number == 1 else torch.contiguous_format
    conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    return module


def broadcasted() -> dict[str, Any]:
    module = module_of(rank())
    before = dict(module.state_dict(keep_vars=True))
    returned = broadcast_module(module)
    same = all(tensor is before[name] for name, tensor in module.state_dict(keep_vars=True).items())
    return {"state": module.state_dict(), "in place": returned is module and same}


def every_exchange() -> dict[str, Any]:
    """All that is asked of one process."""
    number = rank() + 1.0
    found: dict[str, Any] = {
        "double": averaged(torch.float64, torch.tensor([number, -number], dtype=torch.float64)),
        "mixed": averaged(torch.float64, torch.tensor([number, number == 3])),
        "bfloat16": averaged(torch.bfloat16, torch.tensor([number])),
        "shared": shared_gradient(),
        "module": broadcasted(),
    }
    distributed._MESSAGE_BYTES = 40  # 5 numbers: most gradients need a message of their own
    found["small messages"] = averaged(torch.float64, torch.tensor([number, -number], dtype=torch.float64))
    found["small module"] = broadcasted()
    return found


@pytest.fixture(scope="module")
def found(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_ranks(processes, every_exchange, WORLD, folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", ["double", "mixed", "small messages"])
def test_gradients_become_their_mean_over_ranks_in_place(found: list[dict[str, Any]], case: str) -> None:
    expected = torch.stack([torch.cat([g.flatten() for g in gradients_of(r, torch.float64)]) for r in range(WORLD)])
    means = expected.mean(0).split([torch.Size(shape).numel() for shape in SHAPES])
    for result in (own[case] for own in found):
        assert result["in place"]
        assert result["gradients"][1] is None  # had none anywhere, and an optimizer must still see none
        for number in (0, 2, 3, 4):
            gradient = result["gradients"][number]
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(gradient, means[number].view(SHAPES[number]), atol=1e-15, rtol=0)
            assert torch.equal(gradient, found[0][case]["gradients"][number])  # the same bits on all ranks
        assert result["gradients"][2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ["double", "mixed", "bfloat16", "small messages"])
def test_extras_are_averaged_in_their_own_precision_and_left_as_they_were(
    found: list[dict[str, Any]], case: str
) -> None:
    given = torch.stack([own[case]["extras"] for own in found])
    assert given[:, 0].tolist() == [1, 2, 3]
    for own in found:
        assert own[case]["mean"].dtype == given.dtype
        torch.testing.assert_close(own[case]["mean"], given.mean(0), rtol=1e-6, atol=0)


def test_bfloat16_gradients_stay_bfloat16(found: list[dict[str, Any]]) -> None:
    expected = torch.stack([gradients_of(r, torch.bfloat16)[0].float() for r in range(WORLD)]).mean(0)
    for own in found:
        gradient = own["bfloat16"]["gradients"][0]
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), expected, atol=0.03, rtol=0.02)  # two sums and a quotient rounded


def test_the_gather_sums_the_ranks_gradients_and_leaves_those_of_others_alone(found: list[dict[str, Any]]) -> None:
    rows = torch.arange(1.0, 1 + 2 * WORLD)[:, None].expand(-1, 2)
    for number, own in enumerate(found):
        of_x, of_other = own["shared"]
        assert torch.equal(of_x, 6 * rows[2 * number : 2 * number + 2])  # 1 + 2 + 3 times this rank's rows
        assert torch.equal(of_other, 2 * (number + 1) * rows)


@pytest.mark.parametrize("case", ["module", "small module"])
def test_a_broadcast_module_has_the_tensors_of_rank_0(found: list[dict[str, Any]], case: str) -> None:
    expected = module_of(0).state_dict()
    assert not torch.equal(module_of(1).state_dict()["0.weight"], expected["0.weight"])
    for own in found:
        assert own[case]["in place"]
        assert own[case]["state"].keys() == expected.keys()
        for name, tensor in own[case]["state"].items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.dtype == expected[name].dtype


def test_one_process_has_nothing_to_average_or_to_send() -> None:
    parameter, extras = nn.Parameter(torch.ones(2)), torch.tensor([1.0, 0.0])
    parameter.grad = torch.tensor([3.0, 4.0])
    assert average_gradients([parameter], extras) is extras
    assert parameter.grad.tolist() == [3, 4]
    module = module_of(1)
    assert broadcast_module(module) is module
    assert torch.equal(module.state_dict()["0.weight"], module_of(1).state_dict()["0.weight"])


def test_extras_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"extras must be one-dimensional, got shape \(\); stack numbers"):
        average_gradients([], torch.tensor(1.0))
