"""Synchronised BatchNorm: several processes on shards equal torch's BatchNorm in one process on the whole batch."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ranks import on_ranks
from rush.errors import InputError, ModelError
from rush.runtime import sync_norm
from rush.runtime.distributed import average_gradients, gather_objects, rank, world_size
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.sync_norm import desynchronised, synchronised
from rush.smoothing.forward import fold_batch_norm
from rush.training.contrastive import nt_xent


def without_bias(layer: nn.Module) -> nn.Module:
    """The layer with weight alone, as ``bias=False`` makes it in versions of torch that take this argument."""
    layer.register_parameter("bias", None)
    return layer


WORLDS = (2, 4)
ROWS = 8
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (lambda: nn.BatchNorm2d(3), (ROWS, 3, 4, 5)),
    "rows": (lambda: nn.BatchNorm1d(3), (ROWS, 3)),
    "sequences": (lambda: nn.BatchNorm1d(3), (ROWS, 3, 4)),
    "volumes": (lambda: nn.BatchNorm3d(3), (ROWS, 3, 2, 2, 3)),
    "without affine": (lambda: nn.BatchNorm2d(3, affine=False), (ROWS, 3, 4, 5)),
    "without bias": (lambda: without_bias(nn.BatchNorm1d(3)), (ROWS, 3)),
    "without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (ROWS, 3, 4, 5)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (ROWS, 3)),
    "wide eps": (lambda: nn.BatchNorm2d(3, eps=0.5, momentum=0.7), (ROWS, 3, 4, 5)),
}


def shard(x: Tensor) -> Tensor:
    """This process's rows; all of them with one process."""
    return x.chunk(world_size())[rank()]


def random(shape: tuple[int, ...], *names: str | int) -> Tensor:
    """Rows that lie far from each other, so that the moments of shards and of the whole batch differ much."""
    noise = torch.randn(shape, generator=stream(0, *names), dtype=torch.float64)
    return noise + 3 * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=stream(1, *names)).double()


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


# One layer --------------------------------------------------------------------------------------------------------


def layer_of(name: str) -> nn.Module:
    layer = LAYERS[name][0]().double()
    for number, parameter in enumerate(layer.parameters()):
        nn.init.uniform_(parameter, 0.5, 2, generator=stream(number, "affine"))
    return layer


def three_batches(name: str, prepare: Callable[[nn.Module], nn.Module] = synchronised) -> dict[str, Any]:
    """Output, gradients and statistics of one layer over three batches, then its output in evaluation mode."""
    layer = prepare(layer_of(name))
    found: dict[str, Any] = {"outputs": [], "inputs": [], "parameters": [], "statistics": []}
    for number in range(3):
        x = shard(random(LAYERS[name][1], name, number)).requires_grad_()
        layer.zero_grad()
        output = layer(x)
        (output * shard(random(LAYERS[name][1], "loss", name, number))).mean().backward()
        average_gradients(layer.parameters(), torch.zeros(1))
        assert x.grad is not None
        found["outputs"].append(output.detach())
        found["inputs"].append(x.grad / world_size())  # from the sum of losses to their mean
        found["parameters"].append([own.grad for own in layer.parameters()])
        found["statistics"].append(statistics(layer))
    if statistics(layer):
        found["evaluated"] = layer.eval()(shard(random(LAYERS[name][1], "evaluated"))).detach()
    return found


# A training -------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    encoder = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, bias=False)
    )
    encoder.extend([nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    projector = nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4))
    return nn.Sequential(
        *(seeded_init(part, stream(0, name)) for part, name in ((encoder, "encoder"), (projector, "projector")))
    ).double()


def training(prepare: Callable[[nn.Module], nn.Module] = synchronised) -> dict[str, Any]:
    """Two steps of contrastive training on this process's rows: everything that they compute."""
    module = prepare(network())
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    found: dict[str, Any] = {"losses": [], "gradients": [], "statistics": []}
    for step in range(2):
        view_a, view_b = (shard(random((ROWS, 3, 9, 9), view, step)) for view in ("a", "b"))
        optimizer.zero_grad()
        loss = nt_xent(module(view_a), module(view_b), 0.3)
        loss.backward()
        found["losses"].append(average_gradients(module.parameters(), loss.detach()[None]))
        found["gradients"].append([own.grad.clone() for own in module.parameters() if own.grad is not None])
        found["statistics"].append(statistics(module))
        optimizer.step()
    found["state"] = module.state_dict()
    found["momentum"] = [state["momentum_buffer"] for state in optimizer.state.values()]
    return found


# What a process is asked ------------------------------------------------------------------------------------------


def swapped_buffers() -> dict[str, Any]:
    """A call with other tensors in the place of parameters and buffers: these are used and updated, not the own."""
    layer = synchronised(layer_of("images"))
    own = statistics(layer)
    other = {name: tensor.detach().clone() + 1 for name, tensor in layer.state_dict().items()}
    output = functional_call(layer, other, shard(random(LAYERS["images"][1], "swapped")))
    untouched = all(torch.equal(tensor, own[name]) for name, tensor in statistics(layer).items())
    return {"output": output.detach(), "state": other, "untouched": untouched}


def in_bfloat16(layout: torch.memory_format) -> dict[str, Any]:
    layer = synchronised(nn.BatchNorm2d(3))
    x = shard(random(LAYERS["images"][1], "bfloat16")).bfloat16().contiguous(memory_format=layout).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    weight = shard(random(LAYERS["images"][1], "bfloat16 loss")).to(output.dtype)
    (output * weight).sum().backward()
    assert x.grad is not None
    kept = output.is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout)
    return {"output": output.detach(), "x": x.grad, "statistics": statistics(layer), "layout kept": kept}


def uneven_rows() -> Tensor:
    """Rank 0 holds one row more than its share, the last rank one less."""
    layer = synchronised(layer_of("rows"))
    ends = [0, *(number * ROWS // world_size() + 1 for number in range(1, world_size())), ROWS]
    return layer(random((ROWS, 3), "uneven")[ends[rank()] : ends[rank() + 1]]).detach()


def no_rows() -> str:
    with pytest.raises(InputError) as caught:
        synchronised(nn.BatchNorm1d(3))(torch.zeros(0, 3))
    return str(caught.value)


def everything() -> dict[str, Any]:
    return {
        "layers": {name: three_batches(name) for name in LAYERS},
        "plain layer": three_batches("images", lambda layer: layer),
        "training": training(),
        "plain training": training(lambda module: module),
        "undone training": training(lambda module: desynchronised(synchronised(module))),
        "swapped": swapped_buffers(),
        "bfloat16": [in_bfloat16(layout) for layout in (torch.contiguous_format, torch.channels_last)],
        "uneven": uneven_rows(),
        "single values": synchronised(nn.BatchNorm1d(3).double())(random((world_size(), 3), "one")[[rank()]]).detach(),
        "no rows": no_rows(),
        "ranks": gather_objects(rank()),
    }


@pytest.fixture(scope="module", params=WORLDS)
def found(
    request: pytest.FixtureRequest, processes: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    results = on_ranks(processes, everything, request.param, folder)
    assert results[0]["ranks"] == list(range(request.param))
    return results


@cache
def whole(name: str) -> dict[str, Any]:
    """One layer of torch's own on the whole batch."""
    return three_batches(name)


@cache
def whole_training() -> dict[str, Any]:
    return training()


def largest_difference(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_shards_is_torchs_on_the_whole_batch(found: list[dict[str, Any]], name: str) -> None:
    expected = whole(name)
    for key in ("outputs", "inputs"):
        for number in range(3):
            rows = torch.cat([own["layers"][name][key][number] for own in found])
            assert_close(rows, expected[key][number])
    for own in (result["layers"][name] for result in found):
        assert_close(own["parameters"], expected["parameters"])
        assert_close(own["statistics"], expected["statistics"])
        for number, tensors in enumerate(own["statistics"]):  # not only close: the same bits on all ranks
            for key, tensor in tensors.items():
                assert torch.equal(tensor, found[0]["layers"][name]["statistics"][number][key])
    if "evaluated" in expected:
        rows = torch.cat([own["layers"][name]["evaluated"] for own in found])
        assert_close(rows, expected["evaluated"])


def test_a_plain_layer_on_shards_is_not(found: list[dict[str, Any]]) -> None:
    rows = torch.cat([own["plain layer"]["outputs"][0] for own in found])
    assert float((rows - whole("images")["outputs"][0]).abs().max()) > 0.1


def test_a_training_on_shards_is_that_on_the_whole_batch(found: list[dict[str, Any]]) -> None:
    expected = whole_training()
    for own in (result["training"] for result in found):
        assert own.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(own[key], value)


@pytest.mark.parametrize("case", ["plain training", "undone training"])
def test_a_training_with_plain_layers_is_another_in_every_respect(found: list[dict[str, Any]], case: str) -> None:
    expected = whole_training()
    for own in (result[case] for result in found):
        assert largest_difference(own["losses"], expected["losses"]) > 1e-3
        assert largest_difference(own["gradients"][0], expected["gradients"][0]) > 1e-3
        assert largest_difference(own["momentum"], expected["momentum"]) > 1e-3
        for key in ("0.1.running_mean", "1.1.running_var"):
            assert not torch.allclose(own["state"][key], expected["state"][key], atol=1e-4, rtol=0)


def test_swapped_tensors_are_used_and_updated_in_place_of_the_layers_own(found: list[dict[str, Any]]) -> None:
    expected = swapped_buffers()
    rows = torch.cat([own["swapped"]["output"] for own in found])
    assert_close(rows, expected["output"])
    for own in (result["swapped"] for result in found):
        assert own["untouched"]
        assert_close(own["state"], expected["state"])
        assert int(own["state"]["num_batches_tracked"]) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_rows_stay_so_with_statistics_in_float32(
    found: list[dict[str, Any]], layout: torch.memory_format
) -> None:
    number, expected = int(layout == torch.channels_last), in_bfloat16(layout)
    outputs = torch.cat([own["bfloat16"][number]["output"] for own in found])
    inputs = torch.cat([own["bfloat16"][number]["x"] for own in found])
    assert outputs.dtype == expected["output"].dtype == inputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected["output"], atol=0.02, rtol=0.01)  # one or two roundings at 2 to 4
    torch.testing.assert_close(inputs, expected["x"], atol=0.05, rtol=0.02)
    for own in (result["bfloat16"][number] for result in found):
        assert own["layout kept"]
        assert own["statistics"]["running_var"].dtype == torch.float32
        torch.testing.assert_close(own["statistics"], expected["statistics"], atol=1e-5, rtol=1e-5)


def test_unequal_shards_count_by_their_rows(found: list[dict[str, Any]]) -> None:
    assert len({len(own["uneven"]) for own in found}) > 1
    expected = layer_of("rows")(random((ROWS, 3), "uneven")).detach()
    assert_close(torch.cat([own["uneven"] for own in found]), expected)


def test_one_value_a_process_is_enough_and_none_is_refused(found: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm1d(3).double()(random((len(found), 3), "one")).detach()
    assert_close(torch.cat([own["single values"] for own in found]), expected)
    for own in found:
        assert own["no rows"] == "a batch of shape (0, 3) has no mean; give every process at least one row"


# Without other processes ------------------------------------------------------------------------------------------


@pytest.fixture
def as_if_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers believe in other processes; there is none to gather from, so this one's rows are the whole batch."""
    monkeypatch.setattr(sync_norm, "world_size", lambda: 2)


def test_one_process_leaves_the_module_as_it_was() -> None:
    module = network()
    assert synchronised(module) is module
    assert {type(layer) for layer in module.modules()} == {type(layer) for layer in network().modules()}


@pytest.mark.usefixtures("as_if_several")
def test_types_change_to_subclasses_and_back_and_nothing_else() -> None:
    module, plain = network(), network()
    before = dict(module.state_dict(keep_vars=True))
    assert synchronised(synchronised(module)) is module
    for layer, was in zip(module.modules(), plain.modules(), strict=True):
        assert isinstance(layer, type(was))
        assert (type(layer) is type(was)) == (not isinstance(was, nn.BatchNorm1d | nn.BatchNorm2d))
    after = module.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert desynchronised(desynchronised(module)) is module
    assert [type(layer) for layer in module.modules()] == [type(layer) for layer in plain.modules()]
    assert [sorted(vars(layer)) for layer in module.modules()] == [sorted(vars(layer)) for layer in plain.modules()]


@pytest.mark.usefixtures("as_if_several")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_synchronised_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = synchronised(network())
    twin = copied(module)
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in module.modules()]
    x = random((ROWS, 3, 9, 9), "copy")
    assert torch.equal(twin(x), module(x))
    desynchronised(twin)
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in network().modules()]


@pytest.mark.usefixtures("as_if_several")
def test_synchronised_layers_are_folded_and_initialised_as_plain_ones() -> None:
    module = synchronised(network())
    module(random((ROWS, 3, 9, 9), "fold"))
    folded = fold_batch_norm(module.eval())
    assert isinstance(folded, GraphModule)
    called = [folded.get_submodule(str(node.target)) for node in folded.graph.nodes if node.op == "call_module"]
    # the one after a linear layer stays, as one node
    assert [layer for layer in called if isinstance(layer, _BatchNorm)] == [folded.get_submodule("1.1")]
    x = random((ROWS, 3, 9, 9), "fold", 1)
    assert_close(folded(x), module(x))
    seeded_init(module, stream(0, "again"))
    assert module.state_dict()["0.1.running_mean"].abs().sum() == 0


@pytest.mark.usefixtures("as_if_several")
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer = synchronised(layer_of(name))
    x = random(LAYERS[name][1], "differences").requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.usefixtures("as_if_several")
def test_the_mean_of_a_distant_batch_does_not_drown_its_variance() -> None:
    x = (1000 + random((64, 3), "distant")).float()
    own, plain = synchronised(nn.BatchNorm1d(3)), nn.BatchNorm1d(3).double()
    torch.testing.assert_close(own(x).double(), plain(x.double()), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("as_if_several")
def test_bfloat16_is_kept_for_the_backward_pass_not_its_float32_copy() -> None:
    layer, x = synchronised(nn.BatchNorm2d(3)), torch.ones(ROWS, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()} == {x.data_ptr()}


@pytest.mark.usefixtures("as_if_several")
def test_inputs_of_another_shape_are_refused_as_by_the_plain_layer() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        synchronised(nn.BatchNorm2d(3))(torch.zeros(2, 3))


class Renormalized(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.usefixtures("as_if_several")
@pytest.mark.parametrize("layer", [Renormalized(3), nn.LazyBatchNorm2d()])
def test_a_batch_norm_of_another_type_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ModelError, match=rf"layer '1' is a {type(layer).__name__}, .* use one of nn\.BatchNorm1d, "):
        synchronised(nn.Sequential(nn.ReLU(), layer))
