"""Certificates made from votes that a test chooses, as a run would have stored them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from rush.certification.apply_rule import apply_rule
from rush.certification.bounds import certify_counts
from rush.certification.certificates import Certificates
from rush.certification.rule import Rule, make_rule
from rush.certification.sequential import UNDECIDED
from rush.choices import BLOCK
from rush.records.public_logs import CertificateTable


def rule_of(**changes: Any) -> Rule:
    """sigma 0.5, 100 votes to select and 1,000 for the bound at level 0.001, if nothing else is said."""
    given = {
        "sigma": 0.5, "method": "clopper-pearson", "alpha": 0.001, "level": "image", "num_images": 60,
        "num_selection": 100, "num_estimation": 1000, "radii": None, "futility": 0.01, "stopping": "test",
    }  # fmt: skip
    return make_rule(**{**given, **changes})


def votes_for(radius: float, rule: Rule) -> int:
    """The most votes of ``rule.num_estimation`` that certify at most ``radius``."""
    successes = np.arange(rule.num_estimation + 1)
    estimation = np.stack([successes, rule.num_estimation - successes], 1)
    selection = np.tile([1, 0], (len(successes), 1))
    radii = certify_counts(selection, estimation, rule.sigma, rule.image_alpha).radius
    return int(np.searchsorted(radii, radius, side="right")) - 1


def stored_certificates(
    rule: Rule,
    votes: Sequence[int],
    selected: Sequence[int],
    labels: Sequence[int],
    ids: Sequence[str] | None = None,
    pixels: Sequence[str] | None = None,
    classes: int = 10,
) -> Certificates:
    """What ``rule`` makes of images whose ``selected`` class gets ``votes`` of all that may be drawn, spread evenly."""
    most = np.arange(0, rule.num_estimation + BLOCK, BLOCK).clip(max=rule.num_estimation)
    paths = [np.diff(most * count // rule.num_estimation).astype(np.uint8) for count in votes]
    chosen = np.array(selected, np.int64)
    drawn = np.full(len(paths), rule.num_estimation)
    rows = np.arange(len(paths))
    counts, selection = (np.zeros((len(paths), classes), np.int64) for _ in range(2))
    selection[rows, chosen] = rule.num_selection
    certified, outcome, successes, trials = apply_rule(rule, paths, drawn, selection)
    counts[rows, chosen] = successes
    counts[rows, (chosen + 1) % classes] += trials - successes
    return Certificates(
        prediction=certified.prediction,
        radius=certified.radius,
        p_lower=certified.p_lower,
        num_samples=rule.num_selection + trials,
        counts=counts,
        blocks=tuple(path[: -(-int(used) // BLOCK)] for path, used in zip(paths, trials, strict=True)),
        selection=selection,
        outcome=outcome,
        seconds=np.full(len(paths), 0.01),
        labels=np.array(labels, np.int64),
        ids=tuple(f"img-{row}" for row in rows) if ids is None else tuple(ids),
        rule=rule,
        pixels=tuple(f"{row:032x}" for row in rows) if pixels is None else tuple(pixels),
        model="0" * 64,
    )


def log_of(
    radius: Any, prediction: Any = None, labels: Any = None, name: str = "a", **changes: Any
) -> CertificateTable:
    """A published log of these radii at sigma 0.5; right everywhere unless ``prediction`` says more.

    changes: other values of the table, its certificates and its rule, by their names.
    """
    radius = np.array(radius, float)
    labels = np.zeros(len(radius), int) if labels is None else np.array(labels)
    prediction = labels if prediction is None else np.array(prediction)
    rule: dict[str, Any] = {
        "sigma": 0.5, "method": "clopper-pearson", "bound": "clopper-pearson", "alpha": 0.001, "level": "image",
        "num_images": len(radius), "num_selection": 100, "num_estimation": 100_000, "radii": None, "futility": 0.001,
        "noise": "gaussian",
    }  # fmt: skip
    rule |= {key: changes.pop(key) for key in list(changes) if key in rule}
    stored: dict[str, Any] = {
        "prediction": prediction, "radius": radius, "p_lower": special.ndtr(radius / rule["sigma"]),
        "num_samples": np.full(len(radius), rule["num_estimation"] + 100), "counts": np.zeros((len(radius), 0), int),
        "blocks": (np.zeros(0, np.uint8),) * len(radius), "selection": np.zeros((len(radius), 0), int),
        "outcome": np.full(len(radius), UNDECIDED, np.uint8), "seconds": np.ones(len(radius)), "labels": labels,
        "ids": tuple(map(str, range(len(radius)))), "pixels": None,
    }  # fmt: skip
    stored |= {key: changes.pop(key) for key in list(changes) if key in stored}
    certificates = Certificates(**stored, rule=Rule(**rule))
    table = {"path": Path(f"{name}.tsv"), "idx": np.arange(len(radius)), "published": True}
    return CertificateTable(name=name, certificates=certificates, **{**table, **changes})
