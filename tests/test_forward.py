"""The one forward of judged samples: folded, compiled, chosen by a trial, recorded with the model and obeyed."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import rush
from rush.choices import CompileMode, EncoderName, Stem
from rush.commands.predict import predict_files, source_of_run
from rush.errors import ModelError, NumericsWarning
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.models.storage import load
from rush.pipeline.stages import run_stage
from rush.recipe.load import load_recipe
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing import forward as forward_module
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.forward import Forward, fold_batch_norm, try_forwards


def _trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in evaluation mode with weights and statistics as after a training: nothing is 0, 1 or equal."""
    generator = stream(seed, "forward")
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.normal_(0, 0.3, generator=generator)
                layer.running_var.uniform_(0.3, 3, generator=generator)
                layer.weight.uniform_(0.5, 2, generator=generator)
                layer.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                fan = layer.weight[0].numel()
                layer.weight.normal_(0, fan**-0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(0, 0.3, generator=generator)
    return module.eval().requires_grad_(False)


def _encoder(name: EncoderName, width: int = 8, stem: Stem = "small") -> nn.Module:
    encoder = build_encoder(name, width, 3, stem)
    features = encoder.features
    assert isinstance(features, int)
    return _trained(Classifier(Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)), encoder, linear_head(features, 5)))


class ConvolutionTwice(nn.Module):
    """One convolution at two places, each before a normalization of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x)).relu()
        return self.head(self.second(self.conv(x)).relu().mean((2, 3)))


class NormTwice(nn.Module):
    """One normalization behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).relu()
        return self.head(self.norm(self.conv2(x)).relu().mean((2, 3)))


class UsedElsewhere(nn.Module):
    """The convolution's output is normalized and also added to the result as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.head((self.norm(out).relu() + out).mean((2, 3)))


class BehindLinear(nn.Module):
    """A normalization that follows no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(self.conv(x).mean((2, 3)))).relu())


class Untraceable(nn.Module):
    """A forward that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def _tile(rows: int = 16) -> Tensor:
    generator, shape = stream(1, "forward", "tile"), (rows, 3, 8, 8)
    return torch.rand(shape, generator=generator) + 0.25 * torch.randn(shape, generator=generator)


def _norms(module: nn.Module, x: Tensor) -> int:
    """How often a call of ``module`` normalizes."""
    calls: list[nn.Module] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(lambda layer, *_: calls.append(layer)) for layer in layers]
    module(x)
    for hook in hooks:
        hook.remove()
    return len(calls)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the normalizations that are left
    "small": (lambda: _encoder("small"), 0),
    "resnet18": (lambda: _encoder("resnet18"), 0),
    "resnet34": (lambda: _encoder("resnet34"), 0),
    "resnet18 standard": (lambda: _encoder("resnet18", stem="standard"), 0),
    "resnet50": (lambda: _encoder("resnet50", 4), 0),
    "resnet50 standard": (lambda: _encoder("resnet50", 4, "standard"), 0),
    # Of a block, the second normalization follows a convolution; the first normalizes a sum, as does the last of all.
    # The stem's output goes past the first block where sizes are the same, and into its normalization alone elsewhere.
    "preactresnet18": (lambda: _encoder("preactresnet18"), 8 + 1),
    "wideresnet28": (lambda: _encoder("wideresnet28"), 12 - 1 + 1),
    "wideresnet28 of the stem's width": (lambda: _encoder("wideresnet28", 16), 12 + 1),
    "wideresnet34": (lambda: _encoder("wideresnet34"), 15 - 1 + 1),
    "one convolution twice": (lambda: _trained(ConvolutionTwice()), 2),
    "one normalization twice": (lambda: _trained(NormTwice()), 0),
    "output used elsewhere": (lambda: _trained(UsedElsewhere()), 1),
    "behind a linear layer": (lambda: _trained(BehindLinear()), 1),
    "nothing to fold": (lambda: _trained(nn.Sequential(nn.Flatten(), nn.Linear(192, 5))), 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64_folding_is_exact(name: str) -> None:
    network, x = NETWORKS[name][0]().double(), _tile().double()
    expected = network(x)
    found = fold_batch_norm(network)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.abs().max())))


def test_every_encoder_is_among_the_networks_that_are_folded() -> None:
    assert set(get_args(EncoderName)) <= set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_computes_the_same_and_the_original_is_left_alone(name: str) -> None:
    make, left = NETWORKS[name]
    network, x = make(), _tile()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    expected = network(x)
    folded = fold_batch_norm(network)
    assert _norms(folded, x) == left
    assert _norms(network, x) >= min(left, 1)
    scale = float(expected.std())
    assert scale > 0.05
    for found in (folded(x), Forward(network, Execution(folded=True), 5)(x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, scale))
    assert not any(layer.training for layer in folded.modules())
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(network(x), expected)


def test_a_network_that_cannot_be_traced_runs_unfolded_with_a_warning() -> None:
    network, x = _trained(Untraceable()), _tile()
    with pytest.warns(NumericsWarning, match="BatchNorm is not folded, the classifier's forward cannot be traced"):
        assert fold_batch_norm(network) is network
    with pytest.warns(NumericsWarning, match="not folded"):
        forward = Forward(network, Execution(folded=True), 5)
    assert torch.equal(forward(x), network(x))


def test_a_folding_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _encoder("small")
    wrong = fold_batch_norm(network)
    with torch.no_grad():
        next(layer for layer in wrong.modules() if isinstance(layer, nn.Conv2d)).weight.mul_(1.1)
    monkeypatch.setattr(forward_module, "fold_batch_norm", lambda _: wrong)
    with pytest.raises(ModelError, match=r"folding BatchNorm .* changes this classifier's logits; .*folded=False"):
        Forward(network, Execution(folded=True), 5)(_tile())


def _flipped_head(network: nn.Module) -> None:
    network.head.weight.neg_()  # type: ignore[union-attr, operator]


def _other_statistics(network: nn.Module) -> None:
    norm = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean.add_(3.0)


@pytest.mark.parametrize("change", [_flipped_head, _other_statistics])
@pytest.mark.parametrize("folded", [True, False])
def test_votes_follow_weights_that_changed_after_the_first_vote(
    change: Callable[[nn.Module], None], folded: bool
) -> None:
    def votes(smoothed: SmoothedClassifier) -> Tensor:
        return smoothed.counts(x, 300, smoothed.streams(0, "test", list("abcd")))

    x, execution = _tile(4).clamp(0, 1), Execution(tile=64, folded=folded)
    network = _encoder("small")
    smoothed = SmoothedClassifier(network, 0.25, 5, execution=execution)
    before = votes(smoothed)
    assert torch.equal(votes(smoothed), before)
    change(network)
    after = votes(smoothed)
    assert not torch.equal(after, before)
    assert torch.equal(after, votes(SmoothedClassifier(network, 0.25, 5, execution=execution)))


def test_a_forward_is_made_once_for_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    class Counted(Forward):
        def __init__(self, classifier: nn.Module, *rest: Any) -> None:
            made.append(classifier)
            super().__init__(classifier, *rest)

    monkeypatch.setattr("rush.smoothing.classifier.Forward", Counted)
    smoothed = SmoothedClassifier(_encoder("small"), 0.25, 5, execution=Execution(tile=64, folded=True))
    for _ in range(3):
        smoothed.predict(_tile(2).clamp(0, 1), num_samples=100)
    assert len(made) == 1


# Which form


Rates = dict[CompileMode, float]


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rates, int], tuple[Execution, dict[str, Any]]]:
    """``try_forwards`` on a machine of these images a second, where compiling takes no time."""

    def tried(rates: Rates, passes: int) -> tuple[Execution, dict[str, Any]]:
        def rate(forward: Forward, tile: Tensor) -> float:
            forward(tile)
            return rates[forward._execution.compile_mode]

        monkeypatch.setattr(forward_module, "rate", rate)
        execution = Execution(tile=8, folded=True)
        return try_forwards(_encoder("small"), execution, (3, 8, 8), 5, passes)

    monkeypatch.setattr(forward_module, "_compiled", lambda function, _: function)
    return tried


def test_compiling_is_not_tried_for_little_work(trial: Callable[..., Any]) -> None:
    """59 s of eager work."""
    execution, found = trial({"none": 1000.0}, 59_000)
    assert execution == Execution(tile=8, folded=True)
    assert found == {
        "forward_passes": 59_000,
        "images_per_second": {"none": 1000.0},
        "compiled": "not tried, the whole work takes less than a compilation",
    }


@pytest.mark.parametrize(("rate", "mode"), [(2000.0, "default"), (1000.0, "none"), (500.0, "none")])
def test_the_compiled_form_is_chosen_where_it_is_faster(
    trial: Callable[..., Any], rate: float, mode: CompileMode
) -> None:
    execution, found = trial({"none": 1000.0, "default": rate}, 1_000_000)
    assert execution == Execution(tile=8, folded=True, compile_mode=mode)
    assert found["images_per_second"] == {"none": 1000.0, "default": rate}
    assert found["default_compile_seconds"] >= 0


def test_the_eager_form_is_kept_where_compiling_takes_longer_than_it_saves(
    trial: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 s of eager work, half of it compiled, and a compilation of 60 s by the clock."""
    now = iter([0.0, 60.0])
    monkeypatch.setattr(forward_module.time, "perf_counter", lambda: next(now))
    execution, found = trial({"none": 1000.0, "default": 2000.0}, 100_000)
    assert execution.compile_mode == "none"
    assert found["default_compile_seconds"] == 60.0


def _no_compiler(function: Callable[[Tensor], Tensor], mode: CompileMode) -> Callable[[Tensor], Tensor]:
    """As torch.compile behaves where there is no compiler: it fails at the first call."""

    def failing(_: Tensor) -> Tensor:
        raise RuntimeError("no working C++ compiler\nin any folder")

    return function if mode == "none" else failing


def test_a_failing_compiler_is_recorded_and_the_eager_form_kept(
    trial: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_module, "_compiled", _no_compiler)
    execution, found = trial({"none": 1000.0}, 10_000_000)
    assert execution.compile_mode == "none"
    assert "no working C++ compiler" in found["default_failed"]
    assert found["images_per_second"] == {"none": 1000.0}


# Recorded with the model


@pytest.fixture
def compiled_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run whose model says that it was compiled."""
    shutil.copytree(tiny_run, tmp_path / "run")
    file = tmp_path / "run/model/model.json"
    description = json.loads(file.read_text())
    description["execution"].update(compile_mode="default", folded=True)
    file.write_text(json.dumps(description))
    return tmp_path / "run"


def test_the_form_that_the_recipe_asks_for_is_recorded_and_obeyed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[CompileMode] = []

    def compiled(function: Callable[[Tensor], Tensor], mode: CompileMode) -> Callable[[Tensor], Tensor]:
        modes.append(mode)
        return function

    shutil.copytree(tiny_run, tmp_path / "run")
    for stage in ("finetune", "certify", "attack"):
        (tmp_path / f"run/stages/{stage}.json").unlink()
    for name in ("provenance.json", "checkpoints/finetune.pt", "certificates.tsv"):
        (tmp_path / "run" / name).unlink()
    recipe = load_recipe(str(tiny_run.parent / "tiny.toml"), ["execution.compile=default"])
    run = RunFolder(tmp_path / "run", recipe)
    run_stage(run, "finetune")
    forward = {"compile_mode": "default", "precision": "float32", "channels_last": True}
    assert run.require("finetune")["forward"] == forward
    recorded = json.loads((run.path / "model/model.json").read_text())["execution"]
    assert (recorded["compile_mode"], recorded["folded"], recorded["tile"]) == ("default", True, 100)
    monkeypatch.setattr(forward_module, "_compiled", compiled)
    run_stage(run, "certify")
    assert modes == ["default"]
    assert (run.path / "certificates.tsv").read_text().count("\n") == 21


def test_a_trained_model_is_folded_and_its_trial_recorded(tiny_run: Path) -> None:
    recorded = json.loads((tiny_run / "model/model.json").read_text())["execution"]
    form = {"precision": "float32", "channels_last": True, "compile_mode": "none"}
    assert recorded == {"tile": 100, "folded": True, **form}
    figures = RunFolder.open(tiny_run).require("finetune")["forward"]
    assert figures["compile_mode"] == "none"
    assert figures["forward_passes"] == 20 * 300
    assert figures["images_per_second"]["none"] > 0
    assert "not tried" in figures["compiled"]


def test_a_loaded_model_runs_in_its_recorded_form(compiled_run: Path) -> None:
    smoothed = load(compiled_run)
    assert (smoothed.execution.compile_mode, smoothed.execution.folded) == ("default", True)
    eager = load(compiled_run, compiled=False)
    assert eager.execution == replace(smoothed.execution, compile_mode="none")


def test_a_model_saved_before_forms_were_recorded_is_neither_folded_nor_compiled(compiled_run: Path) -> None:
    file = compiled_run / "model/model.json"
    description = json.loads(file.read_text())
    del description["execution"]["folded"], description["execution"]["compile_mode"]
    file.write_text(json.dumps(description))
    smoothed = load(compiled_run)
    assert (smoothed.execution.folded, smoothed.execution.compile_mode) == (False, "none")
    assert smoothed.predict(torch.zeros(1, 1, 8, 8), num_samples=100).shape == (1,)


def test_a_recorded_compilation_that_fails_here_is_told_with_the_way_around(
    compiled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(forward_module, "_compiled", _no_compiler)
    text = (
        r"recorded as compiled \(default\) and cannot be compiled here \(RuntimeError: no working C\+\+"
        r" .*rush\.load\(folder, compiled=False\), rush predict --eager"
    )
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ModelError, match=re.compile(text, re.DOTALL)):
        load(compiled_run).predict(x, num_samples=100)
    with pytest.raises(ModelError, match="cannot be compiled here"):
        rush.certify(load(compiled_run), (x, torch.zeros(2, dtype=torch.int64)), num_estimation=100)
    assert load(compiled_run, compiled=False).predict(x, num_samples=100).shape == (2,)
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    given = {"num_samples": 100, "alpha": 0.001, "seed": 0, "resize": False}
    with pytest.raises(ModelError, match="cannot be compiled here"):
        predict_files(source_of_run(compiled_run), [tmp_path / "image.png"], **given)  # type: ignore[arg-type]
    eager = source_of_run(compiled_run, compiled=False)
    assert len(predict_files(eager, [tmp_path / "image.png"], **given)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "default"])
def test_an_error_of_the_network_is_one_line_that_says_what_it_was_given(
    mode: CompileMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it runs compiled: the compiler is not to blame."""
    monkeypatch.setattr(forward_module, "_compiled", lambda function, _: function)

    class Broken(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise ZeroDivisionError("the network's own\n error")

    text = (
        "was given float32 images of shape (16, 3, 8, 8) on cpu and raised ZeroDivisionError: the network's own error"
    )
    with pytest.raises(ModelError, match=f"{re.escape(text)}; it must accept such images$") as caught:
        Forward(Broken().eval(), Execution(compile_mode=mode), 5)(_tile())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_that_is_really_compiled_computes_the_same(precision: Any) -> None:
    """Up to rounding of its arithmetic; an image's logits are the same bits in another row beside other images."""
    network = _encoder("small")
    eager = Execution(precision=precision, channels_last=precision == "bfloat16", tile=32, folded=True)
    x = _tile(32)
    expected = Forward(network, eager, 5)(x)
    compiled = Forward(network, replace(eager, compile_mode="default"), 5)
    found = compiled(x)
    tolerance = 1e-4 if precision == "float32" else 4 * 2**-7
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.std()))
    others = torch.cat([x[16:], 1 - x[:16]])
    assert torch.equal(compiled(others)[:16], found[16:])
    assert torch.equal(compiled(x), found)
    smoothed = SmoothedClassifier(network, 0.25, 5, execution=replace(eager, compile_mode="default"))
    votes = smoothed.counts(x[:3].clamp(0, 1), 1000, smoothed.streams(0, "test", list("abc")))
    plain = SmoothedClassifier(network, 0.25, 5, execution=eager)
    allowed = 2 if precision == "float32" else 60
    assert (votes - plain.counts(x[:3].clamp(0, 1), 1000, plain.streams(0, "test", list("abc")))).abs().max() <= allowed
