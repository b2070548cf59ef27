"""``rush predict`` reads image files as training and evaluation do, and one bad file keeps no other from its answer."""

import csv
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import rush
from commands import Call, refusal
from commands import rush as in_its_own_process
from rush.commands.predict import Prediction, Source, _read, predict_files, source_of_run
from rush.data.sources import load_images
from rush.errors import DataError
from rush.models.storage import ClassifierSpec, ImageForm, image_form, save_plain, save_smoothed
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from tiny import run_tiny

RNG = np.random.default_rng(0)
WIDE, TALL, SMALL = (RNG.integers(0, 256, shape, np.uint8) for shape in ((12, 30, 3), (40, 9, 3), (4, 5, 3)))
MODULE = """
import torch
class Bright(torch.nn.Module):
    def forward(self, x):
        return torch.stack([torch.full((len(x),), 0.2), x.mean((1, 2, 3))], 1)
def net(): return Bright().eval()
"""
OPTIONS = {"num_samples": 100, "alpha": 0.001, "seed": 0, "resize": False}


def saved(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def model(folder: Path, channels: int = 3, side: int = 8, resized: bool = False, smoothed: bool = False) -> Path:
    """An untrained classifier of images of this size."""
    spec = ClassifierSpec("small", 2, channels, [0.5] * channels, [0.25] * channels, tuple("0123456789"))
    classifier = seeded_init(spec.build(), stream(0, "weights"))
    if smoothed:
        save_smoothed(folder, classifier, spec, Gaussian(0.25), Execution(tile=16), (channels, side, side), resized)
    else:
        save_plain(folder, classifier, spec, "cpu", (channels, side, side), resized)
    return folder


def answers_of(source: Source | Path, files: list[Path], **changes: object) -> list[str | DataError]:
    """The name of the class of each file, or why it has none."""
    source = source_of_run(source) if isinstance(source, Path) else source
    answers = predict_files(source, files, **(OPTIONS | changes))
    return [answer.name if isinstance(answer, Prediction) else answer for answer in answers]


def parquet(folder: Path, files: list[Path]) -> Path:
    folder.mkdir()
    content = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": content, "label": list(range(len(files)))}), folder / "test-0.parquet")
    return folder


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


FILES: dict[str, Callable[[Path], Path]] = {
    "wide": lambda d: saved(d / "x.png", WIDE),
    "tall": lambda d: saved(d / "x.bmp", TALL),
    "small": lambda d: saved(d / "x.webp", SMALL, lossless=True),
    "photograph": lambda d: saved(d / "x.jpg", WIDE),
    "turned": lambda d: saved(d / "x.jpg", WIDE, exif=exif(6)),
    "turned in TIFF": lambda d: saved(d / "x.tif", WIDE, exif=exif(5)),
    "turned in PNG": lambda d: saved(d / "x.png", TALL, exif=exif(8)),
    "grey": lambda d: saved(d / "x.png", WIDE[..., 0]),
    "grey with alpha": lambda d: saved(d / "x.png", Image.fromarray(WIDE[..., 0]).convert("LA")),
    "bits": lambda d: saved(d / "x.png", Image.fromarray(WIDE).convert("1")),
    "palette": lambda d: saved(d / "x.gif", Image.fromarray(WIDE).quantize(9)),
    "opaque": lambda d: saved(d / "x.png", Image.fromarray(WIDE).convert("RGBA")),
}
REFUSED: dict[str, Callable[[Path], Path]] = {
    "16-bit": lambda d: saved(d / "x.png", Image.new("I;16", (9, 9))),
    "transparent": lambda d: saved(d / "x.png", Image.new("RGBA", (9, 9))),
    "transparent colour": lambda d: saved(d / "x.png", Image.new("RGB", (9, 9)), transparency=(0, 0, 0)),
    "CMYK": lambda d: saved(d / "x.jpg", Image.fromarray(WIDE).convert("CMYK")),
    "animated": lambda d: saved(
        d / "x.gif", Image.fromarray(WIDE), save_all=True, append_images=[Image.fromarray(WIDE[::-1])]
    ),
    "text": lambda d: (d / "x.png", d.mkdir(parents=True), (d / "x.png").write_text("x"))[0],
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_the_pixels_that_folders_and_shards_give(name: str, tmp_path: Path) -> None:
    """Greyscale is repeated over the channels."""
    files = [FILES[name](tmp_path / "set" / part) for part in "ab"]
    expected = load_images(tmp_path / "set", size=8).images[0]
    assert load_images(parquet(tmp_path / "shards", files), size=8).images[0].equal(expected)
    image = _read(files[0], (3, 8, 8), resized=True)
    assert isinstance(image, np.ndarray)
    assert image.tolist() == expected.expand(3, -1, -1).tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_where_folders_and_shards_refuse_it(name: str, tmp_path: Path) -> None:
    files = [REFUSED[name](tmp_path / "set" / part) for part in "ab"]
    messages = []
    for load in (lambda: load_images(tmp_path / "set"), lambda: load_images(parquet(tmp_path / "shards", files))):
        with pytest.raises(DataError) as caught:
            load()
        messages.append(str(caught.value))
    (answer,) = answers_of(model(tmp_path / "model"), files[:1])
    assert isinstance(answer, DataError)
    assert str(answer) == messages[0]
    assert messages[1].removeprefix(f"{tmp_path}/shards/test-0.parquet row 0") == messages[0].removeprefix(
        str(files[0])
    )


def test_images_of_another_size_need_a_model_that_resizes_or_the_word(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.png", WIDE)
    (answer,) = answers_of(model(tmp_path / "model"), [file])
    assert str(answer) == f"{file} is 30x12, the model takes 8x8; give --resize or resize it"
    resizing = model(tmp_path / "resizing", resized=True)
    assert image_form(resizing) == ImageForm((3, 8, 8), True)
    answers = answers_of(tmp_path / "model", [file], resize=True)
    assert answers == answers_of(resizing, [file])
    assert answers[0] in tuple("0123456789")


def test_a_colour_file_for_a_grey_model_is_refused(tmp_path: Path) -> None:
    grey = model(tmp_path / "model", channels=1)
    files = [saved(tmp_path / "x.png", WIDE[:8, :8]), saved(tmp_path / "y.png", WIDE[:8, :8, 0])]
    colour, answer = answers_of(grey, files)
    assert str(colour) == f"{files[0]} is in colour, the model takes greyscale; convert it to greyscale first"
    assert answer in tuple("0123456789")


@pytest.mark.parametrize("smoothed", [True, False])
def test_bad_files_are_named_and_the_others_are_answered_as_without_them(smoothed: bool, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", smoothed=smoothed)
    good = [saved(tmp_path / f"{number}.png", WIDE[:8, number : number + 8]) for number in range(3)]
    bad = [tmp_path / "missing.png", tmp_path / "text.png", tmp_path / "folder.png"]
    bad[1].write_text("x")
    bad[2].mkdir()
    alone = answers_of(folder, good)
    assert all(isinstance(one, str) for one in alone)
    mixed = answers_of(folder, [bad[0], good[0], bad[1], good[1], good[2], bad[2]])
    assert [mixed[row] for row in (1, 3, 4)] == alone
    for errors in ([mixed[row] for row in (0, 2, 5)], answers_of(folder, bad)):
        assert all(isinstance(error, DataError) for error in errors)
        assert all(str(file) in str(error) for file, error in zip(bad, errors, strict=True))


def test_the_command_answers_the_others_names_the_bad_and_fails(call: Call, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    file = saved(tmp_path / "good.png", WIDE[:8, :8])
    (tmp_path / "bad.png").write_text("x")
    done = call("predict", folder, tmp_path / "bad.png", file, tmp_path / "none.png")
    assert done.returncode == 1
    assert "good.png" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"rush: {tmp_path}/bad.png cannot be read as an image")
    assert lines[1].startswith(f"rush: {tmp_path}/none.png is missing")
    done = call("predict", folder, file)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.timeout(120)
def test_a_pipe_and_a_bomb_end_in_a_line_each(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", resized=True)
    os.mkfifo(tmp_path / "pipe.png")
    buffer = BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    done = in_its_own_process("predict", folder, tmp_path / "pipe.png", tmp_path / "bomb.png")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert "pipe.png is a pipe, socket or device, not an image file" in first
    assert "bomb.png is 20000x20000, at most 67108864 pixels are read" in second


def test_a_run_with_data_size_predicts_files_as_it_was_evaluated(tmp_path: Path) -> None:
    """Pictures three times as wide as high, whose central square is dark or bright and whose sides are the opposite.

    The squeezed picture would be taken for the other class: its mean is that of the sides.
    """
    for number in range(80):
        label = number % 2
        image = np.full((12, 36), 40 + 160 * (1 - label), np.uint8)
        image[:, 12:24] = 40 + 160 * label
        noisy = np.clip(image + RNG.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        saved(tmp_path / "set" / ("test" if number < 40 else "train") / "ab"[label] / f"{number}.png", noisy)
    run = run_tiny(
        tmp_path,
        *(f"data.name={tmp_path / 'set'}", "data.size=8", "pretrain.batch_size=8", "pretrain.epochs=1"),
        *("finetune.batch_size=8", "finetune.epochs=12", "pretrain.knn_neighbours=1"),
        stages=("pretrain", "finetune"),
    )
    test = load_images(tmp_path / "set", "test", size=8)
    answers = answers_of(run.path, [tmp_path / "set" / name for name in test.ids])
    assert answers == [test.classes[label] for label in test.labels.tolist()]


def test_predictions_are_certificates(tmp_path: Path) -> None:
    """Class, bound and radius are those of the two-class rule at nine tenths of the votes; the rest selects."""
    source = source_of_run(model(tmp_path / "model", smoothed=True))
    files = [saved(tmp_path / f"{number}.png", WIDE[:8, number : number + 8]) for number in range(6)]
    answers = predict_files(source, files, **(OPTIONS | {"num_samples": 1000}))
    x = torch.stack([torch.from_numpy(WIDE[:8, number : number + 8]).permute(2, 0, 1) for number in range(6)]) / 255
    labels = torch.zeros(6, dtype=torch.int64)
    certificates = rush.certify(source.model, (x, labels), num_selection=100, num_estimation=900, bound="two-classes")
    assert [answer.label if answer.label is not None else -1 for answer in answers] == list(certificates.prediction)
    assert [answer.radius for answer in answers] == list(certificates.radius)
    assert [answer.probability for answer in answers] == list(certificates.p_lower)
    assert certificates.radius.max() > 0
    for answer, counts in zip(answers, certificates.counts, strict=True):
        assert answer.share == counts.max() / 900
        assert answer.runner_up == (str(np.argsort(-counts, kind="stable")[1]) if answer.runner_up else None)


def test_folders_are_searched_and_every_file_is_answered_in_json(call: Call, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", smoothed=True)
    for name in ("a/2.png", "a/b/1.jpg", "0.png"):
        saved(tmp_path / "photos" / name, WIDE[:8, :8])
    (tmp_path / "photos/a/notes.txt").write_text("x")
    (tmp_path / "photos/bad.png").write_text("x")
    (tmp_path / "empty").mkdir()
    done = call("predict", folder, tmp_path / "photos", tmp_path / "empty", "--json", "--num-samples", 100)
    assert done.returncode == 1
    answers = json.loads(done.stdout)
    expected = [f"photos/{name}" for name in ("0.png", "a/2.png", "a/b/1.jpg", "bad.png")]
    assert [answer["image"].removeprefix(f"{tmp_path}/") for answer in answers] == [*expected, "empty"]
    assert {frozenset(answer) for answer in answers} == {frozenset((*Prediction.__annotations__, "error"))}
    assert [answer["error"] is None for answer in answers] == [True] * 3 + [False] * 2
    assert "empty is a" in done.stderr.splitlines()[-1]
    table = call("predict", folder, tmp_path / "photos", "--csv", "--num-samples", 100).stdout
    rows = list(csv.DictReader(table.splitlines()))
    for row, answer in zip(rows, answers, strict=False):
        assert row == {key: "" if value is None else str(value) for key, value in answer.items()}


def test_a_module_is_asked_like_a_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "predicted_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path / "x.png", WIDE)
    plain = ("predict", "--model", "predicted_models:net", file)
    assert call(*plain, "--classes", "dark,bright").stdout == f"{file}\tbright\n"
    cells = call(*plain, "--sigma", 0.1, "--num-classes", 2).stdout.rstrip("\n").split("\t")
    assert cells[:3] == [str(file), "1", "100.0 %"]
    assert cells[4].startswith("l2 0.2")
    assert "--classes names 3 classes, and the model has 2" in refusal(call(*plain, "--classes", "a,b,c"))
    assert "after the run folder" in refusal(call("predict", tmp_path))
    assert "give a run folder, or --model" in refusal(call("predict"))
    assert "belong to --model" in refusal(call("predict", tmp_path, file, "--sigma", 0.1))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_shows_the_answers(suffix: str, call: Call, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", smoothed=True)
    files = [saved(tmp_path / f"{number}.png", WIDE[:8, number : number + 8]) for number in range(10)]
    (tmp_path / "bad.png").write_text("x")
    drawn = tmp_path / f"answers.{suffix}"
    done = call("predict", folder, *files, tmp_path / "bad.png", "--picture", drawn, "--num-samples", 100)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 10
    if suffix == "png":
        with Image.open(drawn) as image:
            assert image.width > image.height
    else:
        assert drawn.read_text().count("<image") == 10
    assert "exists; give another file to --picture" in refusal(call("predict", folder, files[0], "--picture", drawn))
