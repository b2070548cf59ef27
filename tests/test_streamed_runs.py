"""A run whose training images stream from the disk: the same as one that holds them, where both are possible."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from commands import Call
from encoded_images import image_column, png, write_shard
from rush.data.sources import load_images
from rush.pipeline.context import StageContext
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from tiny import results_of_training, run_tiny, tiny, write_tiny

MEMORY = "data.memory_gb=3e-5"  # 32 kB: the digits take 90 kB decoded and more as PNG files


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as parquet shards of small row groups, one without labels."""
    folder = tmp_path_factory.mktemp("shards")
    for split, rows in (("train", slice(None)), ("test", slice(None)), ("unlabeled", slice(300))):
        images = load_images("digits", "test" if split == "test" else "train")
        contents = [png(image[0].numpy()) for image in images.images[rows]]
        columns = {"image": image_column(contents, [f"{split}{number}.png" for number in range(len(contents))])}
        if split != "unlabeled":
            columns["label"] = images.labels.numpy()
        write_shard(folder / f"{split}-00000.parquet", columns, row_group_size=64)
    return folder


def test_streams_are_taken_where_the_images_would_take_more_memory_than_allowed(shards: Path, tmp_path: Path) -> None:
    loaded = StageContext.of(RunFolder.create(tmp_path / "a", tiny(tmp_path, f"data.name={shards}")))
    assert type(loaded.splits.train).__name__ == "ImageSet"
    streamed = StageContext.of(RunFolder.create(tmp_path / "b", tiny(tmp_path, f"data.name={shards}", MEMORY)))
    assert type(streamed.splits.train).__name__ == "Stream"
    assert len(streamed.splits.train) == 1397


def test_a_whole_run_streams_resumes_and_holds_out(shards: Path, tmp_path: Path) -> None:
    arguments = (f"data.name={shards}", MEMORY, "data.held_out=200", "pretrain.monitor_epochs=1")
    run = run_tiny(tmp_path / "first", *arguments, stages=("pretrain", "finetune", "certify"))
    figures = run.require("finetune")
    assert (figures["images"], figures["labelled_images"]) == (1197, 1197)
    assert len(run.events("monitor", "pretrain")) == 2
    assert run.require("certify")["images"] == 20
    again = run_tiny(tmp_path / "second", *arguments, stages=("pretrain", "finetune"))
    assert results_of_training(again.path) == results_of_training(run.path)
    provenance = json.loads((run.path / "provenance.json").read_text())
    assert provenance["data"]["train"]["images"] == 1397


def test_a_run_takes_several_data_folders_and_goes_on_with_one(shards: Path, call: Call, tmp_path: Path) -> None:
    """Where the shards lie is no part of the result: neither of its weights nor of what a run may go on with."""
    folders, whole = [tmp_path / "a", tmp_path / "b"], tmp_path / "whole"
    for folder, splits in zip([*folders, whole], (["train"], ["test"], ["train", "test"]), strict=True):
        (folder / "set").mkdir(parents=True)
        for split in splits:
            shutil.copy(shards / f"{split}-00000.parquet", folder / "set")
    several = [word for folder in folders for word in ("--data", folder)]
    arguments = (write_tiny(tmp_path), "--set", "data.name=set", "--set", MEMORY)
    for out, data in (("two", several), ("one", ["--data", whole])):
        assert call("pretrain", *arguments, "--out", tmp_path / out, *data).returncode == 0
    assert json.loads((tmp_path / "two/recipe.json").read_text())["data"]["root"] == list(map(str, folders))
    assert json.loads((tmp_path / "one/recipe.json").read_text())["data"]["root"] == str(whole)
    assert call("finetune", tmp_path / "two", "--data", whole).returncode == 0
    assert call("finetune", tmp_path / "one", *several).returncode == 0
    assert results_of_training(tmp_path / "two") == results_of_training(tmp_path / "one")
    done = call("cost", *arguments, "--steps", 1, *several)
    assert done.returncode == 0, done.stderr
    assert "1,397" in done.stdout


def test_fewer_labels_are_drawn_from_a_stream(shards: Path, tmp_path: Path) -> None:
    run = run_tiny(
        tmp_path, f"data.name={shards}", MEMORY, "finetune.label_fraction=0.2", stages=("pretrain", "finetune")
    )
    assert run.require("finetune")["labelled_images"] == 279


def test_pre_training_reads_the_splits_it_is_told_and_no_held_out_image(shards: Path, tmp_path: Path) -> None:
    """The unlabelled shard repeats the first 300 training images: ids, not pixels, say what is held out."""
    for number, memory in enumerate(("data.memory_gb=1", MEMORY)):
        run = RunFolder.create(
            tmp_path / str(number),
            tiny(tmp_path, f"data.name={shards}", memory, "data.held_out=200", "data.pretrain_split=train+unlabeled"),
        )
        context = StageContext.of(run)
        assert len(context.splits.pretraining()) == 1397 - 200 + 300
        run_stage(run, "pretrain")
        assert run.require("pretrain")["images"] == 1497


def test_a_run_that_streamed_does_not_go_on_with_other_files(shards: Path, tmp_path: Path) -> None:
    run = run_tiny(tmp_path, f"data.name={shards}", MEMORY, stages=("pretrain",))
    table = pq.read_table(shards / "train-00000.parquet")
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "test"):
        pq.write_table(table.slice(0, 1000 if split == "train" else 300), other / f"{split}-00000.parquet")
    values = json.loads((run.path / "recipe.json").read_text())
    values["data"]["name"] = str(other)
    (run.path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="started with different settings"):
        run_stage(RunFolder.open(run.path), "finetune")
    assert np.isfinite(run.require("pretrain")["seconds"])
