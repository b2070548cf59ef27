"""What the tests of single attacks share: models with closed-form distances, random functions, attacks as one type."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exact_models import HalfSpace, assert_in_threat
from rush.attacks.gradient import LogProbs
from rush.attacks.threat import ThreatModel
from rush.choices import Norm
from rush.data.sources import load_images
from rush.evaluation.result import ARRAYS, AttackResult
from rush.runtime.randomness import stream

Attack: TypeAlias = Callable[[LogProbs, Tensor, Tensor, ThreatModel], Tensor]


class Planes(nn.Module):
    """Class 1 where any of the scores w_k.x + b_k is positive: piecewise linear, and class 0 is a polytope.

    All weights are +-``size``, so that in every norm the nearest plane is the one of largest score.
    """

    def __init__(self, signs: Tensor, size: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(signs * size)
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum(1) - offset)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) @ self.weight.T + self.bias).amax(1)
        return torch.stack([-score, score], 1)


class Parts(nn.Module):
    """Logit c of K is ten times the sum of the pixels of the c-th part of the image."""

    def __init__(self, classes: int, pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.kron(torch.eye(classes), torch.ones(1, pixels)) * 10)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class PixelByPixel(nn.Module):
    """A two-layer network of sums along rows alone: its bits for one image are the same in any company."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn((8, pixels), generator=stream(0, "first")))
        self.second = nn.Parameter(torch.randn((classes, 8), generator=stream(0, "second")))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = ((x.flatten(1)[:, None] - 0.5) * self.first).sum(2).tanh()
        return (hidden[:, None] * self.second).sum(2)


class Detached(nn.Module):
    """``inner`` without its derivative."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


class Counted:
    """``inner``, a function that is not random, which keeps the points it is given and counts its calls."""

    def __init__(self, inner: LogProbs) -> None:
        self.inner = inner
        self.points: list[Tensor] = []
        self.with_gradient = self.without_gradient = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.points.append(x.detach())
        if torch.is_grad_enabled():
            self.with_gradient += 1
        else:
            self.without_gradient += 1
        return self.inner(x)


class Clouded(Counted):
    """A random function of the type that attacks know: ``inner`` plus a number that is drawn anew at every call and the
    same for all points of a call."""

    def __init__(self, inner: LogProbs, size: float) -> None:
        super().__init__(inner)
        self.size, self.generator = size, stream(0, "cloud")
        self.draws = 0

    def __call__(self, x: Tensor) -> Tensor:
        return self._at(x, self._draw())

    def pinned(self) -> LogProbs:
        self.draws += 1
        kept = self._draw()
        return lambda x: self._at(x, kept)

    def _draw(self) -> Tensor:
        return self.size * torch.randn((), generator=self.generator)

    def _at(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().__call__(x) - shift * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 2)


def log_probs_of(model: nn.Module) -> LogProbs:
    return lambda x: model(x).log_softmax(1)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [stream(seed, "attack", i) for i in range(count)]


def idle(_log_probs: LogProbs, x: Tensor, _y: Tensor, _threat: ThreatModel) -> Tensor:
    """The attack that does nothing."""
    return x


def valley(points: Tensor) -> Tensor:
    """Logits of two classes whose first pixel is worst at 0.56: cross-entropy and margin of class 0 peak there."""
    own = (points.flatten(1)[:, 0] - 0.56).abs() - 1
    return torch.stack([own, torch.zeros_like(own)], 1)


def half_space(length: float = 10) -> HalfSpace:
    """A plane through the middle of the 8x8 images, with a weight of this l2 norm."""
    weight = torch.randn((1, 8, 8), generator=stream(0, "plane"))
    weight *= length / weight.norm()
    return HalfSpace(weight, -0.5 * float(weight.sum()))


def near_plane(plane: HalfSpace, distances: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in the middle of the range at these l2 distances, by turns on either side; their classes."""
    x = torch.rand((len(distances), 1, 8, 8), generator=stream(0, "images")) * 0.3 + 0.35
    wanted = torch.tensor(distances) * torch.where(torch.arange(len(x)) % 2 == 1, 1, -1)
    normal = plane.weight.detach() / plane.weight.detach().norm()
    x += (wanted - torch.from_numpy(plane.margins(x)).float()).view(-1, 1, 1, 1) * normal
    assert x.min() > 0.15
    assert x.max() < 0.85
    return x, (wanted > 0).long()


def half_space_case() -> tuple[HalfSpace, Tensor, Tensor]:
    """16 images (16, 1, 8, 8) on both sides of a plane at l2 distances 0.05 to 0.3."""
    plane = half_space()
    return plane, *near_plane(plane, [0.05, 0.1, 0.2, 0.3] * 4)


def planes_case() -> tuple[Planes, Tensor, Tensor]:
    """12 images of class 0 within a polytope of 5 planes in general position."""
    signs = torch.randint(2, (5, 64), generator=stream(0, "signs")) * 2.0 - 1
    model = Planes(signs, 1.25, 1.0)
    x = torch.rand((12, 1, 8, 8), generator=stream(0, "images")) * 0.02 + 0.49
    assert (model(x).argmax(1) == 0).all()
    return model, x, torch.zeros(12, dtype=torch.int64)


def parts_case(classes: int) -> tuple[Parts, Tensor, Tensor, Tensor]:
    """Images with one class ahead, the next near and all others far behind: model, images, labels, next classes."""
    pairs = torch.tensor([[a, b] for a in range(classes) for b in range(classes) if a != b])
    levels = torch.full((len(pairs), classes), 0.4).scatter(
        1, pairs, torch.tensor([[0.56, 0.54]]).expand(len(pairs), 2)
    )
    x = levels.repeat_interleave(16, 1) + torch.rand((len(pairs), 16 * classes), generator=stream(0, "spread")) * 0.01
    return Parts(classes, 16), x.view(len(pairs), 1, 4, 4 * classes), pairs[:, 0], pairs[:, 1]


def distances_to_planes(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Closed-form distance (N,) in float64 from each image to the nearest other class of these models."""
    if isinstance(model, HalfSpace):
        if norm == "l1":
            return torch.from_numpy(l1_distances(model, x))
        return torch.from_numpy(model.linf_distances(x) if norm == "linf" else np.abs(model.margins(x)))
    logits = model(x).detach().double()
    if isinstance(model, Planes):
        gaps, weight = -logits[:, 1], model.weight.detach()[0].double()
    else:
        gaps = logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)
        weight = (model.get_parameter("weight").detach()[0] - model.get_parameter("weight").detach()[1]).double()
    dual = {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}[norm]
    return gaps / dual


def l1_distances(plane: HalfSpace, x: Tensor) -> NDArray[np.float64]:
    """l1 distances (N,) to the plane within [0, 1]: pixels of largest weight go to the end of their range, in turn."""
    weight, found = plane.weight.detach().double().flatten().numpy(), []
    for score, pixels in zip(plane.scores(x), x.flatten(1).double().numpy(), strict=True):
        left, spent = abs(score), 0.0
        for i in np.argsort(-np.abs(weight)):
            room = 1 - pixels[i] if weight[i] * score < 0 else pixels[i]
            part = min(room, left / abs(weight[i]))
            left, spent = left - part * abs(weight[i]), spent + part
        assert left < 1e-9
        found.append(spent)
    return np.array(found)


def broken(model: nn.Module, points: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(points).argmax(1) != y


def assert_reaches(
    attack: Attack, case: tuple[nn.Module, Tensor, Tensor], norm: Norm, above: float = 0.01, below: float = 0.01
) -> None:
    """``attack`` breaks every image at (1 + above) of its closed-form distance and none at (1 - below)."""
    model, x, y = case
    exact = distances_to_planes(model, x, y, norm)
    assert not broken(model, x, y).any()
    for factor, success in ((1 + above, True), (1 - below, False)):
        threat = ThreatModel(norm, (factor * exact).float())
        points = attack(log_probs_of(model), x, y, threat)
        assert_in_threat(points, x, threat)
        assert broken(model, points, y).tolist() == [success] * len(x)


def digits(count: int) -> tuple[Tensor, Tensor]:
    images = load_images("digits", split="test")[:count]
    assert images.labels is not None
    return images.pixels(), images.labels


def assert_same(first: AttackResult, second: AttackResult) -> None:
    """The results are equal in every bit but the seconds."""
    assert torch.equal(first.adversarial, second.adversarial)
    assert first.ids == second.ids
    assert first.plan == second.plan
    assert first.threat.norm == second.threat.norm
    assert (first.level, first.single) == (second.level, second.single)
    for name in ARRAYS:
        if name != "seconds":
            own, other = getattr(first, name), getattr(second, name)
            assert own.dtype == other.dtype
            np.testing.assert_array_equal(own, other, err_msg=name)
