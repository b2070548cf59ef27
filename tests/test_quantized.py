"""Networks in 8-bit integers: exact sums, the derivative of the float network, saved and certified as what they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush
from commands import Call
from documentation import block_with
from rush.choices import EncoderName
from rush.errors import ConfigError, InputError, ModelError, RunError
from rush.exporting.onnx import export_onnx
from rush.models.classifier import Represent
from rush.models.storage import ClassifierSpec
from rush.recipe.load import load_recipe
from rush.runtime.execution import Execution, check_integers, decide_execution, in_precision
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.quantized import Quantized, quantized, with_ranges, without_ranges
from tiny import run_tiny, tiny, write_tiny

VNNI = bool(getattr(torch.cpu, "_is_vnni_supported", bool)())
integers_here = pytest.mark.skipif(not VNNI, reason="needs a processor with integer dot products (VNNI)")


def images(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """8-bit images of different brightness."""
    generator = stream(seed, "quantized/images")
    return (255 * torch.rand(count, 1, 1, 1, generator=generator) * torch.rand(
        count, channels, side, side, generator=generator
    )).round() / 255  # fmt: skip


def network(encoder: EncoderName = "small", width: int = 4) -> nn.Module:
    """A classifier with weights and statistics as after a training."""
    spec = ClassifierSpec(encoder, width, 3, (0.5,) * 3, (0.25,) * 3, tuple("0123"))
    built = seeded_init(spec.build(), stream(0, "quantized")).train()
    with torch.no_grad():
        for _ in range(20):
            built(images(64, seed=1))
    return built.eval().requires_grad_(False)


def smoothed(sigma: float = 0.1) -> rush.SmoothedClassifier:
    noise = rush.DiscreteGaussian(sigma)
    return rush.SmoothedClassifier(network(), noise=noise, num_classes=4, image_shape=(3, 8, 8))


@integers_here
def test_a_layer_is_what_its_integers_say() -> None:
    """relu(conv(x)) by integer arithmetic in NumPy: quantize, sum of products, scale, round, add the zero point."""
    generator = stream(0, "quantized/layer")
    layer = nn.Conv2d(3, 5, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        assert layer.bias is not None
        layer.bias.copy_(torch.randn(5, generator=generator))
    (in_scale, in_zero), (out_scale, out_zero) = ranges = [(0.02, 100), (0.15, 0)]
    x = 2 * torch.randn(4, 3, 6, 6, generator=generator)
    integral = Quantized(nn.Sequential(layer, nn.ReLU()), ranges)
    found = integral(x)

    scales = layer.weight.detach().abs().amax((1, 2, 3)).double().numpy() / 127.5  # of signed integers
    stored = integral._forms[0].get_submodule("0").weight().int_repr().double().numpy()  # type: ignore[operator]
    assert np.abs(stored - layer.weight.detach().double().numpy() / scales[:, None, None, None]).max() < 0.501
    integers = np.clip(np.rint(x.double().numpy() / in_scale) + in_zero, 0, 255) - in_zero
    sums = nn.functional.conv2d(torch.from_numpy(integers), torch.from_numpy(stored), padding=1).numpy()
    bias = layer.bias.detach().double().numpy()[:, None, None]
    exact = (sums * (in_scale * scales)[:, None, None] + bias) / out_scale
    expected = np.clip(np.rint(exact) + out_zero, 0, 255)
    apart = np.abs(np.rint(found.double().numpy() / out_scale) - expected)
    assert apart.max() <= 1  # where float32 rounds a value to another side of a half
    assert apart.mean() < 0.01
    assert len(np.unique(expected)) > 50


@integers_here
@pytest.mark.parametrize("encoder", get_args(EncoderName))
def test_every_encoder_is_quantized(encoder: EncoderName) -> None:
    plain, x = network(encoder, 1 if encoder.startswith("wide") else 4), images(64, seed=2)
    found = quantized(plain, images(256, seed=3))
    assert isinstance(found.encoder, Quantized)
    expected = plain(x)
    assert (found(x) - expected).std() < 0.5 * expected.std()  # 0.02 to 0.4 with these narrow, untrained networks
    assert not torch.equal(found(x), expected)


@integers_here
def test_an_image_has_the_same_bits_in_every_batch_and_at_every_row() -> None:
    """Up to the float32 layers at the end, which the features are before."""
    classifier, x = quantized(network("resnet18"), images(64)), images(64, seed=2)
    found = Represent(classifier)  # type: ignore[arg-type]
    whole = found(x)
    assert torch.equal(found(x), whole)
    assert torch.equal(torch.cat([found(part) for part in x.split(7)]), whole)
    assert torch.equal(found(x.roll(1, 0)).roll(-1, 0), whole)
    assert torch.equal(found(x.contiguous(memory_format=torch.channels_last)), whole)


@integers_here
def test_value_of_the_integers_and_derivative_of_the_float_network() -> None:
    plain = network()
    found, x = quantized(plain, images(64)), images(8, seed=2)
    points = [x.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn(8, 4, generator=stream(0, "quantized/weights"))
    values = [model(point) for model, point in zip((found, plain), points, strict=True)]
    for value in values:
        (value * weights).sum().backward()
    torch.testing.assert_close(values[0].detach(), found(x), rtol=1e-5, atol=1e-5)
    assert points[0].grad is not None
    torch.testing.assert_close(points[0].grad, points[1].grad, rtol=1e-4, atol=1e-5)


@integers_here
def test_the_calibrated_network_is_left_as_it_is() -> None:
    plain = network()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    found = quantized(plain, images(64))
    after = plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    inner, ranges = without_ranges(found)
    assert ranges is not None
    assert inner.state_dict().keys() == before.keys()
    assert torch.equal(with_ranges(inner, ranges)(images(4)), found(images(4)))
    assert without_ranges(plain) == (plain, None)


@integers_here
def test_a_saved_one_is_loaded_with_the_same_bits(tmp_path: Path) -> None:
    found = smoothed().quantized(images(64))
    assert found.execution == in_precision(Execution(), "int8")
    rush.save(found, tmp_path / "model")
    loaded = rush.load(tmp_path / "model")
    assert isinstance(loaded, rush.SmoothedClassifier)
    assert loaded.execution.precision == "int8"
    assert torch.equal(loaded.classifier(images(9)), found.classifier(images(9)))
    description = json.loads((tmp_path / "model/model.json").read_text())
    assert description["execution"]["precision"] == "int8"
    assert len(description["activations"]["scales"]) == len(description["activations"]["zero_points"]) == 5


@integers_here
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block_with("docs/models.md", "quantized"), {"smoothed": smoothed(), "images": images(64), "rush": rush})
    assert isinstance(rush.load("int8-model"), rush.SmoothedClassifier)


@integers_here
def test_a_network_of_other_code_is_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        return seeded_init(layers, stream(0, "quantized/own")).eval()

    found = rush.SmoothedClassifier(build(), 0.1, 4, image_shape=(3, 8, 8)).quantized(images(64))
    assert isinstance(found.classifier, Quantized)
    rush.save(found, tmp_path / "model")
    loaded = rush.load(tmp_path / "model", classifier=build())
    assert isinstance(loaded, rush.SmoothedClassifier)
    assert torch.equal(loaded.classifier(images(9)), found.classifier(images(9)))


def _precision(description: dict[str, Any]) -> None:
    description["execution"]["precision"] = "float32"


def _missing(description: dict[str, Any]) -> None:
    del description["activations"]


def _fewer(description: dict[str, Any]) -> None:
    description["activations"] = {name: values[:-1] for name, values in description["activations"].items()}


def _uneven(description: dict[str, Any]) -> None:
    description["activations"]["scales"].pop()


def _too_large(description: dict[str, Any]) -> None:
    description["activations"]["zero_points"][0] = 256


def _zero(description: dict[str, Any]) -> None:
    description["activations"]["scales"][0] = 0.0


@integers_here
@pytest.mark.parametrize("damage", [_precision, _missing, _fewer, _uneven, _too_large, _zero])
def test_a_damaged_description_is_refused(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    rush.save(smoothed().quantized(images(64)), tmp_path / "model")
    file = tmp_path / "model/model.json"
    description = json.loads(file.read_text())
    damage(description)
    file.write_text(json.dumps(description))
    with pytest.raises(RunError, match="damaged"):
        rush.load(tmp_path / "model")


@integers_here
def test_it_is_another_classifier_for_records() -> None:
    plain = smoothed()
    prints = {plain.fingerprint(), *(plain.quantized(images(64, seed=seed)).fingerprint() for seed in (0, 5))}
    assert len(prints) == 3


def test_precision_and_network_must_fit() -> None:
    with pytest.raises(InputError, match=r"SmoothedClassifier\.quantized makes"):
        rush.SmoothedClassifier(network(), 0.1, 4, execution=in_precision(Execution(), "int8"))


@integers_here
def test_a_network_in_integers_needs_its_precision() -> None:
    with pytest.raises(InputError, match="do not fit"):
        rush.SmoothedClassifier(quantized(network(), images(64)), 0.1, 4)


def test_other_devices_and_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="for the CPU, and the device is cuda:0"):
        check_integers("cuda:0")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    for door in (lambda: decide_execution("cpu", "int8"), lambda: smoothed().quantized(images(64))):
        with pytest.raises(ConfigError, match="integer dot products"):
            door()


@integers_here
def test_training_uses_floats() -> None:
    assert decide_execution("cpu", "int8") == decide_execution("cpu", "auto")


class Branching(nn.Module):
    """A network whose forward depends on values, which no symbolic trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else -x.mean((2, 3))


@integers_here
def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be traced for quantization"):
        quantized(Branching().eval(), images(64))


@integers_here
def test_it_is_not_exported_to_onnx(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="8-bit integers cannot be exported"):
        export_onnx(smoothed().quantized(images(64)), tmp_path / "model.onnx", image_shape=(3, 8, 8))


@pytest.mark.parametrize(
    "overrides",
    [
        ("smoothing.sigma=0", 'finetune.objective="standard"'),
        ('execution.compile="default"',),
    ],
)
def test_recipes_that_cannot_have_integers_are_refused(overrides: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 is for smoothed classifiers that are not compiled"):
        load_recipe(str(write_tiny(tmp_path)), ('execution.precision="int8"', *overrides))


@integers_here
def test_a_run_in_integers_is_certified_attacked_audited_and_verified(tmp_path: Path, call: Call) -> None:
    run = run_tiny(tmp_path, 'execution.precision="int8"')
    model = rush.load(run.path, device="auto")
    assert isinstance(model, rush.SmoothedClassifier)
    assert model.execution.precision == "int8"
    assert json.loads((run.path / "stages/finetune.json").read_text())["forward"]["precision"] == "int8"
    assert {stage for stage in run.recipe.stages if run.finished(stage)} == set(run.recipe.stages)
    assert "same" in call("verify", str(run.path), "--images", "3").stdout


@integers_here
def test_it_answers_as_the_float_network_does(tmp_path: Path) -> None:
    """Of the trained digits network, on 100 images: as many right answers, up to 3, and radii of the same size."""
    run = run_tiny(tmp_path, "finetune.epochs=30", "pretrain.epochs=10", stages=("pretrain", "finetune"))
    plain = rush.load(run.path, device="cpu")
    assert isinstance(plain, rush.SmoothedClassifier)
    test, train = (rush.load_images("digits", split=split) for split in ("test", "train"))
    found = plain.quantized(train[:200])
    certificates = [rush.certify(model, test[:100], num_estimation=500) for model in (plain, found)]
    right = [int(each.correct.sum()) for each in certificates]
    assert right[0] > 60
    assert abs(right[0] - right[1]) <= 3
    assert np.abs(certificates[0].radius - certificates[1].radius).mean() < 0.02
    assert tiny(tmp_path).execution.precision == "float32"
