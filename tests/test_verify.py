"""``rush verify`` finds the same votes in a run, and says what differs in a changed one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from commands import Call, refusal
from rush.commands.verify import DIFFERENT
from rush.pipeline.verify import verify
from rush.records.folder import RunFolder


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_an_unchanged_run_is_found_the_same(run: Path, call: Call) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = verify(RunFolder.open(run), 5)
    assert result.identical
    names = [replay.what for replay in result.replays]
    assert names[0] == "certificates"
    assert {"clean", "frozen", "eot-2", "sandwich"} <= set(names)
    assert {(replay.images, replay.same, replay.changed, replay.largest) for replay in result.replays} == {(5, 5, 0, 0)}
    assert result.causes == ()
    done = call("verify", run, "--images", 3)
    assert done.returncode == 0, done.stderr
    assert "every vote is the same" in done.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_weights_are_found(run: Path, call: Call) -> None:
    weights = load_file(run / "model/model.safetensors")
    weights["head.weight"] = weights["head.weight"] + 0.5 * np.sign(weights["head.weight"])
    save_file(weights, run / "model/model.safetensors")
    done = call("verify", run, "--json")
    assert done.returncode == DIFFERENT
    found = json.loads(done.stdout)
    assert not found["identical"]
    assert found["replays"][0]["same"] < 10
    assert any("weights, noise or execution have changed" in cause for cause in found["causes"])
    assert "have changed" in call("verify", run).stdout


def test_another_form_of_the_forward_is_found_and_named(run: Path) -> None:
    """Stored votes in float32 against a description that says bfloat16."""
    file = run / "model/model.json"
    description = json.loads(file.read_text())
    assert description["execution"]["precision"] == "float32"
    description["execution"]["precision"] = "bfloat16"
    file.write_text(json.dumps(description))
    result = verify(RunFolder.open(run), 10)
    assert not result.identical
    assert ("precision", "float32", "bfloat16") in result.differences
    assert any(cause.startswith("with precision = float32") for cause in result.causes)
    assert max(replay.largest for replay in result.replays) < 0.1


def test_points_that_are_not_stored_and_stages_that_are_missing_are_named(run: Path, call: Call) -> None:
    shutil.rmtree(run / "attacks")
    assert "points: they are not stored" in verify(RunFolder.open(run), 2).skipped
    (run / "stages/attack.json").unlink()
    (run / "stages/certify.json").unlink()
    result = verify(RunFolder.open(run), 2)
    assert result.skipped == ("certificates: there are none", "points: the run has not been attacked")
    assert "--images must be at least 1" in refusal(call("verify", run, "--images", 0))
    assert "is not a run folder" in refusal(call("verify", run / "model"))
