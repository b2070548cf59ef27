"""Live figures of pre-training beside published ones, in the terminal and in the report."""

from pathlib import Path

import pytest

from rush.choices import TRAININGS
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from rush.records.published import progress_text
from rush.records.read_run import Watched
from rush.reporting.training_plots import watched_curve
from tiny import tiny


def test_each_figure_of_cifar10_is_beside_the_published_one() -> None:
    line = progress_text("pretrain", 12, {"knn": 0.541, "linear": 0.6, "knn_noisy": 0.3}, "cifar10")
    assert line == (
        "pretrain, epoch 12, held-out images: nearest neighbours 54.1% (SimCLR, width 64, published: 83.2% at 100 "
        "epochs); linear probe 60.0% (SimCLR, width 64, published: 56.5% at 10, 66.3% at 30 epochs); nearest "
        "neighbours, noisy 30.0%"
    )


@pytest.mark.parametrize(("stage", "dataset"), [("pretrain", "digits"), ("finetune", "cifar10")])
def test_nothing_is_published_for_other_data_and_stages(stage: str, dataset: str) -> None:
    assert (
        progress_text(stage, 1, {"knn": 0.5}, dataset) == f"{stage}, epoch 1, held-out images: nearest neighbours 50.0%"
    )


def test_published_figures_are_drawn_where_the_run_has_about_as_many_epochs() -> None:
    watched = tuple(Watched("pretrain", epoch, {"linear": 0.5, "knn": 0.4}) for epoch in (6, 12))
    published = {"linear": ((10, 0.565), (30, 0.663)), "knn": ((100, 0.832),)}
    drawn = str(watched_curve(watched, "Pre-training", "watched", "narrow", published))
    assert "published, 10 epochs: 56.5 %" in drawn
    assert "30 epochs" not in drawn
    assert "83.2" not in drawn
    assert "published" not in str(watched_curve(watched, "Pre-training", "watched", "narrow"))


def test_a_run_tells_its_live_figures(tmp_path: Path) -> None:
    lines: list[str] = []
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path, "data.held_out=200"))
    for stage in TRAININGS:
        run_stage(run, stage, lines.append)
    told = [line.partition(", held-out images: ")[0] for line in lines if "held-out" in line]
    assert told == ["pretrain, epoch 2", "finetune, epoch 2"]
