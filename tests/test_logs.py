"""Certification logs: public and our own, read and doubted."""

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from rush.certification.bounds import largest_radius
from rush.certification.rule import Rule
from rush.errors import ConfigError, DataError, RunError
from rush.records.certificates import write_certificates
from rush.records.public_logs import CertificateTable, read_log, states_sigma
from rush.records.read_run import read_run
from rush.reporting.doubts import doubts
from stored import log_of, rule_of, stored_certificates

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
SECONDS = f"{HEADER}\n0\t3\t3\t0.529\t1\t15.4\n20\t8\t-1\t0.0\t0\t15.6\n40\t8\t4\t3.63e-05\t0\t0.5\n"
CLOCK = f"{HEADER}\n0\t3\t3\t1.7\t1\t0:00:08.591588\n1\t8\t8\t1.91\t1\t1 day, 0:00:01\n2\t8\t6\t0.2\t0\t2:03:04\n"
RULE = {
    "sigma": 0.5,
    "method": "sequential",
    "bound": "geometric",
    "alpha": 0.01,
    "level": "family",
    "num_images": 3,
    "num_selection": 100,
    "num_estimation": 10_000,
    "radii": [0.0, 0.25, 0.5],
    "futility": 0.001,
}
LOGS = Path(__file__).parents[2] / "shared" / "data" / "logs"
RESULTS = Path(__file__).parents[1] / "results" / "cifar10-small"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="needs the public logs beside the project")


def own_table(path: Path, **rule: Any) -> Path:
    """Three images: given up at 0.5, undecided at 0, and certified at the grid's end."""
    certificates = stored_certificates(
        rule_of(**{**RULE, **rule}), [7800, 5005, 9900], [1, 0, 1], [1, 0, 2], ["b.png", "a.png", "c.png"]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_certificates(path, certificates, [7, 2, 5])
    return path


def stored(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(log: CertificateTable) -> list[tuple[Any, ...]]:
    """idx, label, predict, radius and correct of each image."""
    certificates = log.certificates
    columns = (log.idx, certificates.labels, certificates.prediction, certificates.radius, certificates.correct)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def named(log: CertificateTable) -> dict[str, int]:
    return {finding.name: finding.count for finding in doubts(log)}


def test_a_public_log_with_seconds(tmp_path: Path) -> None:
    log = read_log(stored(tmp_path / "cohen_sigma_0.25.tsv", SECONDS))
    certificates, rule = log.certificates, log.rule
    assert rows_of(log) == [(0, 3, 3, 0.529, True), (20, 8, -1, 0.0, False), (40, 8, 4, 3.63e-05, False)]
    assert certificates.seconds.tolist() == [15.4, 15.6, 0.5]
    assert (rule.sigma, rule.alpha, rule.num_estimation) == (0.25, 0.001, 100_000)
    assert (rule.method, rule.level, rule.num_images, rule.radii) == ("clopper-pearson", "image", 3, None)
    assert (log.name, log.published, log.dataset, certificates.num_copies) == ("cohen_sigma_0.25", True, None, None)
    assert certificates.abstained.tolist() == [False, True, False]
    assert certificates.acr == pytest.approx(0.529 / 3)
    assert certificates.p_lower[[0, 1]] == pytest.approx([NormalDist().cdf(0.529 / 0.25), 0.5], abs=1e-12)


def test_a_public_log_with_clock_times_and_given_conditions(tmp_path: Path) -> None:
    log = read_log(stored(tmp_path / "some.txt", CLOCK), sigma=0.5, alpha=0.01, num_estimation=1000)
    assert log.certificates.seconds.tolist() == [8.591588, 86401.0, 7384.0]
    assert (log.rule.sigma, log.rule.alpha, log.rule.num_estimation, log.name) == (0.5, 0.01, 1000, "some")


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("x_sigma_0.25.tsv", 0.25), ("sigma_1", 1.0), ("noise_0.50.tsv", 0.5), ("noise_0.5_sigma_0.25", 0.25)],
)
def test_the_name_says_sigma(tmp_path: Path, name: str, sigma: float) -> None:
    path = stored(tmp_path / name, SECONDS)
    assert states_sigma(path)
    assert read_log(path).rule.sigma == sigma
    assert read_log(path, sigma=2).rule.sigma == 2


@pytest.mark.parametrize("name", ["log.tsv", "sigma_0.25_sigma_0.5.tsv"])
def test_without_sigma_the_option_is_named(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path / name, SECONDS)
    assert not states_sigma(path)
    with pytest.raises(ConfigError, match=rf"{name} is a public log.*give --sigma"):
        read_log(path)


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        ({"sigma": 0.0}, "sigma must be a finite number > 0"),
        ({"sigma": float("nan")}, "sigma must be"),
        ({"alpha": 1.0}, "alpha must lie in"),
        ({"num_estimation": 0}, "num_estimation must be an integer >= 1"),
        ({"num_estimation": 1.5}, "num_estimation must be"),
    ],
)
def test_impossible_conditions_are_refused(tmp_path: Path, conditions: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_log(stored(tmp_path / "sigma_0.25.tsv", SECONDS), **conditions)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (HEADER, HEADER.replace("radius", "rad"), "line 1: a log opens with"),
        (HEADER, HEADER + "\ttime", "line 1: a log opens with"),
        ("0.529\t1\t15.4", "0.529\t1", "line 2: 5 fields instead of 6"),
        ("20\t8", "0\t8", "line 3: duplicate image, by its idx"),
        ("0.529\t1", "0.529\t0", "line 2: correct does not agree"),
        ("-1\t0.0\t0", "-1\t0.0\t1", "line 3: correct does not agree"),
        ("0.529", "-0.529", "line 2: radius '-0.529': not a finite number >= 0"),
        ("0.529", "nan", "line 2: radius 'nan'"),
        ("0.529", "inf", "line 2: radius 'inf'"),
        ("0.529", "1e999", "line 2: radius"),
        ("0.529", "", "line 2: radius ''"),
        ("15.6", "0:61:00", "line 3: time '0:61:00'"),
        ("15.6", "nan", "line 3: time 'nan'"),
        ("40\t8", "40.0\t8", "line 4: idx '40.0': not a whole number"),
        ("40\t8", "-40\t8", "line 4: idx and label must be >= 0"),
        ("\t-1\t", "\t-2\t", "line 3: predict must be a class"),
        (SECONDS, HEADER + "\n", "line 1: no image"),
        # longer than Python's int takes, and a little shorter
        ("15.4", "9" * 5000 + " days, 0:00:01", "line 2: time '999"),
        ("15.4", "9" * 4000 + " days, 0:00:01", "line 2: time '999"),
        ("0\t3", "9" * 5000 + "\t3", "line 2: idx '999"),
        ("0.529", "1e" + "9" * 5000, "line 2: radius '1e99"),
        ("15.4", "1\u2028", "line 2: time '1.u2028': not"),
        ("15.4", "1\x1b[31m", r"line 2: time '1.x1b\[31m'"),
    ],
)
def test_a_damaged_public_log_is_refused_by_file_and_line(tmp_path: Path, old: str, new: str, text: str) -> None:
    assert SECONDS.count(old) == 1
    path = stored(tmp_path / "sigma_0.25.tsv", SECONDS.replace(old, new))
    with pytest.raises(DataError, match=rf"sigma_0\.25\.tsv, {text}") as caught:
        read_log(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_radius_of_many_digits_is_read(tmp_path: Path) -> None:
    log = read_log(stored(tmp_path / "sigma_0.25.tsv", SECONDS.replace("0.529", "0." + "5" * 5000)))
    assert log.certificates.radius[0] == pytest.approx(5 / 9)


def test_a_public_log_with_a_byte_order_mark_and_other_line_ends_reads_the_same(tmp_path: Path) -> None:
    plain = read_log(stored(tmp_path / "one_sigma_0.25.tsv", SECONDS))
    (tmp_path / "two_sigma_0.25.tsv").write_bytes(b"\xef\xbb\xbf" + SECONDS.replace("\n", "\r\n").encode() + b"\r\n")
    other = read_log(tmp_path / "two_sigma_0.25.tsv")
    assert np.array_equal(plain.idx, other.idx)
    for name in ("labels", "prediction", "radius", "correct", "seconds"):
        assert np.array_equal(getattr(plain.certificates, name), getattr(other.certificates, name))
    assert states_sigma(tmp_path / "two_sigma_0.25.tsv")


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing\.tsv is missing"):
        read_log(tmp_path / "nothing.tsv")
    with pytest.raises(RunError, match=r"certificates\.tsv is missing"):
        read_log(tmp_path)
    (tmp_path / "sigma_1").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="sigma_1 cannot be read as a log"):
        read_log(tmp_path / "sigma_1")


def test_a_log_of_our_own_says_everything(tmp_path: Path) -> None:
    log = read_log(own_table(tmp_path / "mine.tsv"))
    certificates = log.certificates
    assert log.rule == Rule(**{**RULE, "radii": (0.0, 0.25, 0.5)})
    assert certificates.ids == ("b.png", "a.png", "c.png")
    assert rows_of(log) == [(7, 1, 1, 0.25, True), (2, 0, -1, 0.0, False), (5, 2, 1, 0.5, False)]
    shown = [NormalDist().cdf(0.5), 0.0, NormalDist().cdf(1.0)]
    assert certificates.p_lower == pytest.approx(shown, abs=1e-9)
    assert certificates.num_samples[1] == 10_100
    assert certificates.num_samples[2] < 1000
    assert (log.published, log.rounding, log.dataset, log.name) == (False, None, None, "mine")
    assert certificates.num_copies == 0
    assert log.at_ceiling.tolist() == [False, False, True]
    assert named(log) == {}
    assert read_log(log.path, sigma=0.5).rule.sigma == 0.5
    with pytest.raises(ConfigError, match=r"mine\.tsv has sigma = 0\.5, but 0\.25 was given"):
        read_log(log.path, sigma=0.25)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma": -1}, "sigma must be a finite number > 0"),
        ({"method": "guess"}, "unknown method 'guess'; allowed: clopper-pearson, sequential"),
        ({"level": "all"}, "unknown level 'all'; allowed: image, family"),
        ({"num_images": 0}, "num_images must be"),
        ({"num_images": 2}, "its rule is one of 2 images"),
        ({"radii": [9.0]}, "radius 9 cannot be certified"),
        ({"radii": []}, "radii is empty"),
    ],
)
def test_an_impossible_rule_is_refused(tmp_path: Path, change: dict, text: str) -> None:
    path = own_table(tmp_path / "mine.tsv")
    old = path.read_text().split("\t")[-4]
    stored(path, path.read_text().replace(old, json.dumps({**RULE, **change})))
    with pytest.raises(RunError, match=rf"mine\.tsv, line \d: .*{text}"):
        read_log(path)


def test_a_damaged_log_of_our_own_is_a_matter_of_the_run(tmp_path: Path) -> None:
    path = own_table(tmp_path / "mine.tsv")
    stored(path, path.read_text().replace("c.png", "a.png"))
    with pytest.raises(RunError, match=r"mine\.tsv, line 4: duplicate image, by its id"):
        read_log(path)


def test_a_run_folder_gives_the_fingerprint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    own_table(run / "certificates.tsv", sigma=0.5)
    stored(run / "provenance.json", json.dumps({"data": {"test": {"fingerprint": "f00d"}}}))
    for path in (run, run / "certificates.tsv"):
        log = read_log(path)
        assert (log.name, log.dataset, log.rule.sigma, log.rule.alpha) == ("run", "f00d", 0.5, 0.01)
    with pytest.raises(ConfigError, match=r"certificates\.tsv has alpha = 0\.01"):
        read_log(run, alpha=0.001)
    stored(run / "provenance.json", "{")
    with pytest.raises(RunError, match=r"provenance\.json is damaged"):
        read_log(run)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="needs the kept run")
def test_the_kept_run_reads_as_in_its_report() -> None:
    log, shown = read_log(RESULTS), read_run(RESULTS)
    certificates = shown.certificates
    assert certificates is not None
    assert log.certificates.acr == certificates.acr
    assert (log.certificates.ids, log.rule) == (certificates.ids, certificates.rule)
    assert log.dataset == shown.provenance["data"]["test"]["fingerprint"]
    assert log.rounding is None
    assert named(log) == {}


@pytest.mark.parametrize(
    ("number", "largest"), [(100, 1.50), (1000, 2.46), (10_000, 3.20), (100_000, 3.81), (1_000_000, 4.35)]
)
def test_the_ceiling_is_the_radius_of_votes_that_all_agree(number: int, largest: float) -> None:
    log = log_of([0.1], sigma=1.0, num_estimation=number)
    assert log.rule.largest_radius == pytest.approx(largest, abs=5e-3)
    top = log.rule.largest_radius
    reached = log_of([top, 0.99 * top], sigma=1.0, num_estimation=number)
    assert reached.at_ceiling.tolist() == [True, False]
    assert top == largest_radius(number, 1.0, 0.001)
    family = log_of([0.1], sigma=1.0, num_estimation=number, level="family", num_images=50)
    assert family.rule.largest_radius == largest_radius(number, 1.0, 0.001 / 50)


def test_one_vote_less_is_below_the_ceiling_of_a_log_of_our_own() -> None:
    """Under uniform noise it may cost less than a ten-thousandth of the radius."""
    top = log_of([0.1]).rule.largest_radius
    radii = [top, top - 1e-6]
    assert log_of(radii, published=False).at_ceiling.tolist() == [True, False]
    assert log_of(radii).at_ceiling.tolist() == [True, True]
    stored = stored_certificates(rule_of(), [1000, 999], [0, 0], [0, 0])
    assert CertificateTable("a", Path("a"), np.arange(2), stored).at_ceiling.tolist() == [True, False]


def test_radii_beyond_the_ceiling_are_found_and_rounding_is_told_apart_from_wrong_conditions() -> None:
    half = np.full(4, 0.005)
    assert named(log_of([1.9, 1.905728, 0.0, 1.2])).get("beyond-ceiling") is None
    rounded = next(f for f in doubts(log_of([1.91, 1.9, 1.91, 0.3], rounding=half)) if f.name == "beyond-ceiling")
    assert rounded.count == 2
    assert "2 of 4 radii, up to 1.91, are larger than 1.90573" in rounded.text
    assert "rounding does not explain" not in rounded.text
    wrong = next(f for f in doubts(log_of([0.978, 0.1], sigma=0.25, rounding=half[:2] / 10)))
    assert (wrong.name, wrong.count) == ("beyond-ceiling", 1)
    assert "rounding does not explain it" in wrong.text
    assert "alpha >= 0.0099 or N >= 149,6" in wrong.text
    exact = log_of([largest_radius(100_000, 0.5, 0.001)])
    assert exact.at_ceiling.all()
    assert named(exact) == {}
    assert named(log_of(exact.certificates.radius + 2e-6)) == {"beyond-ceiling": 1}
    assert named(log_of(exact.certificates.radius, num_estimation=99_000)) == {"beyond-ceiling": 1}


def test_radii_with_few_digits_are_found(tmp_path: Path) -> None:
    log = read_log(stored(tmp_path / "sigma_0.5", CLOCK))
    assert log.rounding.tolist() == [0.005, 0.005, 0.005]  # 0.2 may have had two decimals
    assert read_log(stored(tmp_path / "noise_1", SECONDS)).rounding.tolist() == pytest.approx([5e-4, 0, 5e-8])
    assert named(log) == {"beyond-ceiling": 1, "rounded": 3}
    text = CLOCK.replace("1.7", "1.25").replace("1.91", "0.504")
    doubts_by_name = {f.name: f for f in doubts(read_log(stored(tmp_path / "sigma_0.5", text)))}
    assert doubts_by_name["grid-ties"].count == 1  # 1.25 may have been 1.245; 0.504 is at least 0.5035
    assert "up to 33.33 points of certified accuracy at one radius" in doubts_by_name["grid-ties"].text
    assert "here up to 0.005" in doubts_by_name["rounded"].text


def test_other_findings() -> None:
    odd = log_of([0.3, 0.0, 0.4], prediction=[-1, 0, 0])
    assert named(odd) == {"abstained-with-radius": 1, "predicted-without-radius": 1}
    assert named(log_of([0.3], num_images=5)) == {"unfinished": 4}


@needs_logs
@pytest.mark.parametrize(
    ("name", "acr", "accuracies"),
    [
        ("gaussian_sigma_0.25", 0.487, "80.4 66.8 50.5 32.7"),
        ("catrs_sigma_0.25", 0.562, "76.3 68.1 58.8 48.2"),
        ("gaussian_sigma_0.5", 0.571, "68.8 58.2 46.2 34.5 24.5 16.3 10.2 5.3"),
        ("catrs_sigma_0.5", 0.757, "62.3 56.8 50.5 44.6 38.5 32.7 27.1 20.6"),
        ("gaussian_sigma_1.0", 0.543, "50.9 43.5 36.5 30.1 23.9 18.6 13.7 9.8 6.5 4.1 2.5"),
        ("catrs_sigma_1.0", 0.815, "43.2 40.2 37.2 34.3 31.0 28.1 24.9 22.0 19.3 16.8 14.2"),
    ],
)
def test_published_figures_from_their_logs(name: str, acr: float, accuracies: str) -> None:
    log = read_log(LOGS / f"{name}.tsv")
    assert len(log) == 10_000
    assert log.certificates.acr == pytest.approx(acr, abs=5.1e-4)
    published = [float(text) for text in accuracies.split()]
    measured = [100 * log.certificates.accuracy_interval(0.25 * step).estimate for step in range(len(published))]
    assert measured == pytest.approx(published, abs=0.0501)


@needs_logs
@pytest.mark.parametrize(
    ("name", "abstained", "right_at_ceiling", "beyond"),
    [
        ("gaussian_sigma_0.25", 6.9, 16.7, 1679),
        ("catrs_sigma_0.25", 3.6, 36.3, 3732),
        ("catrs_sigma_0.5", 7.3, 14.9, 1552),
        ("catrs_sigma_1.0", 12.9, 2.7, 0),
    ],
)
def test_published_ceilings_from_their_logs(name: str, abstained: float, right_at_ceiling: float, beyond: int) -> None:
    log = read_log(LOGS / f"{name}.tsv")
    assert 100 * log.certificates.abstained.mean() == pytest.approx(abstained, abs=0.0501)
    assert 100 * (log.at_ceiling & log.certificates.correct).mean() == pytest.approx(right_at_ceiling, abs=0.0501)
    assert named(log).get("beyond-ceiling", 0) == beyond
    assert named(log)["rounded"] == (log.certificates.radius > 0).sum()
    assert all("rounding does not explain" not in finding.text for finding in doubts(log))


@needs_logs
def test_the_first_public_log_was_not_made_under_the_conditions_it_is_read_with() -> None:
    log = read_log(LOGS / "cohen2019_sigma_0.25.tsv")
    assert (len(log), log.certificates.seconds[0], set(np.diff(log.idx))) == (500, 15.4, {20})
    doubts_by_name = {finding.name: finding for finding in doubts(log)}
    assert doubts_by_name["beyond-ceiling"].count == 77
    assert "rounding does not explain it" in doubts_by_name["beyond-ceiling"].text
    explained = read_log(log.path, alpha=0.01)
    assert all("rounding does not explain" not in finding.text for finding in doubts(explained))
