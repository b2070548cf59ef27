"""A model with an adversarial example planted in every image's ball: does an attack find what is known to exist?

The active test of Zimmermann et al. (2022), in a form that leaves the model's own loss in place. For an image x of
label y, c is the most probable other class and p a random point at the edge of the ball. The planted model gives

    log_softmax( log p(x') + a <w, x' - x> e_c ),    w = (p - x) / ||p - x||^2, so that <w, p - x> = 1,

where a is large enough for c to win at p. At x nothing changes. The slope towards p is the same everywhere and at
least as steep as any slope that the model has against it on average, so an attack that climbs its loss with enough
steps of enough length gets there. Random points do not, since <w, x' - x> of a random x' is about 1 / sqrt(pixels).
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rush.attacks.gradient import LogProbs, is_random, pinned
from rush.attacks.losses import margin
from rush.attacks.threat import ThreatModel
from rush.auditing.surrogates import overridden
from rush.data.checks import LabelledPixels
from rush.evaluation.model import Defender
from rush.evaluation.plans import Plan
from rush.evaluation.verdict import Verdicts, VerdictSettings, judge_deterministic
from rush.runtime.randomness import stream

SLACK = 1.25  # times the gap at p: an attack may stop short of p by a fifth, and noise may move the gap
AHEAD = 0.5  # nats by which c wins at p beyond that
_JUDGE = Plan("planted", "mean of 100 draws", "pgd", "fresh", 100)

Tilt: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Planted:
    """An adversarial example planted for each of ``images``, as the module's docstring describes.

    Cost: 100 forward passes per image of a stochastic model, 1 of a deterministic one, besides the ranking of classes.
    """

    def __init__(self, defender: Defender, images: LabelledPixels, threat: ThreatModel, seed: int) -> None:
        self._inner = defender
        self._images, self._rows = images.x, {image_id: row for row, image_id in enumerate(images.ids)}
        points = torch.stack(
            [edge_point(image_id, row, threat, images, seed) for row, image_id in enumerate(images.ids)]
        )
        self._targets = defender.ranking(images, seed)[:, 0]
        log_probs = _mean_log_probs(defender, LabelledPixels(points, images.y, images.ids), seed, "planted/gap")
        gap = log_probs.amax(1) - log_probs.gather(1, self._targets[:, None])[:, 0]
        change = points - images.x
        strength = (SLACK * gap + AHEAD) / change.square().flatten(1).sum(1)
        self.slopes = strength.view(-1, 1, 1, 1) * change  # w of each image, (N, C, H, W)

    @property
    def defender(self) -> Defender:
        """The planted model. Its class at a point is that of the mean probabilities over 100 fresh draws."""
        return overridden(
            self._inner, single=False, log_probs=self.log_probs, judge=self._judge, choice_margin=self._choice_margin
        )

    def tilt(self, ids: Sequence[str], device: torch.device) -> Tilt:
        """Return the log-probabilities of the planted model for the images ``ids``.

        They are a function of the inner model's log-probabilities (B, K) and the points (B, C, H, W).
        """
        rows = [self._rows[image_id] for image_id in ids]
        x, slopes = self._images[rows].to(device), self.slopes[rows].to(device)
        targets = F.one_hot(self._targets[rows], self._inner.num_classes).to(device)

        def tilted(log_probs: Tensor, points: Tensor) -> Tensor:
            along = ((points - x) * slopes).flatten(1).sum(1, keepdim=True)
            return F.log_softmax(log_probs + along * targets, dim=1)

        return tilted

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        """Return the log-probabilities of the planted model, as ``Defender.log_probs``."""
        inner = self._inner.log_probs(plan, x, ids, seed, name)
        return (_RandomTilted if is_random(inner) else _Tilted)(inner, self.tilt(ids, x.device))

    def _judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        means = _mean_log_probs(self.defender, points, settings.seed, f"planted/verdict/{purpose}")
        return judge_deterministic(means, points.y)

    def _choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        return margin(_mean_log_probs(self.defender, points, seed, f"planted/{purpose}"), points.y)


class _Tilted:
    def __init__(self, inner: LogProbs, tilt: Tilt) -> None:
        self._inner, self._tilt = inner, tilt

    def __call__(self, x: Tensor) -> Tensor:
        return self._tilt(self._inner(x), x)


class _RandomTilted(_Tilted):
    def pinned(self) -> LogProbs:
        return _Tilted(pinned(self._inner), self._tilt)


def _mean_log_probs(defender: Defender, points: LabelledPixels, seed: int, name: str) -> Tensor:
    """Return the log of the mean probabilities (N, K) over 100 fresh draws, on the CPU."""
    log_probs = []
    size = max(1, defender.execution.rows(points.x.shape[1:]) // _JUDGE.eot_samples)
    for first in range(0, len(points), size):
        part = points.select(list(range(first, min(first + size, len(points)))))
        x = part.x.to(defender.execution.device)
        with torch.no_grad():
            log_probs.append(defender.log_probs(_JUDGE, x, part.ids, seed, name)(x).cpu())
    return torch.cat(log_probs)


def edge_point(image_id: str, row: int, threat: ThreatModel, images: LabelledPixels, seed: int) -> Tensor:
    """Return a random point (C, H, W) at the edge of the ball whose change points into [0, 1] at every pixel."""
    x, epsilon = images.x[row], float(torch.as_tensor(threat.select([row]).epsilon).max())
    generator = stream(seed, "audit/planted", image_id)
    pixels = x.numel()
    chosen = torch.ones(pixels, dtype=torch.bool)
    if threat.norm == "linf":
        size = epsilon
    elif threat.norm == "l2":
        size = epsilon / math.sqrt(pixels)
    else:
        number = min(pixels, math.ceil(2 * epsilon))  # so that no pixel changes by more than 1/2
        size, chosen = epsilon / number, torch.zeros(pixels, dtype=torch.bool)
        chosen[torch.randperm(pixels, generator=generator)[:number]] = True
    signs = torch.randint(0, 2, (pixels,), generator=generator).to(x.dtype) * 2 - 1
    moved = x.flatten() + size * signs
    signs = torch.where((moved < 0) | (moved > 1), -signs, signs)
    return (x.flatten() + size * signs * chosen).clamp(0, 1).view(x.shape)
