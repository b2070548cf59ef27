"""What recipes would cost: passes as the methods' docstrings say, sizes as the data have them, arithmetic by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Call, refusal
from rush.commands import cost as costing
from rush.commands.cost import (
    COST_HEADER,
    STAGE_HEADER,
    DataSize,
    RecipeCost,
    StageCost,
    cost_rows,
    costs_value,
    data_size,
    evaluation_rows,
    measure,
    stage_rows,
)
from rush.data.images import hold_out, stratified_subset
from rush.data.sources import load_images
from rush.errors import ConfigError, RushError
from rush.pipeline.estimate import Estimate
from rush.runtime.randomness import stream
from tiny import run_tiny, tiny, write_tiny

TRAIN = 1397  # training digits
BATCH = 16
SMALL = (f"pretrain.batch_size={BATCH}", f"finetune.batch_size={BATCH}", "model.width=2")


def cost_of(folder: Path, stage: str, *overrides: str) -> StageCost:
    """The cost of one training of the tiny recipe, from one step."""
    wanted = (*SMALL, *(("pretrain.epochs=0",) if stage == "finetune" else ()), *overrides)
    return next(cost for cost in measure(tiny(folder, *wanted), steps=1).stages if cost.stage == stage)


@pytest.mark.parametrize(
    ("stage", "objective", "overrides", "both", "forward"),
    [
        ("pretrain", "simclr", (), 2, 0),
        ("pretrain", "simclr", ("pretrain.micro_batch=4",), 2, 2),
        ("pretrain", "simclr", ('pretrain.noise.views="both"',), 2, 0),
        ("pretrain", "moco", ("pretrain.queue=32",), 1, 1),
        ("pretrain", "acl", ("pretrain.adversary.steps=3",), 4 + 2 * 3, 0),
        ("finetune", "standard", (), 1, 0),
        ("finetune", "gaussian", (), 1, 0),
        ("finetune", "consistency", ("finetune.consistency.draws=3",), 3, 0),
        ("finetune", "smoothadv", ("finetune.smoothadv.draws=2", "finetune.smoothadv.steps=3"), (3 + 1) * 2, 0),
        ("finetune", "cat-rs", ("finetune.cat_rs.draws=2", "finetune.cat_rs.steps=3"), (3 + 2) * 2, 0),
        ("finetune", "pgd-at", ("finetune.adversary.steps=3",), 1 + 3, 0),
        ("finetune", "trades", ("finetune.adversary.steps=3",), 2 + 3, 1),
    ],
)
def test_passes_are_those_of_the_docstring(
    stage: str, objective: str, overrides: tuple[str, ...], both: int, forward: int, tmp_path: Path
) -> None:
    """Passes forward and backward, and forward alone, for an image and epoch."""
    cost = cost_of(tmp_path, stage, f"{stage}.objective={objective}", *overrides)
    seen = cost.steps * BATCH
    assert cost.steps == 2 * (TRAIN // BATCH)
    assert (cost.passes, cost.forward_passes) == (both * seen, forward * seen)
    assert cost.passes_per_image == both * seen / TRAIN
    assert cost.objective == objective


def test_a_frozen_encoder_only_goes_forward_for_as_long_as_it_is_frozen(tmp_path: Path) -> None:
    linear = cost_of(tmp_path, "finetune", 'finetune.mode="linear"')
    assert (linear.passes, linear.forward_passes) == (0, linear.steps * BATCH)
    assert linear.objective == "gaussian (linear)"
    wanted = ('finetune.mode="linear-then-full"', "finetune.epochs=5", "finetune.head_epochs=3")
    both, epoch = cost_of(tmp_path, "finetune", *wanted), TRAIN // BATCH * BATCH
    assert (both.passes, both.forward_passes) == (2 * epoch, 3 * epoch)


def test_passes_and_images_are_those_that_a_run_logs(tmp_path: Path) -> None:
    """Held-out images, a share of the labels and batches that do not come out even, all of them counted alike."""
    overrides = (
        "data.held_out=97", "finetune.label_fraction=0.5", "model.width=2", "pretrain.monitor_epochs=9",
        "finetune.monitor_epochs=9", "certify.num_estimation=20", "certify.images=1",
    )  # fmt: skip
    run = run_tiny(tmp_path, *overrides, stages=("pretrain", "finetune"))
    for cost in measure(run.recipe, steps=1).stages:
        told = run.require(cost.stage)
        assert cost.images == told["images"]
        assert cost.passes_per_image == pytest.approx(told["passes_per_image"], rel=1e-12)
        assert cost.forward_passes_per_image == told["forward_passes_per_image"]


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (("data.name=cifar10",), DataSize((3, 32, 32), 10, 50_000, 50_000, 10_000)),
        (
            ("data.name=cifar10", "data.held_out=5000", "finetune.label_fraction=0.01", "data.size=16"),
            DataSize((3, 16, 16), 10, 45_000, 450, 10_000),
        ),
        (("data.name=cifar100", "finetune.labels_per_class=4"), DataSize((3, 32, 32), 100, 50_000, 400, 10_000)),
        (
            ("data.name=stl10", 'data.pretrain_split="train+unlabeled"', "data.held_out=500"),
            DataSize((3, 96, 96), 10, 104_500, 4_500, 8_000),
        ),
        (
            ("data.name=stl10", 'data.pretrain_split="unlabeled"', "data.held_out=500"),
            DataSize((3, 96, 96), 10, 100_000, 4_500, 8_000),
        ),
    ],
)
def test_sizes_of_known_data_need_no_files(tmp_path: Path, overrides: tuple[str, ...], size: DataSize) -> None:
    assert data_size(tiny(tmp_path, f"data.root={tmp_path}", *overrides)) == size


def test_sizes_are_those_of_the_images_themselves(tmp_path: Path) -> None:
    """Of the digits, which are always there, and of a file that only its images describe."""
    train = load_images("digits", "train")
    kept, _ = hold_out(train, 200, stream(0, "held out"))
    labelled = stratified_subset(kept, 0.1, stream(0, "labels"))
    recipe = tiny(tmp_path, "data.held_out=200", "finetune.label_fraction=0.1")
    assert data_size(recipe) == DataSize((1, 8, 8), train.num_classes, len(kept), len(labelled), 400)
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 60), ("test", 9)):
        arrays[f"x_{split}"] = generator.integers(0, 256, (count, 5, 5, 3), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 3
    np.savez(tmp_path / "own.npz", **arrays)
    own = tiny(tmp_path, f"data.name={tmp_path / 'own.npz'}", "data.held_out=10")
    assert data_size(own) == DataSize((3, 5, 5), 3, 50, 50, 9)
    assert data_size(own.model_copy(update={"data": own.data.model_copy(update={"size": 4})})).shape == (3, 4, 4)
    drawn = own.model_copy(update={"data": own.data.replace(test_images=20)})
    assert data_size(drawn) == DataSize((3, 5, 5), 3, 30, 30, 20)


def test_the_stages_after_training_are_counted_by_the_fields_of_the_recipe(tmp_path: Path) -> None:
    smoothed = measure(tiny(tmp_path, *SMALL, "certify.images=7", "attack.images=6", "audit.images=9"), steps=1)
    counted = {stage: estimate.images for stage, estimate in smoothed.evaluations.items()}
    assert counted == {"certify": 7, "attack": 6, "audit": 6}
    rows = evaluation_rows([smoothed])
    assert [row[:3] for row in rows] == [("tiny", "certify", "7"), ("tiny", "attack", "6"), ("tiny", "audit", "6")]
    plain = measure(tiny(tmp_path, *SMALL, "smoothing.sigma=0", "finetune.objective=standard"), steps=1)
    assert list(plain.evaluations) == ["attack", "audit"]


def logged(*epochs: dict[str, Any]) -> Callable[..., None]:
    """A training that does nothing but log these epochs."""

    def trained(*arguments: Any, **_: object) -> None:
        log = arguments[-1].log
        log("started")
        for epoch in epochs:
            log("epoch", **epoch)
            log("monitor", knn=0.5)

    return trained


def epoch(seconds: float, passes: int, peak: int | None = 1000, joules: float | None = None) -> dict[str, Any]:
    return {"seconds": seconds, "passes": passes, "forward_passes": 1, "peak_memory": peak, "joules": joules}


def test_only_the_steps_after_the_warm_up_are_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four measured steps in 2 s are half a second a step, whatever the epoch before them took."""
    monkeypatch.setattr(costing, "finetune", logged(epoch(900.0, 7, 5000, 9e9), epoch(2.0, 640, 1000, 12.0)))
    cost = measure(tiny(tmp_path, "pretrain.epochs=0"), steps=4).stages[0]
    steps = 2 * (TRAIN // 128)
    assert (cost.steps, cost.seconds_per_step, cost.images_per_second) == (steps, 0.5, 256.0)
    assert (cost.seconds, cost.joules) == (steps * 0.5, steps * 3.0)
    assert (cost.passes, cost.forward_passes) == (steps * 160, round(steps / 4))
    assert cost.peak_memory == 1000 + 64 * (TRAIN - 4 * 128)  # 64 bytes an image


def test_each_kind_of_step_stands_for_its_own_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third epoch warms the steps of every weight up; one unknown number of joules leaves the sum unknown."""
    shown = (epoch(900.0, 7), epoch(1.0, 0, 500, 2.0), epoch(900.0, 7), epoch(4.0, 128, 700))
    monkeypatch.setattr(costing, "finetune", logged(*shown))
    wanted = ('finetune.mode="linear-then-full"', "finetune.epochs=5", "finetune.head_epochs=3", "pretrain.epochs=0")
    cost = measure(tiny(tmp_path, *wanted), steps=1).stages[0]
    per_epoch = TRAIN // 128
    assert cost.seconds == per_epoch * (3 * 1.0 + 2 * 4.0)
    assert (cost.passes, cost.joules) == (per_epoch * 2 * 128, None)
    assert cost.peak_memory == 700 + 64 * (TRAIN - 128)


def test_images_that_are_streamed_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "pretrain", logged(epoch(1.0, 1), epoch(1.0, 1)))
    monkeypatch.setattr(costing, "finetune", logged(epoch(1.0, 1), epoch(1.0, 1, None)))
    for gigabytes, images in ((2, 0), (8, 3 * 96 * 96 * (105_000 - 128))):
        overrides = ("data.name=stl10", 'data.pretrain_split="train+unlabeled"', f"data.memory_gb={gigabytes}")
        pretrained, finetuned = measure(tiny(tmp_path, *overrides), steps=1).stages
        assert (pretrained.peak_memory, finetuned.peak_memory) == (1000 + images, None)


def made() -> list[RecipeCost]:
    """Two recipes: one pre-trains on 1,000 images and fine-tunes on 100 of them, one trains on 500."""
    first = StageCost("moco", 1000, 40, 20_000, 20_000, 7200.0, 3_000_000_000, 5000.0, "pretrain", 100.0, 10)
    second = StageCost("gaussian", 100, 10, 1000, 0, 1800.0, None, 1000.0, "finetune", 50.0, 5)
    other = StageCost("trades", 500, 100, 10_000, 500, 36_000.0, 1_500_000_000, None, "finetune", 5.0, 7)
    one = RecipeCost(
        "one", "small, width 2", "cpu", 4, (first, second), {"attack": Estimate(20, 8.0, 3000.0, 7200.0, 60.0)}
    )
    audit = {"audit": Estimate(10, 8.0, 300.0, 90.0, 60.0, bounded=False)}
    return [one, replace(one, recipe="two", stages=(other,), evaluations=audit)]


def test_a_recipe_is_the_sum_of_its_trainings() -> None:
    one, two = made()
    total = one.total
    assert (total.steps, total.seconds, total.joules, total.peak_memory) == (50, 9000.0, 6000.0, 3_000_000_000)
    assert (total.images, total.passes_per_image, total.forward_passes_per_image) == (1000, 21.0, 20.0)
    assert (total.objective, two.total.joules) == ("moco + gaussian", None)
    rows = cost_rows([one, two])
    assert rows == [
        ("one", "small, width 2", "moco + gaussian", "21 + 20 forward only", "50", "180", "2.5", "1.00"),
        ("two", "small, width 2", "trades", "20 + 1 forward only", "100", "360", "10", "4.00"),
        ("all", "", "", "", "150", "", "12.5", "5.00"),
    ]
    assert [len(row) for row in rows] == [len(COST_HEADER)] * 3
    assert cost_rows([two])[0][-1] == "1.00"
    assert len(cost_rows([two])) == 1
    shown = stage_rows([one, two])
    assert {len(row) for row in shown} == {len(STAGE_HEADER)}
    assert shown[0][-3:] == ("2 h 00 min", "3.00 GB", "5 kJ")
    assert shown[1][-3:] == ("30 min 00 s", "–", "1 kJ")
    assert shown[2][-3:] == ("10 h 00 min", "1.50 GB", "–")
    assert evaluation_rows([one, two]) == [
        ("one", "attack", "20", "8 + 3,000 forward only", "1 min 00 s", "2 h 00 min"),
        ("two", "audit", "10", "–", "1 min 00 s", "–"),
    ]


def test_figures_in_the_file_are_marked() -> None:
    told = json.loads(json.dumps(costs_value(made())))["recipes"]
    assert [(entry["recipe"], entry["extrapolated"], entry["hours"], entry["time_ratio"]) for entry in told] == [
        ("one", True, 2.5, 1.0),
        ("two", True, 10.0, 4.0),
    ]
    assert told[0]["passes_per_image"] == 21.0
    stages = told[0]["stages"]
    assert [(stage["stage"], stage["extrapolated"], stage["seconds_per_step"]) for stage in stages] == [
        ("pretrain", True, 180.0),
        ("finetune", True, 180.0),
    ]


@pytest.mark.parametrize(
    ("overrides", "steps", "told"),
    [
        ((), 0, "steps must be at least 1, got 0"),
        (("pretrain.batch_size=1398",), 1, "batch_size = 1398 exceeds the 1397 training images"),
        (("data.held_out=1397",), 1, "held_out = 1397 leaves none of 1397"),
        (('data.pretrain_split="train+unlabeled"',), 1, "digits has no split 'unlabeled'; allowed are train, test"),
    ],
)
def test_what_cannot_be_trained_has_no_cost(tmp_path: Path, overrides: tuple[str, ...], steps: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("+", r"\+")):
        measure(tiny(tmp_path, *overrides), steps)


def test_an_error_comes_back_from_the_process_that_measures(tmp_path: Path) -> None:
    receiver, sender = Pipe(duplex=False)
    costing._answer(sender, tiny(tmp_path, "finetune.batch_size=5000").to_json(), 1, 1)
    answer = receiver.recv()
    assert isinstance(answer, ConfigError)
    assert "batch_size = 5000" in str(answer)


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "_answer", "ends at once".format)
    with pytest.raises(RushError, match=r"tiny: .* ended without an answer \(exit status 0\).*lower batch_size"):
        costing.measure_apart(tiny(tmp_path))


@pytest.mark.slow
def test_a_recipe_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With the threads of the one that asks; an error comes back as it is."""
    cost = costing.measure_apart(tiny(tmp_path, *SMALL), steps=1)
    assert [stage.steps for stage in cost.stages] == [2 * (TRAIN // BATCH)] * 2
    assert "float32, 1 thread," in cost.conditions
    assert all(stage.seconds > 0 for stage in cost.stages)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        costing.measure_apart(tiny(tmp_path), steps=0)


def test_the_command_prints_and_writes_what_it_measured(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costing, "measure_apart", measure)
    recipe, file = write_tiny(tmp_path), tmp_path / "cost.json"
    done = call("cost", recipe, "--steps", 1, "--out", file, "--set", "pretrain.epochs=0")
    assert done.returncode == 0, done.stderr
    assert "every figure extrapolated (steps measured: 1)" in done.stdout
    assert "extrapolated from steps measured on cpu (" in done.stdout
    assert "float32, 1 thread, torch" in done.stdout
    told = json.loads(file.read_text())["recipes"][0]
    assert [stage["stage"] for stage in told["stages"]] == ["finetune"]
    assert told["seconds"] > 0
    assert f"{told['seconds_per_step']:.3g}" in done.stdout
    printed = json.loads(call("cost", recipe, "--steps", 1, "--json", "--set", "pretrain.epochs=0").stdout)
    assert [set(recipe) for recipe in printed["recipes"]] == [set(told)]


def test_the_command_refuses_before_it_measures(call: Call, tmp_path: Path) -> None:
    assert "no recipe 'digit'" in refusal(call("cost", write_tiny(tmp_path), "digit"))
    assert "pretrain.epochs" in refusal(call("cost", write_tiny(tmp_path), "--set", "pretrain.epochs=-1"))
