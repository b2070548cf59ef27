"""Networks are the published ones, and a saved model comes back to the same bits or is refused, never unpickled."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F

import rush
from rush.choices import EncoderName, Stem
from rush.errors import ConfigError, InputError, RunError
from rush.models import pooling
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.resnet import ResNet
from rush.models.storage import SHIPPED, ClassifierSpec, load_smoothed, save_smoothed, save_weights
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.discrete import DiscreteGaussian
from rush.smoothing.noise import Gaussian
from test_official import PickledCall

ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)
TWO_STEMS = ("resnet18", "resnet34", "resnet50")
RESULTS = Path(__file__).parent.parent / "results"


def spec(
    encoder: EncoderName = "small", width: int = 4, in_channels: int = 1, classes: int = 10, stem: Stem = "small"
) -> ClassifierSpec:
    mean, std = [0.3, 0.5, 0.7][:in_channels], [0.2, 0.3, 0.4][:in_channels]
    return ClassifierSpec(encoder, width, in_channels, mean, std, tuple(map(str, range(classes))), stem)


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
    ("name", "width", "classes", "stem", "count"),
    [
        ("resnet18", 64, 10, "small", 11_173_962),  # kuangliu/pytorch-cifar, as quoted by papers on CIFAR-10
        ("resnet34", 64, 10, "small", 21_282_122),
        ("resnet50", 64, 10, "small", 23_520_842),
        ("resnet18", 64, 1000, "standard", 11_689_512),  # torchvision's tables of weights, ImageNet
        ("resnet34", 64, 1000, "standard", 21_797_672),
        ("resnet50", 64, 1000, "standard", 25_557_032),
        ("preactresnet18", 64, 10, "small", 11_172_170),  # papers on fast adversarial training: 11.17 M
        ("wideresnet28", 160, 10, "small", 36_479_194),  # Zagoruyko and Komodakis 2016, table 4: 36.5 M
        ("wideresnet34", 160, 10, "small", 46_160_474),  # TRADES, RobustBench: 46.2 M
        ("resnet18", 16, 10, "small", 701_466),
        ("small", 16, 10, "small", 23_040 + 144 + 224 + 2_570),  # 9 (w + 2w^2 + 8w^2), BatchNorm 2 (w + 2w + 4w), head
    ],
)
def test_networks_have_the_published_number_of_parameters(
    name: EncoderName, width: int, classes: int, stem: Stem, count: int
) -> None:
    with torch.device("meta"):
        network = spec(name, width, 1 if name == "small" else 3, classes, stem).build()
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", [8, 28, 32, 64, 96])
def test_representations_are_features_wide_at_every_image_size(name: EncoderName, side: int) -> None:
    factor = {"small": 16, "resnet50": 32, "wideresnet28": 4, "wideresnet34": 4}.get(name, 8)
    for stem in ("small", "standard") if name in TWO_STEMS else ("small",):
        encoder = build_encoder(name, 4, 3, stem).eval()
        assert encoder(pixels(2, 3, side)).shape == (2, encoder.features)
        assert encoder.features == factor * 4


@pytest.mark.parametrize(("stem", "side", "last"), [("small", 32, 4), ("standard", 96, 3), ("standard", 224, 7)])
def test_the_last_map_has_the_side_of_the_published_network(stem: Any, side: int, last: int) -> None:
    encoder = ResNet((2, 2, 2, 2), 4, 3, stem).eval()
    maps: list[Tensor] = []
    encoder.stages.register_forward_hook(lambda _module, _given, out: maps.append(out))
    encoder(pixels(1, 3, side))
    assert maps[0].shape == (1, 32, last, last)


class Textbook:
    """Networks written out from the equations of their papers over the weights of ``encoder``, one after the other."""

    def __init__(self, encoder: nn.Module) -> None:
        self.weights = encoder.state_dict()

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, gamma, beta = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return gamma * (x - mean) / (var + 1e-5).sqrt() + beta

    def basic(self, name: str, x: Tensor, stride: int) -> Tensor:
        out = self.norm(f"{name}.norm1", self.conv(f"{name}.conv1", x, stride)).relu()
        return (self.norm(f"{name}.norm2", self.conv(f"{name}.conv2", out)) + self.projected(name, x, stride)).relu()

    def bottleneck(self, name: str, x: Tensor, stride: int) -> Tensor:
        out = self.norm(f"{name}.norm1", self.conv(f"{name}.conv1", x)).relu()
        out = self.norm(f"{name}.norm2", self.conv(f"{name}.conv2", out, stride)).relu()
        return (self.norm(f"{name}.norm3", self.conv(f"{name}.conv3", out)) + self.projected(name, x, stride)).relu()

    def projected(self, name: str, x: Tensor, stride: int) -> Tensor:
        if f"{name}.shortcut.0.weight" not in self.weights:
            assert stride == 1
            return x
        return self.norm(f"{name}.shortcut.1", self.conv(f"{name}.shortcut.0", x, stride))

    def preact(self, name: str, x: Tensor, stride: int) -> Tensor:
        active = self.norm(f"{name}.norm1", x).relu()
        out = self.conv(f"{name}.conv1", active, stride)
        out = self.conv(f"{name}.conv2", self.norm(f"{name}.norm2", out).relu())
        if x.shape == out.shape:
            return x + out
        return self.conv(f"{name}.shortcut", active, stride) + out

    def stages(self, block: Callable[[str, Tensor, int], Tensor], repeats: tuple[int, ...], x: Tensor) -> Tensor:
        strides = [2 if stage and not repeat else 1 for stage, count in enumerate(repeats) for repeat in range(count)]
        for number, stride in enumerate(strides):
            x = block(f"stages.{number}", x, stride)
        return x


@pytest.mark.parametrize(
    ("name", "stem", "kind", "repeats"),
    [
        ("resnet18", "small", "basic", (2, 2, 2, 2)),
        ("resnet34", "standard", "basic", (3, 4, 6, 3)),
        ("resnet50", "small", "bottleneck", (3, 4, 6, 3)),
        ("resnet50", "standard", "bottleneck", (3, 4, 6, 3)),
        ("preactresnet18", "small", "preact", (2, 2, 2, 2)),
        ("wideresnet28", "small", "preact", (4, 4, 4)),
        ("wideresnet34", "small", "preact", (5, 5, 5)),
    ],
)
def test_networks_compute_what_their_papers_write(
    name: EncoderName, stem: Stem, kind: str, repeats: tuple[int, ...]
) -> None:
    width = 16 if name == "wideresnet34" else 4  # 16: the first block's shortcut is the identity there
    encoder = built(spec(name, width, 3, stem=stem)).encoder.double()
    book, x = Textbook(encoder), pixels(3, 3, 16).double()
    if kind == "preact":
        out = book.norm("norm", book.stages(book.preact, repeats, book.conv("stem", x))).relu()
    else:
        out = book.norm("stem.1", book.conv("stem.0", x, 2 if stem == "standard" else 1)).relu()
        out = F.max_pool2d(out, 3, 2, 1) if stem == "standard" else out
        out = book.stages(getattr(book, kind), repeats, out)
    expected = out.mean((2, 3))
    found = encoder(x)
    assert float(found.detach().std()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.std()))


def test_trained_weights_under_results_still_load_and_give_the_logits_they_gave() -> None:
    """Numbers of the first image from before there was any other network; the tolerance is another machine's."""
    x = torch.rand(4, 3, 32, 32, generator=stream(0, "pixels"))
    with torch.no_grad():
        found = load_smoothed(RESULTS / "cifar10-small/model", Execution()).classifier(x)[0]
    expected = [1.9240, -4.1895, 1.6885, 0.4471, 2.9367, -0.3258, 1.3547, -2.6215, 1.4182, -3.1107]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "stem", "text"),
    [
        ("vit", "small", f"unknown encoder 'vit'; allowed: {', '.join(ENCODERS)}"),
        *(
            (
                name,
                "standard",
                rf"'{name}' has no 'standard' stem, only 'small'; one of {', '.join(TWO_STEMS)} has both",
            )
            for name in ENCODERS
            if name not in TWO_STEMS
        ),
        ("small", "large", "unknown stem 'large'; allowed: small, standard"),
        ("resnet18", "large", "unknown stem 'large'; allowed: small, standard"),
    ],
)
def test_an_encoder_or_a_stem_that_does_not_exist_is_refused_with_those_that_do(
    name: Any, stem: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        build_encoder(name, 4, 3, stem)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_of_every_network_comes_from_the_stream(name: EncoderName) -> None:
    """No value of before survives; the same stream gives the same bits, another one others in every convolution."""
    one, other, elsewhere = (build_encoder(name, 4, 3) for _ in range(3))
    for tensor in one.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    first = seeded_init(one, stream(0, "weights")).state_dict()
    second = seeded_init(other, stream(0, "weights")).state_dict()
    third = seeded_init(elsewhere, stream(1, "weights")).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    drawn = [key for key in first if first[key].ndim == 4]
    assert drawn
    assert not any(torch.equal(first[key], third[key]) for key in drawn)
    x = pixels(2, 3)
    assert bool(one.eval()(x).isfinite().all())


@pytest.mark.parametrize(("name", "side", "last"), [("small", 8, 2), ("resnet18", 8, 1), ("wideresnet28", 4, 1)])
def test_a_last_map_of_the_wanted_side_is_not_averaged(name: EncoderName, side: int, last: int) -> None:
    """Same bits and gradients as by averages of single values, and still one function of a trace, which folds."""
    network = build_encoder(name, 2, 3).eval()
    seeded_init(network, stream(0, "weights"))
    x = torch.rand(5, 3, side, side, generator=stream(0, "images"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling.F, "adaptive_avg_pool2d", None)
        found = network(x.requires_grad_())
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "pooled", F.adaptive_avg_pool2d)
        expected = network(x)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), x)[0])
    traced = symbolic_trace(network)
    assert [node.args[1] for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "pooled"] == [last]
    larger = torch.rand(2, 3, 4 * side, 4 * side, generator=stream(1, "images"))
    assert torch.equal(traced(larger), network(larger))


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
    save_smoothed(folder, classifier, own, Gaussian(0.25), Execution(tile=64), (own.in_channels, 8, 8))
    return classifier


OWN = [*(spec(name, 4, 3) for name in ENCODERS), spec(), spec("resnet50", 4, 3, stem="standard")]


@pytest.mark.parametrize("own", OWN, ids=[*ENCODERS, "small grey", "resnet50 standard"])
def test_a_saved_model_gives_the_same_logits_to_the_bit(own: ClassifierSpec, tmp_path: Path) -> None:
    classifier = saved(tmp_path, own)
    loaded = rush.load(tmp_path, device="cpu")
    x = pixels(4, own.in_channels)
    assert torch.equal(loaded.classifier(x), classifier(x))
    assert (loaded.execution.tile, loaded.execution.precision) == (64, "float32")
    assert (loaded.sigma, loaded.num_classes, loaded.classes) == (0.25, 10, tuple("0123456789"))
    assert not loaded.classifier.training


def test_a_tile_that_the_images_chose_is_recorded_and_whatever_is_recorded_is_obeyed(tmp_path: Path) -> None:
    save_smoothed(tmp_path, built(spec()), spec(), Gaussian(0.25), Execution(), (1, 64, 64))
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["execution"]["tile"] == rush.load(tmp_path, device="cpu").execution.tile == 64
    description["execution"]["tile"] = 256
    (tmp_path / "model.json").write_text(json.dumps(description))
    for loaded in (rush.load(tmp_path, device="cpu"), load_smoothed(tmp_path, Execution())):
        assert loaded.execution.tile == 256  # type: ignore[union-attr]


def test_the_description_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose JSON is there is whole: a kill between the two files leaves no model."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rush.models.storage.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    with pytest.raises(RunError, match=r"model\.json is missing: .* holds no finished model"):
        load_smoothed(tmp_path, Execution())


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a directory; give a run folder"):
        rush.load(tmp_path / "nothing")


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle"])
def test_a_pickle_in_the_place_of_the_weights_does_not_run(by_torch: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    file, mark = tmp_path / "model.safetensors", tmp_path / "ran"
    payload = PickledCall(os.mkdir, str(mark))
    if by_torch:
        torch.save({"weights": payload}, file)
    else:
        file.write_bytes(pickle.dumps(payload))
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


class Foreign(nn.Module):
    """A network of other code, with a buffer."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(64, width)
        self.register_buffer("shift", torch.rand(1, generator=stream(0, "shift")))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + self.shift).flatten(1))


def test_a_saved_model_is_certified_with_the_same_bits(tmp_path: Path) -> None:
    """One that this library built, one of other code, and one that is not smoothed."""
    images = rush.load_images("digits", "test")[:10]
    built = seeded_init(ClassifierSpec("small", 4, 1, [0.5], [0.25], tuple("0123456789")).build(), stream(0, "w"))
    own = SmoothedClassifier(built.eval(), 0.25, 10, image_shape=(1, 8, 8))
    foreign = SmoothedClassifier(
        Foreign().eval(), noise=DiscreteGaussian(0.5), num_classes=10, classes=list("abcdefghij")
    )
    rush.save(own, tmp_path / "own")
    rush.save(foreign, tmp_path / "foreign")
    loaded = (rush.load(tmp_path / "own", "cpu"), rush.load(tmp_path / "foreign", "cpu", classifier=Foreign()))
    for before, after in zip((own, foreign), loaded, strict=True):
        assert (after.noise.name, after.sigma, after.classes) == (before.noise.name, before.sigma, before.classes)
        expected = rush.certify(before, (images.pixels(), images.labels), num_estimation=200)
        certificates = rush.certify(after, (images.pixels(), images.labels), num_estimation=200)
        np.testing.assert_array_equal(certificates.counts, expected.counts)
    rush.save(loaded[0], tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    (tmp_path / "own/model.json").rename(tmp_path / "own/config.json")  # as a hub has it
    assert rush.load(tmp_path / "own", "cpu").sigma == 0.25


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path: Path) -> None:
    smoothed = SmoothedClassifier(Foreign().eval(), 0.25, 10)
    rush.save(smoothed, tmp_path / "saved")
    with pytest.raises(RunError, match="exists and is not an empty folder"):
        rush.save(smoothed, tmp_path / "saved")
    with pytest.raises(InputError, match="got Foreign; wrap a network with"):
        rush.save(Foreign(), tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"weights of .*test_models\.Foreign, whose code is not .* classifier=network"):
        rush.load(tmp_path / "saved")
    with pytest.raises(RunError, match=r"'layer.weight' is .*, expected .*7, 64"):
        rush.load(tmp_path / "saved", classifier=Foreign(7))
    built = ClassifierSpec("small", 4, 1, [0.5], [0.25], ["a", "b"]).build().eval()
    with pytest.raises(InputError, match=r"give SmoothedClassifier\(\.\.\., image_shape=\(C, H, W\)\)"):
        rush.save(SmoothedClassifier(built, 0.25, 2), tmp_path / "other")
    rush.save(SmoothedClassifier(built, 0.25, 2, image_shape=(1, 8, 8)), tmp_path / "built")
    with pytest.raises(RunError, match="a network of this library; omit classifier"):
        rush.load(tmp_path / "built", classifier=Foreign())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_loaded_by_name_and_are_in_the_table(name: str, tmp_path: Path) -> None:
    model = rush.load(name, device="cpu")
    assert isinstance(model, SmoothedClassifier)
    assert model.fingerprint() == rush.load(RESULTS / name, device="cpu").fingerprint()
    assert f"| `{name}` |" in (RESULTS.parent / "docs/models.md").read_text()
    with pytest.raises(RunError, match=f"not a directory; .* the name of a shipped model: .*{name}"):
        rush.load(tmp_path / "nothing")
