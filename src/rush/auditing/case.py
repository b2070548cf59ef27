"""An evaluation under audit: the values that probes measure, and the attacks that they run."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs
from rush.attacks.losses import Loss, named_loss
from rush.attacks.threat import ThreatModel, norms
from rush.auditing.surrogates import attacked_through
from rush.certification.certificates import Certificates
from rush.data.checks import LabelledPixels
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Defender, Model
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import Verdicts, VerdictSettings
from rush.runtime.randomness import stream

PROBED = 64  # images, drawn by the seed, that probes measure
CLOSE = 32  # held images that gradients are measured on
FEW_IMAGES = 8  # images that a property of the model is tested on
VERDICTS = 14  # per image at most, each at 1/14 of the level: on the evaluation's point, by the suite and by probes
STEPPING = ("fgsm", "mifgsm", "pgd")  # methods with steps of a fixed length

_CLIMBING = (*STEPPING, "apgd", "fmn")
_STRONGEST = ("pgd", "apgd", "mifgsm")


@dataclass
class Case:
    """An evaluation under audit, and the attacks that were run on the images that it held.

    Attributes:
        evaluation: points and verdicts under audit.
        judging: how points are judged, with the level of each verdict (``VERDICTS``).
        training_layers: names of the layers that were in training mode.
        rejudged: verdicts of judging these points once more, None where the audit ran the evaluation itself.
        results: results of probes on some of the held images, within the threat model.
    """

    model: Model
    defender: Defender
    pixels: LabelledPixels
    threat: ThreatModel
    evaluation: AttackResult
    judging: VerdictSettings
    training_layers: tuple[str, ...] = ()
    surrogate: nn.Module | None = None
    certificates: Certificates | None = None
    rejudged: Verdicts | None = None
    results: list[AttackResult] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.judging.seed

    @cached_property
    def plan(self) -> Plan | None:
        """The evaluation's attack, or the costliest untargeted one of a suite.

        It is None where points were made elsewhere. An attack without draws on a stochastic model that has a base
        network has attacked that network.
        """
        plan = self.evaluation.plan
        if isinstance(plan, Suite):
            plan = _typical(plan)
        if plan.method == "none":
            return None
        blind = self.defender.transferable and plan.eot_samples == 0
        return replace(plan, gradient="transfer") if blind else plan

    @property
    def climbing(self) -> Plan | None:
        """The evaluation's attack where it climbs a gradient."""
        return self.plan if self.plan is not None and self.plan.method in _CLIMBING else None

    @property
    def unattacked(self) -> bool:
        """Whether the evaluation's points are the images themselves, without a known attack."""
        return self.plan is None and bool((self.evaluation.adversarial == self.pixels.x).all())

    @property
    def reach(self) -> float | None:
        """Length of all steps of the evaluation's attack in epsilon, or None where it has none of fixed length."""
        if self.plan is None or self.plan.method not in STEPPING:
            return None
        return 1.0 if self.plan.method == "fgsm" else self.plan.steps * self.plan.step_size

    @property
    def sizes(self) -> NDArray[np.float64]:
        """Size of each change over its epsilon, (N,)."""
        changes = norms(self.evaluation.adversarial, self.pixels.x, self.threat.norm).numpy()
        return changes / np.asarray(self.threat.epsilon, dtype=np.float64)

    @cached_property
    def probed(self) -> list[int]:
        """Positions of the images that probes measure: chosen by the seed, not by the result."""
        order = torch.randperm(len(self.pixels), generator=stream(self.seed, "audit/probed"))
        return sorted(order[:PROBED].tolist())

    @cached_property
    def held(self) -> list[int]:
        """Positions of the probed images that the evaluation did not break."""
        return [row for row in self.probed if not self.evaluation.broken[row]]

    @cached_property
    def points(self) -> Tensor:
        """The evaluation's points, moved into [0, 1] and the ball where they were outside."""
        return self.threat.project(self.evaluation.adversarial.clamp(0, 1), self.pixels.x)

    def attack(self, plan: Plan | Suite, rows: list[int], climbed: Defender | None = None) -> AttackResult:
        """Return the result of ``plan`` on the images at ``rows`` and keep it in ``results``.

        Args:
            climbed: defender whose gradient is attacked instead of the model's. The model still chooses and judges.

        Random: separate streams of the audit, named after the plan.
        """
        named: Plan | Suite = replace(plan, name=f"audit-{plan.name}")
        if isinstance(plan, Suite):
            named = replace(plan, plans=tuple(replace(each, name=f"audit-suite-{each.name}") for each in plan.plans))
        defender = self.defender if climbed is None else attacked_through(self.defender, climbed)
        result = Evaluation(defender, self.pixels, self.threat, self.judging).select(rows).run(named)
        self.results.append(result)
        return result

    def judge_again(self, result: AttackResult, rows: list[int]) -> AttackResult:
        """Judge the points of ``result`` at ``rows`` on separate draws of the audit, and keep this in ``results``."""
        images = self.pixels.select(rows)
        x = self.threat.select(rows).project(result.adversarial[rows].clamp(0, 1), images.x)
        verdicts = self.defender.judge(replace(images, x=x), "audit-suite", self.judging)
        judged = replace(result.select(rows), adversarial=x, level=self.judging.level, **vars(verdicts))
        self.results.append(judged)
        return judged

    def view(self, plan: Plan, rows: list[int], name: str) -> tuple[LogProbs, Tensor, Tensor]:
        """Return the log-probabilities that ``plan`` attacks, and the images at ``rows`` with labels, on the device."""
        images, device = self.pixels.select(rows), self.defender.execution.device
        x = images.x.to(device)
        return self.defender.log_probs(plan, x, images.ids, self.seed, f"audit/{name}"), x, images.y.to(device)

    def views(self, plan: Plan, rows: list[int], name: str) -> Iterator[tuple[list[int], LogProbs, Tensor, Tensor]]:
        """Yield parts of ``rows`` that fill a tile with the draws of ``plan``, as attacks do, and each ``view``."""
        size = max(1, self.defender.execution.rows(self.pixels.x.shape[1:]) // max(1, plan.eot_samples))
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield part, *self.view(plan, part, name)

    def loss(self, plan: Plan, rows: list[int]) -> Loss:
        """Return the loss of ``plan`` on the images at ``rows``. For a targeted plan it is that of the first target."""
        if not plan.targets:
            return named_loss(plan.loss, self.defender.num_classes)
        ranks = self.defender.ranking(self.pixels.select(rows), self.seed)
        targets = ranks[:, plan.targets[0] - 1].to(self.defender.execution.device)
        return named_loss(plan.loss, self.defender.num_classes, targets)


def _typical(suite: Suite) -> Plan:
    """Return the costliest untargeted ascent from a random start, or the costliest attack of a suite without one."""
    climbing = [
        plan for plan in suite.plans if plan.method in _STRONGEST and not plan.targets and plan.start == "random"
    ]
    return max(climbing or suite.plans, key=lambda plan: plan.passes_per_image)
