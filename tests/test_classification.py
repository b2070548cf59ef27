"""Classification objectives against slow textbook code, closed-form inner optima of linear networks, finite differences
and their published cost; what attacks inside training must leave alone."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rush.errors import InputError
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from rush.training.modes import evaluation_mode
from rush.training.supervised import Examples, cat_rs, consistency, gaussian, pgd_at, smoothadv, standard, trades

Options = dict[str, Any]
SHAPE, CLASSES, NOISE = (2, 3, 3), 4, Gaussian(0.3)
LINF: Options = {"epsilon": 0.1, "step_size": 0.04, "steps": 4}

Network = Callable[[Tensor], Tensor]
Objective = Callable[..., Tensor]

# Every objective with its noise and its options.
OBJECTIVES: dict[str, tuple[Objective, Gaussian | None, Options]] = {
    "standard": (standard, None, {}),
    "gaussian": (gaussian, NOISE, {}),
    "consistency": (consistency, NOISE, {"draws": 3, "weight": 5.0, "entropy_weight": 0.5}),
    "smoothadv": (smoothadv, NOISE, {"draws": 3, "epsilon": 0.4, "steps": 4}),
    "cat_rs": (cat_rs, NOISE, {"draws": 4, "epsilon": 0.5, "steps": 3, "weight": 0.7}),
    "pgd_at": (pgd_at, None, LINF),
    "trades": (trades, None, {**LINF, "beta": 6.0}),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


def loss_of(
    name: str, f: Network, e: Network, x: Tensor, y: Tensor, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return the loss of an objective at its options, but for those given."""
    objective, noise, usual = OBJECTIVES[name]
    examples = Examples(f, e, x, y, noise, generator or stream(0, "draws"))
    return objective(examples, **{**usual, **options})


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(math.prod(SHAPE), 7), *([nn.BatchNorm1d(7)] if norm else [])]
    made = nn.Sequential(*layers, nn.Tanh(), nn.Linear(7, CLASSES))
    seeded_init(made, stream(seed, "network"))
    return made.double()


def batch(rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images that touch both ends of [0, 1], and labels."""
    generator = stream(seed, "batch")
    x = (torch.rand((rows, *SHAPE), generator=generator, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def last_layer(made: nn.Sequential) -> nn.Linear:
    assert isinstance(made[-1], nn.Linear)
    return made[-1]


class Recorder:
    """A network that remembers the images it was given."""

    def __init__(self, inner: Network) -> None:
        self.inner, self.seen = inner, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.inner(x)


# --- Textbook: one image and one draw at a time, sums spelled out ----------------------------------------------------


def softmax(f: Network, image: Tensor) -> Tensor:
    powers = f(image[None])[0].exp()
    return powers / powers.sum()


def slow_kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([p[k] * (p[k].log() - q[k].log()) for k in range(len(p))]).sum()


def ascent(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def mean_under_noise(f: Network, images: Tensor, y: Tensor, drawn: Tensor) -> Tensor:
    return torch.stack([nn.functional.cross_entropy(f(images + d), y) for d in drawn]).mean()


def draws_of(x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    return NOISE.sample((draws, *x.shape), generator).double()


def slow_consistency(f: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    m, weight, entropy_weight = 3, 5.0, 0.5
    drawn, total = draws_of(x, m, generator), torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):
        p = [softmax(f, x[b] + drawn[i, b]) for i in range(m)]
        mean = torch.stack(p).mean(0)
        for i in range(m):
            total = total - p[i][y[b]].log() / m + weight * slow_kl(mean, p[i]) / m
        total = total - entropy_weight * (mean * mean.log()).sum()
    return total / len(x)


def slow_smoothadv(f: Network, e: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    m, epsilon, steps = 3, 0.4, 4
    drawn, total = draws_of(x, m, generator), torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):

        def loss(point: Tensor, b: int = b) -> Tensor:
            return -torch.stack([softmax(e, point + drawn[i, b])[y[b]] for i in range(m)]).mean().log()

        point = x[b]
        for _ in range(steps):
            gradient = ascent(loss, point)
            point = (point + 2 * epsilon / steps * gradient / gradient.norm()).clamp(0, 1)
            if (point - x[b]).norm() > epsilon:
                point = x[b] + epsilon * (point - x[b]) / (point - x[b]).norm()
        for i in range(m):
            total = total - softmax(f, point + drawn[i, b])[y[b]].log() / m
    return total / len(x)


def slow_cat_rs(f: Network, e: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """The loss and how many cross-entropies of each image it keeps."""
    m, epsilon, steps, weight = 4, 0.5, 3, 0.7
    drawn, total, kept = draws_of(x, m, generator), torch.zeros((), dtype=torch.float64), []
    uniform = torch.rand((m, len(x)), generator=generator)
    for b in range(len(x)):
        p = [softmax(f, x[b] + drawn[i, b]) for i in range(m)]
        correct = sum(int(p[i].argmax()) == int(y[b]) for i in range(m))
        k = max(1, sum(float(uniform[i, b]) < correct / m for i in range(m)))
        losses = sorted((-p[i][y[b]].log() for i in range(m)), key=Tensor.item)
        total = total + torch.stack(losses[:k]).sum() / m
        kept.append(k)
        if k == m:
            target = torch.stack(p).mean(0).detach()
            found = [slow_noise(e, x[b], drawn[i, b], target, epsilon, steps) for i in range(m)]
            total = total + weight * max((slow_kl(target, softmax(f, x[b] + d)) for d in found), key=Tensor.item)
    return total / len(x), kept


def slow_noise(e: Network, image: Tensor, origin: Tensor, target: Tensor, epsilon: float, steps: int) -> Tensor:
    current = origin
    for _ in range(steps):
        gradient = ascent(lambda d: slow_kl(target, softmax(e, image + d)), current)
        current = current + 2 * epsilon / steps * gradient / gradient.norm()
        current = (current - current.mean()) / current.std() * origin.std() + origin.mean()
        if (current - origin).norm() > epsilon:
            current = origin + epsilon * (current - origin) / (current - origin).norm()
    return current


def slow_linf(loss: Callable[[Tensor], Tensor], point: Tensor, image: Tensor) -> Tensor:
    epsilon, step_size, steps = 0.1, 0.04, 4
    for _ in range(steps):
        point = point + step_size * ascent(loss, point).sign()
        point = torch.minimum(torch.maximum(point, image - epsilon), image + epsilon).clamp(0, 1)
    return point


def slow_pgd_at(f: Network, e: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    change = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 0.2 - 0.1
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):

        def loss(point: Tensor, b: int = b) -> Tensor:
            return -softmax(e, point)[y[b]].log()

        point = slow_linf(loss, (x[b] + change[b]).clamp(0, 1), x[b])
        total = total - softmax(f, point)[y[b]].log()
    return total / len(x)


def slow_trades(f: Network, e: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    start = x + 0.001 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):

        def loss(point: Tensor, b: int = b) -> Tensor:
            return slow_kl(softmax(e, x[b]).detach(), softmax(e, point))

        point = slow_linf(loss, start[b], x[b])
        clean = softmax(f, x[b])
        total = total - clean[y[b]].log() + 6.0 * slow_kl(clean, softmax(f, point))
    return total / len(x)


def slow_gaussian(f: Network, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    drawn = NOISE.sample(x.shape, generator).double()
    return torch.stack([-softmax(f, x[b] + drawn[b])[y[b]].log() for b in range(len(x))]).mean()


SLOW: dict[str, Objective] = {
    "standard": lambda f, _, x, y, __: torch.stack([-softmax(f, x[b])[y[b]].log() for b in range(len(x))]).mean(),
    "gaussian": lambda f, _, x, y, g: slow_gaussian(f, x, y, g),
    "consistency": lambda f, _, x, y, g: slow_consistency(f, x, y, g),
    "smoothadv": slow_smoothadv,
    "cat_rs": lambda f, e, x, y, g: slow_cat_rs(f, e, x, y, g)[0],
    "pgd_at": slow_pgd_at,
    "trades": slow_trades,
}


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_those_of_the_textbook(name: str, seed: int) -> None:
    f, e = network(seed), network(seed + 10)
    x, y = batch(seed=seed)
    own = loss_of(name, f, e, x, y, stream(seed, "draws"))
    slow = SLOW[name](f, e, x, y, stream(seed, "draws"))
    assert own.shape == ()
    torch.testing.assert_close(own, slow, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(own, list(f.parameters())), torch.autograd.grad(slow, list(f.parameters()))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


# --- CAT-RS by cases -------------------------------------------------------------------------------------------------


def certain(sharpness: float) -> nn.Sequential:
    """A network that is sure of class 0 under all noise, more or less sharply."""
    made = network()
    with torch.no_grad():
        last_layer(made).bias[0] += sharpness
    return made


@pytest.mark.parametrize(("label", "kept"), [(0, {4}), (1, {1})])
def test_cat_rs_where_all_draws_are_right_and_where_all_are_wrong(label: int, kept: set[int]) -> None:
    f, e = certain(30.0), network(1)
    x, _ = batch()
    y = torch.full((len(x),), label)
    own = loss_of("cat_rs", f, e, x, y)
    slow, found = slow_cat_rs(f, e, x, y, stream(0, "draws"))
    assert set(found) == kept
    torch.testing.assert_close(own, slow, atol=1e-10, rtol=0)
    low_alone = loss_of("cat_rs", f, e, x, y, weight=0.0)
    if label == 0:
        assert own > low_alone
    else:  # one of four cross-entropies at least, and none of the adversarial term
        assert own == low_alone
        drawn = draws_of(x, 4, stream(0, "draws"))
        losses = torch.stack([nn.functional.cross_entropy(f(x + d), y, reduction="none") for d in drawn])
        torch.testing.assert_close(own, losses.amin(0).mean() / 4, atol=1e-10, rtol=0)


def test_cat_rs_where_some_draws_are_right() -> None:
    """All of K = 1 to 4 occur, and K = 4 also where a draw is wrong; the seed is chosen so, nothing is left to
    chance."""
    f, e = network(3), network(1)
    x, _ = batch(40, seed=2)
    y = f(x).argmax(1)
    own = loss_of("cat_rs", f, e, x, y, stream(4, "draws"))
    slow, kept = slow_cat_rs(f, e, x, y, stream(4, "draws"))
    torch.testing.assert_close(own, slow, atol=1e-10, rtol=0)
    drawn = draws_of(x, 4, stream(4, "draws"))
    correct = torch.stack([f(x + d).argmax(1) == y for d in drawn]).sum(0)
    assert set(kept) == {1, 2, 3, 4}
    assert any(k == 4 and right < 4 for k, right in zip(kept, correct.tolist(), strict=True))
    assert all(k == 4 for k, right in zip(kept, correct.tolist(), strict=True) if right == 4)


def test_the_number_of_kept_draws_is_binomial() -> None:
    """With weights that make the loss 1/M times K: its mean over 4,000 images is that of max(K, 1) / 4 within 5
    standard errors, which fails by chance less than once in 10^6 seeds."""
    draws, rows = 4, 4000
    shares = torch.tensor([True, True, True, False]).repeat(rows, 1).T  # three of four draws right

    def f(_: Tensor) -> Tensor:
        # Cross-entropy log 2 in all cases: class 0 and 1 tie but for a hair that decides who is right.
        hair = torch.where(shares.reshape(-1), 1e-9, -1e-9).double()
        return torch.stack([hair, -hair], 1)

    x, y = torch.full((rows, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    varied = lambda images: torch.stack([images.flatten(1).sum(1), 0 * images.flatten(1).sum(1)], 1)  # noqa: E731
    loss = loss_of("cat_rs", f, varied, x, y, stream(0, "binomial"), steps=1, weight=0.0)
    mean, spread = 0.75 + 0.25**4 / 4, math.sqrt(0.75 * 0.25 / draws)  # K = 0 counts as 1
    assert loss.item() / math.log(2) == pytest.approx(mean, abs=5 * spread / math.sqrt(rows))


# --- Attacks: closed forms -------------------------------------------------------------------------------------------


class Linear:
    """Two classes, logits (0, w.x + b)."""

    def __init__(self, seed: int = 0) -> None:
        self.weight = torch.randn(SHAPE, generator=stream(seed, "linear"), dtype=torch.float64)

    def margin(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1) - 0.3

    def __call__(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        return torch.stack([torch.zeros_like(margin), margin], 1)


def away(y: Tensor) -> Tensor:
    """Which way the margin moves to raise the loss: up for class 0, down for class 1."""
    return (1 - 2 * y.double())[:, None, None, None]


@pytest.mark.parametrize("steps", [5, 10])
def test_pgd_at_is_at_the_exact_inner_maximum_of_a_linear_network(steps: int) -> None:
    """From anywhere in the ball, steps x step_size = 2 epsilon reaches the worst corner, clipped to [0, 1]."""
    f = Linear()
    x, y = batch(8)[0], torch.arange(8) % 2
    epsilon = 0.1
    loss = loss_of("pgd_at", f, f, x, y, epsilon=epsilon, step_size=2 * epsilon / steps, steps=steps)
    corner = (x + epsilon * away(y) * f.weight.sign()).clamp(0, 1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(f(corner), y), atol=1e-12, rtol=0)
    assert loss > nn.functional.cross_entropy(f(x), y) + 0.1


def test_trades_is_at_a_corner_of_the_ball_of_a_linear_network() -> None:
    """KL(p(x) || p(x')) depends on the margin alone and grows away from x: the ascent ends at one of two corners."""
    f = Recorder(Linear())
    x, y = 0.3 + 0.4 * batch(8)[0], torch.arange(8) % 2
    loss_of("trades", f, f.inner, x, y, steps=6)
    clean, adversarial = f.seen
    assert torch.equal(clean, x)
    change = (adversarial - x) * f.inner.weight.sign()  # type: ignore[attr-defined]
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1), atol=1e-12, rtol=0)
    assert (change.flatten(1).amax(1) - change.flatten(1).amin(1) < 1e-12).all()  # of one sign


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_smoothadv_is_at_the_exact_inner_maximum_of_a_linear_network(steps: int) -> None:
    """Every step is along w, so half of them reach the sphere; there the mean probability is smallest. In the middle of
    the pixel range no pixel is clipped."""
    f = Linear()
    x, y = 0.45 + 0.1 * batch(8)[0], torch.arange(8) % 2
    loss = loss_of("smoothadv", f, f, x, y, epsilon=0.3, steps=steps)
    worst = x + 0.3 * away(y) * f.weight / f.weight.norm()
    expected = mean_under_noise(f, worst, y, draws_of(x, 3, stream(0, "draws")))
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def test_cat_rs_noise_is_near_the_inner_maximum_of_a_linear_network() -> None:
    """The mean of the noise is kept, so only the part of w without its mean helps. The ball alone would allow a move of
    epsilon times its norm; putting the standard deviation back costs a little of that."""
    f, x, y = Recorder(Linear()), batch(8)[0], torch.zeros(8, dtype=torch.int64)
    epsilon = 0.2
    loss_of("cat_rs", f, f.inner, x, y, epsilon=epsilon, steps=8)
    weight = f.inner.weight  # type: ignore[attr-defined]
    moved = ((f.seen[1] - f.seen[0]) * weight).flatten(1).sum(1).abs()
    most = epsilon * float((weight - weight.mean()).norm())
    assert (moved <= most * (1 + 1e-12)).all()
    assert float(moved.median()) > 0.8 * most


# --- Attacks: what they keep to --------------------------------------------------------------------------------------


def test_smoothadv_images_stay_in_the_ball_and_in_range_and_keep_their_noise() -> None:
    x, y = batch(20)
    f, e = Recorder(network()), Recorder(network(1))
    loss_of("smoothadv", f, e, x, y, epsilon=1.0)
    drawn = draws_of(x, 3, stream(0, "draws"))
    for seen in [*e.seen, *f.seen]:
        images = seen.unflatten(0, (3, 20)) - drawn
        torch.testing.assert_close(images, images[:1].expand_as(images), atol=1e-12, rtol=0)  # one image, all draws
        assert images.min() >= -1e-12
        assert images.max() <= 1 + 1e-12
        assert (images[0] - x).flatten(1).norm(dim=1).max() <= 1.0 + 1e-12
    assert (f.seen[0].unflatten(0, (3, 20)) - drawn - x).abs().max() > 0.1
    assert f.seen[0].min() < 0  # the noise is not clipped
    assert f.seen[0].max() > 1


def test_cat_rs_noise_stays_in_the_ball_and_noise_like() -> None:
    """Mean kept; the standard deviation loses at most epsilon^2 / (2 norm^2), where the ball has the last word."""
    x, y = batch(20)
    f, epsilon = Recorder(network()), 0.3
    loss_of("cat_rs", f, network(1), x, y, epsilon=epsilon)
    images = x.repeat(4, 1, 1, 1)
    origin, found = ((seen - images).flatten(1) for seen in f.seen)
    torch.testing.assert_close(origin, draws_of(x, 4, stream(0, "draws")).flatten(0, 1).flatten(1), atol=1e-12, rtol=0)
    distance = (found - origin).norm(dim=1)
    assert distance.max() <= epsilon + 1e-12
    assert distance.min() > 0.5 * epsilon
    torch.testing.assert_close(found.mean(1), origin.mean(1), atol=1e-12, rtol=0)
    share = found.std(1) / origin.std(1)
    lost = epsilon**2 / (2 * (origin - origin.mean(1, keepdim=True)).norm(dim=1) ** 2)
    assert (share <= 1 + 1e-12).all()
    assert (share >= 1 - lost).all()


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_linf_images_stay_in_the_ball_and_in_range(name: str) -> None:
    x, y = batch(20)
    f, e = Recorder(network()), Recorder(network(1))
    loss_of(name, f, e, x, y)
    points = [f.seen[-1], *e.seen[2 if name == "trades" else 0 :]]  # TRADES first looks at x and leaves from around it
    for images in points:
        assert images.min() >= 0
        assert images.max() <= 1
        assert (images - x).abs().max() <= LINF["epsilon"] + 1e-12


def test_the_attacks_raise_their_inner_losses() -> None:
    """For every image, on the network attacked; a step that did nothing would fail."""
    f, (x, y) = network(5), batch(20, seed=3)
    drawn = draws_of(x, 3, stream(0, "draws"))

    def smoothed(images: Tensor) -> Tensor:
        p = torch.stack([f(images + d).softmax(1) for d in drawn]).mean(0)
        return -p.gather(1, y[:, None])[:, 0].log()

    def divergence(images: Tensor) -> Tensor:
        return torch.stack([slow_kl(softmax(f, a), softmax(f, b)) for a, b in zip(x, images, strict=True)])

    plain = partial(nn.functional.cross_entropy, target=y, reduction="none")
    seen = Recorder(f)
    loss_of("smoothadv", seen, f, x, y)
    found = seen.seen[-1].unflatten(0, (3, 20))[0] - drawn[0]
    assert (smoothed(found) > smoothed(x) + 0.01).all()
    loss_of("pgd_at", seen, f, x, y)
    assert (plain(f(seen.seen[-1])) > plain(f(x)) + 0.01).all()
    loss_of("trades", seen, f, x, y)
    assert (divergence(seen.seen[-1]) > 1e-3).all()


def test_without_any_radius_smoothadv_is_the_mean_over_noise_and_pgd_at_is_standard() -> None:
    f, (x, y) = network(), batch()
    plain = mean_under_noise(f, x, y, draws_of(x, 3, stream(0, "draws")))
    own = loss_of("smoothadv", f, f, x, y, epsilon=0.0)
    torch.testing.assert_close(own, plain, atol=1e-12, rtol=0)
    for step in (0.1, 0.0):
        own = loss_of("pgd_at", f, f, x, y, epsilon=0.0, step_size=step)
        torch.testing.assert_close(own, loss_of("standard", f, f, x, y), atol=1e-12, rtol=0)


def test_where_the_gradient_is_zero_nothing_moves_and_nothing_breaks() -> None:
    x, y = batch()
    flat = lambda images: torch.zeros(len(images), CLASSES, dtype=torch.float64) * images.sum()  # noqa: E731
    for name in OBJECTIVES:
        f = Recorder(network())
        loss = loss_of(name, f, flat, x, y)
        assert loss.isfinite(), name
        if name == "smoothadv":
            drawn = draws_of(x, 3, stream(0, "draws"))
            torch.testing.assert_close(f.seen[0], (x + drawn).flatten(0, 1), atol=1e-12, rtol=0)


# --- Symmetries ------------------------------------------------------------------------------------------------------


@every
def test_classes_may_be_renamed_and_logits_shifted(name: str) -> None:
    f, e, (x, y) = network(), network(1), batch()
    order = torch.tensor([2, 0, 3, 1])  # class k of the renamed network is class order[k]
    renamed = [lambda images, inner=inner: inner(images)[:, order] + 3.0 for inner in (f, e)]
    labels = (y[:, None] == order).long().argmax(1)
    own = loss_of(name, f, e, x, y)
    torch.testing.assert_close(loss_of(name, *renamed, x, labels), own, atol=1e-10, rtol=0)
    assert abs(loss_of(name, *renamed, x, y) - own).item() > 1e-3  # not so if the labels stay


def test_consistency_without_weights_is_the_mean_over_noise_and_alike_draws_differ_by_nothing() -> None:
    f, (x, y) = network(), batch()
    plain = loss_of("consistency", f, f, x, y, weight=0.0, entropy_weight=0.0)
    expected = mean_under_noise(f, x, y, draws_of(x, 3, stream(0, "draws")))
    torch.testing.assert_close(plain, expected, atol=1e-12, rtol=0)
    constant = lambda images: f(torch.zeros_like(images))  # noqa: E731
    without, with_ = (
        loss_of("consistency", constant, constant, x, y, weight=weight, entropy_weight=0.0) for weight in (0.0, 100.0)
    )
    torch.testing.assert_close(with_, without, atol=1e-10, rtol=0)


def test_an_extreme_probability_gives_finite_losses_and_gradients() -> None:
    """Logits hundreds apart: probabilities of exactly zero in float32."""
    f = network().float()
    with torch.no_grad():
        last_layer(f).weight *= 1e3
    x, y = batch()
    for name in OBJECTIVES:
        loss = loss_of(name, f, f, x.float(), y)
        gradients = torch.autograd.grad(loss, list(f.parameters()))
        assert loss.isfinite(), name
        assert all(g.isfinite().all() for g in gradients), name
        assert loss.dtype == torch.float32


# --- Gradients and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cat_rs"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """The attacked network is a copy that does not move, so that the adversarial images do not either. CAT-RS takes no
    gradient through its target, which finite differences would; the textbook above covers it."""
    f, e, (x, y) = network(), network(1), batch(3)
    weight = f.get_parameter("1.weight").detach().clone().requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        moved = lambda images: torch.func.functional_call(f, {"1.weight": weight}, (images,))  # noqa: E731
        return loss_of(name, moved, e, x, y)

    assert torch.autograd.gradcheck(loss, (weight,))


TRAINING_FORWARDS = {"cat_rs": 2, "trades": 2}  # all others have one


@every
def test_attacks_touch_neither_grad_nor_running_statistics(name: str) -> None:
    module = network(norm=True)
    x, y = batch(8)

    def evaluated(images: Tensor) -> Tensor:
        with evaluation_mode(module):
            return module(images)

    seen = Recorder(module)
    loss = loss_of(name, seen, evaluated, x, y)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert len(seen.seen) == TRAINING_FORWARDS.get(name, 1)
    fresh = network(norm=True)
    for images in seen.seen:  # the statistics are those of the training forwards alone
        fresh(images)
    for mine, other in zip(module.buffers(), fresh.buffers(), strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@every
def test_images_and_their_graph_are_left_alone(name: str) -> None:
    f, e, (x, y) = network(), network(1), batch()
    before, labels = x.clone(), y.clone()
    loss_of(name, f, e, x, y)
    assert torch.equal(x, before)
    assert torch.equal(y, labels)
    assert x.grad is None
    assert not x.requires_grad
    with torch.no_grad():  # a validation loss needs no graph, its attack makes its own
        value = loss_of(name, f, e, x, y)
    torch.testing.assert_close(value, loss_of(name, f, e, x, y).detach(), atol=0, rtol=0)


@every
def test_the_same_generator_gives_the_same_bits_and_another_does_not(name: str) -> None:
    f, e, (x, y) = copy.deepcopy(network()).float(), network(1).float(), batch()
    first, second, other = (loss_of(name, f, e, x.float(), y, stream(seed, "draws")) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first, other) == (name == "standard")


# --- Cost ------------------------------------------------------------------------------------------------------------


class Counter:
    """A network that counts images forward and backward."""

    def __init__(self, inner: Network) -> None:
        self.inner, self.forward, self.backward = inner, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.forward += len(x)
        if out.requires_grad:
            out.register_hook(partial(self._count, len(x)))
        return out

    def _count(self, rows: int, _: Tensor) -> None:
        self.backward += rows


# per image: forward and backward of ``logits``, forward and backward of ``evaluated``; as the docstrings say
COST: dict[str, tuple[int, int, int, int]] = {
    "standard": (1, 1, 0, 0),
    "gaussian": (1, 1, 0, 0),
    "consistency": (3, 3, 0, 0),  # draws
    "smoothadv": (3, 3, 12, 12),  # draws, steps x draws
    "cat_rs": (8, 8, 12, 12),  # 2 draws, steps x draws
    "pgd_at": (1, 1, 4, 4),  # 1, steps
    "trades": (2, 2, 5, 4),  # 2, steps and one forward alone
}


@every
def test_the_cost_is_that_of_the_docstring(name: str) -> None:
    x, y = batch(5)
    f, e = Counter(network()), Counter(network(1))
    loss_of(name, f, e, x, y).backward()
    counted = [count / 5 for network in (f, e) for count in (network.forward, network.backward)]
    assert counted == list(COST[name])


class HostReads(TorchDispatchMode):
    """Collects the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh"):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


@every
def test_nothing_waits_for_the_device(name: str) -> None:
    f, e, (x, y) = network(), network(1), batch()
    generator = stream(0, "draws")
    with HostReads() as reads:
        loss_of(name, f, e, x, y, generator).backward()
    assert reads.waiting == []
    with HostReads() as control:
        x[x > 0.5].max().item()
    assert {"index", "_local_scalar_dense"} <= set(control.waiting)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("consistency", {"draws": 0}, "draws must be >= 1, got 0"),
        ("smoothadv", {"draws": 0}, "draws must be >= 1, got 0"),
        ("smoothadv", {"steps": 0}, "steps must be >= 1, got 0"),
        ("smoothadv", {"epsilon": -0.1}, "epsilon must be >= 0, got -0.1"),
        ("cat_rs", {"draws": 0}, "draws must be >= 1, got 0"),
        ("cat_rs", {"steps": 0}, "steps must be >= 1, got 0"),
        ("cat_rs", {"epsilon": float("nan")}, "epsilon must be >= 0, got nan"),
        ("pgd_at", {"steps": 0}, "steps must be >= 1, got 0"),
        ("pgd_at", {"step_size": -1.0}, "step_size must be >= 0, got -1.0"),
        ("trades", {"steps": 0}, "steps must be >= 1, got 0"),
        ("trades", {"epsilon": -1.0}, "epsilon must be >= 0, got -1.0"),
    ],
)
def test_numbers_that_make_no_attack_are_refused(name: str, options: Options, text: str) -> None:
    f, (x, y) = network(), batch()
    with pytest.raises(InputError, match=text):
        loss_of(name, f, f, x, y, **options)
