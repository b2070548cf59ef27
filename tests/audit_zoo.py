"""Small models and evaluations of them, honest and flattering, that the audit must tell apart.

Models are trained once per session, in some seconds, and always to the same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.auditing.audit import AuditReport, audit
from rush.auditing.surrogates import Changed
from rush.choices import AuditVerdict, Decision
from rush.data.sources import load_images
from rush.evaluation.model import Model
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import SmallEncoder
from rush.models.heads import linear_head
from rush.runtime.randomness import seeded_init, stream

WIDTH = 4  # about 60,000 forward and backward passes a second on one thread


Images: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Entry:
    """One evaluation of one model, and the report that the audit must give.

    Attributes:
        evaluation: a plan or suite, None for the default, or a function of (model, images, threat) that gives a result.
        first: the findings of which one must be the first that failed, more than one only where two causes are equally
            right; empty where none may fail.
        undecided: whether the audit must leave it at that. Else the verdict follows from ``first``.
        decision: as ``rush.audit`` takes it, and so is ``surrogate``.
    """

    name: str
    model: Callable[[], Model]
    images: Images
    threat: ThreatModel
    evaluation: Plan | Suite | Callable[[Model, Images, ThreatModel], AttackResult] | None = None
    first: tuple[str, ...] = ()
    undecided: bool = False
    decision: Decision | None = None
    surrogate: Callable[[], nn.Module] | None = None

    @property
    def expected(self) -> AuditVerdict:
        if self.undecided:
            return "undecided"
        return "overestimated" if self.first else "holds"


def audited(entry: Entry, seed: int = 0) -> AuditReport:
    """Return the audit of one entry."""
    model, made = entry.model(), entry.evaluation
    evaluation = made if made is None or isinstance(made, Plan | Suite) else made(model, entry.images, entry.threat)
    surrogate = None if entry.surrogate is None else entry.surrogate()
    return audit(model, entry.images, entry.threat, evaluation, decision=entry.decision, surrogate=surrogate, seed=seed)


def assert_told_apart(entry: Entry, report: AuditReport) -> None:
    """Assert that the report has the verdict of the entry and one of its first findings."""
    assert report.verdict == entry.expected, str(report)
    first = report.failed[0] if report.failed else None
    assert first in (entry.first or (None,)), str(report)


def linf(epsilon: float) -> ThreatModel:
    return ThreatModel("linf", epsilon)


def digits(number: int, split: str = "test") -> Images:
    """The first ``number`` digits: images (N, 1, 8, 8) in [0, 1] and labels."""
    images = load_images("digits", split=split)
    assert images.labels is not None
    return images.pixels()[:number], images.labels[:number]


@cache
def plain_network() -> nn.Module:
    """Trained on the images as they are: 99 % right, 34 % under PGD-20 at epsilon 0.1."""
    return trained(10, width=2 * WIDTH)


@cache
def robust_network() -> nn.Module:
    """Trained on PGD points of epsilon 0.1: 87 % right under attack at that epsilon."""
    return trained(30, pgd_epsilon=0.1)


@cache
def noisy_network() -> nn.Module:
    """Trained under Gaussian noise of 0.25."""
    return trained(20, noise=0.25)


def trained(epochs: int, *, width: int = WIDTH, noise: float = 0.0, pgd_epsilon: float = 0.0) -> nn.Module:
    """A small digits network in evaluation mode, trained plainly, with Gaussian noise or on PGD points (4 steps)."""
    generator = stream(0, "zoo", f"{noise} {pgd_epsilon}")
    encoder = SmallEncoder(width=width)
    network = Classifier(Normalize((0.3,), (0.38,)), encoder, linear_head(encoder.features, 10))
    seeded_init(network, generator).train()
    x, y = digits(10_000, "train")
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(128):
            points = _attacked(network, x[batch], y[batch], pgd_epsilon, generator) if pgd_epsilon else x[batch]
            points = points + noise * torch.randn(points.shape, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(points), y[batch]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def _attacked(network: nn.Module, x: Tensor, y: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    start = x + (torch.rand(x.shape, generator=generator) * 2 - 1) * epsilon
    network.eval()
    points, _ = pgd(
        lambda z: F.log_softmax(network(z), 1), x, y, ThreatModel("linf", epsilon), steps=4, step_size=0.5, start=start
    )
    network.train()
    return points


class Scaled(nn.Module):
    """``inner`` with logits times ``factor``: the same classes, a softmax that saturates in float32."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


def quantised(inner: nn.Module, levels: int) -> nn.Module:
    """``inner`` on pixels rounded to ``levels`` + 1 values: no gradient passes."""
    return Changed(inner, lambda x: (x * levels).round() / levels)
