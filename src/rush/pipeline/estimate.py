"""The time that certification and attacks take at most, from a few measured passes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rush.certification.rule import Rule
from rush.choices import BLOCK
from rush.evaluation.model import Model
from rush.evaluation.plans import Plan, Suite
from rush.models.storage import plain_execution
from rush.pipeline.attackers import Attackers
from rush.reporting.wording import duration, passes_text
from rush.runtime.execution import device_of
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

_GRADIENTS = 64  # images whose gradient is timed together
_CALLS = 2  # that are timed, after one for warm-up


@dataclass(frozen=True)
class Rates:
    """Images per second that pass the base network: forward as in verdicts, and forward and backward."""

    forward: float
    gradient: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a stage at most, if no image is decided early and nothing is broken.

    Attributes:
        passes: forward and backward per image.
        forward_passes: forward only per image.
        seconds: of all images.
    """

    images: int
    passes: float
    forward_passes: float
    seconds: float


def measured_rates(model: Model, shape: Sequence[int]) -> Rates:
    """Time a few tiles of black images of ``shape`` (C, H, W)."""
    if isinstance(model, SmoothedClassifier):
        rows, generator = model.execution.rows(shape), stream(0, "estimate", device=model.execution.device)
        x, draws = torch.zeros(1, *shape, device=model.execution.device), -(-rows // BLOCK) * BLOCK
        forward = _rate(lambda: model.vote_blocks(x, draws, [generator]), draws)
        module: nn.Module = model.as_module(min(rows, _GRADIENTS), generator)
        return Rates(forward, _rate(lambda: _differentiate(module, x), min(rows, _GRADIENTS)))
    execution = plain_execution(device_of(model))
    images = torch.zeros(execution.rows(shape), *shape, device=execution.device)
    forward = _rate(lambda: execution.tiled_logits(model, images), len(images))
    few = images[:_GRADIENTS]
    return Rates(forward, _rate(lambda: _differentiate(model, few), len(few)))


def certify_estimate(rule: Rule, images: int, rates: Rates) -> Estimate:
    """Return the cost of certifying ``images`` images."""
    return Estimate(images, 0, rule.num_samples, images * rule.num_samples / rates.forward)


def attack_estimate(attackers: Attackers, images: int, curve_images: int, rates: Rates) -> Estimate:
    """Return the cost of the ladder and the curve, with the verdicts."""
    plans = [(rung, 1.0) for rung in attackers.rungs]
    plans += [(plan, min(curve_images, images) / images) for _, plan in attackers.curve]
    passes = sum(share * plan.passes_per_image for plan, share in plans)
    forward = sum(share * (_queries(plan) + attackers.settings.max_votes) for plan, share in plans)
    return Estimate(images, passes, forward, images * (forward / rates.forward + passes / rates.gradient))


def estimate_text(estimate: Estimate, rates: Rates) -> str:
    """Return an estimate in words."""
    rate = f"{rates.forward:,.0f} forward" + (
        f", {rates.gradient:,.0f} forward and backward" if estimate.passes else ""
    )
    return (
        f"at most {duration(estimate.seconds)} for {estimate.images:,} images of at most "
        f"{passes_text(round(estimate.passes), round(estimate.forward_passes))} passes, at {rate} per second here"
    )


def _queries(plan: Plan | Suite) -> int:
    """Return the forward passes per image of attackers that take no gradient."""
    plans = plan.plans if isinstance(plan, Suite) else (plan,)
    return sum(
        each.runs * each.steps * max(1, each.eot_samples) for each in plans if each.method in ("square", "random")
    )


def _differentiate(function: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    function(x).sum().backward()


def _rate(work: Callable[[], object], images: int) -> float:
    """Return the images per second of ``work``, which passes this number of them."""
    work()
    started = time.perf_counter()
    for _ in range(_CALLS):
        work()
    return images * _CALLS / (time.perf_counter() - started)
