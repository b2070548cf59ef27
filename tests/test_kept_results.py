"""The runs kept under ``results``, most of them without weights, can be read by whoever has the repository alone."""

import shutil
from pathlib import Path

import pytest

import rush
from commands import Call, refusal
from rush.errors import RunError

RESULTS = Path(__file__).parents[1] / "results"
RUNS = sorted(file.parent for file in RESULTS.rglob("recipe.json"))
WITHOUT_WEIGHTS = [run for run in RUNS if not (run / "model/model.safetensors").exists()]


def test_weights_are_kept_where_tests_and_benchmarks_load_them() -> None:
    assert RESULTS / "cifar10-small" in RUNS
    assert RESULTS / "cifar10-small" not in WITHOUT_WEIGHTS
    assert (RESULTS / "cifar10-pgd/model.safetensors").exists()


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
