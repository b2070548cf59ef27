"""What an evaluation gives: one attacker's or one suite's points and their verdicts."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.attacks.threat import ThreatModel
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED
from rush.statistics import Interval, share_interval


@dataclass(frozen=True)
class AttackResult:
    """One attacker's points and their verdicts on N images; of a suite the worst case, image by image.

    adversarial: float32 (N, C, H, W), of a suite the point that broke the image, else the most harmful one; verdict
    uint8 (N,); challenger int64 (N,): the class the label was tried against; counts int64 (N, K): judging votes; votes
    int64 (N,): all votes the verdicts took; linf, l2, l1: float64 (N,) sizes of the change; passes (N,): forward and
    backward passes spent on the attack, forward_passes (N,): those without backward; attacker (N,): which plan of the
    suite made the point, 0 without one; right: float64 (N,), share of judging votes for the label; seconds (N,).
    level: bound on the probability that a verdict on the image is false, over all verdicts that were given on it.
    single: a random model that is used with one draw, see ``robust_accuracy``.
    """

    plan: Plan | Suite
    threat: ThreatModel
    adversarial: Tensor
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    verdict: NDArray[np.uint8]
    challenger: NDArray[np.int64]
    counts: NDArray[np.int64]
    votes: NDArray[np.int64]
    linf: NDArray[np.float64]
    l2: NDArray[np.float64]
    l1: NDArray[np.float64]
    passes: NDArray[np.float64]
    forward_passes: NDArray[np.float64]
    attacker: NDArray[np.int64]
    seconds: NDArray[np.float64]
    level: float
    single: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def suite(self) -> str | None:
        """Name and version of the suite, None for a single attacker."""
        return self.plan.version if isinstance(self.plan, Suite) else None

    @property
    def broken(self) -> NDArray[np.bool_]:
        return self.verdict == BROKEN

    @property
    def held(self) -> NDArray[np.bool_]:
        return self.verdict == HELD

    @property
    def undecided(self) -> NDArray[np.bool_]:
        return self.verdict == UNDECIDED

    @property
    def right(self) -> NDArray[np.float64]:
        """Share (N,) of the judging votes that are for the label."""
        return self.counts[np.arange(len(self)), self.labels] / self.counts.sum(1)

    @property
    def robust_accuracy(self) -> float:
        """1 - share broken: what the attack leaves, undecided images counted for the model.

        With ``single`` the mean probability that one draw of the model is right at the attacked point, estimated
        without bias by the judging votes.
        """
        return float(self.right.mean()) if self.single else 1 - float(self.broken.mean())

    @property
    def robust_accuracy_lower(self) -> float:
        """Share held: undecided images counted against the model. With ``single`` the same as ``robust_accuracy``."""
        return self.robust_accuracy if self.single else float(self.held.mean())

    @property
    def interval(self) -> Interval:
        """``robust_accuracy`` with its 95 % interval over images, Clopper-Pearson.

        With ``single`` that of as many right images: among all variables within [0, 1] of one mean, those that are
        either 0 or 1 vary most.
        """
        return share_interval(round(self.robust_accuracy * len(self)), len(self))

    @property
    def interval_lower(self) -> Interval:
        """``robust_accuracy_lower`` with its 95 % interval."""
        return share_interval(round(self.robust_accuracy_lower * len(self)), len(self))

    @property
    def budget(self) -> dict[str, float]:
        """Passes through the base network, on average an image: of the attack with and without backward, and the
        verdicts' votes."""
        return {
            "passes_per_image": float(self.passes.mean()),
            "forward_passes_per_image": float(self.forward_passes.mean()),
            "votes_per_image": float(self.votes.mean()),
        }

    def select(self, rows: list[int]) -> "AttackResult":
        """The results of the images at these positions."""
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in (*ARRAYS, "adversarial")}
        return self._like(self.threat.select(rows), tuple(self.ids[row] for row in rows), **chosen)

    def _like(self, threat: ThreatModel, ids: tuple[str, ...], **arrays: Any) -> "AttackResult":
        return AttackResult(plan=self.plan, threat=threat, ids=ids, level=self.level, single=self.single, **arrays)


ARRAYS = tuple(
    field.name
    for field in fields(AttackResult)
    if field.name not in ("plan", "threat", "adversarial", "ids", "level", "single")
)


def join_results(parts: list[AttackResult], threat: ThreatModel) -> AttackResult:
    """One result of several groups of one attacker, in their order."""
    first = parts[0]
    return AttackResult(
        plan=first.plan,
        threat=threat,
        adversarial=torch.cat([part.adversarial for part in parts]),
        ids=tuple(own for part in parts for own in part.ids),
        level=first.level,
        single=first.single,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS},
    )
