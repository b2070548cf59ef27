"""Measurements of the audit that call a model: slopes, noise and outputs, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs, draw_seed, loss_and_gradient, seeded
from rush.attacks.losses import Loss, margin
from rush.attacks.threat import ThreatModel
from rush.engine.precision import Execution
from rush.evaluation.defenders import RandomDefender, SmoothedDefender
from rush.evaluation.plans import Plan
from rush.randomness import stream
from rush.smoothing import BLOCK, SmoothedClassifier

DISTANCES = (0.01, 0.1, 1.0)  # of finite differences, in epsilon

_DIRECTIONS = 16
_UNDERFLOW = 1e-30  # a float32 gradient below this has lost entries
_VALUES = 16_384  # of the noise, for its standard deviation: 1 % with antithetic draws
_IMAGES, _DRAWS = 8, 16  # on which outputs of a foreign model are compared
_GREY = 0.5
_NO_SIGNAL = 1e6


def alive(slopes: Tensor) -> Tensor:
    """Which gradients (B, C, H, W) carry something: finite and not lost to underflow, (B,)."""
    flat = slopes.flatten(1)
    return flat.isfinite().all(1) & (flat.abs().amax(1) > _UNDERFLOW)


def without_gradient(log_probs: LogProbs, x: Tensor) -> Tensor:
    """Log-probabilities (B, K) at ``x``."""
    with torch.no_grad():
        return log_probs(x)


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Largest difference of two tensors over the largest value of the first, which counts as 1 at least."""
    return float((first - second).abs().max() / first.abs().max().clamp(min=1))


@dataclass(frozen=True)
class Slopes:
    """Slopes of the margin at some images, by autograd and measured by central differences, over ``DISTANCES``.

    expected, measured: (distances, directions, B) along random directions of signs, each over the gradient's size;
    ratio: (distances, B), measured over autograd's along the gradient. Images without a gradient are left out.
    """

    expected: Tensor
    measured: Tensor
    ratio: Tensor


def slopes_at(log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Slopes:
    """Slopes at the images ``x``; ``log_probs``: not random, or pinned.

    Cost: 1 backward and 2 (16 + 1) 3 forward passes.
    """
    _, slope = loss_and_gradient(log_probs, x, y, margin)
    usable, size = alive(slope), _size(slope)
    weight = 1 / size.flatten()[usable]
    directions = [_signs(x, generator) for _ in range(_DIRECTIONS)]
    along = slope.nan_to_num() / size * x[0].numel() ** 0.5
    expected, measured, ratio = [], [], []
    for distance in DISTANCES:
        reach = distance * _pixel_step(threat, x)
        pairs = [_slopes(log_probs, x, y, slope, reach * way) for way in directions]
        by_autograd, risen = (torch.stack(side)[:, usable] * weight for side in zip(*pairs, strict=True))
        expected.append(by_autograd)
        measured.append(risen)
        climbed, rising = _slopes(log_probs, x, y, slope, reach * along)
        ratio.append((rising / climbed)[usable])
    return Slopes(torch.stack(expected), torch.stack(measured), torch.stack(ratio))


def agreement(parts: Sequence[Slopes]) -> tuple[float, float, int]:
    """How autograd's slopes compare with the measured ones: (cosine, ratio, images).

    cosine: between the two along random directions, all images together; ratio: the median, along the gradient. Of the
    distances the one of the best cosine counts, so that steps and rounding smaller than it are forgiven.
    """
    expected, measured = (torch.cat([getattr(own, name) for own in parts], 2) for name in ("expected", "measured"))
    ratio = torch.cat([own.ratio for own in parts], 1)
    if ratio.shape[1] == 0:
        return 0.0, 0.0, 0
    size = expected.norm(dim=(1, 2)) * measured.norm(dim=(1, 2))
    cosine = (expected * measured).sum((1, 2)) / size.clamp(min=_UNDERFLOW)
    best = int(cosine.argmax())
    return float(cosine[best]), float(ratio[best].median()), ratio.shape[1]


def draws_needed(log_probs: LogProbs, x: Tensor, y: Tensor, loss: Loss, eot_samples: int, repeats: int) -> list[float]:
    """For each image the draws after which the gradient of ``loss`` has cosine 0.5 with its expectation, on average.

    log_probs: random, ``eot_samples`` draws a call. ``repeats`` gradients g of independent noise give signal = mean of
    <g_i, g_j>, i != j, and noise = mean of <g_i, g_i> less that, both unbiased; m calls have a cosine^2 of about
    signal / (signal + noise / m). Where no signal is seen the answer is a million.
    """
    gradients = torch.stack([loss_and_gradient(log_probs, x, y, loss)[1].flatten(1) for _ in range(repeats)]).double()
    power = gradients.square().sum(2).mean(0)
    signal = (repeats * gradients.mean(0).square().sum(1) - power) / (repeats - 1)
    calls = (power - signal) / (3 * signal.clamp(min=1e-300))
    return (eot_samples * calls).clamp(max=_NO_SIGNAL).tolist()


def sigmas(smoothed: SmoothedClassifier, plan: Plan, shape: torch.Size, seed: int) -> tuple[float, float]:
    """Standard deviations of the noise on the base classifier's inputs, (under ``plan``'s attack, in the verdict).

    Both are measured at the entrance of the base classifier, on grey images of ``shape`` (C, H, W), to about 1 %.
    """
    entrance = _Entrance(smoothed.classifier)
    execution = replace(smoothed.execution, folded=False, compile_mode="none")  # folding works on a copy
    watched = SmoothedClassifier(
        entrance,
        noise=smoothed.noise,
        num_classes=smoothed.num_classes,
        execution=execution,
        image_shape=tuple(shape),
    )
    grey, ids = torch.full((_IMAGES, *shape), _GREY), tuple(f"grey-{row}" for row in range(_IMAGES))
    watched.counts(grey, 1, watched.streams(seed, "audit/noise/first", ids))  # what the engine asks once is not noise
    defender, x = SmoothedDefender(watched, None), grey.to(execution.device)
    entrance.forget()
    calls = -(-_VALUES // (grey.numel() * max(1, plan.eot_samples)))
    for call in range(calls):
        without_gradient(defender.log_probs(plan, x, ids, seed, f"audit/noise/{call}"), x)
    attacker = entrance.deviation()
    entrance.forget()
    watched.counts(grey, BLOCK, watched.streams(seed, "audit/noise/verdict", ids))
    return attacker, entrance.deviation()


def spreads(defender: RandomDefender, plan: Plan, x: Tensor, ids: Sequence[str], seed: int) -> tuple[float, float]:
    """How much a foreign random model's outputs vary from draw to draw, (under ``plan``'s attack, in the verdict).

    The mean standard deviation of a probability over 16 draws on the images ``x``: as the attack calls the model, with
    a gradient and one draw a call, and as the verdict does, without. A plan without draws sees one draw, over and over.
    """
    if plan.eot_samples == 0 or plan.gradient == "transfer":
        attacker = 0.0
    else:
        one = replace(plan, gradient="fresh", eot_samples=1)
        seen = defender.log_probs(one, x, ids, seed, "audit/noise")
        attacker = _spread([seen(x.detach().requires_grad_(True)).detach() for _ in range(_DRAWS)])
    judged = defender.log_probs(Plan("verdict", "one draw", "pgd", "fresh", 1), x, ids, seed, "audit/noise/verdict")
    return attacker, _spread([without_gradient(judged, x) for _ in range(_DRAWS)])


def passes_differ(module: nn.Module, execution: Execution, x: Tensor, seed: int, passes: int) -> float:
    """Largest relative difference between outputs of several calls of a foreign module on the same images."""
    found = []
    for number in range(passes):
        with torch.no_grad(), seeded(draw_seed(stream(seed, "audit/randomness", number))):
            found.append(execution.logits(module, x.to(execution.device)))
    return max(relative_difference(found[0], other) for other in found[1:])


class _Entrance(nn.Module):
    """``inner``, which keeps the sums that the standard deviation of its inputs around grey takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.values, self._squares = 0, 0.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.values += x.numel()
        self._squares += float((x.detach().double() - _GREY).square().sum())
        return self.inner(x)

    def forget(self) -> None:
        """Begin anew."""
        self.values, self._squares = 0, 0.0

    def deviation(self) -> float:
        """Of all inputs since."""
        return (self._squares / max(1, self.values)) ** 0.5


def _spread(log_probs: list[Tensor]) -> float:
    return float(torch.stack(log_probs).exp().std(0).mean())


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1).to(x.device)


def _size(slope: Tensor) -> Tensor:
    return slope.flatten(1).norm(dim=1).clamp(min=_UNDERFLOW).view(-1, 1, 1, 1)


def _pixel_step(threat: ThreatModel, x: Tensor) -> Tensor:
    """The change of each pixel, (1 or B, 1, 1, 1), where all change alike and the point is at the edge of the ball."""
    pixels = x[0].numel()
    return threat.radius(x) / {"linf": 1.0, "l2": pixels**0.5, "l1": float(pixels)}[threat.norm]


def _slopes(log_probs: LogProbs, x: Tensor, y: Tensor, slope: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Half the difference of the margin (B,) between x + change and x - change: by ``slope``, and measured."""
    with torch.no_grad():
        measured = (margin(log_probs(x + change), y) - margin(log_probs(x - change), y)) / 2
    return (slope * change).flatten(1).sum(1), measured
