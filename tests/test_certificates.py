"""What certificates say: the table that holds them, to the bit, and the statements that they make of a classifier."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from certifying import METHODS, SIGMA, assert_same, certified, pixel_images
from rush.binomial import lower_bound
from rush.certification.bounds import certified_radius, certify_votes
from rush.certification.certificates import UNKNOWN, Certificates, join_certificates
from rush.certification.recompute import recompute
from rush.certification.rules import Rule, make_rule
from rush.certification.sequential import CERTIFIED, NOT_CERTIFIABLE, UNDECIDED
from rush.certification.table import (
    COLUMNS,
    append_certificates,
    drop_unfinished_line,
    read_certificates,
    write_certificates,
)
from rush.errors import InputError, RunError
from rush.smoothing import ABSTAIN

TAIL = 1e-6


# The table


@pytest.fixture(scope="module", params=METHODS)
def certificates(request: pytest.FixtureRequest) -> Certificates:
    """Nine, from abstained to certified far out."""
    x, y = pixel_images(40)
    return certified(request.param, (x[::5][:9], y[::5][:9]))


@pytest.fixture
def written(certificates: Certificates, tmp_path: Path) -> tuple[Path, Certificates]:
    path = tmp_path / "certificates.tsv"
    append_certificates(path, certificates.select(range(5)), range(10, 15))
    append_certificates(path, certificates.select(range(5, 8)), range(15, 18))
    return path, certificates.select(range(8))


def _read(path: Path) -> Certificates:
    found = read_certificates(path)
    assert found is not None
    return found[1]


def test_the_table_reads_back_to_the_same_bits(written: tuple[Path, Certificates]) -> None:
    path, certificates = written
    found = read_certificates(path)
    assert found is not None
    assert found[0] == list(range(10, 18))
    assert_same(found[1], certificates)
    np.testing.assert_allclose(found[1].seconds, certificates.seconds, atol=5e-5)
    assert 0 < (found[1].radius > 0).sum() < 8


def test_a_table_written_at_once_is_the_one_appended_to(written: tuple[Path, Certificates], tmp_path: Path) -> None:
    path, certificates = written
    write_certificates(tmp_path / "at_once.tsv", certificates, range(10, 18))
    assert (tmp_path / "at_once.tsv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"radii": (0.125, 0.3000001)}, {"level": "family"}, {"alpha": 0.01, "futility": 0.1}, {"num_estimation": 700}],
)
def test_any_rule_reads_back(certificates: Certificates, changes: dict[str, Any], tmp_path: Path) -> None:
    """Also where the counts of the other classes are not known."""
    changed = recompute(certificates, **changes)
    write_certificates(tmp_path / "table.tsv", changed, range(len(changed)))
    assert_same(_read(tmp_path / "table.tsv"), changed)
    assert (changed.counts == UNKNOWN).any() or "num_estimation" not in changes


def test_the_table_opens_with_the_columns_of_the_field(written: tuple[Path, Certificates]) -> None:
    path, certificates = written
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert lines[0][:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    for row, fields_of_row in enumerate(lines[1:]):
        index, label, predict, radius, correct, _ = fields_of_row[:6]
        assert (int(index), int(label)) == (10 + row, certificates.labels[row])
        assert int(predict) == certificates.prediction[row]
        assert int(correct) == int(certificates.prediction[row] == certificates.labels[row])
        assert (
            Decimal(radius) <= Decimal(float(SIGMA * stats.norm.ppf(certificates.p_lower[row]))) or radius == "0.000000"
        )


@pytest.mark.parametrize("method", METHODS)
def test_no_radius_is_written_above_the_truth(method: str, tmp_path: Path) -> None:
    """The text, where published logs with three significant digits round up: for every line Phi(text / sigma) is at
    most ``p_lower``, in 40 digits."""
    certificates = certified(method, pixel_images(200), num_estimation=300, radii=None)
    write_certificates(tmp_path / "table.tsv", certificates, range(200))
    seen = 0
    with mpmath.workdps(40):
        for line in (tmp_path / "table.tsv").read_text().splitlines()[1:]:
            row = dict(zip(COLUMNS, line.split("\t"), strict=True))
            if int(row["predict"]) != ABSTAIN:
                exact = mpmath.ncdf(mpmath.mpf(row["radius"]) / mpmath.mpf(SIGMA))
                assert exact <= mpmath.mpf(float(row["p_lower"])) < exact + 1e-5
                seen += 1
    assert seen > 100


def test_a_line_that_a_kill_left_unfinished_is_dropped_and_written_again(written: tuple[Path, Certificates]) -> None:
    path, certificates = written
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for left in (1, 7, len(whole) - last - 1):
        path.write_bytes(whole[: last + left])
        drop_unfinished_line(path)
        assert path.read_bytes() == whole[:last]
    assert _read(path).ids == certificates.ids[:7]
    append_certificates(path, certificates.select([7]), [17])
    assert path.read_bytes() == whole
    drop_unfinished_line(path)
    assert path.read_bytes() == whole


def test_a_missing_or_empty_table_holds_no_certificates(tmp_path: Path, written: tuple[Path, Certificates]) -> None:
    assert read_certificates(tmp_path / "none.tsv") is None
    drop_unfinished_line(tmp_path / "none.tsv")
    path, _ = written
    header = path.read_text().splitlines()[0]
    for text in ("", header[:9], header + "\n"):
        path.write_text(text)
        drop_unfinished_line(path)
        assert read_certificates(path) is None


def _change(path: Path, line: int, column: str, change: Callable[[str], str]) -> None:
    lines = path.read_text().splitlines()
    cells = lines[line - 1].split("\t")
    cells[COLUMNS.index(column)] = change(cells[COLUMNS.index(column)])
    lines[line - 1] = "\t".join(cells)
    path.write_text("\n".join(lines) + "\n")


def _with_field(**changed: object) -> Callable[[str], str]:
    return lambda rule: json.dumps({**json.loads(rule), **changed})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("idx", "one"),
        ("label", "x"),
        ("predict", "1.5"),
        ("radius", "0,25"),
        ("time", "soon"),
        ("p_lower", ""),
        ("num_samples", "many"),
        ("num_samples", "30"),
        ("num_samples", "99999"),
        ("outcome", "perhaps"),
        ("counts", "1,2,x"),
        ("counts", "1,2,3"),
        ("counts", "150,0,0,1"),
        ("selection", "30"),
        ("selection", "30,0,0,zero"),
        ("selection", "29,0,0,0"),
        ("blocks", "not base64!"),
        ("blocks", "AAAA"),
        ("blocks", "eJwDAAAAAAE="),
        ("rule", ""),
        ("rule", "null"),
        ("rule", "{}"),
        ("rule", _with_field(extra=1)),
        ("rule", _with_field(sigma="0.25")),
        ("rule", _with_field(sigma=-0.25)),
        ("rule", _with_field(alpha=0)),
        ("rule", _with_field(level="run")),
        ("rule", _with_field(method="wald")),
        ("rule", _with_field(num_images=0)),
        ("rule", _with_field(num_estimation=1.5)),
        ("rule", _with_field(num_selection=31)),
        ("rule", _with_field(radii=0.25)),
        ("rule", _with_field(radii=["0.25"])),
        ("rule", _with_field(radii=[9.0])),
    ],
)
def test_a_damaged_field_is_named_by_its_line(
    written: tuple[Path, Certificates], column: str, value: str | Callable[[str], str]
) -> None:
    path, _ = written
    _change(path, 4, column, value if callable(value) else lambda _: str(value))
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}, line 4: .*certify again"):
        read_certificates(path)


def test_blocks_of_other_lengths_than_the_votes_are_refused(written: tuple[Path, Certificates]) -> None:
    """Also where they add up."""

    def longer(text: str) -> str:
        return base64.b64encode(zlib.compress(zlib.decompress(base64.b64decode(text)) + b"\0")).decode()

    path, _ = written
    _change(path, 5, "blocks", longer)
    with pytest.raises(RunError, match="line 5: its blocks do not add up to its counts"):
        read_certificates(path)


def test_two_rules_in_one_table_are_refused(written: tuple[Path, Certificates]) -> None:
    path, _ = written
    _change(path, 6, "rule", _with_field(alpha=0.002))
    with pytest.raises(RunError, match="line 6: its rule is not that of line 2; certify again into another folder"):
        read_certificates(path)


def test_a_line_with_too_few_fields_a_foreign_header_and_a_shortened_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    write_certificates(path, certified("clopper-pearson", pixel_images(4)), range(4))
    text = path.read_text()
    lines = text.splitlines()
    path.write_text("\n".join([*lines[:3], "3\t1\t1", *lines[4:]]) + "\n")
    with pytest.raises(RunError, match="line 4: 3 fields instead of 15; move the file away and certify again"):
        read_certificates(path)
    path.write_text("idx\tlabel\n1\t2\n")
    with pytest.raises(RunError, match="line 1: expected the columns idx label predict"):
        read_certificates(path)
    path.write_text(text)
    for line in range(2, 6):
        _change(path, line, "rule", _with_field(num_estimation=1300))
    with pytest.raises(RunError, match="line 2: it has 1230 votes instead of num_estimation = 1300"):
        read_certificates(path)


# What they say


def _crafted(
    prediction: NDArray[np.int64], radius: NDArray[np.float64], labels: NDArray[Any], **rule: Any
) -> Certificates:
    """Certificates without votes behind them."""
    n = len(labels)
    given = {
        "sigma": SIGMA, "method": "clopper-pearson", "alpha": 0.001, "level": "image", "num_images": n,
        "num_selection": 100, "num_estimation": 10_000, "radii": None, "futility": 0.01,
    }  # fmt: skip
    return Certificates(
        prediction=prediction.astype(np.int64),
        radius=radius,
        p_lower=np.zeros(n),
        num_samples=np.full(n, 10_100),
        counts=np.zeros((n, 2), np.int64),
        blocks=tuple(np.zeros(1, np.uint8) for _ in range(n)),
        selection=np.zeros((n, 2), np.int64),
        outcome=np.full(n, UNDECIDED, np.uint8),
        seconds=np.zeros(n),
        labels=labels.astype(np.int64),
        ids=tuple(map(str, range(n))),
        rule=make_rule(**{**given, **rule}),
    )


def _right(correct: int, total: int, radius: float = 0.3, **rule: Any) -> Certificates:
    """So many of ``total`` certified with the label at ``radius``, the others abstained."""
    right = np.arange(total) < correct
    return _crafted(np.where(right, 1, ABSTAIN), np.where(right, radius, 0.0), np.ones(total), **rule)


def test_the_lower_bound_of_the_accuracy_is_the_formula_at_a_worked_example() -> None:
    """90 of 100 at alpha = 0.001 and 95 %: the 5 % quantile of Beta(90, 11) is 0.836, and (0.836 - 0.001) / 0.999."""
    share = stats.beta.ppf(0.05, 90, 11)
    assert share == pytest.approx(0.8363, abs=1e-4)
    found = _right(90, 100)
    assert found.accuracy_lower() == pytest.approx((share - 0.001) / 0.999, abs=1e-9)
    assert found.accuracy_lower(0.3) == found.accuracy_lower()
    assert found.accuracy_lower(0.300001) == 0
    stricter = (stats.beta.ppf(1e-6, 90, 11) - 0.001) / 0.999
    assert found.accuracy_lower(confidence=1 - 1e-6) == pytest.approx(stricter, abs=1e-9)
    family = _right(90, 100, level="family")
    assert family.accuracy_lower() == pytest.approx((share - 0.00001) / 0.99999, abs=1e-9)


def test_the_lower_bound_of_the_accuracy_falls_to_zero_and_not_below() -> None:
    assert _right(0, 100).accuracy_lower() == 0
    assert _right(1, 1000, alpha=0.01).accuracy_lower() == 0  # fewer than false certificates alone explain
    assert 0.04 < _right(1, 1).accuracy_lower() < 0.05  # one image is certified in 5 % of the cases where 5 % are
    assert _right(100, 100).accuracy_lower() == pytest.approx((0.05**0.01 - 0.001) / 0.999, abs=1e-9)
    bounds = [_right(count, 50).accuracy_lower() for count in range(51)]
    assert bounds == sorted(bounds)


def test_wrong_classes_and_smaller_radii_count_for_nothing() -> None:
    found = _crafted(np.array([1, 0, 1, ABSTAIN]), np.array([0.3, 0.4, 0.1, 0.0]), np.ones(4))
    assert found.accuracy(0.3) == 0.25
    assert found.accuracy_lower(0.3) == _right(1, 4).accuracy_lower()
    assert found.accuracy() == 0.5
    assert found.accuracy_lower() == _right(2, 4).accuracy_lower()
    assert found.acr == pytest.approx(0.1)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match=rf"confidence must lie in \(0, 1\), got {confidence!r}"):
        _right(5, 10).accuracy_lower(confidence=confidence)


def test_an_image_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"an image \(id\) is there twice; the bound needs independent images"):
        _right(5, 10).select([0, 1, 1]).accuracy_lower()
    assert _right(5, 10).select([0, 1, 2]).accuracy_lower() > 0


def _drawn_accuracies(level: float, runs: int, images: int, seed: int) -> tuple[float, NDArray[np.float64]]:
    """True certified accuracy at the radius in question, and its bound at 95 % in each of ``runs`` runs on ``images``
    images drawn anew: half are far inside; half lie a hair nearer to the plane than the radius, so that each is
    certified, falsely, with a probability of all but ``level``."""
    draws, votes = np.random.default_rng(seed), 100
    fewest = int(np.argmax(lower_bound(np.arange(votes + 1), np.full(votes + 1, votes), level) > 0.8))
    bound = float(lower_bound(fewest, votes, level))
    radius, p_hard = float(certified_radius(bound, SIGMA)), bound - 1e-9
    assert stats.binom.sf(fewest - 1, votes, p_hard) == pytest.approx(level, rel=1e-5)
    found = []
    for _ in range(runs):
        true = draws.random(images) < 0.5
        successes = draws.binomial(votes, np.where(true, 0.9999, p_hard))
        ones = np.ones(images, np.int64)
        own = certify_votes(ones, successes, np.full(images, votes), SIGMA, level)
        part = _crafted(own.prediction, own.radius, ones, alpha=level, num_estimation=votes)
        found.append(part.accuracy_lower(radius))
    return 0.5, np.array(found)


def test_the_lower_bound_of_the_accuracy_holds_over_the_draw_of_images_and_noise() -> None:
    """2,000 runs of 400 images; odds of failing by chance: 1e-6 on each side.

    A false certificate of every 20 hard images lifts the share by half of its spread: without the correction the bound
    would fail in 26 % of the runs. That it fails in 3 % and more shows that the test is about the right number.
    """
    truth, bounds = _drawn_accuracies(0.05, 2000, 400, seed=0)
    failed = int((bounds > truth).sum())
    assert stats.binom.isf(1 - TAIL, 2000, 0.045) <= failed <= stats.binom.isf(TAIL, 2000, 0.05)
    uncorrected = int((bounds * 0.95 + 0.05 > truth).sum())
    assert uncorrected > stats.binom.isf(TAIL, 2000, 0.05)


def test_decisions_at_a_radius() -> None:
    """What was given up is the grid's next radius, and with it all larger ones; nothing in between."""
    found = replace(
        _crafted(
            np.array([1, 0, 1, ABSTAIN, ABSTAIN]),
            np.array([0.5, 0.25, 0.0, 0.0, 0.0]),
            np.ones(5),
            method="sequential",
            radii=(0.0, 0.25, 0.5),
        ),
        outcome=np.array([CERTIFIED, NOT_CERTIFIABLE, UNDECIDED, NOT_CERTIFIABLE, UNDECIDED], np.uint8),
    )
    held, given_up, open_ = "certified", "not certifiable", "undecided"
    assert found.decision(0.0).tolist() == [held, held, held, given_up, open_]
    assert found.decision(0.25).tolist() == [held, held, open_, given_up, open_]
    assert found.decision(0.3).tolist() == [held, open_, open_, given_up, open_]
    assert found.decision(0.5).tolist() == [held, given_up, open_, given_up, open_]
    assert found.decision(0.6).tolist() == [open_, given_up, open_, given_up, open_]


def test_decisions_follow_from_the_votes(certificates: Certificates) -> None:
    """A fixed number of samples gives nothing up."""
    for radius in (0.0, 0.125, 0.25, 0.5):
        decided = certificates.decision(radius)
        held = (certificates.prediction != ABSTAIN) & (certificates.radius >= radius)
        np.testing.assert_array_equal(decided == "certified", held)
        if certificates.rule.method == "clopper-pearson":
            assert set(decided) <= {"certified", "undecided"}
    if certificates.rule.method == "sequential":
        assert "not certifiable" in certificates.decision(0.5)


def test_chosen_and_joined_certificates_keep_rule_and_order(certificates: Certificates) -> None:
    rows = [4, 0, 7]
    chosen = certificates.select(rows)
    assert chosen.ids == tuple(certificates.ids[row] for row in rows)
    assert chosen.rule == certificates.rule
    assert len(chosen) == 3
    for name in ("prediction", "radius", "labels", "selection", "counts"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(certificates, name)[rows])
    parts = [certificates.select(rows) for rows in ([0, 1], [2], list(range(3, len(certificates))))]
    assert_same(join_certificates(parts), certificates)
    np.testing.assert_array_equal(certificates.select(np.array([1])).selection, certificates.selection[[1]])


def test_certificates_of_two_rules_are_not_joined(certificates: Certificates) -> None:
    other = replace(certificates, rule=replace(certificates.rule, alpha=0.002))
    with pytest.raises(InputError, match="certificates of different rules cannot be joined"):
        join_certificates([certificates, other])


def test_the_average_radius_over_a_grid_is_called_so(certificates: Certificates) -> None:
    assert certificates.acr_name == ("ACR" if certificates.rule.method == "clopper-pearson" else "grid ACR")
    gridded = recompute(certificates, radii=(0.125,))
    assert gridded.acr_name == "grid ACR"
    assert set(gridded.radius.tolist()) <= {0.0, 0.125}
    assert gridded.acr <= certificates.acr


def test_numbers_of_the_rule_speak_for_the_table(certificates: Certificates) -> None:
    rule = certificates.rule
    assert isinstance(rule, Rule)
    assert (certificates.sigma, certificates.alpha) == (rule.sigma, rule.alpha) == (SIGMA, 0.001)
    assert (certificates.num_selection, certificates.num_estimation) == (30, 1230)
    assert certificates.largest_radius == rule.largest_radius >= certificates.radius.max()
    np.testing.assert_array_equal(certificates.selected, certificates.selection.argmax(1))
