"""The report of a run folder: every figure comes from the files, the page stands alone, and damage is named."""

import base64
import hashlib
import io
import json
import math
import operator
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import reduce
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image
from scipy import optimize, special, stats

import rush
from rush.auditing.findings import LARGE_EPSILON_HELD
from rush.auditing.report import FORMAT, AuditReport
from rush.auditing.report import Finding as AuditFinding
from rush.certification.certificates import Certificates
from rush.errors import RunError
from rush.records.attacks import read_attacks
from rush.records.certificates import write_certificates as write_table
from rush.records.ladder import Ladder
from rush.records.published import CERTIFIED as PUBLISHED_CURVES
from rush.records.published import certified_curves
from rush.records.read_run import RunResults, Watched, read_run
from rush.records.record import FORMATS, Record
from rush.reporting.costs import TrainingCost, training_cost, training_sentence
from rush.reporting.page import render, write_report
from rush.reporting.plots import certified_curve, epsilon_curve
from rush.reporting.wording import (
    audit_sentence,
    bounds,
    cost_rows,
    percent,
    points,
    rises_text,
    share,
    summary_rows,
    zero_text,
)
from rush.statistics import paired_difference, share_interval
from stored import rule_of, stored_certificates, votes_for
from tiny import EVERY_RUN

KEPT = Path(rush.__file__).parents[2] / "results" / "cifar10-small"
GRID = (0.0, 0.25, 0.5)
CERTIFIED, ATTACKED, SIGMA, EPSILON = 60, 40, 0.5, 8 / 255
COVERING = EPSILON * 8  # 8 x 8 pixels, one channel
# Images (of the 40 attacked, counted from 0) that each rung leaves standing; the rest of the right ones are broken.
STANDING = {"clean": 36, "frozen": 30, "transfer": 20, "eot-1": 17, "eot-16": 12}
LABELS = {
    "clean": "no attack",
    "frozen": "PGD, one noise draw kept",
    "transfer": "PGD on the plain classifier",
    "eot-1": "PGD, fresh noise, EOT 1",
    "eot-16": "PGD, fresh noise, EOT 16",
}
BUDGETS = {"frozen": ", EOT 1", "transfer": "", "eot-1": ", EOT 1", "eot-16": ", EOT 16"}
FIRST = {"clean": 4, "transfer": 16, "pgd": 0, "apgd": 10}
VOTES = {"held": "700\t200", "broken": "200\t700", "undecided": "450\t450"}  # for the label, for the challenger
CURVE = {
    "label": "PGD-20, margin of the mean, EOT 16",
    "images": 20,
    "points": [
        {"epsilon": size / 255, "epsilon_text": f"{size:g}/255", "broken": broken, "held": held, "undecided": undecided}
        for size, broken, held, undecided in ((4, 5, 14, 1), (8, 12, 8, 0), (16, 14, 6, 0), (127.5, 20, 0, 0))
    ],
}
TIMING = {"seconds": 65.0, "started": "2026-01-01T10:00:00", "finished": "2026-01-01T10:01:05", "commit": "abc123"}
FINDINGS = (
    AuditFinding("ball", "passed", 1.0, 1.001, "the largest change is 1.0000 epsilon", "project the points"),
    AuditFinding("step-size", "failed", 0.05, 1.0, "all steps together are 0.05 epsilon long", "take larger steps"),
    AuditFinding("noise", "failed", math.inf, 1.1, "the attacker sees noise of deviation 0.1", "use the same noise"),
    AuditFinding("more-steps", "undecided", 0.03, 0.01, "1 of 33 images are broken by more steps", "double the steps"),
    AuditFinding("mode", "skipped", None, None, "nothing to look at", ""),
)


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_run(folder: Path, name: str = "digits", classes: list[str] | None = None) -> Path:
    """A small synthetic run: 60 certified images, 35 right, 10 of these with a radius above 0.25; 40 attacked."""
    write_json(folder / "recipe.json", recipe(name))
    provenance = {"seed": 0, "commit": "abc123", "versions": {"torch": "2.13.0"}, "threads": 2}
    write_json(folder / "provenance.json", provenance)
    write_json(folder / "model" / "model.json", {"classes": classes or [f"digit {k}" for k in range(10)]})
    write_log(folder / "log.jsonl")
    training = {"epochs": 3, "passes_per_image": 6.0, "images_per_second": 812.0}
    write_stage(folder, "pretrain", **training, knn_accuracy={"correct": 31, "total": 50})
    write_stage(folder, "finetune", **training, mode="full")
    write_certificates(folder)
    write_attacks(folder)
    return folder


def write_stage(folder: Path, stage: str, **figures: object) -> None:
    write_json(folder / "stages" / f"{stage}.json", {"stage": stage, **TIMING, **figures})


def recipe(name: str) -> dict:
    return {
        "name": name,
        "seed": 0,
        "data": {"name": "digits"},
        "model": {"encoder": "small", "width": 16},
        "smoothing": {"sigma": SIGMA},
        "attack": {"norm": "linf", "epsilon": "8/255", "eot_samples": [1, 16]},
    }


def write_log(file: Path) -> None:
    figures = {"seconds": 3.0, "images_per_second": 812.0}
    events = [
        {"event": "epoch", "stage": stage, "epoch": epoch, "loss": 2.0 / epoch, **figures}
        for stage in ("pretrain", "finetune")
        for epoch in (1, 2, 3)
    ]
    lines = [json.dumps(event) for event in [{"event": "start"}, *events]]
    file.write_text("\n".join(lines) + '\n{"event": "epo', encoding="utf-8")


def stored_votes() -> tuple[list[int], list[int]]:
    """Votes and selected classes: 30 images right, the first ten with radii from 0.9 down to 0.45 and the others from
    0.2 to 0.1; 10 abstained; 5 right and 15 wrong at 0.1."""
    radii = [0.9 - 0.05 * i if i < 10 else max(0.2 - 0.005 * (i - 10), 0.1) for i in range(CERTIFIED)]
    votes = [500 if 30 <= i < 40 else votes_for(radii[i], rule_of()) for i in range(CERTIFIED)]
    return votes, [i % 10 if i < 45 else (i + 1) % 10 for i in range(CERTIFIED)]


def write_certificates(folder: Path, votes: dict[int, int] | None = None, **rule: object) -> None:
    """votes: of some images others than ``stored_votes``."""
    stored, selected = stored_votes()
    chosen = [(votes or {}).get(i, count) for i, count in enumerate(stored)]
    certificates = stored_certificates(rule_of(**rule), chosen, selected, [i % 10 for i in range(CERTIFIED)])
    write_table(folder / "certificates.tsv", certificates, range(CERTIFIED))
    names = ("sigma", "alpha", "num_selection", "num_estimation")
    fields = {"images": CERTIFIED, **{name: getattr(certificates.rule, name) for name in names}}
    write_stage(folder, "certify", **fields, forward_passes_per_image=1100, images_per_second=9.5)
    recount_sandwich(folder)


def table_of(folder: Path) -> list[dict[str, str]]:
    """The lines of certificates.tsv by column."""
    header, *lines = (line.split("\t") for line in (folder / "certificates.tsv").read_text().splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def make_sequential(folder: Path, **rule: object) -> Path:
    """The run's certificates made sequential ones: 9 images right at 0.5, 1 more at 0.25, 25 more at 0; 15 wrong at
    0.25; 5 given up at 0 and 10 at 0.25; 840 samples per image on average.
    """

    def votes(i: int) -> int:
        if i < 9:
            return 1000
        if i == 9 or i >= 45:
            return 850
        if 30 <= i < 40:
            return 200 if i < 35 else 500
        return 600 if i < 30 and i % 2 == 0 else 700

    radii = tuple(rule.pop("radii", GRID))  # type: ignore[call-overload]
    sequential = rule_of(method="sequential", level="family", radii=radii, **rule)
    labels = [i % 10 for i in range(CERTIFIED)]
    certificates = stored_certificates(sequential, [votes(i) for i in range(CERTIFIED)], stored_votes()[1], labels)
    write_table(folder / "certificates.tsv", certificates, range(CERTIFIED))
    fields = {**asdict(sequential), "statement": sequential.statement}
    passes = float(certificates.num_samples.mean())
    edit_json(folder / "stages" / "certify.json", **{**fields, "forward_passes_per_image": passes})
    recount_sandwich(folder)
    return folder


def recount_sandwich(folder: Path) -> None:
    record = folder / "stages" / "attack.json"
    if record.exists():
        sandwich = json.loads(record.read_text())["sandwich"]
        edit_json(record, sandwich={**sandwich, **count_sandwich(folder)})


def certificates_of(folder: Path) -> Certificates:
    certificates = read_run(folder).certificates
    assert certificates is not None
    return certificates


def count_sandwich(folder: Path) -> dict[str, int]:
    """Attacked images that are certified right with a positive radius, and how many of them may be broken by chance."""
    lines = table_of(folder)[:ATTACKED]
    checked = sum(line["correct"] == "1" and float(line["radius"]) > 0 for line in lines)
    rule = json.loads(lines[0]["rule"])
    level = rule["alpha"] / (rule["num_images"] if rule["level"] == "family" else 1)
    return {"checked": checked, "allowed": int(stats.binom.isf(1e-6, checked, level + 0.001)) if checked else 0}


def attacked(rung: str, standing: int) -> list[str]:
    """Lines of attacks.tsv with the first ``standing`` images held. Those of eot-16 leave one of them undecided."""
    l2 = 0.0 if rung == "clean" else COVERING  # above the radius of every image that breaks
    lines = []
    for i in reversed(range(ATTACKED)):  # the order in the file must not matter
        verdict = "broken" if i >= standing else "undecided" if rung == "eot-16" and i == 0 else "held"
        cells = (rung, i, f"img-{i}", i % 10, verdict, 0.03, l2, (i + 3) % 10, 1000, VOTES[verdict])
        lines.append("\t".join(map(str, cells)) + "\n")
    return lines


def write_attacks(folder: Path) -> None:
    lines = ["rung\tidx\tid\tlabel\tverdict\tlinf\tl2\tchallenger\tvotes\tvotes_label\tvotes_challenger\n"]
    lines += [line for rung, standing in STANDING.items() for line in attacked(rung, standing)]
    lines += [f"sandwich\t{i}\timg-{i}\t{i % 10}\theld\t0.2\t0.1\t0\t1000\t900\t50\n" for i in range(30)]
    (folder / "attacks.tsv").write_text("".join(lines), encoding="utf-8")
    rungs = [
        {
            "name": name,
            "label": LABELS[name],
            "steps": 20 if place else None,
            "step_size": "2/255" if place else None,
            "restarts": 1 if place else None,
            "eot_samples": {"frozen": 1, "eot-1": 1, "eot-16": 16}.get(name),
            "passes_per_image": 20.0 * place,
            "seconds": 10.0 * place,
        }
        for place, name in enumerate(STANDING)
    ]
    sandwich = {"violations": [], "passes_per_image": 40, "seconds": 12.0, **count_sandwich(folder)}
    threat = {"norm": "linf", "epsilon": EPSILON, "epsilon_text": "8/255"}
    judged = {"alpha": 0.001, "level": 0.0002, "num_verdicts": 5, "max_votes": 10000, "votes_per_image": 800.0}
    write_stage(folder, "attack", threat=threat, **judged, rungs=rungs, sandwich=sandwich)
    write_images(folder / "attacks")


def make_full(folder: Path, newly: int = 12, verdict: str = "overestimated") -> Path:
    """The run with a ladder in full (APGD leaves 11, Square 25, the worst case 10), a curve to zero and an audit."""
    standing = {"apgd": 11, "square": 25, "worst-case": 10}
    with open(folder / "attacks.tsv", "a", encoding="utf-8") as file:
        file.writelines(line for rung, count in standing.items() for line in attacked(rung, count))
    spent = {"passes_per_image": 800.0, "forward_passes_per_image": 216.0, "votes_per_image": 300.0, "seconds": 30.0}
    noisy = {"loss": "margin", "gradient": "fresh", "step_size": 0.0, "restarts": 1, **spent}
    suite = {"suite": "worst-case-v1", "attackers": FIRST}
    rungs = [
        *({**rung, "method": "pgd" if place else "none"} for place, rung in enumerate(attack_rungs(folder))),
        {"name": "apgd", "label": "APGD-50, EOT 16", "method": "apgd", "steps": 50, "eot_samples": 16, **noisy},
        {"name": "square", "label": "Square", "method": "square", "steps": 1000, "eot_samples": 8, **noisy},
        {"name": "worst-case", "label": "worst case of 4 attackers", **suite, **spent},
    ]
    edit_json(folder / "stages" / "attack.json", rungs=rungs, curve=CURVE, votes_per_image=None)
    for rung in standing:
        shutil.copy(folder / "attacks" / "eot-16.npz", folder / "attacks" / f"{rung}.npz")
    write_audit(folder, newly, verdict)
    return folder


def write_audit(folder: Path, newly: int, verdict: str) -> None:
    """Write an audit of 40 images, of which the evaluation left 17 unbroken and the audit broke ``newly`` of these."""
    report = AuditReport(
        verdict=verdict,
        evaluation="PGD-20, EOT 1",
        evaluation_accuracy=17 / 40,
        reference="worst case of 4 attackers",
        reference_accuracy=(17 - newly) / 40,
        images=40,
        newly_broken=tuple(f"img-{i}" for i in range(newly)),
        tolerance=0.08,
        findings=tuple(FINDINGS if verdict != "holds" else FINDINGS[:1]),
        norm="linf",
        epsilon=EPSILON,
        alpha=0.001,
        max_votes=4000,
        seed=0,
    )
    write_json(folder / "audit.json", report.to_json())
    write_json(folder / "stages" / "audit.json", {"stage": "audit", "seconds": 33.0, "finished": "2026-01-01"})


def write_images(folder: Path) -> None:
    """Image i is flat grey 100 + i; an attacked image is 8/255 lighter on the left half and darker on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.full((1, 8, 8), 100 + i, np.uint8) for i in range(ATTACKED)])
    ids = np.array([f"img-{i}" for i in range(ATTACKED)])
    np.savez(folder / "images.npz", images=images, labels=np.arange(ATTACKED) % 10, ids=ids)
    sign = np.where(np.arange(8) < 4, 1.0, -1.0)
    adversarial = (images / 255 + EPSILON * sign).astype(np.float32)
    for name in STANDING:
        np.savez(
            folder / f"{name}.npz", adversarial=adversarial if name != "clean" else images / np.float32(255), ids=ids
        )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


class Page(HTMLParser):
    """What a browser would load, the ids, the images and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.pictures: list[np.ndarray] = []
        self.words: list[str] = []
        self.labels: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._silent = self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent = tag in ("style", "script")
        if tag == "table":
            named = dict(attrs)
            self._rows = self.tables.setdefault(named.get("id") or named.get("class") or "", [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
        self._in_cell = tag in ("th", "td") or (tag == "span" and self._in_cell)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "xlink:href", "action"):
                self.loads.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if tag == "img" and name == "src":
                self.pictures.append(decode(value or ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag == "span"
        self._silent = self._silent and tag not in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)
        if self._in_cell:
            self._rows[-1][-1] = f"{self._rows[-1][-1]} {data}".strip()

    def table(self, name: str) -> dict[str, list[str]]:
        """Return the rows of a table below its header, by their first cell."""
        return {row[0]: row[1:] for row in self.tables[name][1:]}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def decode(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.fixture
def full(run: Path) -> Path:
    return make_full(run)


def ladder_of(folder: Path) -> Ladder:
    ladder = read_run(folder).ladder
    assert ladder is not None
    return ladder


def audit_of(folder: Path) -> AuditReport:
    audit = read_run(folder).audit
    assert audit is not None
    return audit


def summary_of(folder: Path) -> dict[str, str]:
    return dict(summary_rows(read_run(folder)))


@contextmanager
def undrawn() -> Iterator[None]:
    """Pages without their plots, which take nearly all of the time."""
    names = ("certified_curve", "radius_histogram", "class_plot", "ladder_plot", "epsilon_curve")
    trainings = ("training_curve", "watched_curve", "rate_curve")
    with (
        mock.patch.multiple("rush.reporting.plots", **dict.fromkeys(names, lambda *_: Markup(""))),
        mock.patch.multiple("rush.reporting.training_plots", **dict.fromkeys(trainings, lambda *_: Markup(""))),
    ):
        yield


def page_of(folder: Path, drawn: bool = False) -> Page:
    """The page of a run, without its plots unless ``drawn``."""
    with nullcontext() if drawn else undrawn():
        return Page(write_report(folder).read_text(encoding="utf-8"))


def edit(file: Path, old: str, new: str, times: int = -1) -> None:
    content = file.read_text(encoding="utf-8")
    assert old in content
    file.write_text(content.replace(old, new, times), encoding="utf-8")


def set_verdict(folder: Path, rung: str, image: int, verdict: str) -> None:
    """Change a verdict of attacks.tsv, and its votes with it."""
    header, *lines = (line.split("\t") for line in (folder / "attacks.tsv").read_text().splitlines())
    row = next(line for line in lines if (line[0], line[1]) == (rung, str(image)))
    row[4], row[9], row[10] = verdict, *VOTES[verdict].split("\t")
    row[7] = str((image + 3) % 10)
    (folder / "attacks.tsv").write_text("".join("\t".join(line) + "\n" for line in [header, *lines]))


def edit_json(file: Path, **changes: object) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **changes})


def true_share(certified: int, total: int, image_alpha: float) -> str:
    """The statement of ``accuracy_lower`` by another way: the share at which so many successes have chance 5 %."""
    low = optimize.brentq(lambda s: stats.binom.sf(certified - 1, total, s) - 0.05, 1e-9, 1 - 1e-9, xtol=1e-13)
    return f"{math.floor(1000 * (low - image_alpha) / (1 - image_alpha)) / 10:.1f} %"


def standing(count: int) -> np.ndarray:
    return np.arange(ATTACKED) < count


def test_summary_rows_are_the_counts_in_the_files(run: Path) -> None:
    """Every row equals the interval of the count that the fixture wrote, none a summary of a stage's."""
    rows = summary_of(run)
    assert rows["clean accuracy"] == f"{share(share_interval(36, 40))} (n = 40)"
    assert rows[f"attacked, ℓ∞ 8/255, {LABELS['eot-16']}"] == f"{share(share_interval(12, 40))} (n = 40)"
    assert rows["certified by"] == "Clopper–Pearson"
    assert (
        rows["level"]
        == "each certificate by itself is false with probability at most 0.001, over the draws of the noise"
    )
    assert rows["samples per image"] == "1,100, 100 of them to select the class"
    assert rows["certified at ℓ2 0"] == f"{share(share_interval(35, 60))} (n = 60), true ≥ {true_share(35, 60, 0.001)}"
    at_half = f"{share(share_interval(10, 60))} (n = 60), true ≥ {true_share(10, 60, 0.001)}"
    assert rows["certified at ℓ2 0.25"] == at_half
    floor = f"{share(share_interval(10, 40))} (n = 40), true ≥ {true_share(10, 40, 0.001)}"
    assert rows["certified floor at ℓ∞ 8/255"] == floor
    difference = paired_difference(standing(30), standing(12))
    assert rows[f"{LABELS['frozen']} flatters by"] == f"{points(difference)} points"
    assert rows["sandwich"] == "0 violations, 30 images checked, 3 allowed"
    radii = [float(line["radius"]) for line in table_of(run) if line["label"] == line["predict"]]
    assert len(radii) == 35
    assert rows["ACR"] == f"{sum(radii) / 60:.3f} (N = 1,000)"


def test_figures_are_printed_as_percent_with_both_ends() -> None:
    """Known value: 12 of 40 is 30 %, Clopper-Pearson 16.6 to 46.5 %; a loss of accuracy has a minus sign."""
    assert share(share_interval(12, 40)) == "30.0 % [16.6, 46.5]"
    assert points(paired_difference(standing(12), standing(30))).startswith("−45.0 [−")


def test_changing_a_verdict_changes_the_page(run: Path) -> None:
    """One more broken image under one attacker: its accuracy, interval and paired difference follow."""
    before = page_of(run).text
    set_verdict(run, "eot-1", 16, "broken")
    after = page_of(run).text
    old, new = share_interval(17, 40), share_interval(16, 40)
    step = points(paired_difference(standing(16), standing(20)))
    for text in (percent(new.estimate), bounds(new), f"[{step.split(' [')[1]}"):
        assert text in after
        assert text not in before
    assert bounds(old) in before
    assert bounds(old) not in after


def test_changing_a_radius_changes_the_page(run: Path) -> None:
    """Image 9 loses its radius: 9 instead of 10 of 60 are certified at sigma/2, and the floor is 9 of 40."""
    assert bounds(share_interval(10, 60)) in page_of(run).text
    write_certificates(run, votes={9: votes_for(0.01, rule_of())})
    after = page_of(run).text
    assert bounds(share_interval(10, 60)) not in after
    assert bounds(share_interval(9, 60)) in after
    assert bounds(share_interval(9, 40)) in after


def test_equal_files_give_equal_pages_and_no_other_file(full: Path) -> None:
    """Proves that nothing of the clock or of chance enters the page and that no partial file stays behind."""
    before = sorted(full.rglob("*"))
    path = write_report(full)
    first = path.read_bytes()
    assert path == full / "report.html"
    assert write_report(full).read_bytes() == first
    assert sorted(full.rglob("*")) == sorted([*before, path])


def test_page_stands_alone(full: Path) -> None:
    """Whatever a tag loads is inside the page: data URIs and fragments that exist; one script; every id once."""
    html = write_report(full).read_text(encoding="utf-8")
    page = Page(html)
    assert {load[:5] for load in page.loads if not load.startswith("#")} == {"data:"}
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(page.ids)
    assert {name[0] or name[1] for name in re.findall(r"url\(#([^)]+)\)|url\(([^#][^)]*)\)", html)} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "@import" not in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_flattering_evaluation_is_stated_in_a_sentence(run: Path) -> None:
    """The frozen draw leaves 18 more images unbroken than EOT 16, which the page states. Without a lead it does not."""
    difference = paired_difference(standing(30), standing(12))
    text = page_of(run).text
    assert f"An evaluation that stops at “ {LABELS['frozen']} ” would have reported 75.0 %" in text
    assert f"{100 * difference.estimate:.1f} points too much" in text
    for rung in ("frozen", "eot-1"):
        for i in range(12, ATTACKED):
            set_verdict(run, rung, i, "broken")
    assert "An evaluation that stops at" not in page_of(run).text


def test_transfer_attack_is_not_called_noise_aware(run: Path) -> None:
    """The attacker on the plain classifier leaves more standing than EOT 1, yet does not see the noise."""
    rungs = [{**rung, "eot_samples": None} if rung["name"] == "frozen" else rung for rung in attack_rungs(run)]
    edit_json(run / "stages" / "attack.json", rungs=rungs)
    assert f"An evaluation that stops at “ {LABELS['eot-1']} ” would" in page_of(run).text
    ladder = ladder_of(run)
    assert ladder.flattering is not None
    assert ladder.flattering.name == "eot-1"


def attack_rungs(folder: Path) -> list[dict]:
    return json.loads((folder / "stages" / "attack.json").read_text())["rungs"]


def test_weaker_attacker_last_is_not_the_strongest(run: Path) -> None:
    """The strongest attacker is the one that broke most, not the one that stands last in the ladder."""
    rungs = attack_rungs(run)
    edit_json(run / "stages" / "attack.json", rungs=[rungs[0], *reversed(rungs[1:])])
    ladder = ladder_of(run)
    assert ladder.strongest.name == "eot-16"
    assert ladder.rungs[-1].name == "frozen"


def test_neighbour_accuracy_is_stated_where_it_was_measured(run: Path) -> None:
    """31 of 50 is 62 %; null says nothing."""
    assert f"give the right class for {share(share_interval(31, 50))} of the images" in page_of(run).text
    edit_json(run / "stages" / "pretrain.json", knn_accuracy=None)
    assert "give the right class" not in page_of(run).text


def test_step_size_is_a_share_of_epsilon_or_pixels(run: Path) -> None:
    """A number is printed as a share of epsilon, a fraction as it stands: the two cannot be mistaken for each other."""
    assert "20 steps of 2/255, EOT 16" in page_of(run).text
    rungs = [{**rung, "step_size": 0.25} for rung in attack_rungs(run)]
    edit_json(run / "stages" / "attack.json", rungs=rungs)
    assert "20 steps of 0.25 ε, EOT 16" in page_of(run).text


def test_an_image_that_any_attacker_broke_counts_for_all_of_them_together(run: Path) -> None:
    """Image 3 falls under the weakest attacker alone: the strongest keeps its 12 images, all together leave 11.

    One of the 12 is undecided, which is neither broken nor held.
    """
    set_verdict(run, "frozen", 3, "broken")
    ladder = ladder_of(run)
    assert ladder.strongest.undecided == 1
    assert ladder.strongest.accuracy == share_interval(12, 40)
    assert ladder.strongest.accuracy_lower == share_interval(11, 40)
    assert ladder.combined == share_interval(11, 40)
    assert summary_of(run)["attacked, by any rung of the ladder"] == f"{share(share_interval(11, 40))} (n = 40)"


def test_certificates_match_a_slow_count(run: Path) -> None:
    """Certified accuracy at any radius equals a loop over the lines, also at and beside a radius in the file."""
    certificates = certificates_of(run)
    lines = table_of(run)
    held = float(lines[0]["radius"])
    for radius in (0.0, 0.1, held, held + 1e-9, 0.2, 0.25, 0.9, 0.95):
        slow = sum(line["label"] == line["predict"] and float(line["radius"]) >= radius for line in lines)
        assert certificates.accuracy_interval(radius).estimate == slow / 60
    # Closed form: p_lower = 0.001^(1/1000) = 0.993116, whose normal quantile is 2.46326.
    assert certificates.largest_radius == pytest.approx(0.5 * 2.46326, abs=1e-5)


def test_sequential_run_says_method_level_samples_and_what_is_undecided(run: Path) -> None:
    """Every figure is the count that the fixture wrote; nothing of a fixed number of samples is left in the rows."""
    rows = summary_of(make_sequential(run))
    assert rows["certified by"] == "Sequential (geometric), grid 0 / 0.25 / 0.5"
    assert (
        rows["level"]
        == "all 60 certificates hold together with probability at least 0.999, over the draws of the noise"
    )
    assert rows["samples per image"] == "840 on average, at most 1,100, 100 of them to select the class"
    level = 0.001 / 60
    assert rows["certified at ℓ2 0"] == (
        f"{share(share_interval(35, 60))} (n = 60), true ≥ {true_share(35, 60, level)}"
        ", wrong class 25.0 %, not certifiable 8.3 %, undecided 8.3 %"
    )
    assert rows["certified at ℓ2 0.25"] == (
        f"{share(share_interval(10, 60))} (n = 60), true ≥ {true_share(10, 60, level)}"
        ", wrong class 25.0 %, not certifiable 25.0 %, undecided 33.3 %"
    )
    acr = (9 * 0.5 + 0.25) / 60
    assert rows["grid ACR"] == f"{acr:.3f} (840 samples per image, at most 1,100; grid 0 / 0.25 / 0.5)"
    assert "ACR" not in rows


def test_page_of_a_sequential_run_speaks_of_its_grid_alone(run: Path) -> None:
    """Table at the grid's radii, both levels in words, futility; no ceiling of N agreeing votes, no ungridded ACR."""
    page = page_of(make_sequential(run), drawn=True)
    for message in (
        "certified: sequential, level family",
        "All 60 certificates hold together with probability at least 0.999, over the draws of the noise.",
        "That is α = 0.001 for all of them jointly and 1.67e-05 for each.",
        "840 on average, at most 1,100",
        "wrongly with probability at most 0.01 per image",
        "end of the grid",
        "Grid ACR 0.079",
        "within ℓ2 0.25 (σ/2).",
    ):
        assert message in page.text, message
    assert "ceiling, N" not in page.text
    shares = [share(share_interval(10, 60)), true_share(10, 60, 0.001 / 60), "25.0 %", "25.0 %", "33.3 %"]
    assert list(page.table("certified")) == ["0", "0.25", "0.5"]
    assert page.table("certified")["0.25"] == shares
    make_sequential(run, sigma=0.4)  # sigma / 2 is no radius of the grid: the next one speaks
    page = page_of(run)
    assert "within ℓ2 0.25." in page.text
    assert list(page.table("certified")) == ["0", "0.25", "0.5"]
    make_sequential(run, radii=[0.0])
    assert "within ℓ2 0." in page_of(run, drawn=True).text


def test_page_of_a_fixed_number_of_samples_has_no_column_of_undecided(run: Path) -> None:
    text = page_of(run, drawn=True).text
    assert "Clopper–Pearson. Samples per image: 1,100" in text
    assert "Of all 60, at most 0.06 are false on average." in text
    assert "not certifiable" not in text
    assert "ceiling, N = 1,000" in text


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_images_divide_as_a_slow_count_says(run: Path, radius: float) -> None:
    """An image given up at 0.25 is given up at all that is larger, but at 0.1, where nothing was tested, undecided."""
    certificates = certificates_of(make_sequential(run))
    numbers = dict.fromkeys(("right", "wrong class", "not certifiable", "undecided"), 0)
    for line in table_of(run):
        reached, certified = float(line["radius"]), line["predict"] != "-1"
        following = next((r for r in GRID if r > reached), math.inf) if certified else GRID[0]
        if certified and reached >= radius:
            numbers["right" if line["label"] == line["predict"] else "wrong class"] += 1
        else:
            given_up = line["outcome"] == "not certifiable" and radius >= following
            numbers["not certifiable" if given_up else "undecided"] += 1
    decided = certificates.other_shares(radius)
    assert decided is not None
    assert {"right": certificates.accuracy_interval(radius), **decided} == {
        name: share_interval(count, 60) for name, count in numbers.items()
    }


def test_curve_of_a_grid_ends_with_the_grid(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn beyond the last tested radius, and every step lies at a radius of the grid."""
    from matplotlib.axes import Axes

    drawn: list[np.ndarray] = []
    plain = Axes.plot

    def plot(self: Axes, x: np.ndarray, *rest: object, **named: object) -> object:
        drawn.append(np.asarray(x, float))
        return plain(self, x, *rest, **named)

    monkeypatch.setattr(Axes, "plot", plot)
    certificates = certificates_of(make_sequential(run, radii=[0.0, 0.25, 0.5, 0.8]))
    certified_curve(certificates, None, (), "curve", "wide")
    assert set(np.concatenate(drawn)) == {0.0, 0.25, 0.5, 0.8}


def test_family_lowers_the_ceiling(run: Path) -> None:
    """At level alpha / 60 an image's N agreeing votes certify less: sigma * Phi^-1((alpha / 60)^(1/N))."""
    write_certificates(run, level="family")
    expected = 0.5 * special.ndtri((0.001 / 60) ** (1 / 1000))
    assert certificates_of(run).largest_radius == pytest.approx(expected, abs=1e-6)
    assert summary_of(run)["level"].startswith("all 60 certificates hold together")


def test_the_rule_of_the_table_speaks_where_the_record_of_an_older_run_is_silent(run: Path) -> None:
    certificates = certificates_of(run)
    assert (certificates.rule.method, certificates.rule.level) == ("clopper-pearson", "image")
    assert (certificates.rule.radii, certificates.other_shares(0.25)) == (None, None)
    assert certificates.num_samples.tolist() == [1100] * CERTIFIED


def test_run_that_is_kept_in_the_repository_is_readable() -> None:
    """It is older than curve, suite, audit and the methods of the rungs: the page goes without them."""
    page = Page(render(read_run(KEPT)))
    assert not {"epsilon", "audit", "first", "doubt"} & set(page.ids)
    assert "vs. PGD, EOT 64" in page.text
    assert "Training took 46 passes per image, 1 h 12 min." in page.text
    rows = summary_of(KEPT)
    assert rows["certified by"] == "Clopper–Pearson"
    assert rows["ACR"].endswith("(N = 10,000)")


def costs_of(folder: Path) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in cost_rows(read_run(folder))}


def test_time_of_several_processes_is_given_as_their_sum(run: Path) -> None:
    edit_json(run / "stages" / "certify.json", processes=3)
    assert costs_of(run)["certify"][1] == "1 min 05 s (sum of 3 processes)"


def test_cost_of_a_stage_has_what_the_stage_records(run: Path) -> None:
    """Older runs know neither memory nor energy; energy has a column where one stage tells it."""
    rows = costs_of(run)
    assert rows["pretrain"] == ("", "1 min 05 s", "6", "812", "–", "–")
    assert rows["all"] == ("", "4 min 20 s", "–", "–", "–", "–")
    page = page_of(run)
    assert page.tables["stages"][0][-1] == "peak memory"
    assert page.table("stages")["pretrain"] == ["1 min 05 s", "6", "812", "–"]
    fields = {"objective": "moco", "forward_passes_per_image": 2.5, "peak_memory": 2_345_000_000, "joules": 45_600.0}
    edit_json(run / "stages" / "pretrain.json", **fields)
    shown = ("6 + 2.5 forward only", "812", "2.35 GB", "45.6 kJ")
    assert costs_of(run)["pretrain"] == ("moco", "1 min 05 s", *shown)
    page = page_of(run)
    assert page.tables["stages"][0][-1] == "energy"
    assert page.table("stages")["pretrain moco"] == ["1 min 05 s", *shown]


def test_a_linear_head_costs_no_backward_pass_and_no_epochs_have_no_objective(run: Path) -> None:
    edit_json(run / "stages" / "finetune.json", passes_per_image=0.0, forward_passes_per_image=9.0)
    edit_json(run / "stages" / "pretrain.json", passes_per_image=0.0, epochs=0, objective="simclr", peak_memory=0)
    rows = costs_of(run)
    assert rows["finetune"][2] == "9 forward only"
    assert rows["pretrain"] == ("", "1 min 05 s", "0", "812", "–", "–")


def test_trainings_are_summed_over_the_images_of_the_larger(run: Path) -> None:
    """Six passes over 1,000 images and six over 100 of them are 6.6 for one of the 1,000."""
    assert training_cost(read_run(run)) == TrainingCost(None, 12.0, 0.0, 130.0, None, None)
    fields = {"forward_passes_per_image": 2.0, "peak_memory": 1_000_000_000, "joules": 500.0}
    edit_json(run / "stages" / "pretrain.json", images=1000, objective="moco", **fields)
    edit_json(run / "stages" / "finetune.json", images=100, objective="trades", **{**fields, "peak_memory": 3e9})
    cost = training_cost(read_run(run))
    assert cost == TrainingCost("moco + trades", pytest.approx(6.6), pytest.approx(2.2), 130.0, 3e9, 1000.0)
    sentence = "Training took 6.6 + 2.2 forward only passes per image, 2 min 10 s, at most 3.00 GB of memory, 1 kJ."
    assert training_sentence(read_run(run)) == sentence
    assert sentence in page_of(run).text
    edit_json(run / "stages" / "pretrain.json", epochs=0, seconds=0.0, objective="simclr", joules=None)
    scratch = training_cost(read_run(run))
    assert scratch == TrainingCost("trades", 6.0, 2.0, 65.0, 3e9, 500.0)
    (run / "stages" / "pretrain.json").unlink()
    assert training_cost(read_run(run)) is None
    assert "Training took" not in page_of(run).text


WATCHED = {"stage": "pretrain", "epoch": 2, "knn": 0.5}


def watch(folder: Path, *events: dict) -> None:
    """Put events of live figures behind the epochs of the log, in place of its broken last line."""
    lines = (folder / "log.jsonl").read_text().split("\n")[:-1]
    lines += [json.dumps({"event": "monitor", **event}) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def test_live_figures_are_drawn_by_epoch(run: Path) -> None:
    """The last record of an epoch counts; what is not a figure is none; a stage without them has no plot of them."""
    first = {"stage": "pretrain", "epoch": 1, "time": "2026-01-01T10:00:00", "knn": 0.5, "knn_noisy": 0.25}
    again = {**first, "epoch": 3, "linear": 0.75}
    watch(run, first, {**again, "knn": 0.125}, again)
    assert read_run(run).watched == (
        Watched("pretrain", 1, {"knn": 0.5, "knn_noisy": 0.25}),
        Watched("pretrain", 3, {"knn": 0.5, "knn_noisy": 0.25, "linear": 0.75}),
    )
    message = "nearest neighbours: 50.0 %; nearest neighbours, noisy: 25.0 %; linear probe: 75.0 %"
    drawn = [label for label in page_of(run, drawn=True).labels if "held-out" in label]
    assert drawn == [f"Pre-training, held-out images, after the last epoch: {message}"]


def test_floor_beyond_the_ceiling_is_explained(run: Path) -> None:
    """sigma 0.05 cannot certify the ball around the threat, whatever the votes: the page says why the floor is zero."""
    assert "larger than the ceiling" not in page_of(run).text
    write_certificates(run, sigma=0.05)
    assert "larger than the ceiling" in page_of(run).text


def test_violation_is_found_in_the_tables_themselves(run: Path) -> None:
    """An image broken within its certified radius is listed although the list of the stage is empty."""
    assert "No violation" in page_of(run).text
    for image in (4, 5, 6, 7):
        set_verdict(run, "sandwich", image, "broken")
    text = page_of(run).text
    assert "4 broken within their certified radius" in text
    assert "img-4, img-5, img-6, img-7" in text
    assert "more than chance allows" in text
    assert "Do not trust the figures below" in text


@pytest.mark.parametrize("name", ["digits", "photos", "cifar", "stl10"])
def test_nothing_of_cifar_is_beside_other_data(run: Path, name: str) -> None:
    edit_json(run / "recipe.json", data={"name": name})
    page = page_of(run, drawn=True)
    assert "comparison" not in page.ids
    assert not [word for word in ("CIFAR", "RobustBench", "published", "RUSH abstract") if word in page.text]


def test_published_rows_are_those_of_the_data_set_and_what_differs_is_named(run: Path) -> None:
    resolved = recipe("cifar") | {"data": {"name": "cifar10"}, "model": {"encoder": "resnet18", "width": 64}}
    write_json(run / "recipe.json", resolved)
    page = page_of(run)
    assert "differs from the paper: 40 attacked images instead of 10,000." in page.text
    assert "RUSH abstract (arXiv 2207.05127)" in page.table("published")
    edit_json(run / "recipe.json", data={"name": "cifar100"}, model={"encoder": "small", "width": 16})
    page = page_of(run)
    rows = page.table("published")
    assert next(row[4] for row in rows.values()) == "PreAct ResNet-18"
    assert {row[3] for row in rows.values()} == {"CIFAR-100", "cifar100"}
    assert "differs from the published ones: model small, width 16 instead of ResNet-18 (width 64); 40" in page.text
    assert "CIFAR-10 " not in page.text


@pytest.mark.parametrize(
    ("name", "sigma", "drawn"),
    [
        ("cifar10", 0.5, ["Gaussian, σ 0.5", "CAT-RS, σ 0.5", "ACR-weakness, σ 0.5"]),
        ("cifar10", 0.12, ["Gaussian, σ 0.25", "CAT-RS, σ 0.25", "ACR-weakness, σ 0.25"]),
        ("cifar100", 0.25, ["Gaussian, σ 0.25", "CAT-RS, σ 0.25"]),
        ("digits", 0.5, []),
    ],
)
def test_published_curves_are_behind_those_of_the_same_data(
    run: Path, name: str, sigma: float, drawn: list[str]
) -> None:
    """The curves at the nearest published noise, named in the plot and its description; none of another data set."""
    edit_json(run / "recipe.json", data={"name": name})
    write_certificates(run, sigma=sigma)
    page = page_of(run, drawn=True)
    found = re.findall(r"([\w-]+, σ [\d.]+), published", page.text)
    assert list(dict.fromkeys(found)) == drawn
    (label,) = {label for label in page.labels if label.startswith("Certified accuracy over")}
    assert [f"{curve}, published" in label for curve in drawn] == [True] * len(drawn)
    assert certified_curves(name, "l1", sigma) == ()


def test_published_curves_are_the_stated_figures() -> None:
    cifar100 = {curve.method: curve for curve in certified_curves("cifar100", "l2", 0.25)}
    assert cifar100["Gaussian"].accuracy == (0.489, 0.337, 0.209, 0.12)
    assert cifar100["CAT-RS"].radii == (0, 0.25, 0.5, 0.75)
    for curves in PUBLISHED_CURVES.values():
        for curve in curves:
            assert list(curve.accuracy) == sorted(curve.accuracy, reverse=True)
            assert curve.radii[-1] < 3.9 * curve.sigma  # the ceiling of N = 100,000


def test_sample_pictures_decode_to_the_stored_pixels(run: Path) -> None:
    """Clean and attacked pixels survive bit by bit; the difference is magnified 15 times, 0.5 / (8/255) = 15.9."""
    page = page_of(run)
    rows = [int(i) for i in np.linspace(0, 39, 9).round()]
    assert len(page.pictures) == 27
    assert "difference times 15" in page.text
    sign = np.where(np.arange(8) < 4, 1, -1)
    for place, i in enumerate(rows):
        clean, adversarial, difference = page.pictures[3 * place : 3 * place + 3]
        assert (clean == 100 + i).all()
        assert (adversarial == 100 + i + 8 * sign).all()
        assert np.abs(difference.astype(int) - (127.5 + 15 * 8 * sign)).max() <= 1


def test_colour_pictures_keep_their_channels(run: Path) -> None:
    """A three-channel image is decoded with its channels in order."""
    images = np.zeros((ATTACKED, 3, 8, 8), np.uint8) + np.array([10, 120, 230], np.uint8)[:, None, None]
    ids = np.array([f"img-{i}" for i in range(ATTACKED)])
    np.savez(run / "attacks" / "images.npz", images=images, labels=np.zeros(ATTACKED), ids=ids)
    np.savez(run / "attacks" / "eot-16.npz", adversarial=(images / 255).astype(np.float32), ids=ids)
    assert (page_of(run).pictures[0] == [10, 120, 230]).all()


def test_predicted_class_is_the_challenger_where_broken(run: Path) -> None:
    """Image 39 (label 9) is broken towards class 2, image 5 holds, image 0 is undecided between 0 and 3."""
    text = page_of(run).text
    assert "broken label digit 9 predicted digit 2" in text
    assert "held label digit 5 predicted digit 5" in text
    assert "undecided label digit 0 predicted digit 0 or digit 3" in text


def named_run(folder: Path, name: str) -> Path:
    """A run in full whose every text from outside is or begins with ``name``."""
    run = make_full(write_run(folder, name=name, classes=[f"{name}{k}" for k in range(10)]))
    rungs = [{**rung, "label": f"{name} {rung['name']}"} for rung in attack_rungs(run)]
    rungs[-1] |= {"suite": name, "attackers": {name: 30}}
    tick = [{**point, "epsilon_text": name} for point in CURVE["points"]]
    edit_json(run / "stages" / "attack.json", rungs=rungs, curve={**CURVE, "label": name, "points": tick})
    finding = asdict(AuditFinding(name, "failed", None, None, name, name))
    edit_json(run / "audit.json", evaluation=name, here=name, findings=[finding])
    return run


@pytest.mark.parametrize(
    "hostile", ['<script>alert("x")</script>', "a & b <img src=http://x/y>", "$\\frac{1}{$", "'\"><b>"]
)
def test_hostile_names_stay_text(tmp_path: Path, hostile: str) -> None:
    """Recipe, class and attacker names are shown as written and open no tag, attribute, formula or request."""
    page = page_of(named_run(tmp_path / "run", hostile), drawn=True)
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 27
    assert not [load for load in page.loads if not load.startswith(("data:", "#"))]
    assert f"label {' '.join(hostile.split())}5" in page.text
    assert f"{hostile} eot-16" in page.text


@pytest.mark.parametrize(
    ("stage", "sentence", "kept"),
    [
        ("audit", "Not audited yet", "Certified accuracy"),
        ("pretrain", "Not pre-trained yet", "Certified accuracy"),
        ("finetune", "Not fine-tuned yet", "Certified accuracy"),
        ("certify", "Not certified yet", "under the strongest attack"),
        ("attack", "Not attacked yet", "Within ℓ2 0.25"),
    ],
)
def test_unfinished_stage_is_named_with_its_command(full: Path, stage: str, sentence: str, kept: str) -> None:
    """Without the stage's record its half-written table is ignored, and the page gives the command for the stage."""
    (full / "stages" / f"{stage}.json").unlink()
    table = {"certify": "certificates.tsv", "attack": "attacks.tsv", "audit": "audit.json"}.get(stage)
    if table is not None:
        content = (full / table).read_text()
        (full / table).write_text(content[: len(content) // 2])
    text = page_of(full).text
    assert f"{sentence}: rush {stage} {full}" in text
    assert kept in text
    assert (sentence[0].lower() + sentence[1:], f"`rush {stage} {full}`") in summary_rows(read_run(full))


def test_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    """A folder with nothing but its recipe gives a page that says so, and no figure of its own."""
    write_json(tmp_path / "recipe.json", recipe("begun"))
    page = page_of(tmp_path, drawn=True)
    assert "Nothing has been measured yet" in page.text
    assert len(summary_rows(read_run(tmp_path))) == len(EVERY_RUN)
    assert "svg" not in page.tags
    assert "77.8 %" not in page.text


def test_training_curves_leave_out_a_truncated_last_line(run: Path) -> None:
    """A kill cuts the last line only; an epoch that is logged again after a resume counts once, by its last record."""
    with open(run / "log.jsonl", "a") as file:
        file.write(
            '\n{"event": "epoch", "stage": "pretrain", "epoch": 3, "loss": 0.125, "seconds": 1}\n{"event": "epoch", "st'
        )
    edit(run / "log.jsonl", '{"event": "epo\n', "")
    epochs = [epoch for epoch in read_run(run).epochs if epoch.stage == "pretrain"]
    assert [epoch.loss for epoch in epochs] == [2.0, 1.0, 0.125]


def test_a_run_kept_without_its_attacked_images_still_has_its_figures(run: Path) -> None:
    """Shape and so the covering radius come from the model then; only the sample images are missing."""
    before = summary_rows(read_run(run))
    edit_json(run / "model" / "model.json", image_shape=[1, 8, 8])
    shutil.rmtree(run / "attacks")
    assert summary_rows(read_run(run)) == before
    page = write_report(run).read_text(encoding="utf-8")
    assert "data:image/png" not in page
    edit_json(run / "model" / "model.json", image_shape=[4, 1, 1])
    assert summary_rows(read_run(run)) != before


def test_ladder_in_full_has_a_row_for_every_rung(full: Path) -> None:
    """Budgets in the attacker's own words, both kinds of passes, differences to the row above and to the last PGD."""
    page = page_of(full)
    rows = list(page.table("steps").items())
    assert [name for name, _ in rows[:-2]] == [
        LABELS["clean"],
        *(f"{LABELS[name]} 20 steps of 2/255{eot}" for name, eot in BUDGETS.items()),
        "APGD-50, EOT 16 50 steps, EOT 16",
        "Square 1,000 queries, EOT 8",
        "worst case of 4 attackers worst-case-v1, strongest",
    ]
    differences = [points(paired_difference(standing(10), standing(other))) for other in (25, 12)]
    ten = share(share_interval(10, 40))
    assert rows[7][1] == [ten, ten, "–", *differences, "800 + 216 forward", "30.0 s"]
    assert rows[0][1][3:5] == ["–", points(paired_difference(standing(36), standing(12)))]
    assert rows[4][1][2:] == ["1", points(paired_difference(standing(12), standing(17))), "–", "80", "40.0 s"]
    assert [name.split(" broken")[0].split(" ℓ2")[0] for name, _ in rows[-2:]] == [
        "all rows above",
        "certificate: floor for any attack",
    ]
    assert page.tables["steps"][0][4:6] == ["vs. previous row", "vs. PGD, EOT 16"]
    text = page.text
    assert "(clean: wrong without attack): clean 4, transfer 16, apgd 10." in text


def test_worst_case_is_part_of_the_summary(full: Path, tmp_path: Path) -> None:
    rows = summary_of(full)
    ten = share(share_interval(10, 40))
    assert rows["worst case, ℓ∞ 8/255, worst-case-v1"] == f"{ten} (n = 40), held {ten}"
    assert rows["attacked, ℓ∞ 8/255, worst case of 4 attackers"] == f"{ten} (n = 40)"
    assert not [name for name, _ in summary_rows(read_run(write_run(tmp_path / "old"))) if name.startswith("worst")]


def test_only_pgd_rungs_are_candidates_for_a_flattering_evaluation(full: Path) -> None:
    """Square leaves 25 standing and draws noise, yet an evaluation that stops there has climbed beyond PGD."""
    verdicts = [("frozen", 12), ("eot-1", 12), ("eot-16", 12)]
    ladder = ladder_of(full)
    assert ladder.last_eot is not None
    assert ladder.last_eot.name == "eot-16"
    assert ladder.flattering is not None
    assert ladder.flattering.name == "frozen"
    for rung, count in verdicts:
        for i in range(count, ATTACKED):
            set_verdict(full, rung, i, "broken")
    assert ladder_of(full).flattering is None


def test_flattery_is_measured_by_the_worst_case_even_where_one_attacker_broke_more(full: Path) -> None:
    """What was planned as the reference stays it: APGD now leaves 9, the worst case 10, and 30 - 10 is the flattery."""
    set_verdict(full, "apgd", 10, "broken")
    set_verdict(full, "apgd", 9, "broken")
    ladder = ladder_of(full)
    assert (ladder.strongest.name, ladder.reference.name) == ("apgd", "worst-case")
    assert ladder.combined == share_interval(9, 40)
    difference = points(paired_difference(standing(30), standing(10)))
    rows = summary_of(full)
    assert rows[f"{LABELS['frozen']} flatters by"] == f"{difference} points"
    text = page_of(full).text
    assert "50.0 points too much" in text
    assert "compared with “worst case of 4 attackers”, under which accuracy is 25.0 %." in text


def in_l1(certificates: Certificates) -> Certificates:
    """The certificates with radii in l1, by the noise of their rule."""
    return replace(certificates, rule=replace(certificates.rule, noise="laplace"))


def run_in_l1(folder: Path) -> RunResults:
    results = read_run(folder)
    assert results.certificates is not None
    return replace(results, certificates=in_l1(results.certificates))


@pytest.mark.parametrize(
    ("norm", "epsilon", "around", "inside"),
    [("linf", 0.03, 1.92, 0.03), ("l2", 0.5, 4.0, 0.5), ("l1", 4.0, 4.0, 4.0)],
)
def test_l1_balls_around_and_inside_the_threat(
    run: Path, norm: str, epsilon: float, around: float, inside: float
) -> None:
    """64 pixels: corner of the cube at 64 epsilon, farthest point of the ball at 8."""
    edit_json(run / "stages" / "attack.json", threat={"norm": norm, "epsilon": epsilon, "epsilon_text": f"{epsilon}"})
    ladder = ladder_of(run)
    assert (ladder.covering_radius("l1"), ladder.inner_radius("l1")) == pytest.approx((around, inside), abs=1e-12)
    text = Page(render(run_in_l1(run))).text
    assert f"The ball around the threat has ℓ1 radius {around:.3g}, the one inside it {inside:.3g}." in text
    assert ("proves less than the threat requires" in text) == (norm != "l1")


def test_the_floor_is_the_accuracy_at_the_ball_of_the_certificates_norm(full: Path) -> None:
    """The l1 ball around l-inf epsilon has radius 64 epsilon: 1.0 at the first of the curve, beyond all radii."""
    edit_json(full / "stages" / "attack.json", threat={"norm": "linf", "epsilon": 0.5 / 255, "epsilon_text": "1/510"})
    results = run_in_l1(full)
    proved = share(share_interval(25, 40))  # 64 x 0.5/255 = 0.1255 has 25 attacked images certified beyond
    assert dict(summary_rows(results))["certified floor at ℓ∞ 1/510"].startswith(proved)
    page = Page(render(results))
    assert [row[3] for row in page.table("grown").values()] == [share(share_interval(0, 40))] * 4
    (floor,) = [(name, row) for name, row in page.table("steps").items() if name.startswith("certificate")]
    assert floor[0].startswith("certificate: floor for any attack ℓ1 0.125 covers ℓ∞ 1/510, true share ≥ ")
    assert floor[1][0] == proved


def test_an_l1_run_names_no_other_norm_of_its_certificates(full: Path) -> None:
    results = run_in_l1(full)
    page = Page(render(results))
    assert "ℓ2" not in page.text
    assert not [label for label in page.labels if "ℓ2" in label]
    assert "within ℓ1 0.25 (σ/2)." in page.text
    assert "images certified with the right class were also attacked in ℓ1 at 0.99" in page.text
    assert "ℓ1 radius, pixels in [0, 1]" in page.text
    assert page.tables["certified"][0][0] == "ℓ1 radius"
    rows = dict(summary_rows(results))
    assert [name for name in rows if name.startswith("certified at")] == ["certified at ℓ1 0", "certified at ℓ1 0.25"]


@pytest.mark.parametrize(("noise", "norm"), [(None, "ℓ2"), ("discrete", "ℓ2"), ("uniform", "ℓ1"), (["?"], "ℓ2")])
def test_before_there_are_certificates_the_recipe_says_their_norm(run: Path, noise: object, norm: str) -> None:
    edit_json(run / "recipe.json", smoothing={"sigma": SIGMA, "noise": noise})
    (run / "stages" / "certify.json").unlink()
    assert f"were also attacked in {norm} at 0.99" in page_of(run).text


def add_l1(folder: Path, sizes: dict[int, float]) -> None:
    """Add the column l1 to attacks.tsv: within no radius, unless given for a sandwich's image."""
    header, *lines = (folder / "attacks.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    added = [sizes.get(int(cell[1]), 99) if cell[0] == "sandwich" else 99 for cell in cells]
    table = [f"{header}\tl1", *(f"{line}\t{size}" for line, size in zip(lines, added, strict=True))]
    (folder / "attacks.tsv").write_text("\n".join(table) + "\n")


def test_violations_of_l1_certificates_are_found_by_their_l1_changes(run: Path) -> None:
    """All four are within their l2 radius, two of them within their l1 radius."""
    certificates, file = certificates_of(run), run / "stages" / "attack.json"
    for image in (4, 5, 6, 7):
        set_verdict(run, "sandwich", image, "broken")
    record = Record.read(file, "attack again")
    with pytest.raises(
        RunError, match=r"attacks\.tsv, line 1: the certificates are in l1.* no column l1.*attack again"
    ):
        read_attacks(run, record, range(CERTIFIED), in_l1(certificates))
    add_l1(run, {4: 99, 5: 0.3, 6: 99, 7: certificates.radius[7]})
    ladder = read_attacks(run, record, range(CERTIFIED), in_l1(certificates))
    assert ladder.sandwich.violations == ("img-5", "img-7")
    ladder = read_attacks(run, record, range(CERTIFIED), certificates)
    assert ladder.sandwich.violations == ("img-4", "img-5", "img-6", "img-7")


@pytest.mark.parametrize(
    ("norm", "epsilon", "around", "inside", "grey"),
    [("linf", 0.03, 0.24, 0.03, 0.5), ("l2", 0.5, 0.5, 0.5, 4.0), ("l1", 4.0, 4.0, 0.5, 32.0)],
)
def test_balls_around_and_inside_the_threat(
    run: Path, norm: str, epsilon: float, around: float, inside: float, grey: float
) -> None:
    """64 pixels: corner and face of the cube at 8 and 1 epsilon, of the cross-polytope at 1 and 1/8."""
    edit_json(run / "stages" / "attack.json", threat={"norm": norm, "epsilon": epsilon, "epsilon_text": f"{epsilon}"})
    ladder = ladder_of(run)
    radii = (ladder.covering_radius("l2"), ladder.inner_radius("l2"), ladder.grey_epsilon)
    assert radii == pytest.approx((around, inside, grey), abs=1e-12)
    text = page_of(run).text
    assert f"The ball around the threat has ℓ2 radius {around:.3g}, the one inside it {inside:.3g}." in text
    assert ("proves less than the threat requires" in text) == (norm != "l2")


def test_curve_shows_accuracy_between_attack_and_proof(full: Path) -> None:
    """Each epsilon with its counts and the share certified at the ball around it; the run's own epsilon is marked."""
    page = page_of(full)
    rows = page.table("grown")
    assert list(rows) == ["4/255", "8/255", "16/255", "127.5/255"]
    assert [row[0] for row in rows.values()] == [share(share_interval(count, 20)) for count in (15, 8, 6, 0)]
    assert rows["4/255"][1] == share(share_interval(14, 20))
    assert [row[2] for row in rows.values()] == ["1", "–", "–", "–"]
    # 8 x 4/255 = 0.125 has 25 attacked images certified beyond, 0.251 has 10, 0.502 has 8 and 4.0 none.
    assert [row[3] for row in rows.values()] == [share(share_interval(count, 40)) for count in (25, 10, 8, 0)]
    assert '<tr class="mark"><th scope="row">8/255</th>' in (full / "report.html").read_text(encoding="utf-8")
    assert "It reaches zero at ℓ∞ 127.5/255, as it must." in page.text
    assert {"epsilon", "zero"} <= set(page.ids)
    edit_json(full / "stages" / "attack.json", curve=None)
    assert "epsilon" not in page_of(full).ids


def end_curve(folder: Path, size: float, broken: int, undecided: int) -> Ladder:
    """The ladder whose curve ends at ``size``/255 with so many broken and undecided of 20."""
    counts = {"broken": broken, "held": 20 - broken - undecided, "undecided": undecided}
    last = {"epsilon": size / 255, "epsilon_text": f"{size:g}/255", **counts}
    edit_json(folder / "stages" / "attack.json", curve={**CURVE, "points": [*CURVE["points"][:3], last]})
    return ladder_of(folder)


def test_curve_that_does_not_reach_zero_is_a_warning(full: Path) -> None:
    """3 of 20 unbroken at mid-grey are more than a tenth. 2 give no warning. At 64/255 nothing must be zero."""
    message, doubt = zero_text(end_curve(full, 127.5, broken=17, undecided=1))
    assert doubt
    assert "It does not reach zero: at ℓ∞ 127.5/255" in message
    assert "15.0 % are not broken (3 of 20 images, 1 of them undecided)" in message
    html = write_report(full).read_text(encoding="utf-8")
    assert '<p id="zero" class="warning">It does not reach zero' in html
    message, doubt = zero_text(end_curve(full, 127.5, broken=18, undecided=0))
    assert not doubt
    assert "10.0 % are not broken (2 of 20 images)" in message
    message, doubt = zero_text(end_curve(full, 64, broken=15, undecided=0))
    assert not doubt
    assert "It ends at ℓ∞ 64/255" in message
    assert LARGE_EPSILON_HELD == 0.1


def test_curve_that_rises_is_stated(full: Path) -> None:
    """14 broken at 16/255 and 13 at 64/255: the larger ball contains the smaller, so the attack has missed one."""
    assert rises_text(ladder_of(full)) == ""
    message = rises_text(end_curve(full, 64, broken=13, undecided=0))
    assert (
        message == "The number of unbroken images rises from 16/255 to 64/255 by 1, which an optimal attack rules out."
    )
    assert message in page_of(full).text


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_ticks_of_a_long_curve_keep_the_last_one(full: Path, form: str) -> None:
    sizes = [2.0**power for power in range(12)]
    grown = [
        {"epsilon": size / 2**12, "epsilon_text": f"tick-{size:g}-", "broken": 1, "held": 19, "undecided": 0}
        for size in sizes
    ]
    edit_json(full / "stages" / "attack.json", curve={**CURVE, "points": grown})
    drawn = re.sub(r'aria-label="[^"]*"', "", epsilon_curve(ladder_of(full), (), "curve", form))  # type: ignore[arg-type]
    shown = [size for size in sizes if f"tick-{size:g}-" in drawn]
    assert shown == sizes[1::2]


def test_audit_that_overestimates_is_on_top_of_the_page(full: Path) -> None:
    """Verdict, both accuracies, d with bounds from another library, failed findings in the box, all in the table."""
    low, high = (stats.binomtest(12, 40).proportion_ci(0.9, "exact")[end] for end in (0, 1))
    audit = audit_of(full)
    assert (audit.d, audit.d_low, audit.d_high) == pytest.approx((0.3, low, high), abs=1e-9)
    page = page_of(full)
    assert page.ids.index("doubt") < page.ids.index("certificates") < page.ids.index("audit")
    for message in (
        "The audit says that the evaluation “PGD-20, EOT 1” overestimates the model:",
        f"at least {math.floor(1000 * low) / 10:.1f} % of the images are reported robust but broken by the audit",
        "step-size: all steps together are 0.05 epsilon long. What to do: take larger steps.",
        "PGD-20, EOT 1, ℓ∞ 8/255, 40 images",
        f"reported accuracy {share(share_interval(17, 40))} re-measured accuracy {share(share_interval(5, 40))}",
        f"30.0 % [{math.floor(1000 * low) / 10:.1f}, {math.ceil(1000 * high) / 10:.1f}] (12 of 40 images)",
        "noise failed ∞ 1.1 the attacker sees noise of deviation 0.1 use the same noise",
    ):
        assert message in page.text, message
    rows = summary_of(full)
    assert rows["audited evaluation"] == "PGD-20, EOT 1, ℓ∞ 8/255 (n = 40)"
    assert rows["audit"].startswith("overestimated: at least 18.")
    assert rows["audit: noise failed"] == "the attacker sees noise of deviation 0.1"
    assert (
        rows["accuracy, reported and re-measured"]
        == f"{share(share_interval(17, 40))} and {share(share_interval(5, 40))}"
    )


def test_findings_are_listed_by_what_asks_for_a_reader(full: Path) -> None:
    """Failed ones first, in the audit's own order of cause before symptom; remedies only where there is a fault."""
    page = page_of(full)
    asking, settled = page.table("asking"), page.table("settled-findings")
    assert (list(asking), list(settled)) == (["step-size", "noise", "more-steps"], ["ball", "mode"])
    assert all(row[-1] for row in asking.values())
    assert settled["mode"][1:3] == ["–", "–"]
    assert page.tables["settled-findings"][0][-1] == "evidence"


def test_findings_that_ask_for_nothing_are_folded(full: Path) -> None:
    html = write_report(full).read_text(encoding="utf-8")
    assert "1 findings passed, 1 skipped" in Page(html).text
    (folded,) = re.findall(r'<details id="settled">(.*?)</details>', html, re.DOTALL)
    assert 'id="settled-findings"' in folded
    assert 'id="asking"' not in folded


def test_audit_that_holds_gives_no_warning(run: Path) -> None:
    page = page_of(make_full(run, 0, "holds"))
    high = stats.binomtest(0, 40).proportion_ci(0.9, "exact").high
    message = f"at most {math.ceil(1000 * high) / 10:.1f} % of the images are reported robust but broken by the audit"
    assert f"Holds : {message}, less than the tolerance of 8.0 %; no finding failed." in page.text
    assert "doubt" not in page.ids
    assert "audit" in page.ids


@pytest.mark.parametrize(
    ("needed", "message"), [(250, "250 images would decide"), (None, "more images would not decide")]
)
def test_undecided_audit_says_what_would_decide(run: Path, needed: int | None, message: str) -> None:
    make_full(run, 1, "undecided")
    with mock.patch("rush.auditing.report.images_needed", return_value=needed):
        page = page_of(run)
    assert "doubt" in page.ids
    assert "The audit cannot say whether the evaluation “PGD-20, EOT 1” holds:" in page.text
    assert message in page.text
    assert "a failed finding rules out “holds”" in page.text


def test_invalid_evaluation_is_stated_without_a_broken_image(run: Path) -> None:
    """With d = 0 the reason is a finding: no share is claimed."""
    make_full(run, 0, "overestimated")
    assert audit_sentence(audit_of(run)) == (
        "a failed finding says that it was not an evaluation of this model under this threat model"
    )


def set_format(file: Path, number: int | None) -> None:
    """Give a file of a run another format number, or none as before there were any."""
    if file.suffix == ".json":
        value = json.loads(file.read_text())
        write_json(file, {key: entry for key, entry in value.items() if key != "format"})
        if number is not None:
            edit_json(file, format=number)
    elif file.suffix == ".jsonl":
        events = file.read_text().split("\n")
        first = {"event": "start"} if number is None else {"event": "start", "format": number}
        file.write_text("\n".join([json.dumps(first), *events[1:]]))
    elif file.suffix == ".tsv":
        header, *lines = file.read_text().splitlines()
        bare = [line.rsplit("\t", 1)[0] if header.endswith("\tformat") else line for line in (header, *lines)]
        numbered = [f"{bare[0]}\tformat", *(f"{line}\t{number}" for line in bare[1:])]
        file.write_text("".join(f"{line}\n" for line in (bare if number is None else numbered)))


TABLES = ("certificates.tsv", "attacks.tsv")
FORMATTED = ("recipe.json", "provenance.json", "log.jsonl", *TABLES, *(f"stages/{stage}.json" for stage in EVERY_RUN))


@pytest.mark.parametrize("name", [*FORMATTED, "audit.json"])
def test_a_file_of_a_newer_format_is_refused_in_one_line(full: Path, name: str) -> None:
    newest = FORMATS["stages" if name.startswith("stages/") else name] if name != "audit.json" else FORMAT
    set_format(full / name, newest + 1)
    with pytest.raises(RunError) as caught:
        read_run(full)
    refusal = f"{full / name} has format {newest + 1}, this version reads {newest}; read it with the version"
    assert str(caught.value).startswith(refusal)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATTED)
def test_a_file_without_a_format_reads_as_one_of_the_first(full: Path, name: str) -> None:
    with undrawn():
        set_format(full / name, None)
        before = render(read_run(full))
        set_format(full / name, 1)
        assert render(read_run(full)) == before
    set_format(full / name, 0)
    with pytest.raises(RunError, match="its format must be a whole number >= 1"):
        read_run(full)


def changed(*keys: str | int, **fields: object) -> Callable[[Path], None]:
    """A change of ``fields`` of the object at ``keys`` in a JSON file."""

    def change(file: Path) -> None:
        value = json.loads(file.read_text(encoding="utf-8"))
        reduce(operator.getitem, keys, value).update(fields)
        write_json(file, value)

    return change


def replaced(old: str, new: str) -> Callable[[Path], None]:
    """A change of the first ``old`` in a file."""
    return lambda file: edit(file, old, new, 1)


def content(written: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(written)


def curve(**fields: object) -> Callable[[Path], None]:
    return changed(curve={**CURVE, **fields})


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without_last_lines(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-5]))


def pickled(file: Path) -> None:
    np.savez(file, images=np.array([{"a": 1}], dtype=object))


def holding(newly: int, **fields: object) -> Callable[[Path], None]:
    """An audit that holds although it broke ``newly`` images, with other ``fields``."""

    def change(file: Path) -> None:
        write_audit(file.parent, newly, "holds")
        edit_json(file, **fields)

    return change


FIRST_POINT, SECOND_POINT = CURVE["points"][:2]
# File of a run, its change, and what the error says of it.
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("recipe.json", content(b'{"name": '), "not JSON"),
    ("provenance.json", content(b"[1]"), "is damaged"),
    ("provenance.json", unreadable, "cannot be read: not a regular file. Remedy: allow it, or "),
    ("model/model.json", content(b"{"), "not JSON"),
    ("log.jsonl", replaced('{"event": "start"}', '{"event": "sta'), "line 1 cannot be read"),
    *(
        ("log.jsonl", content(written), "is damaged: line 1 cannot be read")
        for written in (b"\x80\x81\n", b"garbage", b"[1]\n", b"{}\n", b'{"event": "epoch"}\n')
    ),
    ("log.jsonl", lambda file: watch(file.parent, {**WATCHED, "knn": "good"}, WATCHED), "line 8 cannot be read"),
    ("stages/pretrain.json", changed(seconds="soon"), "'seconds' must be a finite number, got 'soon'"),
    ("stages/pretrain.json", unreadable, "cannot be read: not a regular file. Remedy: allow it, or "),
    ("stages/pretrain.json", changed(knn_accuracy={"correct": 51, "total": 50}), "is damaged: knn_accuracy"),
    ("stages/finetune.json", changed(peak_memory="much"), "'peak_memory' must be a finite number, got 'much'"),
    ("stages/certify.json", changed(num_estimation=0), "num_estimation is 0, by certificates.tsv it is 1000"),
    ("stages/attack.json", changed(threat={"norm": "l7", "epsilon": 1.0}), "'threat' must name a norm"),
    ("stages/attack.json", changed("rungs", 0, method="pgd"), "begin with the one without attack, got 'clean'"),
    ("stages/attack.json", curve(points=[]), "list 'points'"),
    ("stages/attack.json", curve(points=[1]), "list 'points'"),
    ("stages/attack.json", curve(points=[SECOND_POINT, FIRST_POINT]), "must be > 0 and ascending"),
    ("stages/attack.json", curve(points=[{**FIRST_POINT, "epsilon": 0.0}]), "must be > 0 and ascending"),
    ("stages/attack.json", curve(points=[{**FIRST_POINT, "epsilon": "4/255"}]), "'epsilon' must be a finite number"),
    ("stages/attack.json", curve(points=[{**FIRST_POINT, "held": -1}]), "'held' must be a number of images, got -1"),
    ("stages/attack.json", curve(points=[{**FIRST_POINT, "held": 15}]), "the curve's 20 images at each epsilon"),
    ("stages/attack.json", curve(images=21), "the curve's 21 images at each epsilon"),
    (
        "stages/attack.json",
        changed("rungs", -1, attackers={"clean": 4, "pgd": 25}),
        "by 'attackers' 29 images of rung 'worst-case' are broken, by attacks.tsv 30",
    ),
    ("stages/attack.json", changed("rungs", -1, attackers={"clean": -1, "pgd": 31}), "'attackers' must be numbers of"),
    ("stages/attack.json", changed("rungs", -1, attackers=["clean"]), "'attackers' must be numbers of images"),
    ("stages/attack.json", changed("sandwich", allowed=30), "30 images checked and 30 allowed"),
    ("stages/attack.json", changed("sandwich", checked=40), "40 images checked and 3 allowed"),
    ("stages/attack.json", changed("sandwich", allowed="3"), "'allowed' must be a number of images"),
    ("stages/attack.json", changed("sandwich", checked=None), "'checked' must be a number of images"),
    ("certificates.tsv", replaced("\t1\t0.0100\timg-0", "\t0\t0.0100\timg-0"), "correct is 0, its votes"),
    ("stages/certify.json", lambda file: without_last_lines(file.parents[1] / "certificates.tsv"), "images is 60, by"),
    ("attacks.tsv", replaced("frozen\t7\timg-7\t7\theld", "frozen\t7\timg-7\t7\tshaken"), "verdict 'shaken'"),
    ("attacks.tsv", replaced("frozen\t7\t", "frozen\t8\t"), "'frozen' is not on the same images"),
    ("attacks.tsv", replaced("frozen\t7\t", "thawed\t7\t"), "unknown rung 'thawed'"),
    ("attacks.tsv", replaced("frozen\t3\timg-3\t3", "frozen\t3\timg-3\t4"), "idx 3 has label 4 and id 'img-3', in"),
    (
        "attacks.tsv",
        replaced("held\t0.03", "broken\t0.03"),
        "700 votes for the label and 200 for the challenger are not broken",
    ),
    (
        "attacks.tsv",
        replaced("broken\t0.03", "held\t0.03"),
        "200 votes for the label and 700 for the challenger are not held",
    ),
    ("attacks/images.npz", cut_off, "cannot be read as arrays"),
    ("attacks/images.npz", pickled, "cannot be read as arrays"),
    ("attacks/worst-case.npz", Path.unlink, "is missing"),
    ("audit.json", content(b'{"format": 1, "verdict"'), "not JSON"),
    ("audit.json", Path.unlink, "is missing"),
    (
        "audit.json",
        changed(verdict="fine"),
        "must be holds or overestimated or undecided, and linf or l2 or l1",
    ),
    ("audit.json", changed(norm="l7"), "got 'overestimated' and 'l7'"),
    ("audit.json", changed(images=0), "12 of 0 images cannot be newly broken"),
    ("audit.json", changed(newly_broken=["a", "a"]), "each once"),
    ("audit.json", changed(evaluation_accuracy="high"), "'evaluation_accuracy' must be a finite number"),
    ("audit.json", changed(accuracy_here=1.5), "accuracies must lie in [0, 1]"),
    ("audit.json", changed(tolerance=0), "the tolerance in (0, 1)"),
    ("audit.json", changed(findings={}), "'findings' must be a list of objects"),
    ("audit.json", changed("findings", 0, status="broken"), "must be one of passed, failed, undecided, skipped"),
    ("audit.json", changed("findings", 0, figure="1.0"), "figure and threshold must be numbers or null, got '1.0'"),
    ("audit.json", changed(accuracy_here=0.4), "newly broken"),
    ("audit.json", changed(evaluation_accuracy=0.9), "newly broken"),
    ("audit.json", changed(verdict="undecided"), "'undecided' does not agree"),
    ("audit.json", changed(verdict="holds"), "'holds' does not agree"),
    ("audit.json", holding(12), "'holds' does not agree"),
    ("audit.json", holding(0, findings=[asdict(FINDINGS[1])]), "'holds' does not agree"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damage_is_named_with_its_file_and_a_remedy(
    full: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    """No wrong value becomes a figure, and the report that was there stays."""
    (full / "report.html").write_text("the old report")
    damage(full / name)
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        write_report(full)
    assert str(full / name) in str(caught.value)
    assert "Remedy: " in str(caught.value)
    if name == "audit.json":
        assert f"rush audit {full}" in str(caught.value)
    assert (full / "report.html").read_text() == "the old report"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "guess"),
        ("level", "image"),
        ("radii", None),
        ("radii", [0.0, 0.25]),
        ("num_images", 59),
        ("futility", "none"),
        ("alpha", 0.01),
        ("sigma", 0.25),
        ("undecided", 3),
        ("forward_passes_per_image", 100.0),
    ],
)
def test_a_record_that_is_not_that_of_the_table_is_damage(run: Path, field: str, value: object) -> None:
    edit_json(make_sequential(run) / "stages" / "certify.json", **{field: value})
    with pytest.raises(RunError, match=rf"certify\.json is damaged: {field} is {re.escape(repr(value))}, by cert"):
        read_run(run)


def test_copies_count_once_and_the_page_says_so(run: Path) -> None:
    """Images 1 to 9 are copies of image 0: one picture of 51, certified as far as the last of them."""
    stored, selected = stored_votes()
    pixels = [f"{0 if i < 10 else i:032x}" for i in range(CERTIFIED)]
    votes = stored_certificates(rule_of(), stored, selected, [i % 10 for i in range(CERTIFIED)], pixels=pixels)
    write_table(run / "certificates.tsv", votes, range(CERTIFIED))
    certificates = certificates_of(run)
    assert certificates.num_pictures == 51
    assert certificates.accuracy_interval(0.25) == share_interval(1, 51)
    assert certificates.accuracy_interval(0.6) == share_interval(0, 51)
    assert certificates.accuracy_lower(0.0) == votes.accuracy_lower(0.0)
    message = "9 images are copies of others: each picture is counted once, as certified only if all of its copies are"
    rows = summary_of(run)
    assert rows["copies of a picture"] == message
    assert f"{share(share_interval(1, 51))} (n = 51)" in rows["certified at ℓ2 0.25"]
    assert message in page_of(run).text


def test_a_table_that_does_not_tell_pictures_apart_says_so(run: Path) -> None:
    assert "copies of a picture" not in summary_of(run)
    assert "Copies of a picture" not in page_of(run).text
    lines = (run / "certificates.tsv").read_text().splitlines()
    (run / "certificates.tsv").write_text("".join(line.rsplit("\t", 3)[0] + "\n" for line in lines))
    assert "not known: the table is older" in summary_of(run)["copies of a picture"]
    assert "Not known: the table is older" in page_of(run).text


def test_attacked_copies_count_once(run: Path) -> None:
    """Attacked images 0 to 35 are one picture, which the clean rung leaves standing with each of its copies, EOT 16
    not; known from the stored images, and without these from the certificates."""
    with np.load(run / "attacks" / "images.npz") as stored:
        arrays = dict(stored)
    pixels = np.random.default_rng(0).integers(0, 255, arrays["images"].shape, dtype=np.uint8)
    names = arrays["ids"].tolist()
    for i in range(36):
        pixels[names.index(f"img-{i}")] = 7
    np.savez(run / "attacks" / "images.npz", **{**arrays, "images": pixels})
    ladder = ladder_of(run)
    assert ladder.clean.num_pictures == 5
    assert ladder.clean.accuracy == share_interval(1, 5)
    assert ladder.strongest.accuracy == share_interval(0, 5)
    assert "(n = 5)" in summary_of(run)["clean accuracy"]
    edit_json(run / "model" / "model.json", image_shape=[1, 8, 8])
    shutil.rmtree(run / "attacks")
    assert ladder_of(run).clean.num_pictures == 40


def test_names_that_cannot_be_written_or_that_hide_are_shown_escaped(tmp_path: Path) -> None:
    """Control characters and bytes that are not UTF-8 in the names of run, classes, attackers and sizes."""
    hostile = "a\x1b[31m\n\u2028\u202e\udce9"
    text = write_report(named_run(tmp_path / "run", hostile)).read_text(encoding="utf-8")
    assert r"a\x1b[31m\x0a\u2028\u202e\udce9" in text
    for character in "\x1b\u2028\u202e":
        assert character not in text


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """Neither an empty nor a missing folder gives an empty report."""
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunError, match="is not a run folder"):
            write_report(folder)
    assert not list(tmp_path.iterdir())


def test_report_needs_no_torch_and_no_pyplot(run: Path) -> None:
    """A fresh interpreter writes the report without importing torch, sklearn, a stage or matplotlib's global state."""
    code = (
        "import sys; from rush.reporting.page import write_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"write_report({str(run)!r})\n"
        "heavy = {'torch', 'sklearn', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
