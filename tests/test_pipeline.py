"""The main promise: a recipe and a seed give the same bits, whenever the run is killed and however often."""

import itertools
import json
import os
import random
import signal
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import rush.certification.certify
import rush.data.splits
import rush.evaluation.evaluation
import rush.pipeline.train
from rush.choices import NoiseName, Stage
from rush.data.images import ImageSet
from rush.data.sources import load_images
from rush.errors import CheckpointError, ConfigError, DataError, RunError
from rush.evaluation.evaluation import Evaluation
from rush.pipeline.attack import AttackSession, audit_run
from rush.pipeline.attackers import Attackers
from rush.pipeline.context import StageContext
from rush.pipeline.stages import run_stage
from rush.recipe.load import load_recipe
from rush.records.audit import read_audit
from rush.records.folder import RunFolder
from rush.runtime.randomness import stream
from tiny import EVERY_RUN, TINY, differing, part_of, results, run_tiny, tiny, without_time


def test_every_process_looks_before_any_may_finish_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that found the stage finished by another one would miss the barriers within it."""
    order: list[str] = []
    run = SimpleNamespace(
        path=Path("run"),
        finished=lambda *_, **__: order.append("looked"),
        alone=nullcontext,
        require=lambda *_, **__: {"seconds": 0.0},
    )
    monkeypatch.setattr("rush.pipeline.stages.barrier", lambda: order.append("waited"))
    monkeypatch.setattr("rush.pipeline.stages.run_attack", lambda *_, **__: order.append("ran"))
    run_stage(run, "attack")  # type: ignore[arg-type]
    assert order == ["looked", "looked", "waited", "ran"]


def test_the_same_recipe_and_seed_give_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # nothing may come from the global generator
    first, again = results(tiny_run), results(run_tiny(tmp_path).path)
    assert len(first) == 5 + 7  # six attackers and the clean images
    assert differing(first, again) == []


def test_another_seed_gives_other_weights_votes_and_points(tiny_run: Path, tmp_path: Path) -> None:
    first, other = results(tiny_run), results(run_tiny(tmp_path, "seed=1").path)
    # the clean images' file holds other images too: the seed orders them
    assert differing(first, other) == sorted(first)


def times(folder: Path) -> dict[str, int]:
    """When each file was written; recipe.json is written again by every start, with the same content."""
    found = {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    del found["recipe.json"]
    return found


def test_a_finished_run_is_left_as_it_is(tiny_run: Path) -> None:
    before, recipe = times(tiny_run), (tiny_run / "recipe.json").read_bytes()
    for stage in EVERY_RUN:
        run_stage(RunFolder.create(tiny_run, RunFolder.open(tiny_run).recipe), stage)
    assert times(tiny_run) == before
    assert (tiny_run / "recipe.json").read_bytes() == recipe


def test_a_run_leaves_the_files_of_the_contract_and_no_others(tiny_run: Path) -> None:
    found = {str(file.relative_to(tiny_run)) for file in tiny_run.rglob("*") if file.is_file()}
    rungs = ("clean", "transfer", "frozen", "eot-1", "eot-2", "sandwich")
    assert found - {"report.html"} == {
        "recipe.json",
        "provenance.json",
        "log.jsonl",
        "checkpoints/pretrain.pt",
        "checkpoints/encoder.safetensors",
        "checkpoints/pretrain.previous.pt",
        "checkpoints/finetune.pt",
        "checkpoints/finetune.previous.pt",
        "model/model.json",
        "model/model.safetensors",
        "certificates.tsv",
        "attacks.tsv",
        "attacks/images.npz",
        "audit.json",
        *(f"stages/{stage}.json" for stage in EVERY_RUN),
        *(f"attacks/{rung}.npz" for rung in rungs),
        *(f"attacks/parts/{rung}-0000.npz" for rung in (*rungs, *(f"curve-{number}" for number in range(7)))),
    }


# Kills. A child process works on the run with small groups, so that each stage has many places to die at, and dies in
# one of four ways. All of them end the process at once, without a line of Python running: SIGKILL right before or right
# after some write has reached the disk or right after it got its name, or a timer of processor time at whatever
# instruction that is.

KILLS = 4
GROUPED = (
    "pretrain.epochs=4",
    "finetune.epochs=3",
    "certify.images=24",
    "certify.num_estimation=1000",
    "attack.images=8",
    "attack.curve_images=2",
    "audit.images=4",
)


def small_groups() -> None:
    """Certificates come one or two at a time, attacked images in groups of two."""
    rush.certification.certify._ROUND_TILES = 2
    rush.evaluation.evaluation.GROUP = 2


def kill_at(way: str, write: int, delay: float) -> None:
    """End this process at its write number ``write``, or ``delay`` seconds of processor time after it."""
    sync, number = os.fsync, itertools.count(1)
    replace, renamings = os.replace, itertools.count(1)

    def watched_rename(source: Path, target: Path) -> None:
        replace(source, target)
        if way == "renamed" and next(renamings) == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(descriptor: int) -> None:
        here = next(number)
        if way == "before" and here == write:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)
        if way == "after" and here == write:
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "timer" and here == write:
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_VIRTUAL, delay)

    os.fsync, os.replace = watched, watched_rename  # type: ignore[assignment]


def work(folder: Path, stage: Stage, kill: tuple[str, int, float] | None) -> None:
    """The child: one stage of the run in ``folder``."""
    torch.set_num_threads(1)
    small_groups()
    if kill:
        kill_at(*kill)
    run_stage(RunFolder.create(folder, RunFolder.open(folder).recipe), stage)


def attempt(processes: ForkServerContext, folder: Path, stage: Stage, kill: tuple[str, int, float] | None) -> bool:
    """Whether the attempt finished the stage; False when it was killed, an error when it failed otherwise."""
    child = processes.Process(target=work, args=(folder, stage, kill))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL, -signal.SIGVTALRM), f"{stage} ended with {child.exitcode}"
    return child.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Results of the run with small groups that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = RunFolder.create(folder / "run", tiny(folder, *GROUPED))
    for stage in EVERY_RUN:
        assert attempt(processes, run.path, stage, None)
    return results(run.path)


def check_killed(
    undisturbed: dict[str, object], processes: ForkServerContext, folder: Path, kills: int, seed: int
) -> dict[Stage, int]:
    """Run all stages in ``folder``, each killed ``kills`` times or as often as it lasts; returns the kills."""
    run, chance = RunFolder.create(folder / "run", tiny(folder, *GROUPED)), random.Random(seed)
    happened = dict.fromkeys(EVERY_RUN, 0)
    for stage in EVERY_RUN:
        ways = itertools.cycle([*chance.sample(["before", "after", "timer"], 3), "renamed"])
        while happened[stage] < kills:
            # an attempt writes recipe, provenance (twice in pretrain) and the log before its first result
            way = next(ways)
            kill = (way, chance.randint(2, 4) if way == "renamed" else chance.randint(3, 7), chance.uniform(0, 0.03))
            if attempt(processes, run.path, stage, kill):
                break
            happened[stage] += 1
        else:
            assert attempt(processes, run.path, stage, None)
    assert not list(folder.rglob("*.partial")), "what a kill leaves half written is litter"
    assert differing(undisturbed, results(run.path)) == [], f"after the kills {happened}"
    return happened


@pytest.mark.timeout(200)
def test_a_run_killed_in_every_stage_ends_with_the_same_bits(
    undisturbed: dict[str, object], processes: ForkServerContext, tmp_path: Path
) -> None:
    happened = check_killed(undisturbed, processes, tmp_path, KILLS, seed=0)
    assert all(happened[stage] >= 3 for stage in ("pretrain", "certify", "attack")), happened


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_kills_change_no_bit(
    undisturbed: dict[str, object], processes: ForkServerContext, tmp_path: Path, seed: int
) -> None:
    happened = check_killed(undisturbed, processes, tmp_path, 8, seed)
    assert sum(happened.values()) >= 20, happened


def test_an_epoch_is_counted_once_however_the_attempts_ended(processes: ForkServerContext, tmp_path: Path) -> None:
    """Named files: recipe, provenance, provenance, then one checkpoint an epoch."""
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, *GROUPED))
    assert not attempt(processes, run.path, "pretrain", ("renamed", 5, 0.0))  # after the second epoch
    assert not attempt(processes, run.path, "pretrain", ("before", 8, 0.0))  # in the checkpoint of the fourth
    assert [event["epoch"] for event in run.events("epoch", "pretrain")] == [1, 2, 3, 4]
    assert attempt(processes, run.path, "pretrain", None)
    events, figures = run.events("epoch", "pretrain"), run.require("pretrain")
    assert [event["epoch"] for event in events] == [1, 2, 3, 4, 4]
    assert figures["epochs"] == 4
    assert figures["seconds"] == pytest.approx(sum(event["seconds"] for event in [*events[:3], events[4]]))
    assert figures["images_per_second"] == pytest.approx(4 * 1397 / figures["seconds"])
    assert len(run.events("started", "pretrain")) == 3


# What a stage is asked for


@pytest.mark.parametrize(("stage", "needs"), [("finetune", "pretrain"), ("certify", "finetune"), ("attack", "certify")])
def test_a_stage_out_of_order_names_the_command_that_comes_before(stage: Stage, needs: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path))
    with pytest.raises(RunError, match=rf"stage {needs} is not finished; run `rush {needs} {run.path}` first"):
        run_stage(run, stage)
    assert sorted(file.name for file in run.path.iterdir()) == ["recipe.json"]


@pytest.mark.parametrize(
    ("removed", "stage", "text"),
    [
        (("checkpoints/encoder.safetensors", "stages/finetune.json"), "finetune", r"encoder\.safetensors is missing"),
        (("model", "stages/certify.json"), "certify", r"model\.json is missing"),
        (("model/model.safetensors", "stages/attack.json"), "attack", r"model\.safetensors is missing"),
        (("certificates.tsv", "stages/attack.json"), "attack", r"certificates\.tsv is missing or empty; .*certify"),
    ],
)
def test_what_an_earlier_stage_left_and_somebody_removed_is_missed_by_name(
    removed: tuple[str, ...], stage: Stage, text: str, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=text):
        run_stage(part_of(tiny_run, tmp_path / "run", *removed), stage)


def test_a_run_goes_on_behind_the_last_whole_line_of_its_certificates(tiny_run: Path, tmp_path: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "stages/certify.json", "attack")
    table = run.path / "certificates.tsv"
    whole = table.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"".join(lines[:4]) + lines[4][:30], b"".join(lines[:1]), lines[0][:10], b"", whole):
        table.write_bytes(kept)
        (run.path / "stages/certify.json").unlink(missing_ok=True)
        run_stage(run, "certify")
        done = kept.count(b"\n")
        assert table.read_bytes().splitlines()[:done] == [line.rstrip(b"\n") for line in lines[:done]]
        assert without_time(table.read_text()) == without_time(whole.decode())


@pytest.mark.parametrize(
    ("file", "stage", "error", "text"),
    [
        ("checkpoints/pretrain.pt", "pretrain", CheckpointError, r"pretrain\.pt cannot be read .*delete it to start"),
        ("checkpoints/finetune.pt", "finetune", CheckpointError, r"finetune\.pt cannot be read .*delete it to start"),
        ("attacks/parts/clean-0000.npz", "attack", RunError, "clean-0000.npz is damaged .*delete it and attack again"),
        ("provenance.json", "attack", RunError, r"provenance\.json is damaged"),
        ("stages/finetune.json", "certify", RunError, r"finetune\.json is damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name_with_the_remedy(
    file: str, stage: Stage, error: type[Exception], text: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = part_of(tiny_run, tmp_path / "run", f"stages/{stage}.json")
    content = (run.path / file).read_bytes()
    (run.path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(error, match=text):
        run_stage(run, stage)


def test_a_run_refuses_other_images_under_the_same_name(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = part_of(tiny_run, tmp_path / "run", "stages/attack.json")

    def other_images(name: str, split: str, **given: Any) -> ImageSet:
        images = load_images(name, split, **given)
        images.images[0, 0, 0, 0] += 1
        return images

    monkeypatch.setattr(rush.data.splits, "load_images", other_images)
    with pytest.raises(RunError, match=r"started with different settings \(data: was .*fingerprint"):
        run_stage(run, "attack")


def test_more_test_images_than_there_are_is_told_by_both_numbers(tiny_run: Path, tmp_path: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "certify", "attack", "audit")
    recipe = load_recipe(str(tiny_run.parent / "tiny.toml"), ["certify.images=401"])
    with pytest.raises(ConfigError, match=r"asks for 401 test images, digits has 400; lower certify\.images"):
        run_stage(RunFolder.create(run.path, recipe), "certify")


def test_certified_and_attacked_images_are_the_same_when_their_numbers_differ(tmp_path: Path, tiny_run: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "attack", "audit")
    recipe = load_recipe(str(tiny_run.parent / "tiny.toml"), ["attack.images=5"])
    run_stage(RunFolder.create(run.path, recipe), "attack")
    certified = [line.split("\t")[6] for line in (run.path / "certificates.tsv").read_text().splitlines()[1:]]
    attacked = [line.split("\t") for line in (run.path / "attacks.tsv").read_text().splitlines()[1:]]
    assert [fields[2] for fields in attacked if fields[0] == "clean"] == certified[:5]
    assert len(set(certified)) == 20
    test = load_images("digits", "test")
    assert [test.ids[int(fields[1])] for fields in attacked if fields[0] == "clean"] == certified[:5]


@pytest.mark.parametrize(("noise", "norm"), [("gaussian", "l2"), ("laplace", "l1")])
def test_certified_balls_are_attacked_in_their_norm(
    noise: NoiseName, norm: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.open(tiny_run)
    recipe = run.recipe.model_copy(update={"smoothing": run.recipe.smoothing.replace(noise=noise)})
    session = replace(AttackSession.of(StageContext.of(run)), attackers=Attackers.of(recipe, 10, 64))
    certificates = session.certificates()
    assert certificates is not None
    monkeypatch.setattr(Evaluation, "run", lambda evaluation, plan, _: (evaluation.threat.norm, plan.label))
    attacked = session.inside_certified_balls(replace(certificates, rule=replace(certificates.rule, noise=noise)))
    assert attacked == [(norm, f"{norm} at 0.99 of the certified radius")]


# Labels


class Taken(Exception):
    """Carries the images that a training was given."""


def images_given(training: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the training function is given to train on."""

    def take(images: Any, *_: Any, **__: Any) -> NoReturn:
        raise Taken(images)

    monkeypatch.setattr(rush.pipeline.train, training, take)
    with pytest.raises(Taken) as caught:
        run_stage(run, training)  # type: ignore[arg-type]
    return caught.value.args[0]


def test_pre_training_is_given_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_given("pretrain", RunFolder.create(tmp_path / "run", tiny(tmp_path)), monkeypatch)
    assert len(images) == 1397
    batch = next(images.batches(stream(0, "order"), 128))
    assert batch.labels is None
    assert batch.images.shape == (128, 1, 8, 8)


@pytest.mark.parametrize(
    ("override", "size", "per_class"),
    [
        ("finetune.label_fraction=1.0", 1397, range(130, 150)),
        ("finetune.label_fraction=0.1", 140, range(13, 16)),
        ("finetune.labels_per_class=7", 70, range(7, 8)),
    ],
)
def test_fine_tuning_is_given_the_labels_that_the_recipe_grants(
    override: str, size: int, per_class: range, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[int, list[str]] = {}
    for attempt_number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(attempt_number)
        part_of(tiny_run, folder, "stages/finetune.json", "provenance.json")
        run = RunFolder(folder, load_recipe(str(tiny_run.parent / "tiny.toml"), [override, f"seed={seed}"]))
        images = images_given("finetune", run, monkeypatch)
        assert len(images) == size
        assert set(images.labels.bincount(minlength=10).tolist()) <= set(per_class)
        if seed in chosen:
            assert images.ids.tolist() == chosen[seed]
        chosen[seed] = images.ids.tolist()
    assert (chosen[0] == chosen[1]) == (size == 1397)


def test_held_out_images_are_seen_by_neither_training_and_watched_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, "data.held_out=300", "pretrain.monitor_epochs=2"))
    held = StageContext.of(run).splits.held_out
    assert held is not None
    assert held.labels is not None
    assert len(held) == 300
    assert set(held.labels.bincount(minlength=10).tolist()) <= set(range(28, 33))
    seen = {image.numpy().tobytes() for image in StageContext.of(run).splits.pretraining()._images}  # type: ignore[attr-defined]
    train = {image.numpy().tobytes() for image in load_images("digits", "train").images}
    assert seen == train - {image.numpy().tobytes() for image in held.images}
    run_stage(run, "pretrain")
    run_stage(run, "finetune")
    (pretrained,) = run.events("monitor", "pretrain")
    assert pretrained["epoch"] == 2
    assert {"knn", "linear", "knn_noisy", "linear_noisy"} <= set(pretrained)
    assert all(0.2 < pretrained[name] <= 1 for name in ("knn", "linear", "knn_noisy", "linear_noisy"))
    (finetuned,) = run.events("monitor", "finetune")
    assert 0 < finetuned["accuracy_noisy"] <= finetuned["accuracy"] <= 1
    part = part_of(run.path, tmp_path / "again", "stages/finetune.json")
    labelled = images_given("finetune", part, monkeypatch)
    assert not set(labelled.ids) & set(held.ids)


def test_fine_tuning_without_labels_is_refused(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = part_of(tiny_run, tmp_path / "run", "stages/finetune.json", "provenance.json")
    monkeypatch.setattr(
        rush.data.splits, "load_images", lambda *given, **named: load_images(*given, **named).without_labels()
    )
    with pytest.raises(DataError, match=r"digits \(train\) has no labels; fine-tuning needs them"):
        run_stage(run, "finetune")


def test_the_figures_of_the_stages_are_those_of_the_recipe(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    pretrain, finetune, certify, attack, audit = (run.require(stage) for stage in EVERY_RUN)
    # two views in each of two epochs of ten whole batches
    assert (pretrain["epochs"], pretrain["images"]) == (2, 1397)
    assert pretrain["passes_per_image"] * 1397 == pytest.approx(2 * 2 * 10 * 128)
    assert (pretrain["forward_passes_per_image"], pretrain["processes"]) == (0, 1)
    assert pretrain["knn_accuracy"]["total"] == 400
    assert pretrain["knn_accuracy"]["correct"] > 200  # of 400; guessing gives 40
    assert (finetune["epochs"], finetune["labelled_images"], finetune["mode"]) == (2, 1397, "full")
    assert (certify["images"], certify["forward_passes_per_image"], certify["sigma"]) == (20, 300, 0.25)
    assert attack["threat"] == {"norm": "linf", "epsilon": 8 / 255, "epsilon_text": "8/255"}
    assert [rung["name"] for rung in attack["rungs"]] == ["clean", "transfer", "frozen", "eot-1", "eot-2"]
    assert (attack["curve"]["images"], len(attack["curve"]["points"])) == (5, 7)
    assert attack["curve"]["points"][-1]["epsilon"] == 0.5
    assert attack["level"] == pytest.approx(0.001 / (5 + 7 + 1))
    assert (audit["images"], audit["evaluation"]) == (10, "PGD-20, cross-entropy, EOT 20 (the default)")
    provenance = json.loads((tiny_run / "provenance.json").read_text())
    assert provenance["data"]["test"]["fingerprint"] == load_images("digits", "test").fingerprint
    assert TINY.count("epochs = 2") == 2


def test_a_run_is_not_tested_on_its_training_images(tmp_path: Path) -> None:
    digits = load_images("digits", "train")
    assert digits.labels is not None
    np.savez(tmp_path / "one_set.npz", images=digits.images.numpy(), labels=digits.labels.numpy())
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, f"data.name={tmp_path / 'one_set.npz'}"))
    with pytest.raises(DataError, match=r"the same 1397 images for train and test; .* separate splits"):
        run_stage(run, "pretrain")
    assert not (run.path / "checkpoints").exists()


def test_a_resumed_run_computes_with_its_recorded_threads(tiny_run: Path) -> None:
    before = torch.get_num_threads()
    recorded = RunFolder.open(tiny_run).recorded("threads")
    torch.set_num_threads(recorded + 1)
    try:
        context = StageContext.of(RunFolder.open(tiny_run))
        assert torch.get_num_threads() == context.execution.threads == recorded
    finally:
        torch.set_num_threads(before)


def test_two_processes_never_work_in_one_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path))
    with run.alone(), pytest.raises(RunError, match=r"another process is at work in .*run; wait for it"):
        run_stage(run, "pretrain")
    run_stage(run, "pretrain")


def test_a_run_with_the_suite_in_its_ladder_is_audited_against_its_points(tmp_path: Path) -> None:
    """The suite itself, as the audited rung, is run once more."""
    fields = ("attack.strong_steps=2", "attack.strong_eot_samples=2", "attack.queries=4", "attack.images=3")
    run = run_tiny(tmp_path, *fields, "attack.curve_images=0", "pretrain.epochs=0", "finetune.epochs=1")
    report = read_audit(run.path / "audit.json", "")
    assert report.reference == "worst case of 8 attackers (worst-case-v1), judged again"
    assert audit_run(run, "worst-case").reference == "worst case of 8 attackers (worst-case-v1)"
