"""The least numbers with which an answer can be given at all, against trying them one by one; fewer are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rush
from commands import Call, refusal
from exact_models import square_half_space, square_images
from random_models import NoisyHalfSpace
from rush.auditing.audit import audit
from rush.auditing.report import decide, images_to_hold, reach_statement
from rush.certification.bounds import largest_radius
from rush.certification.rule import fewest_estimation, make_rule
from rush.choices import fewest_samples
from rush.commands.external import ExternalEvaluation
from rush.errors import ConfigError, InputError
from rush.evaluation.attack import verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.plans import worst_case
from rush.evaluation.verdict import (
    BROKEN,
    HELD,
    UNDECIDED,
    fewest_draws,
    judge_means,
    judge_votes,
    looks,
)
from rush.recipe.load import load_recipe
from rush.statistics import fewest_votes, lower_bound, sign_test

LEVELS = [0.49, 0.1, 0.05, 0.001, 2.0**-10, 2.0**-10 * (1 + 1e-11), 2.0**-10 * (1 - 1e-9), 1e-6, 1e-20]
SMOOTHED = rush.SmoothedClassifier(square_half_space(), 0.25, 2)
X = square_images(np.full(3, 0.75), seed=0)
Y = torch.tensor([0, 1, 1])
THREAT = rush.ThreatModel("l2", 0.05)
TINY = 1e-40  # less than 2^-100


@pytest.mark.parametrize("level", LEVELS)
def test_the_fewest_votes_of_a_sign_test_and_of_a_certificate_are_those_of_trying(level: float) -> None:
    assert fewest_votes(level) == next(n for n in range(1, 100) if sign_test(n, 0) <= level)
    assert fewest_samples(level) == next(n for n in range(1, 100) if lower_bound(n, n, level) > 0.5)


def test_the_fewest_votes_are_finite_at_every_level() -> None:
    for level in (1e-300, 5e-324):
        assert 900 < fewest_votes(level) < 1100
        assert 900 < fewest_samples(level) < 1100


@pytest.mark.parametrize("alpha", [0.001, 2.0**-10, 0.3, 1e-6])
@pytest.mark.parametrize("sigma", [0.25, 1e-5, 2e-6])
def test_the_fewest_votes_of_a_rule_are_those_of_trying(sigma: float, alpha: float) -> None:
    """A tiny sigma needs more than 1/2, since radii are rounded down to six decimals."""
    given = {"method": "clopper-pearson", "level": "image", "num_images": 1, "num_selection": 10, "futility": 0.01}
    tried = next(n for n in range(1, 2000) if largest_radius(n, sigma, alpha) > 0)
    rule = make_rule(sigma=sigma, alpha=alpha, num_estimation=tried, radii=None, **given)  # type: ignore[arg-type]
    assert fewest_estimation(rule) == tried
    with pytest.raises(InputError, match=f"certifies nothing with the bound 'clopper-pearson'.*give at least {tried}$"):
        make_rule(sigma=sigma, alpha=alpha, num_estimation=tried - 1, radii=None, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", ["geometric", "beta"])
@pytest.mark.parametrize("level", ["image", "family"])
def test_the_fewest_votes_of_a_sequential_rule_are_those_of_trying(bound: str, level: str) -> None:
    given = {
        "sigma": 0.25, "method": "sequential", "bound": bound, "alpha": 0.001, "level": level, "num_images": 50,
        "num_selection": 10, "futility": 0.01, "radii": None,
    }  # fmt: skip

    def allowed(number: int) -> bool:
        try:
            make_rule(**given, num_estimation=number)  # type: ignore[arg-type]
        except InputError:
            return False
        return True

    tried = next(number for number in range(1, 200) if allowed(number))
    with pytest.raises(InputError, match=f"give at least {tried}$"):
        make_rule(**given, num_estimation=1)  # type: ignore[arg-type]
    assert tried > fewest_samples(0.001)


def test_a_sigma_with_which_no_radius_is_ever_certified_is_refused() -> None:
    with pytest.raises(InputError, match="no number of votes suffices: give a larger sigma"):
        rush.certify(rush.SmoothedClassifier(square_half_space(), 1e-9, 2), (X, Y), num_estimation=100)


def test_a_family_needs_more_votes_of_each_image() -> None:
    with pytest.raises(InputError, match=r"level 3\.33333e-07 per image.*give at least 22$"):
        rush.certify(SMOOTHED, (X, Y), num_estimation=21, alpha=1e-6, level="family")
    rush.certify(SMOOTHED, (X, Y), num_estimation=22, alpha=1e-6, level="family")
    message = r"num_estimation must be at least 17 .* alpha = 0\.001, shared by 100 images"
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", ["certify.images=100", "certify.level=family", "certify.num_estimation=16"])
    load_recipe("digits", ["certify.images=100", "certify.level=family", "certify.num_estimation=17"])


def _verdict_by_votes(level: float, max_votes: int, y: int) -> int:
    """The verdict where every vote is for class 0."""

    def count(rows: list[int], number: int) -> np.ndarray:
        return np.tile([number, 0, 0], (len(rows), 1))

    return int(judge_votes(count, np.array([[100, 0, 0]]), np.array([y]), level, max_votes).verdict[0])


def _verdict_by_means(level: float, max_votes: int, y: int) -> int:
    def draw(rows: list[int], number: int) -> np.ndarray:
        return np.broadcast_to(np.eye(3)[0], (len(rows), number, 3))

    return int(judge_means(draw, draw([0], 100), np.array([y]), level, max_votes).verdict[0])


@pytest.mark.parametrize("level", [1e-3, 1e-29, 1e-31, 1e-40, 2.0**-300, 1e-140])
def test_the_fewest_draws_of_a_verdict_are_those_of_trying(level: float) -> None:
    for decision, verdict_of in ((None, _verdict_by_votes), ("vote", _verdict_by_votes), ("mean", _verdict_by_means)):
        fewest = fewest_draws(level, decision)  # type: ignore[arg-type]
        assert fewest == next(n for n in range(100, 600) if verdict_of(level, n, 0) != UNDECIDED)
        assert verdict_of(level, fewest, 0) == HELD
        assert verdict_of(level, fewest, 1) == BROKEN
    assert fewest_draws(level, "single") == max(100, fewest_votes(level))


def test_the_looks_share_the_level_of_a_verdict() -> None:
    """At 101 votes there are two looks, at 401 three."""
    assert fewest_draws(2.0**-100 * 1.001) == 100
    assert fewest_draws(2.0**-100 * 0.999) == 102
    assert len(looks(102)) == 2


@pytest.mark.parametrize("decision", [None, "vote", "mean", "single"])
def test_verdicts_whose_level_cannot_be_reached_are_refused(decision: str | None) -> None:
    model = SMOOTHED if decision is None else NoisyHalfSpace(torch.full((1, 2, 2), 0.5), -1.0, 0.1)
    given = {"decision": decision, "alpha": TINY, "max_votes": 100}
    least = {None: 134, "vote": 134, "mean": 138, "single": 133}[decision]
    for call in (
        lambda: rush.attack(model, (X, Y), THREAT, "none", **given),  # type: ignore[arg-type]
        lambda: verdict(model, (X, Y), X, THREAT, **given),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=rf"level 1e-40 with max_votes = 100, .* give at least {least}, or"):
            call()
    verdict(model, (X, Y), X, THREAT, **{**given, "max_votes": least})  # type: ignore[arg-type]


def test_a_deterministic_network_needs_no_votes() -> None:
    rush.attack(square_half_space(), (X, Y), THREAT, "none", alpha=TINY, max_votes=100)


def test_a_suite_shares_the_level_among_its_attackers() -> None:
    shares = len(worst_case("random", 2).plans)
    alpha = 2.0**-100 * 1.001  # just enough for a single attacker
    rush.attack(SMOOTHED, (X, Y), THREAT, "none", alpha=alpha, max_votes=100)
    with pytest.raises(InputError, match=rf"shared by {shares} verdicts\) with max_votes = 100, .* give at least 104"):
        rush.attack(SMOOTHED, (X, Y), THREAT, "worst-case", alpha=alpha, max_votes=100)
    assert fewest_draws(alpha / shares) == 104


def test_an_audit_and_a_ladder_are_refused_before_their_first_attack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Evaluation, "candidates", lambda *_, **__: pytest.fail("an attack was begun"))
    with pytest.raises(InputError, match="no verdict can be given at the level"):
        audit(SMOOTHED, (X, Y), THREAT, alpha=2.0**-100 * 1.001, max_votes=100)
    np.savez(tmp_path / "images.npz", images=np.uint8(255 * X), labels=Y)
    external = ExternalEvaluation(f"{__name__}:SMOOTHED", [str(tmp_path / "images.npz")], norm="l2", epsilon="0.05")
    with pytest.raises(InputError, match="no verdict can be given at the level"):
        next(external.run_ladder(alpha=2.0**-100 * 1.001, max_votes=100))


@pytest.mark.parametrize("tolerance", [0.02, 0.05, 0.1, 0.5])
def test_the_fewest_images_that_can_hold_are_those_of_trying(tolerance: float) -> None:
    tried = next(n for n in range(1, 1000) if decide(0, n, tolerance, ()) == "holds")
    assert images_to_hold(tolerance) == tried
    assert reach_statement(tried, tolerance) is None
    assert f"{tried - 1} images can show `overestimated`, but not `holds`" in str(reach_statement(tried - 1, tolerance))
    assert decide(1, 1, tolerance, ()) == "overestimated"  # which any number of images can show


def test_a_tolerance_that_no_number_of_images_can_show_says_so() -> None:
    assert images_to_hold(1e-9) is None
    assert "no number of them can" in str(reach_statement(10**6, 1e-9))


def test_an_audit_says_that_it_cannot_hold() -> None:
    report = audit(square_half_space(), (X, Y), THREAT)
    statement = "3 images can show `overestimated`, but not `holds` at tolerance 0.05"
    assert any(line.startswith(statement) for line in report.summary())
    assert not any("but not `holds`" in line for line in replace(report, images=59).summary())


def test_predict_on_the_command_line_names_the_least_number(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "0.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    text = refusal(call("predict", tiny_run, file, "--num-samples", 10))
    assert "num_samples = 10 cannot decide at alpha = 0.001" in text
    assert text.endswith("give at least 12")
    assert call("predict", tiny_run, file, "--num-samples", 12).returncode == 0
