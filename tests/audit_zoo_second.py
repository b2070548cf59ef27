"""Models and evaluations of the second half of the zoo, written against thresholds that were already fixed.

Small perceptrons and linear models where they serve: an audit of them takes seconds.
"""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audit_zoo import Images, digits, plain_network
from rush.attacks.gradient import LogProbs, seeded
from rush.attacks.losses import cross_entropy
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.auditing.surrogates import Changed
from rush.choices import AttackMethod
from rush.evaluation.attack import attack
from rush.evaluation.model import Model
from rush.evaluation.plans import Plan
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import BROKEN, HELD
from rush.runtime.randomness import seeded_init, stream

PASSES = 10  # of a stochastic model, of which one must be right for ``any_of_ten``


def parity(number: int, split: str = "test") -> Images:
    """The first ``number`` digits, labelled 1 where they are odd."""
    x, y = digits(number, split)
    return x, y % 2


@cache
def perceptron() -> nn.Module:
    """64-64-10, trained on the digits as they are."""
    return fitted_perceptron("perceptron")


@cache
def noisy_perceptron() -> nn.Module:
    """64-64-10, trained under Gaussian noise of 0.25."""
    return fitted_perceptron("noisy perceptron", noise=0.25)


def batch_normalised() -> nn.Module:
    """A copy of the plain network in training mode: an image's class depends on the images beside it."""
    return copy.deepcopy(plain_network()).train()


@cache
def shifted_perceptron() -> nn.Module:
    """64-256-10, trained under shifts of up to 2 pixels each way, round the edges."""
    return fitted_perceptron("shifted perceptron", hidden=256, shift=2)


@cache
def plane() -> nn.Module:
    """A linear model that tells odd digits from even ones, see ``parity``."""
    return fitted(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), parity(10_000, "train"), "plane")


def fitted_perceptron(name: str, hidden: int = 64, noise: float = 0.0, shift: int = 0) -> nn.Module:
    """64-``hidden``-10, trained on the digits by ``fitted``."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return fitted(network, digits(10_000, "train"), name, noise, shift)


def fitted(network: nn.Module, images: Images, name: str, noise: float = 0.0, shift: int = 0) -> nn.Module:
    """``network`` in evaluation mode, trained for 30 epochs from a start of its own, under noise and shifts."""
    generator = stream(0, "zoo", name)
    seeded_init(network, generator).train()
    x, y = images
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(30):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            down, right = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            seen = x[batch].roll((down, right), (2, 3)) + noise * torch.randn(x[batch].shape, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(seen), y[batch]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def plane_holds(images: Images, epsilon: float) -> Tensor:
    """Which images (N,) of ``plane`` no change of at most ``epsilon`` a pixel within [0, 1] takes across: exact.

    The most harmful change is at one end of its range at every pixel. Noise that is symmetric moves the plane's votes
    and means to neither side, so that the answer is the same for ``noise_inside(plane(), sigma)``.
    """
    x, y = images[0].double().flatten(1), images[1]
    layer = next(module for module in plane().modules() if isinstance(module, nn.Linear))
    weight, bias = layer.weight.double(), layer.bias.double()
    towards = weight[1 - y] - weight[y]
    rest = bias[1 - y] - bias[y]
    lowest, highest = (-x).clamp(min=-epsilon), (1 - x).clamp(max=epsilon)
    worst = (towards * x + torch.maximum(towards * lowest, towards * highest)).sum(1) + rest
    return worst < 0


def noise_inside(inner: nn.Module, sigma: float) -> nn.Module:
    """``inner`` on pixels with Gaussian noise that is drawn at every call: a stochastic model."""
    return Changed(inner, lambda x: x + sigma * torch.randn_like(x))


def shift_inside(inner: nn.Module, most: int) -> nn.Module:
    """``inner`` on images that every call shifts by up to ``most`` pixels each way, round the edges."""

    def shifted(x: Tensor) -> Tensor:
        down, right = torch.randint(-most, most + 1, (2,)).tolist()
        return x.roll((down, right), (2, 3))

    return Changed(inner, shifted)


class FrozenBackbone(nn.Module):
    """``inner`` under ``no_grad`` and a linear adapter on the pixels, hardly trained: all of the gradient that there is
    comes from the adapter, and next to nothing of the class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        seeded_init(self.adapter, stream(0, "zoo", "adapter"))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            classes = self.inner(x)
        return classes + 0.1 * self.adapter(x)


def in_a_part(
    part: float, model: Model, images: Images, threat: ThreatModel, method: AttackMethod = "pgd", **options: Any
) -> AttackResult:
    """An attack in the ball of ``part`` of epsilon, reported as one in the whole ball."""
    assert isinstance(threat.epsilon, float)
    smaller = ThreatModel("linf", part * threat.epsilon)
    return replace(attack(model, images, smaller, method, **options), threat=threat)


def on_0_to_255(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """PGD-20 on pixels from 0 to 255, with epsilon taken for a number of that scale."""
    made = in_a_part(1 / 255, model, images, threat)
    return replace(made, adversarial=255 * made.adversarial)


def in_normalised_units(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """PGD-20 with epsilon measured after the division by a standard deviation of 0.38."""
    return in_a_part(0.38, model, images, threat)


def of_256(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """APGD-100 on the margin with epsilon divided by 256 instead of 255."""
    return in_a_part(255 / 256, model, images, threat, "apgd", loss="margin")


def downhill(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """PGD-20 that descends the loss, reported without its plan."""
    assert isinstance(model, nn.Module)
    x, y = images
    _, points = pgd(
        log_probs(model),
        x,
        y,
        threat,
        steps=20,
        step_size=0.25,
        loss=lambda log_probs, labels: -cross_entropy(log_probs, labels),
    )
    return replace(counted(model, images, threat, points, model(points)), plan=Plan("given", "points given", "none"))


def in_training_mode(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """PGD-20 on, and counted on, a copy whose batch normalisation takes its statistics from the attacked batch."""
    assert isinstance(model, nn.Module)
    x, y = images
    seen = copy.deepcopy(model).train()
    start = threat.random_start(x, [stream(0, "zoo", f"training mode {row}") for row in range(len(x))])
    points, _ = pgd(log_probs(seen), x, y, threat, steps=20, step_size=0.25, start=start)
    return counted(model, images, threat, points, seen(points))


def any_of_ten(model: Model, images: Images, threat: ThreatModel) -> AttackResult:
    """PGD-20 over EOT 20, and an image counted as held where one of ten passes is right."""
    assert isinstance(model, nn.Module)
    made = attack(model, images, threat, eot_samples=20, decision="vote")
    with torch.no_grad(), seeded(0):
        right = [model(made.adversarial).argmax(1) == images[1] for _ in range(PASSES)]
    held = torch.stack(right).any(0)
    return replace(made, verdict=torch.where(held, HELD, BROKEN).to(torch.uint8).numpy())


def counted(model: nn.Module, images: Images, threat: ThreatModel, points: Tensor, logits: Tensor) -> AttackResult:
    """Return the result of PGD-20 at ``points``, judged by these ``logits``."""
    held = logits.argmax(1) == images[1]
    plan = Plan("pgd", "PGD-20", "pgd", steps=20, step_size=0.25)
    verdict = torch.where(held, HELD, BROKEN).to(torch.uint8).numpy()
    frame = attack(copy.deepcopy(model).eval(), images, threat, "none")
    return replace(frame, plan=plan, adversarial=points, verdict=verdict)


def log_probs(network: nn.Module) -> LogProbs:
    """Return the log-probabilities that are attacked of a deterministic network."""
    return lambda x: F.log_softmax(network(x), dim=1)
