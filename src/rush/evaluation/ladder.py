"""The ladder: one smoothed model under attackers of rising strength."""

from collections.abc import Sequence

from rush.evaluation.plans import Plan


def ladder(steps: int, step_size: float, restarts: int, eot_samples: Sequence[int]) -> list[Plan]:
    """Rungs from the weakest attacker to the strongest, the first one being no attack.

    The noise-free base network, transferred; one noise draw frozen before the loop; fresh draws at every step,
    ``eot_samples`` of them. All are PGD with random start and the same ``steps``, ``step_size`` (share of epsilon) and
    ``restarts``.
    """
    budget = {"steps": steps, "step_size": step_size, "restarts": restarts}
    rungs = [
        Plan("clean", "no attack", "none"),
        Plan("transfer", "noise-free base network, transferred", "pgd", "transfer", 0, **budget),  # type: ignore[arg-type]
        Plan("frozen", "one noise draw frozen before the loop", "pgd", "frozen", 1, **budget),  # type: ignore[arg-type]
    ]
    for samples in eot_samples:
        label = "one fresh noise draw a step" if samples == 1 else f"EOT over {samples} fresh noise draws a step"
        rungs.append(Plan(f"eot-{samples}", label, "pgd", "fresh", samples, **budget))  # type: ignore[arg-type]
    return rungs
