"""A branched normalization against two explicit networks that share their convolutions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rush.errors import ModelError
from rush.models.branches import NormBranch
from rush.runtime.randomness import seeded_init, stream


class CountingNorm(nn.BatchNorm2d):
    """A subclass with a buffer of its own."""

    calls: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(input)


def network(norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), block, nn.Flatten())
    model = nn.Sequential(body, nn.Linear(64, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2))
    seeded_init(model, stream(0, "network"))
    return model.double()


def images(name: str) -> Tensor:
    return torch.rand(6, 3, 6, 6, generator=stream(0, name), dtype=torch.float64)


def norms(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)]


def twin(model: nn.Module) -> nn.Module:
    """A second network with normalization of its own that shares every other parameter with ``model``."""
    second = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(second.get_submodule(parent), last, layer)
    return second


def test_branch_and_module_equal_two_networks_that_share_their_convolutions() -> None:
    model, explicit = network(), network()
    branch, second = NormBranch(model), twin(explicit)
    ours = torch.optim.SGD([*model.parameters(), *branch.parameters()], lr=0.5)
    theirs = torch.optim.SGD(list({*explicit.parameters(), *second.parameters()}), lr=0.5)
    for number in range(3):
        clean, attacked = images(f"clean {number}"), images(f"attacked {number}") * 3 - 1
        outputs = model(clean), branch.call(model, attacked)
        expected = explicit(clean), second(attacked)
        for optimizer, (first, other) in ((ours, outputs), (theirs, expected)):
            optimizer.zero_grad()
            ((first**2).sum() + (other**3).sum()).backward()
            optimizer.step()
        for mine, other in zip(outputs, expected, strict=True):
            assert torch.equal(mine, other)
    assert_same(model, explicit)
    for layer, other_layer in zip(branch.layers, norms(second), strict=True):
        assert_same(layer, other_layer)
    assert norms(model)[0].running_mean.ne(branch.layers[0].running_mean).any()


def assert_same(module: nn.Module, other: nn.Module) -> None:
    """Parameters, gradients, running statistics and the number of batches."""
    for (name, mine), theirs in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0, msg=name)
    for own, parameter in zip(module.parameters(), other.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, parameter.grad, atol=1e-12, rtol=0)


def test_the_module_decides_between_batch_and_running_statistics() -> None:
    model = network()
    branch = NormBranch(model)
    branch.call(model, images("attacked") * 4)
    kept = copy.deepcopy(branch.state_dict())
    model.eval()
    alone = branch.call(model, images("x")[:1])
    torch.testing.assert_close(alone, branch.call(model, images("x"))[:1], atol=1e-12, rtol=0)
    assert all(torch.equal(value, kept[name]) for name, value in branch.state_dict().items())
    assert not torch.allclose(alone, model(images("x")[:1]))


def test_copying_into_the_module_exports_the_branch() -> None:
    model = network()
    branch = NormBranch(model)
    for number in range(3):
        branch.call(model, images(f"attacked {number}") * 2)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.mul_(1.5)
    model.eval()
    expected = branch.call(model, images("x"))
    assert not torch.allclose(model(images("x")), expected)
    exported = copy.deepcopy(model)
    branch.copy_into(exported)
    assert torch.equal(exported(images("x")), expected)
    norms(exported)[0].weight.data.zero_()
    assert torch.equal(branch.call(model, images("x")), expected)  # values were copied, not shared


def test_subclasses_keep_their_class_and_buffers() -> None:
    model = network(CountingNorm)
    branch = NormBranch(model)
    assert type(branch.layers[0]) is CountingNorm
    for _ in range(2):
        branch.call(model, images("x"))
    model(images("x"))
    assert [float(layer.calls) for layer in norms(model)[:2]] == [1, 1]
    assert [float(layer.calls) for layer in norms(branch)[:2]] == [2, 2]


def test_under_autocast_gradients_reach_both_branches_and_the_shared_weights() -> None:
    model = network().float()
    branch = NormBranch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (branch.call(model, images("x").float()) ** 2).sum()
    loss.backward()
    for parameter in (*branch.parameters(), model.get_parameter("0.0.weight")):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for layer in norms(model) for parameter in layer.parameters())
    assert branch.layers[0].running_mean.dtype == torch.float32


def test_the_state_dict_holds_the_branch() -> None:
    model = network()
    branch = NormBranch(model)
    branch.call(model, images("x"))
    resumed = NormBranch(network())
    resumed.load_state_dict(branch.state_dict())
    model.eval()
    assert torch.equal(resumed.call(model, images("y")), branch.call(model, images("y")))
    # each of the two image layers and the layer without parameters, with mean, variance and number of batches
    assert len(branch.state_dict()) == 2 * 5 + 3


def test_modules_without_normalization_or_with_another_one_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no BatchNorm layer to branch"):
        NormBranch(nn.Linear(2, 2))
    with pytest.raises(
        ModelError, match=r"the branch holds the BatchNorm layers 0\.1, 0\.3\.1, 2, the module has none"
    ):
        NormBranch(network()).copy_into(nn.Linear(2, 2))


def test_a_norm_layer_itself_can_be_branched() -> None:
    layer = nn.BatchNorm1d(3)
    branch = NormBranch(layer)
    branch.call(layer, torch.rand(4, 3, generator=stream(0, "x")))
    assert int(layer.state_dict()["num_batches_tracked"]) == 0
    assert int(branch.state_dict()["layers.0.num_batches_tracked"]) == 1
