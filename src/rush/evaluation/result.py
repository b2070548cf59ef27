"""The result of an evaluation: the points of one attacker or one suite, with their verdicts."""

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rush.attacks.threat import ThreatModel
from rush.choices import VERDICTS, Norm
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED
from rush.runtime.extras import axes_or_new, data_frame
from rush.statistics import Interval, share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class AttackResult:
    """The points of one attacker on N images, with their verdicts. For a suite, they are the worst case of each image.

    Attributes:
        plan: the attacker or the suite.
        threat: the threat model.
        adversarial: float32 (N, C, H, W). For a suite, it is the point that broke the image, else the most harmful one.
        labels: int64 (N,).
        ids: one id per image.
        verdict: uint8 (N,), index into ``choices.VERDICTS``.
        challenger: int64 (N,), class that the label was tested against.
        counts: int64 (N, K), judging votes.
        votes: int64 (N,), all votes that the verdicts took.
        linf, l2, l1: float64 (N,), sizes of the change.
        passes: float64 (N,), forward and backward passes spent on the attack.
        forward_passes: float64 (N,), forward passes without backward.
        attacker: int64 (N,), position in the suite of the plan that made the point, 0 without a suite.
        seconds: float64 (N,), wall time.
        level: bound on the probability that a verdict on an image is false, over all verdicts given on it.
        single: whether the model is a stochastic one that is used with one draw, see ``robust_accuracy``.
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
        """Name and version of the suite, or None for a single attacker."""
        return self.plan.version if isinstance(self.plan, Suite) else None

    @property
    def broken(self) -> NDArray[np.bool_]:
        """Images (N,) whose point is shown to be misclassified."""
        return self.verdict == BROKEN

    @property
    def held(self) -> NDArray[np.bool_]:
        """Images (N,) whose point is shown to be classified correctly."""
        return self.verdict == HELD

    @property
    def undecided(self) -> NDArray[np.bool_]:
        """Images (N,) whose point reached the cap of votes without a verdict."""
        return self.verdict == UNDECIDED

    @property
    def right(self) -> NDArray[np.float64]:
        """Share (N,) of the judging votes that are for the label, float64."""
        return self.counts[np.arange(len(self)), self.labels] / self.counts.sum(1)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are not broken: undecided images count for the model.

        With ``single`` it is the mean probability that one draw of the model is right at the attacked point, estimated
        without bias by the judging votes.
        """
        return float(self.right.mean() if self.single else (~self.broken).mean())

    @property
    def robust_accuracy_lower(self) -> float:
        """Share of images that are held: undecided images count against the model.

        With ``single`` it is ``robust_accuracy``.
        """
        return self.robust_accuracy if self.single else float(self.held.mean())

    @property
    def interval(self) -> Interval:
        """``robust_accuracy`` with its 95 % Clopper-Pearson interval over images.

        With ``single`` it is the interval of that share of right images, which is wide enough: among all variables in
        [0, 1] of one mean, those that are either 0 or 1 vary most.
        """
        return share_interval(round(self.robust_accuracy * len(self)), len(self))

    @property
    def interval_lower(self) -> Interval:
        """``robust_accuracy_lower`` with its 95 % interval."""
        return share_interval(round(self.robust_accuracy_lower * len(self)), len(self))

    @property
    def budget(self) -> dict[str, float]:
        """Mean passes through the base network per image: the attack's with and without backward, and the votes."""
        return {
            "passes_per_image": float(self.passes.mean()),
            "forward_passes_per_image": float(self.forward_passes.mean()),
            "votes_per_image": float(self.votes.mean()),
        }

    def size(self, norm: Norm) -> NDArray[np.float64]:
        """Return the sizes (N,) of the change in ``norm``."""
        return {"linf": self.linf, "l2": self.l2, "l1": self.l1}[norm]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and text, shares as fractions with 95 % intervals.

        ``rush attack --json`` prints it.
        """
        return {
            "attacker": self.plan.label,
            "suite": self.suite,
            "norm": self.threat.norm,
            "epsilon": float(np.max(np.asarray(self.threat.epsilon))),
            "images": len(self),
            "broken": int(self.broken.sum()),
            "held": int(self.held.sum()),
            "undecided": int(self.undecided.sum()),
            "robust_accuracy": asdict(self.interval),
            "robust_accuracy_lower": asdict(self.interval_lower),
            "largest_change": {norm: float(self.size(norm).max()) for norm in get_args(Norm)},
            **self.budget,
            "seconds": float(self.seconds.sum()),
            "level": self.level,
        }

    def summary(self) -> str:
        """Return the figures as lines of text."""
        figures = self.to_dict()
        return "\n".join(
            (
                f"{figures['attacker']}, {figures['norm']} {figures['epsilon']:.4g}, {figures['images']:,} images",
                f"robust accuracy {self.interval}, held {self.interval_lower}, {figures['undecided']:,} undecided",
                f"{figures['passes_per_image']:,.0f} passes and {figures['votes_per_image']:,.0f} votes per image",
            )
        )

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per image.

        Its columns are id, label, verdict, challenger, right, votes, linf, l2, l1, passes and seconds.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        columns = {
            "id": self.ids,
            "label": self.labels,
            "verdict": np.array(VERDICTS)[self.verdict],
            **{name: getattr(self, name) for name in ("challenger", "right", "votes", "linf", "l2", "l1", "passes")},
            "seconds": self.seconds,
        }
        return data_frame(columns)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Plot how many images have which share of judging votes for the label, by verdict, and return the axes.

        Args:
            axes: axes of matplotlib, by default those of a new figure.
        """
        axes = axes_or_new(axes)
        shares = [self.right[self.verdict == verdict] for verdict in range(len(VERDICTS))]
        axes.hist(shares, bins=20, range=(0, 1), stacked=True, label=list(VERDICTS))
        axes.set(xlabel="share of judging votes for the label", ylabel="images")
        axes.legend()
        return axes

    def __repr__(self) -> str:
        what = f"{self.plan.label}, {self.threat.norm}, {len(self)} images"
        return f"AttackResult({what}: robust accuracy {self.robust_accuracy:.1%})"

    def select(self, rows: list[int]) -> "AttackResult":
        """Return the results of the images at these positions."""
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in (*ARRAYS, "adversarial")}
        return replace(self, threat=self.threat.select(rows), ids=tuple(self.ids[row] for row in rows), **chosen)


ARRAYS = tuple(
    field.name
    for field in fields(AttackResult)
    if field.name not in ("plan", "threat", "adversarial", "ids", "level", "single")
)


def join_results(parts: list[AttackResult], threat: ThreatModel) -> AttackResult:
    """Return one result of several groups of one attacker, in their order."""
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    ids = tuple(image_id for part in parts for image_id in part.ids)
    return replace(
        parts[0], threat=threat, adversarial=torch.cat([part.adversarial for part in parts]), ids=ids, **arrays
    )
