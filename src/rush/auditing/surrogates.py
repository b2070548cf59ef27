"""Defenders that are attacked through another derivative where the model's own leads nowhere."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs, seeded
from rush.attacks.straight_through import StraightThrough, straight_through
from rush.data.checks import LabelledPixels
from rush.evaluation.model import Defender, PlainDefender, RandomDefender, SmoothedDefender
from rush.evaluation.plans import Kind, Plan
from rush.evaluation.verdict import Verdicts
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian


class Wrapped:
    """A defender that behaves as ``inner`` in everything that a subclass does not define."""

    def __init__(self, inner: Defender) -> None:
        self.inner = inner
        self.kind: Kind = inner.kind
        self.execution, self.num_classes = inner.execution, inner.num_classes
        self.transferable, self.single = inner.transferable, inner.single

    def inspect(self, x: Tensor, declared: bool) -> None:
        self.inner.inspect(x, declared)

    def recheck(self) -> None:
        self.inner.recheck()

    def fingerprint(self) -> str:
        return f"{type(self).__name__}/{self.inner.fingerprint()}"

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        return self.inner.log_probs(plan, x, ids, seed, name)

    def judge(self, points: LabelledPixels, *, purpose: str, level: float, max_votes: int, seed: int) -> Verdicts:
        return self.inner.judge(points, purpose=purpose, level=level, max_votes=max_votes, seed=seed)

    def harm(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        return self.inner.harm(points, purpose, seed)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        return self.inner.ranking(images, seed)


class SeenThrough(Wrapped):
    """``defender`` whose attackers climb ``climbed``; its points are chosen and judged on ``defender``."""

    def __init__(self, defender: Defender, climbed: Defender) -> None:
        super().__init__(defender)
        self._climbed = climbed

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}/{self._climbed.fingerprint()}"

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        return self._climbed.log_probs(plan, x, ids, seed, name)


def steps_without_derivative(defender: Defender, x: Tensor) -> int:
    """Return the number of steps of the network at the images ``x`` whose derivative only a straight-through twin has.

    Raises whatever the network raises when it is run step by step.
    """
    with torch.enable_grad(), seeded(0):
        images = defender.execution.copied(x.detach()).requires_grad_(True)
        outputs, steps = straight_through(network_of(defender), images)
        if steps:  # a twin is of use only where this derivative can be taken
            torch.autograd.grad(outputs.float().sum(), images, allow_unused=True)
        return steps


def twin(defender: Defender) -> Defender:
    """Return ``defender`` with the same values and a derivative straight through rounding
    (``attacks.straight_through``)."""
    return _like(defender, StraightThrough(network_of(defender)), 0.0)


def smoothed_surrogate(defender: Defender, sigma: float, straight: bool) -> Defender:
    """Return the mean of ``defender`` over Gaussian noise of ``sigma`` on its images, besides its own draws."""
    network = network_of(defender)
    return _like(defender, StraightThrough(network) if straight else network, sigma)


def network_of(defender: Defender) -> nn.Module:
    """Return the network of a defender."""
    assert isinstance(defender, PlainDefender | SmoothedDefender | RandomDefender)
    return defender.smoothed.classifier if isinstance(defender, SmoothedDefender) else defender.model


def _like(defender: Defender, network: nn.Module, sigma: float) -> Defender:
    """Return the defender of ``network``, under noise of ``sigma`` besides the noise of ``defender``."""
    execution = replace(defender.execution, folded=False, compile_mode="none")  # both need the network's own layers
    made: Defender
    if isinstance(defender, RandomDefender):
        made = RandomDefender(_Noisy(network, sigma) if sigma else network, defender.num_classes, "mean", None)
    elif isinstance(defender, SmoothedDefender) or sigma:
        defended = defender.smoothed.noise.sigma if isinstance(defender, SmoothedDefender) else 0.0
        noise = Gaussian((defended**2 + sigma**2) ** 0.5)
        smoothed = SmoothedClassifier(network, noise=noise, num_classes=defender.num_classes, execution=execution)
        return SmoothedDefender(smoothed, None)
    else:
        made = PlainDefender(network, defender.num_classes, None)
    made.execution = execution
    return made


class _Noisy(nn.Module):
    def __init__(self, inner: nn.Module, sigma: float) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.sigma * torch.randn_like(x))
