"""The ladder: one model under attackers of rising strength, and one attacker at rising epsilon."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from rush.attacks.threat import ThreatModel
from rush.choices import Norm
from rush.errors import InputError
from rush.evaluation.plans import PAPER, PAPER_EPSILON, PAPER_NORM, Plan, Suite, target_ranks, worst_case
from rush.recipe.schema import AttackConfig

_HALVINGS = 2  # halvings of epsilon at the beginning of the curve


def ladder(config: AttackConfig, threat: ThreatModel, num_classes: int) -> list[Plan | Suite]:
    """Return the rungs for a smoothed classifier, from no attack to the strongest attacker.

    PGD with random start, and the same steps, step size (as a share of epsilon) and restarts, comes first: on the
    noise-free base network, transferred; with one noise draw frozen before the loop; with fresh draws at every step,
    ``eot_samples`` of them. With ``strong_steps``, the next rungs are APGD on the mean of ``strong_eot_samples`` draws,
    by cross-entropy, by margin, aimed at the three most probable other classes, and from ``strong_restarts`` starts.
    Square and the suite's worst case follow.

    Args:
        config: the budgets. Its own norm, epsilon and verdict are not read.
    """
    pgd = partial(Plan, method="pgd", steps=config.steps, step_size=config.step_share, restarts=config.restarts)
    rungs: list[Plan | Suite] = [
        Plan("clean", "no attack", "none"),
        pgd("transfer", "noise-free base network, transferred", gradient="transfer"),
        pgd("frozen", "one noise draw frozen before the loop", gradient="frozen", eot_samples=1),
    ]
    for samples in config.eot_samples:
        label = "one fresh noise draw a step" if samples == 1 else f"EOT over {samples} fresh noise draws a step"
        rungs.append(_named_paper(pgd(f"eot-{samples}", label, eot_samples=samples), threat))
    if config.strong_steps:
        rungs += _strong(config, num_classes)
    return rungs


def plain_ladder(num_classes: int) -> list[Plan | Suite]:
    """Return the rungs for a deterministic model."""
    ranks = target_ranks(num_classes, most=9)
    return [
        Plan("clean", "no attack", "none"),
        Plan("fgsm", "FGSM", "fgsm", steps=1, step_size=1.0),
        Plan("pgd-20", "PGD-20", "pgd", steps=20, step_size=0.25),
        Plan("pgd-100", "PGD-100, small steps", "pgd", steps=100, step_size=0.05),
        Plan("apgd", "APGD-100, cross-entropy", "apgd", steps=100),
        Plan("apgd-margin", "APGD-100, margin", "apgd", steps=100, loss="margin"),
        Plan("apgd-targets", f"APGD-100, targets 1 to {len(ranks)}", "apgd", steps=100, loss="margin", targets=ranks),
        Plan("square", "Square, 1,000 queries", "square", steps=1000, loss="margin", start="clean"),
        worst_case("plain", num_classes),
    ]


def curve(threat: ThreatModel, pixels: int, steps: int, eot_samples: int) -> list[tuple[ThreatModel, Plan]]:
    """Return one attacker at epsilon / 4, epsilon / 2, epsilon, ... up to where accuracy must be near zero.

    At the last epsilon every image can be made the same grey.

    Args:
        pixels: C x H x W.
        steps: number of steps of PGD.
        eot_samples: noise draws per gradient, 0 for a deterministic model.

    Raises:
        InputError: images have their own epsilon.
    """
    if not isinstance(threat.epsilon, float | int):
        raise InputError("accuracy against epsilon needs one epsilon for all images")
    last = grey_radius(threat.norm, pixels)
    epsilons, epsilon = [], threat.epsilon / 2**_HALVINGS
    while epsilon < last / 1.5:
        epsilons.append(epsilon)
        epsilon *= 2
    label = f"PGD-{steps}, margin" + (f" of the mean, EOT {eot_samples}" if eot_samples else "")
    plan = Plan("curve", label, "pgd", "fresh", eot_samples, steps, 0.25, loss="margin")
    return [
        (ThreatModel(threat.norm, value), replace(plan, name=f"curve-{number}"))
        for number, value in enumerate([*epsilons, last])
    ]


def grey_radius(norm: Norm, pixels: int) -> float:
    """Return the epsilon at which mid-grey is within the ball of every image in [0, 1]."""
    return 0.5 * {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[norm]


def epsilon_text(norm: Norm, epsilon: float) -> str:
    """Return epsilon as text, such as ``8/255``, for l-inf, and as a number for other norms."""
    return f"{epsilon * 255:.4g}/255" if norm == "linf" else f"{epsilon:.4g}"


def _strong(config: AttackConfig, num_classes: int) -> Iterator[Plan | Suite]:
    steps, mean, ranks = config.strong_steps, f"EOT {config.strong_eot_samples}", target_ranks(num_classes, most=3)
    apgd = partial(Plan, method="apgd", eot_samples=config.strong_eot_samples, steps=steps)
    yield apgd("apgd", f"APGD-{steps}, cross-entropy of the mean, {mean}")
    yield apgd("apgd-margin", f"APGD-{steps}, margin of the mean, {mean}", loss="margin")
    yield apgd("apgd-targets", f"APGD-{steps}, targets 1 to {len(ranks)}, {mean}", loss="margin", targets=ranks)
    label = f"APGD-{steps}, margin of the mean, {mean}, {config.strong_restarts} restarts"
    yield apgd("apgd-restarts", label, restarts=config.strong_restarts, loss="margin")
    label = f"Square, {config.queries:,} queries of 8 draws"
    yield Plan("square", label, "square", "fresh", 8, config.queries, loss="margin", start="clean")
    yield worst_case("random", num_classes)


def _named_paper(plan: Plan, threat: ThreatModel) -> Plan:
    """Return ``plan``, labelled as the paper's protocol if it is that protocol."""
    same = plan.eot_samples == PAPER.eot_samples and plan.steps == PAPER.steps and plan.restarts == PAPER.restarts
    stated = threat.norm == PAPER_NORM and threat.epsilon == PAPER_EPSILON
    if not (same and stated and abs(plan.step_size - PAPER.step_size) < 1e-9):
        return plan
    return replace(plan, label=f"{plan.label}: the paper's protocol")
