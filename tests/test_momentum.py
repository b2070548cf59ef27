"""InfoNCE against slow textbook code; the key network's average and its queue in closed form, resumed and shared."""

import math
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranks import on_ranks
from rush.errors import ConfigError, InputError
from rush.models.momentum import KeyNetwork
from rush.runtime.distributed import rank
from rush.runtime.randomness import seeded_init, stream
from rush.training.contrastive import info_nce

WORLD = 2


def rows(count: int, size: int, name: str) -> Tensor:
    return torch.randn(count, size, generator=stream(0, name), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    first, second = a.tolist(), b.tolist()
    return math.fsum(x * y for x, y in zip(first, second, strict=True)) / (math.hypot(*first) * math.hypot(*second))


def textbook(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    """He et al. 2020, equation 1, query by query over plain numbers."""
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        own = math.exp(cosine(query, key) / temperature)
        total -= math.log(own / (own + math.fsum(math.exp(cosine(query, row) / temperature) for row in queue)))
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("queue_size", [1, 9])
def test_info_nce_is_the_papers_loop(queue_size: int, temperature: float) -> None:
    queries, keys, queue = rows(4, 5, "queries"), rows(4, 5, "keys"), rows(queue_size, 5, "queue")
    found = info_nce(queries, keys, queue, temperature).item()
    assert found == pytest.approx(textbook(queries, keys, queue, temperature), abs=1e-12)


def test_the_gradient_flows_into_the_queries_alone_and_is_that_of_cross_entropy() -> None:
    queries = rows(4, 5, "queries").requires_grad_()
    keys, queue = rows(4, 5, "keys").requires_grad_(), rows(6, 5, "queue").requires_grad_()
    info_nce(queries, keys, queue, 0.3).backward()
    assert keys.grad is None
    assert queue.grad is None
    candidates = [torch.cat([key[None], queue]).detach() for key in keys]
    q = queries.detach().requires_grad_()
    scores = torch.stack([F.cosine_similarity(row[None], own) for row, own in zip(q, candidates, strict=True)]) / 0.3
    F.cross_entropy(scores, torch.zeros(4, dtype=torch.int64)).backward()
    torch.testing.assert_close(queries.grad, q.grad, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda z: info_nce(z, keys, queue, 0.3), (queries.detach().requires_grad_(),))


def test_the_queue_may_be_overwritten_before_the_backward_pass() -> None:
    queries, queue = rows(4, 5, "queries").requires_grad_(), F.normalize(rows(8, 5, "queue"), dim=1)
    kept = torch.autograd.grad(info_nce(queries, rows(4, 5, "keys"), queue.clone(), 0.2), queries)[0]
    loss = info_nce(queries, rows(4, 5, "keys"), queue, 0.2)
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, queries)[0], kept)


@pytest.mark.parametrize(
    ("shapes", "temperature", "text"),
    [
        (((4, 3), (5, 3), (6, 3)), 0.2, r"queries and keys \(B, D\) of one shape, got \(4, 3\) and \(5, 3\)"),
        (((4, 3), (4, 3), (6, 2)), 0.2, r"need a queue \(Q, 3\) with Q >= 1, got \(6, 2\)"),
        (((4, 3), (4, 3), (0, 3)), 0.2, r"with Q >= 1, got \(0, 3\)"),
        (((4, 3), (4, 3), (6, 3)), 0.0, "temperature must be > 0, got 0.0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], temperature: float, text: str) -> None:
    queries, keys, queue = (torch.ones(shape) for shape in shapes)
    with pytest.raises(InputError, match=text):
        info_nce(queries, keys, queue, temperature)


def network() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return seeded_init(layers, stream(0, "network")).double()


def key_network(query: nn.Module, queue_size: int = 6, global_batch: int = 2) -> KeyNetwork:
    generator = stream(0, "queue")
    return KeyNetwork(query, features=3, queue_size=queue_size, global_batch=global_batch, generator=generator).double()


def test_the_key_network_is_a_copy_of_its_own_without_gradients() -> None:
    query = network()
    query(rows(5, 4, "x")).sum().backward()
    keys = key_network(query)
    x = rows(5, 4, "x")
    assert torch.equal(keys(x), query(x))
    assert not keys(x).requires_grad
    assert all(not p.requires_grad and p.grad is None for p in keys.parameters())
    assert all(p.requires_grad and p.grad is not None for p in query.parameters())
    with torch.no_grad():
        query.get_parameter("0.weight").zero_()
    assert keys.network.get_parameter("0.weight").abs().sum() > 0


def test_following_is_an_exponential_average_in_closed_form() -> None:
    query = network()
    keys = key_network(query)
    start = [p.clone() for p in keys.network.parameters()]
    moved = [p.detach() + 1.5 for p in query.parameters()]
    with torch.no_grad():
        for parameter, value in zip(query.parameters(), moved, strict=True):
            parameter.copy_(value)
    for _ in range(5):
        keys.follow(query, 0.9)
    for own, first, last in zip(keys.network.parameters(), start, moved, strict=True):
        torch.testing.assert_close(own.detach(), 0.9**5 * first + (1 - 0.9**5) * last, atol=1e-12, rtol=0)
    for parameter, value in zip(query.parameters(), moved, strict=True):
        assert torch.equal(parameter, value)


def test_running_statistics_are_the_key_networks_own() -> None:
    query = network()
    keys = key_network(query)
    keys(rows(8, 4, "x") + 3)
    mean, other = (module.get_buffer("1.running_mean") for module in (keys.network, query))
    kept = mean.clone()
    assert kept.abs().sum() > 0
    assert other.abs().sum() == 0
    keys.follow(query, 0.5)
    assert torch.equal(mean, kept)


def test_the_first_queue_holds_seeded_unit_vectors() -> None:
    first, again = key_network(network(), 600), key_network(network(), 600)
    assert torch.equal(first.queue, again.queue)
    torch.testing.assert_close(first.queue.norm(dim=1), torch.ones(600).double(), atol=1e-6, rtol=0)
    # on the sphere in three dimensions every coordinate is uniform in [-1, 1] with variance 1/3: the mean of 600 has
    # standard deviation 0.0236, so six of them are passed with odds of 6e-9
    assert first.queue.mean(0).abs().max() < 6 * math.sqrt(1 / 3 / 600)
    assert first.queue.min() < -0.9
    assert first.queue.max() > 0.9


def test_the_queue_is_a_ring_that_forgets_the_oldest_keys() -> None:
    keys = key_network(network(), queue_size=6, global_batch=2)
    first = keys.queue.clone()
    batches = [rows(2, 3, f"batch {i}") for i in range(5)]
    units = [F.normalize(batch, dim=1) for batch in batches]
    keys.enqueue(batches[0])
    torch.testing.assert_close(keys.queue, torch.cat([units[0], first[2:]]))
    for batch in batches[1:]:
        keys.enqueue(batch)
    torch.testing.assert_close(keys.queue, torch.cat([units[3], units[4], units[2]]))
    assert int(keys.position) == 4
    keys.enqueue(batches[0])
    assert int(keys.position) == 0


def test_a_state_dict_resumes_network_queue_and_position() -> None:
    def steps(keys: KeyNetwork, query: nn.Module, numbers: range) -> None:
        for i in numbers:
            keys.follow(query, 0.7)
            keys.enqueue(keys(rows(2, 4, f"x {i}")))

    query = network()
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(0.3)
    straight, killed = key_network(network()), key_network(network())
    steps(straight, query, range(7))
    steps(killed, query, range(4))
    resumed = KeyNetwork(network(), features=3, queue_size=6, global_batch=2, generator=stream(1, "another")).double()
    resumed.load_state_dict(killed.state_dict())
    steps(resumed, query, range(4, 7))
    expected = straight.state_dict()
    assert {"queue", "position", "network.1.running_mean", "network.0.weight"} <= set(expected)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_shuffled_groups_are_normalized_each_by_itself_and_come_back_in_order() -> None:
    query = network()
    keys, slow = key_network(query), key_network(query)
    x = rows(8, 4, "x")
    found = keys.shuffled(x, 2, stream(0, "shuffle"))
    order = torch.randperm(8, generator=stream(0, "shuffle"))
    expected = torch.empty(8, 3, dtype=torch.float64)
    for half in (order[:4], order[4:]):
        expected[half] = slow(x[half])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.equal(*(n.network.get_buffer("1.running_var") for n in (keys, slow)))
    assert not torch.allclose(found, key_network(query)(x))
    torch.testing.assert_close(keys.eval().shuffled(x, 4, stream(1, "shuffle")), keys(x), atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="8 rows cannot be split into 3 equal groups"):
        keys.shuffled(x, 3, stream(0, "shuffle"))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for queue_size, global_batch in ((7, 2), (1, 2), (0, 2), (4, 0)):
        with pytest.raises(ConfigError, match="must hold a multiple of the global batch"):
            key_network(network(), queue_size, global_batch)
    keys = key_network(network())
    for wrong in (rows(3, 3, "keys"), rows(2, 4, "keys")):
        with pytest.raises(InputError, match="need 2 keys of 3 features over all processes, got"):
            keys.enqueue(wrong)
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"momentum must lie in \[0, 1\]"):
            keys.follow(network(), momentum)
    with pytest.raises(InputError, match="differ in shape"):
        keys.follow(nn.Linear(4, 3), 0.9)


def enqueue_shard() -> dict[str, Tensor]:
    """In one of the processes: its rows of three global batches go into its queue, which comes back."""
    keys = key_network(network(), queue_size=8, global_batch=4)
    for i in range(3):
        keys.enqueue(rows(4, 3, f"batch {i}").requires_grad_().chunk(WORLD)[rank()])
    return keys.state_dict()


@pytest.mark.timeout(120)
def test_every_process_holds_the_queue_of_one_process(processes: ForkServerContext, tmp_path: Path) -> None:
    single = key_network(network(), queue_size=8, global_batch=4)
    for i in range(3):
        single.enqueue(rows(4, 3, f"batch {i}"))
    for state in on_ranks(processes, enqueue_shard, WORLD, tmp_path):
        assert torch.equal(state["queue"], single.queue)
        assert torch.equal(state["position"], single.position)
