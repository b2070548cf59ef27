"""The time that certification, attacks and the audit take, from a few measured passes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rush.auditing.audit import default_plan
from rush.auditing.case import PROBED
from rush.certification.rule import Rule
from rush.choices import BLOCK
from rush.evaluation.model import Model
from rush.evaluation.plans import USUAL_VOTES, Kind, Plan, Suite, num_votes, usual_share, worst_case
from rush.models.storage import plain_execution
from rush.pipeline.attackers import Attackers
from rush.recipe.schema import AuditConfig
from rush.reporting.wording import duration, passes_text
from rush.runtime.execution import device_of
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

SEQUENTIAL_SHARE = 0.2
"""Share of its cap that a sequential certification draws on average, rounded from the runs in ``results/``."""
_GRADIENTS = 64  # images whose gradient is timed together
_PROBES = 6  # evaluations that probes of an audit cost together
_CALLS = 2  # timed calls, after one for warm-up


@dataclass(frozen=True)
class Rates:
    """Images per second that pass the base network: forward as in verdicts, and forward and backward."""

    forward: float
    gradient: float


@dataclass(frozen=True)
class Estimate:
    """The largest cost of a stage, if no image is decided early and nothing is broken, and its usual time.

    Attributes:
        passes: forward and backward passes per image.
        forward_passes: forward passes without backward, per image.
        seconds: seconds for all images.
        usual_seconds: seconds for all images, where verdicts and sequential certification end as early as in the runs
            of this library on CIFAR-10.
        bounded: whether a stage cannot take more than these passes and ``seconds``. The audit can.
    """

    images: int
    passes: float
    forward_passes: float
    seconds: float
    usual_seconds: float
    bounded: bool = True


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
    usual = SEQUENTIAL_SHARE if rule.method == "sequential" else 1.0
    seconds = images * rule.num_samples / rates.forward
    return Estimate(images, 0, rule.num_samples, seconds, seconds * usual)


def attack_estimate(attackers: Attackers, images: int, curve_images: int, rates: Rates) -> Estimate:
    """Return the cost of the ladder, the curve and the attack inside every certified ball, with the verdicts."""
    plans: list[tuple[Plan | Suite, float]] = [(rung, 1.0) for rung in attackers.rungs]
    plans += [(plan, min(curve_images, images) / images) for _, plan in attackers.curve]
    plans += [(attackers.sandwich, 1.0)] if attackers.sandwich else []
    return _estimate(plans, attackers.kind, attackers.settings.max_votes, images, rates)


def audit_estimate(attackers: Attackers, config: AuditConfig, num_classes: int, images: int, rates: Rates) -> Estimate:
    """Return the cost of the audit: the worst-case suite, and the probes with their verdicts on some images.

    A rung of the ladder was evaluated earlier, and so was the suite unless it is audited. The rest follows "Cost" in
    ``rush.audit``.
    """
    kind, rung = attackers.kind, attackers.rung(config.rung)
    audited, probed = rung or default_plan(kind), min(PROBED, images) / images
    plans: list[tuple[Plan | Suite, float]] = [(audited, _PROBES * probed + (0.0 if rung else 1.0))]
    if not attackers.has_suite or isinstance(rung, Suite):
        plans.append((worst_case(kind, num_classes), 1.0))
    return replace(_estimate(plans, kind, config.max_votes, images, rates), bounded=False)


def _estimate(
    plans: Sequence[tuple[Plan | Suite, float]], kind: Kind, max_votes: int, images: int, rates: Rates
) -> Estimate:
    """Return the cost of attackers, each with the share of the images that it attacks."""
    passes = forward = seconds = usual = 0.0
    for plan, share in plans:
        most, usually = (
            plan.queries_per_image + num_votes(plan, kind, votes)
            for votes in (BLOCK + max_votes, min(max_votes, USUAL_VOTES))
        )
        gradients = plan.passes_per_image / rates.gradient
        passes, forward = passes + share * plan.passes_per_image, forward + share * most
        seconds += share * images * (gradients + most / rates.forward)
        usual += share * images * (gradients + usually / rates.forward) * usual_share(plan)
    return Estimate(images, passes, forward, seconds, usual)


def estimate_text(estimate: Estimate, rates: Rates) -> str:
    """Return an estimate in words."""
    rate = f"{rates.forward:,.0f} forward" + (
        f", {rates.gradient:,.0f} forward and backward" if estimate.passes else ""
    )
    times = [f"about {duration(estimate.usual_seconds)}"] if estimate.usual_seconds < estimate.seconds else []
    passes = ""
    if estimate.bounded:
        times.append(f"at most {duration(estimate.seconds)}")
        passes = f" of at most {passes_text(round(estimate.passes), round(estimate.forward_passes))} passes"
    return f"{', '.join(times)} for {estimate.images:,} images{passes}, at {rate} per second here"


def _differentiate(function: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    function(x).sum().backward()


def _rate(work: Callable[[], object], images: int) -> float:
    """Return the images per second of ``work``, which passes this number of images."""
    work()
    started = time.perf_counter()
    for _ in range(_CALLS):
        work()
    return images * _CALLS / (time.perf_counter() - started)
