"""What precedes a run: ``rush init``, the test split that a recipe draws, ``rush recipes show`` and ``doctor``."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rush
from commands import Call, refusal
from rush.commands.init import look_at
from rush.data.sources import is_divided, load_images
from rush.data.splits import Splits
from rush.errors import ConfigError
from rush.pipeline.attackers import Attackers
from rush.pipeline.context import StageContext
from rush.pipeline.preconditions import check_before_training
from rush.recipe.load import load_recipe, quickened, recipe_names
from rush.recipe.schema import DataConfig
from rush.recipe.text import to_toml
from rush.records.folder import RunFolder
from rush.records.read_run import read_run
from tiny import run_tiny, tiny, write_tiny

RNG = np.random.default_rng(0)


def photos(folder: Path, per_class: int, classes: str = "ab", size: tuple[int, int] = (12, 12)) -> Path:
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(RNG.normal(60 + 100 * place, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def splits_of(data: DataConfig, seed: int = 0) -> Splits:
    return Splits(data, seed, "cpu", lambda *_: None, {})


def test_a_test_split_is_drawn_stratified_and_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    folder = photos(tmp_path / "set", 20)
    data = DataConfig(name=str(folder), test_images=10, held_out=6)
    splits = splits_of(data)
    parts = [splits.train, splits.held_out, splits.test]
    ids = [set(part.ids.tolist()) for part in parts]
    assert [len(part) for part in parts] == [24, 6, 10]
    assert set.union(*ids) == set(load_images(folder, "train").ids.tolist())
    assert sum(map(len, ids)) == 40
    assert np.bincount(splits.test.labels).tolist() == [5, 5]
    assert splits.test.split == "test"
    assert set(splits_of(data, seed=1).test.ids.tolist()) == ids[2]
    assert set(splits_of(data, seed=1).held_out.ids.tolist()) != ids[1]


def test_pre_training_never_sees_drawn_test_images(tmp_path: Path) -> None:
    photos(tmp_path / "set/train", 20)
    photos(tmp_path / "set/unlabeled", 5, "u")
    splits = splits_of(
        DataConfig(name=str(tmp_path / "set"), test_images=10, held_out=6, pretrain_split="train+unlabeled")
    )
    seen = set(splits.pretraining_images().ids.tolist())
    assert len(seen) == 45 - 16
    for part in (splits.test, splits.held_out):
        assert not seen & {*part.ids.tolist(), *(f"train/{name}" for name in part.ids.tolist())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"test_images": 40}, "leaves none of 40 images"), ({"test_images": 4, "memory_gb": 1e-6}, "needs all images in")],
)
def test_a_test_split_that_cannot_be_drawn_says_why(changes: dict[str, float], message: str, tmp_path: Path) -> None:
    data = DataConfig(name=str(photos(tmp_path / "set", 20)), **changes)
    with pytest.raises(ConfigError, match=message):
        _ = splits_of(data).test


def test_a_recipe_for_a_folder_fits_it_and_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "pets", 30, "abc", (20, 30))
    done = call("init", "my.toml", "--data", "pets")
    assert done.returncode == 0, done.stderr
    assert "rush run my.toml" in done.stdout
    recipe = load_recipe("my.toml")
    assert (recipe.data.name, recipe.data.size) == (str(tmp_path / "pets"), 64)
    assert (recipe.data.test_images, recipe.data.held_out, recipe.certify.images) == (18, 7, 18)
    assert recipe.pretrain.batch_size == recipe.finetune.batch_size == 16
    run = run_tiny(
        tmp_path,
        *(f"data.{name}={getattr(recipe.data, name)}" for name in ("name", "size", "test_images", "held_out")),
        *(
            "pretrain.batch_size=16",
            "pretrain.epochs=1",
            "pretrain.knn_neighbours=1",
            "certify.images=18",
            "attack.images=18",
        ),
        *("finetune.batch_size=16", "finetune.epochs=1", "data.size=8"),
        stages=("pretrain", "finetune", "certify"),
    )
    assert run.finished("certify")["images"] == 18
    assert "my.toml exists" in refusal(call("init", "my.toml", "--data", "pets"))
    assert "must end in .toml" in refusal(call("init", "my", "--data", "pets"))
    assert "does not exist" in refusal(call("init", "other.toml", "--data", "no-such-folder"))
    assert "no recipe" in refusal(call("init", "other.toml", "--data", "pets", "--base", "no-such"))
    assert not (tmp_path / "other.toml").exists()


def test_images_without_labels_are_pre_trained_on_and_taught(tmp_path: Path, call: Call) -> None:
    photos(tmp_path / "set/train", 30)
    photos(tmp_path / "set/test", 10)
    photos(tmp_path / "set/unlabeled", 100, "u")
    assert call("init", tmp_path / "few.toml", "--data", tmp_path / "set").returncode == 0
    recipe = load_recipe(str(tmp_path / "few.toml"))
    assert recipe.data.pretrain_split == "train+unlabeled"
    assert recipe.teach.rounds == 1
    assert (recipe.data.test_images, recipe.data.size, recipe.certify.images) == (0, None, 20)


def test_other_kinds_of_images_are_looked_at(tmp_path: Path) -> None:
    survey = look_at("digits", None)
    assert (survey.train, survey.test, survey.unlabeled, survey.classes, survey.size) == (1397, 400, 0, 10, (8, 8))
    pixels, labels = RNG.integers(0, 255, (20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "one.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "two.npz", x_train=pixels, y_train=labels, x_test=pixels[::-1], y_test=labels[::-1])
    assert look_at(str(tmp_path / "one.npz"), None).test is None
    assert look_at(str(tmp_path / "two.npz"), None).test == 20
    assert look_at(str(photos(tmp_path / "set", 10)), None).test is None


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_shown_as_toml_that_reads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "shown.toml").write_text(to_toml(recipe))
    assert load_recipe(str(tmp_path / "shown.toml")) == recipe


def test_recipes_are_shown_from_every_place(call: Call, tiny_run: Path) -> None:
    assert "epochs = 3" in call("recipes", "show", "digits", "--set", "pretrain.epochs=3").stdout
    assert 'name = "tiny"' in call("recipes", "show", tiny_run).stdout
    assert "digits" in call("recipes").stdout
    assert "no recipe 'nope'" in refusal(call("recipes", "show", "nope"))


def test_the_machine_is_described(call: Call, tmp_path: Path) -> None:
    photos(tmp_path / "cifar10", 1)
    found = json.loads(call("doctor", "--data", tmp_path, "--json").stdout)
    assert found["rush"].startswith(rush.__version__)
    assert found["device"].split()[0] in ("cpu", "cuda", "mps")
    assert found["stl10"] == "not found; it is downloaded when it is needed"
    assert set(found) <= {cells.split("│")[0].strip() for cells in call("doctor").stdout.splitlines()}
    assert "is not a directory" in json.loads(call("doctor", "--data", tmp_path / "no", "--json").stdout)["cifar10"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_trial(name: str) -> None:
    recipe, trial = load_recipe(name), quickened(load_recipe(name))
    assert (trial.name, trial.quick) == (f"{name}-quick", True)
    assert (trial.data, trial.model, trial.smoothing) == (recipe.data, recipe.model, recipe.smoothing)
    assert trial.pretrain.epochs in (0, 1)
    assert trial.finetune.epochs in (1, 2)
    assert (trial.certify.images, trial.attack.images, trial.audit.images) == (10, 10, 3)
    assert (Attackers.of(trial, 10, 64).rung(trial.audit.rung) is None) == (trial.smoothing.sigma == 0)


@pytest.mark.timeout(240)
def test_a_trial_runs_every_stage_and_is_marked(call: Call, tmp_path: Path) -> None:
    done = call("run", write_tiny(tmp_path), "--out", tmp_path / "run", "--quick")
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    assert read_run(tmp_path / "run").missing == ()
    page = (tmp_path / "run/report.html").read_text()
    assert '<p class="warning" id="quick"><strong>A trial:</strong> this run is a trial' in page
    assert "is a run folder; omit it" in refusal(call("run", tmp_path / "run", "--quick"))


def test_a_trial_takes_as_many_test_images_as_there_are(call: Call, tmp_path: Path) -> None:
    """Four of them are drawn, and a trial asks for ten; the recipe itself, with ten, is refused."""
    data = photos(tmp_path / "set", 20)
    sets = (f"data.name={data}", "data.test_images=4", "model.width=2", "finetune.batch_size=8", "pretrain.epochs=0")
    command = ["run", write_tiny(tmp_path), *(word for each in sets for word in ("--set", each)), "--out"]
    message = refusal(call(*command, tmp_path / "refused", "--set", "certify.images=10"))
    assert "asks for 10 test images, set has 4; lower certify.images" in message
    done = call(*command, tmp_path / "run", "--quick")
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run")
    assert results.certificates is not None
    assert len(results.certificates) == 4


def test_no_recipe_is_written_for_a_single_class(call: Call, tmp_path: Path) -> None:
    data = photos(tmp_path / "set", 5, "a")
    message = refusal(call("init", tmp_path / "mine.toml", "--data", data))
    assert "are of the class 'a'; a classifier needs at least two" in message
    assert not (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize("split", ["train", "train+unlabeled", "unlabeled"])
def test_a_batch_of_pre_training_that_is_too_large_is_found_before_it_begins(split: str, tmp_path: Path) -> None:
    """Of 40 training images 4 are test images and 6 held out; 10 have no labels."""
    photos(tmp_path / "set/train", 20)
    photos(tmp_path / "set/unlabeled", 10, "u")
    images = {"train": 30, "train+unlabeled": 40, "unlabeled": 10}[split]
    fields = (
        f"data.name={tmp_path / 'set'}",
        "data.test_images=4",
        "data.held_out=6",
        f'data.pretrain_split="{split}"',
    )
    recipe = tiny(tmp_path, *fields, "finetune.batch_size=8", f"pretrain.batch_size={images + 1}", "certify.images=4")
    recipe = recipe.model_copy(update={"attack": recipe.attack.replace(images=4)})
    context = StageContext.of(RunFolder.create(tmp_path / "run", recipe))
    with pytest.raises(ConfigError, match=f"batch_size = {images + 1} exceeds the {images} training images"):
        check_before_training(context)
    fits = recipe.model_copy(update={"pretrain": recipe.pretrain.replace(batch_size=images)})
    check_before_training(StageContext.of(RunFolder.create(tmp_path / "other", fits)))


def test_images_of_a_folder_without_splits_are_named_so(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One's own network may have been trained on them."""
    monkeypatch.chdir(tmp_path)
    data = photos(tmp_path / "set", 4, "ab", (8, 8))
    photos(tmp_path / "divided/train", 4, "ab", (8, 8))
    photos(tmp_path / "divided/test", 4, "ab", (8, 8))
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "same.npz", x_train=images, y_train=[0, 1] * 3, x_test=images + 1, y_test=[0, 1] * 3)
    divided = {data: False, tmp_path / "divided": True, tmp_path / "same.npz": True, "digits": True, "cifar10": True}
    assert {name: is_divided(name) for name in divided} == divided
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()\n"
    )
    command = ["certify", "--model", "mine:net", "--sigma", 0.25, "--num-estimation", 100, "--data"]
    note = "has no split of test images, so that images of training may be among these"
    assert f"{data} {note}" in call(*command, data, "--out", "a.tsv").stderr
    assert note not in call(*command, tmp_path / "divided", "--out", "b.tsv").stderr
