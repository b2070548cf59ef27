"""The run folder: what may change in it, what is refused, and what a kill may leave behind."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import Call, refusal
from rush.choices import Stage
from rush.errors import ConfigError, RunError
from rush.recipe.schema import Recipe
from rush.records.folder import RunFolder
from rush.records.read_run import read_run
from tiny import EVERY_RUN, tiny

EXECUTION = {"device": "cpu", "precision": "float32", "channels_last": False, "tile": 100, "threads": 1}
DATA = {"train": {"name": "digits", "images": 1397, "fingerprint": "aa"}}


def new_run(tmp_path: Path, *overrides: str) -> RunFolder:
    return RunFolder.create(tmp_path / "run", tiny(tmp_path, *overrides))


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What each stage leaves first, long before it is finished.
FIRST_TRACES: dict[Stage, str] = {
    "pretrain": "checkpoints/pretrain.pt",
    "finetune": "checkpoints/finetune.pt",
    "certify": "certificates.tsv",
    "attack": "attacks/parts/clean-0000.npz",
    "audit": "audit.json",
}


def begun(tmp_path: Path, stage: Stage) -> RunFolder:
    """A run in which the stages before ``stage`` are finished and it has begun."""
    run = new_run(tmp_path)
    for own in EVERY_RUN[: EVERY_RUN.index(stage) + 1]:
        trace = run.path / FIRST_TRACES[own]
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("first trace")
        if own != stage:
            run.begin(own)
            run.finish(own, seconds=1.0)
    return run


FIELDS: list[tuple[str, Stage]] = [
    ("seed=1", "pretrain"),
    ("data.name=cifar10", "pretrain"),
    ("model.width=8", "pretrain"),
    ("execution.tile=10", "pretrain"),
    ("execution.deterministic=false", "pretrain"),
    ("pretrain.epochs=3", "pretrain"),
    ("pretrain.views.flip=0.5", "pretrain"),
    ("smoothing.sigma=0.5", "finetune"),
    ("finetune.shift=2", "finetune"),
    ("certify.alpha=0.01", "certify"),
    ("attack.max_votes=800", "attack"),
]


@pytest.mark.parametrize(("change", "decides"), FIELDS)
@pytest.mark.parametrize("stage", EVERY_RUN)
def test_a_field_may_change_until_the_stage_it_decides_has_begun(
    stage: Stage, change: str, decides: Stage, tmp_path: Path
) -> None:
    run = begun(tmp_path, stage)
    before = files(run.path)
    changed = tiny(tmp_path, change)
    if EVERY_RUN.index(decides) > EVERY_RUN.index(stage):
        RunFolder.create(run.path, changed)
        assert RunFolder.open(run.path).recipe == changed
        return
    field = change.split("=")[0].replace("views.flip", "views")
    told = rf"already holds stage \w+ made with different values of {re.escape(field)}; nothing"
    with pytest.raises(RunError, match=told):
        RunFolder.create(run.path, changed)
    assert files(run.path) == before


def test_a_run_of_the_fastest_kernels_does_not_become_a_deterministic_one(tmp_path: Path) -> None:
    """Runs from before the field are deterministic, and their fingerprint lacks it."""
    assert "deterministic" not in new_run(tmp_path).fingerprint("pretrain")
    run = RunFolder.create(tmp_path / "fastest", tiny(tmp_path, "execution.deterministic=false"))
    assert '"deterministic": false' in run.fingerprint("pretrain")
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints/pretrain.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"different values of execution\.deterministic"):
        RunFolder.create(run.path, tiny(tmp_path))


def test_all_differing_fields_are_named(tmp_path: Path) -> None:
    run = begun(tmp_path, "finetune")
    with pytest.raises(RunError, match=r"different values of seed, pretrain\.epochs, pretrain\.temperature"):
        RunFolder.create(run.path, tiny(tmp_path, "seed=4", "pretrain.epochs=9", "pretrain.temperature=0.1"))


def test_the_place_of_the_data_may_change_at_any_time(tmp_path: Path) -> None:
    run = begun(tmp_path, "attack")
    moved = RunFolder.create(run.path, tiny(tmp_path, f"data.root={tmp_path}"))
    assert RunFolder.open(run.path).recipe.data.root == str(tmp_path)
    assert [moved.fingerprint(stage) for stage in EVERY_RUN] == [run.fingerprint(stage) for stage in EVERY_RUN]
    spread = RunFolder.create(run.path, tiny(tmp_path, f'data.root=["{tmp_path}", "elsewhere"]'))
    assert RunFolder.open(run.path).recipe.data.root == (str(tmp_path), "elsewhere")
    assert [spread.fingerprint(stage) for stage in EVERY_RUN] == [run.fingerprint(stage) for stage in EVERY_RUN]


def test_a_begun_run_keeps_its_tile_where_the_recipe_leaves_it_open(tmp_path: Path) -> None:
    run = begun(tmp_path, "certify")
    run.record_provenance(EXECUTION, DATA)
    again = RunFolder.create(run.path, tiny(tmp_path, 'execution.tile="auto"'))
    assert again.recipe == run.recipe
    (run.path / "checkpoints/encoder.safetensors").write_bytes(b"encoder")
    branched = run.branch(tmp_path / "branch", tiny(tmp_path, 'execution.tile="auto"', "finetune.epochs=9"))
    assert branched.recipe.execution.tile == 100
    with pytest.raises(RunError, match=r"different values of execution\.tile"):
        RunFolder.create(run.path, tiny(tmp_path, "execution.tile=256"))


def test_an_encoder_serves_runs_that_are_judged_or_compiled_in_another_way(tmp_path: Path) -> None:
    run = new_run(tmp_path, 'execution.precision="auto"')
    run.begin("pretrain")
    run.finish("pretrain", seconds=1.0)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints/encoder.safetensors").write_bytes(b"encoder")
    judged = ('execution.precision="int8"', 'execution.compile="none"', "execution.tile=64")
    execution = run.branch(tmp_path / "branch", tiny(tmp_path, *judged)).recipe.execution
    assert (execution.precision, execution.compile, execution.tile) == ("int8", "none", 64)
    compiled = tiny(tmp_path, 'execution.precision="auto"', 'execution.compile_training="default"')
    assert run.branch(tmp_path / "compiled", compiled).recipe.execution.compile_training == "default"
    with pytest.raises(RunError, match=r"pre-trained with different values of execution\.precision;"):
        run.branch(tmp_path / "other", tiny(tmp_path, 'execution.precision="bfloat16"'))
    with pytest.raises(RunError, match=r"different values of execution\.precision"):
        RunFolder.create(run.path, tiny(tmp_path, 'execution.precision="int8"'))


def test_a_run_that_leaves_its_tile_open_resumes(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, 'execution.tile="auto"'))
    before = [run.fingerprint(stage) for stage in EVERY_RUN]
    run.record_provenance(EXECUTION | {"tile": "auto"}, DATA)
    again = RunFolder.create(run.path, tiny(tmp_path, 'execution.tile="auto"'))
    assert (again.recipe, [again.fingerprint(stage) for stage in EVERY_RUN]) == (run.recipe, before)


def test_a_fingerprint_holds_the_fields_of_its_stage_and_of_those_before(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for change, decides in FIELDS:
        other = RunFolder(run.path, tiny(tmp_path, change))
        differing = [stage for stage in EVERY_RUN if other.fingerprint(stage) != run.fingerprint(stage)]
        assert differing == list(EVERY_RUN[EVERY_RUN.index(decides) :]), change


def test_the_recipe_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = new_run(tmp_path, "attack.epsilon=0.1", "finetune.labels_per_class=10")
    assert RunFolder.open(run.path).recipe == run.recipe
    assert isinstance(run.recipe, Recipe)


def test_a_file_or_a_foreign_folder_in_the_place_of_the_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file; give a folder with --out"):
        RunFolder.create(tmp_path / "file", tiny(tmp_path))
    with pytest.raises(RunError, match=r"cannot be written: .*; give another --out"):
        RunFolder.create(tmp_path / "file/run", tiny(tmp_path))
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"holds no recipe\.json, so it is not a run folder; give another --out"):
        RunFolder.create(tmp_path / "foreign", tiny(tmp_path))
    assert files(tmp_path / "foreign") == {"thesis.tex": b"mine"}
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", tiny(tmp_path))


def test_opening_what_is_no_run_names_the_command_that_starts_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunError, match=rf"holds no recipe\.json.*`rush run RECIPE --out {path}`"):
            RunFolder.open(path)


@pytest.mark.parametrize("content", [b'{"name": "ti', b"", b"\xff\xfe", b"[]", b"3"])
def test_a_damaged_recipe_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / "recipe.json").write_bytes(content)
    with pytest.raises((RunError, ConfigError), match=r"recipe\.json"):
        RunFolder.open(run.path)


def test_a_kill_during_the_very_first_write_neither_blocks_the_folder_nor_stays_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.recipe.json.partial").write_text('{"name": "ti')
    run = new_run(tmp_path)
    assert [file.name for file in run.path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("execution", "data", "told"),
    [
        (EXECUTION | {"threads": 4}, DATA, "threads: was 1, now 4"),
        (EXECUTION | {"precision": "bfloat16"}, DATA, "precision: was float32, now bfloat16"),
        (EXECUTION | {"device": "cuda"}, DATA, "device: was cpu, now cuda"),
        (EXECUTION | {"tile": 7}, DATA, "tile: was 100, now 7"),
        (EXECUTION, {"train": DATA["train"] | {"fingerprint": "bb"}}, "data: was .*aa.*, now .*bb"),
    ],
)
def test_a_run_does_not_go_on_under_other_conditions(
    execution: dict[str, Any], data: dict[str, Any], told: str, tmp_path: Path
) -> None:
    run = new_run(tmp_path)
    run.record_provenance(EXECUTION, DATA)
    before = files(run.path)
    text = rf"started with different settings \({told}.*\); restore them or use another --out"
    with pytest.raises(RunError, match=text):
        run.record_provenance(execution, data)
    assert files(run.path) == before


def test_provenance_gathers_the_splits_and_says_what_the_result_depends_on(tmp_path: Path) -> None:
    run = new_run(tmp_path, "seed=3")
    test = {"test": {"name": "digits", "images": 400, "fingerprint": "cc"}}
    for data in (DATA, test, DATA, test):
        run.record_provenance(EXECUTION, data)
    found = json.loads((run.path / "provenance.json").read_text())
    assert found["data"] == {**DATA, **test}
    assert {key: found[key] for key in EXECUTION} == EXECUTION
    assert found["seed"] == 3
    assert {"python", "torch", "numpy", "rush-smoothing"} <= set(found["versions"])


def test_a_stage_that_is_not_finished_is_asked_for_by_its_command(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(RunError, match=rf"stage finetune is not finished; run `rush finetune {run.path}` first"):
        run.require("finetune")
    run.begin("finetune")
    assert run.finished("finetune") is None
    run.finish("finetune", seconds=2.5, mode="full")
    figures = run.require("finetune")
    assert (figures["stage"], figures["seconds"], figures["mode"]) == ("finetune", 2.5, "full")
    assert figures["started"] <= figures["finished"]


def test_events_are_told_apart_by_kind_and_stage(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.events("epoch", "pretrain") == []
    run.log("epoch", stage="pretrain", epoch=1)
    run.log("epoch", stage="finetune", epoch=1)
    run.log("note")
    run.log("epoch", stage="pretrain", epoch=2)
    assert [event["epoch"] for event in run.events("epoch", "pretrain")] == [1, 2]


LINE = '{"event": "epoch", "stage": "pretrain", "epoch": 2, "views": {"a": {}}}\n'


def test_a_line_cut_off_by_a_kill_is_passed_over_and_the_next_one_is_read(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    for kept in range(1, len(LINE)):
        run = RunFolder(tmp_path / str(kept), recipe)
        run.log("epoch", stage="pretrain", epoch=1)
        with open(run.path / "log.jsonl", "a") as file:
            file.write(LINE[:kept])
        whole = kept == len(LINE) - 1  # only the line feed is missing: nothing is lost
        assert [event["epoch"] for event in run.events("epoch", "pretrain")] == [1, 2][: 1 + whole], kept
        run.log("epoch", stage="pretrain", epoch=3)
        assert [event["epoch"] for event in run.events("epoch", "pretrain")] == ([1, 2, 3] if whole else [1, 3]), kept


def test_the_log_is_on_the_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sync: Callable[[int], None] = os.fsync

    def watched(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    RunFolder(tmp_path, tiny(tmp_path)).log("note")
    assert sizes == [(tmp_path / "log.jsonl").stat().st_size]


def test_a_finished_stage_is_repeated_by_the_line_that_the_refusal_names(
    call: Call, tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("certificates.tsv", "attacks.tsv", "audit.json")}
    refused = refusal(call("certify", run, "--set", "certify.alpha=0.01", "--set", "certify.radii=[0.0, 0.125]"))
    (line,) = re.findall(r"`(rush certify .*)`", refused)
    done = call(*shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    assert f"the results so far are in {run}/earlier/1" in done.stderr
    assert {name: (run / "earlier/1" / name).read_bytes() for name in before} == before
    assert (run / "earlier/1/stages/audit.json").is_file()
    assert json.loads((run / "earlier/1/recipe.json").read_text())["certify"]["alpha"] == 0.001
    assert json.loads((run / "stages/certify.json").read_text())["radii"] == [0, 0.125]
    results = read_run(run)
    assert results.missing == ("attack", "audit")
    assert call("attack", run).returncode == 0
    assert call("attack", run, "--redo", "--set", "attack.steps=2").returncode == 0
    assert json.loads((run / "earlier/2/recipe.json").read_text())["attack"]["steps"] == 3
    assert (run / "certificates.tsv").is_file()
    assert "earlier" not in refusal(call("certify", run, "--redo", "--set", "certify.alpha=2"))
    assert sorted(path.name for path in (run / "earlier").iterdir()) == ["1", "2"]


def test_what_trains_weights_is_not_repeated(call: Call, tiny_run: Path) -> None:
    assert "--redo" not in refusal(call("finetune", tiny_run, "--set", "finetune.epochs=1"))
    assert "--redo" not in refusal(call("certify", tiny_run, "--set", "smoothing.sigma=0.5"))
