"""Trainings by minutes: how many epochs fit, the bits of a training for that number, and a number that stays."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainings
from commands import Call, refusal
from ranks import on_ranks
from rush.choices import FinetuneMode, OptimizerName, PretrainObjective
from rush.commands import cost as costing
from rush.commands.cost import measure as cost_of
from rush.data.batches import Batch, Resident
from rush.data.views import random_view
from rush.errors import ConfigError, DeviceMemoryError, RunError
from rush.recipe.load import load_recipe
from rush.recipe.schema import AdversaryConfig, Recipe, Schedule, Views
from rush.records.folder import RunFolder
from rush.runtime.distributed import rank
from rush.training import budget, graphs, loop
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import CheckpointPolicy
from tiny import TINY, results_of_training, tiny, write_tiny
from trainings import FINETUNE, PER_EPOCH, SIMCLR, Clock, bits, finetuned, images, kept, pretrained

SCHEDULE = trainings.SCHEDULE.replace(epochs=None, minutes=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(budget, "clock", fake)
    return fake


class Training(trainings.Training):
    """A training whose steps take ``seconds``, those of its head ``head_seconds``, by ``clock``."""

    def __init__(
        self,
        clock: Clock,
        checkpoints: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008, a frozen value
        seconds: float = 2.0,
        head_seconds: float = 1.0,
        fail_at: int = -1,
    ) -> None:
        super().__init__(checkpoints)
        self.clock, self.seconds, self.head_seconds, self.fail_at = clock, seconds, head_seconds, fail_at
        self.head_epochs = 0

    def step(self, batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        if len(self.steps) == self.fail_at:
            raise KeyboardInterrupt
        frozen = epoch < self.head_epochs
        self.clock.pass_by(self.head_seconds if frozen else self.seconds)
        self.module[:2].requires_grad_(not frozen)
        return super().step(batch, epoch, generator)

    def run(self, schedule: Schedule = SCHEDULE, head_epochs: int = 0, **options: Any) -> "Training":
        self.head_epochs = head_epochs
        return super().run(schedule, name="finetune", head_epochs=head_epochs, **options)

    @property
    def budget(self) -> dict[str, Any]:
        (event,) = self.logged("budget")
        return event

    @property
    def outcome(self) -> tuple[dict[str, bytes], list[tuple[int, float, int, int]], int]:
        """The weights, the figures of every epoch, and the passes of the whole training."""
        return self.bits, self.epochs, self.meter.cost.passes


# --- how many epochs --------------------------------------------------------------------------------------------------


def test_the_number_of_epochs_by_hand(clock: Clock) -> None:
    """57 of 60 s may be used; seven steps of the trial leave 43 for epochs of five steps of 2 s."""
    trained = Training(clock).run()
    assert trained.steps == [0, 1, 2, 0, 0, 1, 2, *range(4 * PER_EPOCH)]
    assert trained.budget == {
        "event": "budget", "stage": "finetune", "minutes": 1, "epochs": 4, "seconds_per_step": 2.0,
        "seconds_per_epoch": 10.0, "trial_seconds": 14.0,
    }  # fmt: skip
    assert [event["event"] for event in trained.events] == ["budget", *["epoch"] * 4]


@pytest.mark.parametrize("monitor_epochs", [1, 3])
@pytest.mark.parametrize("head_epochs", [0, 2])
@pytest.mark.parametrize(
    ("opening", "saving", "monitoring"), [(0.0, 0.0, 0.0), (9.0, 0.0, 0.0), (0.0, 30.0, 0.0), (1.0, 2.0, 20.0)]
)
def test_so_many_epochs_end_within_the_minutes_and_one_more_would_not(
    clock: Clock,
    opening: float,
    saving: float,
    monitoring: float,
    head_epochs: int,
    monitor_epochs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By one clock: first batches, steps of both kinds, checkpoints, live figures, and all of them in the trial."""

    class SlowImages(Resident):
        def batches(self, *given: Any, **named: Any) -> Iterator[Batch]:
            clock.pass_by(opening)
            yield from super().batches(*given, **named)

    save = TrainingCheckpoint.save

    def slow_save(checkpoint: TrainingCheckpoint, state: dict[str, Any]) -> None:
        clock.pass_by(saving)
        save(checkpoint, state)

    monkeypatch.setattr(TrainingCheckpoint, "save", slow_save)

    def trained(schedule: Schedule, folder: str) -> tuple[Training, float]:
        began = clock.seconds
        training = Training(clock, kept(tmp_path / folder))
        training.run(
            schedule.replace(monitor_epochs=monitor_epochs),
            head_epochs,
            images=images(kind=SlowImages),
            monitor=lambda _: clock.pass_by(monitoring) or {},
        )
        return training, clock.seconds - began

    minutes = 6.0
    training, taken = trained(SCHEDULE.replace(minutes=minutes), "by minutes")
    epochs = training.budget["epochs"]
    _, longer = trained(SCHEDULE.replace(minutes=None, epochs=epochs + 1), "one more")
    usable = 60 * minutes * 0.95
    assert epochs > 2
    assert taken <= usable
    assert longer + training.budget["trial_seconds"] + saving > usable


@pytest.mark.parametrize("monitor_epochs", [1, 3, 20])
@pytest.mark.parametrize("head_epochs", [0, 4])
def test_the_seconds_of_a_plan_are_those_of_its_epochs_one_by_one(head_epochs: int, monitor_epochs: int) -> None:
    plan = budget.Plan("pretrain", 1.0, PER_EPOCH, head_epochs, monitor_epochs=monitor_epochs)
    times = budget.Times(2.0, 1.0, opening=0.25, saving=0.125, monitoring=8.0)
    for epochs in range(9):
        seconds = 0.0
        for epoch in range(1, epochs + 1):
            seconds += 0.25 + PER_EPOCH * (1.0 if epoch <= head_epochs else 2.0) + 0.125
            seconds += 8.0 if epoch % monitor_epochs == 0 or epoch == epochs else 0.0
        assert plan.seconds(epochs, times) == seconds


def test_checkpoints_that_take_long_are_not_counted_for_every_epoch() -> None:
    """One of 3 s for every 60 s, and the last one; never more than one per epoch."""
    plan = budget.Plan("pretrain", 1.0, PER_EPOCH)
    times = budget.Times(2.0, saving=3.0)
    assert [plan.seconds(epochs, times) for epochs in (0, 1, 5, 6, 11, 12)] == [0, 13, 53, 66, 116, 129]


def test_what_takes_long_at_first_only_is_timed_again(clock: Clock) -> None:
    """An import of 2 s in the first live figures is not counted for each of them."""
    waiting = iter([2.0])
    trained = Training(clock).run(monitor=lambda _: clock.pass_by(next(waiting, 0.0)) or {})
    assert (trained.budget["trial_seconds"], trained.budget["epochs"]) == (16.0, 4)


def test_live_figures_come_after_every_so_many_epochs_and_the_last(clock: Clock) -> None:
    seen: list[int] = []

    def monitor(epoch: int) -> dict[str, Any]:
        seen.append(epoch)
        return {"number": epoch}

    trained = Training(clock).run(SCHEDULE.replace(monitor_epochs=3), monitor=monitor)
    assert seen == [0, 0, 3, 4]
    assert [event["epoch"] for event in trained.logged("monitor")] == [3, 4]


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_epochs", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_the_bits_are_those_of_a_training_for_that_number_of_epochs(
    optimizer: OptimizerName, head_epochs: int, clock: Clock, tmp_path: Path
) -> None:
    schedule = SCHEDULE.replace(optimizer=optimizer)
    by_minutes = Training(clock, kept(tmp_path)).run(schedule, head_epochs)
    epochs = by_minutes.budget["epochs"]
    given = Training(clock).run(schedule.replace(minutes=None, epochs=epochs), head_epochs)
    assert by_minutes.outcome == given.outcome
    assert len(by_minutes.outcome[1]) == epochs
    assert not (tmp_path / "state.rehearsal.pt").exists()


def test_a_module_is_restored_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    before, places = bits(module), [tensor.data_ptr() for tensor in module.state_dict().values()]
    with budget.restored(module):
        module.requires_grad_(True)
        module(torch.ones(3, 2)).sum().backward()
        with torch.no_grad():
            module[0].weight.zero_()
    assert bits(module) == before
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == places
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.fixture
def slow_view(clock: Clock) -> trainings.View:
    def view(x: Tensor, views: Views, generator: torch.Generator) -> Tensor:
        clock.pass_by(2.0)  # twice per step of pre-training, once per step of fine-tuning
        return random_view(x, views, generator)

    return view


@pytest.mark.parametrize("objective", ["simclr", "moco", "acl"])
def test_a_pre_training_by_minutes_has_the_bits_of_its_epochs(
    objective: PretrainObjective, slow_view: trainings.View
) -> None:
    """28 of 57 s go into the trial; two epochs of three steps of 4 s fit into the others."""
    config = SIMCLR.replace(
        objective=objective, queue=64, key_momentum=0.5, shuffle_groups=2, adversary=AdversaryConfig(steps=1)
    )
    by_minutes = bits(pretrained(config.replace(epochs=None, minutes=1), view=slow_view))
    assert by_minutes == bits(pretrained(config.replace(epochs=2), view=slow_view))
    assert by_minutes != bits(pretrained(config.replace(epochs=3), view=slow_view))


@pytest.mark.parametrize(("mode", "epochs"), [("full", 7), ("linear", 7), ("linear-then-full", 4)])
def test_a_fine_tuning_by_minutes_has_the_bits_of_its_epochs(
    mode: FinetuneMode, epochs: int, slow_view: trainings.View
) -> None:
    """A trial of seven steps of 2 s leaves 43 of 57 s for epochs of 6 s; both kinds of steps take a trial of two."""
    config = FINETUNE.replace(epochs=epochs, mode=mode)
    by_minutes = finetuned(config.replace(epochs=None, minutes=1), view=slow_view)
    assert bits(by_minutes) == bits(finetuned(config, view=slow_view))
    assert bits(by_minutes) != bits(finetuned(config.replace(epochs=epochs + 1), view=slow_view))
    assert all(parameter.requires_grad for parameter in by_minutes.parameters())


# --- a number that stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 2, 8, 19])
def test_a_resumed_training_keeps_the_number_on_a_slower_machine(taken: int, clock: Clock, tmp_path: Path) -> None:
    trial = 7
    undisturbed = Training(clock).run()
    with pytest.raises(KeyboardInterrupt):
        Training(clock, kept(tmp_path), fail_at=trial + taken).run()
    resumed = Training(clock, kept(tmp_path), seconds=2000.0).run()
    done = taken // PER_EPOCH
    assert resumed.steps == list(range(done * PER_EPOCH, 4 * PER_EPOCH))
    assert resumed.bits == undisturbed.bits
    assert [event["event"] for event in resumed.events] == ["epoch"] * (4 - done)


def test_a_trial_that_runs_out_of_memory_names_the_field_to_lower(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    training = Training(clock)
    monkeypatch.setattr(training, "step", step)
    with pytest.raises(DeviceMemoryError, match=r"step 1: there is not enough memory .* Lower .*batch_size"):
        training.run()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_training_killed_in_its_trial_tries_again(on_nonfinite: Any, clock: Clock, tmp_path: Path) -> None:
    checkpoints = kept(tmp_path, on_nonfinite=on_nonfinite)
    with pytest.raises(KeyboardInterrupt):
        Training(clock, checkpoints, fail_at=5).run()
    assert not (tmp_path / "state.pt").exists()
    resumed = Training(clock, checkpoints).run()
    assert resumed.budget["epochs"] == 4
    assert resumed.outcome == Training(clock).run().outcome


def test_a_refusal_of_the_number_leaves_no_checkpoint(clock: Clock, tmp_path: Path) -> None:
    told: list[budget.Budget] = []

    def refuse(settled: budget.Budget) -> None:
        told.append(settled)
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        Training(clock, kept(tmp_path, settled=refuse)).run()
    assert [settled.epochs for settled in told] == [4]
    assert not (tmp_path / "state.pt").exists()


# --- too little -------------------------------------------------------------------------------------------------------


def test_too_little_for_one_epoch_says_how_many_minutes_one_takes(clock: Clock) -> None:
    """A trial of 14 s and an epoch of 10 s: 24 s / 0.95 = 0.4211 minutes, rounded up."""
    with pytest.raises(
        ConfigError,
        match=r"^finetune\.minutes = 0\.4 is too little: one epoch takes 0\.167 minutes here \(5 steps of 2 s, and its "
        r"end\) and the trial that showed it took 0\.233; give at least 0\.43 minutes$",
    ):
        Training(clock).run(SCHEDULE.replace(minutes=0.4, warmup_epochs=0))
    assert Training(clock).run(SCHEDULE.replace(minutes=0.43, warmup_epochs=0)).budget["epochs"] == 1


def test_a_trial_ends_early_where_not_one_epoch_of_its_steps_fits(clock: Clock) -> None:
    training = Training(clock, seconds=60.0)
    with pytest.raises(ConfigError, match=r"one epoch takes 5 minutes here \(5 steps of 60 s"):
        training.run()
    assert len(training.steps) == budget.WARMUP_STEPS


@pytest.mark.parametrize(
    ("schedule", "head_epochs", "told"),
    [
        (SCHEDULE, 9, r"finetune\.head_epochs = 9 needs at least 10 epochs, and 7 end within finetune\.minutes = 1 "),
        (
            SCHEDULE.replace(warmup_epochs=4),
            0,
            r"finetune\.warmup_epochs = 4 needs at least 5 epochs, and 4 end within finetune\.minutes = 1 here "
            r"\(the first takes 0\.167 minutes\); lower finetune\.warmup_epochs, or give at least finetune\.minutes = ",
        ),
    ],
)
def test_fewer_epochs_than_a_field_needs_are_refused_with_the_minutes_that_would_do(
    schedule: Schedule, head_epochs: int, told: str, clock: Clock
) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        Training(clock).run(schedule, head_epochs)
    enough = float(str(refused.value).rsplit("= ", 1)[1])
    least = int(re.findall(r"at least (\d+) epochs", str(refused.value))[0])
    trained = Training(clock).run(schedule.replace(minutes=enough), head_epochs)
    assert trained.budget["epochs"] == least


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epochs": 3}, r"Schedule: give epochs or minutes, not both \(given: 3 and 1\)"),
        ({"minutes": None}, "Schedule: give epochs, or minutes"),
        ({"minutes": 0.0}, r"Schedule: minutes: .* greater than 0 \(given: 0.0\)"),
        ({"minutes": float("nan")}, r"Schedule: minutes: .* finite number \(given: nan\)"),
        ({"minutes": float("inf")}, r"Schedule: minutes: .* finite number \(given: inf\)"),
    ],
)
def test_a_schedule_has_epochs_or_minutes(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SCHEDULE.replace(**given)


# --- recipes ----------------------------------------------------------------------------------------------------------


def lengths(recipe: Recipe) -> tuple[int | None, float | None]:
    return recipe.pretrain.epochs, recipe.pretrain.minutes


def test_an_override_of_one_replaces_the_other(tmp_path: Path) -> None:
    assert lengths(tiny(tmp_path)) == (2, None)
    assert lengths(tiny(tmp_path, "pretrain.minutes=4")) == (None, 4.0)
    assert lengths(load_recipe("cifar10", ["pretrain.minutes=4"])) == (None, 4.0)
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny.toml"\nname = "mine"\n[pretrain]\nminutes = 3\n')
    assert lengths(load_recipe(str(file))) == (None, 3.0)
    assert lengths(load_recipe(str(file), ["pretrain.epochs=0"])) == (0, None)
    assert load_recipe(str(file)).finetune.epochs == 2
    above = tmp_path / "above.toml"
    above.write_text('base = "mine.toml"\nname = "above"\n[pretrain]\nepochs = 5\n')
    assert lengths(load_recipe(str(above))) == (5, None)


def test_both_at_once_neither_and_no_minutes_are_refused(tmp_path: Path) -> None:
    both = r"pretrain: give epochs or minutes, not both \(given: 2 and 4\)"
    with pytest.raises(ConfigError, match=both):
        tiny(tmp_path, "pretrain.minutes=4", "pretrain.epochs=2")
    with pytest.raises(ConfigError, match=both):
        tiny(tmp_path, "pretrain.epochs=2", "pretrain.minutes=4")
    file = tmp_path / "two.toml"
    file.write_text(TINY.replace("epochs = 2", "epochs = 2\nminutes = 4"))
    with pytest.raises(ConfigError, match=f"{both}.*finetune: give"):
        load_recipe(str(file))
    file.write_text(TINY.replace("epochs = 2\n", "", 1))
    with pytest.raises(ConfigError, match=r"pretrain: give epochs, or minutes$"):
        load_recipe(str(file))
    for minutes in ("0", "-1", "inf"):
        with pytest.raises(ConfigError, match=rf"finetune\.minutes: .*\(given: {minutes}"):
            tiny(tmp_path, f"finetune.minutes={minutes}")
    with pytest.raises(ConfigError, match=r"finetune\.epochs"):
        tiny(tmp_path, "finetune.epochs=0")


def test_head_epochs_are_held_against_epochs_alone(tmp_path: Path) -> None:
    late = ("finetune.head_epochs=2", 'finetune.mode="linear-then-full"')
    with pytest.raises(ConfigError, match="head_epochs = 2 must be fewer than epochs = 2"):
        tiny(tmp_path, *late)
    assert tiny(tmp_path, *late, "finetune.minutes=1").finetune.head_epochs == 2


# --- run folders ------------------------------------------------------------------------------------------------------


class Ticking(Clock):
    """A clock that is a little later every time it is looked at, so that a trial says the same on every machine."""

    def __init__(self, tick: float) -> None:
        super().__init__()
        self.tick = tick

    def __call__(self, _device: str) -> float:
        self.seconds += self.tick
        return self.seconds


def tick(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(budget, "clock", Ticking(seconds))


def killed_after(monkeypatch: pytest.MonkeyPatch, call: Call, epoch: int, *arguments: object) -> None:
    """Call ``rush`` and break it off when ``epoch`` is about to be kept."""
    finish = loop.TrainingRun._finish_epoch

    def interrupted(run: Any, number: int) -> None:
        if number == epoch:
            raise RunError("killed")
        finish(run, number)

    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingRun, "_finish_epoch", interrupted)
        assert "killed" in refusal(call(*arguments))


EPOCHS = 4


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
    return content


def test_the_same_command_resumes_with_the_number_and_other_minutes_are_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = write_tiny(tmp_path), tmp_path / "run"
    command = ("pretrain", recipe, "--out", run, "--set", "pretrain.minutes=0.7")
    tick(monkeypatch, 1.0)
    killed_after(monkeypatch, call, 2, *command)
    assert (written(run)["pretrain"]["epochs"], written(run)["pretrain"]["minutes"]) == (EPOCHS, None)
    record = json.loads((run / "provenance.json").read_text())["budgets"]
    assert (list(record), record["pretrain"]["minutes"], record["pretrain"]["epochs"]) == (["pretrain"], 0.7, EPOCHS)
    told = refusal(call(*command[:-1], "pretrain.minutes=0.6"))
    assert "was begun with pretrain.minutes = 0.7, which gave 4 epochs, and not with 0.6" in told
    assert "different values of pretrain.epochs" in refusal(call("pretrain", recipe, "--out", run))
    tick(monkeypatch, 1000.0)
    killed_after(monkeypatch, call, 3, *command)
    done = call("pretrain", run)
    assert done.returncode == 0, done.stderr
    assert "already finished, skipping" in call(*command).stderr
    assert "already finished, skipping" in call(*command[:-1], f"pretrain.epochs={EPOCHS}").stderr
    log = RunFolder.open(run)
    assert [event["epochs"] for event in log.events("budget", "pretrain")] == [EPOCHS]
    assert log.require("pretrain")["epochs"] == EPOCHS
    assert json.loads((run / "provenance.json").read_text())["budgets"] == record
    shown = call("info", run).stdout
    assert "finished, 4 epochs for 0.7 minutes" in shown


def test_a_recipe_that_a_run_leaves_repeats_it(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch, 1.0)
    recipe = write_tiny(tmp_path)
    minutes = ("--set", "pretrain.minutes=0.7", "--set", "finetune.minutes=0.7")
    assert call("pretrain", recipe, "--out", tmp_path / "run", *minutes).returncode == 0
    assert call("finetune", tmp_path / "run").returncode == 0
    again = tmp_path / "again"
    again.mkdir()
    (again / "recipe.json").write_bytes((tmp_path / "run/recipe.json").read_bytes())
    for command in ("pretrain", "finetune"):
        assert call(command, again).returncode == 0
    assert results_of_training(again) == results_of_training(tmp_path / "run")
    assert "budgets" not in json.loads((again / "provenance.json").read_text())
    other = json.loads((tmp_path / "run/provenance.json").read_text())["budgets"]
    assert {stage: own["epochs"] for stage, own in other.items()} == {"pretrain": EPOCHS, "finetune": EPOCHS}


def test_a_branch_has_a_budget_of_its_own(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch, 1.0)
    recipe, run, other = write_tiny(tmp_path), tmp_path / "run", tmp_path / "other"
    pretraining = ("--set", "pretrain.minutes=0.7")
    assert call("pretrain", recipe, "--out", run, *pretraining, "--set", "finetune.minutes=0.7").returncode == 0
    assert call("finetune", run).returncode == 0
    branch = ("finetune", run, "--out", other, *pretraining, "--set", "finetune.minutes=0.9")
    killed_after(monkeypatch, call, 2, *branch)
    tick(monkeypatch, 1000.0)
    done = call(*branch)
    assert done.returncode == 0, done.stderr
    assert "begun with finetune.minutes = 0.9" in refusal(call(*branch[:-1], "finetune.minutes=0.7"))
    budgets = json.loads((other / "provenance.json").read_text())["budgets"]
    record = {stage: own["epochs"] for stage, own in budgets.items()}
    assert record["pretrain"] == EPOCHS < record["finetune"]
    assert RunFolder.open(other).require("finetune")["epochs"] == record["finetune"]


def test_a_branch_of_a_run_that_was_fine_tuned_by_minutes_begins_without_them(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, "finetune.minutes=4"))
    run.record_provenance({"device": "cpu"}, {"test": {"fingerprint": "bb"}})
    run.finish("pretrain", seconds=1.0)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints/encoder.safetensors").write_bytes(b"weights")
    run.settle("finetune", {"minutes": 4.0, "epochs": 9})
    other = run.branch(tmp_path / "other", tiny(tmp_path, "finetune.minutes=4", "finetune.label_fraction=0.1"))
    assert (other.budget("finetune"), other.recipe.finetune.minutes) == (None, 4.0)
    kept = json.loads((other.path / "provenance.json").read_text())
    assert kept == {
        key: value for key, value in json.loads((run.path / "provenance.json").read_text()).items() if key != "budgets"
    }


def settled(folder: Path, *overrides: str, minutes: float = 4.0, epochs: int = 9) -> RunFolder:
    run = RunFolder.create(folder / "run", tiny(folder, f"pretrain.minutes={minutes}", *overrides))
    run.record_provenance({"device": "cpu"}, {"test": {"fingerprint": "bb"}})
    run.settle("pretrain", {"minutes": minutes, "epochs": epochs})
    return run


def test_a_kill_between_the_two_records_loses_nothing(tmp_path: Path) -> None:
    run = settled(tmp_path)
    (run.path / "recipe.json").write_text(tiny(tmp_path, "pretrain.minutes=4").to_json())
    assert lengths(RunFolder.open(run.path).recipe) == (9, None)
    assert lengths(RunFolder.create(run.path, tiny(tmp_path, "pretrain.minutes=4")).recipe) == (9, None)
    assert written(run.path)["pretrain"]["epochs"] == 9


def test_a_stage_with_a_number_of_epochs_has_begun(tmp_path: Path) -> None:
    """Nothing that the number depends on may change behind it."""
    settled(tmp_path)
    with pytest.raises(
        RunError, match=r"already holds stage pretrain made with different values of pretrain\.batch_size"
    ):
        RunFolder.create(tmp_path / "run", tiny(tmp_path, "pretrain.minutes=4", "pretrain.batch_size=64"))


def test_the_fingerprint_of_a_checkpoint_stays_when_the_number_is_known(tmp_path: Path) -> None:
    before = RunFolder.create(tmp_path / "run", tiny(tmp_path, "pretrain.minutes=4"))
    known = before.fingerprint("pretrain")
    run = settled(tmp_path)
    assert run.fingerprint("pretrain") == RunFolder.open(run.path).fingerprint("pretrain") == known
    assert run.fingerprint("finetune") == RunFolder(tmp_path / "none", tiny(tmp_path, "pretrain.epochs=9")).fingerprint(
        "finetune"
    )
    assert '"minutes"' not in run.fingerprint("finetune")


def test_a_record_of_images_keeps_the_budgets(tmp_path: Path) -> None:
    run = settled(tmp_path)
    run.record_provenance({"device": "cpu"}, {"train": {"fingerprint": "aa"}})
    assert run.budget("pretrain") == {"minutes": 4.0, "epochs": 9}


@pytest.mark.parametrize("damaged", ["[]", '{"pretrain": 3}', '{"pretrain": {"minutes": 4.0, "epochs": "many"}}'])
def test_damaged_budgets_are_refused_by_the_name_of_their_file(damaged: str, tmp_path: Path) -> None:
    run = settled(tmp_path)
    (run.path / "provenance.json").write_text(f'{{"budgets": {damaged}}}')
    with pytest.raises(RunError, match=r"provenance\.json: its budgets are damaged"):
        RunFolder.create(run.path, tiny(tmp_path, "pretrain.minutes=4"))


@pytest.mark.parametrize(
    ("stage", "overrides", "field"),
    [
        (
            "pretrain",
            ('pretrain.noise.views="both"', "pretrain.noise.ramp_epochs=20"),
            "pretrain.noise.ramp_epochs = 20",
        ),
        ("finetune", ('finetune.objective="smoothadv"',), "finetune.smoothadv.warmup_epochs = 10"),
    ],
)
def test_a_ramp_of_more_epochs_than_fit_is_refused_before_anything_is_recorded(
    stage: str, overrides: tuple[str, ...], field: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick(monkeypatch, 1.0)
    recipe, run = write_tiny(tmp_path), tmp_path / "run"
    given = [word for override in (f"{stage}.minutes=0.5", *overrides) for word in ("--set", override)]
    if stage == "finetune":
        assert call("pretrain", recipe, "--out", run, "--set", "pretrain.epochs=0").returncode == 0
        recipe = run
    told = refusal(call(stage, recipe, *(("--out", run) if stage == "pretrain" else ()), *given))
    assert f"{field} needs at least" in told
    assert "budgets" not in json.loads((run / "provenance.json").read_text())
    assert not (run / f"checkpoints/{stage}.pt").exists()


# --- cost -------------------------------------------------------------------------------------------------------------


def logged(seconds: float) -> Callable[..., None]:
    """A training that does nothing but log a warm-up and a measured epoch of so many seconds."""

    def trained(*arguments: Any, **_: object) -> None:
        log = arguments[-1].log
        for taken in (900.0, seconds):
            log("epoch", seconds=taken, passes=64, forward_passes=0, peak_memory=None, joules=None)

    return trained


def test_the_cost_of_minutes_is_the_epochs_whose_steps_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second a step, ten steps an epoch: eleven epochs in 57 s."""
    monkeypatch.setattr(costing, "pretrain", logged(2.0))
    monkeypatch.setattr(costing, "finetune", logged(2.0))
    pretraining, finetuning = cost_of(tiny(tmp_path, "pretrain.minutes=1"), steps=4).stages
    assert (pretraining.epochs, pretraining.steps, pretraining.seconds) == (11, 110, 55.0)
    assert (finetuning.epochs, finetuning.steps) == (2, 20)
    with pytest.raises(ConfigError, match=r"pretrain\.minutes = 0\.05 is too little: one epoch takes 0\.0833 minutes"):
        cost_of(tiny(tmp_path, "pretrain.minutes=0.05"), steps=4)
    with pytest.raises(ConfigError, match=r"pretrain\.warmup_epochs = 20 needs at least 21 epochs, and 11 end within"):
        cost_of(tiny(tmp_path, "pretrain.minutes=1", "pretrain.warmup_epochs=20"), steps=4)


# --- several processes ------------------------------------------------------------------------------------------------


def trained_on_ranks(folder: str) -> dict[str, Any]:
    """Process 1 is slower than process 0, which alone saves and measures."""
    clock = Clock()
    budget.clock = clock
    training = Training(clock, kept(Path(folder)), seconds=0.2 * (1 + rank()))
    training.run(monitor=lambda _: clock.pass_by(4.0) or {})
    return {
        "epochs": training.budget["epochs"],
        "steps": training.steps,
        "weights": {name: own.detach() for name, own in training.module.named_parameters()},
    }


def test_several_processes_agree_on_the_number_of_the_slowest(processes: ForkServerContext, tmp_path: Path) -> None:
    """5.4 s of trial in the first process leave 51.6 s for epochs of 2 s in the second and 4 s of live figures."""
    first, second = on_ranks(processes, partial(trained_on_ranks, str(tmp_path)), 2, tmp_path)
    assert first["epochs"] == second["epochs"] == 8
    assert first["steps"] == second["steps"]
    assert all(torch.equal(first["weights"][name], own) for name, own in second["weights"].items())


def test_a_capture_is_over_before_the_first_step_whose_time_counts() -> None:
    """``_seconds_per_step`` counts from the last step of the warm-up."""
    assert graphs.WARM_UP + 1 <= budget.WARMUP_STEPS - 1
