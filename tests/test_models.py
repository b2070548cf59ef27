"""Networks are the published ones, and a saved model comes back to the same bits or is refused, never unpickled."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rush
from rush.engine.precision import Execution
from rush.errors import ConfigError, RunError
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.resnet import ResNet
from rush.options import EncoderName
from rush.randomness import seeded_init, stream
from rush.saving import ClassifierSpec, load_smoothed, save_smoothed, save_weights


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def spec(encoder: EncoderName = "small", width: int = 4, in_channels: int = 1) -> ClassifierSpec:
    mean, std = [0.3, 0.5, 0.7][:in_channels], [0.2, 0.3, 0.4][:in_channels]
    return ClassifierSpec(encoder, width, in_channels, mean, std, tuple("abcdefghij"))


def built(own: ClassifierSpec, seed: int = 0) -> Classifier:
    """Seeded weights, and BatchNorm statistics that are not the identity."""
    classifier = own.build()
    generator = stream(seed, "weights")
    seeded_init(classifier, generator)
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return classifier.eval()


def pixels(rows: int = 4, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(rows, channels, side, side, generator=stream(0, "pixels"))


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("resnet18", 64, 11_173_962),  # kuangliu/pytorch-cifar, as quoted by papers on CIFAR-10
        ("resnet34", 64, 21_282_122),
        ("resnet18", 16, 701_466),
        ("small", 16, 23_040 + 144 + 224 + 2_570),  # 9 (w + 2w^2 + 8w^2), BatchNorm 2 (w + 2w + 4w), head
    ],
)
def test_networks_have_the_published_number_of_parameters(name: EncoderName, width: int, count: int) -> None:
    assert parameters(spec(name, width, 1 if name == "small" else 3).build()) == count


@pytest.mark.parametrize("side", [8, 28, 32, 64, 96])
def test_representations_are_features_wide_at_every_image_size(side: int) -> None:
    for name in ("small", "resnet18"):
        encoder = build_encoder(name, 4, 3).eval()
        assert encoder(pixels(2, 3, side)).shape == (2, encoder.features)


@pytest.mark.parametrize(("stem", "side", "last"), [("small", 32, 4), ("standard", 96, 3), ("standard", 224, 7)])
def test_the_last_map_has_the_side_of_the_published_network(stem: Any, side: int, last: int) -> None:
    encoder = ResNet((2, 2, 2, 2), 4, 3, stem).eval()
    maps: list[Tensor] = []
    encoder.stages.register_forward_hook(lambda _module, _given, out: maps.append(out))
    encoder(pixels(1, 3, side))
    assert maps[0].shape == (1, 32, last, last)


def test_an_unknown_encoder_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown encoder 'resnet50'; allowed: small, resnet18, resnet34"):
        build_encoder("resnet50", 64, 3)  # type: ignore[arg-type]


def test_normalization_is_per_channel_and_inside_the_classifier() -> None:
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.25, 0.5]
    x = pixels(2, 3)
    expected = torch.stack([(x[:, channel] - mean[channel]) / std[channel] for channel in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected, atol=1e-6, rtol=0)
    classifier = built(spec("resnet18", 4, 3))
    assert torch.equal(classifier(x), classifier.head(classifier.encoder(classifier.normalize(x))))
    assert torch.equal(classifier.represent(x), classifier.encoder(classifier.normalize(x)))
    assert not torch.allclose(classifier(x), classifier.head(classifier.encoder(x)), atol=1e-3)


def saved(folder: Path, own: ClassifierSpec | None = None) -> Classifier:
    own = own or spec()
    classifier = built(own)
    save_smoothed(folder, classifier, own, 0.25, Execution(tile=64), (own.in_channels, 8, 8))
    return classifier


@pytest.mark.parametrize("own", [spec(), spec("resnet18", 4, 3)], ids=["small", "resnet18"])
def test_a_saved_model_gives_the_same_logits_to_the_bit(own: ClassifierSpec, tmp_path: Path) -> None:
    classifier = saved(tmp_path, own)
    loaded = load_smoothed(tmp_path, Execution())
    x = pixels(4, own.in_channels)
    assert torch.equal(loaded.classifier(x), classifier(x))
    assert (loaded.sigma, loaded.num_classes, loaded.classes) == (0.25, 10, tuple("abcdefghij"))
    assert not loaded.classifier.training


def test_load_takes_the_recorded_tile_and_precision(tmp_path: Path) -> None:
    saved(tmp_path)
    execution = rush.load(tmp_path, device="cpu").execution
    assert (execution.tile, execution.precision) == (64, "float32")


def test_the_description_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose JSON is there is whole: a kill between the two files leaves no model."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rush.saving.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    with pytest.raises(RunError, match=r"model\.json is missing: .* holds no finished model"):
        load_smoothed(tmp_path, Execution())


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.json"
        description = json.loads(file.read_text())
        change(description)
        file.write_text(json.dumps(description))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (removed("model.json"), r"model\.json is missing"),
        (cut("model.json"), r"model\.json is damaged"),
        (replaced("model.json", b"\xff\xfe{"), r"model\.json is damaged"),
        (replaced("model.json", b"[1]"), r"model\.json is damaged"),
        (edited(lambda d: d.pop("noise")), r"model\.json is damaged"),
        (edited(lambda d: d["classifier"].pop("width")), r"model\.json is damaged"),
        (edited(lambda d: d["classifier"].update(heads=2)), r"model\.json is damaged"),
        (edited(lambda d: d["classifier"].update(width="4")), r"model\.json is damaged"),
        (edited(lambda d: d["noise"].update(sigma=-1)), r"model\.json is damaged"),
        (edited(lambda d: d.update(format=99)), r"format 99, this version reads 1; update"),
        (edited(lambda d: d["classifier"].update(encoder="vit")), r"unknown encoder 'vit'"),
        (edited(lambda d: d["classifier"].update(width=8)), r"model\.safetensors does not fit"),
        (removed("model.safetensors"), r"model\.safetensors is missing"),
        (cut("model.safetensors"), r"model\.safetensors does not fit or is damaged"),
        (replaced("model.safetensors", b"\x80\x04"), r"model\.safetensors does not fit or is damaged"),
    ],
)
def test_a_damaged_model_is_refused_by_the_name_of_its_file(
    damage: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=text):
        rush.load(tmp_path, device="cpu")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no folder; give a run folder"):
        rush.load(tmp_path / "nothing")


class Payload:
    """Pickles into a call of ``os.mkdir``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle"])
def test_a_pickle_in_the_place_of_the_weights_does_not_run(by_torch: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    file, mark = tmp_path / "model.safetensors", tmp_path / "ran"
    if by_torch:
        torch.save({"weights": Payload(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RunError, match=r"model\.safetensors does not fit or is damaged"):
        rush.load(tmp_path, device="cpu")
    assert not mark.exists()
    if by_torch:  # under another name, as newer versions of torch read *.safetensors as such themselves
        torch.load(file.rename(tmp_path / "model.pt"), weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert mark.exists(), "the payload is no payload: this test proves nothing"


def test_saved_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640
