"""Measurements of the audit that call a model: slopes, noise and outputs, as plain numbers."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs, draw_seed, loss_and_gradient, seeded
from rush.attacks.losses import Loss, margin
from rush.attacks.threat import ThreatModel
from rush.auditing.surrogates import with_network
from rush.choices import BLOCK
from rush.evaluation.model import RandomDefender, SmoothedDefender
from rush.evaluation.plans import Plan
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

DISTANCES = (0.01, 0.1, 1.0)  # distances of finite differences, in epsilon

_DIRECTIONS = 16
_UNDERFLOW = 1e-30  # a float32 gradient below this has lost entries
_VALUES = 16_384  # noise values for a standard deviation: 1 % with antithetic draws
_IMAGES = 8  # grey images that the noise is measured on
_DRAWS, _EXCHANGES = 32, 999  # outputs of a foreign model, and exchanges of the two sides
_GREY = 128 / 255  # a value of an 8-bit image
_NO_SIGNAL = 1e6  # draws needed where no signal is measured


def alive(slopes: Tensor) -> Tensor:
    """Return which gradients (B, C, H, W) are finite and not lost to underflow, (B,)."""
    flat = slopes.flatten(1)
    return flat.isfinite().all(1) & (flat.abs().amax(1) > _UNDERFLOW)


def without_gradient(log_probs: LogProbs, x: Tensor) -> Tensor:
    """Return log-probabilities (B, K) at ``x``."""
    with torch.no_grad():
        return log_probs(x)


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two tensors over the largest value of the first, which counts as at least 1."""
    return float((first - second).abs().max() / first.abs().max().clamp(min=1))


class Slopes(NamedTuple):
    """Slopes of the margin, by autograd and by central differences over ``DISTANCES``, at images with a gradient.

    Attributes:
        expected: slopes by autograd along random directions of signs, over the gradient's size, (distances,
            directions, B).
        measured: the same by central differences.
        ratio: slope by central differences over that by autograd along the gradient, (distances, B).
    """

    expected: Tensor
    measured: Tensor
    ratio: Tensor


def slopes_at(log_probs: LogProbs, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Slopes:
    """Return the slopes at the images ``x`` of ``log_probs``, which must be deterministic or pinned.

    Cost: 1 backward and 2 (16 + 1) 3 forward passes.
    """
    _, slope = loss_and_gradient(log_probs, x, y, margin)
    usable, size = alive(slope), slope.flatten(1).norm(dim=1).clamp(min=_UNDERFLOW).view(-1, 1, 1, 1)
    weight = 1 / size.flatten()[usable]
    signs = [torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for _ in range(_DIRECTIONS)]
    along = slope.nan_to_num() / size * x[0].numel() ** 0.5
    expected, measured, ratio = [], [], []
    for distance in DISTANCES:
        reach = distance * pixel_step(threat, x)
        pairs = [_slopes(log_probs, x, y, slope, reach * direction) for direction in signs]
        by_autograd, risen = (torch.stack(side)[:, usable] * weight for side in zip(*pairs, strict=True))
        expected.append(by_autograd)
        measured.append(risen)
        climbed, rising = _slopes(log_probs, x, y, slope, reach * along)
        ratio.append((rising / climbed)[usable])
    return Slopes(torch.stack(expected), torch.stack(measured), torch.stack(ratio))


def agreement(parts: Sequence[Slopes]) -> tuple[float, float, int]:
    """Compare autograd's slopes with the measured ones.

    The distance of the best cosine is used, so that steps and rounding smaller than this distance do no harm.

    Returns:
        The cosine between the two along random directions, over all images together; the median ratio along the
        gradient; the number of images.
    """
    expected, measured, ratio = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
    if ratio.shape[1] == 0:
        return 0.0, 0.0, 0
    size = expected.norm(dim=(1, 2)) * measured.norm(dim=(1, 2))
    cosine = (expected * measured).sum((1, 2)) / size.clamp(min=_UNDERFLOW)
    best = int(cosine.argmax())
    return float(cosine[best]), float(ratio[best].median()), ratio.shape[1]


def draws_needed(log_probs: LogProbs, x: Tensor, y: Tensor, loss: Loss, eot_samples: int, repeats: int) -> list[float]:
    """Return for each image the draws after which the gradient of ``loss`` has cosine 0.5 with its expectation.

    ``repeats`` gradients g of independent noise give signal = mean of <g_i, g_j>, i != j, and noise = mean of
    <g_i, g_i> minus the signal, both unbiased. The mean over m calls has a cosine^2 of about signal / (signal +
    noise / m). Without a measured signal the result is a million.

    Args:
        log_probs: stochastic log-probabilities, with ``eot_samples`` draws per call.
    """
    gradients = torch.stack([loss_and_gradient(log_probs, x, y, loss)[1].flatten(1) for _ in range(repeats)]).double()
    power = gradients.square().sum(2).mean(0)
    signal = (repeats * gradients.mean(0).square().sum(1) - power) / (repeats - 1)
    calls = (power - signal) / (3 * signal.clamp(min=1e-300))
    return (eot_samples * calls).clamp(max=_NO_SIGNAL).tolist()


def sigmas(smoothed: SmoothedClassifier, plan: Plan, shape: torch.Size, seed: int) -> tuple[float, float]:
    """Return the standard deviation of the noise under ``plan``'s attack, and in the verdict.

    Both are measured at the input of the base classifier, on grey images of ``shape`` (C, H, W), from at least 16,384
    normal values each, those of the attack possibly in pairs z, -z. Where both sides draw with one sigma the ratio of
    the squares is F-distributed with at least 8,192 and 16,384 degrees of freedom: it leaves ``validity.SIGMA_BAND``
    with probability < 1e-20.
    """
    entrance = _Entrance(smoothed.classifier)
    watched = with_network(smoothed, entrance, tuple(shape))
    grey, ids = torch.full((_IMAGES, *shape), _GREY), tuple(f"grey-{row}" for row in range(_IMAGES))
    watched.counts(grey, 1, watched.streams(seed, "audit/noise/first", ids))  # calls that only inspect have no noise
    defender, x = SmoothedDefender(watched, None), grey.to(smoothed.execution.device)
    entrance.forget()
    calls = -(-_VALUES // (grey.numel() * max(1, plan.eot_samples)))
    for call in range(calls):
        without_gradient(defender.log_probs(plan, x, ids, seed, f"audit/noise/{call}"), x)
    attacker = entrance.deviation()
    entrance.forget()
    votes = max(BLOCK, -(-_VALUES // grey.numel()))
    watched.counts(grey, votes, watched.streams(seed, "audit/noise/verdict", ids))
    return attacker, entrance.deviation()


def spreads(defender: RandomDefender, plan: Plan, x: Tensor, ids: Sequence[str], seed: int) -> tuple[float, float]:
    """Return the spread of a foreign stochastic model's outputs under ``plan``'s attack, and in the verdict.

    The spread is the mean standard deviation of a probability over 32 draws on the images ``x``. The attack calls the
    model with a gradient and one draw per call, the verdict without a gradient. Both draw from the same seeds (common
    random numbers): a model that draws from the process's generators gives both the same outputs, whatever its law. A
    model that draws elsewhere gives independent ones, for which ``spreads_p_value`` tests the difference. A plan
    without draws attacks one draw, over and over.
    """
    attack, verdict = _outputs_of_both(defender, plan, x, ids, seed)
    return (0.0 if attack is None else _spread(attack)), _spread(verdict)


def spreads_p_value(defender: RandomDefender, plan: Plan, x: Tensor, ids: Sequence[str], seed: int) -> float:
    """Return the p-value of a permutation test of the hypothesis that both sides of ``spreads`` draw alike.

    Under the hypothesis the pairs of outputs (attack, verdict) are independent, and each has the law of the same pair
    swapped, whether its two outputs are independent or the same draw. Among the observed distance of the ratio of
    spreads from 1 and those after 999 random swaps of pairs every rank is then equally likely, so that P(p-value <= u)
    <= u.
    """
    attack, verdict = _outputs_of_both(defender, plan, x, ids, seed)
    if attack is None:
        return 0.0  # the attack has one draw: nothing is left to chance
    generator = stream(seed, "audit/noise/exchange")
    observed = _log_ratio(attack, verdict) * (1 - 1e-9)
    as_far = 1
    for _ in range(_EXCHANGES):
        turned = torch.randint(0, 2, (len(attack), 1, 1), generator=generator).bool()
        as_far += _log_ratio(torch.where(turned, verdict, attack), torch.where(turned, attack, verdict)) >= observed
    return as_far / (_EXCHANGES + 1)


def _outputs_of_both(
    defender: RandomDefender, plan: Plan, x: Tensor, ids: Sequence[str], seed: int
) -> tuple[Tensor | None, Tensor]:
    """Return probabilities of single draws under the attack (None where it does not draw), and in the verdict."""
    verdict = _outputs(defender, Plan("verdict", "one draw", "pgd", "fresh", 1), x, ids, seed, gradient=False)
    if plan.eot_samples == 0 or plan.gradient == "transfer":
        return None, verdict
    one = replace(plan, gradient="fresh", eot_samples=1)
    return _outputs(defender, one, x, ids, seed, gradient=True), verdict


def _outputs(defender: RandomDefender, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, gradient: bool) -> Tensor:
    """Return probabilities (32, B, K) of single draws, the same draws with and without ``gradient``."""
    log_probs, draws = defender.log_probs(plan, x, ids, seed, "audit/noise"), []
    for _ in range(_DRAWS):
        with torch.set_grad_enabled(gradient):
            draws.append(log_probs(x.detach().requires_grad_(gradient)).detach().exp().double().cpu())
    return torch.stack(draws)


def _log_ratio(first: Tensor, second: Tensor) -> float:
    low, high = sorted((_spread(first), _spread(second)))
    return math.log(high / low) if low > 0 else (math.inf if high > 0 else 0.0)


def passes_differ(module: nn.Module, execution: Execution, x: Tensor, seed: int, passes: int) -> tuple[float, bool]:
    """Call a foreign module several times on the same images.

    Returns:
        The largest relative difference between outputs, and whether a call drew from the process's generators.
    """
    outputs, drew = [], False
    for number in range(passes):
        with torch.no_grad(), seeded(draw_seed(stream(seed, "audit/randomness", number))):
            before = _generator_states(execution)
            outputs.append(execution.logits(module, x.to(execution.device)))
            drew |= before != _generator_states(execution)
    return max(relative_difference(outputs[0], other) for other in outputs[1:]), drew


def _generator_states(execution: Execution) -> tuple[object, ...]:
    """Return the states of torch's, NumPy's and Python's global generators, comparable by ``==``."""
    device = torch.device(execution.device)
    legacy = np.random.get_state(legacy=True)  # noqa: NPY002 - a foreign network may draw from it
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    numbers = tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in legacy)
    return (*(state.numpy().tobytes() for state in states), numbers, random.getstate())


class _Entrance(nn.Module):
    """``inner``, keeping the sums for the standard deviation of its inputs around grey."""

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
        """Discard the inputs so far."""
        self.values, self._squares = 0, 0.0

    def deviation(self) -> float:
        """Return the standard deviation of all inputs since ``forget``."""
        return (self._squares / max(1, self.values)) ** 0.5


def _spread(probabilities: Tensor) -> float:
    return float(probabilities.std(0).mean())


def pixel_step(threat: ThreatModel, x: Tensor) -> Tensor:
    """Return the change of each pixel, (1 or B, 1, 1, 1), at a point of the ball's edge where all change alike."""
    pixels = x[0].numel()
    return threat.radius(x) / {"linf": 1.0, "l2": pixels**0.5, "l1": float(pixels)}[threat.norm]


def _slopes(log_probs: LogProbs, x: Tensor, y: Tensor, slope: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return half the difference of the margin (B,) between x + change and x - change, by ``slope`` and measured."""
    with torch.no_grad():
        measured = (margin(log_probs(x + change), y) - margin(log_probs(x - change), y)) / 2
    return (slope * change).flatten(1).sum(1), measured
