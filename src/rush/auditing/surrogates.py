"""Defenders that are attacked through another derivative where the model's own leads nowhere."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rush.attacks.gradient import seeded
from rush.attacks.straight_through import StraightThrough, straight_through
from rush.evaluation.model import Defender, PlainDefender, RandomDefender, SmoothedDefender
from rush.runtime.execution import Execution
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian, Noise


class Changed(nn.Module):
    """``inner`` on images that ``change`` alters at every call."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._change = inner, change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self._change(x))


def overridden(defender: Defender, **members: object) -> Defender:
    """Return a copy of ``defender``, of the same model, in which ``members`` replace attributes and methods."""
    other = copy.copy(defender)
    vars(other).update(members)
    return other


def attacked_through(defender: Defender, surrogate: Defender) -> Defender:
    """Return ``defender`` whose attackers climb ``surrogate``. Its points are chosen and judged as before."""
    return overridden(
        defender,
        log_probs=surrogate.log_probs,
        fingerprint=lambda: f"{defender.fingerprint()}/{surrogate.fingerprint()}",
    )


def with_network(
    smoothed: SmoothedClassifier, network: nn.Module, image_shape: Sequence[int] | None = None
) -> SmoothedClassifier:
    """Return ``smoothed`` with another ``network``, neither folded nor compiled, for images of ``image_shape``."""
    return SmoothedClassifier(
        network,
        noise=smoothed.noise,
        num_classes=smoothed.num_classes,
        execution=unfolded(smoothed.execution),
        image_shape=image_shape,
    )


def unfolded(execution: Execution) -> Execution:
    """Return ``execution`` that runs the network's own layers."""
    return replace(execution, folded=False, compile_mode="none")


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
    """Return ``defender`` with its values and a derivative straight through rounding (``straight_through``)."""
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
    execution = unfolded(defender.execution)
    made: Defender
    if isinstance(defender, RandomDefender):
        if sigma:
            network = Changed(network, lambda x: x + sigma * torch.randn_like(x))
        made = RandomDefender(network, defender.num_classes, "mean", None)
    elif isinstance(defender, SmoothedDefender) or sigma:
        defended = defender.smoothed.noise.sigma if isinstance(defender, SmoothedDefender) else 0.0
        noise: Noise = Gaussian((defended**2 + sigma**2) ** 0.5)
        if isinstance(defender, SmoothedDefender) and not sigma:
            noise = defender.smoothed.noise
        smoothed = SmoothedClassifier(network, noise=noise, num_classes=defender.num_classes, execution=execution)
        return SmoothedDefender(smoothed, None)
    else:
        made = PlainDefender(network, defender.num_classes, None)
    made.execution = execution
    return made
