"""Attack a data set and judge every returned point on fresh noise."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.attacks.fgsm import fgsm
from rush.attacks.gradient import LogProbs, fresh_noise, frozen_noise, plain
from rush.attacks.losses import margin
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel, distances
from rush.engine.precision import Execution, check_eval_mode
from rush.engine.progress import progress
from rush.errors import InputError, ModelError
from rush.evaluation.intervals import Interval, share_interval
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, Verdicts, judge, judge_deterministic
from rush.inputs import Images, LabelledPixels, check_labels, check_positive_integer, labelled_pixels
from rush.randomness import stream
from rush.smoothing import BLOCK, SmoothedClassifier

AttackMethod = Literal["none", "fgsm", "pgd"]
Gradient = Literal["fresh", "frozen", "transfer"]
Model: TypeAlias = nn.Module | SmoothedClassifier

GROUP = 64  # images that are attacked and judged together: the unit of progress and of resuming


@dataclass(frozen=True)
class Plan:
    """One attacker with its budget.

    gradient: what is differentiated of a smoothed model: "fresh" noise at every call, noise "frozen" before the loop,
    or "transfer", the base network without noise. step_size: share of epsilon. eot_samples: noise draws a gradient, 0
    where there is no noise.
    """

    name: str
    label: str
    method: AttackMethod
    gradient: Gradient = "fresh"
    eot_samples: int = 0
    steps: int = 0
    step_size: float = 0.0
    restarts: int = 1

    @property
    def passes_per_image(self) -> int:
        """Forward+backward passes through the base network."""
        return self.restarts * self.steps * max(1, self.eot_samples)

    def forward_passes_per_image(self, random: bool) -> int:
        """Forward passes beyond those: PGD's last loss, and for a random model the votes that choose among the
        candidates."""
        if self.method != "pgd":
            return 0
        return self.restarts * (max(1, self.eot_samples) + (2 * BLOCK if random else 2))


@dataclass(frozen=True)
class AttackResult:
    """One attacker's points and their verdicts on N images.

    adversarial: float32 (N, C, H, W); verdict uint8 (N,); challenger int64 (N,): the class the label was tried against;
    counts int64 (N, K): judging votes; votes int64 (N,): all votes the verdict took; linf, l2: float64 (N,) sizes of
    the change; seconds (N,).
    level: bound on the probability of a false verdict, for each image.
    """

    plan: Plan
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
    seconds: NDArray[np.float64]
    level: float

    def __len__(self) -> int:
        return len(self.ids)

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
    def robust_accuracy(self) -> float:
        """1 - share broken: what the attack leaves, undecided images counted for the model."""
        return 1 - float(self.broken.mean())

    @property
    def robust_accuracy_lower(self) -> float:
        """Share held: undecided images counted against the model."""
        return float(self.held.mean())

    @property
    def interval(self) -> Interval:
        """``robust_accuracy`` with its 95 % Clopper-Pearson interval over images."""
        return share_interval(int((~self.broken).sum()), len(self))

    @property
    def budget(self) -> dict[str, float]:
        """Passes through the base network an image: of the attack, forward alone in the attack, and the verdict's votes
        on average."""
        voted = bool(self.counts.sum(1).max() > 1)  # a plain network is judged by one output
        return {
            "passes_per_image": self.plan.passes_per_image,
            "forward_passes_per_image": self.plan.forward_passes_per_image(voted),
            "votes_per_image": float(self.votes.mean()),
        }


def attack(
    model: Model,
    images: Images,
    threat: ThreatModel,
    method: AttackMethod = "pgd",
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
    eot_samples: int | None = None,
    gradient: Gradient = "fresh",
    alpha: float = 0.001,
    max_votes: int = 10_000,
    seed: int = 0,
) -> AttackResult:
    """Attack every image and judge the points (``evaluation.verdict``; a plain network by its class at the point).

    model: a SmoothedClassifier, or an nn.Module from [0, 1] pixels to logits taken as deterministic. images: an
    ImageSet with labels or a pair (float images, labels). method: "none" judges the images themselves; "fgsm" is one
    step of size epsilon; "pgd" has ``steps`` 20, ``step_size`` epsilon / 4, random starts, ``restarts`` 1 and, on a
    smoothed model, ``eot_samples`` 16 by default. step_size is in pixel units, where images have their own epsilon
    for the largest one and in proportion for the others. alpha: probability of a false verdict,
    for each image. Attack noise comes from streams named "attack/...", the choice among candidates and the verdict from
    others.
    Raises: InputError for bad images or numbers, or an argument the method does not take; ModelError for an unusable
    model.
    """
    smoothed = model if isinstance(model, SmoothedClassifier) else None
    _check_model(model)
    pixels = labelled_pixels(images, smoothed.num_classes if smoothed else None)
    if not isinstance(model, SmoothedClassifier):
        check_labels(pixels.y, len(pixels), _plain_logits(model, pixels.x[:1]).shape[1])
    check_positive_integer("max_votes", max_votes)
    if not 0 < alpha < 0.5 or max_votes < BLOCK:
        raise InputError(f"need 0 < alpha < 0.5 and max_votes >= {BLOCK}, got {alpha} and {max_votes}")
    if isinstance(threat.epsilon, Tensor) and threat.epsilon.shape != (len(pixels),):
        raise InputError(f"epsilon has shape {tuple(threat.epsilon.shape)}, expected one number or ({len(pixels)},)")
    plan = _plan(method, gradient, smoothed is not None, threat, steps, step_size, restarts, eot_samples)
    with progress(f"attack {plan.name}", len(pixels)) as advance:
        groups = attack_groups(
            model, pixels, threat, plan, level=alpha, max_votes=max_votes, seed=seed, advance=advance
        )
        return join_results(list(groups), threat)


def attack_groups(
    model: Model,
    pixels: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    *,
    level: float,
    max_votes: int,
    seed: int,
    start: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[AttackResult]:
    """Results of one attacker in groups of 64 images from image ``start`` on; the checked inside of ``attack``.

    ``advance`` is called with the number of images whenever some have been attacked.
    """
    _check_model(model)
    for first in range(start, len(pixels), GROUP):
        members = list(range(first, min(first + GROUP, len(pixels))))
        group = pixels.select(members)
        yield _attack_group(model, group, threat.select(members), plan, level, max_votes, seed, advance)


def _check_model(model: Model) -> None:
    if not isinstance(model, SmoothedClassifier) and not isinstance(model, nn.Module):
        raise ModelError(f"model must be a SmoothedClassifier or a torch.nn.Module, got {type(model).__name__}")
    check_eval_mode(model.classifier if isinstance(model, SmoothedClassifier) else model)


def join_results(parts: list[AttackResult], threat: ThreatModel) -> AttackResult:
    """One result of several groups of one attacker, in their order."""
    arrays = ("labels", "verdict", "challenger", "counts", "votes", "linf", "l2", "seconds")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    return AttackResult(
        plan=parts[0].plan,
        threat=threat,
        adversarial=torch.cat([part.adversarial for part in parts]),
        ids=tuple(own for part in parts for own in part.ids),
        level=parts[0].level,
        **joined,
    )


def _plan(
    method: AttackMethod,
    gradient: Gradient,
    random: bool,
    threat: ThreatModel,
    steps: int | None,
    step_size: float | None,
    restarts: int | None,
    eot_samples: int | None,
) -> Plan:
    """The plan of these arguments; those a method does not take must be None, for the rest its defaults stand in."""
    if method not in get_args(AttackMethod) or gradient not in get_args(Gradient):
        allowed = f"methods {', '.join(get_args(AttackMethod))}; gradients {', '.join(get_args(Gradient))}"
        raise InputError(f"unknown method {method!r} or gradient {gradient!r}; allowed: {allowed}")
    noisy = random and gradient != "transfer" and method != "none"
    taken = {"none": (), "fgsm": ("eot_samples",), "pgd": ("steps", "step_size", "restarts", "eot_samples")}[method]
    given = {"steps": steps, "step_size": step_size, "restarts": restarts, "eot_samples": eot_samples}
    for name, value in given.items():
        if value is not None and (name not in taken or (name == "eot_samples" and not noisy)):
            raise InputError(
                f"{name}={value} was given, but method {method!r} with gradient {gradient!r} takes none on this model"
            )
        if value is not None and name != "step_size":
            check_positive_integer(name, value)
    if step_size is not None and not 0 < step_size < math.inf:
        raise InputError(f"step_size must be a finite number > 0, got {step_size!r}")
    eot = (eot_samples or 16) if noisy else 0
    if method == "none":
        return Plan("clean", "no attack", "none")
    if method == "fgsm":
        return Plan("fgsm", "FGSM", "fgsm", gradient, eot, 1, 1.0)
    share = 0.25 if step_size is None else step_size / float(torch.as_tensor(threat.epsilon).max())
    label = f"PGD-{steps or 20}" + (f", EOT {eot}" if noisy else "")
    return Plan("pgd", label, "pgd", gradient, eot, steps or 20, share, restarts or 1)


def _attack_group(
    model: Model,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    level: float,
    max_votes: int,
    seed: int,
    advance: Callable[[int], None],
) -> AttackResult:
    started = time.perf_counter()
    adversarial = _attacked(model, group, threat, plan, seed, advance)
    points = LabelledPixels(adversarial, group.y, group.ids)
    if isinstance(model, SmoothedClassifier):
        verdicts = judge(model, points, purpose=plan.name, level=level, max_votes=max_votes, seed=seed)
    else:
        verdicts = _judge_plain(model, points)
    linf, l2 = distances(adversarial, group.x)
    return AttackResult(
        plan=plan,
        threat=threat,
        adversarial=adversarial,
        labels=group.y.numpy(),
        ids=group.ids,
        verdict=verdicts.verdict,
        challenger=verdicts.challenger,
        counts=verdicts.counts,
        votes=verdicts.votes,
        linf=linf.numpy(),
        l2=l2.numpy(),
        seconds=np.full(len(group), (time.perf_counter() - started) / len(group)),
        level=level,
    )


def _judge_plain(model: nn.Module, points: LabelledPixels) -> Verdicts:
    return judge_deterministic(_plain_logits(model, points.x), points.y)


def _plain_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K) of a plain model on the CPU; ModelError when they have another shape or are not finite."""
    logits = _execution_of(model).tiled_logits(model, x).cpu()
    if logits.ndim != 2 or len(logits) != len(x):
        raise ModelError(
            f"the model gave outputs of shape {tuple(logits.shape)} for {len(x)} images, expected (N, classes)"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError("the model gave outputs that are not finite; such an output has no class")
    return logits


def _attacked(
    model: Model,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    seed: int,
    advance: Callable[[int], None],
) -> Tensor:
    """The best point for each image, (N, C, H, W) on the CPU; batches are of one size, the last one padded with its
    last image."""
    if plan.method == "none":
        advance(len(group))
        return group.x
    execution = _execution_of(model)
    size = min(GROUP, max(1, execution.tile // max(1, plan.eot_samples)))
    found = []
    for first in range(0, len(group), size):
        members = list(range(first, min(first + size, len(group))))
        padded = members + [members[-1]] * (size - len(members))
        points = _attacked_batch(model, group.select(padded), threat.select(padded), plan, execution, seed)
        found.append(points[: len(members)].cpu())
        advance(len(members))
    return torch.cat(found)


def _attacked_batch(
    model: Model, batch: LabelledPixels, threat: ThreatModel, plan: Plan, execution: Execution, seed: int
) -> Tensor:
    x, y = batch.x.to(execution.device), batch.y.to(execution.device)
    candidates = []
    for restart in range(plan.restarts):
        name = f"attack/{plan.name}/{restart}"
        starts = [stream(seed, f"{name}/start", own, device=execution.device) for own in batch.ids]
        noises = [stream(seed, f"{name}/noise", own, device=execution.device) for own in batch.ids]
        log_probs = _target(model, x, plan, noises)
        if plan.method == "fgsm":
            candidates.append(fgsm(log_probs, x, y, threat))
            continue
        start = threat.random_start(x, starts)
        candidates += pgd(log_probs, x, y, threat, steps=plan.steps, step_size=plan.step_size, start=start)
    return candidates[0] if len(candidates) == 1 else _most_harmful(model, batch, candidates, plan, seed)


def _target(model: Model, x: Tensor, plan: Plan, generators: list[torch.Generator]) -> LogProbs:
    if not isinstance(model, SmoothedClassifier):
        return plain(model, _execution_of(model))
    if plan.gradient == "transfer":
        return plain(model.classifier, model.execution)
    if plan.gradient == "frozen":
        return frozen_noise(model, x, plan.eot_samples, generators)
    return fresh_noise(model, plan.eot_samples, generators)


def _most_harmful(model: Model, batch: LabelledPixels, candidates: list[Tensor], plan: Plan, seed: int) -> Tensor:
    """For each image the candidate with the largest margin against its label, on 100 votes common to all candidates.

    Those votes come from a stream of their own, so that neither the attack's luck nor the verdict's noise chooses. For
    a plain model the margin is that of the log-probabilities.
    """
    scores = torch.stack([_harm(model, point, batch, plan, seed) for point in candidates])
    chosen = scores.argmax(0)
    return torch.stack(candidates)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _harm(model: Model, point: Tensor, batch: LabelledPixels, plan: Plan, seed: int) -> Tensor:
    if isinstance(model, SmoothedClassifier):
        generators = model.streams(seed, f"choice/{plan.name}", batch.ids)
        votes = model.counts(point, BLOCK, generators).to(point.device)
        return margin(votes.float(), batch.y.to(point.device))
    with torch.no_grad():
        return margin(plain(model, _execution_of(model))(point), batch.y.to(point.device))


def _execution_of(model: Model) -> Execution:
    if isinstance(model, SmoothedClassifier):
        return model.execution
    parameter = next(model.parameters(), None)
    return Execution(device="cpu" if parameter is None else str(parameter.device))
