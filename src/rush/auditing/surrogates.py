"""Where the audit's attacks may take their derivative from when the model's own leads nowhere: twins and surrogates."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs, seeded
from rush.attacks.straight_through import StraightThrough, straight_through
from rush.data.checks import LabelledPixels
from rush.evaluation.model import Defender, PlainDefender, RandomDefender, SmoothedDefender
from rush.evaluation.plans import Kind, Plan
from rush.evaluation.verdict import Verdicts, VerdictSettings
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian


class SeenThrough:
    """``defender``, whose attackers climb ``surrogate``; points are chosen and judged on ``defender``."""

    def __init__(self, defender: Defender, surrogate: Defender) -> None:
        self.kind: Kind = defender.kind
        self.execution, self.num_classes = defender.execution, defender.num_classes
        self.transferable, self.single = defender.transferable, defender.single
        self._defender, self._surrogate = defender, surrogate

    def inspect(self, x: Tensor, declared: bool) -> None:
        self._defender.inspect(x, declared)

    def recheck(self) -> None:
        self._defender.recheck()

    def fingerprint(self) -> str:
        return f"{self._defender.fingerprint()}/{self._surrogate.fingerprint()}"

    def log_probs(self, plan: Plan, x: Tensor, ids: Sequence[str], seed: int, name: str) -> LogProbs:
        return self._surrogate.log_probs(plan, x, ids, seed, name)

    def judge(self, points: LabelledPixels, purpose: str, settings: VerdictSettings) -> Verdicts:
        return self._defender.judge(points, purpose, settings)

    def choice_margin(self, points: LabelledPixels, purpose: str, seed: int) -> Tensor:
        return self._defender.choice_margin(points, purpose, seed)

    def ranking(self, images: LabelledPixels, seed: int) -> Tensor:
        return self._defender.ranking(images, seed)


def steps_without_derivative(defender: Defender, x: Tensor) -> int:
    """Return how many steps of the network at the images ``x`` lose the derivative that a straight-through twin has.

    Raises whatever the network raises, run that way.
    """
    with torch.enable_grad(), seeded(0):
        at = defender.execution.copied(x.detach()).requires_grad_(True)
        outputs, steps = straight_through(network_of(defender), at)
        if steps:
            torch.autograd.grad(outputs.float().sum(), at, allow_unused=True)  # or the twin is of no use
        return steps


def twin(defender: Defender) -> Defender:
    """``defender`` of the same values, with a derivative straight through rounding (``attacks.straight_through``)."""
    return _like(defender, StraightThrough(network_of(defender)), 0.0)


def smoothed_surrogate(defender: Defender, sigma: float, straight: bool) -> Defender:
    """The mean of ``defender`` over Gaussian noise of ``sigma`` on its images, besides what it draws itself."""
    network = network_of(defender)
    return _like(defender, StraightThrough(network) if straight else network, sigma)


def network_of(defender: Defender) -> nn.Module:
    """The network that a defender is made of."""
    assert isinstance(defender, PlainDefender | SmoothedDefender | RandomDefender)
    return defender.smoothed.classifier if isinstance(defender, SmoothedDefender) else defender.model


def _like(defender: Defender, network: nn.Module, sigma: float) -> Defender:
    execution = replace(defender.execution, folded=False, compile_mode="none")  # both look into the network
    made: Defender
    if isinstance(defender, RandomDefender):
        made = RandomDefender(_Noisy(network, sigma) if sigma else network, defender.num_classes, "mean", None)
        made.execution = execution
    elif isinstance(defender, SmoothedDefender) or sigma:
        own = defender.smoothed.noise.sigma if isinstance(defender, SmoothedDefender) else 0.0
        noise = Gaussian((own**2 + sigma**2) ** 0.5)
        smoothed = SmoothedClassifier(network, noise=noise, num_classes=defender.num_classes, execution=execution)
        made = SmoothedDefender(smoothed, None)
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
