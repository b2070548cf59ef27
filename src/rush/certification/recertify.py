"""Certification of stored votes under another rule, where that is valid. No sample is drawn."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from rush.certification.apply_rule import apply_rule
from rush.certification.certificates import UNKNOWN, Certificates
from rush.certification.rule import FIXED, TWO_CLASSES, Rule, make_rule, within_reach
from rush.choices import BLOCK, CertifyMethod, Level
from rush.errors import InputError
from rush.runtime.numbers import as_whole


def recompute(
    certificates: Certificates,
    *,
    alpha: float | None = None,
    bound: str | None = None,
    num_estimation: int | None = None,
    radii: Sequence[float] | None = None,
    level: Level | None = None,
    futility: float | None = None,
) -> Certificates:
    """Return the certificates of the same images under another rule, from their stored votes.

    The new rule, like the first one, must be fixed without regard to these votes. No level covers the choice of the
    best of several rules. A run with a fixed number of samples can be given any bound. In a sequential run the number
    of votes depends on the votes. Only anytime-valid bounds hold for it, and a path that was stopped before the new
    rule decides stays undecided.

    Args:
        certificates: the certificates, with their votes.
        alpha: level. For this and the following arguments, None keeps the old value.
        bound: ``clopper-pearson`` or ``two-classes``, or an anytime-valid one (``geometric``, ``beta``), which makes
            the rule sequential. For votes of a sequential run ``two-classes`` is the anytime-valid bound of that name,
            which needs the blocks that it stores.
        num_estimation: number of votes to use, the first ones of each path. It must be a multiple of 100.
        radii: grid of radii, in pixel units.
        level: ``image`` or ``family``.
        futility: level at which a sequential rule gives up a radius.

    Raises:
        InputError: the result would not be valid, or the votes do not suffice.
    """
    old = certificates.rule
    if old.exact:
        raise InputError("these certificates are exact, from all draws of splitting noise: no other rule says more")
    given = {"alpha": alpha, "bound": bound, "num_estimation": num_estimation, "level": level, "futility": futility}
    new: dict[str, Any] = {**asdict(old), **{name: value for name, value in given.items() if value is not None}}
    num_votes = as_whole(new["num_estimation"])
    method = new["method"] = _method(old, new["bound"])
    if old.method == "sequential" and method == "clopper-pearson":
        raise InputError(
            "these votes come from a sequential run: their number depends on the votes themselves, and a "
            "Clopper-Pearson bound holds only for a number fixed beforehand; give an anytime-valid bound (geometric or "
            "beta), or certify again with method = clopper-pearson"
        )
    if num_votes is None:
        raise InputError(f"num_estimation must be an integer >= 1, got num_estimation = {num_estimation!r}")
    if num_votes > old.num_estimation:
        raise InputError(
            f"num_estimation = {num_votes} exceeds the {old.num_estimation} votes that this run could draw; "
            "certify again to draw more"
        )
    if num_votes != old.num_estimation and num_votes % BLOCK:
        raise InputError(
            f"votes are stored by blocks of {BLOCK}, so num_estimation must be a multiple of it, got {num_votes}"
        )
    if method == "sequential":
        unknown = not old.needs_every_class
    else:
        unknown = num_votes != old.num_estimation or bool((certificates.counts == UNKNOWN).any())
    if new["bound"] == TWO_CLASSES and unknown:
        raise InputError(
            f"the bound {TWO_CLASSES!r} needs the votes for every class, but blocks hold those for the selected class "
            "alone; give it all votes of a run with a fixed number of samples, or those of a sequential run that was "
            f"certified with bound = {TWO_CLASSES}"
        )
    rule = make_rule(**{**new, "radii": radii})
    if radii is None and old.radii is not None:  # the old grid, as far as the new rule reaches
        kept = tuple(filter(within_reach(rule), old.radii))
        if not kept:
            raise InputError(
                f"no radius of the old grid {list(old.radii)} is within reach of the new rule; give radii that are, a "
                "larger alpha or more votes"
            )
        rule = replace(rule, radii=kept)
    drawn, paths = certificates.num_samples - old.num_selection, certificates.blocks
    if old.needs_every_class and not rule.needs_every_class:
        paths = tuple(path[:, selected] for path, selected in zip(paths, certificates.selected, strict=True))
    certified, outcome, successes, trials = apply_rule(rule, paths, drawn, certificates.selection, certificates.counts)
    blocks = tuple(path[: -(-int(used) // BLOCK)] for path, used in zip(paths, trials, strict=True))
    counts = np.where((trials < drawn)[:, None], UNKNOWN, certificates.counts)
    if rule.needs_every_class:
        counts = np.stack([path.sum(0, dtype=np.int64) for path in blocks])
    counts[np.arange(len(counts)), certificates.selected] = successes
    return replace(
        certificates,
        prediction=certified.prediction,
        radius=certified.radius,
        p_lower=certified.p_lower,
        num_samples=old.num_selection + trials,
        counts=counts,
        blocks=blocks,
        outcome=outcome,
        rule=rule,
    )


def _method(old: Rule, bound: object) -> CertifyMethod:
    """Return the method of ``bound`` for the votes of ``old``. Both methods have a bound with two classes."""
    if bound == TWO_CLASSES:
        return old.method
    return "clopper-pearson" if bound in FIXED else "sequential"
