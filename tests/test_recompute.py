"""Other rules for stored votes: the same as certifying afresh where that is valid, refused where it is not."""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from certifying import METHODS, SIGMA, assert_same, certified, pixel_images, pixel_vote
from commands import Call, refusal
from rush.certification.certificates import UNKNOWN, Certificates, join_certificates
from rush.certification.certify import certify_each
from rush.certification.recertify import recompute
from rush.certification.sequential import CERTIFIED, GIVEN_UP, UNDECIDED
from rush.data.checks import labelled_pixels
from rush.errors import InputError
from rush.records.certificates import read_certificates, write_certificates
from rush.smoothing.classifier import ABSTAIN
from stored import rule_of, stored_certificates

X, Y = pixel_images(40)
RADII = tuple(0.05 * step for step in range(10))


def _fresh(**changes: Any) -> Certificates:
    """Certified anew, under any rule."""
    pixels = labelled_pixels((X, Y), 4)
    rule = rule_of(**{"sigma": SIGMA, "num_images": 40, "num_selection": 30, "num_estimation": 1230, **changes})
    result = dict(certify_each(pixel_vote(), pixels, rule, 3, list(range(40))))
    return join_certificates([result[position] for position in range(40)])


@pytest.fixture(scope="module")
def fixed() -> Certificates:
    return certified("clopper-pearson", (X, Y))


@pytest.fixture(scope="module")
def sequential() -> Certificates:
    return certified("sequential", (X, Y))


def _assert_like_fresh(result: Certificates, fresh: Certificates) -> None:
    """The same; counts as far as they are known, those of the selected class at least."""
    assert_same(result, fresh, but="counts")
    known = result.counts != UNKNOWN
    np.testing.assert_array_equal(result.counts[known], fresh.counts[known])
    assert known[np.arange(len(result)), result.selected].all()


@pytest.mark.parametrize(
    "changes", [{}, {"radii": (0.0, 0.1, 0.3)}, {"level": "family"}, {"num_estimation": 400, "alpha": 0.05}]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_rule_gives_the_same(method: str, changes: dict[str, Any]) -> None:
    before = certified(method, (X, Y), **changes)
    assert_same(recompute(before), before)
    rule = asdict(before.rule)
    named = {name: rule[name] for name in ("alpha", "bound", "num_estimation", "radii", "level", "futility")}
    assert_same(recompute(before, **named), before)


@pytest.mark.parametrize("alpha", [1e-9, 0.01, 0.2])
@pytest.mark.parametrize("radii", [None, (0.05, 0.2)])
def test_another_level_for_a_fixed_number_is_that_of_certifying_afresh(
    fixed: Certificates, alpha: float, radii: tuple[float, ...] | None
) -> None:
    result = recompute(fixed, alpha=alpha, radii=radii)
    assert_same(result, certified("clopper-pearson", (X, Y), alpha=alpha, radii=radii))
    assert (result.radius != fixed.radius).any()


def test_a_radius_of_the_grid_that_is_the_bounds_own_is_certified(fixed: Certificates) -> None:
    radii = sorted(set(fixed.radius.tolist()) - {0.0})
    result = recompute(fixed, radii=radii)
    assert result.rule.radii == tuple(radii)
    np.testing.assert_array_equal(result.radius, fixed.radius)
    above = recompute(fixed, radii=[radius + 1e-6 for radius in radii])
    assert (above.radius[fixed.radius > 0] < fixed.radius[fixed.radius > 0]).all()


@pytest.mark.parametrize("num_estimation", [100, 700, 1200])
@pytest.mark.parametrize("bound", ["clopper-pearson", "geometric", "beta"])
def test_the_first_votes_are_a_shorter_run(fixed: Certificates, bound: str, num_estimation: int) -> None:
    result = recompute(fixed, bound=bound, num_estimation=num_estimation)
    method = "clopper-pearson" if bound == "clopper-pearson" else "sequential"
    fresh = _fresh(method=method, bound=bound, num_estimation=num_estimation)
    _assert_like_fresh(result, fresh)
    assert result.num_samples.max() <= 30 + num_estimation
    others = np.ones_like(result.counts, bool)
    others[np.arange(40), result.selected] = False
    assert (result.counts[others] == UNKNOWN).all()  # blocks hold the votes for the selected class alone


@pytest.mark.parametrize(
    "changes", [{}, {"alpha": 0.05}, {"radii": (0.1, 0.3)}, {"futility": 0.2}, {"level": "family"}]
)
@pytest.mark.parametrize("bound", ["geometric", "beta"])
def test_anytime_valid_bounds_on_a_fixed_number_are_a_sequential_run(
    fixed: Certificates, bound: str, changes: dict[str, Any]
) -> None:
    result = recompute(fixed, bound=bound, **changes)
    fresh = _fresh(method="sequential", bound=bound, **changes)
    _assert_like_fresh(result, fresh)
    assert result.rule.method == "sequential"
    assert result.num_samples.mean() < 0.95 * fixed.num_samples.mean()
    assert len(set(result.radius.tolist())) >= 3


def test_a_sequential_run_under_a_stricter_rule_is_open_where_its_votes_end(sequential: Certificates) -> None:
    """Nothing is certified that a fresh run, whose votes go on, does not certify too."""
    result = recompute(sequential, alpha=1e-6)
    fresh = certified("sequential", (X, Y), alpha=1e-6)
    assert result.rule == fresh.rule
    assert (result.num_samples <= sequential.num_samples).all()
    assert (result.radius <= fresh.radius).all()
    ended = (result.outcome == UNDECIDED) & (result.num_samples < 1260)
    assert ended.sum() >= 3
    assert (result.num_samples == sequential.num_samples)[ended].all()
    decided = np.flatnonzero(~ended & (fresh.num_samples <= sequential.num_samples)).tolist()
    assert len(decided) >= 3
    _assert_like_fresh(result.select(decided), fresh.select(decided))


def test_a_sequential_run_under_a_looser_rule_stops_sooner(sequential: Certificates) -> None:
    radii = sequential.rule.radii
    result, fresh = recompute(sequential, alpha=0.05), certified("sequential", (X, Y), alpha=0.05, radii=radii)
    assert (result.num_samples <= sequential.num_samples).all()
    assert (result.num_samples < sequential.num_samples).any()
    assert {CERTIFIED, GIVEN_UP} <= set(fresh.outcome.tolist())
    alike = np.flatnonzero(fresh.num_samples <= sequential.num_samples).tolist()
    assert len(alike) > 25
    _assert_like_fresh(result.select(alike), fresh.select(alike))


def test_a_number_fixed_beforehand_is_not_claimed_for_a_sequential_run(
    fixed: Certificates, sequential: Certificates
) -> None:
    text = "come from a sequential run: .* fixed beforehand; give an anytime-valid bound .* certify again with method"
    with pytest.raises(InputError, match=text):
        recompute(sequential, bound="clopper-pearson")
    with pytest.raises(InputError, match=text):  # nor for one that was made sequential afterwards
        recompute(recompute(fixed, bound="geometric"), bound="clopper-pearson")
    assert recompute(sequential, bound="beta").rule.bound == "beta"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_estimation": 1231}, "num_estimation = 1231 exceeds the 1230 votes that this run could draw"),
        ({"num_estimation": 1300}, "num_estimation = 1300 exceeds the 1230 votes .* certify again to draw more"),
        ({"num_estimation": 1229}, "stored by blocks of 100, .* must be a multiple of it, got 1229"),
        ({"num_estimation": 150}, "must be a multiple of it, got 150"),
        ({"num_estimation": 0}, "num_estimation must be an integer >= 1, got 0"),
        ({"num_estimation": -100}, "num_estimation must be an integer >= 1, got -100"),
        ({"num_estimation": 500.0}, r"num_estimation = 500\.0"),
        ({"alpha": 0.5}, r"alpha must lie in \(0, 0\.5\), got 0\.5"),
        ({"bound": "wald"}, "unknown bound of method 'sequential' 'wald'; allowed: geometric, beta"),
        ({"level": "run"}, "unknown level 'run'; allowed: image, family"),
        ({"radii": (0.25, 3.0)}, "radius 3 cannot be certified with num_estimation = 1230"),
        ({"radii": ()}, "radii is empty"),
        ({"futility": 0.0}, r"futility must lie in \(0, 0\.5\), got 0\.0"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_the_votes_do_not_hold_is_refused(method: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        recompute(certified(method, (X[:2], Y[:2])), **changes)


@pytest.mark.parametrize("method", METHODS)
def test_the_old_grid_is_kept_as_far_as_the_new_rule_reaches(method: str) -> None:
    grid = (0.0, 0.2, 0.4, 0.6)
    before = certified(method, (X, Y), radii=grid, alpha=0.01)
    assert recompute(before, alpha=0.001).rule.radii == grid
    stricter = recompute(before, alpha=1e-12)
    assert stricter.rule.radii is not None
    assert stricter.rule.radii == grid[: len(stricter.rule.radii)] != grid
    shorter = recompute(before, num_estimation=100)
    assert shorter.rule.radii == grid[: len(shorter.rule.radii or ())] != grid
    assert shorter.radius.max() <= max(shorter.rule.radii or ())


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_of_which_nothing_is_within_reach_is_refused(method: str) -> None:
    before = certified(method, (X[:3], Y[:3]), radii=(0.6,), alpha=0.01)
    with pytest.raises(InputError, match=r"no radius of the old grid \[0\.6\] is within reach of the new rule"):
        recompute(before, alpha=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_family_is_all_images_of_the_run_also_where_some_are_chosen(method: str) -> None:
    before = certified(method, (X, Y))
    family = recompute(before, level="family", radii=RADII)
    single = recompute(before, alpha=0.001 / 40, radii=RADII)
    assert_same(family, single, but="rule")
    assert (family.radius < recompute(before, radii=RADII).radius).any()
    assert family.rule.statement == "all 40 certificates hold together with probability at least 0.999"
    chosen = recompute(before.select([30, 20]), level="family", radii=RADII)
    assert_same(chosen, family, [30, 20])


def test_no_certificate_comes_of_recomputing_that_its_votes_do_not_carry(fixed: Certificates) -> None:
    """Radii shrink as the level does, in one order, down to none at all."""
    radii = [recompute(fixed, alpha=alpha).radius for alpha in (0.3, 1e-2, 1e-5, 1e-20, 1e-100)]
    for looser, stricter in pairwise(radii):
        assert (stricter <= looser).all()
    assert (recompute(fixed, alpha=1e-300).prediction == ABSTAIN).sum() > (fixed.prediction == ABSTAIN).sum()


# On the command line


@pytest.fixture
def table(fixed: Certificates, tmp_path: Path) -> Path:
    write_certificates(tmp_path / "run.tsv", fixed, list(range(100, 140)))
    return tmp_path / "run.tsv"


def test_the_command_shows_the_new_rule_and_writes_its_certificates(
    call: Call, table: Path, fixed: Certificates, tmp_path: Path
) -> None:
    before = table.read_bytes()
    done = call(
        "certify", table, "--recompute", "--bound", "geometric", "--alpha", 0.01, "--num-estimation", 1000,
        "--radii", 0.25, "--radii", 0.125, "--level", "family", "--out", tmp_path / "new.tsv",
    )  # fmt: skip
    assert done.returncode == 0, done
    expected = recompute(fixed, bound="geometric", alpha=0.01, num_estimation=1000, radii=(0.25, 0.125), level="family")
    result = read_certificates(tmp_path / "new.tsv")
    assert result is not None
    assert result[0] == list(range(100, 140))
    assert_same(result[1], expected)
    assert table.read_bytes() == before
    for text in (
        "all 40 certificates hold together with probability at least 0.99",
        "sequential, geometric",
        f"{expected.num_samples.mean():,.0f} of at most 1,030",
        "grid ACR",
        f"{expected.acr:.4f}",
    ):
        assert text in done.stdout, text
    for radius in (0.125, 0.25):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(f"l2 radius {radius} "))
        assert f"{100 * expected.accuracy(radius):.1f} %" in line
        lower = float(line.split()[-2])  # rounded down
        assert lower <= 100 * expected.accuracy_lower(radius) < lower + 0.1


def test_the_command_reads_a_run_folder_and_leaves_it_as_it_is(call: Call, tiny_run: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_run.rglob("*")}
    done = call("certify", tiny_run, "--recompute", "--alpha", 0.05)
    assert done.returncode == 0, done
    assert "each certificate by itself is false with probability at most 0.05" in done.stdout
    result = read_certificates(tiny_run / "certificates.tsv")
    assert result is not None
    assert f"{recompute(result[1], alpha=0.05).acr:.4f}" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in tiny_run.rglob("*")} == before


def test_the_command_names_the_norm_of_the_radii(call: Call, tmp_path: Path) -> None:
    certificates = stored_certificates(rule_of(noise="laplace"), [1000, 900], [0, 1], [0, 1])
    write_certificates(tmp_path / "l1.tsv", certificates, [0, 1])
    done = call("certify", tmp_path / "l1.tsv", "--recompute")
    assert done.returncode == 0, done
    assert "l1 radius 0.25 " in done.stdout
    assert "l2" not in done.stdout


@pytest.mark.parametrize(
    "options",
    [("--alpha", 0.01), ("--bound", "beta"), ("--num-estimation", 100), ("--radii", 0.1), ("--level", "family")],
)
def test_options_of_recomputing_are_refused_without_it(call: Call, tiny_run: Path, options: tuple[object, ...]) -> None:
    message = refusal(call("certify", tiny_run, *options))
    assert message.startswith(
        f"rush: {options[0]} belongs to --recompute or --model; to certify a run with other values give --set certify."
    )
    assert "--out belongs to --recompute or --model" in refusal(call("certify", tiny_run, "--out", "new.tsv"))


def test_what_cannot_be_recomputed_is_told_in_a_line(call: Call, table: Path, tmp_path: Path) -> None:
    before = table.read_bytes()
    assert "exists; give another file to --out" in refusal(call("certify", table, "--recompute", "--out", table))
    assert table.read_bytes() == before
    message = refusal(call("certify", tmp_path / "none.tsv", "--recompute"))
    assert "none.tsv is missing or holds no certificates; run `rush certify` first" in message
    assert "certificates.tsv is missing" in refusal(call("certify", tmp_path, "--recompute"))
    assert "multiple of it, got 150" in refusal(call("certify", table, "--recompute", "--num-estimation", 150))
    new = tmp_path / "new.tsv"
    assert "unknown bound" in refusal(call("certify", table, "--recompute", "--bound", "wald", "--out", new))
    assert not new.exists()
