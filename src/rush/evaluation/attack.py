"""Attack a data set, by one attacker or by the worst case of a suite, and judge every returned point on fresh draws."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rush.attacks.gradient import gradient_statistics
from rush.attacks.losses import LossName, cross_entropy, named_loss
from rush.attacks.threat import ORDERS, ThreatModel, norms
from rush.choices import AttackMethod, AttackName, Decision, Gradient
from rush.data.checks import Images, LabelledPixels, as_tensor, check_pixels
from rush.errors import InputError, RoundingWarning
from rush.evaluation.candidates import Candidates
from rush.evaluation.evaluation import Attacker, Evaluation
from rush.evaluation.model import Defender, Model, SmoothedDefender
from rush.evaluation.plans import PAPER, PAPER_EPSILON, PAPER_NORM, Plan, worst_case
from rush.evaluation.result import AttackResult, join_results
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.numbers import as_real, as_whole, is_one_of, positive_integer
from rush.runtime.progress import asked, showing

_AUTO_COSINE = 0.9  # cosine of the mean gradient with the expected one that eot_samples="auto" aims at
_AUTO_IMAGES, _AUTO_RANGE = 16, (4, 256)


def attack(
    model: Model,
    images: Images,
    threat: ThreatModel,
    method: AttackName = "pgd",
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
    progress: bool | None = None,
) -> AttackResult:
    """Attack every image and judge the points.

    A deterministic network is judged by its class at the point, any other model by exact tests on fresh draws
    (``evaluation.verdict``). Arguments that are None take the method's default. Those that a method does not take must
    not be given. With torch.distributed initialised, the processes share the images, and each returns the whole result,
    with the same bits as one process.

    Args:
        model: a SmoothedClassifier, or an nn.Module from [0, 1] pixels (B, C, H, W) to logits (B, K).
        images: an ImageSet with labels, or a pair (float images in [0, 1], labels).
        threat: norm and epsilon of the changes.
        method: "worst-case" is the parameter-free suite, the worst case over its attackers for each image. "paper" is
            the protocol PGD-20 at l-inf 8/255 with one noise draw per step. The others are one attacker: "none" judges
            the images themselves; "fgsm" is one step of size epsilon; "pgd" (20 steps of epsilon / 4), "mifgsm" (20 of
            epsilon / 20) and "apgd" (100) begin at random starts; "square" takes 1,000 queries, "fmn" 200 steps, after
            which the nearest point is moved into the ball, and "random" 1,000 draws.
        steps: number of steps, queries or draws.
        step_size: step size in pixel units. Where images have their own epsilon, it applies to the largest one, and the
            step sizes for the others are in proportion.
        restarts: number of random starts.
        eot_samples: noise draws per gradient or query of a stochastic model, 16 by default. "auto" takes as many as
            give the mean gradient a cosine of 0.9 with the expected one on half of the first images, a power of two
            from 4 to 256.
        gradient: how a stochastic model is differentiated, with "fresh" noise by default.
        loss: "cross-entropy" by default, "margin" for Square, FMN and random search.
        targets: ranks of the target classes. Rank 1 is the most probable class other than the label.
        decision: what a stochastic nn.Module is used for, see ``evaluation.model.defend``.
        surrogate: a module whose derivative stands in for the model's (BPDA).
        alpha: probability of a false verdict, per image.
        max_votes: largest number of judging votes per point.
        seed: seed of all draws.
        resume: folder that keeps finished groups of 64 images, from which an interrupted call resumes.
        progress: as in ``rush.certify``.

    Returns:
        The points with their verdicts. ``robust_accuracy`` is the share of images that are not broken.

    Raises:
        InputError: bad images or numbers, or an argument that the method does not take.
        ModelError: an unusable model, or a stochastic one without a ``decision``.
        RunError: ``resume`` holds the groups of a different attack.

    Random:
        Attack noise comes from streams named "attack/...". The choice among an attacker's points and the verdict draw
        from other streams.

    Example:
        >>> import rush, torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> images = rush.load_images("digits", split="test")[:5]
        >>> result = rush.attack(model, images, rush.ThreatModel("linf", 8 / 255), method="pgd", steps=3)
        >>> result.adversarial.shape
        torch.Size([5, 1, 8, 8])
        >>> result.robust_accuracy_lower <= result.robust_accuracy
        True
    """
    settings = VerdictSettings.checked(alpha, max_votes, seed)
    evaluation = Evaluation.of(model, images, threat, settings, decision, surrogate)
    budget: dict[str, object] = {
        "steps": steps,
        "step_size": step_size,
        "restarts": restarts,
        "eot_samples": eot_samples,
        "gradient": gradient,
        "loss": loss,
        "targets": tuple(targets) if np.ndim(targets) == 1 else targets,  # type: ignore[arg-type]
    }
    budget = {name: _plain(value) for name, value in budget.items() if value is not None}
    plan = _attacker(method, evaluation.defender, threat, budget)
    if isinstance(plan, Plan) and budget.get("eot_samples") == "auto":
        plan = _with_chosen_draws(plan, evaluation)
    with showing(asked(progress)):
        return evaluation.run(plan, None if resume is None else Path(resume))


def verdict(
    model: Model,
    images: Images,
    adversarial: Tensor | np.ndarray,
    threat: ThreatModel,
    *,
    decision: Decision | None = None,
    alpha: float = 0.001,
    max_votes: int = 10_000,
    seed: int = 0,
    name: str = "given",
) -> AttackResult:
    """Judge adversarial points that come from elsewhere.

    Pixels that lie outside [0, 1] by rounding (``data.checks.check_pixels``) are moved to its edge before anything is
    judged or measured. Up to 1e-6 outside the ball, and 6e-8 at every pixel, counts as rounding. Points in half
    precision may be half a step of their type outside at every pixel, and are moved into the ball.

    Args:
        model, images, threat, decision, alpha, max_votes, seed: as for ``attack``.
        adversarial: float (N, C, H, W) in [0, 1], one point per image.
        name: name of the attacker in the result and in the streams of the verdict.

    Raises:
        InputError: as for ``attack``, and for points of another shape, outside [0, 1], or outside the threat, naming
            the farthest.
        ModelError: as for ``attack``.

    Warns:
        RoundingWarning: points were moved.
    """
    settings = VerdictSettings.checked(alpha, max_votes, seed)
    evaluation = Evaluation.of(model, images, threat, settings, decision)
    evaluation.check_reachable()
    points, plan = _points_in_threat(adversarial, evaluation.images, threat), Plan(name, "points given", "none")
    results = [evaluation.select(rows).judge(Candidates.unmeasured(points[rows]), plan) for rows in evaluation.groups()]
    evaluation.defender.recheck()
    return join_results(results, threat)


def _points_in_threat(given: Tensor | np.ndarray, pixels: LabelledPixels, threat: ThreatModel) -> Tensor:
    """Return the points as float32 within [0, 1] and, up to float32 rounding, within the threat, see ``verdict``."""
    adversarial = as_tensor(given)
    if not isinstance(adversarial, Tensor) or adversarial.shape != pixels.x.shape:
        what = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise InputError(f"adversarial must be a float tensor of shape {tuple(pixels.x.shape)}, got {what}")
    points = check_pixels(adversarial, "points").cpu()
    excess = norms(points, pixels.x, threat.norm) - torch.as_tensor(threat.epsilon, dtype=torch.float64)
    spread = float(pixels.x[0].numel() ** (1 / ORDERS[threat.norm]))
    rounding = 1e-6 + 6e-8 * spread
    eps = torch.finfo(adversarial.dtype).eps if adversarial.is_floating_point() else 0.0
    allowed = max(rounding, eps / 2 * spread)
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


# The arguments of ``attack`` that a method takes.
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


def _attacker(method: AttackName, defender: Defender, threat: ThreatModel, budget: dict[str, Any]) -> Attacker:
    """Return the attacker defined by the arguments of ``attack`` that are not None, after checking them."""
    if not is_one_of(method, _BUDGETS):
        raise InputError(f"unknown method {method!r}; allowed: {', '.join(_BUDGETS)}")
    noisy = defender.kind == "random" and budget.get("gradient") != "transfer"
    _check_budget(method, defender, noisy, budget)
    if method == "worst-case":
        return worst_case(defender.kind, defender.num_classes, defender.transferable)
    if method == "paper":
        return _paper(defender, threat)
    if method == "none":
        return Plan("clean", "no attack", "none")
    return _plan(method, noisy, threat, budget)


def _check_budget(method: AttackName, defender: Defender, noisy: bool, budget: dict[str, Any]) -> None:
    for name, value in budget.items():
        taken = name in _BUDGETS[method] and not (
            (name == "eot_samples" and not noisy) or (name == "gradient" and defender.kind == "plain")
        )
        if not taken:
            what = "is a fixed suite" if method == "worst-case" else "takes none on this model"
            others = [] if name in _BUDGETS[method] else [other for other, taken in _BUDGETS.items() if name in taken]
            instead = f", or give one of the methods {', '.join(others)}" if others else ""
            raise InputError(f"{name}={value} was given, but method {method!r} {what}; omit it{instead}")
        if name in ("steps", "restarts") or (name == "eot_samples" and not is_one_of(value, ("auto",))):
            positive_integer(name, value)
    gradient, step_size, targets = budget.get("gradient", "fresh"), budget.get("step_size", 1.0), budget.get("targets")
    if not is_one_of(gradient, get_args(Gradient)):
        raise InputError(f"unknown gradient {gradient!r}; allowed: {', '.join(get_args(Gradient))}")
    if gradient == "transfer" and not defender.transferable:
        raise InputError("gradient='transfer' needs a smoothed classifier, whose base network has no noise of its own")
    if (as_real(step_size) or 0) <= 0:
        raise InputError(f"step_size must be a finite number > 0, got {step_size!r}")
    ranks = (1,) if targets is None else targets
    if not isinstance(ranks, tuple) or not ranks or not all(_is_rank(rank, defender.num_classes) for rank in ranks):
        raise InputError(f"targets are ranks from 1 to {defender.num_classes - 1}, got {targets!r}")
    if "loss" in budget:
        aim = None if targets is None else torch.zeros(1, dtype=torch.int64)
        named_loss(budget["loss"], defender.num_classes, aim)


def _plain(value: object) -> object:
    """Return NumPy numbers, fractions and 0-d arrays as plain numbers, and any other value unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    whole, real = as_whole(value), as_real(value)
    return value if real is None else real if whole is None else whole


def _is_rank(value: object, num_classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < num_classes


def _plan(method: AttackMethod, noisy: bool, threat: ThreatModel, budget: dict[str, Any]) -> Plan:
    draws = budget.get("eot_samples", 16) if noisy else 0
    steps = budget.get("steps", _STEPS[method])
    share = {"mifgsm": 1 / steps, "fgsm": 1.0, "pgd": 0.25}.get(method, 0.0)
    if "step_size" in budget:
        share = float(budget["step_size"]) / float(torch.as_tensor(threat.epsilon).max())
    searches = method in ("square", "fmn", "random")
    label = _NAMES.get(method, "random search") + ("" if method == "fgsm" else f"-{steps}")
    if noisy and draws != "auto":
        label += f", EOT {draws}"
    return Plan(
        name=method,
        label=label,
        method=method,
        gradient=budget.get("gradient", "fresh"),
        eot_samples=_AUTO_RANGE[0] if draws == "auto" else draws,
        steps=steps,
        step_size=share,
        restarts=budget.get("restarts", 1),
        loss=budget.get("loss", "margin" if searches else "cross-entropy"),
        targets=budget.get("targets", ()),
        start="clean" if searches else "random",
    )


def _paper(defender: Defender, threat: ThreatModel) -> Plan:
    """Return the paper's protocol, or raise InputError for a different threat model."""
    stated = threat.norm == PAPER_NORM and not isinstance(threat.epsilon, Tensor)
    if not stated or abs(float(threat.epsilon) - PAPER_EPSILON) > 1e-9:
        raise InputError(f"method 'paper' is l-inf 8/255, got {threat.norm} {threat.epsilon}; take method 'pgd'")
    return PAPER if defender.kind == "random" else replace(PAPER, eot_samples=0)


def _with_chosen_draws(plan: Plan, evaluation: Evaluation) -> Plan:
    """Return ``plan`` with the draws per gradient that its gradient's signal-to-noise ratio needs.

    Their number is a power of two. They give a cosine of 0.9 with the expected gradient on half of the first images.
    The ratio is measured at the points of a short attack, where an attack in progress is.
    """
    defender, seed = evaluation.defender, evaluation.settings.seed
    if not isinstance(defender, SmoothedDefender):
        raise InputError('eot_samples="auto" needs a smoothed classifier; give a number of draws')
    first = evaluation.select(list(range(min(_AUTO_IMAGES, len(evaluation.images)))))
    points = first.candidates(Plan("pilot", "PGD-5, EOT 16", "pgd", "fresh", 16, 5, 0.25)).adversarial
    x, y = points.to(defender.execution.device), first.images.y.to(defender.execution.device)
    generators = defender.smoothed.streams(seed, "attack/auto/noise", first.images.ids)
    statistics = gradient_statistics(defender.smoothed, x, y, cross_entropy, generators)
    needed = float(statistics.draws_for(_AUTO_COSINE).median())
    draws, most = _AUTO_RANGE
    while draws < min(most, needed):
        draws *= 2
    return replace(plan, eot_samples=draws, label=f"{plan.label}, EOT {draws} (auto)")
