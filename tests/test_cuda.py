"""What holds on a CUDA device, and on the CPU by the same code: every test is made for both.

Where torch sees no CUDA device, its half of them is skipped. ``make test`` runs both halves where there is one, but for
the longest on the CPU, which are among the slow tests.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commands import TWO_PROCESSES, rush
from rush.attacks.gradient import fresh_noise
from rush.attacks.pgd import pgd
from rush.attacks.threat import ThreatModel
from rush.choices import CompileMode, Precision, Stage
from rush.data.sources import load_images
from rush.errors import DeviceMemoryError
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.runtime.transfer import HostCopy, sent
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.discrete import DiscreteGaussian
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import TrainingRun
from test_discrete import chi_square
from test_graphs import VARIANTS
from tiny import differing, results, results_of_training, run_tiny, tiny, write_tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SELDOM = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]
EACH = [
    pytest.param("cpu", VARIANTS[0], marks=pytest.mark.slow),  # whole runs, which other files hold on the CPU
    *(pytest.param("cuda", variant, marks=pytest.mark.cuda) for variant in VARIANTS),
]
MODES: tuple[CompileMode, ...] = ("none", "reduce-overhead")
TRAININGS: tuple[Stage, ...] = ("pretrain", "finetune")


def on(device: str, *overrides: str) -> tuple[str, ...]:
    """The overrides of the tiny recipe for ``device``, in the precision that it would take."""
    precision = "auto" if device == "cuda" else "float32"
    return (f"execution.device={device}", f"execution.precision={precision}", *overrides)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_few_votes_on_the_same_noise_differ_from_those_of_float32_on_the_cpu(
    device: str, precision: Precision, digits_network: nn.Module
) -> None:
    """Of 51,200 votes 0.36 % change between bfloat16 and float32, 0.06 % with another form of one.

    Source: docs/results-earlier.md.
    """
    x = load_images("digits", "test")[:200].pixels()
    noise = 0.25 * torch.randn((50, *x.shape), generator=stream(0, "noise"))
    reference = votes(Execution(), digits_network, x + noise)
    execution = Execution(device, precision, channels_last=device == "cuda").configure()
    try:
        differing = votes(execution, execution.place(digits_network), x + noise) != reference
    finally:
        Execution().place(digits_network)
    assert differing.double().mean() <= (0.0036 if precision == "bfloat16" else 0.0006)


def votes(execution: Execution, network: nn.Module, noisy: Tensor) -> Tensor:
    """Classes (draws x images) of the noisy images (draws, images, C, H, W), on the CPU."""
    return execution.tiled_logits(network, noisy.flatten(0, 1)).argmax(1).cpu()


@pytest.mark.parametrize("device", SELDOM)
def test_the_same_seed_gives_the_same_bits(device: str, tmp_path: Path) -> None:
    """Of pre-training, fine-tuning, certification, attacks and audit."""
    first, again = (results(run_tiny(tmp_path / name, *on(device)).path) for name in ("first", "again"))
    assert differing(first, again) == []
    other = results_of_training(run_tiny(tmp_path / "other", *on(device, "seed=1"), stages=TRAININGS).path)
    assert set(other) <= set(differing(first, other))


@pytest.mark.parametrize(("device", "overrides"), EACH)
def test_captured_steps_give_the_bits_and_losses_of_plain_ones(
    device: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    plain, captured = (
        trained(tmp_path / mode, *on(device, *overrides, f"execution.compile_training={mode}"))
        for mode in ("none", "graph")
    )
    assert captured == plain


def trained(folder: Path, *overrides: str) -> tuple[dict[str, object], list[tuple[float, int]]]:
    """Weights of both trainings of the tiny recipe, loss and passes of every epoch."""
    run = run_tiny(folder, *overrides, stages=TRAININGS)
    epochs = [event for stage in TRAININGS for event in run.events("epoch", stage)]
    return results_of_training(run.path), [(event["loss"], event["passes"]) for event in epochs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["none", "graph"])
@pytest.mark.parametrize("saves", [2, 7])
def test_a_training_that_was_broken_off_ends_with_the_same_bits(
    device: str, mode: str, saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = on(device, f"execution.compile_training={mode}", "finetune.optimizer=adamw", "pretrain.ema_decay=0.9")
    undisturbed = trained(tmp_path / "undisturbed", *overrides)
    run = RunFolder.create(tmp_path / "broken", tiny(tmp_path, *overrides, "execution.checkpoint_minutes=1e-9"))
    for stage in TRAININGS:
        with monkeypatch.context() as patch:
            patch.setattr(TrainingCheckpoint, "save", broken_off_after(saves))
            with pytest.raises(KeyboardInterrupt):
                run_stage(run, stage)
        run_stage(run, stage)
    assert results_of_training(run.path) == undisturbed[0]


def broken_off_after(saves: int) -> Any:
    usual, made = TrainingCheckpoint.save, iter(range(1, saves + 1))

    def save(self: TrainingCheckpoint, state: dict[str, Any]) -> None:
        usual(self, state)
        if next(made) == saves:
            raise KeyboardInterrupt

    return save


@pytest.mark.parametrize(("device", "overrides"), EACH)
@pytest.mark.parametrize("mode", ["none", "graph"])
def test_no_step_waits_for_the_device(
    device: str, overrides: tuple[str, ...], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first steps, in which libraries are loaded and a graph is captured."""
    usual, watched = TrainingRun._one_step, []

    def one_step(run: TrainingRun, *arguments: Any) -> None:
        if run.number < 5:
            usual(run, *arguments)
            return
        watched.append(run.number)
        with waiting_is_an_error(device):
            usual(run, *arguments)

    monkeypatch.setattr(TrainingRun, "_one_step", one_step)
    changes = on(device, *overrides, f"execution.compile_training={mode}")
    run_tiny(tmp_path, *changes, stages=TRAININGS)
    assert len(watched) >= 15


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """Within the context, torch refuses to wait for the CUDA device."""
    if device != "cuda":
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stage", "field"), [("pretrain", "micro_batch"), ("finetune", "batch_size")])
def test_a_step_that_finds_no_memory_says_what_to_lower_and_the_run_resumes(
    device: str, stage: Stage, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = on(device, "execution.checkpoint_minutes=1e-9")
    run = run_tiny(tmp_path, *overrides, stages=TRAININGS[: TRAININGS.index(stage)])
    usual = TrainingRun._update

    def update(run: TrainingRun, *given: Any) -> Any:
        if run.number == 12:
            exhaust(device)
        return usual(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_update", update)
        with pytest.raises(DeviceMemoryError, match=rf"{stage}, step 13: .*Lower .*{stage}\.{field}"):
            run_stage(run, stage)
    run_stage(run, stage)
    undisturbed = run_tiny(tmp_path / "undisturbed", *overrides, stages=TRAININGS[: TRAININGS.index(stage) + 1])
    name = "checkpoints/encoder.safetensors" if stage == "pretrain" else "model/model.safetensors"
    assert (run.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


def exhaust(device: str) -> None:
    """Ask the device for more memory than any has; the CPU, which might give it, is taken for asked."""
    if device == "cpu":
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1024.00 GiB.")
    torch.empty(1 << 40, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_an_attack_with_cuda_graphs_is_the_one_without(device: str, digits_network: nn.Module) -> None:
    """To the bit, as in float32 both make the same calls of the same kernels."""
    test = load_images("digits", "test")[:16]
    assert test.labels is not None
    x, y = test.pixels().to(device), test.labels.to(device)
    found = []
    for mode in MODES:
        smoothed = smoothed_on(device, mode, digits_network)
        log_probs = fresh_noise(smoothed, 4, smoothed.streams(0, "attack", test.ids.tolist()))
        found.append(pgd(log_probs, x, y, ThreatModel("l2", 0.5), steps=8, step_size=0.3))
    Execution().place(digits_network)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("device", SELDOM)
def test_votes_of_the_compiled_forward_are_those_of_the_eager_one(device: str, digits_network: nn.Module) -> None:
    x = load_images("digits", "test")[:64].pixels()
    votes_of = {}
    for mode in MODES:
        smoothed = smoothed_on(device, mode, digits_network)
        generators = smoothed.streams(0, "votes", [str(row) for row in range(len(x))])
        votes_of[mode] = smoothed.counts(x, 1000, generators)
        smoothed.recheck()
    Execution().place(digits_network)
    differing = (votes_of["none"] - votes_of["reduce-overhead"]).abs().sum() / 2
    assert differing <= 0.0006 * 64_000


def smoothed_on(device: str, mode: CompileMode, network: nn.Module) -> SmoothedClassifier:
    execution = Execution(device, compile_mode=mode).configure()
    return SmoothedClassifier(execution.place(network), 0.25, 10, execution=execution, image_shape=(1, 8, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_discrete_noise_has_its_exact_probabilities_and_every_sum_is_one_float(device: str) -> None:
    noise, generator = DiscreteGaussian(0.25), stream(0, "draws", device=device)
    drawn = noise.integers(torch.empty(2_000_000, device=device), generator).cpu().long().numpy()
    assert chi_square(drawn, 0.25) > 1e-6
    pixels = (torch.arange(256).repeat(12).view(3, 32, 32) / 255).to(device)
    noisy = noise.add(pixels, torch.empty(100, 3, 32, 32, device=device), generator)
    assert len(noisy.unique()) == len((255 * noisy.double()).round().unique())


@pytest.mark.parametrize("device", DEVICES)
def test_copies_to_the_host_hold_what_was_queued_before_them(device: str) -> None:
    values = sent(torch.arange(1000.0), device)
    assert values.device.type == device
    copy = HostCopy(values * 2, values[:3])
    values.zero_()
    doubled, first = copy.read()
    assert torch.equal(doubled, 2 * torch.arange(1000.0))
    assert first.tolist() == [0.0, 1.0, 2.0]
    assert doubled.device.type == "cpu"


@pytest.mark.parametrize("device", SELDOM)
def test_two_processes_train_together(device: str, tmp_path: Path) -> None:
    """By gloo on the CPU and by nccl on two CUDA devices; twice with the same bits."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    recipe, weights = write_tiny(tmp_path), []
    for name in ("first", "again"):
        changes = [word for change in on(device) for word in ("--set", change)]
        done = rush("pretrain", recipe, "--out", tmp_path / name, *changes, command=TWO_PROCESSES)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / name / "checkpoints/encoder.safetensors").read_bytes())
        assert json.loads((tmp_path / name / "stages/pretrain.json").read_text())["processes"] == 2
    assert weights[0] == weights[1]
