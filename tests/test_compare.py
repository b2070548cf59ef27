"""Logs side by side, and paired tests only where the images are shown or said to be the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from rush.certification.sequential import CERTIFIED, UNDECIDED
from rush.errors import ConfigError
from rush.records.certificates import write_certificates
from rush.records.public_logs import CertificateTable, read_log
from rush.reporting.compare import (
    Table,
    class_accuracies,
    compare,
    compare_command,
    comparison_tables,
    grid_acr,
    mcnemar_p_value,
    probability_quantile,
)
from rush.reporting.wording import share
from rush.statistics import paired_difference, share_interval
from stored import log_of, rule_of, stored_certificates

LOGS = Path(__file__).parents[2] / "shared" / "data" / "logs"
RESULTS = Path(__file__).parents[1] / "results" / "cifar10-small"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="needs the public logs beside the project")
NOISES = ("gaussian", "discrete", "uniform", "laplace")
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def table(tables: list[Table], title: str) -> Table:
    return next(table for table in tables if table[0].startswith(title))


def cells(tables: list[Table], title: str) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table(tables, title)[2]}


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (2, 9), (30, 12), (0, 40)])
def test_the_p_value_is_the_exact_mcnemar_test(first: int, second: int) -> None:
    oracle = mcnemar([[5, first], [second, 7]], exact=True).pvalue
    assert mcnemar_p_value(first, second) == pytest.approx(oracle, rel=1e-10)
    if first + second:
        assert mcnemar_p_value(first, second) == pytest.approx(stats.binomtest(first, first + second).pvalue, rel=1e-10)


def test_accuracies_and_default_radii() -> None:
    one = log_of([0.1, 0.25, 0.9, 0.8], prediction=[0, 0, 0, 1])
    two = log_of([0.3, 0.0, 0.3, 0.3], prediction=[0, -1, 0, 0], name="b")
    comparison = compare([one, two])
    assert comparison.radii == (0.0, 0.25, 0.5, 0.75)
    assert comparison.radius == 0.25
    shown = cells(comparison_tables(comparison), "Certified accuracy by ℓ2")
    assert [row[0].split(" %")[0] for row in shown.values()] == ["75.0", "50.0", "25.0", "25.0"]
    assert [row[1].split(" %")[0] for row in shown.values()] == ["75.0", "75.0", "0.0", "0.0"]
    exact = share_interval(3, 4)
    assert shown["0"][0] == f"75.0 % [{100 * exact.low:.1f}, {100 * exact.high:.1f}]"
    assert compare([one], radii=[0.5, 0.1, 0.5]).radii == (0.1, 0.5)
    assert compare([log_of([0.0], prediction=[-1])]).radii == (0.0,)
    assert compare([log_of([25.0], sigma=100.0)]).radii[:3] == (0.0, 1.0, 2.0)


def test_radii_in_different_norms_are_not_set_side_by_side() -> None:
    """Every figure of a radius has a table per norm, and a pair is refused although its images are the same."""
    logs = [log_of([0.3, 0.6], name=name, noise=noise) for name, noise in zip("abcd", NOISES, strict=True)]
    logs = [replace(log, published=False, dataset="f00d") for log in logs]
    comparison = compare(logs)
    assert [pair.refused for pair in comparison.pairs] == [None, *["their radii are in different norms: ℓ2 and ℓ1"] * 2]
    tables = comparison_tables(comparison)
    assert cells(tables, "Conditions")["norm of the radii"] == ("ℓ2", "ℓ2", "ℓ1", "ℓ1")
    for title in ("Certified accuracy by {} radius", "Certified accuracy by class at {} radius", "Summary, {} radii"):
        assert table(tables, title.format("ℓ2"))[1][1:] == ("a", "b")
        assert table(tables, title.format("ℓ1"))[1][1:] == ("c", "d")
    assert len(table(tables, "Paired tests refused")[2]) == 2
    assert "noise differs: gaussian vs. discrete" in [row[1] for row in table(tables, "Paired tests: notes")[2]]


def test_logs_of_one_norm_have_one_table_of_each_kind() -> None:
    logs = [replace(log_of([0.3], name=name, noise="laplace"), published=False) for name in "ab"]
    tables = comparison_tables(compare(logs, assume_same_images=True))
    assert not [title for title, *_ in tables if "ℓ2" in title]
    assert table(tables, "Certified accuracy by ℓ1")[1][1:] == ("a", "b")
    assert table(tables, "Summary")[0] == "Summary"
    assert "norm of the radii" not in cells(tables, "Conditions")
    assert [row[0] for row in table(tables, "a minus b")[2]] == ["0", "0.25"]


@pytest.mark.parametrize("radii", [[-0.1], [float("nan")], [float("inf")], [], [True]])
def test_impossible_radii_are_refused(radii: list) -> None:
    with pytest.raises(ConfigError, match="radius"):
        compare([log_of([0.5])], radii=radii)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])


def test_summary_says_acr_with_its_n_and_grids_apart() -> None:
    fixed = log_of([0.4, 0.6, 0.9], prediction=[0, 0, -1], num_estimation=10_000)
    grid = log_of(
        [0.25, 0.5, 0.0], prediction=[0, 0, -1], name="b", method="sequential", bound="geometric", radii=(0.25, 0.5),
        num_samples=np.array([200, 400, 9000]), p_lower=np.array([0.7, 0.9, 0.1]), level="family", published=False,
        outcome=np.array([CERTIFIED, UNDECIDED, UNDECIDED]),
    )  # fmt: skip
    tables = comparison_tables(compare([fixed, grid]))
    summary, conditions = cells(tables, "Summary"), cells(tables, "Conditions")
    assert summary["ACR"] == ("0.333 (N = 10,000)", "–")
    assert summary["grid ACR, radii 0.25, 0.5"] == ("0.250 (N = 10,000)", "0.250 (N = 100,000)")
    assert summary["samples per image, mean"] == ("10,000 + selection", "3,200")
    assert summary["correct at the largest radius"] == ("0.0 % at 1.599", "33.3 % at 0.5")
    assert summary["abstained"][0].startswith("33.3 %")
    assert summary["undecided at the largest N"][0] == "–"
    assert summary["undecided at the largest N"][1].startswith("66.7 %")
    assert "undecided at the largest N" not in cells(comparison_tables(compare([fixed])), "Summary")
    assert conditions["level"][1] == "all 3 images jointly, alpha = 0.001"
    assert conditions["method"] == ("clopper-pearson", "sequential, geometric")
    assert conditions["N"] == ("10,000", "100,000 at most")


def test_grid_acr_lowers_each_radius_to_the_grid() -> None:
    log = log_of([0.2, 0.25, 0.49, 0.5, 9.0, 9.0], prediction=[0, 0, 0, 0, 0, 1])
    assert grid_acr(log.certificates, (0.25, 0.5)) == pytest.approx((0 + 0.25 + 0.25 + 0.5 + 0.5) / 6)


def test_classes_and_the_worst_of_them() -> None:
    log = log_of([0.5, 0.5, 0.5, 0.5, 0.1], prediction=[3, 7, 7, 3, 7], labels=[3, 3, 7, 7, 7])
    assert class_accuracies(log.certificates, 0.25) == {3: share_interval(1, 2), 7: share_interval(1, 3)}
    shown = cells(
        comparison_tables(compare([log, log_of([1.0], labels=[9], name="b")], radius=0.25)), "Certified accuracy by cl"
    )
    assert shown["worst"] == ("33.3 % (class 7)", "100.0 % (class 9)")
    assert shown["9"][0] == "–"
    assert shown["3"][0].startswith("50.0 % [")


def test_probabilities_leave_abstained_images_out() -> None:
    log = log_of(
        [0.1, 0.2, 0.2, 0.0, 1.905728], prediction=[0, 0, 0, -1, 0], p_lower=np.array([0.6, 0.7, 0.7, 0.4, 0.99993])
    )
    levels = (0.01, 0.25, 0.26, 0.75, 0.76, 1.0)
    assert [probability_quantile(log.certificates, level) for level in levels] == [0.6, 0.6, 0.7, 0.7, 0.99993, 0.99993]
    shown = cells(comparison_tables(compare([log])), "Lower bound")
    assert [shown[f"{level} % quantile"][0] for level in (5, 25, 50, 75, 95)] == [
        "0.60000", "0.60000", "0.70000", "0.70000", "0.99993",
    ]  # fmt: skip
    assert shown["at the largest radius"] == ("25.0 %",)
    none = comparison_tables(compare([log_of([0.0], prediction=[-1])]))
    assert set(cells(none, "Lower bound").values()) == {("–",)}


def pair_of_runs(seed: int = 0, n: int = 60) -> tuple[CertificateTable, CertificateTable]:
    """Two logs on the same images, the second in another order."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 4, n)
    ids = np.array([f"{number}.png" for number in range(n)])
    first = log_of(
        generator.random(n), np.where(generator.random(n) < 0.8, label, -1), label, ids=tuple(ids), dataset="f00d"
    )
    order = generator.permutation(n)
    second = log_of(
        0.8 * generator.random(n), label[order], label[order], "b", ids=tuple(ids[order]), dataset="f00d", idx=order
    )
    return first, second


def test_a_pair_with_one_fingerprint_is_matched_by_id() -> None:
    first, second = pair_of_runs()
    pair = compare([first, second], radii=[0.0, 0.3, 0.7]).pairs[0]
    assert (pair.refused, pair.images, pair.assumed, pair.notes) == (None, 60, False, ())
    one, two = first.certificates, second.certificates
    rows = {name: row for row, name in enumerate(second.certificates.ids)}
    for row in pair.rows:
        a = [bool(one.correct[i] and one.radius[i] >= row.radius) for i in range(60)]
        b = [bool(two.correct[rows[n]] and two.radius[rows[n]] >= row.radius) for n in first.certificates.ids]
        assert row.difference == paired_difference(np.array(a), np.array(b))
        assert row.only_first == sum(x and not y for x, y in zip(a, b, strict=True))
        assert row.only_second == sum(y and not x for x, y in zip(a, b, strict=True))
        assert row.p_value == mcnemar_p_value(row.only_first, row.only_second)
        assert row.difference.estimate != 0
    title, header, shown = table(comparison_tables(compare([first, second], radii=[0.3])), "a minus b")
    assert "the same by fingerprint and id" in title
    assert len(header) == len(shown[0]) == 5


def cut(log: CertificateTable, rows: Any, **changes: Any) -> CertificateTable:
    """The log's ``rows``, with other values of the table, its certificates and its rule, by their names."""
    positions = np.arange(len(log))[rows]
    certificates = log.certificates.select(positions.tolist())
    rule = {key: changes.pop(key) for key in list(changes) if hasattr(log.rule, key)}
    stored = {key: changes.pop(key) for key in list(changes) if hasattr(certificates, key)}
    certificates = replace(certificates, rule=replace(log.rule, num_images=len(positions), **rule), **stored)
    return replace(log, **{"idx": log.idx[rows], "certificates": certificates, **changes})


def refusal(*logs: CertificateTable, assume: bool = False) -> str:
    comparison = compare(logs, assume_same_images=assume)
    reason = comparison.pairs[0].refused
    assert reason is not None
    assert not comparison.pairs[0].rows
    assert table(comparison_tables(comparison), "Paired tests refused")[2] == [("a, b", reason)]
    return reason


def test_pairs_are_refused_with_the_reason() -> None:
    first, second = pair_of_runs()
    for assume in (False, True):
        other = cut(second, slice(None), dataset="beef")
        assert "fingerprints of the test images differ" in refusal(first, other, assume=assume)
        part = cut(second, slice(1, None))
        assert "60 and 59, 59 in both; certify the same images" in refusal(first, part, assume=assume)
        swapped = (replace(part, name="a"), replace(first, name="b"))
        assert "59 and 60, 59 in both" in refusal(*swapped, assume=assume)
        foreign = cut(second, slice(None), ids=("new.png", *second.certificates.ids[1:]))
        assert "60 and 60, 59 in both" in refusal(first, foreign, assume=assume)
    changed = second.certificates.labels.copy()
    changed[4] += 1
    wrong = cut(second, slice(None), labels=changed)
    assert f"1 labels differ, the first at idx {second.idx[4]}" in refusal(first, wrong)
    silent = cut(second, slice(None), dataset=None)
    assert "no data-set fingerprint in b" in refusal(first, silent)
    assert "no data-set fingerprint in a and b" in refusal(cut(first, slice(None), dataset=None), silent)


def test_sameness_may_be_assumed_and_labels_must_not_contradict_it() -> None:
    first, second = pair_of_runs()
    public = cut(second, slice(0, 40), dataset=None, published=True)
    pair = compare([first, public], radii=[0.3], assume_same_images=True).pairs[0]
    assert (pair.refused, pair.images, pair.assumed) == (None, 40, True)
    assert pair.notes == ("same images assumed: matched by idx, 40 in both of 60 and 40",)
    first_rows = [int(np.flatnonzero(first.idx == i)[0]) for i in np.sort(public.idx)]
    second_rows = [int(np.flatnonzero(public.idx == i)[0]) for i in np.sort(public.idx)]
    difference = paired_difference(
        first.certificates.certified(0.3)[first_rows], public.certificates.certified(0.3)[second_rows]
    )
    assert pair.rows[0].difference == difference
    assert difference.estimate != 0
    tables = comparison_tables(compare([first, public], radii=[0.3], assume_same_images=True))
    assert "assumed to be the same" in table(tables, "a minus b")[0]
    assert ("a, b", pair.notes[0]) in table(tables, "Paired tests: notes")[2]
    changed = public.certificates.labels.copy()
    changed[[3, 9]] += 1
    wrong = cut(public, slice(None), labels=changed)
    assert f"2 labels differ, the first at idx {min(public.idx[[3, 9]])}" in refusal(first, wrong, assume=True)
    assert "no idx is in both" in refusal(first, cut(public, slice(None), idx=public.idx + 1000), assume=True)


def test_conditions_that_differ_are_noted_and_radii_off_a_grid_left_out() -> None:
    first, second = pair_of_runs()
    grid = (0.0, 0.25, 0.5)
    second = cut(
        second, slice(None), radius=np.floor(second.certificates.radius * 4) / 4, radii=grid, method="sequential",
        sigma=0.25, num_estimation=1000, level="family",
    )  # fmt: skip
    comparison = compare([first, second], radii=[0.0, 0.3, 0.5, 0.75])
    pair = comparison.pairs[0]
    assert [row.radius for row in pair.rows] == [0.0, 0.5]
    assert pair.notes == (
        "sigma differs: 0.5 vs. 0.25",
        "N differs: 100,000 vs. 1,000",
        "level differs: each image separately, alpha = 0.001 vs. all 60 images jointly, alpha = 0.001",
        "method differs: clopper-pearson vs. sequential",
        "radii that are not on the grid of both logs are omitted",
    )
    title, _, rows = table(comparison_tables(comparison), "Certified accuracy by ℓ2")
    assert "(* not on the log's grid" in title
    assert [row[2].endswith(" *") for row in rows] == [False, True, False, True]
    assert not any(row[1].endswith(" *") for row in rows)
    assert "*" not in table(comparison_tables(compare([first])), "Certified accuracy by ℓ2")[0]
    assert comparison.radius == 0.25, "half the smaller sigma is not on the grid"
    title, _, rows = table(comparison_tables(comparison), "Certified accuracy by class")
    assert "*" not in title + "".join(map("".join, rows))
    title, _, rows = table(comparison_tables(compare([first, second], radius=0.125)), "Certified accuracy by class")
    assert "radius 0.125 (* not on the log's grid" in title
    assert rows[0][2].endswith(" *")
    assert not rows[0][1].endswith(" *")


def test_the_first_log_is_paired_with_every_other_and_names_stay_apart() -> None:
    places = (("x", "u/x"), ("x", "v/x"), ("y", "y"), ("y", "y"))
    comparison = compare([log_of([0.5], name=name, path=Path(path)) for name, path in places])
    assert [log.name for log in comparison.logs] == ["u/x", "v/x", "y (3)", "y (4)"]
    assert [(pair.first, pair.second) for pair in comparison.pairs] == [
        ("u/x", "v/x"), ("u/x", "y (3)"), ("u/x", "y (4)"),
    ]  # fmt: skip


def public_log(path: Path, radius: str = "0.529") -> Path:
    path.write_text(f"{HEADER}\n0\t3\t3\t{radius}\t1\t15.4\n1\t8\t-1\t0.0\t0\t15.6\n", encoding="utf-8")
    return path


def sigmas(tables: list[Table]) -> tuple[str, ...]:
    return cells(tables, "Conditions")["sigma"]


def test_the_command_reads_logs_with_the_sigma_that_each_needs(tmp_path: Path) -> None:
    named, unnamed = public_log(tmp_path / "x_sigma_0.25.tsv"), public_log(tmp_path / "y.tsv")
    assert sigmas(compare_command([named, unnamed], sigma=[0.5])) == ("0.25", "0.5")
    assert sigmas(compare_command([named, unnamed], sigma=[1.0, 0.5])) == ("1", "0.5")
    assert sigmas(compare_command([named], sigma=[1.0])) == ("1",)
    with pytest.raises(ConfigError, match="give --sigma"):
        compare_command([named, unnamed])
    with pytest.raises(ConfigError, match="2 values of sigma for 3 logs"):
        compare_command([named, unnamed, named], sigma=[0.5, 0.25])


def test_the_command_gives_tables_of_texts(tmp_path: Path) -> None:
    paths = [public_log(tmp_path / "x_sigma_0.25.tsv"), public_log(tmp_path / "y_sigma_0.5.tsv", "0.6")]
    tables = compare_command(paths, None, [0.0, 0.55], 0.5, True)
    for title, header, rows in tables:
        assert rows, title
        assert all(len(row) == len(header) for row in rows)
        assert all(isinstance(cell, str) for row in rows for cell in row)
    assert list(cells(tables, "Certified accuracy by ℓ2")) == ["0", "0.55"]
    assert cells(tables, "Certified accuracy by class at ℓ2 radius 0.5")["3"] == ("100.0 % [2.5, 100.0]",) * 2
    row = table(tables, "x_sigma_0.25 minus y_sigma_0.5, paired on 2 images, assumed")[2][1]
    assert (row[0], row[1].split()[0], *row[2:]) == ("0.55", "−50.0", "0", "1", "1")
    assert cells(tables, "Conditions")["copies of another image, not counted"] == ("not known", "not known")
    assert cells(tables, "Summary")["ACR"][0] == "0.265 (N = 100,000)"
    assert {row[1] for row in table(tables, "Findings")[2]} == {"rounded"}


def certified(folder: Path, votes: list[int], labels: list[int], ids: list[str], **given: Any) -> Path:
    """A run folder with certificates alone: of images that are all selected right, from data of one fingerprint."""
    folder.mkdir()
    certificates = stored_certificates(rule_of(num_images=len(votes)), votes, labels, labels, ids, **given)
    write_certificates(folder / "certificates.tsv", certificates, range(4, 4 + len(votes)))
    (folder / "provenance.json").write_text(json.dumps({"data": {"test": {"fingerprint": "f00d"}}}))
    return folder


def test_two_run_folders_are_paired_by_what_they_say(tmp_path: Path) -> None:
    one = certified(tmp_path / "one", [900, 600], [1, 2], ["a", "b"])
    two = certified(tmp_path / "two", [700, 600], [1, 2], ["a", "b"])
    tables = compare_command([one, two], radii=[0.25])
    row = table(tables, "one minus two, paired on 2 images, the same by fingerprint and id")[2][0]
    assert (row[0], row[1].split()[0], *row[2:]) == ("0.25", "+50.0", "1", "0", "1")
    assert not [title for title, *_ in tables if title.startswith("Cost of training")]


def test_copies_count_once_in_every_figure_and_pair(tmp_path: Path) -> None:
    """Five images, of which three are one picture: certified in the first log in all copies, in the second in two."""
    images = {"labels": [1] * 5, "ids": list("vwxyz"), "pixels": [letter * 32 for letter in "aaabc"]}
    one = certified(tmp_path / "one", [900] * 5, **images)
    two = certified(tmp_path / "two", [900, 900, 500, 900, 500], **images)
    tables = compare_command([one, two], radii=[0.25])
    assert cells(tables, "Conditions")["copies of another image, not counted"] == ("2", "2")
    shown = cells(tables, "Certified accuracy by ℓ2")["0.25"]
    assert shown == tuple(share(share_interval(count, 3)) for count in (3, 1))
    assert cells(tables, "Certified accuracy by class")["1"] == shown
    row = table(tables, "one minus two, paired on 3 images")[2][0]
    assert (row[0], *row[2:]) == ("0.25", "2", "0", "0.5")
    notes = [row[1] for row in table(tables, "Paired tests: notes")[2]]
    assert notes == ["2 images are copies of others: each picture is counted once"]


def trained(folder: Path, images: int, **finetune: object) -> Path:
    """The kept run with other trainings: 2 passes over 1,000 images in an hour, and what ``finetune`` says."""
    shutil.copytree(RESULTS, folder)
    stages = {
        "pretrain": {"objective": "simclr", "images": 1000, "passes_per_image": 2.0, "seconds": 3600.0, "epochs": 1},
        "finetune": {"images": images, "seconds": 1800.0, "epochs": 3, **finetune},
    }
    for stage, fields in stages.items():
        (folder / "stages" / f"{stage}.json").write_text(json.dumps({"peak_memory": 2e9, **fields}))
    return folder


def test_cost_of_training_stands_beside_the_accuracies_of_runs(tmp_path: Path) -> None:
    """A run that does not say something has a dash there; a log is of no run and has no column."""
    one = trained(tmp_path / "one", 500, objective="trades", passes_per_image=4.0, forward_passes_per_image=1.0)
    two = trained(tmp_path / "two", 2000, passes_per_image=3.0, peak_memory=None, joules=9.0)
    title, header, rows = table(compare_command([one, two]), "Cost of training")
    assert (header, "over the images of the larger training stage" in title) == (("", "one", "two"), True)
    assert {row[0]: row[1:] for row in rows} == {
        "network": ("resnet18, width 16",) * 2,
        "objectives": ("simclr + trades", "–"),
        "passes per image": ("4 + 0.5 forward only", "4"),
        "hours": ("1.5", "1.5"),
        "peak memory": ("2.00 GB", "–"),
        "energy": ("–", "–"),
    }
    tables = compare_command([one, public_log(tmp_path / "x_sigma_0.25.tsv")])
    assert table(tables, "Cost of training")[1] == ("", "one")
    (one / "stages" / "pretrain.json").unlink()
    assert cells(compare_command([one]), "Cost of training")["hours"] == ("–",)


def test_a_run_of_older_days_has_what_it_says() -> None:
    shown = cells(compare_command([RESULTS]), "Cost of training")
    assert (shown["passes per image"], shown["hours"], shown["peak memory"]) == (("46",), ("1.21",), ("–",))


@needs_logs
def test_published_class_figures_from_their_logs() -> None:
    cat, bird, deer = 3, 2, 4
    gaussian, catrs = (
        class_accuracies(read_log(LOGS / f"{name}_sigma_0.5.tsv").certificates, 0.5) for name in ("gaussian", "catrs")
    )
    assert [round(100 * gaussian[k].estimate) for k in (cat, bird, deer)] == [19, 27, 27]
    assert [round(100 * catrs[k].estimate) for k in (cat, deer)] == [23, 27]
    assert sorted(catrs, key=lambda k: catrs[k].estimate)[:2] == [cat, deer]


@needs_logs
def test_public_logs_are_paired_on_their_common_images_only_when_assumed() -> None:
    paths = [LOGS / "cohen2019_sigma_0.25.tsv", LOGS / "catrs_sigma_0.25.tsv"]
    tables = compare_command(paths)
    assert "no data-set fingerprint" in table(tables, "Paired tests refused")[2][0][1]
    tables = compare_command(paths, assume_same_images=True)
    rows = table(tables, "cohen2019_sigma_0.25 minus catrs_sigma_0.25, paired on 500 images, assumed")[2]
    cohen, catrs = (np.loadtxt(path, delimiter="\t", skiprows=1, usecols=(0, 3, 4)) for path in paths)
    catrs = catrs[np.isin(catrs[:, 0], cohen[:, 0])]
    better = ((cohen[:, 1] >= 0.5) & (cohen[:, 2] == 1)).sum() - ((catrs[:, 1] >= 0.5) & (catrs[:, 2] == 1)).sum()
    assert float(rows[2][1].split()[0].replace("−", "-")) == pytest.approx(better / 5, abs=0.051)
