"""A captured step gives the bits of the plain one: what changes from step to step reaches it through static memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rush.training.graphs
import rush.training.loop
from recording import Operations
from rush.choices import OptimizerName
from rush.data.batches import Batch
from rush.errors import ConfigError
from rush.recipe.load import load_recipe
from rush.runtime.randomness import restarted, stream
from rush.runtime.schedules import scheduled
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.graphs import WARM_UP, CapturedStep
from rush.training.loop import CheckpointPolicy
from tiny import results_of_training, run_tiny, tiny
from trainings import ALWAYS, NEVER, SCHEDULE, BreakingCheckpoint, Training, images


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Operations]:
    """Captures keep operations, and optimizers are the fused ones, which take their learning rate from a tensor."""
    made: list[Operations] = []

    def recorder() -> Operations:
        made.append(Operations())
        return made[-1]

    def fused(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    build = rush.training.loop.build_optimizer
    monkeypatch.setattr(rush.training.graphs, "_Rerun", recorder)
    monkeypatch.setattr(rush.training.loop, "build_optimizer", fused)
    return made


VARIANTS = [
    ("pretrain.noise.views=both", "pretrain.noise.ramp_epochs=2", "pretrain.ema_decay=0.9", "pretrain.warmup_epochs=1"),
    ("pretrain.micro_batch=50", "finetune.objective=standard", "finetune.mode=linear", "finetune.ema_decay=0.9"),
    ("pretrain.objective=moco", "pretrain.queue=512", "finetune.objective=consistency", "finetune.optimizer=adamw"),
    ("pretrain.objective=acl", "finetune.objective=cat-rs"),
    ("pretrain.epochs=0", "finetune.objective=smoothadv", "finetune.smoothadv.steps=2"),
    ("pretrain.epochs=0", "finetune.objective=trades", "finetune.adversary.steps=2"),
    ("pretrain.epochs=0", "finetune.objective=pgd-at", "finetune.adversary.steps=2", "execution.precision=bfloat16"),
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: " ".join(overrides))
def test_every_training_is_repeated_by_its_operations_alone(
    overrides: tuple[str, ...], recorded: list[Operations], tmp_path: Path
) -> None:
    """10 steps an epoch, of which all but the first two are replayed."""
    found = []
    for mode in ("none", "graph"):
        changes = (*overrides, f"execution.compile_training={mode}", "finetune.smoothadv.warmup_epochs=2")
        run = run_tiny(tmp_path / mode, *changes, stages=("pretrain", "finetune"))
        epochs = [*run.events("epoch", "pretrain"), *run.events("epoch", "finetune")]
        found.append((results_of_training(run.path), [event["loss"] for event in epochs]))
    assert found[1] == found[0]
    trainings = 1 if "pretrain.epochs=0" in overrides else 2
    assert [own.replayed for own in recorded if own.replayed] == [18] * trainings


class Small(Training):
    """A training with a number that follows the epoch, captured or not. ``calls`` counts those of its step."""

    def __init__(
        self,
        captured: bool,
        optimizer: OptimizerName = "sgd",
        checkpoints: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008, a frozen value
    ) -> None:
        super().__init__(checkpoints)
        self.calls = 0
        self.run(SCHEDULE.replace(optimizer=optimizer), captured=captured)

    def step(self, batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        self.calls += 1
        loss = self.loss(batch, generator, scheduled(lambda now: 0.1 * now, epoch))
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_training_has_the_bits_losses_and_costs_of_the_plain_one(optimizer: OptimizerName) -> None:
    plain, captured = Small(False, optimizer), Small(True, optimizer)
    assert captured.bits == plain.bits
    assert captured.epochs == plain.epochs
    assert (plain.calls, captured.calls) == (15, 3)  # two plain steps, and the capture


@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_a_captured_training_that_was_broken_off_ends_with_the_same_bits(number: int, tmp_path: Path) -> None:
    undisturbed = Small(False, "adamw")
    with pytest.raises(KeyboardInterrupt):
        Small(True, "adamw", CheckpointPolicy(BreakingCheckpoint(tmp_path / "state.pt", number), ALWAYS))
    content = (tmp_path / "state.pt").read_bytes()
    for captured in (True, False):  # a checkpoint is taken up by either
        checkpoint = TrainingCheckpoint(tmp_path / "state.pt", "recipe")
        state = checkpoint.load()
        assert state is not None
        assert isinstance(state["optimizer"]["param_groups"][0]["lr"], float)
        assert Small(captured, "adamw", CheckpointPolicy(checkpoint, NEVER)).bits == undisturbed.bits
        (tmp_path / "state.pt").write_bytes(content)


def test_a_capture_is_made_anew_after_a_return_to_a_checkpoint(tmp_path: Path) -> None:
    """The state of the optimizer lies elsewhere then."""
    marks = [batch.images.sum() for epoch in range(3) for batch in batches_of(epoch)]
    assert sum(int(mark == marks[8]) for mark in marks) == 1  # by its sum a batch is known

    class Spoiled(Small):
        def step(self, batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
            loss = super().step(batch, epoch, generator)
            return torch.where(batch.images.sum() == marks[8], torch.nan, loss)

    found = []
    for captured in (False, True):
        checkpoints = CheckpointPolicy(TrainingCheckpoint(tmp_path / f"{captured}.pt", "recipe"), NEVER, "skip")
        training = Spoiled(captured, checkpoints=checkpoints)
        assert [own["batch"] for own in training.logged("skipped")] == [3]
        found.append(training.bits)
    assert found[0] == found[1]


def batches_of(epoch: int) -> Iterator[Batch]:
    return images().batches(stream(0, "pretrain", "order", epoch), 8)


def captured_step(step: Callable[[Batch, float, torch.Generator], Tensor]) -> Callable[[int], Tensor]:
    own = CapturedStep(step, "cpu")

    def take(number: int) -> Tensor:
        batch = Batch(torch.full((2, 1, 1, 1), number, dtype=torch.uint8), torch.full((2,), number))
        return own(batch, float(number), lambda generator: restarted(generator, 0, "step", number)).clone()

    return take


def test_batch_generator_and_epoch_of_a_step_are_those_that_it_is_given() -> None:
    def step(batch: Batch, epoch: float, generator: torch.Generator) -> Tensor:
        assert batch.labels is not None
        numbers = [batch.images.double().mean(), batch.labels.double().mean()]
        numbers.append(scheduled(lambda now: now**2, epoch) * torch.ones((), dtype=torch.float64))
        return torch.stack([*numbers, torch.rand((), generator=generator, dtype=torch.float64)])

    take = captured_step(step)
    for number in range(8):
        drawn = torch.rand((), generator=stream(0, "step", number), dtype=torch.float64)
        assert take(number).tolist() == [number, number, number**2, drawn.item()]


@pytest.mark.parametrize(
    "use",
    [
        lambda epoch: epoch < 3,
        lambda epoch: epoch >= 3,
        lambda epoch: min(1.0, epoch / 2),
        lambda epoch: 0.1 * epoch,
        lambda epoch: round(epoch),
        float,
        int,
        bool,
    ],
)
def test_a_step_that_decides_by_the_epoch_is_refused(use: Callable[[float], object]) -> None:
    def step(_batch: Batch, epoch: float, _generator: torch.Generator) -> Tensor:
        use(epoch)
        return torch.zeros(())

    told = 'depend on the epoch, .*; set execution.compile_training = "none", or obtain the number from .*schedules'
    with pytest.raises(ConfigError, match=told):
        captured_step(step)(0)


def test_a_step_that_reads_a_value_is_refused_with_what_torch_says() -> None:
    take = captured_step(lambda batch, _epoch, _generator: torch.zeros(()) + batch.images.sum().item())
    for number in range(WARM_UP):
        take(number)
    told = r"cannot be captured as a CUDA graph \(RuntimeError: .*a value is read\); set execution\.compile_training"
    with pytest.raises(ConfigError, match=told):
        take(WARM_UP)


def test_batches_of_another_size_and_new_numbers_are_refused() -> None:
    own = CapturedStep(lambda batch, *_: batch.images.double().sum(), "cpu")
    own(Batch(torch.zeros(2, 1, 1, 1), None), 0.0, lambda _: None)
    with pytest.raises(ConfigError, match=r"takes batches of shape \(2, 1, 1, 1\), got \(3, 1, 1, 1\)"):
        own(Batch(torch.zeros(3, 1, 1, 1), None), 0.0, lambda _: None)
    asked = iter(range(100))
    take = captured_step(
        lambda _batch, epoch, _generator: sum(
            (scheduled(lambda now: now, epoch) * torch.ones(()) for _ in range(next(asked))), torch.zeros(())
        )
    )
    for number in range(WARM_UP):
        take(number)
    with pytest.raises(ConfigError, match="requests different numbers than before"):
        take(WARM_UP)


def test_a_capture_that_fails_leaves_the_optimizer_as_it_was() -> None:
    told: list[bool] = []

    class Failing(Operations):
        def record(self, _: Callable[[], Tensor]) -> None:
            raise RuntimeError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rush.training.graphs, "_Rerun", Failing)
        own = CapturedStep(lambda *_: torch.zeros(()), "cpu", told.append)
        for _ in range(WARM_UP):
            own(Batch(torch.zeros(2, 1, 1, 1), None), 0.0, lambda _: None)
        with pytest.raises(ConfigError, match="cannot be captured"):
            own(Batch(torch.zeros(2, 1, 1, 1), None), 0.0, lambda _: None)
    assert told == [True, False]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rush.training.loop, "world_size", lambda: 2)
    told = "pretrain: a step of 2 processes cannot be captured as a CUDA graph; set execution.compile_training"
    with pytest.raises(ConfigError, match=told):
        Small(True)


def test_lars_is_refused() -> None:
    with pytest.raises(ConfigError, match="a step with the optimizer lars cannot be captured"):
        Small(True, "lars")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pretrain.optimizer=lars", r"pretrain\.optimizer = lars"),
        ("finetune.optimizer=lars", r"finetune\.optimizer = lars"),
        ("finetune.mode=linear-then-full", r"finetune\.mode = linear-then-full"),
    ],
)
def test_recipes_whose_steps_cannot_be_captured_are_refused(override: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"graph captures one kind of step, which {named} does not have"):
        tiny(tmp_path, "execution.compile_training=graph", override)
    tiny(tmp_path, "execution.compile_training=graph", "pretrain.optimizer=lars", "pretrain.epochs=0")
    assert load_recipe("digits").execution.compile_training == "none"
