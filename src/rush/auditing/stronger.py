"""Findings of other attacks.

Do more budget, other losses or attacks without a gradient break more images? Is a certificate contradicted?
"""

from dataclasses import replace

import numpy as np
from torch import nn

from rush.attacks.losses import LossName
from rush.attacks.threat import ThreatModel
from rush.auditing import measures, surrogates
from rush.auditing.case import CLOSE, FEW_IMAGES, STEPPING, VERDICTS, Case
from rush.auditing.findings import LARGE_EPSILON_HELD
from rush.auditing.planted import Planted
from rush.auditing.probes import NOT_CLIMBING, Outcome, attack_gain, gain, probe, share, skipped
from rush.data.checks import LabelledPixels
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.ladder import grey_radius
from rush.evaluation.model import Defender, defend
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.sandwich import check_sandwich
from rush.evaluation.verdict import BROKEN

_LEAST_BLUR = 4 / 255  # least sigma of a smoothed surrogate, otherwise the change of a pixel at the edge of the ball
_FEW_STEPS, _MORE_STEPS = 5, 10
_FEW_DRAWS, _MORE_DRAWS = 8, 16


# Listed before more-steps: twice the steps of a stochastic model are twice the draws too. Where more draws help, they
# are what was missing.
@probe("more-eot-samples", "double eot_samples until the result no longer moves")
def more_eot_samples(case: Case) -> Outcome:
    """Do more noise draws per gradient break more?

    Cost: twice the evaluation's passes (of fewer than 8 draws as with 16), on the held images.
    """
    plan = case.plan
    if plan is None or plan.eot_samples == 0 or case.defender.kind != "random":
        return skipped("the evaluation's attack draws no noise")
    draws = 2 * plan.eot_samples if plan.eot_samples >= _FEW_DRAWS else _MORE_DRAWS
    more = replace(plan, name="more-eot-samples", eot_samples=draws)
    return attack_gain(case, more, f"the same attack with EOT {draws}")


@probe("more-steps", "double the steps until the result no longer moves")
def more_steps(case: Case) -> Outcome:
    """Do more steps break more?

    Cost: twice the evaluation's passes (of fewer than 5 steps as with 10), on the held images.
    """
    plan = case.plan
    if plan is None:
        return skipped("the evaluation's attack is not known")
    if plan.method == "fgsm" or (plan.method in STEPPING and plan.steps < _FEW_STEPS):
        more = replace(plan, method="pgd", steps=_MORE_STEPS, step_size=2.5 / _MORE_STEPS)
    else:
        more = replace(plan, steps=2 * plan.steps)
    return attack_gain(case, replace(more, name="more-steps"), f"the same attack with {more.steps} steps")


@probe("more-restarts", "add restarts until the result no longer moves")
def more_restarts(case: Case) -> Outcome:
    """Do other random starts break more? Cost: the evaluation's passes, on the held images."""
    plan = case.plan
    if plan is None or plan.method not in ("mifgsm", "pgd", "apgd", "square", "random"):
        return skipped("the evaluation's attack takes no restarts")
    start = plan.start if plan.method in ("square", "random") else "random"
    again = replace(plan, name="more-restarts", start=start)
    return attack_gain(case, again, f"{plan.restarts} more restarts of the same attack")


@probe("other-loss", "take the worst case over several losses, image by image")
def other_loss(case: Case) -> Outcome:
    """Does the same attack on another loss break more? Cost: the evaluation's passes, on the held images."""
    if (plan := case.climbing) is None:
        return skipped(NOT_CLIMBING)
    loss: LossName = "margin" if plan.loss == "cross-entropy" else "cross-entropy"
    return attack_gain(case, replace(plan, name="other-loss", loss=loss), f"the same attack on the {loss}")


@probe(
    "large-epsilon", "an attack that cannot break a model in half of the pixel range does not optimise; find out why"
)
def large_epsilon(case: Case) -> Outcome:
    """Does the evaluation's own attack break all images once any change is allowed?

    Cost: the evaluation's passes, on 32 held images.
    """
    if case.plan is None or not case.held:
        return skipped(_unknown(case))
    norm, epsilon = case.threat.norm, grey_radius(case.threat.norm, case.pixels.x[0].numel())
    images = case.pixels.select(case.held[:CLOSE])
    result = _repeated(case, case.plan, case.defender, images, ThreatModel(norm, epsilon), "large-epsilon")
    what = f"images are still held against the evaluation's own attack at {norm} epsilon {epsilon:.3g}"
    return share(int(result.held.sum()), len(images), LARGE_EPSILON_HELD, what)


# A planted example is linear in the pixels and inside the ball; an attack that optimises finds nearly all.
PLANTED_MISSED = 0.1


@probe(
    "planted",
    "an attack that misses what is known to exist proves nothing by finding nothing; change loss, steps, draws",
)
def planted(case: Case) -> Outcome:
    """Does the evaluation's attack find adversarial examples that were planted (Zimmermann et al. 2022)?

    Cost: the evaluation's passes, and 400 forward passes of a stochastic model, on 32 held images.
    """
    if case.plan is None or not case.held:
        return skipped(_unknown(case))
    rows = case.held[:CLOSE]
    images, threat = case.pixels.select(rows), case.threat.select(rows)
    defender = Planted(case.defender, images, threat, case.seed).defender
    result = _repeated(case, case.plan, defender, images, threat, "planted")
    what = "adversarial examples that were planted into the model were not found by the evaluation's attack"
    return share(int((~result.broken).sum()), len(images), PLANTED_MISSED, what)


@probe("fixed-noise-attack", "the gradient's noise hides the direction: raise eot_samples")
def fixed_noise_attack(case: Case) -> Outcome:
    """Does the same attack on one fixed draw of its noise break more?

    Cost: the evaluation's passes, on the held images.
    """
    plan = case.climbing
    if plan is None or case.defender.kind != "random" or plan.gradient != "fresh":
        return skipped("the evaluation draws no fresh noise")
    fixed = replace(plan, name="fixed-noise-attack", gradient="frozen")
    return attack_gain(case, fixed, "the same attack on one fixed draw of its noise")


@probe(
    "transfer", "a transferred point beats the gradient attack, so its gradient is masked: attack through a surrogate"
)
def transfer(case: Case) -> Outcome:
    """Do points made on the base network without noise, or on a surrogate, break more?

    Cost: 20 forward and backward passes of that network on the held images.
    """
    plan = Plan("transfer", "APGD-20 on the base network, transferred", "apgd", "transfer", steps=20)
    if case.plan is not None and case.plan.gradient == "transfer":
        return skipped("the evaluation is itself a transfer")
    if case.defender.transferable:
        return attack_gain(case, plan, "points made on the base network without noise")
    if case.surrogate is None:
        return skipped("there is no base network without noise; a surrogate would serve")
    newly = _broken_from(case, case.surrogate, replace(plan, gradient="fresh")) if case.held else 0
    return gain(newly, len(case.probed), "points made on the surrogate")


@probe(
    "straight-through",
    "steps without a derivative mask the gradient: attack through them as through the identity",
)
def straight_through(case: Case) -> Outcome:
    """Does an attack that treats steps without a derivative as the identity break more?

    Cost: 800 forward and backward passes of a stochastic model, 100 of a deterministic one, on all images that the
    evaluation did not break; 1 on 8 images where every step of the model has a derivative.
    """
    rows = np.flatnonzero(~case.evaluation.broken).tolist()
    if not rows:
        return skipped("no image is held")
    steps = _steps_without_derivative(case)
    if not steps:
        reason = "every step of the model has a derivative" if steps == 0 else "the model cannot be run step by step"
        return skipped(reason)
    draws, most = (16, 50) if case.defender.kind == "random" else (0, 100)
    plan = Plan(
        "straight-through", f"APGD-{most}, margin, straight through", "apgd", "fresh", draws, most, loss="margin"
    )
    newly = int(case.attack(plan, rows, surrogates.twin(case.defender)).broken.sum())
    attack = f"an attack that passes straight through steps without a derivative ({steps} in a pass)"
    return gain(newly, len(case.pixels), attack)


@probe(
    "smoothed-surrogate",
    "the gradient is masked or too noisy: take it from the mean over noisy images, or raise eot_samples",
)
def smoothed_surrogate(case: Case) -> Outcome:
    """Do points made on the model's mean over noisy images break more?

    Cost: 320 forward and backward passes of a stochastic model, 160 of a deterministic one, on the held images.
    """
    sigma = max(_LEAST_BLUR, float(measures.pixel_step(case.threat, case.pixels.x).max()))
    surrogate = surrogates.smoothed_surrogate(case.defender, sigma, straight=bool(_steps_without_derivative(case)))
    draws = 16 if case.defender.kind == "random" else 8
    plan = Plan("smoothed-surrogate", f"APGD-20, EOT {draws}", "apgd", "fresh", draws, 20, loss="margin")
    return attack_gain(case, plan, f"points made on its mean over images with noise of {sigma:.2g}", surrogate)


@probe(
    "square", "a gradient-free attack beats the gradient attack, so its gradient is masked: change loss or surrogate"
)
def square(case: Case) -> Outcome:
    """Does Square, which takes no gradients, break more?

    Cost: 500 forward passes, 100 x 8 of a stochastic model, on the held images.
    """
    queries, draws = (100, 8) if case.defender.kind == "random" else (500, 0)
    plan = Plan("square", "Square", "square", eot_samples=draws, steps=queries, loss="margin", start="clean")
    return attack_gain(case, plan, f"Square, {queries} queries without gradients")


@probe("random-search", "random points beat the attack, so it does not optimise at all")
def random_search(case: Case) -> Outcome:
    """Do random points of the ball break more?

    Cost: 200 forward passes, 50 x 8 of a stochastic model, on the held images.
    """
    points, draws = (50, 8) if case.defender.kind == "random" else (200, 0)
    plan = Plan(
        "random-search", "random search", "random", eot_samples=draws, steps=points, loss="margin", start="clean"
    )
    return attack_gain(case, plan, f"{points} random points of the ball")


@probe("worst-case", "report the worst case over a suite of attacks, image by image")
def worst_case(case: Case) -> Outcome:
    """Does the worst-case suite break more? Cost: none, the suite was run before the probes."""
    newly, strongest = 0, "nobody"
    for result in case.results:
        if isinstance(result.plan, Suite):
            newly += int(result.broken.sum())
            if result.broken.any():
                strongest = result.plan.plans[int(np.bincount(result.attacker[result.broken]).argmax())].label
    return gain(newly, len(case.pixels), f"the worst-case suite (most of them by {strongest})")


@probe(
    "certificates",
    "certificate or verdict is wrong: other weights, other noise, other pixels; do not rely on either",
)
def certificates(case: Case) -> Outcome:
    """Do proof and attack agree on the points of all attacks before this probe?

    If certified accuracy were above attacked accuracy, some certified image would be broken inside its radius.

    Cost: none.
    """
    if case.certificates is None:
        return skipped("no certificates were given")
    results = [case.evaluation, *case.results]
    sandwich = check_sandwich(case.certificates, results, VERDICTS * case.judging.level + case.evaluation.level)
    violations, allowed = len(sandwich.violations), sandwich.allowed
    evidence = (
        f"{violations} of {sandwich.checked} certified images are broken inside their radius, {allowed} can be chance"
    )
    return Outcome("failed" if violations > allowed else "passed", float(violations), float(allowed), evidence)


def _unknown(case: Case) -> str:
    return "the evaluation's attack is not known" if case.held else "no image is held"


def _repeated(
    case: Case, plan: Plan, defender: Defender, images: LabelledPixels, threat: ThreatModel, name: str
) -> AttackResult:
    """Return the result of the evaluation's ``plan`` on another defender or threat, not kept in ``case.results``."""
    return Evaluation(defender, images, threat, case.judging).run(replace(plan, name=f"audit-{name}"))


def _broken_from(case: Case, surrogate: nn.Module, plan: Plan) -> int:
    """Return the number of held images that points of ``plan`` on ``surrogate`` break on the model."""
    images, threat = case.pixels.select(case.held), case.threat.select(case.held)
    made = Evaluation(defend(surrogate, case.defender.num_classes), images, threat, case.judging).run(plan)
    points = LabelledPixels(made.adversarial, images.y, images.ids)
    verdicts = case.defender.judge(points, "audit-transfer", case.judging)
    judged = {name: getattr(verdicts, name) for name in ("verdict", "challenger", "counts", "votes")}
    case.results.append(replace(made, **judged))
    return int((verdicts.verdict == BROKEN).sum())


def _steps_without_derivative(case: Case) -> int | None:
    """Return how many steps of the model a straight-through twin would replace, None where it cannot be run as one."""
    try:
        return surrogates.steps_without_derivative(case.defender, case.pixels.select(case.probed[:FEW_IMAGES]).x)
    except Exception:  # the model's own code, run on tensors that are watched: it may fail in any way
        return None
