"""A training that is killed, stopped, or meets a loss that is not finite loses nothing and ends with the same bits."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush.training.budget
from ranks import on_ranks
from rush.choices import OptimizerName
from rush.errors import CheckpointError, ConfigError, DeviceMemoryError, Interrupted, RushError
from rush.runtime.distributed import rank
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import CheckpointPolicy
from trainings import ALWAYS, NEVER, PER_EPOCH, SCHEDULE, BreakingCheckpoint, Clock, Disturb, Training, kept

STEPS = 3 * PER_EPOCH


@pytest.fixture(scope="module")
def undisturbed() -> Training:
    return Training().run()


def failing_at(number: int, error: BaseException | type[BaseException] = KeyboardInterrupt) -> Disturb:
    def disturb(step: int, loss: Tensor) -> Tensor:
        if step == number:
            raise error
        return loss

    return disturb


def asking_to_stop_at(number: int) -> Disturb:
    def disturb(step: int, loss: Tensor) -> Tensor:
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    return disturb


@pytest.mark.parametrize(("minutes", "first"), [(ALWAYS, (1, 5, 8, 14)), (NEVER, (0, 5, 5, 10))])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_broken_off_goes_on_behind_its_last_checkpoint_and_ends_with_the_same_bits(
    optimizer: OptimizerName, minutes: float, first: tuple[int, ...], tmp_path: Path
) -> None:
    """A checkpoint comes by time, after every step here or never, and at the end of every epoch."""
    schedule = SCHEDULE.replace(optimizer=optimizer)
    undisturbed = Training().run(schedule)
    for number, resumed_at in zip((1, 5, 8, 14), first, strict=True):
        (tmp_path / str(number)).mkdir()
        checkpoints = kept(tmp_path / str(number), minutes)
        with pytest.raises(KeyboardInterrupt):
            Training(checkpoints, failing_at(number)).run(schedule)
        resumed = Training(checkpoints).run(schedule)
        assert resumed.steps == list(range(resumed_at, STEPS))
        assert resumed.bits == undisturbed.bits
        # the epoch that was broken off is logged with all its losses and passes
        assert resumed.epochs == undisturbed.epochs[number // PER_EPOCH :]
    assert Training().run(schedule, seed=1).bits != undisturbed.bits


def test_a_finished_training_takes_no_further_step(undisturbed: Training, tmp_path: Path) -> None:
    Training(kept(tmp_path)).run()
    again = Training(kept(tmp_path)).run()
    assert again.steps == []
    assert again.bits == undisturbed.bits


def test_a_stop_asked_for_by_a_signal_is_answered_with_a_checkpoint(undisturbed: Training, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = r"pretrain: stopped by SIGTERM after 8 of 15 steps; saved in .*state\.pt; run the same command again"
    with pytest.raises(Interrupted, match=told) as stopped:
        Training(kept(tmp_path), asking_to_stop_at(7)).run()
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = Training(kept(tmp_path)).run()
    assert resumed.steps == list(range(8, STEPS))
    assert resumed.bits == undisturbed.bits


@pytest.mark.parametrize("number", [4, 14])
def test_a_stop_in_the_last_step_of_an_epoch_is_answered_after_its_log(
    number: int, undisturbed: Training, tmp_path: Path
) -> None:
    stopped = Training(kept(tmp_path), asking_to_stop_at(number))
    with pytest.raises(Interrupted, match=f"after {number + 1} of 15 steps"):
        stopped.run()
    resumed = Training(kept(tmp_path)).run()
    assert resumed.steps == list(range(number + 1, STEPS))
    assert stopped.epochs + resumed.epochs == undisturbed.epochs
    assert resumed.bits == undisturbed.bits


def test_wherever_a_training_is_broken_off_behind_a_checkpoint_no_epoch_goes_unlogged(
    undisturbed: Training, tmp_path: Path
) -> None:
    for saves in range(1, STEPS + 1):
        checkpoint = BreakingCheckpoint(tmp_path / f"{saves}.pt", saves)
        broken = Training(CheckpointPolicy(checkpoint, ALWAYS))
        with pytest.raises(KeyboardInterrupt):
            broken.run()
        resumed = Training(CheckpointPolicy(checkpoint, ALWAYS)).run()
        assert [*broken.steps, *resumed.steps] == list(range(STEPS)), saves
        assert broken.epochs + resumed.epochs == undisturbed.epochs, saves


def test_twenty_kills_at_random_moments_leave_the_final_bits_unchanged(undisturbed: Training, tmp_path: Path) -> None:
    """Children that are killed outright; the moments are random, what must come out is not."""

    def slow(_step: int, loss: Tensor) -> Tensor:
        time.sleep(0.02)
        return loss

    checkpoints, moments = kept(tmp_path, ALWAYS), np.random.default_rng(0).uniform(0.0, 0.12, 20)
    survived = 0
    for moment in moments:
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                Training(checkpoints, slow).run()
            os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        survived += os.WIFEXITED(status)
    last = Training(checkpoints).run()
    assert last.bits == undisturbed.bits
    assert survived < 20, "every child had finished before it was killed"
    assert not [
        path for path in tmp_path.iterdir() if path.name not in ("state.pt", "state.previous.pt", ".state.pt.partial")
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little. More advice."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_step_without_memory_names_what_to_lower_and_loses_nothing(
    error: Exception, undisturbed: Training, tmp_path: Path
) -> None:
    with pytest.raises(DeviceMemoryError) as told:
        Training(kept(tmp_path, ALWAYS), failing_at(8, error)).run()
    said = str(told.value)
    assert said.startswith("pretrain, step 9: there is not enough memory (")
    assert "Lower pretrain.batch_size or, with the objective simclr, set pretrain.micro_batch" in said
    assert str(error).split(". ")[0] in said
    assert "advice" not in said
    resumed = Training(kept(tmp_path, ALWAYS)).run()
    assert resumed.steps == list(range(8, STEPS))
    assert resumed.bits == undisturbed.bits


def test_other_errors_of_a_step_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Training(kept(tmp_path, ALWAYS), failing_at(0, RuntimeError("shapes do not fit"))).run()


def spoiling(bad: float, *numbers: int, gradient: bool = False) -> Disturb:
    """Loss, or gradient alone, that is not finite at these steps."""

    def disturb(step: int, loss: Tensor) -> Tensor:
        if step not in numbers:
            return loss
        # sqrt has an infinite slope at 0: its value is finite, what goes back is not
        return loss + (loss - loss).abs().sqrt() if gradient else loss * bad

    return disturb


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_training_and_keeps_the_last_good_checkpoint(
    bad: float, gradient: bool, undisturbed: Training, tmp_path: Path
) -> None:
    broken = Training(kept(tmp_path, ALWAYS), spoiling(bad, 8, gradient=gradient))
    told = (
        r"pretrain: loss or gradient is not finite from batch 3 of epoch 2 on; .*kept\. Lower pretrain\.learning_rate"
    )
    with pytest.raises(RushError, match=told):
        broken.run()
    assert [number for number, *_ in broken.epochs] == [1]
    resumed = Training(kept(tmp_path, ALWAYS)).run()
    assert resumed.steps == list(range(8, STEPS))
    assert resumed.bits == undisturbed.bits


def checkpointed(training: Training) -> int:
    """Return the number of steps in the checkpoint of ``training``."""
    assert training.checkpoints.checkpoint is not None
    state = training.checkpoints.checkpoint.load()
    assert state is not None
    return int(state["number"])


def test_a_long_epoch_is_looked_at_on_the_way_and_no_checkpoint_holds_what_was_not_found_finite(
    tmp_path: Path,
) -> None:
    """Step 40 is seen at step 96: losses are sent to the host every 32 steps and read 32 steps later."""
    broken = Training(kept(tmp_path, ALWAYS), spoiling(float("nan"), 40), per_epoch=200)
    with pytest.raises(RushError, match="not finite from batch 40 of epoch 1 on"):
        broken.run()
    assert broken.steps == list(range(96))
    assert checkpointed(broken) == 40
    resumed = Training(kept(tmp_path, ALWAYS), per_epoch=200).run()
    assert resumed.steps == list(range(40, 600))
    assert resumed.bits == Training(per_epoch=200).run().bits


def test_what_was_seen_late_is_named_right_behind_batches_that_were_skipped(tmp_path: Path) -> None:
    faulty = Training(kept(tmp_path, on_nonfinite="skip"), spoiling(float("inf"), 3, 50), per_epoch=200).run()
    assert [own["batch"] for own in faulty.logged("skipped")] == [3, 50]
    # seen at step 64 and, without step 3, at step 96
    assert faulty.steps[:159] == [*range(64), *range(3), *range(4, 96)]


def test_a_stop_behind_a_step_that_was_not_finite_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    def both(step: int, loss: Tensor) -> Tensor:
        return asking_to_stop_at(42)(step, spoiling(float("nan"), 40)(step, loss))

    broken = Training(kept(tmp_path, ALWAYS), both, per_epoch=200)
    with pytest.raises(RushError, match="not finite from batch 40 of epoch 1 on"):
        broken.run()
    assert broken.steps == list(range(43))
    assert checkpointed(broken) == 40


def stopped_in_one_process() -> list[int]:
    """A training whose second process is asked to stop in step 40; the steps that this process took."""

    training = Training(disturb=asking_to_stop_at(40 if rank() == 1 else -1), per_epoch=200)
    with pytest.raises(Interrupted, match="after 96 of 600 steps"):
        training.run()
    return training.steps


def test_all_processes_stop_after_the_same_step(processes: ForkServerContext, tmp_path: Path) -> None:
    assert on_ranks(processes, stopped_in_one_process, 2, tmp_path) == [list(range(96))] * 2


def test_batches_that_are_not_finite_are_skipped_on_wish(tmp_path: Path) -> None:
    """The same as if these steps did not exist: the trainer without the fault takes all other steps alike."""
    (tmp_path / "faulty").mkdir()
    faulty = Training(kept(tmp_path / "faulty", on_nonfinite="skip"), spoiling(float("nan"), 3, 8)).run()
    told = [(own["epoch"], own["batch"]) for own in faulty.logged("skipped")]
    assert told == [(1, 3), (2, 3)]
    assert faulty.steps == [0, 1, 2, 3, 4, 0, 1, 2, 4, 5, 6, 7, 8, 9, 5, 6, 7, 9, *range(10, STEPS)]
    assert all(np.isfinite(loss) for _, loss, *_ in faulty.epochs)
    # broken off later, it resumes with the list of what it left out
    (tmp_path / "broken").mkdir()

    def both(step: int, loss: Tensor) -> Tensor:
        return failing_at(12)(step, spoiling(float("nan"), 3, 8)(step, loss))

    with pytest.raises(KeyboardInterrupt):
        Training(kept(tmp_path / "broken", on_nonfinite="skip"), both).run()
    assert Training(kept(tmp_path / "broken", on_nonfinite="skip")).run().bits == faulty.bits


def test_skipping_has_an_end(tmp_path: Path) -> None:
    always = spoiling(float("nan"), *range(STEPS))
    endless = Training(kept(tmp_path, on_nonfinite="skip"), always)
    with pytest.raises(RushError, match=r"not finite from batch 0 of epoch 3 on, after 10 batches that were skipped"):
        endless.run()


def test_skipping_needs_a_checkpoint_to_return_to() -> None:
    with pytest.raises(ConfigError, match="give a checkpoint"):
        CheckpointPolicy(on_nonfinite="skip")


@pytest.mark.parametrize("changed", [{"module": nn.Linear(6, 3).state_dict()}, {"optimizer": {}}, {"average": {}}])
def test_a_checkpoint_of_another_network_is_refused_and_kept(changed: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
    Training(CheckpointPolicy(checkpoint)).run()
    state = checkpoint.load()
    assert state is not None
    checkpoint.save({**state, **changed})
    content = checkpoint.path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Training(CheckpointPolicy(checkpoint)).run()
    assert checkpoint.path.read_bytes() == content


def test_the_checkpoint_of_another_recipe_stops_the_training_before_its_first_step(tmp_path: Path) -> None:
    Training(kept(tmp_path)).run()
    other = Training(CheckpointPolicy(TrainingCheckpoint(tmp_path / "state.pt", "another")))
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        other.run()
    assert other.steps == []


def test_the_average_of_the_weights_comes_out(undisturbed: Training) -> None:
    plain = Training()
    weights: list[Tensor] = []

    def remember(_module: nn.Module, _given: object) -> None:
        weights.append(plain.module[0].weight.detach().clone())

    plain.module.register_forward_pre_hook(remember)
    plain.run(SCHEDULE.replace(ema_decay=0.0))
    weights.append(plain.module[0].weight.detach().clone())
    average = weights[0].double()
    for done, now in enumerate(weights[1:]):
        decay = min(0.9, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * now
    averaged = np.frombuffer(undisturbed.bits["0.weight"], np.float32).reshape(8, 6)
    np.testing.assert_allclose(averaged, average.numpy(), atol=1e-6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child must not wait for threads that it does not have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- how often --------------------------------------------------------------------------------------------------------


class SlowCheckpoint(TrainingCheckpoint):
    """Takes ``seconds`` of a clock to write; ``saved`` are the steps that were done at each time."""

    def __init__(self, path: Path, clock: Clock, seconds: float) -> None:
        super().__init__(path, "own")
        self.clock, self.seconds = clock, seconds
        self.saved: list[int] = []

    def save(self, state: dict[str, Any]) -> None:
        self.clock.pass_by(self.seconds)
        self.saved.append(state["number"])
        super().save(state)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.1, list(range(5, 65, 5))),  # written soon: at every epoch's end, although it is 10 % of the time
        (0.5, [5, 15, 25, 35, 45, 55, 60]),  # 0.5 s in 10 s, which are two epochs; and the last
        (2.0, [5, 45, 60]),  # 2 s in 40 s, which are eight
    ],
)
def test_a_checkpoint_that_takes_long_is_not_written_at_every_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[int]
) -> None:
    clock = Clock()
    monkeypatch.setattr(rush.training.budget, "clock", clock)
    checkpoint = SlowCheckpoint(tmp_path / "pretrain.pt", clock, seconds)

    def one_second(_number: int, loss: Tensor) -> Tensor:
        clock.pass_by(1.0)
        return loss

    training = Training(CheckpointPolicy(checkpoint, minutes=NEVER), one_second)
    training.run(SCHEDULE.replace(epochs=12))
    assert checkpoint.saved == expected
