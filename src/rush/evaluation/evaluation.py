"""One evaluation: a model attacked on images within a threat model, and every returned point judged on fresh draws.

The chain of a point is ``run`` (groups of images, shared over processes and resumable), ``candidates`` (the attack, on
streams named "attack/...", and the choice among its points, on the stream "choice") and ``judge`` (the verdict, on
streams that hold the hash of the point).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from rush.attacks.gradient import seeded
from rush.attacks.losses import Loss, named_loss
from rush.attacks.threat import ORDERS, ThreatModel, norms
from rush.choices import Decision
from rush.data.checks import Images, LabelledPixels, check_class_indices, kind_of, labelled_pixels
from rush.errors import InputError, ModelError
from rush.evaluation.candidates import Candidates, attack_of, start_of
from rush.evaluation.groups import made_by, read_group, write_group
from rush.evaluation.model import Defender, Model, defend
from rush.evaluation.plans import CHOICE_VOTES, Plan, Suite, work
from rush.evaluation.result import AttackResult, join_results
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, Verdicts, VerdictSettings
from rush.runtime.distributed import gather_objects, rank, world_size
from rush.runtime.progress import Advance, Parts, no_progress, progress
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.inspection import check_logits

Attacker: TypeAlias = Plan | Suite

GROUP = 64  # images that are attacked and judged together: the unit of progress, of resuming and of sharing
CHOICE = "choice"  # stream of the votes that choose among candidates, the same for all attackers of an image


@dataclass(frozen=True)
class Evaluation:
    """A model under evaluation, the images, the changes allowed to them, and how the points are judged.

    Attributes:
        defender: the model under evaluation.
        images: N images with labels and ids.
        threat: the threat model, with one epsilon or N of them.
        settings: level, cap and seed of the verdicts. The seed also names the attack's streams.
    """

    defender: Defender
    images: LabelledPixels
    threat: ThreatModel
    settings: VerdictSettings

    @classmethod
    def of(
        cls,
        model: Model,
        images: Images,
        threat: ThreatModel,
        settings: VerdictSettings,
        decision: Decision | None = None,
        surrogate: nn.Module | None = None,
        declared: bool = True,
    ) -> "Evaluation":
        """Return the evaluation of a model after checking and inspecting everything that the caller gives.

        Args:
            model, images, threat, decision, surrogate: as for ``rush.attack``.
            declared: whether to refuse a stochastic model that is not declared to be one, and a model that is not a
                function of one image. An audit reports either as a finding.

        Raises:
            InputError: bad images, threat or decision.
            ModelError: an unusable model.
        """
        if not isinstance(threat, ThreatModel):
            raise InputError(f"threat must be a rush.ThreatModel(norm, epsilon), got {type(threat).__name__}")
        defender = defend(model, None, decision, surrogate)
        pixels = labelled_pixels(images, defender.num_classes or None, kind_of(model))
        if isinstance(model, SmoothedClassifier):
            model.check_shape(pixels.x.shape[1:])
        with seeded(0):  # a stochastic model draws in this check, too
            _check_outputs(defender, pixels, declared)
        if isinstance(threat.epsilon, Tensor) and threat.epsilon.shape != (len(pixels),):
            raise InputError(
                f"epsilon has shape {tuple(threat.epsilon.shape)}, expected one number or ({len(pixels)},)"
            )
        return cls(defender, pixels, threat, settings)

    def select(self, rows: list[int]) -> "Evaluation":
        """Return the evaluation of the images at these positions."""
        return replace(self, images=self.images.select(rows), threat=self.threat.select(rows))

    def groups(self) -> list[list[int]]:
        """Return the positions of the images, group by group."""
        total = len(self.images)
        return [list(range(first, min(first + GROUP, total))) for first in range(0, total, GROUP)]

    def check_reachable(self, plan: Attacker | None = None) -> None:
        """Raise InputError if no verdict on the points of ``plan`` can ever be given. A suite shares the level."""
        if self.defender.kind == "random":
            shares = len(plan.plans) if isinstance(plan, Suite) and not self.defender.single else 1
            self.settings.check_reachable(self.defender.decision, shares)

    def run(self, plan: Attacker, resume: Path | None = None) -> AttackResult:
        """Attack all images by ``plan`` and judge the points.

        The processes share the groups. Each returns the whole result, with the same bits as one process.

        Args:
            plan: one attacker, or a suite, whose worst case is returned.
            resume: folder of finished groups, which are read and not attacked again.

        Raises:
            InputError: the level of a verdict can never be reached.
            ModelError: the model turns out not to be one fixed function of one image.
            RunError: ``resume`` holds groups of a different evaluation.
        """
        self.check_reachable(plan)
        groups, settings = self.groups(), self.settings
        mine = range(rank(), len(groups), world_size())
        origin = "" if resume is None else made_by(settings, self.defender.fingerprint())
        results: dict[int, AttackResult] = {}
        broken = 0
        with progress(f"attack {plan.name}", sum(len(groups[number]) for number in mine)) as advance:
            for number in mine:
                group, started = self.select(groups[number]), time.perf_counter()
                file = None if resume is None else resume / f"{plan.name}-{number:04d}.npz"
                if file is not None and file.exists():
                    results[number] = read_group(
                        file, group.images, group.threat, plan, settings.level, self.defender.single, origin
                    )
                    broken += int(results[number].broken.sum())
                    advance(len(group.images), f"{broken} broken", done_earlier=True)
                    continue
                if isinstance(plan, Suite):
                    result = group._worst_case(plan)
                    advance(len(result))
                else:
                    result = group.judge(group.candidates(plan, advance=advance), plan)
                broken += int(result.broken.sum())
                advance(0, f"{broken} broken")
                seconds = (time.perf_counter() - started) / len(result)
                results[number] = replace(result, seconds=np.full(len(result), seconds))
                self.defender.recheck()
                if file is not None:
                    write_group(file, results[number], group.images, origin)
        shared = {number: result for shard in gather_objects(results) for number, result in shard.items()}
        return join_results([shared[number] for number in range(len(groups))], self.threat)

    def run_all(self, plans: Sequence[Attacker], resume: Path | None = None) -> Iterator[AttackResult]:
        """Yield ``run`` of each plan, whose progress names its number and the time left for all."""
        rungs = Parts("rung", [work(plan, self.defender.kind) for plan in plans])
        for plan in plans:
            with rungs.next():
                result = self.run(plan, resume)
            yield result

    def candidates(
        self,
        plan: Plan,
        best: Tensor | None = None,
        in_suite: bool = False,
        advance: Advance = no_progress,
    ) -> Candidates:
        """Attack the images by ``plan`` and return the most harmful point of each.

        Args:
            best: points (N, C, H, W) where a plan with start "best" begins.
            in_suite: whether to measure the choice margin of a single point, too.
            advance: called with the number of images whenever some have been attacked.
        """
        images, seed, device = self.images, self.settings.seed, self.defender.execution.device
        draws = max(1, plan.eot_samples)
        passes = [0, 0]  # passes of all images: without and with a gradient
        if plan.method == "none":
            advance(len(images))
            return self._most_harmful([images.x], passes, in_suite)
        rows_of_tile = self.defender.execution.rows(images.x.shape[1:])
        batches: list[list[Tensor]] = []
        first = 0
        while first < len(images):
            size = _batch_size(len(images) - first, rows_of_tile // draws)
            rows = list(range(first, min(first + size, len(images))))
            padded = rows + [rows[-1]] * (size - len(rows))
            first += len(rows)
            batch, threat = images.select(padded), self.threat.select(padded)
            x, y = batch.x.to(device), batch.y.to(device)
            ranking = self.defender.ranking(batch, seed).to(device) if plan.targets else None
            points: list[Tensor] = []
            for name, aim in _loops(plan, ranking):
                loss = _counted(named_loss(plan.loss, self.defender.num_classes, aim), passes, len(rows) * draws)
                generators = [stream(seed, f"{name}/start", image_id, device=device) for image_id in batch.ids]
                seen = self.defender.log_probs(plan, x, batch.ids, seed, name)
                start = start_of(plan, x, None if best is None else best[padded], threat, generators)
                made = attack_of(plan, threat, loss, start, generators)(seen, x, y)
                points += made if isinstance(made, tuple) else [made]
            batches.append([point[: len(rows)].cpu() for point in points])
            advance(len(rows))
        points = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        if self.defender.eight_bit:
            points = [self.threat.on_grid(each, images.x) for each in points]
        return self._most_harmful(points, passes, in_suite)

    def judge(self, candidates: Candidates, plan: Plan, judged: bool = True) -> AttackResult:
        """Return the candidates of ``plan`` with their verdicts. All are undecided without ``judged``."""
        images, adversarial = self.images, candidates.adversarial
        if judged:
            verdicts = self.defender.judge(replace(images, x=adversarial), plan.name, self.settings)
        else:
            verdicts = Verdicts.undecided(len(images), self.defender.num_classes)
        return AttackResult(
            plan=plan,
            threat=self.threat,
            adversarial=adversarial,
            labels=images.y.numpy(),
            ids=images.ids,
            **vars(verdicts),
            **{norm: norms(adversarial, images.x, norm).numpy() for norm in ORDERS},
            passes=np.full(len(images), candidates.passes),
            forward_passes=np.full(len(images), candidates.forward_passes),
            attacker=np.zeros(len(images), np.int64),
            seconds=np.zeros(len(images)),
            level=self.settings.level,
            single=self.defender.single,
        )

    def _most_harmful(self, points: list[Tensor], passes: list[int], always: bool) -> Candidates:
        """Choose for each image the point of largest choice margin. Measure a single one only if ``always``."""
        forward, backward = (total / len(self.images) for total in passes)
        if len(points) == 1 and not always:
            return Candidates.unmeasured(points[0], backward, forward)
        seed, images = self.settings.seed, self.images
        margins = torch.stack([self.defender.choice_margin(replace(images, x=x), CHOICE, seed) for x in points])
        chosen, rows = margins.argmax(0), torch.arange(len(images))
        spent = len(points) * (CHOICE_VOTES if self.defender.kind == "random" else 1)
        return Candidates(torch.stack(points)[chosen, rows], margins[chosen, rows], backward, forward + spent)

    def _worst_case(self, suite: Suite) -> AttackResult:
        """Run the suite's attackers one after the other on one group. An image drops out when it is broken.

        A random model that is used with one draw has no final verdict. Its images stay, and the most harmful point of
        each is judged at the end.
        """
        single, level = self.defender.single, self.settings.level
        each = replace(self, settings=replace(self.settings, level=level / len(suite.plans)))
        worst: AttackResult | None = None
        margins = torch.full((len(self.images),), -torch.inf)
        for number, plan in enumerate(suite.plans):
            rows = list(range(len(self.images)))
            if worst is not None and not single:
                rows = np.flatnonzero(worst.verdict != BROKEN).tolist()
            if not rows:
                break
            left = each.select(rows)
            candidates = left.candidates(plan, None if worst is None else worst.adversarial[rows], in_suite=True)
            result = left.judge(candidates, plan, judged=not single)
            result = replace(result, plan=suite, level=level, attacker=np.full(len(rows), number))
            more_harmful = candidates.choice_margin > margins[rows]
            worst = result if worst is None else _with_worse(worst, result, rows, more_harmful)
            margins[rows] = torch.maximum(margins[rows], candidates.choice_margin)
        assert worst is not None
        if not single:
            return worst
        final = self.judge(Candidates(worst.adversarial, margins), suite.plans[0])
        spent = {name: getattr(worst, name) for name in ("passes", "forward_passes", "attacker")}
        return replace(final, plan=suite, **spent)


def _check_outputs(defender: Defender, pixels: LabelledPixels, declared: bool) -> None:
    """Check the model's logits on the first image, which give a module's number of classes, and inspect the model."""
    with torch.no_grad():
        logits = check_logits(defender.execution.logits(defender.model, pixels.x[:1]), 1, defender.num_classes or None)
    defender.num_classes = logits.shape[1]
    check_class_indices(pixels.y, len(pixels), defender.num_classes)
    try:
        defender.inspect(pixels.x, declared)
    except ModelError:
        if declared:
            raise  # an audit reports it as a finding


def _batch_size(images: int, most: int) -> int:
    """Return the size of the next batch: the least power of two that holds all ``images``, at most ``most``."""
    return min(max(1, min(most, GROUP)), 1 << (images - 1).bit_length())


def _loops(plan: Plan, ranking: Tensor | None) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the streams' name and the target classes, (B,) or None, of each of the ``plan.runs`` loops of an attack.

    Args:
        ranking: (B, K - 1), classes other than the label, the most probable one first, None for an untargeted plan.
    """
    for restart in range(plan.restarts):
        name = f"attack/{plan.name}/{restart}"
        if ranking is None:
            yield name, None
        else:
            yield from ((f"{name}/{rank_aimed_at}", ranking[:, rank_aimed_at - 1]) for rank_aimed_at in plan.targets)


def _counted(loss: Loss, passes: list[int], rows: int) -> Loss:
    """Return ``loss`` that adds ``rows`` to ``passes[0]``, or with gradients on to ``passes[1]``, at every call.

    An attack computes one loss per pass through the model. Counting losses does not change what the attack sees, and
    counts neither padding nor what a compiled, folded or replayed forward makes of a pass.
    """

    def counted(log_probs: Tensor, y: Tensor) -> Tensor:
        passes[torch.is_grad_enabled()] += rows
        return loss(log_probs, y)

    return counted


def _with_worse(worst: AttackResult, result: AttackResult, rows: list[int], more_harmful: Tensor) -> AttackResult:
    """Return ``worst`` with what the next attacker's ``result`` changes at ``rows``.

    Broken images take the points of ``result``, and so do the others whose point in it is ``more_harmful``. Costs add
    up. An image is held only if every verdict on it is.
    """
    at, after = np.array(rows), result.verdict
    taken = (after == BROKEN) | (more_harmful.numpy() & (after != BROKEN))
    changed = {name: getattr(worst, name).copy() for name in ("challenger", "counts", "linf", "l2", "l1", "attacker")}
    for name, array in changed.items():
        array[at[taken]] = getattr(result, name)[taken]
    for name in ("votes", "passes", "forward_passes"):
        changed[name] = getattr(worst, name).copy()
        changed[name][at] += getattr(result, name)
    both_held = (worst.verdict[at] == HELD) & (after == HELD)
    changed["verdict"] = worst.verdict.copy()
    changed["verdict"][at] = np.where(after == BROKEN, BROKEN, np.where(both_held, HELD, UNDECIDED))
    adversarial = worst.adversarial.clone()
    adversarial[at[taken]] = result.adversarial[taken]
    return replace(worst, adversarial=adversarial, **changed)
