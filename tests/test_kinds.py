"""Images are held against what the model takes, and the splits of a recipe against each other before any training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import rush
from commands import Call, refusal
from exact_models import Recorder
from rush.auditing.audit import audit
from rush.data import splits
from rush.data.images import ImageSet
from rush.data.kind import ImageKind
from rush.data.streaming import Stream
from rush.errors import ConfigError, DataError, InputError, ModelError
from rush.evaluation.attack import verdict
from rush.models.classifier import Normalize
from rush.models.storage import load
from rush.pipeline import train as training
from rush.pipeline.preconditions import check_run
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from tiny import tiny

DIGITS = tuple(str(digit) for digit in range(10))
THREAT = rush.ThreatModel("l2", 0.1)


def _images(*shape: int, count: int = 3) -> Tensor:
    return torch.rand(count, *shape, generator=stream(0, "kinds"))


def _labels(count: int = 3) -> Tensor:
    return torch.arange(count) % 2


def _set(shape: tuple[int, ...], classes: tuple[str, ...], labels: Tensor | None = None) -> ImageSet:
    pixels = (_images(*shape, count=6) * 255).to(torch.uint8)
    y = torch.arange(6) % len(classes) if labels is None else labels
    return ImageSet(pixels, y, classes, np.array([str(i) for i in range(6)]), "own", "test")


class Pooled(nn.Module):
    """A network for images of any size: what it takes is not told by its layers."""

    def __init__(self, channels: int, classes: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4, classes)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).mean((2, 3)))


class Brightness(nn.Module):
    """A network for images of any number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)


class Broadcast(nn.Module):
    """A normalization of somebody else's, which takes grey images in silence."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.21, 0.22]).view(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1) if x.shape[1] == 1 else x


class Coordinates(nn.Module):
    """Grey images with the row and the column as further planes."""

    def forward(self, x: Tensor) -> Tensor:
        side = torch.linspace(0, 1, x.shape[-1])
        planes = torch.stack(torch.meshgrid(side, side, indexing="ij")).expand(len(x), 2, -1, -1)
        return torch.cat([x, planes], 1)


def _smoothed(module: nn.Module, **given: object) -> rush.SmoothedClassifier:
    return rush.SmoothedClassifier(module.eval(), 0.25, 2, execution=Execution(tile=50), **given)  # type: ignore[arg-type]


def _doors(smoothed: rush.SmoothedClassifier, x: Tensor) -> dict[str, Callable[[], object]]:
    """A call of every door on the images ``x``."""
    y, generator = _labels(len(x)), stream(0, "door")
    return {
        "predict": lambda: smoothed.predict(x, num_samples=20),
        "log_probs": lambda: smoothed.log_probs(x, 2, generator),
        "as_module": lambda: smoothed.as_module(2, generator)(x),
        "counts": lambda: smoothed.counts(x, 20, smoothed.streams(0, "door", ["a"] * len(x))),
        "certify": lambda: rush.certify(smoothed, (x, y), num_selection=20, num_estimation=20),
        "attack": lambda: rush.attack(smoothed, (x, y), THREAT, steps=1, eot_samples=1, max_votes=100),
        "verdict": lambda: verdict(smoothed, (x, y), x, THREAT, max_votes=100),
        "audit": lambda: audit(smoothed, (x, y), THREAT, max_votes=100),
    }


DOORS = list(_doors(_smoothed(Pooled(3)), _images(3, 8, 8)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (3, 8, 9), (4, 8, 8)])
@pytest.mark.parametrize("door", DOORS)
def test_images_of_another_shape_are_refused_at_every_door(door: str, shape: tuple[int, ...]) -> None:
    smoothed = _smoothed(Pooled(3), image_shape=(3, 8, 8))
    with pytest.raises(InputError, match=rf"are {'x'.join(map(str, shape))} \(channels x .*those of the model 3x8x8"):
        _doors(smoothed, _images(*shape))[door]()


@pytest.mark.parametrize("door", ["predict", "log_probs", "counts", "certify", "verdict"])
def test_images_of_the_models_shape_are_taken(door: str) -> None:
    _doors(_smoothed(Pooled(3), image_shape=[3, 8, 8]), _images(3, 8, 8))[door]()
    _doors(_smoothed(Pooled(3)), _images(3, 8, 8))[door]()


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 8, 8), (3, 8, 0), (3, 8, 8.0), "388", 3, (True, 8, 8)])
def test_a_shape_that_is_none_is_refused(shape: object) -> None:
    with pytest.raises(InputError, match=r"image_shape must be \(channels, height, width\), three integers >= 1"):
        _smoothed(Pooled(3), image_shape=shape)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("first", [Broadcast, Repeat])
def test_grey_images_shown_to_a_colour_network_are_refused_at_every_door(door: str, first: type[nn.Module]) -> None:
    """One plane of noise would be shown three times."""
    smoothed = _smoothed(nn.Sequential(first(), Pooled(3)))
    with pytest.raises(InputError, match="have 1 channel, and the classifier repeats it to 3 before its first layer"):
        _doors(smoothed, _images(1, 8, 8))[door]()


def test_a_repeated_plane_is_found_before_a_linear_layer_too() -> None:
    flat = nn.Sequential(Broadcast(), nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(InputError, match="repeats it to 3"):
        _smoothed(flat).predict(_images(1, 8, 8))


def test_whoever_trained_on_repeated_planes_says_so() -> None:
    smoothed = _smoothed(nn.Sequential(Repeat(), Pooled(3)), image_shape=(1, 8, 8))
    x = _images(1, 8, 8)
    assert smoothed.predict(x, num_samples=20).shape == (3,)
    audit(smoothed, (x, _labels()), THREAT, max_votes=100)


@pytest.mark.parametrize(
    "network",
    [Pooled(1), nn.Sequential(Coordinates(), Pooled(3)), nn.Sequential(nn.PixelUnshuffle(2), Pooled(4)),
     nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), nn.Sequential(nn.Upsample(scale_factor=2), Pooled(1))],
    ids=["grey", "coordinates", "unshuffled", "linear", "upsampled"],
)  # fmt: skip
def test_grey_networks_take_grey_images(network: nn.Module) -> None:
    assert _smoothed(network).predict(_images(1, 8, 8), num_samples=20).shape == (3,)


def test_the_look_for_a_repeated_plane_is_one_call_that_ends_at_the_first_layer() -> None:
    recorder = Recorder(Pooled(1))
    smoothed = _smoothed(recorder)
    for _ in range(2):
        smoothed.check_shape((1, 8, 8))
    assert [len(batch) for batch in recorder.inputs] == [2]
    assert recorder.forward_rows == 2
    assert not any(layer._forward_pre_hooks for layer in recorder.modules())


def test_the_first_images_fix_the_number_of_channels() -> None:
    smoothed = _smoothed(Brightness())
    smoothed.predict(_images(3, 8, 8), num_samples=20)
    smoothed.predict(_images(3, 5, 5), num_samples=20)  # the size may change where no shape is known
    with pytest.raises(InputError, match=r"images have 1 channels, the first images .* had 3; make another"):
        smoothed.predict(_images(1, 8, 8), num_samples=20)


def test_images_that_the_classifier_could_not_take_fix_nothing() -> None:
    smoothed = _smoothed(Pooled(3))
    for _ in range(2):
        with pytest.raises((RuntimeError, ModelError), match="to have 3 channels"):
            smoothed.predict(_images(1, 8, 8), num_samples=20)
    smoothed.predict(_images(3, 8, 8), num_samples=20)


@pytest.mark.parametrize("door", DOORS[:-1])
def test_every_door_fixes_the_number_of_channels(door: str) -> None:
    smoothed = _smoothed(Brightness())
    _doors(smoothed, _images(3, 8, 8))[door]()
    with pytest.raises(InputError, match="the first images of this classifier had 3"):
        smoothed.check_shape((1, 8, 8))


def test_the_librarys_normalization_takes_its_own_number_of_channels_alone() -> None:
    normalize = Normalize([0.4, 0.5, 0.6], [0.2, 0.2, 0.2])
    assert normalize(_images(3, 2, 2)).shape == (3, 3, 2, 2)
    for shape in ((1, 2, 2), (4, 2, 2)):
        with pytest.raises(ModelError, match=r"normalization takes \(B, 3, H, W\); give images of 3 channels"):
            normalize(_images(*shape))
    with pytest.raises(ModelError, match="normalization takes"):
        rush.attack(nn.Sequential(normalize, Pooled(3)).eval(), (_images(1, 8, 8), _labels()), THREAT, steps=1)


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (("cat", "horse"), r"cat, horse against cat, dog, horse \(2 and 3 classes\)"),
        (("cat", "horse", "dog"), r"cat, horse, dog against cat, dog, horse \(in a different order\)"),
        (("cat", "dog", "horse", "cow"), r"cat, dog, horse, cow against cat, dog, horse \(4 and 3 classes\)"),
    ],
)
def test_other_class_names_or_another_order_are_refused_with_both_lists(classes: tuple[str, ...], text: str) -> None:
    smoothed = rush.SmoothedClassifier(Pooled(3, 3), 0.25, 3, classes=["cat", "dog", "horse"])
    images = _set((3, 8, 8), classes)
    for call in (
        lambda: rush.certify(smoothed, images, num_selection=20, num_estimation=20),
        lambda: rush.attack(smoothed, images, THREAT, "none", max_votes=100),
        lambda: audit(smoothed, images, THREAT, max_votes=100),
    ):
        with pytest.raises(InputError, match=text):
            call()


def test_the_same_classes_and_their_beginning_are_taken_and_unknown_ones_too() -> None:
    names = ["cat", "dog", "horse"]
    known = rush.SmoothedClassifier(Pooled(3, 3), 0.25, 3, classes=names)
    assert known.kind == ImageKind(None, ("cat", "dog", "horse"))
    for classes in (("cat", "dog", "horse"), ("cat", "dog")):
        rush.certify(known, _set((3, 8, 8), classes), num_selection=20, num_estimation=20)
    unknown = rush.SmoothedClassifier(Pooled(3, 3), 0.25, 3)
    assert unknown.classes == ("0", "1", "2")
    rush.certify(unknown, _set((3, 8, 8), ("a", "b", "c")), num_selection=20, num_estimation=20)
    long = tuple(f"class {number}" for number in range(100))
    with pytest.raises(InputError, match="first difference is label 7, 'other' against 'class 7'"):
        ImageKind(None, long).check_classes((*long[:7], "other", *long[8:]), "the images", "the model")


def test_names_of_classes_may_be_numbers() -> None:
    known = rush.SmoothedClassifier(Pooled(3, 3), 0.25, 3, classes=[0, 1, 2])  # type: ignore[list-item]
    assert known.classes == ("0", "1", "2")


def test_a_network_in_training_mode_is_not_called_on_grey_images() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), Pooled(1)).eval()
    smoothed = _smoothed(network)
    network.train()
    with pytest.raises(ModelError, match="training mode"):
        smoothed.predict(_images(1, 8, 8), num_samples=20)
    assert network[0].running_mean is not None
    assert float(network[0].running_mean.abs().max()) == 0


def test_an_audit_of_a_model_in_training_mode_keeps_what_the_model_takes() -> None:
    smoothed = rush.SmoothedClassifier(Pooled(3).train(), 0.25, 2)
    audit(smoothed, _set((3, 8, 8), ("a", "b")), THREAT, max_votes=100)  # its names, "0" and "1", are not known ones


# Runs and their recipes


def test_a_runs_model_knows_its_images(tiny_run: Path) -> None:
    smoothed = load(tiny_run)
    assert isinstance(smoothed, rush.SmoothedClassifier)
    assert smoothed.image_shape == (1, 8, 8)
    assert smoothed.kind == ImageKind((1, 8, 8), DIGITS)
    with pytest.raises(InputError, match=r"3x8x8 .* those of the model 1x8x8"):
        smoothed.predict(_images(3, 8, 8))


def test_a_plain_runs_classifier_and_what_is_made_of_it_know_their_images(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run / "model", tmp_path / "plain")
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**values, "noise": {"name": "none"}}))
    plain = load(folder)
    assert isinstance(plain, nn.Module)
    for model in (plain, rush.SmoothedClassifier(plain, 0.25, 10)):
        with pytest.raises(InputError, match=r"1x9x9 .* those of the model 1x8x8"):
            rush.attack(model, (_images(1, 9, 9), _labels()), THREAT, "none")
        with pytest.raises(InputError, match=r"own .test. have different classes from the model: a, b against 0, 1,"):
            rush.attack(model, _set((1, 8, 8), ("a", "b")), THREAT, "none")


def _npz(
    file: Path,
    shape: tuple[int, ...],
    classes: tuple[str, ...] = ("a", "b"),
    test: tuple[int, ...] | None = None,
    **changes: np.ndarray | None,
) -> Path:
    """A data set of 160 training and 12 test images, the latter of the shape ``test``; None omits an array."""
    arrays: dict[str, np.ndarray | None] = {"classes": np.array(classes)}
    for number, (split, size, count) in enumerate((("train", shape, 160), ("test", test or shape, 12))):
        draws = np.random.default_rng(number)
        arrays[f"x_{split}"] = draws.integers(0, 256, (count, *size), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % len(classes)
    np.savez(file, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return file


@pytest.mark.parametrize("command", ["audit", "ladder"])
@pytest.mark.parametrize(
    ("shape", "names", "told"),
    [
        ((1, 12, 12), DIGITS, "are 1x12x12 (channels x height x width), those of the model 1x8x8"),
        ((3, 8, 8), DIGITS, "are 3x8x8 (channels x height x width), those of the model 1x8x8"),
        ((1, 8, 8), DIGITS[::-1], f"{', '.join(DIGITS[::-1])} against {', '.join(DIGITS)} (in a different order)"),
        ((1, 8, 8), ("a", "b"), f"a, b against {', '.join(DIGITS)} (2 and 10 classes)"),
    ],
)
def test_commands_refuse_a_run_and_other_data(
    command: str, shape: tuple[int, ...], names: tuple[str, ...], told: str, call: Call, tiny_run: Path, tmp_path: Path
) -> None:
    data = _npz(tmp_path / "data.npz", shape, names)
    given = (command, "--model", tiny_run, "--images", 2, "--norm", "l2", "--epsilon", "0.1", "--data", data)
    assert told in refusal(call(*given))


def test_verdict_refuses_a_run_and_points_of_another_size(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "points.npz"
    x = _images(1, 9, 9).numpy()
    np.savez(file, adversarial=x, images=x, labels=np.array([0, 1, 2]))
    assert "1x9x9" in refusal(call("verdict", file, "--model", tiny_run))
    np.savez(file, adversarial=x)
    other = _npz(tmp_path / "size.npz", (1, 9, 9), DIGITS)
    assert "1x9x9" in refusal(call("verdict", file, "--model", tiny_run, "--data", other))


def _run_on(data: Path, folder: Path, *overrides: str) -> RunFolder:
    return RunFolder.create(folder / "run", tiny(folder, f"data.name={json.dumps(str(data))}", *overrides))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test that asks for it may get as far as a training."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a training was begun")

    monkeypatch.setattr(training, "pretrain", refuse)
    monkeypatch.setattr(training, "finetune", refuse)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("train", "test", "text"),
    [
        ((1, 8, 8), (3, 8, 8), "are 3x8x8 .* 1x8x8"),
        ((3, 8, 8), (1, 8, 8), "are 1x8x8 .* 3x8x8"),
        ((1, 12, 12), (1, 16, 16), "are 1x16x16 .* 1x12x12"),
    ],
)
def test_splits_of_other_shapes_are_refused_before_any_training(
    train: tuple[int, ...], test: tuple[int, ...], text: str, tmp_path: Path
) -> None:
    run = _run_on(_npz(tmp_path / "data.npz", train, test=test), tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"data \(test\) {text}"):
            run_stage(run, "pretrain")
    assert not (run.path / "provenance.json").exists()  # other images may still be given
    check_run(_run_on(_npz(tmp_path / "data.npz", train), tmp_path, "certify.images=5", "attack.images=5"))


@pytest.mark.usefixtures("untrained")
def test_a_streamed_split_is_held_against_the_others_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, draws = tmp_path / "data", np.random.default_rng(0)
    for split, count, side in (("train", 70, 8), ("test", 3, 12)):
        for name in ("cat", "dog"):
            (data / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (side, side), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{number}.png")
    given = ("data.memory_gb=0.000001", "certify.images=6", "attack.images=6")
    monkeypatch.setattr(Stream, "holding_out", lambda *_: pytest.fail("training images were read"))
    with pytest.raises(DataError, match=r"data \(test\) are 1x12x12 .* data \(train\) 1x8x8"):
        run_stage(_run_on(data, tmp_path, *given), "pretrain")


@pytest.mark.usefixtures("untrained")
def test_splits_of_other_classes_are_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reader gives such splits today, each names the classes of the whole data set; the door does not rely on it."""
    loaded = splits.load_images

    def renamed(name: str, split: str, **given: object) -> ImageSet:
        images = loaded(name, split=split, **given)  # type: ignore[arg-type]
        return replace(images, classes=images.classes[::-1]) if split == "test" else images

    monkeypatch.setattr(splits, "load_images", renamed)
    run = _run_on(_npz(tmp_path / "data.npz", (1, 8, 8), ("a", "b", "c")), tmp_path)
    told = r"data \(test\) have different classes from data \(train\): c, b, a against a, b, c"
    with pytest.raises(DataError, match=told):
        run_stage(run, "pretrain")


@pytest.mark.usefixtures("untrained")
def test_images_for_pretraining_alone_need_the_shape_and_no_classes(tmp_path: Path) -> None:
    def run(*shape: int) -> RunFolder:
        file = _npz(tmp_path / "data.npz", (1, 8, 8), x_more=np.zeros((130, *shape), np.uint8))
        return _run_on(file, tmp_path, 'data.pretrain_split="more"', "certify.images=5", "attack.images=5")

    for shape, text in (((1, 10, 10), r"data \(more\) are 1x10x10 .* 1x8x8"), ((3, 8, 8), r"data \(more\) are 3x8x8")):
        with pytest.raises(DataError, match=text):
            run_stage(run(*shape), "pretrain")
    check_run(run(1, 8, 8))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["certify.images=13"], "asks for 13 test images, data has 12"),
        (["attack.images=13"], "asks for 13 test images, data has 12"),
        (["finetune.labels_per_class=200"], "asks for 400 labelled images of the 160"),
        (["finetune.label_fraction=0.001"], "asks for 0 labelled images .* at least one per class, 2"),
        (["finetune.label_fraction=0.5"], "batch_size = 128 exceeds the 80 training images"),
        (["certify.radii=[0.0, 3.0]"], "certify: radius 3 cannot be certified"),
        (["certify.level=family", "certify.num_estimation=10"], "certify: num_estimation"),
        (["attack.alpha=1e-125"], r"attack: no verdict can be given .* give at least 4\d\d, or"),
        (["audit.alpha=1e-125"], r"audit: no verdict can be given .* give at least 4\d\d, or"),
        (["audit.rung=eot-3"], "the ladder has no rung 'eot-3'; it has clean, transfer, frozen"),
    ],
)
def test_numbers_that_stop_a_later_stage_are_refused_before_any_training(
    overrides: list[str], text: str, tmp_path: Path
) -> None:
    data = _npz(tmp_path / "data.npz", (1, 8, 8))
    given = {"certify.images": "12", "attack.images": "12"}
    for override in overrides:
        given.pop(override.partition("=")[0], None)
    with pytest.raises(ConfigError, match=text):
        run_stage(_run_on(data, tmp_path, *(f"{k}={v}" for k, v in given.items()), *overrides), "pretrain")


@pytest.mark.usefixtures("untrained")
def test_images_of_one_class_are_refused_before_any_training(tmp_path: Path) -> None:
    file = _npz(tmp_path / "data.npz", (1, 8, 8), y_train=np.ones(160, np.int64))
    told = r"\(train\): all 160 images have the class 'b'; a classifier needs at least two"
    with pytest.raises(DataError, match=told):
        run_stage(_run_on(file, tmp_path, "certify.images=5", "attack.images=5"), "pretrain")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_whole_run_without_labels_is_refused_before_its_first_training(
    split: str, call: Call, tmp_path: Path
) -> None:
    file = _npz(tmp_path / "data.npz", (1, 8, 8), **{f"y_{split}": None})  # type: ignore[arg-type]
    run = _run_on(file, tmp_path, "certify.images=5", "attack.images=5")
    assert f"data ({split}) has no labels; fine-tuning" in refusal(call("run", run.path))
