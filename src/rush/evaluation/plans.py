"""Attackers as data: one attacker with its budget is a plan, several in a fixed order are a suite.

The fields of ``Plan`` and ``Suite`` and their order are part of the files of unfinished evaluations, see
``evaluation.groups``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rush.attacks.losses import LossName
from rush.choices import BLOCK, AttackMethod, Gradient, Start

Kind = Literal["plain", "random"]


@dataclass(frozen=True)
class Plan:
    """One attacker with its budget.

    Attributes:
        name: names the plan in files and streams.
        label: name that a reader is shown.
        method: the attack.
        gradient: how a random model is differentiated: with "fresh" noise at every call, with noise "frozen" before the
            loop, or by "transfer", through the base network without noise.
        eot_samples: noise draws per gradient, or per query of Square and random search, 0 where there is no noise.
        steps: number of steps, of queries (Square) or of draws (random search).
        step_size: share of epsilon (MI-FGSM and PGD).
        restarts: number of loops, each from its own start.
        loss: loss that is maximized.
        targets: ranks of the target classes, one after the other. Rank 1 is the most probable class other than the
            label. Empty for an untargeted attack.
        start: a random point of the ball, the image ("clean"), or the most harmful point of the suite so far ("best").
    """

    name: str
    label: str
    method: AttackMethod
    gradient: Gradient = "fresh"
    eot_samples: int = 0
    steps: int = 0
    step_size: float = 0.0
    restarts: int = 1
    loss: LossName = "cross-entropy"
    targets: tuple[int, ...] = ()
    start: Start = "random"

    @property
    def runs(self) -> int:
        """Number of times that the attack's loop is run."""
        return self.restarts * max(1, len(self.targets))

    @property
    def passes_per_image(self) -> int:
        """Forward and backward passes through the base network per image, without passes that take no gradient."""
        calls = {"none": 0, "fgsm": 1, "square": 0, "random": 0}.get(self.method, self.steps)
        return self.runs * max(1, self.eot_samples) * calls

    @property
    def queries_per_image(self) -> int:
        """Most passes without a gradient per image: queries of gradient-free attackers, and evaluations of points."""
        calls = {"none": 0, "square": self.steps, "random": self.steps, "apgd": self.steps}.get(self.method, 1)
        return self.runs * max(1, self.eot_samples) * calls


@dataclass(frozen=True)
class Suite:
    """Attackers in a fixed order, cheap ones first. An image drops out once a verdict shows it to be broken.

    The plans of a ``version`` never change.
    """

    name: str
    version: str
    label: str
    plans: tuple[Plan, ...]

    @property
    def passes_per_image(self) -> int:
        """Forward and backward passes of an image that nothing breaks."""
        return sum(plan.passes_per_image for plan in self.plans)

    @property
    def queries_per_image(self) -> int:
        """Most passes without a gradient of an image that nothing breaks."""
        return sum(plan.queries_per_image for plan in self.plans)


CHOICE_VOTES = BLOCK
"""Votes of a random model that choose among the points of one attacker, under the same noise for all of them."""
USUAL_VOTES = 400
"""Votes that a verdict on a random model takes on average, rounded from the runs in ``results/``."""
_SUITE_SHARE = 0.2  # rounded from the runs in ``results/``
_POINTS = 2  # most points that an attack returns from each of its loops
_BACKWARD = 3.0  # forward passes that cost as much as one forward and backward pass


def num_votes(plan: Plan | Suite, kind: Kind, per_verdict: int = USUAL_VOTES) -> int:
    """Return the number of votes, one pass each, that choose among the points of ``plan`` on an image and judge them.

    Args:
        kind: kind of the model. For a deterministic one, a single pass takes the place of votes.
        per_verdict: votes of each verdict.
    """
    plans = plan.plans if isinstance(plan, Suite) else (plan,)
    if kind == "plain":
        return sum(1 + _POINTS * each.runs for each in plans)
    return sum(per_verdict + CHOICE_VOTES * _POINTS * each.runs for each in plans)


def work(plan: Plan | Suite, kind: Kind) -> float:
    """Return the usual cost of an image, in forward passes."""
    most = _BACKWARD * plan.passes_per_image + plan.queries_per_image + num_votes(plan, kind)
    return most * usual_share(plan)


def usual_share(plan: Plan | Suite) -> float:
    """Return the share of the cost of ``plan`` that an image usually takes: most images drop out of a suite early."""
    return _SUITE_SHARE if isinstance(plan, Suite) else 1.0


# The protocol of the paper's abstract. What the paper leaves open is this library's choice (docs/attacks.md).
PAPER = Plan("paper", "the paper's protocol: PGD-20, one fresh noise draw a step", "pgd", "fresh", 1, 20, 0.25)
PAPER_NORM, PAPER_EPSILON = "linf", 8 / 255

WORST_CASE, WORST_CASE_VERSION = "worst-case", "worst-case-v1"
_MOST_TARGETS = 9


def worst_case(kind: Kind, num_classes: int, transferable: bool = True) -> Suite:
    """Return the parameter-free suite, version ``worst-case-v1``, for deterministic models ("plain") or random ones.

    Args:
        transferable: whether a random model has a base network without noise.
    """
    plans = tuple(_plain_plans(num_classes) if kind == "plain" else _random_plans(num_classes, transferable))
    label = f"worst case of {len(plans)} attackers ({WORST_CASE_VERSION})"
    return Suite(WORST_CASE, WORST_CASE_VERSION, label, plans)


def target_ranks(num_classes: int, most: int) -> tuple[int, ...]:
    """Return the ranks of the other classes, at most ``most`` of them."""
    return tuple(range(1, min(most, num_classes - 1) + 1))


def _plain_plans(num_classes: int) -> Iterator[Plan]:
    loss: LossName = "dlr" if num_classes >= 4 else "margin"
    yield Plan("clean", "no attack", "none")
    yield Plan("pgd", "PGD-20", "pgd", steps=20, step_size=0.25)
    yield Plan("apgd-ce", "APGD-100, cross-entropy", "apgd", steps=100)
    for rank in target_ranks(num_classes, _MOST_TARGETS):
        yield Plan(f"apgd-t{rank}", f"APGD-100, {loss}, target {rank}", "apgd", steps=100, loss=loss, targets=(rank,))
    yield Plan("fmn", "FMN-200, nearest point", "fmn", steps=200, loss="margin", start="clean")
    yield Plan("square", "Square, 5,000 queries", "square", steps=5000, loss="margin", start="clean")


def _random_plans(num_classes: int, transferable: bool) -> Iterator[Plan]:
    yield Plan("clean", "no attack", "none")
    if transferable:
        yield Plan("transfer", "noise-free base network, transferred", "apgd", "transfer", steps=20)
    yield Plan("pgd", "PGD-20, EOT 4", "pgd", "fresh", 4, 20, 0.25)
    yield Plan("apgd-ce", "APGD-50, cross-entropy of the mean, EOT 16", "apgd", "fresh", 16, 50)
    margin, ranks = partial(Plan, method="apgd", loss="margin"), target_ranks(num_classes, most=3)
    yield margin("apgd-margin", "APGD-50, margin of the mean, EOT 16", eot_samples=16, steps=50)
    yield margin("apgd-t", f"APGD-25, targets 1 to {len(ranks)}, EOT 16", eot_samples=16, steps=25, targets=ranks)
    yield Plan("square", "Square, 250 queries of 8 draws", "square", "fresh", 8, 250, loss="margin", start="clean")
    yield margin("refine", "APGD-16 from the best point, margin, EOT 64", eot_samples=64, steps=16, start="best")


def scaled(suite: Suite, factor: int) -> Suite:
    """Return ``suite`` with ``factor`` times its budget.

    For attacks that draw their start the restarts are multiplied, and for the others the steps.
    """
    plans = tuple(_scaled(suite.plans, factor))
    return Suite(
        f"{suite.name}-x{factor}", f"{suite.version}-x{factor}", f"{suite.label}, {factor} times the budget", plans
    )


def _scaled(plans: tuple[Plan, ...], factor: int) -> Iterator[Plan]:
    for plan in plans:
        if plan.method in ("none", "fgsm"):
            yield plan
        elif plan.method in ("square", "fmn", "random") or plan.start != "random":
            yield replace(plan, steps=plan.steps * factor)
        else:
            yield replace(plan, restarts=plan.restarts * factor)
