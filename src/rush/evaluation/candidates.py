"""From a plan to points: one attacker on one group of images, its candidates compared on draws of their own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rush.attacks.apgd import apgd
from rush.attacks.fgsm import fgsm
from rush.attacks.fmn import fmn
from rush.attacks.gradient import LogProbs, RandomLogProbs, is_random
from rush.attacks.losses import named_loss
from rush.attacks.mifgsm import mifgsm
from rush.attacks.pgd import pgd
from rush.attacks.random_search import random_search
from rush.attacks.square import square
from rush.attacks.threat import ThreatModel
from rush.data.checks import LabelledPixels
from rush.evaluation.model import CHOICE_VOTES, Defender
from rush.evaluation.plans import Plan
from rush.runtime.randomness import stream

GROUP = 64  # images that are attacked and judged together: the unit of progress, of resuming and of sharing
CHOICE = "choice"  # stream of the votes that choose among candidates, the same for all attackers of an image


@dataclass(frozen=True)
class Points:
    """Points (N, C, H, W) on the CPU; their ``harm`` (N,): margin on the choice's draws, minus infinity where nothing
    had to be chosen; passes of an image with and without backward."""

    adversarial: Tensor
    harm: Tensor
    passes: float
    forward_passes: float


def find_points(
    defender: Defender,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    seed: int,
    best: Tensor | None = None,
    in_suite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Points:
    """The most harmful of the attacker's candidates for each image of ``group``.

    best: points (N, C, H, W) where a plan with start "best" begins. in_suite: measure the harm also where there is one
    candidate alone, and let batches shrink with the group, as images leave it. Batches have one size, the last one
    padded with its last image, so that an image's point does not depend on how many there are.
    """
    if plan.method == "none":
        advance(len(group))
        return _measured(defender, group, [group.x], seed, in_suite, 0.0, 0.0)
    size = _batch_size(len(group), defender.execution.tile // max(1, plan.eot_samples), in_suite)
    found: list[list[Tensor]] = []
    counter = _Counter(max(1, plan.eot_samples))
    for first in range(0, len(group), size):
        members = list(range(first, min(first + size, len(group))))
        padded = members + [members[-1]] * (size - len(members))
        start = best[padded] if best is not None and plan.start == "best" else None
        counter.begin(len(members))
        candidates = _candidates(defender, group.select(padded), threat.select(padded), plan, seed, start, counter)
        found.append([points[: len(members)].cpu() for points in candidates])
        advance(len(members))
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return _measured(defender, group, joined, seed, in_suite, *counter.per_image())


def _batch_size(images: int, most: int, shrink: bool) -> int:
    """At most ``most`` and a whole group; with ``shrink`` no more than the power of two that holds all images."""
    size = max(1, min(most, GROUP))
    return min(size, 1 << (images - 1).bit_length()) if shrink else size


def _measured(
    defender: Defender,
    group: LabelledPixels,
    candidates: Sequence[Tensor],
    seed: int,
    always: bool,
    passes: float,
    forward_passes: float,
) -> Points:
    if len(candidates) == 1 and not always:
        return Points(candidates[0], torch.full((len(group),), -torch.inf), passes, forward_passes)
    harms = torch.stack(
        [defender.harm(LabelledPixels(points, group.y, group.ids), CHOICE, seed) for points in candidates]
    )
    chosen, rows = harms.argmax(0), torch.arange(len(group))
    spent = len(candidates) * (CHOICE_VOTES if defender.kind == "random" else 1)
    return Points(torch.stack(list(candidates))[chosen, rows], harms[chosen, rows], passes, forward_passes + spent)


def _candidates(
    defender: Defender,
    batch: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    seed: int,
    start: Tensor | None,
    counter: "_Counter",
) -> list[Tensor]:
    device = defender.execution.device
    x, y = batch.x.to(device), batch.y.to(device)
    aims: list[Tensor | None] = [None]
    if plan.targets:
        ranking = defender.ranking(batch, seed).to(device)
        aims = [ranking[:, rank - 1] for rank in plan.targets]
    found: list[Tensor] = []
    for restart in range(plan.restarts):
        for number, aim in enumerate(aims):
            name = f"attack/{plan.name}/{restart}" + (f"/{plan.targets[number]}" if plan.targets else "")
            generators = [stream(seed, f"{name}/start", own, device=device) for own in batch.ids]
            seen = counter.count(defender.log_probs(plan, x, batch.ids, seed, name))
            begin = _start(plan, x, start, threat, generators)
            found += _run(plan, seen, x, y, threat, begin, named_loss(plan.loss, defender.num_classes, aim), generators)
    return found


def _start(
    plan: Plan, x: Tensor, best: Tensor | None, threat: ThreatModel, generators: list[torch.Generator]
) -> Tensor | None:
    if plan.method in ("fgsm", "square", "random") or plan.start == "clean":
        return None
    if plan.start == "best" and best is not None:
        return best.to(x.device)
    return threat.random_start(x, generators)


def _run(
    plan: Plan,
    seen: LogProbs,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    start: Tensor | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    generators: list[torch.Generator],
) -> Iterator[Tensor]:
    if plan.method == "fgsm":
        yield fgsm(seen, x, y, threat, loss)
    elif plan.method in ("pgd", "mifgsm"):
        climb = pgd if plan.method == "pgd" else mifgsm
        yield from climb(seen, x, y, threat, steps=plan.steps, step_size=plan.step_size, start=start, loss=loss)
    elif plan.method == "apgd":
        yield from apgd(seen, x, y, threat, steps=plan.steps, loss=loss, start=start)
    elif plan.method == "square":
        yield square(seen, x, y, threat, generators, queries=plan.steps, loss=loss)
    elif plan.method == "fmn":
        yield threat.project(fmn(seen, x, y, threat.norm, steps=plan.steps, loss=loss, start=start), x)
    else:
        yield random_search(seen, x, y, threat, generators, draws=plan.steps, loss=loss)


class _Counter:
    """Counts the passes that attacks make through log-probabilities, for each image of a group."""

    def __init__(self, draws: int) -> None:
        self._draws, self._images, self._sizes = draws, 0, 0
        self._calls, self._silent = 0.0, 0.0

    def begin(self, images: int) -> None:
        """A batch of so many images (its padding left out) is attacked from now on."""
        self._images, self._sizes = images, self._sizes + images

    def count(self, log_probs: LogProbs) -> LogProbs:
        """``log_probs``, counted."""
        return _CountedRandom(log_probs, self) if is_random(log_probs) else _Counted(log_probs, self)

    def add(self) -> None:
        """One call through ``count``."""
        if torch.is_grad_enabled():
            self._calls += self._images * self._draws
        else:
            self._silent += self._images * self._draws

    def per_image(self) -> tuple[float, float]:
        """Passes with and without gradient, on average an image."""
        return self._calls / self._sizes, self._silent / self._sizes


class _Counted:
    def __init__(self, log_probs: LogProbs, counter: _Counter) -> None:
        self._log_probs, self._counter = log_probs, counter

    def __call__(self, x: Tensor) -> Tensor:
        self._counter.add()
        return self._log_probs(x)


class _CountedRandom(_Counted):
    def pinned(self) -> LogProbs:
        assert isinstance(self._log_probs, RandomLogProbs)
        return _Counted(self._log_probs.pinned(), self._counter)
