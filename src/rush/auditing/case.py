"""An evaluation under audit: what the probes look at, and the attacks that they run."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs
from rush.attacks.losses import Loss, named_loss
from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates
from rush.data.checks import LabelledPixels
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Defender, Model
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import Verdicts, VerdictSettings
from rush.runtime.randomness import stream

PROBED = 64  # images, drawn by the seed, that probes look at
CLOSE = 32  # of those the held ones that gradients are measured on
VERDICTS = 14  # given on an image at most, each with 1/14 of the level: on the evaluation's point, by suite and probes
_STRONGEST = ("pgd", "apgd", "mifgsm")


@dataclass
class Case:
    """An evaluation under audit, and the attacks that were run on what it held.

    evaluation: its points and verdicts; given: whether somebody else made them, then ``again`` are the verdicts of
    judging its points once more. training: layers that were in training mode. judging: with the level of each
    verdict, see ``VERDICTS``. found: results of probes on some of the held images, in the threat model.
    """

    model: Model
    defender: Defender
    pixels: LabelledPixels
    threat: ThreatModel
    evaluation: AttackResult
    again: Verdicts | None
    training: tuple[str, ...]
    surrogate: nn.Module | None
    certificates: Certificates | None
    judging: VerdictSettings
    found: list[AttackResult] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.judging.seed

    @cached_property
    def plan(self) -> Plan | None:
        """The evaluation's attack, of a suite its costliest untargeted one; None where points were made elsewhere.

        An attack without draws on a random model that has a base network has seen that network.
        """
        own = self.evaluation.plan
        plan = _typical(own) if isinstance(own, Suite) else own
        if plan.method == "none":
            return None
        blind = self.defender.transferable and plan.eot_samples == 0
        return replace(plan, gradient="transfer") if blind else plan

    @cached_property
    def probed(self) -> list[int]:
        """Positions of the images that probes look at: chosen by the seed, not by the result."""
        order = torch.randperm(len(self.pixels), generator=stream(self.seed, "audit/probed"))
        return sorted(order[:PROBED].tolist())

    @cached_property
    def held(self) -> list[int]:
        """Those among the probed that the evaluation did not break."""
        return [row for row in self.probed if not self.evaluation.broken[row]]

    @cached_property
    def points(self) -> Tensor:
        """The evaluation's points, moved into [0, 1] and the ball where they were outside."""
        return self.threat.project(self.evaluation.adversarial.clamp(0, 1), self.pixels.x)

    def batches(self, rows: list[int], draws: int) -> Iterator[list[int]]:
        """``rows`` in parts that fill a tile with ``draws`` noisy copies an image, as the attacks take them."""
        size = max(1, self.defender.execution.tile // max(1, draws))
        return (rows[first : first + size] for first in range(0, len(rows), size))

    def attack(self, plan: Plan | Suite, rows: list[int], defender: Defender | None = None) -> AttackResult:
        """The result of ``plan`` on the images at ``rows``, kept in ``found``; its draws are the audit's own.

        defender: another one than the case's that attackers see, judged as the case's is (``SeenThrough``).
        """
        named: Plan | Suite = replace(plan, name=f"audit-{plan.name}")
        if isinstance(plan, Suite):
            named = replace(plan, plans=tuple(replace(own, name=f"audit-suite-{own.name}") for own in plan.plans))
        attacked = Evaluation(defender or self.defender, self.pixels, self.threat, self.judging)
        result = attacked.select(rows).run(named)
        self.found.append(result)
        return result

    def seen(self, plan: Plan, rows: list[int], name: str) -> tuple[LogProbs, Tensor, Tensor]:
        """What the attacker of ``plan`` sees of the images at ``rows``, the images and their labels, on the device."""
        images, device = self.pixels.select(rows), self.defender.execution.device
        x = images.x.to(device)
        return self.defender.log_probs(plan, x, images.ids, self.seed, f"audit/{name}"), x, images.y.to(device)

    def loss(self, plan: Plan, rows: list[int]) -> Loss:
        """The loss of ``plan`` on the images at ``rows``, of a targeted one for its first target."""
        if not plan.targets:
            return named_loss(plan.loss, self.defender.num_classes)
        ranks = self.defender.ranking(self.pixels.select(rows), self.seed)
        targets = ranks[:, plan.targets[0] - 1].to(self.defender.execution.device)
        return named_loss(plan.loss, self.defender.num_classes, targets)


def _typical(suite: Suite) -> Plan:
    climbing = [
        plan for plan in suite.plans if plan.method in _STRONGEST and not plan.targets and plan.start == "random"
    ]
    return max(climbing or suite.plans, key=lambda plan: plan.passes_per_image)
