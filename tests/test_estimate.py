"""The estimate that precedes certification and attacks, and the work that they then do."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rush
from commands import Call
from rush.certification.rule import make_rule
from rush.evaluation.plans import num_votes
from rush.pipeline.attackers import Attackers
from rush.pipeline.estimate import Rates, attack_estimate, certify_estimate, estimate_text, measured_rates
from rush.records.attacks import read_verdicts
from rush.records.certificates import read_certificates
from rush.records.folder import RunFolder
from tiny import part_of, tiny

RATES = Rates(forward=1000.0, gradient=100.0)


def test_an_estimate_is_an_upper_bound_on_the_work_of_a_run(tiny_run: Path) -> None:
    recipe = RunFolder.open(tiny_run).recipe
    certificates = read_certificates(tiny_run / "certificates.tsv")[1]
    certified = certify_estimate(certificates.rule, len(certificates), RATES)
    assert certificates.num_samples.max() <= certified.forward_passes
    assert certified.seconds == len(certificates) * certified.forward_passes / RATES.forward
    attackers = Attackers.of(recipe, 10, 64)
    attacked = attack_estimate(attackers, recipe.attack.images, recipe.attack.curve_images, RATES)
    votes = sum(votes for lines in read_verdicts(tiny_run).values() for _, votes, _ in lines.values())
    assert votes <= recipe.attack.images * attacked.forward_passes
    few = recipe.attack.curve_images / recipe.attack.images
    plans = [(rung, 1.0) for rung in attackers.rungs] + [(plan, few) for _, plan in attackers.curve]
    plans.append((attackers.sandwich, 1.0))
    assert attacked.passes == sum(share * plan.passes_per_image for plan, share in plans)
    measured = {rung["name"]: rung for rung in RunFolder.open(tiny_run).require("attack")["rungs"]}
    for plan in attackers.rungs:
        spent = measured[plan.name]
        most = plan.queries_per_image + num_votes(plan, "random", 100 + recipe.attack.max_votes)
        assert spent["passes_per_image"] <= plan.passes_per_image, plan.name
        assert spent["forward_passes_per_image"] + spent["votes_per_image"] <= most, plan.name


def test_the_usual_time_is_that_of_the_share_of_votes_and_attackers(tmp_path: Path) -> None:
    """By hand: 20 images at 1,000 passes forward only and 100 forward and backward per second."""
    attackers = Attackers.of(tiny(tmp_path, 'certify.method="sequential"'), 10, 64)
    rung = next(plan for plan in attackers.rungs if plan.name == "eot-1")
    alone = replace(
        attackers, rungs=[rung], curve=[], sandwich=None, settings=replace(attackers.settings, max_votes=4000)
    )
    estimate = attack_estimate(alone, 20, 0, RATES)
    queries, gradients = rung.queries_per_image + 2 * 100, rung.passes_per_image / 100
    assert estimate.usual_seconds == pytest.approx(20 * (gradients + (queries + 400) / 1000))
    assert estimate.seconds == pytest.approx(20 * (gradients + (queries + 4100) / 1000))
    rule = make_rule(
        sigma=0.25,
        method="sequential",
        alpha=0.001,
        level="image",
        num_images=20,
        num_selection=100,
        num_estimation=900,
        radii=[0.0],
        futility=0.01,
    )
    assert certify_estimate(rule, 20, RATES).usual_seconds == 20 * 0.2


def test_suites_and_queries_are_counted(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "attack.strong_steps=5", "attack.queries=30", "attack.curve_images=0")
    attackers = Attackers.of(recipe, 10, 64)
    with_suite = attack_estimate(attackers, 20, 0, RATES)
    assert with_suite.passes > 1000  # the suite's
    assert with_suite.forward_passes > 250 * 8 + 30  # Square in the suite and on its own


@pytest.mark.parametrize("name", ["digits", "plain"])
def test_rates_are_measured_and_change_no_vote(name: str, tiny_run: Path) -> None:
    smoothed = rush.load(tiny_run, device="cpu")
    images = rush.load_images("digits", "test")[:3]
    model = smoothed if name == "digits" else smoothed.classifier
    before = smoothed.predict(images.pixels(), num_samples=100)
    rates = measured_rates(model, (1, 8, 8))
    assert rates.forward > rates.gradient > 0
    assert np.array_equal(smoothed.predict(images.pixels(), num_samples=100), before)


def test_the_lines_are_printed_before_the_stages(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "certify", "attack", "audit").path
    line = r"at most .* for 20 images of at most .*300 forward only passes, at [\d,]+ forward per second here"
    assert re.search(f"certify: {line}", call("certify", run).stderr)
    assert re.search("attack: about .*, at most .* forward and backward per second here", call("attack", run).stderr)
    assert re.search(r"audit: about .* for \d+ images, at .* per second here", call("audit", run).stderr)
    text = estimate_text(certify_estimate(read_certificates(run / "certificates.tsv")[1].rule, 20, RATES), RATES)
    assert text == "at most 6.0 s for 20 images of at most 300 forward only passes, at 1,000 forward per second here"
