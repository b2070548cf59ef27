"""The runs kept under ``results``, most of them without weights, can be read, and the tables of the docs are theirs."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import full_size_page
import results
import rush
import shared
from commands import Call, refusal
from rush.errors import RunError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RUNS = sorted(file.parent for file in RESULTS.rglob("recipe.json"))
WITHOUT_WEIGHTS = [run for run in RUNS if not (run / "model/model.safetensors").exists()]


def test_weights_are_kept_where_tests_and_benchmarks_load_them() -> None:
    assert RESULTS / "cifar10-small" in RUNS
    assert RESULTS / "cifar10-small" not in WITHOUT_WEIGHTS
    assert (RESULTS / "cifar10-pgd/model.safetensors").exists()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_does_not_say_where_its_data_lay(run: Path) -> None:
    assert json.loads((run / "recipe.json").read_text())["data"]["root"] is None


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_is_shown(run: Path, call: Call) -> None:
    done = call("info", run)
    assert done.returncode == 0, done.stderr
    assert run.name in done.stdout


@pytest.mark.parametrize("name", ["cifar10-small-trainings/simclr-hundredth", "cifar10-small-pgd-at"])
def test_a_kept_run_without_weights_is_reported(name: str, call: Call, tmp_path: Path) -> None:
    copy = shutil.copytree(RESULTS / name, tmp_path / "run")
    done = call("report", copy)
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").stat().st_size > 10_000


def test_kept_runs_without_weights_are_compared(call: Call) -> None:
    runs = WITHOUT_WEIGHTS[-3:]
    done = call("compare", *runs)
    assert done.returncode == 0, done.stderr
    for run in runs:
        assert run.name in done.stdout


@pytest.mark.parametrize("name", ["cifar10-small-trainings/simclr-0", "cifar10-small-pgd-at"])
def test_a_kept_run_without_weights_says_so(name: str, call: Call) -> None:
    with pytest.raises(RunError, match=r"model.*is missing"):
        rush.load(RESULTS / name)
    assert "is missing" in refusal(call("predict", RESULTS / name, "image.png"))


def test_the_weights_in_the_history_are_those_that_are_gone() -> None:
    listed = [
        line.split("`")[1::2] for line in (RESULTS / "README.md").read_text().splitlines() if "safetensors" in line
    ]
    assert listed
    for file, digest in listed:
        assert not (RESULTS / file).exists()
        assert (RESULTS / file).parent.is_dir()
        assert len(bytes.fromhex(digest)) == 32


@pytest.mark.parametrize("page", results.pages(ROOT), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_committed_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert results.filled(text, RESULTS) == text


def test_tables_name_their_conditions() -> None:
    page = results.filled((ROOT / "docs/results.md").read_text(encoding="utf-8"), RESULTS)
    tables = [text.split("<!-- end -->")[0] for text in page.split("<!-- table: ")[1:]]
    assert len(tables) >= 10
    for table in tables:
        words = table.lower()
        assert "noise" in words, table
        assert "commit" in words, table
        assert any(processor in table for processor in ("AMD EPYC", "Xeon(R)", "H100")), table
        if table.startswith("benchmarks/"):
            continue  # a benchmark says which intervals it has, and trains nothing
        assert "interval" in words or " costs -->" in table, table
        known = "held-out labels" in " ".join(words.split())
        assert known or "minutes" in words, table  # full-size runs do not record them


def test_a_benchmarks_record_has_its_table() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in results.pages(ROOT))
    for file in RESULTS.glob("benchmarks/*.json"):
        assert f"<!-- table: benchmarks/{file.stem} record -->" in shown


def test_a_changed_outcome_changes_the_table(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "cifar10-small-pgd-at", tmp_path / "run")
    file = tmp_path / "run/attacks.tsv"
    lines = file.read_text().splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("pgd-20\t") and "\tbroken\t" in line)
    outcome = dict(zip(lines[0].split("\t"), lines[row].split("\t"), strict=True))
    outcome |= {"verdict": "held", "votes_label": "1", "votes_challenger": "0"}
    lines[row] = "\t".join(outcome.values())
    file.write_text("\n".join(lines) + "\n")
    page = "before\n<!-- table: run ladder -->\nold\n<!-- end -->\nbehind\n"
    changed = results.filled(page, tmp_path)
    known = results.filled(page.replace("table: run", "table: cifar10-small-pgd-at"), RESULTS)
    assert "| PGD-20 | 20 + 3 forward only | 32.2 % [28.1, 36.5] | 32.2 % [28.1, 36.5] | – |" in known
    assert "| PGD-20 | 20 + 3 forward only | 32.4 % [28.3, 36.7] | 32.4 % [28.3, 36.7] | – |" in changed
    assert changed.startswith("before\n<!-- table: run ladder -->\n")
    assert changed.endswith("\n<!-- end -->\nbehind\n")
    assert results.filled(changed, tmp_path) == changed


def test_a_benchmark_records_its_rows_and_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "RECORDS", tmp_path / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["views.py", "--data", str(tmp_path), "--rounds", "3", "--record"])
    rows: list[shared.Row] = [
        {"pipeline": "ours", "views/s": 34602.4, "times [least, greatest]": (1.0, 0.987654, 1.25)},
        {"pipeline": "other", "views/s": 0.56, "target": None, "images": 1000},
    ]
    shared.record(Namespace(record=False), "views", rows, {})
    assert not (tmp_path / "benchmarks").exists()
    shared.record(Namespace(record=True), "views", rows, {"noise": "none", "images": 1024})
    table = results.filled("<!-- table: benchmarks/views record -->\n<!-- end -->\n", tmp_path)
    assert table.split("\n\n")[2] == (
        "| pipeline | views/s | times [least, greatest] | target | images |\n| --- | --- | --- | --- | --- |\n"
        "| ours | 34,602 | 1 [0.9877, 1.25] |  |  |\n| other | 0.56 |  |  | 1,000 |"
    )
    found = json.loads((tmp_path / "benchmarks/views.json").read_text())
    head = " ".join(table.split("\n\n")[1].split())
    assert head.startswith("Noise: none; images: 1,024; command: `python benchmarks/views.py --data DATA --rounds 3`; ")
    assert all(found[name] in head for name in ("date", "commit", "processor"))


@pytest.mark.parametrize("name", ["cifar10-full", "cifar10-minutes"])
def test_the_page_of_a_full_size_run_is_that_of_its_figures(name: str) -> None:
    page = (RESULTS / name / "results.md").read_text(encoding="utf-8")
    items = json.loads((RESULTS / name / "results.json").read_text())["items"]
    plan = json.loads((RESULTS / name / "plan.json").read_text())
    conditions = {
        "network": "", "plan": plan, "device": {}, "versions": {"python": ""}, "commit": "",
        "images": {"train": 0, "test": 0}, "minutes": 0,
    }  # fmt: skip
    made = full_size_page.page(conditions, items)
    assert made[made.index("\n| item") :] == page[page.index("\n| item") :]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("<!-- table: run steps -->\n<!-- end -->\n", "there is no table run steps; PART must be one of certified,"),
        ("<!-- table: run ladder -->\n| old |\n", "a marker must be"),
        ("<!-- table: ladder -->\n<!-- end -->\n", "a marker must be"),
    ],
)
def test_a_marker_that_names_no_table_is_refused(page: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=reason):
        results.filled(page, tmp_path)
