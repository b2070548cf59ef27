"""Attack a data set, by one attacker or by the worst case of a suite, and judge every returned point on fresh draws."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rush.attacks.gradient import gradient_statistics, seeded
from rush.attacks.losses import LossName, cross_entropy, named_loss
from rush.attacks.threat import ORDERS, ThreatModel, norms
from rush.choices import AttackMethod, Decision, Gradient
from rush.data.checks import Images, LabelledPixels, check_class_indices, check_pixels, kind_of, labelled_pixels
from rush.errors import InputError, ModelError, RoundingWarning
from rush.evaluation.candidates import GROUP, Points, find_points
from rush.evaluation.groups import read_part, write_part
from rush.evaluation.model import (
    Defender,
    Model,
    PlainDefender,
    RandomDefender,
    SmoothedDefender,
    defend,
)
from rush.evaluation.plans import PAPER, PAPER_EPSILON, PAPER_NORM, Plan, Suite, worst_case
from rush.evaluation.result import AttackResult, join_results
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, Verdicts, fewest_draws
from rush.runtime.distributed import gather_objects, rank, world_size
from rush.runtime.numbers import as_real, as_whole, positive_integer
from rush.runtime.progress import progress
from rush.smoothing.classifier import BLOCK, SmoothedClassifier
from rush.smoothing.inspection import check_logits

Method: TypeAlias = AttackMethod | Literal["worst-case", "paper"]
Attacker: TypeAlias = Plan | Suite

__all__ = ["GROUP", "AttackResult", "Gradient", "Model", "Plan", "attack", "attack_groups", "join_results", "verdict"]

_AUTO_COSINE = 0.9  # of the mean gradient with the expected one, that eot_samples="auto" aims at
_AUTO_IMAGES, _AUTO_RANGE = 16, (4, 256)


@dataclass(frozen=True)
class Judging:
    """How points are judged: probability of a false verdict on an image, over all verdicts on it, most votes of each
    and the seed."""

    level: float
    max_votes: int
    seed: int

    @classmethod
    def checked(cls, alpha: float, max_votes: int, seed: int) -> "Judging":
        """The judging of these numbers. Raises: InputError unless 0 < alpha < 0.5 and max_votes >= 100."""
        level, votes, plain_seed = as_real(alpha), positive_integer("max_votes", max_votes), as_whole(seed)
        if level is None or not 0 < level < 0.5 or votes < BLOCK:
            raise InputError(f"need 0 < alpha < 0.5 and max_votes >= {BLOCK}, got {alpha} and {max_votes}")
        if plain_seed is None or plain_seed < 0:
            raise InputError(f"seed must be an integer >= 0, got {seed!r}")
        return cls(level, votes, plain_seed)

    def check_reachable(self, decision: Decision | None, verdicts: int = 1) -> None:
        """Raise InputError when no verdict can be given at the level, shared by ``verdicts`` on each point, even where
        all ``max_votes`` draws agree; by votes, or as ``decision`` says."""
        fewest = fewest_draws(self.level / verdicts, decision)
        if self.max_votes < fewest:
            shared = f" ({self.level:g} shared by {verdicts} verdicts)" if verdicts > 1 else ""
            raise InputError(
                f"no verdict can be given at the level {self.level / verdicts:g}{shared} with max_votes = "
                f"{self.max_votes}, even when all votes agree; give at least {fewest}, or a larger alpha"
            )


def attack(
    model: Model,
    images: Images,
    threat: ThreatModel,
    method: Method = "pgd",
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
    eot_samples: int | Literal["auto"] | None = None,
    gradient: Gradient | None = None,
    loss: LossName | None = None,
    targets: Sequence[int] | None = None,
    decision: Decision | None = None,
    surrogate: nn.Module | None = None,
    alpha: float = 0.001,
    max_votes: int = 10_000,
    seed: int = 0,
    resume: str | PathLike[str] | None = None,
) -> AttackResult:
    """Attack every image and judge the points (``evaluation.verdict``; a deterministic network by its class there).

    model: a SmoothedClassifier, or an nn.Module from [0, 1] pixels to logits, with ``decision`` where it is random by
    itself (``evaluation.model.defend``). images: an ImageSet with labels or a pair (float images, labels).
    method: "worst-case" is the parameter-free suite, the worst case over its attackers image by image; "paper" the
    protocol PGD-20 at l-inf 8/255 with one noise draw a step; both take no budget. Else one attacker: "none" judges the
    images themselves; "fgsm" is one step of size epsilon; "pgd" (20 steps of epsilon / 4), "mifgsm" (20 of epsilon /
    20), "apgd" (100) from random starts; "square" (1,000 queries), "fmn" (200 steps; the nearest point found, moved
    into the ball), "random" (1,000 draws).
    steps: also queries or draws. step_size: in pixel units; where images have their own epsilon for the largest one and
    in proportion for the others. eot_samples: noise draws a gradient or query of a random model, 16 by default; "auto":
    as many as give the mean gradient a cosine of 0.9 with the expected one on half of the first images, a power of two
    from 4 to 256. gradient: what is differentiated of a random model, "fresh" noise by default. loss: "cross-entropy"
    by default, "margin" for Square, FMN and random search. targets: ranks of the classes aimed at, 1 the most probable
    other one. surrogate: a module whose derivative stands in for the model's (BPDA).
    alpha: probability of a false verdict, for each image. Attack noise comes from streams named "attack/...", the
    choice among candidates and the verdict from others.
    resume: a folder where finished groups of 64 images are kept, so that the same call goes on behind a kill. With
    torch.distributed initialised the processes share the groups, with the same bits; each returns the whole.
    Raises: InputError for bad images or numbers, or an argument the method does not take; ModelError for an unusable
    model, also for one that is random and was not said to be; RunError where ``resume`` holds something else.
    """
    defender, pixels = prepare(model, images, threat, decision, surrogate)
    judging = Judging.checked(alpha, max_votes, seed)
    seed = judging.seed
    given: dict[str, object] = {
        "steps": steps,
        "step_size": step_size,
        "restarts": restarts,
        "eot_samples": eot_samples,
        "gradient": gradient,
        "loss": loss,
        "targets": tuple(targets) if np.ndim(targets) == 1 else targets,  # type: ignore[arg-type]
    }
    given = {name: _plain(value) for name, value in given.items() if value is not None}
    plan = _attacker(method, defender, threat, given)
    if isinstance(plan, Plan) and given.get("eot_samples") == "auto":
        plan = _with_chosen_draws(plan, defender, pixels, threat, seed)
    return evaluate(defender, pixels, threat, plan, judging, None if resume is None else Path(resume))


def verdict(
    model: Model,
    images: Images,
    adversarial: Tensor,
    threat: ThreatModel,
    *,
    decision: Decision | None = None,
    alpha: float = 0.001,
    max_votes: int = 10_000,
    seed: int = 0,
    name: str = "given",
) -> AttackResult:
    """Judge points that somebody else has made: ``adversarial`` (N, C, H, W) float in [0, 1], one an image.

    What lies outside [0, 1] by rounding (``inputs.check_pixels``) is moved to its edge before anything is judged or
    measured. Up to 1e-6 outside the ball, and 6e-8 at every pixel, is taken for rounding; points in half precision may
    be half a step of their type outside at every pixel, and are moved into the ball.
    Raises: InputError, besides what ``attack`` raises, for points of another shape, outside [0, 1] or outside the
    threat, naming the farthest. Warns: RoundingWarning where points were moved.
    """
    defender, pixels = prepare(model, images, threat, decision, None)
    judging = Judging.checked(alpha, max_votes, seed)
    check_reachable(defender, judging)
    points = _points_in_threat(adversarial, pixels, threat)
    plan = Plan(name, "points given", "none")

    def judged(rows: list[int]) -> AttackResult:
        group, found = pixels.select(rows), Points(points[rows], torch.zeros(len(rows)), 0.0, 0.0)
        return _judged(defender, group, threat.select(rows), plan, found, judging)

    results = [judged(rows) for rows in _groups(len(points))]
    defender.recheck()
    return join_results(results, threat)


def _points_in_threat(adversarial: Tensor, pixels: LabelledPixels, threat: ThreatModel) -> Tensor:
    """The given points as float32 within [0, 1] and, up to float32 rounding, within the threat; see ``verdict``."""
    if not isinstance(adversarial, Tensor) or adversarial.shape != pixels.x.shape:
        given = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise InputError(f"adversarial must be a float tensor of shape {tuple(pixels.x.shape)}, got {given}")
    points = check_pixels(adversarial, "points").cpu()
    excess = norms(points, pixels.x, threat.norm) - torch.as_tensor(threat.epsilon, dtype=torch.float64)
    spread = float(pixels.x[0].numel() ** (1 / ORDERS[threat.norm]))
    rounding = 1e-6 + 6e-8 * spread
    allowed = max(rounding, torch.finfo(adversarial.dtype).eps / 2 * spread)
    if float(excess.max()) > allowed:
        row = int(excess.argmax())
        raise InputError(
            f"point {row} ({pixels.ids[row]}) is {float(excess[row]):.3g} outside the {threat.norm} ball; "
            f"{int((excess > allowed).sum())} of {len(points)} are. Give the epsilon they were made with; up to "
            f"{allowed:.3g} outside is taken for rounding"
        )
    if float(excess.max()) <= rounding:
        return points
    warnings.warn(
        f"{int((excess > rounding).sum())} of {len(points)} points lay up to {float(excess.max()):.2g} outside the "
        f"{threat.norm} ball, which is rounding to {adversarial.dtype}, and were moved into it",
        RoundingWarning,
        stacklevel=3,
    )
    return threat.project(points, pixels.x)


def prepare(
    model: Model,
    images: Images,
    threat: ThreatModel,
    decision: Decision | None = None,
    surrogate: nn.Module | None = None,
    declared: bool = True,
) -> tuple[Defender, LabelledPixels]:
    """The checked door of every evaluation: the model's defender, its number of classes known, and the images.

    declared: refuse a random model that is not said to be one, and a model that is no function of one image; an audit
    reports either as a finding. Raises: as ``attack``.
    """
    if not isinstance(threat, ThreatModel):
        raise InputError(f"threat must be a rush.ThreatModel(norm, epsilon), got {type(threat).__name__}")
    defender = defend(model, None, decision, surrogate)
    pixels = labelled_pixels(images, defender.num_classes or None, kind_of(model))
    if isinstance(model, SmoothedClassifier):
        model.check_shape(pixels.x.shape[1:])
    with seeded(0):  # a random model draws here too
        _check_outputs(defender, pixels, declared)
    if isinstance(threat.epsilon, Tensor) and threat.epsilon.shape != (len(pixels),):
        raise InputError(f"epsilon has shape {tuple(threat.epsilon.shape)}, expected one number or ({len(pixels)},)")
    return defender, pixels


def _check_outputs(defender: Defender, pixels: LabelledPixels, declared: bool) -> None:
    """Check the model's logits on the first image, by which a module's number of classes becomes known, and inspect
    whether it is a function of one image."""
    assert isinstance(defender, PlainDefender | SmoothedDefender | RandomDefender)
    model = defender.smoothed.classifier if isinstance(defender, SmoothedDefender) else defender.model
    with torch.no_grad():
        classes = check_logits(defender.execution.logits(model, pixels.x[:1]), 1).shape[1]
    if isinstance(defender, SmoothedDefender) and classes != defender.num_classes:
        raise ModelError(
            f"the classifier gave {classes} logits per image, expected num_classes = {defender.num_classes}"
        )
    defender.num_classes = classes
    check_class_indices(pixels.y, len(pixels), classes)
    try:
        defender.inspect(pixels.x, declared)
    except ModelError:
        if declared:
            raise  # an audit says it as a finding


def evaluate(
    defender: Defender,
    pixels: LabelledPixels,
    threat: ThreatModel,
    plan: Attacker,
    judging: Judging,
    resume: Path | None = None,
) -> AttackResult:
    """The checked inside of ``attack``: groups shared over processes, finished ones read from ``resume``.

    Raises: InputError where the level of a verdict can never be reached.
    """
    check_reachable(defender, judging, plan)
    groups = list(_groups(len(pixels)))
    own = range(rank(), len(groups), world_size())
    found: dict[int, AttackResult] = {}
    made_by = "" if resume is None else repr((judging, defender.fingerprint()))
    with progress(f"attack {plan.name}", sum(len(groups[number]) for number in own)) as advance:
        for number in own:
            rows = groups[number]
            group, balls = pixels.select(rows), threat.select(rows)
            file = None if resume is None else resume / f"{plan.name}-{number:04d}.npz"
            part = (
                None if file is None else read_part(file, group, balls, plan, judging.level, defender.single, made_by)
            )
            if part is None:
                part = attack_group(defender, group, balls, plan, judging, advance)
                defender.recheck()
                if file is not None:
                    write_part(file, part, group, made_by)
            else:
                advance(len(rows))
            found[number] = part
    shared = {number: part for shard in gather_objects(found) for number, part in shard.items()}
    return join_results([shared[number] for number in range(len(groups))], threat)


def check_reachable(defender: Defender, judging: Judging, plan: Attacker | None = None) -> None:
    """Raise InputError when a verdict on the points of ``plan`` can never be given; a suite shares the level."""
    if isinstance(defender, PlainDefender):
        return
    decision = defender.decision if isinstance(defender, RandomDefender) else None
    shares = len(plan.plans) if isinstance(plan, Suite) and not defender.single else 1
    judging.check_reachable(decision, shares)


def attack_groups(
    model: Model,
    pixels: LabelledPixels,
    threat: ThreatModel,
    plan: Attacker,
    *,
    level: float,
    max_votes: int,
    seed: int,
    start: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[AttackResult]:
    """Results of one attacker in groups of 64 images from image ``start`` on, without a look at the files.

    ``advance`` is called with the number of images whenever some have been attacked.
    """
    defender, judging = defend(model), Judging(level, max_votes, seed)
    for rows in _groups(len(pixels), start):
        yield attack_group(defender, pixels.select(rows), threat.select(rows), plan, judging, advance)


def _groups(images: int, start: int = 0) -> Iterator[list[int]]:
    """Positions of the images from ``start`` on, group by group."""
    return (list(range(first, min(first + GROUP, images))) for first in range(start, images, GROUP))


def attack_group(
    defender: Defender,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Attacker,
    judging: Judging,
    advance: Callable[[int], None] = lambda _: None,
) -> AttackResult:
    """One attacker, or a suite, on one group of images."""
    started = time.perf_counter()
    if isinstance(plan, Suite):
        result = _worst_of(defender, group, threat, plan, judging)
        advance(len(group))
    else:
        points = find_points(defender, group, threat, plan, judging.seed, advance=advance)
        result = _judged(defender, group, threat, plan, points, judging)
    return replace(result, seconds=np.full(len(group), (time.perf_counter() - started) / len(group)))


def _worst_of(
    defender: Defender, group: LabelledPixels, threat: ThreatModel, suite: Suite, judging: Judging
) -> AttackResult:
    """The suite's attackers one after the other; an image leaves when it is broken.

    A random model that is used with one draw has no verdict that is final: its images stay, and the most harmful point
    of each is judged at the end.
    """
    each = replace(judging, level=judging.level / len(suite.plans))
    found: AttackResult | None = None
    harm = torch.full((len(group),), -torch.inf)
    for number, plan in enumerate(suite.plans):
        rows = (
            np.flatnonzero(found.verdict != BROKEN).tolist() if found and not defender.single else [*range(len(group))]
        )
        if not rows:
            break
        part = group.select(rows)
        best = None if found is None else found.adversarial[rows]
        points = find_points(defender, part, threat.select(rows), plan, judging.seed, best, in_suite=True)
        judged = _judged(defender, part, threat.select(rows), plan, points, each, unjudged=defender.single)
        judged = replace(judged, plan=suite, level=judging.level, attacker=np.full(len(rows), number))
        found = judged if found is None else _with_worse(found, judged, rows, points.harm > harm[rows])
        harm[rows] = torch.maximum(harm[rows], points.harm)
    assert found is not None
    if not defender.single:
        return found
    final = _judged(defender, group, threat, suite.plans[0], Points(found.adversarial, harm, 0.0, 0.0), judging)
    spent = {name: getattr(found, name) for name in ("passes", "forward_passes", "attacker")}
    return replace(final, plan=suite, **spent)


def _with_worse(found: AttackResult, now: AttackResult, rows: list[int], more_harmful: Tensor) -> AttackResult:
    """``found`` with what an attacker ``now`` has changed at ``rows``: broken images, else more harmful points.

    Costs add up. An image is held only where every verdict on it is.
    """
    at = np.array(rows)
    before, after = found.verdict[at], now.verdict
    taken = (after == BROKEN) | (more_harmful.numpy() & (after != BROKEN))
    values = {name: getattr(found, name).copy() for name in ("challenger", "counts", "linf", "l2", "l1", "attacker")}
    for name, array in values.items():
        array[at[taken]] = getattr(now, name)[taken]
    verdict_ = found.verdict.copy()
    both_held = (before == HELD) & (after == HELD)
    verdict_[at] = np.where(after == BROKEN, BROKEN, np.where(both_held, HELD, UNDECIDED))
    adversarial = found.adversarial.clone()
    adversarial[at[taken]] = now.adversarial[taken]
    costs = {name: getattr(found, name).copy() for name in ("votes", "passes", "forward_passes")}
    for name, array in costs.items():
        array[at] += getattr(now, name)
    return replace(found, verdict=verdict_, adversarial=adversarial, **values, **costs)


def _judged(
    defender: Defender,
    group: LabelledPixels,
    threat: ThreatModel,
    plan: Plan,
    points: Points,
    judging: Judging,
    unjudged: bool = False,
) -> AttackResult:
    judged = LabelledPixels(points.adversarial, group.y, group.ids)
    verdicts = (
        _no_verdicts(group, defender.num_classes)
        if unjudged
        else defender.judge(
            judged, purpose=plan.name, level=judging.level, max_votes=judging.max_votes, seed=judging.seed
        )
    )
    return AttackResult(
        plan=plan,
        threat=threat,
        adversarial=points.adversarial,
        labels=group.y.numpy(),
        ids=group.ids,
        verdict=verdicts.verdict,
        challenger=verdicts.challenger,
        counts=verdicts.counts,
        votes=verdicts.votes,
        linf=norms(points.adversarial, group.x, "linf").numpy(),
        l2=norms(points.adversarial, group.x, "l2").numpy(),
        l1=norms(points.adversarial, group.x, "l1").numpy(),
        passes=np.full(len(group), points.passes),
        forward_passes=np.full(len(group), points.forward_passes),
        attacker=np.zeros(len(group), np.int64),
        seconds=np.zeros(len(group)),
        level=judging.level,
        single=defender.single,
    )


def _no_verdicts(group: LabelledPixels, num_classes: int) -> Verdicts:
    zeros = np.zeros(len(group), np.int64)
    return Verdicts(
        np.full(len(group), UNDECIDED, np.uint8), zeros, np.zeros((len(group), num_classes), np.int64), zeros.copy()
    )


_BUDGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fgsm": ("eot_samples", "gradient", "loss"),
    "mifgsm": ("steps", "step_size", "restarts", "eot_samples", "gradient", "loss", "targets"),
    "pgd": ("steps", "step_size", "restarts", "eot_samples", "gradient", "loss", "targets"),
    "apgd": ("steps", "restarts", "eot_samples", "gradient", "loss", "targets"),
    "square": ("steps", "restarts", "eot_samples", "gradient", "loss", "targets"),
    "fmn": ("steps", "eot_samples", "gradient", "loss", "targets"),
    "random": ("steps", "eot_samples", "gradient", "loss", "targets"),
    "worst-case": (),
    "paper": (),
}
_STEPS = {"fgsm": 1, "mifgsm": 20, "pgd": 20, "apgd": 100, "square": 1000, "fmn": 200, "random": 1000}
_NAMES = {"fgsm": "FGSM", "mifgsm": "MI-FGSM", "pgd": "PGD", "apgd": "APGD", "square": "Square", "fmn": "FMN"}


def _attacker(method: Method, defender: Defender, threat: ThreatModel, given: dict[str, object]) -> Attacker:
    """The attacker of these arguments; those a method does not take must not be given."""
    if method not in _BUDGETS:
        raise InputError(f"unknown method {method!r}; allowed: {', '.join(_BUDGETS)}")
    _check_given(method, defender, given)
    if method == "worst-case":
        return worst_case(defender.kind, defender.num_classes, defender.transferable)
    if method == "paper":
        return _paper(defender, threat)
    if method == "none":
        return Plan("clean", "no attack", "none")
    return _plan(method, defender, threat, given)


def _check_given(method: Method, defender: Defender, given: dict[str, object]) -> None:
    noisy = defender.kind == "random" and given.get("gradient") != "transfer"
    for name, value in given.items():
        taken = name in _BUDGETS[method] and not (
            (name == "eot_samples" and not noisy) or (name == "gradient" and defender.kind == "plain")
        )
        if not taken:
            what = "is a fixed suite" if method == "worst-case" else "takes none on this model"
            raise InputError(f"{name}={value} was given, but method {method!r} {what}")
        if name in ("steps", "restarts") or (name == "eot_samples" and value != "auto"):
            positive_integer(name, value)
    if "gradient" in given and given["gradient"] not in get_args(Gradient):
        raise InputError(f"unknown gradient {given['gradient']!r}; allowed: {', '.join(get_args(Gradient))}")
    if given.get("gradient") == "transfer" and not defender.transferable:
        raise InputError("gradient='transfer' needs a smoothed classifier, whose base network has no noise of its own")
    step_size = given.get("step_size", 1.0)
    if (as_real(step_size) or 0) <= 0:
        raise InputError(f"step_size must be a finite number > 0, got {step_size!r}")
    targets = given.get("targets", (1,))
    if not isinstance(targets, tuple) or not targets or not all(_is_rank(t, defender.num_classes) for t in targets):
        raise InputError(f"targets are ranks from 1 to {defender.num_classes - 1}, got {targets!r}")
    if "loss" in given:
        aim = torch.zeros(1, dtype=torch.int64) if "targets" in given else None
        named_loss(given["loss"], defender.num_classes, aim)  # type: ignore[arg-type]


def _plain(value: object) -> object:
    """``value`` with the numbers of NumPy, fractions and 0-d arrays as plain ones; what is no number as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    whole, real = as_whole(value), as_real(value)
    return value if real is None else real if whole is None else whole


def _is_rank(value: object, num_classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < num_classes


def _plan(method: AttackMethod, defender: Defender, threat: ThreatModel, given: dict[str, object]) -> Plan:
    gradient: Gradient = given.get("gradient", "fresh")  # type: ignore[assignment]
    noisy = defender.kind == "random" and gradient != "transfer"
    eot = given.get("eot_samples", 16) if noisy else 0
    steps = given.get("steps", _STEPS[method])
    assert isinstance(steps, int)
    share = {"mifgsm": 1 / steps, "fgsm": 1.0, "pgd": 0.25}.get(method, 0.0)
    if "step_size" in given:
        share = float(given["step_size"]) / float(torch.as_tensor(threat.epsilon).max())  # type: ignore[arg-type]
    searches = method in ("square", "fmn", "random")
    label = _NAMES.get(method, "random search") + ("" if method == "fgsm" else f"-{steps}")
    if noisy and eot != "auto":
        label += f", EOT {eot}"
    return Plan(
        name=method,
        label=label,
        method=method,
        gradient=gradient,
        eot_samples=_AUTO_RANGE[0] if eot == "auto" else eot,  # type: ignore[arg-type]
        steps=steps,
        step_size=share,
        restarts=given.get("restarts", 1),  # type: ignore[arg-type]
        loss=given.get("loss", "margin" if searches else "cross-entropy"),  # type: ignore[arg-type]
        targets=given.get("targets", ()),  # type: ignore[arg-type]
        start="clean" if searches else "random",
    )


def _paper(defender: Defender, threat: ThreatModel) -> Plan:
    stated = threat.norm == PAPER_NORM and not isinstance(threat.epsilon, Tensor)
    if not stated or abs(float(threat.epsilon) - PAPER_EPSILON) > 1e-9:
        raise InputError(f"method 'paper' is l-inf 8/255, got {threat.norm} {threat.epsilon}; take method 'pgd'")
    return PAPER if defender.kind == "random" else replace(PAPER, eot_samples=0)


def _with_chosen_draws(plan: Plan, defender: Defender, pixels: LabelledPixels, threat: ThreatModel, seed: int) -> Plan:
    """``plan`` with as many draws as its gradient's signal-to-noise asks for, and a label that says so."""
    if not isinstance(defender, SmoothedDefender):
        raise InputError('eot_samples="auto" needs a smoothed classifier; give a number of draws')
    members = list(range(min(_AUTO_IMAGES, len(pixels))))
    draws = choose_eot_samples(defender, pixels.select(members), threat.select(members), seed)
    return replace(plan, eot_samples=draws, label=f"{plan.label}, EOT {draws} (auto)")


def choose_eot_samples(defender: SmoothedDefender, pixels: LabelledPixels, threat: ThreatModel, seed: int) -> int:
    """Draws a gradient, a power of two, that give a cosine of 0.9 with the expected gradient on half of the images.

    Measured where an attack under way is: at the points of a short one.
    """
    least, most = _AUTO_RANGE
    pilot = Plan("pilot", "PGD-5, EOT 16", "pgd", "fresh", 16, 5, 0.25)
    points = find_points(defender, pixels, threat, pilot, seed).adversarial
    device = defender.execution.device
    generators = defender.smoothed.streams(seed, "attack/auto/noise", pixels.ids)
    found = gradient_statistics(defender.smoothed, points.to(device), pixels.y.to(device), cross_entropy, generators)
    needed = float(found.draws_for(_AUTO_COSINE).median())
    draws = least
    while draws < min(most, needed):
        draws *= 2
    return draws
