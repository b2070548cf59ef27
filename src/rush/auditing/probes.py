"""What the audit measures: one probe a finding, each on at most ``PROBED`` images, and the attacks it runs for them.

Costs are given in passes of one image through the base network; m stands for the evaluation's draws a gradient.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rush.attacks.gradient import LogProbs, loss_and_gradient, pinned
from rush.attacks.losses import LossName, margin
from rush.attacks.threat import ThreatModel, norms
from rush.auditing import findings, measures, surrogates
from rush.auditing.case import CLOSE, VERDICTS, Case
from rush.auditing.findings import Finding, skipped
from rush.auditing.planted import PlantedDefender
from rush.data.checks import LabelledPixels
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.ladder import grey_radius
from rush.evaluation.model import Defender, RandomDefender, SmoothedDefender, defend
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.sandwich import check_sandwich
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier

_PASSES = 4  # whose outputs are compared
_DRAWS = 64  # of the gradient, at least, for its signal-to-noise ratio
_MOST_DRAWS = 16  # in one gradient or loss that the audit looks at
_COMMON_DRAWS = 64  # common random numbers under which two points are compared
_IMAGES = 8  # that a property of the model is seen on, or that are looked at together
_LEAST_BLUR = 4 / 255  # of a smoothed surrogate; else the change of a pixel at the edge of the ball
_QUARTER = 0.25  # of the radius: what is drawn within it is averaged
_FEW_STEPS, _MORE_STEPS = 5, 10
_FEW_DRAWS, _MORE_DRAWS = 8, 16

_STEPPING = ("fgsm", "mifgsm", "pgd")
_CLIMBING = (*_STEPPING, "apgd", "fmn")
_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "0 to 255": lambda x: 255 * x,
    "-1 to 1": lambda x: 2 * x - 1,
    "normalised by the mean and deviation of each channel": lambda x: (
        (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    ),
}


Probe: TypeAlias = Callable[[Case], Finding]


def input_range(case: Case) -> Finding:
    """No pass."""
    points = case.evaluation.adversarial
    return findings.input_range(float(points.min()), float(points.max()))


def pixel_scale(case: Case) -> Finding:
    """4 x 16 forward passes of a random model, 4 of another, on the probed images."""
    draws = Plan("scale", "clean", "pgd", "fresh", _MOST_DRAWS)
    right: dict[str, list[Tensor]] = {name: [] for name in _SCALES}
    as_given = []
    for rows in case.batches(case.probed, _MOST_DRAWS):
        seen, x, y = case.seen(draws, rows, "scale")
        as_given.append(_right(seen, x, y))
        for name, scaled in _SCALES.items():
            if isinstance(case.model, SmoothedClassifier):
                # behind the noise: in front of it the same noise would be another share of the pixels' range
                behind = _scaled_behind_noise(case.model, scaled)
                seen = behind.log_probs(draws, x, case.pixels.select(rows).ids, case.seed, "audit/scale")
                right[name].append(_right(seen, x, y))
            else:
                right[name].append(_right(seen, scaled(x), y))
    own = torch.cat(as_given)
    joined = {name: torch.cat(parts) for name, parts in right.items()}
    others = {name: (int((other & ~own).sum()), int((own & ~other).sum())) for name, other in joined.items()}
    foreign = case.defender.kind == "random" and not isinstance(case.model, SmoothedClassifier)
    most = int(case.pixels.y[case.probed].bincount().max())
    return findings.pixel_scale(len(own), int(own.sum()), others, most if foreign else None)


def ball(case: Case) -> Finding:
    """No pass."""
    if case.plan is None and bool((case.evaluation.adversarial == case.pixels.x).all()):
        return skipped("ball", "the evaluation has no attack")
    moves = case.plan is None or case.plan.method in (*_STEPPING, "apgd")
    held = [moves and not own for own in case.evaluation.broken]
    return findings.ball(case.threat.norm, _shares(case).tolist(), held, _reach(case))


def mode(case: Case) -> Finding:
    """Twice 8 forward passes, and those of ``randomness``: draws would look like neighbours."""
    if case.training or case.defender.kind == "random" or randomness(case).status == "failed":
        return findings.mode(case.training, None)
    seen, x, _ = case.seen(Plan("mode", "no attack", "none"), case.probed[:_IMAGES], "mode")
    with torch.no_grad():
        together, alone = seen(x), torch.cat([seen(own) for own in x.split(1)])
    return findings.mode((), measures.relative_difference(together, alone))


def randomness(case: Case) -> Finding:
    """4 forward passes of a foreign model on 8 images, none of a smoothed one."""
    rows = case.probed[:_IMAGES]
    if not isinstance(case.model, SmoothedClassifier):
        x, execution = case.pixels.select(rows).x, case.defender.execution
        difference, drew = measures.passes_differ(case.model, execution, x, case.seed, _PASSES)
        return findings.randomness(case.defender.kind == "random", difference, drew)
    # its noise, not its outputs: a base network of few outputs gives the same ones under other noise
    images = case.pixels.select(rows)
    generators = case.model.streams(case.seed, "audit/randomness", images.ids)
    first, *others = [case.model.sample_noise(images.x, 1, generators) for _ in range(_PASSES)]
    difference = max(float((first - other).abs().max()) for other in others)
    return findings.randomness(True, difference, what="a pixel")


def noise(case: Case) -> Finding:
    """About 16,384 / pixels forward passes for the attacker's noise, 800 for the defender's; of a foreign model 32 + 32
    on 8 images."""
    if case.defender.kind != "random":
        return skipped("noise", "the model is deterministic")
    if case.plan is None:
        return skipped("noise", "the evaluation's attack is not known")
    if isinstance(case.model, SmoothedClassifier):
        shape = case.pixels.x.shape[1:]
        return findings.noise(*measures.sigmas(case.model, case.plan, shape, case.seed), "sigma")
    assert isinstance(case.defender, RandomDefender)
    images = case.pixels.select(case.probed[:_IMAGES])
    x = images.x.to(case.defender.execution.device)
    attacker, judge = measures.spreads(case.defender, case.plan, x, images.ids, case.seed)
    p_value = 1.0
    if not findings.within(attacker, judge, findings.SPREAD_BAND):
        p_value = measures.spreads_p_value(case.defender, case.plan, x, images.ids, case.seed)
    return findings.noise(attacker, judge, "spread", p_value)


def verdict(case: Case) -> Finding:
    """None beyond judging the evaluation's points again: 200 to ``max_votes`` forward passes of a random model, 1 of
    another."""
    if case.again is None:
        return skipped("verdict", "the evaluation was run here, under this verdict")
    contradictions = [(BROKEN, HELD), (HELD, BROKEN), (UNDECIDED, BROKEN)]
    pairs = zip(case.evaluation.verdict.tolist(), case.again.verdict.tolist(), strict=True)
    return findings.verdict(sum(pair in contradictions for pair in pairs), len(case.pixels))


def frozen_noise(case: Case) -> Finding:
    """Only for an evaluation on frozen noise, the same again with fresh noise."""
    if case.plan is None or case.plan.gradient != "frozen":
        return skipped("frozen-noise", "the evaluation does not freeze its noise")
    return _gain(case, "frozen-noise", replace(case.plan, name="frozen-noise", gradient="fresh"), "fresh noise draws")


def gradient(case: Case) -> Finding:
    """m forward and backward passes on 32 held images."""
    if (plan := _climbing(case)) is None or not case.held:
        return skipped("gradient", _NOTHING)
    dead, saturated, total = 0, 0, 0
    for rows in case.batches(case.held[:CLOSE], plan.eot_samples):
        seen, x, y = case.seen(plan, rows, "gradient")
        values, slopes = loss_and_gradient(seen, x, y, case.loss(plan, rows))
        lost = ~measures.alive(slopes)
        dead, total = dead + int(lost.sum()), total + len(rows)
        saturated += int((lost & (values == 0)).sum())
    return findings.gradient(dead, total, saturated)


def finite_differences(case: Case) -> Finding:
    """1 backward and 102 forward passes of at most 16 draws, on 32 held images."""
    if (plan := _climbing(case)) is None or not case.held:
        return skipped("finite-differences", _NOTHING)
    few = replace(plan, eot_samples=min(plan.eot_samples, _MOST_DRAWS))
    generator, parts = stream(case.seed, "audit/directions"), []
    for rows in case.batches(case.held[:CLOSE], few.eot_samples):
        seen, x, y = case.seen(few, rows, "finite-differences")
        parts.append(measures.slopes_at(pinned(seen), x, y, case.threat.select(rows), generator))
    agreement, ratio, images = measures.agreement(parts)
    if images == 0:
        return skipped("finite-differences", "no image has a gradient")
    return findings.finite_differences(agreement, ratio, images)


def step_size(case: Case) -> Finding:
    """No pass."""
    if case.plan is not None and case.plan.method not in (*_STEPPING, "apgd"):
        return skipped("step-size", "the evaluation's attack has no steps of a length")
    if case.plan is None and bool((case.evaluation.adversarial == case.pixels.x).all()):
        return skipped("step-size", "the evaluation has no attack")
    held = _shares(case)[~case.evaluation.broken]
    return findings.step_size(_reach(case), float(np.median(held)) if len(held) else 1.0, len(held))


def signal_to_noise(case: Case) -> Finding:
    """64 to 128 forward and backward passes on 32 held images."""
    plan = _climbing(case)
    if plan is None or not case.held:
        return skipped("signal-to-noise", _NOTHING)
    if case.defender.kind != "random" or plan.gradient != "fresh" or plan.eot_samples == 0:
        return skipped("signal-to-noise", "the evaluation draws no fresh noise")
    draws, needed = min(plan.eot_samples, _MOST_DRAWS), []
    repeats = max(_IMAGES, -(-_DRAWS // draws))
    for rows in case.batches(case.held[:CLOSE], draws):
        seen, x, y = case.seen(replace(plan, eot_samples=draws), rows, "signal-to-noise")
        needed += measures.draws_needed(seen, x, y, case.loss(plan, rows), draws, repeats)
    within = _QUARTER / plan.step_size if plan.step_size else 1.0
    averaged = plan.eot_samples * max(1.0, min(plan.steps, within))
    return findings.signal_to_noise(needed, averaged)


def path(case: Case) -> Finding:
    """2 forward passes of 64 draws on the held images."""
    if not case.held:
        return skipped("path", "no image is held")
    view = Plan("path", "64 common draws", "pgd", "fresh", _COMMON_DRAWS)
    not_rising = 0
    for rows in case.batches(case.held, _COMMON_DRAWS):
        seen, x, y = case.seen(view, rows, "path")
        common, points = pinned(seen), case.points[rows].to(x.device)
        before, after = (margin(measures.without_gradient(common, at), y) for at in (x, points))
        not_rising += int((after <= before).sum())
    return findings.path(not_rising, len(case.held))


def more_steps(case: Case) -> Finding:
    """Twice the evaluation's passes (of fewer than 5 steps as with 10), on the held images."""
    plan = case.plan
    if plan is None or plan.method == "none":
        return skipped("more-steps", "the evaluation's attack is not known")
    if plan.method == "fgsm" or (plan.method in _STEPPING and plan.steps < _FEW_STEPS):
        more = replace(plan, method="pgd", steps=_MORE_STEPS, step_size=2.5 / _MORE_STEPS)
    else:
        more = replace(plan, steps=2 * plan.steps)
    return _gain(case, "more-steps", replace(more, name="more-steps"), f"the same attack with {more.steps} steps")


def more_eot_samples(case: Case) -> Finding:
    """Twice the evaluation's passes (of fewer than 8 draws as with 16), on the held images."""
    plan = case.plan
    if plan is None or plan.eot_samples == 0 or case.defender.kind != "random":
        return skipped("more-eot-samples", "the evaluation's attack draws no noise")
    draws = 2 * plan.eot_samples if plan.eot_samples >= _FEW_DRAWS else _MORE_DRAWS
    more = replace(plan, name="more-eot-samples", eot_samples=draws)
    return _gain(case, "more-eot-samples", more, f"the same attack with EOT {more.eot_samples}")


def more_restarts(case: Case) -> Finding:
    """The evaluation's passes, on the held images."""
    plan = case.plan
    if plan is None or plan.method not in ("mifgsm", "pgd", "apgd", "square", "random"):
        return skipped("more-restarts", "the evaluation's attack takes no restarts")
    again = replace(
        plan, name="more-restarts", start="random" if plan.method not in ("square", "random") else plan.start
    )
    return _gain(case, "more-restarts", again, f"{plan.restarts} more restarts of the same attack")


def other_loss(case: Case) -> Finding:
    """The evaluation's passes, on the held images."""
    if (plan := _climbing(case)) is None:
        return skipped("other-loss", _NOTHING)
    loss: LossName = "margin" if plan.loss == "cross-entropy" else "cross-entropy"
    other = replace(plan, name="other-loss", loss=loss)
    return _gain(case, "other-loss", other, f"the same attack on the {loss}")


def large_epsilon(case: Case) -> Finding:
    """The evaluation's passes, on 32 held images."""
    if case.plan is None or not case.held:
        return skipped("large-epsilon", "the evaluation's attack is not known" if case.held else "no image is held")
    pixels = case.pixels.x[0].numel()
    epsilon = grey_radius(case.threat.norm, pixels)
    images = case.pixels.select(case.held[:CLOSE])
    result = _run(case, case.defender, images, ThreatModel(case.threat.norm, epsilon), "large-epsilon")
    return findings.large_epsilon(int(result.held.sum()), len(images), case.threat.norm, epsilon)


def planted(case: Case) -> Finding:
    """The evaluation's passes, and 400 forward passes of a random model, on 32 held images."""
    if case.plan is None or not case.held:
        return skipped("planted", "the evaluation's attack is not known" if case.held else "no image is held")
    rows = case.held[:CLOSE]
    images, threat = case.pixels.select(rows), case.threat.select(rows)
    defender = PlantedDefender(case.defender, images, threat, case.seed)
    result = _run(case, defender, images, threat, "planted")
    return findings.planted(int((~result.broken).sum()), len(images))


def fixed_noise_attack(case: Case) -> Finding:
    """The evaluation's passes, on the held images."""
    plan = _climbing(case)
    if plan is None or case.defender.kind != "random" or plan.gradient != "fresh":
        return skipped("fixed-noise-attack", "the evaluation draws no fresh noise")
    fixed = replace(plan, name="fixed-noise-attack", gradient="frozen")
    return _gain(case, "fixed-noise-attack", fixed, "the same attack on one fixed draw of its noise")


def transfer(case: Case) -> Finding:
    """20 forward and backward passes of the base network, or of the surrogate, on the held images."""
    attack = Plan("transfer", "APGD-20 on the base network, transferred", "apgd", "transfer", steps=20)
    if case.plan is not None and case.plan.gradient == "transfer":
        return skipped("transfer", "the evaluation is itself a transfer")
    if case.defender.transferable:
        return _gain(case, "transfer", attack, "points made on the base network without noise")
    if case.surrogate is None:
        return skipped("transfer", "there is no base network without noise; a surrogate would serve")
    return _transfer_from(case, case.surrogate, replace(attack, gradient="fresh"))


def straight_through(case: Case) -> Finding:
    """800 forward and backward passes of a random model, 100 of another, on all images that the evaluation did not
    break; 1 on 8 images where every step of the model has a derivative."""
    name, rows = "straight-through", np.flatnonzero(~case.evaluation.broken).tolist()
    if not rows:
        return skipped(name, "no image is held")
    steps = _steps_without_derivative(case)
    if not steps:
        reason = "every step of the model has a derivative" if steps == 0 else "the model cannot be run step by step"
        return skipped(name, reason)
    draws, most = (16, 50) if case.defender.kind == "random" else (0, 100)
    attack = Plan(name, f"APGD-{most}, margin, straight through", "apgd", "fresh", draws, most, loss="margin")
    seen = surrogates.SeenThrough(case.defender, surrogates.twin(case.defender))
    newly = int(case.attack(attack, rows, seen).broken.sum())
    made_by = f"an attack that passes straight through steps without a derivative ({steps} in a pass)"
    return findings.gain(name, newly, len(case.pixels), made_by)


def smoothed_surrogate(case: Case) -> Finding:
    """320 forward and backward passes of a random model, 160 of another, on the held images."""
    sigma = max(_LEAST_BLUR, float(measures.pixel_step(case.threat, case.pixels.x).max()))
    made_on = f"points made on its mean over images with noise of {sigma:.2g}"
    if not case.held:
        return findings.gain("smoothed-surrogate", 0, len(case.probed), made_on)
    surrogate = surrogates.smoothed_surrogate(case.defender, sigma, straight=bool(_steps_without_derivative(case)))
    draws = 16 if case.defender.kind == "random" else 8
    attack = Plan("smoothed-surrogate", f"APGD-20, EOT {draws}", "apgd", "fresh", draws, 20, loss="margin")
    newly = int(case.attack(attack, case.held, surrogates.SeenThrough(case.defender, surrogate)).broken.sum())
    return findings.gain("smoothed-surrogate", newly, len(case.probed), made_on)


def square(case: Case) -> Finding:
    """500 forward passes, 100 x 8 of a random model, on the held images."""
    queries, draws = (100, 8) if case.defender.kind == "random" else (500, 0)
    attack = Plan("square", "Square", "square", eot_samples=draws, steps=queries, loss="margin", start="clean")
    return _gain(case, "square", attack, f"Square, {queries} queries without gradients")


def random_search(case: Case) -> Finding:
    """200 forward passes, 50 x 8 of a random model, on the held images."""
    points, draws = (50, 8) if case.defender.kind == "random" else (200, 0)
    attack = Plan(
        "random-search", "random search", "random", eot_samples=draws, steps=points, loss="margin", start="clean"
    )
    return _gain(case, "random-search", attack, f"{points} random points of the ball")


def worst_case(case: Case) -> Finding:
    """No pass: looks at what the suite has found."""
    suites = [result for result in case.found if isinstance(result.plan, Suite)]
    newly, best = 0, "nobody"
    for result in suites:
        assert isinstance(result.plan, Suite)
        newly += int(result.broken.sum())
        if result.broken.any():
            best = result.plan.plans[int(np.bincount(result.attacker[result.broken]).argmax())].label
    return findings.gain("worst-case", newly, len(case.pixels), f"the worst-case suite (most of them by {best})")


def certificates(case: Case) -> Finding:
    """No pass: looks at the points of all attacks before it."""
    if case.certificates is None:
        return skipped("certificates", "no certificates were given")
    results = [case.evaluation, *case.found]
    sandwich = check_sandwich(case.certificates, results, VERDICTS * case.judging.level + case.evaluation.level)
    return findings.certificates(len(sandwich.violations), sandwich.checked, sandwich.allowed)


# In the order of ``findings.ORDER``; the certificates look at what all others found and come last.
PROBES: dict[str, Probe] = {
    "input-range": input_range,
    "pixel-scale": pixel_scale,
    "ball": ball,
    "mode": mode,
    "randomness": randomness,
    "noise": noise,
    "verdict": verdict,
    "frozen-noise": frozen_noise,
    "gradient": gradient,
    "finite-differences": finite_differences,
    "step-size": step_size,
    "signal-to-noise": signal_to_noise,
    "path": path,
    "more-eot-samples": more_eot_samples,
    "more-steps": more_steps,
    "more-restarts": more_restarts,
    "other-loss": other_loss,
    "large-epsilon": large_epsilon,
    "planted": planted,
    "fixed-noise-attack": fixed_noise_attack,
    "transfer": transfer,
    "straight-through": straight_through,
    "smoothed-surrogate": smoothed_surrogate,
    "square": square,
    "random-search": random_search,
    "worst-case": worst_case,
    "certificates": certificates,
}


_NOTHING = "no image is held, or the evaluation has no known attack that climbs a gradient"


def _steps_without_derivative(case: Case) -> int | None:
    """How many steps of the model a straight-through twin would replace; None where it cannot be run as one."""
    try:
        return surrogates.steps_without_derivative(case.defender, case.pixels.select(case.probed[:_IMAGES]).x)
    except Exception:  # the model's own code, run on tensors that are watched: it may fail in any way
        return None


class _InScale(nn.Module):
    def __init__(self, inner: nn.Module, scaled: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._scaled = inner, scaled
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self._scaled(x))


def _scaled_behind_noise(smoothed: SmoothedClassifier, scaled: Callable[[Tensor], Tensor]) -> SmoothedDefender:
    """The defender of ``smoothed`` whose base network is given its noisy pixels in another scale."""
    execution = replace(smoothed.execution, folded=False, compile_mode="none")
    base = _InScale(smoothed.classifier, scaled)
    other = SmoothedClassifier(base, noise=smoothed.noise, num_classes=smoothed.num_classes, execution=execution)
    return SmoothedDefender(other, None)


def _right(seen: LogProbs, x: Tensor, y: Tensor) -> Tensor:
    """Which of the images ``x`` are given their label, (B,)."""
    return (measures.without_gradient(seen, x).argmax(1) == y).cpu()


def _climbing(case: Case) -> Plan | None:
    """The evaluation's attack where it climbs a gradient."""
    return case.plan if case.plan is not None and case.plan.method in _CLIMBING else None


def _shares(case: Case) -> NDArray[np.float64]:
    """Size of each change over its epsilon, (N,)."""
    sizes = norms(case.evaluation.adversarial, case.pixels.x, case.threat.norm).numpy()
    return sizes / np.asarray(case.threat.epsilon, dtype=np.float64)


def _reach(case: Case) -> float | None:
    """Length of all steps of the evaluation's attack, in epsilon; None where it has none of fixed length."""
    if case.plan is None or case.plan.method not in _STEPPING:
        return None
    return 1.0 if case.plan.method == "fgsm" else case.plan.steps * case.plan.step_size


def _gain(case: Case, name: str, plan: Plan, attack: str) -> Finding:
    """Whether ``plan`` breaks images that the evaluation held; the share is one of all probed images."""
    newly = int(case.attack(plan, case.held).broken.sum()) if case.held else 0
    return findings.gain(name, newly, len(case.probed), attack)


def _run(case: Case, defender: Defender, images: LabelledPixels, threat: ThreatModel, name: str) -> AttackResult:
    assert case.plan is not None
    plan = replace(case.plan, name=f"audit-{name}")
    return Evaluation(defender, images, threat, case.judging).run(plan)


def _transfer_from(case: Case, surrogate: nn.Module, plan: Plan) -> Finding:
    made_on = "points made on the surrogate"
    if not case.held:
        return findings.gain("transfer", 0, len(case.probed), made_on)
    images, threat = case.pixels.select(case.held), case.threat.select(case.held)
    made = Evaluation(defend(surrogate, case.defender.num_classes), images, threat, case.judging).run(plan)
    points = LabelledPixels(made.adversarial, images.y, images.ids)
    judged = case.defender.judge(points, "audit-transfer", case.judging)
    told = {name: getattr(judged, name) for name in ("verdict", "challenger", "counts", "votes")}
    case.found.append(replace(made, **told))
    return findings.gain("transfer", int((judged.verdict == BROKEN).sum()), len(case.probed), made_on)
