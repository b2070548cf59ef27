"""The estimate that precedes certification and attacks, and the work that they then do."""

import re
from pathlib import Path

import numpy as np
import pytest

import rush
from commands import Call
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
    ladder = sum(rung.passes_per_image for rung in attackers.rungs)
    curve = sum(plan.passes_per_image for _, plan in attackers.curve)
    assert attacked.passes == ladder + curve * recipe.attack.curve_images / recipe.attack.images


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
    assert re.search("attack: at most .* forward and backward per second here", call("attack", run).stderr)
    text = estimate_text(certify_estimate(read_certificates(run / "certificates.tsv")[1].rule, 20, RATES), RATES)
    assert text == "at most 6.0 s for 20 images of at most 300 forward only passes, at 1,000 forward per second here"
