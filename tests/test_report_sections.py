"""Sections of the report: contents, radii, classes, the walk through the attacked images, training, saved values."""

import csv
import io
import itertools
import json
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from rush.certification.certificates import Certificates
from rush.records.ladder import Ladder
from rush.records.read_run import Epoch, RunResults, read_run
from rush.reporting.classes import accuracy_by_class, confusion
from rush.reporting.exports import Data, csv_text, latex_text
from rush.reporting.page import write_report
from rush.reporting.plots import ladder_plot, radius_counts, zoomed_range
from rush.reporting.training_plots import rate_curve
from rush.reporting.walk import walk_of
from rush.statistics import Interval, share_interval
from test_report import (
    ATTACKED,
    EPSILON,
    Page,
    certificates_of,
    edit_json,
    ladder_of,
    make_full,
    page_of,
    set_verdict,
    table_of,
    undrawn,
    write_certificates,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_full(write_run(tmp_path / "run"))


def html_of(folder: Path) -> str:
    with undrawn():
        return write_report(folder).read_text(encoding="utf-8")


def test_contents_name_every_section_of_the_page(run: Path) -> None:
    html = html_of(run)
    (contents,) = re.findall(r'<nav aria-label="Contents">(.*?)</nav>', html, re.DOTALL)
    sections = re.findall(r'<section id="(\w+)">', html)
    assert re.findall(r'href="#(\w+)"', contents) == sections
    assert sections == ["certificates", "classes", "ladder", "epsilon", "audit", "samples", "trained", "cost", "origin"]


def test_contents_of_a_run_without_measurements_are_those_that_it_has(run: Path) -> None:
    for stage in ("certify", "attack", "audit"):
        (run / "stages" / f"{stage}.json").unlink()
    assert re.findall(r'href="#(\w+)"', html_of(run)) == ["trained", "cost", "origin"]


def test_the_headline_is_about_one_set_of_images(run: Path) -> None:
    """Of 60 certified images 40 are attacked: all four figures are those of the 40."""
    (headline,) = re.findall(r'<p class="headline">(.*?)</p>', html_of(run), re.DOTALL)
    text = " ".join(re.sub(r"<[^>]+>", "", headline).split())
    proved = read_run(run).threat_certificates
    assert proved is not None
    assert len(proved) == ATTACKED
    shares = [f"{100 * proved.accuracy(radius):.1f} %" for radius in (8 * EPSILON, 0.25)]
    assert text.startswith("On the same 40 test images, the smoothed classifier is right on 90.0 %")
    assert re.findall(r"[\d.]+ %", text) == ["90.0 %", "25.0 %", *shares]
    assert certificates_of(run).accuracy(0.25) != proved.accuracy(0.25)


def test_the_headline_says_where_other_images_were_certified(run: Path) -> None:
    ladder = ladder_of(run)
    with open(run / "certificates.tsv", encoding="utf-8") as file:
        header, *lines = file.read().splitlines()
    kept = [line for line in lines if line.split("\t")[0] != "3"]
    rule = [line.replace('"num_images": 60', '"num_images": 59') for line in kept]
    (run / "certificates.tsv").write_text("\n".join([header, *rule]) + "\n", encoding="utf-8")
    fields = json.loads((run / "stages" / "certify.json").read_text())
    edit_json(run / "stages" / "certify.json", **{**fields, "images": 59})
    sandwich = json.loads((run / "stages" / "attack.json").read_text())["sandwich"]
    edit_json(run / "stages" / "attack.json", sandwich={**sandwich, "checked": sandwich["checked"] - 1})
    text = page_of(run).text
    assert f"Of {len(ladder.clean)} test images, the smoothed classifier gets" in text
    assert "Certified were other images: of 59," in text
    assert "On the same" not in text


def test_radii_are_counted_by_class_and_bin(run: Path) -> None:
    certificates = certificates_of(run)
    edges, right, wrong = radius_counts(certificates)
    lines = [line for line in table_of(run) if line["predict"] != "-1"]
    for count, correct in ((right, "1"), (wrong, "0")):
        radii = [float(line["radius"]) for line in lines if line["correct"] == correct]
        slow = [sum(low <= radius < high for radius in radii) for low, high in itertools.pairwise(edges)]
        slow[-1] += sum(radius == edges[-1] for radius in radii)
        assert count.tolist() == slow
    assert (right.sum(), wrong.sum()) == (35, 15)
    assert edges[-1] == certificates.largest_radius


def test_classes_are_those_of_a_slow_count_with_the_worst_first(run: Path) -> None:
    write_certificates(run, votes={9: 500, 15: 990})  # class 9 has no image certified at 0.25, class 5 has two
    results = read_run(run)
    rows = accuracy_by_class(results)
    lines = table_of(run)
    for row in rows:
        own = [line for line in lines if f"digit {line['label']}" == row.name]
        right = [float(line["radius"]) for line in own if line["correct"] == "1"]
        assert row.images == len(own) == 6
        assert row.predicted == share_interval(len(right), 6)
        assert row.certified == share_interval(sum(radius >= 0.25 for radius in right), 6)
    estimates = [row.certified.estimate for row in rows]
    assert estimates == sorted(estimates)
    assert [rows[0].name, rows[-1].name] == ["digit 9", "digit 5"]
    assert len(rows) == 10


def test_confusion_counts_every_image_once(run: Path) -> None:
    table = confusion(read_run(run))
    assert table.names == tuple(f"digit {label}" for label in range(10))
    slow = np.zeros((10, 11), int)
    for line in table_of(run):
        slow[int(line["label"]), int(line["predict"])] += 1  # -1 is the last column
    assert table.counts.tolist() == slow.tolist()
    assert table.counts.sum() == 60
    assert [count for *_, count in table.pairs] == sorted((count for *_, count in table.pairs), reverse=True)
    assert sum(count for *_, count in table.pairs) == 60 - np.trace(slow)
    cells = page_of(run).tables["confusion"]
    assert [row[1:] for row in cells[1:]] == [[str(count or "·") for count in row] for row in slow.tolist()]


def many_classes(results: RunResults) -> RunResults:
    """The run with 30 classes, each image one of its own, the prediction of image i as it was or 29."""
    certificates = results.certificates
    assert certificates is not None
    labels = np.arange(60) % 30
    changed = replace(certificates, labels=labels, prediction=np.where(certificates.abstained, -1, 29))
    return replace(results, certificates=changed, classes=tuple(f"kind {label}" for label in range(30)), ladder=None)


def test_many_classes_are_the_worst_and_the_most_frequent_confusions(run: Path) -> None:
    from rush.reporting.page import render

    results = many_classes(read_run(run))
    with undrawn():
        page = Page(render(replace(results, audit=None)))
    assert "The 20 of 30 classes with the lowest certified accuracy" in page.text
    rows = page.tables["confusion"]
    assert rows[0] == ["label", "predicted under the noise", "images"]
    assert len(rows) == 16
    assert {row[1] for row in rows[1:]} <= {"kind 29", "abstained"}


@pytest.mark.parametrize("epsilon", [0.0, 0.004, 0.02, EPSILON, 0.04, 0.1])
def test_the_walk_says_what_the_files_say(run: Path, epsilon: float) -> None:
    """By a slow reading of both tables, image by image; of the images that hold, three are not proved."""
    write_certificates(run, votes=dict.fromkeys((1, 2, 3), 500))
    results = read_run(run)
    walk = walk_of(results)
    assert walk is not None
    header, *rows = (line.split("\t") for line in (run / "attacks.tsv").read_text().splitlines())
    attacks = [dict(zip(header, row, strict=False)) for row in rows]
    proved = {f"img-{line['idx']}": float(line["radius"]) / 8 for line in table_of(run) if line["correct"] == "1"}
    for image_id, known in zip(walk.ids, walk.at(epsilon), strict=True):
        own = [line for line in attacks if line["id"] == image_id and line["rung"] != "sandwich"]
        broken = [min(float(line["linf"]), EPSILON) for line in own if line["verdict"] == "broken"]
        if any(line["rung"] == "clean" and line["verdict"] == "broken" for line in own):
            expected = "wrong"
        elif epsilon <= proved.get(image_id, -1):
            expected = "proved"
        elif any(size <= epsilon for size in broken):
            expected = "broken"
        else:
            held = all(line["verdict"] == "held" for line in own) and epsilon <= EPSILON
            expected = "held" if held else "open"
        assert known == expected, image_id
    assert ("held" in walk.at(epsilon)) == (epsilon <= EPSILON)


def test_the_walk_at_the_threat_agrees_with_the_ladder(run: Path) -> None:
    results = read_run(run)
    walk, ladder = walk_of(results), ladder_of(run)
    assert walk is not None
    shares = walk.shares(EPSILON)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["broken"] + shares["wrong"] == pytest.approx(1 - ladder.combined.estimate)
    assert shares["proved"] == pytest.approx(share_interval(11, 40).estimate, abs=0.06)
    assert set(walk.at(10.0)) <= {"wrong", "broken", "open"}


def test_an_undecided_image_is_open(run: Path) -> None:
    write_certificates(run, votes=dict.fromkeys(range(60), 500))  # nothing is certified
    before = walk_of(read_run(run))
    assert before is not None
    assert before.at(EPSILON)[1] == "held"
    set_verdict(run, "eot-1", 1, "undecided")
    after = walk_of(read_run(run))
    assert after is not None
    assert after.at(EPSILON)[1] == "open"


def test_a_size_that_is_not_known_counts_as_epsilon(run: Path) -> None:
    ladder = ladder_of(run)
    rungs = tuple(replace(rung, threat_size=None) for rung in ladder.rungs)
    sizes = replace(ladder, rungs=rungs).smallest_broken
    broken = ~ladder.standing & ladder.clean.standing
    assert set(sizes[broken]) == {EPSILON}
    assert set(ladder.smallest_broken[broken]) == {0.03}


def test_the_page_holds_the_walk_and_what_is_known_at_the_threat(run: Path) -> None:
    html = html_of(run)
    walk = walk_of(read_run(run))
    assert walk is not None
    (limits,) = re.findall(r'data-limits="([^"]*)"', html)
    assert json.loads(unescape(limits)) == walk.limits
    assert {held for *_, held in walk.limits} == {EPSILON, -1.0}  # rounding would make the threat larger than it
    assert "NaN" not in limits
    assert "Infinity" not in limits
    shown = re.findall(r'data-state="(\w+)" data-place="(\d+)"', html)
    known = walk.at(EPSILON)
    assert len(shown) == 9
    assert all(known[int(place)] == state for state, place in shown)


def test_pictures_tell_change_and_certified_radius(run: Path) -> None:
    text = page_of(run).text
    assert f"change ℓ∞ {EPSILON:.3g}, ℓ2 {8 * EPSILON:.3g}" in text
    down = math.floor(1000 * certificates_of(run).radius[0]) / 1000
    assert f"certified ℓ2 radius {down:g}. At" in text
    assert "abstained" in text


def test_the_ladder_is_enlarged_where_its_attackers_are_close(run: Path) -> None:
    ladder = ladder_of(run)
    near = [Interval(0.5, 0.444, 0.551), Interval(0.6, 0.55, 0.649)]
    assert zoomed_range(near) == (0.44, 0.65)
    assert zoomed_range(near[:1]) is None
    assert zoomed_range([*near, Interval(0.9, 0.85, 0.95)]) is None
    for form in ("wide", "narrow"):
        few = replace(ladder, rungs=(ladder.rungs[0], *ladder.rungs[-2:]))
        enlarged = "attackers’ range, enlarged" in str(ladder_plot(few, None, "ladder", form))  # type: ignore[arg-type]
        assert enlarged == (zoomed_range([rung.accuracy for rung in few.rungs[1:]]) is not None)
    same: Ladder = replace(ladder, rungs=(ladder.rungs[0], ladder.rungs[4], ladder.rungs[4]))
    assert "enlarged" in str(ladder_plot(same, None, "ladder", "wide"))


def test_the_learning_rate_is_drawn_where_the_log_has_it(run: Path) -> None:
    assert not [label for label in page_of(run, drawn=True).labels if "learning rate" in label]
    rated = [{"event": "epoch", "stage": "finetune", "epoch": e, "loss": 1, "seconds": 1} for e in (1, 2)]
    lines = [json.dumps({**event, "learning_rate": 0.5 / (place + 1)}) for place, event in enumerate(rated)]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert [epoch.learning_rate for epoch in read_run(run).epochs] == [0.5, 0.25]
    labels = [label for label in page_of(run, drawn=True).labels if "learning rate" in label]
    assert labels == ["Fine-tuning, learning rate: 0.5 to 0.25 in 2 epochs"]
    epochs = (Epoch("finetune", 1, 1.0, 1.0), Epoch("finetune", 2, 1.0, 1.0, 0.125))
    assert "0.125 to 0.125 in 1 epochs" in str(rate_curve(epochs, "a", "b", "narrow"))


DATA = Data(
    "name",
    "50 % of a_b",
    ("kind", "share", "of"),
    [("a,b & c", Interval(0.5, 0.25, 0.75), 1), ('"x"', None, None), ("ℓ∞ ≥ σ", Interval(1 / 3, 0.0, 1.0), 0.1)],
)


def test_csv_holds_all_digits_and_both_ends() -> None:
    rows = list(csv.reader(io.StringIO(csv_text(DATA))))
    assert rows == [
        ["kind", "share", "share low", "share high", "of"],
        ["a,b & c", "0.5", "0.25", "0.75", "1"],
        ['"x"', "", "", "", ""],
        ["ℓ∞ ≥ σ", "0.3333333333", "0", "1", "0.1"],
    ]


def test_latex_is_a_table_with_its_characters_escaped() -> None:
    text = latex_text(DATA)
    assert text.startswith("% 50 % of a_b\n\\begin{tabular}{lrr}\n\\toprule\nkind & share & of \\\\\n")
    assert "a,b \\& c & 50.0 \\% [25.0, 75.0] & 1 \\\\" in text
    assert '"x" & -- & -- \\\\' in text
    assert "$\\ell$$_\\infty$ $\\ge$ $\\sigma$ & 33.3 \\% [0.0, 100.0] & 0.1 \\\\" in text
    hostile = replace(DATA, rows=[("\\input{x}$^~#{}", None, None)])
    assert r"\textbackslash{}input\{x\}\$\textasciicircum{}\textasciitilde{}\#\{\} &" in latex_text(hostile)


def test_latex_of_a_curve_is_a_plot() -> None:
    curve = Data("c", "C", ("x", "y", "z"), [(0.0, 1.0, None), (0.5, 0.25, 0.125)], curve=True)
    text = latex_text(curve)
    assert r"\addplot coordinates {(0,1) (0.5,0.25)};" in text
    assert r"\addplot coordinates {(0.5,0.125)};" in text
    assert text.count(r"\addlegendentry") == 2


def test_every_figure_and_table_has_its_values_beside_it(run: Path) -> None:
    """A link decodes to the values in the files; every figure can be saved as SVG; every table has a CSV."""
    html = html_of(run)
    links = re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)" download="([\w-]+)\.csv"', html)
    saved = {name: list(csv.reader(io.StringIO(unquote(unescape(text))))) for text, name in links}
    tables = {"certified", "classes", "confusion", "ladder", "epsilon", "audit", "findings", "cost", "recipe"}
    assert saved.keys() >= {*tables, "certified-curve", "radii", "images", "training-pretrain", "provenance"}
    certificates: Certificates = certificates_of(run)
    assert [float(row[0]) for row in saved["certified"][1:]] == list(certificates.table_radii)
    assert float(saved["certified"][2][1]) == pytest.approx(certificates.accuracy(0.25))
    assert [row[0] for row in saved["ladder"][1:]][:5] == [rung.label for rung in ladder_of(run).rungs][:5]
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert len(figures) >= 7
    assert all("data-svg" in figure and ".csv" in figure and ".tex" in figure for figure in figures)
    assert html.count('<div class="scroll"') <= len(saved) + 1  # both parts of the findings are one file
    plain = re.findall(r'href="data:application/x-tex;charset=utf-8,([^"]*)"', html)
    assert all(unquote(unescape(text)).startswith("% ") for text in plain)


def test_a_page_is_small(run: Path) -> None:
    assert len(write_report(run).read_bytes()) < 1_000_000
