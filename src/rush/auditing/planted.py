"""A model with an adversarial example planted inside every image's ball: does an attack find what is known to be there?

The active test of Zimmermann et al. (2022), in a form that leaves the model's own loss in place. For an image x of
label y, c is the most probable other class and p a random point at the edge of the ball. The planted model gives

    log_softmax( log p(x') + a <w, x' - x> e_c ),    w = (p - x) / ||p - x||^2, so that <w, p - x> = 1,

where a is large enough for c to win at p. At x nothing changes. The slope towards p is the same everywhere and at
least as steep as any that the model could set against it on average, so an attack that climbs its loss with enough
steps of enough length gets there; random points do not, since <w, x' - x> of a random x' is about 1 / sqrt(pixels).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.attacks.gradient import LogProbs, RandomLogProbs, is_random, pinned
from rush.attacks.losses import margin
from rush.attacks.threat import ThreatModel
from rush.data.checks import LabelledPixels
from rush.evaluation.model import Defender
from rush.evaluation.plans import Plan
from rush.evaluation.verdict import Verdicts, VerdictSettings, judge_deterministic
from rush.runtime.randomness import stream

SLACK = 1.25  # times the gap at p: an attack may stop short of p by a fifth, and noise may move the gap
AHEAD = 0.5  # nats by which c wins at p beyond that
_JUDGE = Plan("planted", "mean of 100 draws", "pgd", "fresh", 100)


@dataclass(frozen=True)
class _Plant:
    """One image's: where it is, (C, H, W); the slope a w, (C, H, W); the class."""

    x: Tensor
    slope: Tensor
    target: int


class PlantedDefender:
    """``defender`` with an adversarial example planted for each of ``images``, see the module.

    Its class at a point is that of the mean probabilities over 100 fresh draws. Cost of planting: 200 forward passes
    an image for a random model, 2 for another.
    """

    def __init__(self, defender: Defender, images: LabelledPixels, threat: ThreatModel, seed: int) -> None:
        self.kind, self.execution, self.num_classes = defender.kind, defender.execution, defender.num_classes
        self.transferable, self.single = defender.transferable, False
        self._inner = defender
        self._plants = _plant(defender, images, threat, seed)

    def inspect(self, x: Tensor, declared: bool) -> None:
        self._inner.inspect(x, declared)

    def recheck(self) -> None:
        self._inner.recheck()

    def fingerprint(self) -> str:
        return f"planted/{self._inner.fingerprint()}"

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        inner = self._inner.log_probs(plan, x, ids, seed, name)
        tilt = self._tilt(ids, x.device)
        return _RandomTilted(inner, tilt) if is_random(inner) else _Tilted(inner, tilt)

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        return judge_deterministic(self._means(points, f"verdict/{purpose}", settings.seed), points.y)

    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        return margin(self._means(points, purpose, seed), points.y)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        return self._inner.ranking(images, seed)

    def _means(self, points: LabelledPixels, name: str, seed: int) -> Tensor:
        return _means(self, points, seed, f"planted/{name}")

    def _tilt(self, ids: Sequence[str], device: torch.device) -> "_Tilt":
        plants = [self._plants[own] for own in ids]
        return _Tilt(
            torch.stack([plant.x for plant in plants]).to(device),
            torch.stack([plant.slope for plant in plants]).to(device),
            F.one_hot(torch.tensor([plant.target for plant in plants]), self.num_classes).to(device),
        )


@dataclass(frozen=True)
class _Tilt:
    x: Tensor
    slope: Tensor
    targets: Tensor

    def added_to(self, log_probs: Tensor, points: Tensor) -> Tensor:
        along = ((points - self.x) * self.slope).flatten(1).sum(1, keepdim=True)
        return F.log_softmax(log_probs + along * self.targets, dim=1)


class _Tilted:
    def __init__(self, inner: LogProbs, tilt: _Tilt) -> None:
        self._inner, self._by = inner, tilt

    def __call__(self, x: Tensor) -> Tensor:
        return self._by.added_to(self._inner(x), x)


class _RandomTilted(_Tilted):
    def pinned(self) -> LogProbs:
        assert isinstance(self._inner, RandomLogProbs)
        return _Tilted(pinned(self._inner), self._by)


def _plant(defender: Defender, images: LabelledPixels, threat: ThreatModel, seed: int) -> dict[str, _Plant]:
    points = torch.stack([_edge(own, row, threat, images, seed) for row, own in enumerate(images.ids)])
    targets = defender.ranking(images, seed)[:, 0]
    log_probs = _means(defender, LabelledPixels(points, images.y, images.ids), seed, "planted/gap")
    own = log_probs.gather(1, targets[:, None])[:, 0]
    gap = log_probs.amax(1) - own
    change = points - images.x
    strength = (SLACK * gap + AHEAD) / change.square().flatten(1).sum(1)
    slope = strength.view(-1, 1, 1, 1) * change
    return {name: _Plant(images.x[row], slope[row], int(targets[row])) for row, name in enumerate(images.ids)}


def _means(defender: Defender, points: LabelledPixels, seed: int, name: str) -> Tensor:
    """Log of the mean probabilities (N, K) over 100 fresh draws, on the CPU."""
    found = []
    size = max(1, defender.execution.tile // _JUDGE.eot_samples)
    for first in range(0, len(points), size):
        part = points.select(list(range(first, min(first + size, len(points)))))
        x = part.x.to(defender.execution.device)
        with torch.no_grad():
            found.append(defender.log_probs(_JUDGE, x, part.ids, seed, name)(x).cpu())
    return torch.cat(found)


def _edge(name: str, row: int, threat: ThreatModel, images: LabelledPixels, seed: int) -> Tensor:
    """A random point (C, H, W) at the edge of the ball whose change points into [0, 1] at every pixel."""
    x, epsilon = images.x[row], float(torch.as_tensor(threat.select([row]).epsilon).max())
    generator = stream(seed, "audit/planted", name)
    pixels = x.numel()
    if threat.norm == "linf":
        size, chosen = epsilon, torch.ones(pixels, dtype=torch.bool)
    elif threat.norm == "l2":
        size, chosen = epsilon / math.sqrt(pixels), torch.ones(pixels, dtype=torch.bool)
    else:
        number = min(pixels, math.ceil(2 * epsilon))  # so that no pixel changes by more than 1/2
        size, chosen = epsilon / number, torch.zeros(pixels, dtype=torch.bool)
        chosen[torch.randperm(pixels, generator=generator)[:number]] = True
    signs = torch.randint(0, 2, (pixels,), generator=generator).to(x.dtype) * 2 - 1
    moved = x.flatten() + size * signs
    signs = torch.where((moved < 0) | (moved > 1), -signs, signs)
    return (x.flatten() + size * signs * chosen).clamp(0, 1).view(x.shape)
