"""Certificates through the whole pipeline, judged by classifiers whose probabilities are known exactly."""

import re
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import rush
from exact_models import HalfSpace, Recorder, bins_with, square_half_space, square_images
from rush.certification import certify as certify_module
from rush.certification.bounds import certify_counts
from rush.certification.certify import Certificates, certify_groups, join_certificates
from rush.certification.table import COLUMNS, append_certificates, drop_unfinished_line, read_certificates
from rush.data.sources import load_images
from rush.engine.precision import Execution
from rush.errors import InputError, ModelError, RunError
from rush.inputs import labelled_pixels
from rush.models.classifier import Normalize
from rush.smoothing import ABSTAIN, SmoothedClassifier

SIGMA, ALPHA, TAIL = 0.25, 0.05, 1e-6


class Coverage:
    """Certificates of ``square_half_space`` with the exact probability of the class that each one is about."""

    def __init__(self, margins: NDArray[np.float64], num_estimation: int, seed: int) -> None:
        plane, x = square_half_space(), square_images(margins, seed)
        smoothed = SmoothedClassifier(plane, SIGMA, 2, execution=Execution(tile=2000))
        labels = torch.from_numpy((margins > 0).astype(np.int64))
        self.certificates = rush.certify(smoothed, (x, labels), "clopper-pearson", 20, num_estimation, ALPHA, seed=seed)
        self.margins = plane.margins(x)
        self.probability_of_1 = plane.probability(x, SIGMA)

    def probability(self, selected: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(selected == 1, self.probability_of_1, 1 - self.probability_of_1)

    def failures(self, alpha: float = ALPHA) -> int:
        """Bounds at level ``alpha``, from the votes of the certificates, that are above the truth."""
        votes = self.certificates
        bounds = certify_counts(votes.selection, votes.counts, SIGMA, alpha)
        return int((bounds.p_lower > self.probability(votes.selection.argmax(1))).sum())


def _hard_margins(count: int, num_estimation: int) -> NDArray[np.float64]:
    """Margins whose probability is a hair below a value that the bound can take, so that it fails at its full level."""
    k = np.arange(int(0.6 * num_estimation), num_estimation + 1)
    bounds = np.asarray(stats.beta.ppf(ALPHA, k, num_estimation - k + 1))
    bounds = bounds[(bounds > 0.55) & (bounds < 0.995)]
    margins = SIGMA * stats.norm.ppf(np.resize(bounds, count) - 2e-6)
    return margins * np.where(np.arange(count) % 2, 1, -1)


@pytest.fixture(scope="module")
def coverages() -> list[Coverage]:
    """21,000 certificates."""
    sizes = ((14_000, 100), (4_000, 300), (3_000, 1_000))
    return [Coverage(_hard_margins(count, n), n, seed) for seed, (count, n) in enumerate(sizes)]


def _most_failures(total: int) -> float:
    return stats.binom.isf(TAIL, total, ALPHA)


def test_bounds_are_above_the_truth_no_more_often_than_alpha(coverages: list[Coverage]) -> None:
    """``p_lower`` of 21,000 images, whose exact failure probability is just below alpha for each.

    Odds of failing by chance: 4e-6 from above and 1e-6 from below, where too few failures would mean no power.
    """
    failed = []
    for coverage in coverages:
        certificates = coverage.certificates
        above = certificates.p_lower > coverage.probability(certificates.selection.argmax(1))
        assert int(above.sum()) <= _most_failures(len(certificates))
        failed.append(above)
    pooled = np.concatenate(failed)
    assert len(pooled) == 21_000
    assert stats.binom.isf(1 - TAIL, len(pooled), 0.9 * ALPHA) <= pooled.sum() <= _most_failures(len(pooled))


def test_radii_and_classes_are_false_no_more_often_than_alpha(coverages: list[Coverage]) -> None:
    """A certificate is false when its class is not the smoothed one's or its radius exceeds the distance to the plane;
    for that its bound must have failed. Odds of failing by chance: 1e-6."""
    failed, total = 0, 0
    for coverage in coverages:
        certificates = coverage.certificates
        right = (certificates.prediction == 1) == (coverage.margins > 0)
        certified = certificates.prediction != ABSTAIN
        false = certified & (~right | (certificates.radius > np.abs(coverage.margins)))
        assert (certificates.p_lower > coverage.probability(certificates.selection.argmax(1)))[false].all()
        assert certified.mean() > 0.8
        assert (certificates.radius[~certified] == 0).all()
        failed, total = failed + int(false.sum()), total + len(certificates)
    assert failed <= _most_failures(total)


def test_a_bound_at_twice_the_level_is_caught(coverages: list[Coverage]) -> None:
    """The same votes bounded at 2 alpha, judged by the test for alpha, over all 21,000 images. The expected number of
    failures is computed here; fewer than the limit by chance: probability < 1e-30."""
    expected, variance, failed, total = 0.0, 0.0, 0, 0
    for coverage in coverages:
        n = coverage.certificates.num_estimation
        p = np.maximum(coverage.probability_of_1, 1 - coverage.probability_of_1)
        k = np.arange(1, n + 1)
        fewest = np.searchsorted(stats.beta.ppf(2 * ALPHA, k, n - k + 1), p, side="right") + 1
        chance = np.asarray(stats.binom.sf(fewest - 1, n, p))
        assert (chance <= 2 * ALPHA).all()
        expected, variance = expected + chance.sum(), variance + (chance * (1 - chance)).sum()
        failed, total = failed + coverage.failures(2 * ALPHA), total + len(p)
    assert stats.norm.cdf((_most_failures(total) - expected) / np.sqrt(variance)) < 1e-30
    assert failed > _most_failures(total)


def test_a_class_selected_on_the_votes_that_bound_it_is_caught() -> None:
    """3,000 images at p = 1/2, where every certificate is false. 82 votes certify with probability 0.0485, so the
    pipeline passes (odds of failing: 1e-6); the larger of both counts does so with probability 0.0970, and is caught
    with probability > 1 - 1e-6."""
    coverage = Coverage(np.zeros(3000), 82, seed=9)
    votes, most = coverage.certificates, _most_failures(3000)
    assert (coverage.probability_of_1 == 0.5).all()
    assert int((votes.prediction != ABSTAIN).sum()) <= most
    one_sample = certify_counts(votes.counts, votes.counts, SIGMA, ALPHA)
    assert int((one_sample.prediction != ABSTAIN).sum()) > most


def test_selection_estimation_and_images_share_no_noise() -> None:
    recorder = Recorder(square_half_space())
    x = square_images(np.array([0.3, -0.2, 0.0]), seed=0)
    rush.certify(
        SmoothedClassifier(recorder, SIGMA, 2), (x, torch.zeros(3, dtype=torch.int64)), "clopper-pearson", 60, 90
    )
    selection, estimation = (torch.cat(recorder.inputs[i : i + 1]) for i in (0, 1))
    noise = [selection[60 * i : 60 * (i + 1)] - x[i] for i in range(3)]
    second = torch.cat([estimation[:256], torch.cat(recorder.inputs[2:])])[:270]
    noise += [second[90 * i : 90 * (i + 1)] - x[i] for i in range(3)]
    rounded = (torch.cat(noise) * 1e4).round().flatten(1)
    assert rounded.shape == (450, 4)
    assert len(rounded.unique(dim=0)) == 450


def test_the_radius_is_in_pixel_units_when_the_classifier_normalizes() -> None:
    """A half-space behind a normalization by 0.1: its plane is ten times nearer in pixels than in its own units.

    Odds of failing by chance: 1e-9 for the upper limit (alpha), far less for the lower.
    """
    normalized = nn.Sequential(Normalize([0.5], [0.1]), HalfSpace(torch.full((1, 2, 2), 0.5), 0.0)).eval()
    x = square_images(np.array([0.3]), seed=0)
    certificates = rush.certify(
        SmoothedClassifier(normalized, SIGMA, 2), (x, torch.tensor([1])), num_estimation=20_000, alpha=1e-9
    )
    assert 0.27 < certificates.radius[0] <= 0.3


def test_p_lower_is_the_level_alpha_quantile_of_the_stored_votes(coverages: list[Coverage]) -> None:
    votes = coverages[1].certificates
    count = np.take_along_axis(votes.counts, votes.selection.argmax(1)[:, None], 1)[:, 0]
    np.testing.assert_allclose(votes.p_lower, stats.beta.ppf(ALPHA, count, 300 - count + 1), rtol=1e-9)
    certified = votes.radius > 0
    np.testing.assert_allclose(
        votes.radius[certified], SIGMA * stats.norm.ppf(votes.p_lower[certified]), rtol=0, atol=1.01e-6
    )
    assert (votes.counts.sum(1) == 300).all()
    assert (votes.selection.sum(1) == 20).all()
    assert (votes.num_samples == 320).all()


def _digits(
    network: nn.Module, count: int, num_estimation: int, tile: int = 256
) -> tuple[SmoothedClassifier, Certificates]:
    smoothed = SmoothedClassifier(network, SIGMA, 10, execution=Execution(tile=tile))
    images = load_images("digits", split="test")[:count]
    return smoothed, rush.certify(smoothed, images, num_selection=30, num_estimation=num_estimation, seed=3)


def _same(first: Certificates, second: Certificates, rows: list[int] | None = None, but: tuple[str, ...] = ()) -> None:
    """Asserts that all but the times agree to the bit; ``rows`` of ``second``."""
    for field in fields(Certificates):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray) and field.name not in {"seconds", *but}:
            np.testing.assert_array_equal(one, other if rows is None else other[rows], err_msg=field.name)
            assert one.dtype == other.dtype
    assert first.ids == (second.ids if rows is None else tuple(second.ids[i] for i in rows))


@pytest.mark.parametrize("group_samples", [1, 700, 10**9])
def test_certificates_depend_on_neither_order_subset_nor_group(
    digits_network: nn.Module, monkeypatch: pytest.MonkeyPatch, group_samples: int
) -> None:
    smoothed, whole = _digits(digits_network, 12, 230)
    assert len(np.unique(whole.counts, axis=0)) == 12
    monkeypatch.setattr(certify_module, "_GROUP_SAMPLES", group_samples)
    images = load_images("digits", split="test")[:12]
    for rows in (list(range(12)), list(range(11, -1, -1)), [7], [5, 2, 9]):
        part = rush.certify(smoothed, images[np.array(rows)], num_selection=30, num_estimation=230, seed=3)
        _same(part, whole, rows)


def test_certificates_resumed_at_any_image_are_the_same(
    digits_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothed, whole = _digits(digits_network, 10, 120)
    monkeypatch.setattr(certify_module, "_GROUP_SAMPLES", 450)
    pixels = labelled_pixels(load_images("digits", split="test")[:10], 10)
    groups = certify_groups(smoothed, pixels, num_selection=30, num_estimation=120, alpha=0.001, seed=3, start=4)
    parts = list(groups)
    assert [len(part) for part in parts] == [3, 3]
    _same(join_certificates(parts), whole, list(range(4, 10)))


def test_a_certificate_follows_the_seed(digits_network: nn.Module) -> None:
    smoothed, first = _digits(digits_network, 5, 200)
    images = load_images("digits", split="test")[:5]
    _same(rush.certify(smoothed, images, num_selection=30, num_estimation=200, seed=3), first)
    other = rush.certify(smoothed, images, num_selection=30, num_estimation=200, seed=4)
    assert (other.counts != first.counts).any()


def test_more_samples_go_on_where_fewer_ended(digits_network: nn.Module) -> None:
    """The blocks of a run are the first blocks of a longer one, so that a resumed or sequential run can go on."""
    _, fewer = _digits(digits_network, 4, 200)
    _, more = _digits(digits_network, 4, 450)
    np.testing.assert_array_equal(fewer.blocks, more.blocks[:, :2])
    assert more.blocks.shape == (4, 5, 10)


def test_blocks_hold_every_vote(digits_network: nn.Module) -> None:
    _, certificates = _digits(digits_network, 6, 250)
    assert certificates.blocks.dtype == np.uint8
    np.testing.assert_array_equal(certificates.blocks.sum(1, dtype=np.int64), certificates.counts)
    np.testing.assert_array_equal(certificates.blocks.sum(2, dtype=np.int64), np.tile([100, 100, 50], (6, 1)))


def test_an_abstention_is_wrong_for_every_label_and_counts_no_radius() -> None:
    """Class 0 included, which tools that return zeros on abstention would count as right."""
    model, _ = bins_with([0.5, 0.5], SIGMA)
    x = torch.stack([torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.9), torch.full((1, 1, 1), 0.1)])
    certificates = rush.certify(SmoothedClassifier(model, SIGMA, 2), (x, torch.tensor([0, 1, 1])), num_estimation=1000)
    assert certificates.prediction.tolist() == [ABSTAIN, 1, 0]
    assert certificates.correct.tolist() == [False, True, False]
    assert certificates.radius[0] == 0
    assert certificates.accuracy() == pytest.approx(1 / 3)
    assert certificates.acr == pytest.approx(certificates.radius[1] / 3)
    assert certificates.accuracy(certificates.radius[1]) == pytest.approx(1 / 3)
    assert certificates.accuracy(certificates.radius[1] + 1e-6) == 0


def test_unanimous_votes_give_the_largest_radius_and_none_is_larger() -> None:
    model, _ = bins_with([0.5, 0.5], 0.01)
    x = torch.tensor([0.9, 0.1, 0.505]).view(3, 1, 1, 1)
    certificates = rush.certify(SmoothedClassifier(model, 0.01, 2), (x, torch.tensor([1, 0, 1])), num_estimation=700)
    assert certificates.radius[0] == certificates.radius[1] == certificates.largest_radius > certificates.radius[2]
    assert certificates.largest_radius == pytest.approx(0.01 * stats.norm.ppf(0.001 ** (1 / 700)), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "wald"}, "unknown method 'wald'; allowed: clopper-pearson"),
        ({"num_selection": 0}, "num_selection must be an integer >= 1, got 0"),
        ({"num_estimation": -3}, "num_estimation must be an integer >= 1, got -3"),
        ({"num_estimation": 1e5}, "num_estimation must be an integer >= 1, got 100000.0"),
        ({"num_selection": True}, "num_selection must be an integer >= 1, got True"),
        ({"alpha": 0.0}, "alpha must lie in (0, 0.5), got 0.0"),
        ({"alpha": 0.5}, "alpha must lie in (0, 0.5), got 0.5"),
        ({"alpha": float("nan")}, "alpha must lie in (0, 0.5), got nan"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer >= 0, got 0.5"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(given: dict[str, object], text: str) -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    images = (torch.full((1, 1, 2, 2), 0.5), torch.tensor([1]))
    with pytest.raises(InputError, match=re.escape(text)):
        rush.certify(smoothed, images, **{"num_estimation": 100, **given})  # type: ignore[arg-type]


def test_images_and_networks_that_cannot_be_certified_are_refused() -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(InputError, match="labels must be 0 to 1, got 2 to 2"):
        rush.certify(smoothed, (x, torch.tensor([2])))
    with pytest.raises(InputError, match="divide uint8 images by 255"):
        rush.certify(smoothed, (255 * x, torch.tensor([1])))
    smoothed.classifier.train()
    with pytest.raises(ModelError, match="training mode"):
        rush.certify(smoothed, (x, torch.tensor([1])), num_estimation=100)


@pytest.fixture
def written(digits_network: nn.Module, tmp_path: Path) -> tuple[Path, Certificates]:
    _, certificates = _digits(digits_network, 9, 150)
    path = tmp_path / "certificates.tsv"
    parts = [_rows(certificates, 0, 5), _rows(certificates, 5, 9)]
    append_certificates(path, parts[0], range(10, 15))
    append_certificates(path, parts[1], range(15, 19))
    return path, certificates


def _rows(certificates: Certificates, first: int, last: int) -> Certificates:
    arrays = {f.name: getattr(certificates, f.name) for f in fields(Certificates)}
    cut: dict[str, Any] = {
        name: value[first:last] for name, value in arrays.items() if isinstance(value, np.ndarray | tuple)
    }
    return replace(certificates, **cut)


def _read(path: Path, num_estimation: int = 150) -> Certificates | None:
    return read_certificates(path, SIGMA, 0.001, 30, num_estimation)


def test_the_table_reads_back_to_the_same_bits(written: tuple[Path, Certificates]) -> None:
    path, certificates = written
    read = _read(path)
    assert read is not None
    _same(read, certificates)
    np.testing.assert_allclose(read.seconds, certificates.seconds, atol=5e-5)
    assert (read.sigma, read.alpha, read.num_selection, read.num_estimation) == (SIGMA, 0.001, 30, 150)
    assert (read.radius > 0).any()


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


def test_no_radius_is_written_above_the_truth(tmp_path: Path, coverages: list[Coverage]) -> None:
    """The text, where published logs with three significant digits round up: for every line Phi(text / sigma) is at
    most ``p_lower``, in 40 digits."""
    certificates = _rows(coverages[2].certificates, 0, 400)
    append_certificates(tmp_path / "table.tsv", certificates, range(400))
    with mpmath.workdps(40):
        for line in (tmp_path / "table.tsv").read_text().splitlines()[1:]:
            row = dict(zip(COLUMNS, line.split("\t"), strict=True))
            if int(row["predict"]) != ABSTAIN:
                exact = mpmath.ncdf(mpmath.mpf(row["radius"]) / mpmath.mpf(SIGMA))
                assert exact <= mpmath.mpf(float(row["p_lower"])) < exact + 1e-5


def test_a_line_that_a_kill_left_unfinished_is_dropped_and_written_again(written: tuple[Path, Certificates]) -> None:
    path, certificates = written
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for left in (1, 7, len(whole) - last - 1):
        path.write_bytes(whole[: last + left])
        drop_unfinished_line(path)
        assert path.read_bytes() == whole[:last]
    read = _read(path)
    assert read is not None
    assert read.ids == certificates.ids[:8]
    append_certificates(path, _rows(certificates, 8, 9), [18])
    assert path.read_bytes() == whole
    drop_unfinished_line(path)
    assert path.read_bytes() == whole


def test_a_missing_or_empty_table_holds_no_certificates(tmp_path: Path, written: tuple[Path, Certificates]) -> None:
    assert _read(tmp_path / "none.tsv") is None
    drop_unfinished_line(tmp_path / "none.tsv")
    path, _ = written
    header = path.read_text().splitlines()[0]
    for text in ("", header[:9], header + "\n"):
        path.write_text(text)
        drop_unfinished_line(path)
        assert _read(path) is None


def _damage(path: Path, line: int, column: str, value: str) -> None:
    lines = path.read_text().splitlines()
    cells = lines[line - 1].split("\t")
    cells[COLUMNS.index(column)] = value
    lines[line - 1] = "\t".join(cells)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "x"),
        ("predict", "1.5"),
        ("radius", "0,25"),
        ("p_lower", ""),
        ("num_samples", "many"),
        ("counts", "1,2,x"),
        ("counts", "1,2,3"),
        ("counts", "150,0,0,0,0,0,0,0,0,1"),
        ("selection", "30"),
        ("selection", "30,0,0,0,0,0,0,0,0,zero"),
        ("blocks", "not base64!"),
        ("blocks", "AAAA"),
        ("blocks", "eJwDAAAAAAE="),
    ],
)
def test_a_damaged_field_is_named_by_its_line(written: tuple[Path, Certificates], column: str, value: str) -> None:
    path, _ = written
    _damage(path, 4, column, value)
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}, line 4"):
        _read(path)


def test_a_line_with_too_few_fields_a_foreign_header_and_other_sample_numbers_are_refused(
    written: tuple[Path, Certificates],
) -> None:
    path, _ = written
    text = path.read_text()
    lines = text.splitlines()
    path.write_text("\n".join([*lines[:3], "3\t1\t1", *lines[4:]]) + "\n")
    with pytest.raises(RunError, match="line 4: 3 fields instead of 12; move the file away and certify again"):
        _read(path)
    path.write_text("idx\tlabel\n1\t2\n")
    with pytest.raises(RunError, match="line 1: expected the columns idx label predict"):
        _read(path)
    path.write_text(text)
    with pytest.raises(RunError, match="line 2: its votes do not add up to num_estimation = 1000"):
        _read(path, 1000)


def test_pixels_of_any_float_type_give_the_same_certificates() -> None:
    smoothed = SmoothedClassifier(square_half_space(), SIGMA, 2)
    x = square_images(np.array([0.2, -0.3]), seed=5)
    labels = torch.tensor([1, 0])
    _same(_certified(smoothed, x.double(), labels), _certified(smoothed, x, labels))


def _certified(smoothed: SmoothedClassifier, x: Tensor, labels: Tensor) -> Certificates:
    return rush.certify(smoothed, (x, labels), num_selection=10, num_estimation=100)
