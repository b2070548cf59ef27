"""The map of an encoder: principal components of its representations, in the record of pre-training and the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from rush.data.images import ImageSet
from rush.errors import RunError
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from rush.records.read_run import read_run
from rush.runtime.execution import Execution
from rush.smoothing.noise import Gaussian
from rush.training.probes import MAP_IMAGES, embedding
from test_report import edit_json, page_of, write_run
from tiny import tiny

MAP: dict[str, Any] = {
    "labels": [0, 1, 1],
    "clean": [[0.0, 0.5], [0.25, -0.5], [-0.25, 0.0]],
    "noisy": [[0.0, 0.4], [0.2, -0.4], [-0.2, 0.1]],
    "explained": [0.75, 0.125],
}


def images_of(number: int, labels: bool = True) -> ImageSet:
    pixels = torch.randint(0, 256, (number, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    named = tuple(map(str, range(5)))
    ids = np.array([f"image {place}" for place in range(number)])
    return ImageSet(pixels, torch.arange(number) % 5 if labels else None, named, ids, "made", "test")


def mapped(number: int, noise: Gaussian | None = None, labels: bool = True) -> dict[str, Any] | None:
    return embedding(nn.Flatten(), images_of(number, labels), noise, Execution(), seed=3)


def test_the_map_has_the_principal_components_of_another_library() -> None:
    """Of representations of unit length, which are the pixels here; signs are compared up to a flip of an axis."""
    found = mapped(40)
    assert found is not None
    unit = nn.functional.normalize(images_of(40).pixels().flatten(1).double(), dim=1).numpy()
    fitted = PCA(2).fit(unit)
    expected, places = fitted.transform(unit), np.array(found["clean"])
    signs = np.sign((expected * places).sum(0))
    assert np.abs(places - signs * expected).max() < 1e-4
    assert found["explained"] == pytest.approx(fitted.explained_variance_ratio_, abs=1e-4)
    assert found["labels"] == [place % 5 for place in range(40)]
    assert found["noisy"] is None
    axes = np.linalg.lstsq(unit - unit.mean(0), places, rcond=None)[0]
    assert (axes[np.abs(axes).argmax(0), [0, 1]] > 0).all()  # the sign does not depend on the machine


def test_noisy_images_are_on_the_axes_of_the_clean_ones() -> None:
    faint, strong = mapped(40, Gaussian(1e-6)), mapped(40, Gaussian(0.5))
    assert faint is not None
    assert strong is not None
    assert faint["clean"] == strong["clean"]
    assert np.abs(np.subtract(faint["noisy"], faint["clean"])).max() < 2e-4
    assert np.abs(np.subtract(strong["noisy"], strong["clean"])).max() > 0.05
    assert mapped(40, Gaussian(0.5)) == strong


def test_at_most_some_hundred_evenly_spaced_images_are_on_it() -> None:
    found = mapped(3 * MAP_IMAGES - 2)
    assert found is not None
    assert len(found["labels"]) == MAP_IMAGES
    assert found["labels"][:4] == [0, 3, 1, 4]


def test_without_labels_or_images_there_is_no_map() -> None:
    assert mapped(40, labels=False) is None
    assert mapped(2) is None


def test_pre_training_records_the_map_and_no_pre_training_does_not(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny(tmp_path))
    run_stage(run, "pretrain")
    found = read_run(run.path).embedding
    assert found is not None
    assert found.noisy is not None
    assert len(found.labels) == len(found.clean) == len(found.noisy) > 2
    assert len(page_of(run.path, drawn=True).labels) >= 2
    untrained = RunFolder.create(tmp_path / "untrained", tiny(tmp_path, "pretrain.epochs=0"))
    run_stage(untrained, "pretrain")
    assert read_run(untrained.path).embedding is None


def test_the_report_draws_both_maps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", classes=["<b>cat", *(f"kind {k}" for k in range(9))])
    assert not [label for label in page_of(run, drawn=True).labels if label.startswith("Encoder")]
    edit_json(run / "stages" / "pretrain.json", embedding=MAP)
    page = page_of(run, drawn=True)
    drawn = [label for label in page.labels if label.startswith("Encoder")]
    assert drawn == [
        f"Encoder, {kind} test images: 3 images of 2 classes in two dimensions" for kind in ("clean", "noisy")
    ]
    assert "component 1, 75.0 %" in page.text
    assert "<b>cat" in page.text
    assert page.tags.count("b") == page_of(run).tags.count("b")
    edit_json(run / "stages" / "pretrain.json", embedding={**MAP, "noisy": None})
    page = page_of(run, drawn=True)
    assert len([label for label in page.labels if label.startswith("Encoder")]) == 1
    assert "one draw of the training noise" not in page.text


@pytest.mark.parametrize(
    "damage",
    [
        {"labels": [0, 1]},
        {"labels": [0, 1, -1]},
        {"labels": "abc"},
        {"clean": [[0, 1], [0, float("nan")], [1, 1]]},
        {"noisy": [[0.0], [1.0], [2.0]]},
        {"explained": [1.0]},
    ],
)
def test_a_damaged_map_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run")
    edit_json(run / "stages" / "pretrain.json", embedding={**MAP, **damage})
    with pytest.raises(RunError, match=r"pretrain\.json is damaged: 'embedding' must hold .*Remedy: remove the key"):
        read_run(run)
    edit_json(run / "stages" / "pretrain.json", embedding=json.loads("[1]"))
    with pytest.raises(RunError, match="'embedding' must hold"):
        read_run(run)
