"""Teaching: labels from the pre-trained encoder, and the training on them."""

import json
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from commands import Call
from ranks import on_ranks
from rush.choices import STAGES, Stage
from rush.errors import ConfigError, RunError
from rush.pipeline.labels import TARGETS
from rush.pipeline.stages import run_stage
from rush.recipe.schema import TeachConfig
from rush.records.folder import RunFolder
from rush.records.read_run import read_run
from rush.reporting.costs import training_cost
from rush.reporting.wording import percent, summary_rows
from rush.runtime.randomness import stream
from rush.training.probes import linear_probe
from rush.training.supervised import Examples, consistency, gaussian, smoothadv, standard, trades
from rush.training.teaching import STRENGTHS, _folds, probe_strength, taught
from tiny import differing, part_of, results_of_training, run_tiny, tiny

TAUGHT = ("teach.rounds=2", "teach.draws=2", "finetune.label_fraction=0.05", "data.held_out=200")
TRAINED: tuple[Stage, ...] = ("pretrain", "teach", "finetune")


def blobs(number: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, 12) around the centres of four classes, and the classes."""
    generator = stream(seed, "blobs")
    centres = 2 * torch.randn(4, 12, generator=stream(0, "centres"))
    labels = torch.arange(number) % 4
    return centres[labels] + spread * torch.randn(number, 12, generator=generator), labels


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_the_probe_is_that_of_scikit_learn(strength: float) -> None:
    features, labels = blobs(80, 3.0)
    scaler = StandardScaler().fit(features.numpy())
    factor = (80 / 79) ** 0.5  # torch divides by N - 1
    oracle = LogisticRegression(C=1 / strength, max_iter=5000, tol=1e-9)
    oracle.fit(scaler.transform(features.numpy()) / factor, labels.numpy())
    weight, bias = linear_probe(features, labels, 4, strength)
    queries = blobs(40, 3.0, seed=1)[0]
    expected = oracle.predict_proba(scaler.transform(queries.numpy()) / factor)
    np.testing.assert_allclose(F.softmax(F.linear(queries, weight, bias), 1).numpy(), expected, atol=2e-3)


def test_cross_validation_finds_the_strength_that_predicts_best() -> None:
    """Against the loss on many other images: overlapping classes need a strong penalty, and clear ones a weak one."""
    chosen = []
    for spread in (0.7, 8.0):
        features, labels = blobs(60, spread)
        strength = probe_strength(features, labels, 4, stream(0, "folds"))
        losses = {each: loss_on_others(features, labels, each, spread) for each in STRENGTHS}
        assert losses[strength] < 1.3 * min(losses.values()) + 0.02
        chosen.append(strength)
    assert chosen[0] < chosen[1]


def loss_on_others(features: Tensor, labels: Tensor, strength: float, spread: float) -> float:
    weight, bias = linear_probe(features, labels, 4, strength)
    queries, truth = blobs(4000, spread, seed=2)
    return float(F.cross_entropy(F.linear(queries, weight, bias), truth))


def test_folds_divide_every_class_and_one_image_per_class_needs_no_validation() -> None:
    labels = torch.tensor([0] * 11 + [1] * 5 + [2] * 2)
    fold = _folds(labels, stream(0, "folds"))
    for label in range(3):
        counts = torch.bincount(fold[labels == label], minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    counts = torch.bincount(fold, minlength=5)
    assert int(counts.max() - counts.min()) <= 1
    features, few = blobs(4, 1.0)
    assert probe_strength(features, few, 4, stream(0, "folds")) == 1.0


def test_labels_are_sharpened_weighted_and_balanced_as_the_fields_say() -> None:
    p, rows = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]]), torch.tensor([2])
    labels = torch.tensor([1])
    plain = taught(p, labels, rows, TeachConfig(rounds=1, temperature=1.0))
    torch.testing.assert_close(plain, torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.0, 1.0]]))
    sharp = taught(p, labels, rows, TeachConfig(rounds=1, temperature=0.5))
    torch.testing.assert_close(sharp[0], torch.tensor([0.64, 0.04]) / 0.68)
    weighted = taught(p, labels, rows, TeachConfig(rounds=1, temperature=0.5, confidence=2.0, threshold=0.7))
    torch.testing.assert_close(weighted.sum(1), torch.tensor([0.64, 0.0, 1.0]))
    balanced = taught(p, labels, rows, TeachConfig(rounds=1, temperature=1.0, balance=True))
    ratio = torch.tensor([0.8 / 1.7, 0.2 / 1.3])  # by the sums of the classes
    torch.testing.assert_close(balanced[0], ratio / ratio.sum())


def examples(y: Tensor) -> Examples:
    """A linear network on eight images, with noise of one seed."""
    from rush.smoothing.noise import Gaussian

    weight = torch.randn(4, 12, generator=stream(0, "weight"), dtype=torch.float64)
    x = torch.rand(8, 3, 2, 2, generator=stream(0, "x"), dtype=torch.float64)

    def logits(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight.T

    return Examples(logits, logits, x, y, Gaussian(0.25), stream(0, "noise"))


@pytest.mark.parametrize("name", ["standard", "gaussian", "consistency", "smoothadv", "trades"])
def test_certain_labels_are_labels_and_the_loss_is_linear_in_soft_ones(name: str) -> None:
    losses = {
        "standard": standard,
        "gaussian": gaussian,
        "consistency": lambda given: consistency(given, draws=2, weight=0.0, entropy_weight=0.0),
        "smoothadv": lambda given: smoothadv(given, draws=2, epsilon=0.0, steps=1),
        "trades": lambda given: trades(given, epsilon=0.0, step_size=0.0, steps=1, beta=0.0),
    }
    loss, hard = losses[name], torch.arange(8) % 4
    certain = F.one_hot(hard, 4).double()
    other = F.one_hot((hard + 1) % 4, 4).double()
    torch.testing.assert_close(loss(examples(certain)), loss(examples(hard)))
    mixed = loss(examples(0.6 * certain + 0.1 * other))
    torch.testing.assert_close(mixed, 0.6 * loss(examples(certain)) + 0.1 * loss(examples(other)))


@pytest.fixture(scope="module")
def taught_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("taught"), *TAUGHT, stages=TRAINED).path


def test_a_run_teaches_all_images_and_says_how_well(taught_run: Path) -> None:
    figures = json.loads((taught_run / "stages/teach.json").read_text())
    with np.load(taught_run / TARGETS) as stored:
        targets = stored["targets"]
    assert targets.shape == (figures["images"], 10)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
    certain = (targets == 1).any(1)
    assert figures["labelled_images"] == 60
    assert certain.sum() >= 60
    assert [set(each) for each in figures["rounds"]] == [{"held_out"}, {"held_out"}]
    assert figures["rounds"][0]["held_out"] > 0.5
    trained = json.loads((taught_run / "stages/finetune.json").read_text())
    assert (trained["images"], trained["labelled_images"]) == (figures["images"], 60)


def test_a_run_without_teaching_has_no_such_stage(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    assert "teach" not in recipe.stages
    assert "teach" in tiny(tmp_path, "teach.rounds=1").stages
    assert set(recipe.stages) == set(STAGES) - {"teach"}


def test_a_killed_teacher_ends_with_the_same_bits(taught_run: Path, tmp_path: Path) -> None:
    """Its student stopped after the first epoch, which took an hour."""
    run = part_of(taught_run, tmp_path / "again", "finetune", "teach")
    (run.path / "checkpoints/teach-2.previous.pt").rename(run.path / "checkpoints/teach-2.pt")
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    first = next(event for event in log if event["event"] == "epoch" and event["stage"] == "teach-2")
    first["seconds"] = 3600.0
    (run.path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    for stage in TRAINED[1:]:
        run_stage(RunFolder.open(run.path), stage)
    assert not differing(results_of_training(taught_run), results_of_training(run.path))
    assert json.loads((run.path / "stages/teach.json").read_text())["seconds"] > 3600


def teach_and_read(folder: Path) -> dict[str, Tensor]:
    """What a run without this stage is taught in this process, one of several or alone."""
    run = RunFolder.open(folder)
    run_stage(run, "teach")
    with np.load(run.path / TARGETS) as stored:
        return {"targets": torch.from_numpy(stored["targets"])}


@pytest.mark.timeout(240)
def test_two_processes_teach_as_one(processes: ForkServerContext, taught_run: Path, tmp_path: Path) -> None:
    """The labels of the probe are the same bits. Students draw other noise, and teach the same images as well."""
    for rounds in (1, 2):
        found = {}
        (tmp_path / f"of-{rounds}").mkdir()
        for world in (1, 2):
            lost = ("finetune", "teach", "checkpoints/teach-2.pt", "checkpoints/teach-2.previous.pt")
            run = part_of(taught_run, tmp_path / f"{rounds}-{world}", *lost)
            RunFolder.create(run.path, tiny(tmp_path, *TAUGHT, f"teach.rounds={rounds}"))
            work = partial(teach_and_read, run.path)
            found[world] = [work()] if world == 1 else on_ranks(processes, work, world, tmp_path / f"of-{rounds}")
        alone, both = found[1][0]["targets"], [part["targets"] for part in found[2]]
        assert torch.equal(both[0], both[1])
        if rounds == 1:
            assert torch.equal(both[0], alone)
        assert (both[0].argmax(1) == alone.argmax(1)).double().mean() > 0.6
        stages = [json.loads((tmp_path / f"{rounds}-{world}/stages/teach.json").read_text()) for world in (1, 2)]
        assert stages[0]["rounds"][0] == stages[1]["rounds"][0]
        assert abs(stages[0]["rounds"][-1]["held_out"] - stages[1]["rounds"][-1]["held_out"]) < 0.15


def test_teaching_in_a_new_run_begins_with_the_encoder_of_another(taught_run: Path, tmp_path: Path, call: Call) -> None:
    done = call(
        "teach", taught_run, "--out", tmp_path / "new", "--set", "teach.rounds=1", "--set", "teach.balance=true"
    )
    assert done.returncode == 0, done.stderr
    new = RunFolder.open(tmp_path / "new")
    assert new.recipe.teach.balance
    assert new.finished("teach") is not None
    assert new.finished("finetune") is None
    name = "checkpoints/encoder.safetensors"
    assert (new.path / name).read_bytes() == (taught_run / name).read_bytes()


def test_labels_of_other_images_and_damaged_ones_are_refused(taught_run: Path, tmp_path: Path) -> None:
    run = part_of(taught_run, tmp_path / "again", "finetune")
    with np.load(run.path / TARGETS) as stored:
        ids, targets = stored["ids"], stored["targets"]
    for broken in ({"ids": ids[::-1], "targets": targets}, {"ids": ids, "targets": -targets}, {"ids": ids}):
        np.savez(run.path / TARGETS, **broken)
        with pytest.raises(RunError, match="rush teach"):
            run_stage(RunFolder.open(run.path), "finetune")


def test_fine_tuning_waits_for_the_teacher(taught_run: Path, tmp_path: Path) -> None:
    run = part_of(taught_run, tmp_path / "again", "finetune", "teach")
    with pytest.raises(RunError, match="rush teach"):
        run_stage(run, "finetune")
    assert "teach" in read_run(run.path).missing


@pytest.mark.parametrize("trace", ["checkpoints/teach-2.pt", "teach"])
def test_what_is_being_taught_is_not_changed(trace: str, taught_run: Path, tmp_path: Path) -> None:
    """While a teacher is trained, and once its labels are there."""
    run = part_of(taught_run, tmp_path / "again", "finetune", "teach", "checkpoints/teach-2.pt")
    changed = tiny(tmp_path, *TAUGHT, "teach.temperature=0.7")
    (run.path / trace).mkdir()
    with pytest.raises(RunError, match=r"teach\.temperature"):
        RunFolder.create(run.path, changed)
    (run.path / trace).rmdir()
    RunFolder.create(run.path, changed)


def test_a_recipe_without_teaching_has_nothing_to_teach(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "pretrain.epochs=0", stages=("pretrain",))
    with pytest.raises(ConfigError, match=r"teach\.rounds"):
        run_stage(run, "teach")


@pytest.mark.parametrize(
    ("field", "text"), [("finetune.objective=cat-rs", "cat-rs"), ("finetune.minutes=1", "give finetune.epochs")]
)
def test_trainings_that_cannot_be_taught_are_refused(field: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny(tmp_path, "teach.rounds=2", field)


def test_summary_and_costs_tell_what_was_taught(taught_run: Path) -> None:
    results = read_run(taught_run)
    rows = dict(summary_rows(results))
    figures = results.stages["teach"].fields
    assert rows["labels read"] == f"60 of {figures['images']:,} training images"
    right = " / ".join(percent(each["held_out"]) for each in figures["rounds"])
    assert rows["teacher right"] == f"on {right} of 200 held-out images, by rounds"
    cost = training_cost(results)
    assert cost is not None
    assert cost.objectives == "simclr + teach + gaussian"
    passes = [results.stages[stage].fields["passes_per_image"] for stage in TRAINED]
    assert cost.passes_per_image == pytest.approx(sum(passes))
    assert cost.forward_passes_per_image == pytest.approx(1 + 2)  # the probe's, and two draws of the second teacher
