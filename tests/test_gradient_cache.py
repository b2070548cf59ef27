"""Cached gradients against one graph: the plain batch without BatchNorm, micro-batches side by side with it."""

import copy
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from ranks import on_ranks
from rush.errors import InputError
from rush.runtime.distributed import rank
from rush.runtime.randomness import seeded_init, stream
from rush.training.contrastive import info_nce, nt_xent
from rush.training.gradient_cache import cached_backward

WORLD = 2


def network(norm: bool = False) -> nn.Module:
    middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
    layers = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 4))
    return seeded_init(layers, stream(0, "network")).double()


def views(count: int = 7) -> list[Tensor]:
    generator = stream(0, "views")
    return [torch.randn(count, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    return nt_xent(z_a, z_b, 0.3)


def one_graph(model: Callable[[Tensor], Tensor], inputs: list[Tensor], pieces: int) -> Tensor:
    """The loss with every micro-batch encoded by itself, all in one graph."""
    split = [x.tensor_split(pieces) for x in inputs]
    z = [model(torch.cat(parts)).chunk(len(inputs)) for parts in zip(*split, strict=True)]
    return loss(*(torch.cat(rows) for rows in zip(*z, strict=True)))


def assert_same_gradients(model: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
def test_without_batchnorm_it_equals_the_plain_batch(micro_batch: int) -> None:
    model, plain = network(), network()
    found = cached_backward(model, views(), micro_batch, loss, model)
    expected = loss(*(plain(view) for view in views()))
    expected.backward()
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize(("micro_batch", "pieces"), [(1, 7), (3, 3), (6, 2), (7, 1)])
def test_with_batchnorm_it_equals_micro_batches_in_one_graph(micro_batch: int, pieces: int) -> None:
    model, plain = network(norm=True), network(norm=True)
    found = cached_backward(model, views(), micro_batch, loss, model)
    expected = one_graph(plain, views(), pieces)
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)
    assert_same_gradients(model, plain)
    counted = dict(model.named_buffers())
    assert int(counted["1.num_batches_tracked"]) == pieces  # once a micro-batch
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(counted[name], buffer, atol=1e-12, rtol=0, msg=name)


def test_the_first_pass_has_no_graph_and_leaves_every_buffer_as_it_was() -> None:
    model = network(norm=True)
    model(views()[0] + 2)
    before = copy.deepcopy(dict(model.named_buffers()))
    graphs = []

    def encode(x: Tensor) -> Tensor:
        z = model(x)
        graphs.append((len(x), z.requires_grad))
        return z

    def checked(z_a: Tensor, z_b: Tensor) -> Tensor:
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        return loss(z_a, z_b)

    cached_backward(encode, views(), 3, checked, model)
    # seven rows of two views in pieces that differ by one at most; then the same once more with graph
    assert graphs == [(6, False), (4, False), (4, False), (6, True), (4, True), (4, True)]
    assert not torch.equal(model.get_buffer("1.running_mean"), before["1.running_mean"])


def test_a_buffer_that_the_module_replaces_is_put_back_too() -> None:
    class Counter(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4).double()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.layer(x)

    model = Counter()
    cached_backward(model, views(), 3, loss, model)
    assert float(model.calls) == 3


def test_gradients_are_added_to_those_that_are_there() -> None:
    once, twice = network(), network()
    cached_backward(once, views(), 3, loss, once)
    for _ in range(2):
        cached_backward(twice, views(), 3, loss, twice)
    for mine, single in zip(twice.parameters(), once.parameters(), strict=True):
        assert mine.grad is not None
        assert single.grad is not None
        torch.testing.assert_close(mine.grad, 2 * single.grad, atol=1e-12, rtol=0)


def test_one_input_and_a_loss_with_parameters_of_its_own() -> None:
    model, plain = network(), network()
    scale, expected_scale = (torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keys, queue = (torch.randn(n, 4, generator=stream(n, "keys"), dtype=torch.float64) for n in (7, 9))
    found = cached_backward(model, views()[:1], 2, lambda z: scale * info_nce(z, keys, queue, 0.2), model)
    expected = expected_scale * info_nce(plain(views()[0]), keys, queue, 0.2)
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)
    assert_same_gradients(model, plain)
    torch.testing.assert_close(scale.grad, expected_scale.grad, atol=1e-12, rtol=0)


def test_an_input_that_the_loss_leaves_out_takes_part_in_the_statistics_alone() -> None:
    model, plain = network(norm=True), network(norm=True)
    cached_backward(model, views(), 100, lambda z_a, _: (z_a**2).sum(), model)
    (plain(torch.cat(views()))[:7] ** 2).sum().backward()
    assert_same_gradients(model, plain)


def test_frozen_parameters_get_no_gradient_but_statistics_move() -> None:
    model, plain = network(norm=True), network(norm=True)
    for parameter in (*list(model.parameters())[:2], *list(plain.parameters())[:2]):
        parameter.requires_grad_(False)
    cached_backward(model, views(), 3, loss, model)
    one_graph(plain, views(), 3).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None) == (not mine.requires_grad)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    frozen = network(norm=True).requires_grad_(False)
    value = cached_backward(frozen, views(), 3, loss, frozen)
    torch.testing.assert_close(value, one_graph(plain, views(), 3).detach(), atol=1e-10, rtol=0)
    assert int(frozen.get_buffer("1.num_batches_tracked")) == 3
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("outer", [False, True])
def test_under_autocast_it_equals_micro_batches_under_autocast(outer: bool) -> None:
    model, plain = network(norm=True).float(), network(norm=True).float()
    inputs = [view.float() for view in views()]

    def encoder(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def encode(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return module(x).float()

        return encode

    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        found = cached_backward(encoder(model), inputs, 3, loss, model)
        expected = one_graph(encoder(plain), inputs, 3)
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    # one bfloat16 rounding is 2^-9 of its value; the gradients of three micro-batches are summed in another order
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.parameters() if parameter.grad is not None)
    assert_same_gradients(model, plain, largest / 64)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = network()
    for inputs in ([], [torch.ones(2, 5), torch.ones(3, 5)], [torch.ones(0, 5)]):
        with pytest.raises(InputError, match=r"inputs of equally many rows \(at least one\), got"):
            cached_backward(model, inputs, 3, loss, model)
    with pytest.raises(InputError, match="micro_batch must be >= 1, got 0"):
        cached_backward(model, views(), 0, loss, model)


def train_on_shard() -> tuple[Tensor, list[Tensor]]:
    """In one of the processes: loss and mean gradients of its rows of the global batch."""
    model = network()
    value = cached_backward(model, [view.chunk(WORLD)[rank()] for view in views(10)], 2, loss, model)
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        assert gradient is not None
        distributed.all_reduce(gradient)
    return value, [gradient / WORLD for gradient in gradients if gradient is not None]


@pytest.mark.timeout(120)
def test_two_processes_with_cached_gradients_equal_one_plain_process(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    plain = network()
    expected = loss(*(plain(view) for view in views(10)))
    expected.backward()
    found = on_ranks(processes, train_on_shard, WORLD, tmp_path)
    assert found[0][0] != found[1][0]  # each rank's loss is over its own rows
    torch.testing.assert_close(torch.stack([own for own, _ in found]).mean(), expected.detach(), atol=1e-10, rtol=0)
    for _, gradients in found:
        for mine, parameter in zip(gradients, plain.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, atol=1e-10, rtol=0)
