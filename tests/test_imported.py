"""Weights of other libraries under their names, and one's own network trained under noise."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import rush
from commands import Call, refusal
from rush.data.sources import load_images
from rush.errors import RunError
from rush.models.encoders import build_encoder
from rush.models.imported import load_imported
from rush.pipeline.module import train_module
from rush.runtime.randomness import stream
from rush.training import loop
from tiny import tiny, write_tiny

WIDTH = 4


class Block(nn.Module):
    """The basic block with the names that torchvision gives."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TextbookResNet(nn.Module):
    """ResNet-18 with torchvision's names; ``small`` has the stem for small images and no pooling."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False) if small else nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU()
        if not small:
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage in range(4):
            before, channels = WIDTH * 2 ** max(0, stage - 1), WIDTH * 2**stage
            first = Block(before, channels, 1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, Block(channels, channels, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(nn.Sequential(*list(self.children())[:-1])(x), 1)


def textbook(small: bool = True) -> TextbookResNet:
    """Random weights and running statistics."""
    torch.manual_seed(0)
    network = TextbookResNet(small)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


FORMS = {
    "torchvision": lambda net: net.state_dict(),
    "solo-learn": lambda net: {
        "epoch": 3,
        "state_dict": prefixed(net.state_dict(), "backbone.") | {"projector.0.weight": torch.zeros(7, 3)},
    },
    "MoCo": lambda net: {
        "state_dict": prefixed(net.state_dict(), "module.encoder_q.")
        | prefixed({name: tensor + 1 for name, tensor in net.state_dict().items() if "bn" not in name}, "other.")
    },
    "lightly": lambda net: prefixed(nn.Sequential(*list(net.children())[:-1]).state_dict(), "backbone."),
    "lightly, whole": lambda net: {
        "state_dict": prefixed(nn.Sequential(*list(net.children())[:-1]).state_dict(), "model.backbone.")
    },
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_other_libraries_give_their_representations(form: str, small: bool, tmp_path: Path) -> None:
    network = textbook(small)
    torch.save(FORMS[form](network), tmp_path / "weights.pt")
    encoder = build_encoder("resnet18", WIDTH, 3, "small" if small else "standard").eval()
    imported = load_imported(encoder, tmp_path / "weights.pt")
    x = torch.randn(3, 3, 32, 32, generator=stream(0, "x"))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), network(x))
    left = {name.split(".")[-2] for name in imported.left if not name.startswith("other.")}
    assert left <= {"fc", "0"}
    assert ("projector.0.weight" in imported.left) == (form == "solo-learn")


def test_deeper_networks_and_safetensors_are_read_under_own_names(tmp_path: Path) -> None:
    for name in ("resnet50", "wideresnet28", "small"):
        torch.manual_seed(0)
        source = build_encoder(name, WIDTH, 3)
        save_file(prefixed(source.state_dict(), "net."), tmp_path / f"{name}.safetensors")
        target = build_encoder(name, WIDTH, 3)
        assert load_imported(target, tmp_path / f"{name}.safetensors").left == ()
        assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())


def test_files_that_do_not_fit_or_cannot_be_read_say_why(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", WIDTH, 3)
    torch.save(build_encoder("resnet18", 2 * WIDTH, 3).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(RunError, match=r"does not fit the network: .* tensors are not in it, first stem\.0\.weight"):
        load_imported(encoder, tmp_path / "wide.pt")
    (tmp_path / "text.pt").write_text("x")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    torch.save(textbook(), tmp_path / "pickled.pt")  # a whole module would run code
    for name, message in (
        ("text.pt", "cannot be read as weights"),
        ("empty.pt", "holds no tensors by name"),
        ("pickled.pt", "cannot be read as weights"),
        ("none.pt", "is missing"),
    ):
        with pytest.raises(RunError, match=message):
            load_imported(encoder, tmp_path / name)


def test_a_run_begins_with_imported_weights(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    file = tiny_run / "checkpoints/encoder.safetensors"
    done = call("pretrain", write_tiny(tmp_path), "--out", tmp_path / "run", "--weights", file)
    assert done.returncode == 0, done.stderr
    assert "tensors loaded" in done.stderr
    assert (tmp_path / "run/checkpoints/encoder.safetensors").read_bytes() == file.read_bytes()
    figures = json.loads((tmp_path / "run/stages/pretrain.json").read_text())
    assert (figures["objective"], figures["epochs"], figures["left"]) == ("imported", 0, [])
    assert figures["knn_accuracy"] == json.loads((tiny_run / "stages/pretrain.json").read_text())["knn_accuracy"]
    assert call("finetune", tmp_path / "run").returncode == 0
    trained = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert trained == (tiny_run / "model/model.safetensors").read_bytes()
    again = call("pretrain", tmp_path / "run", "--weights", file)
    assert "has an encoder already" in refusal(again)


# --- one's own network ------------------------------------------------------------------------------------------------

MODULE = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
def trained():
    import rush
    return rush.load("own", classifier=net())
def two(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
def number(): return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_models"
    sys.modules.pop("own_models", None)


def test_ones_own_network_is_trained_under_noise_and_certified(call: Call, own: str) -> None:
    words = ("finetune", "--model", f"{own}:net", "--data", "digits", "--sigma", 0.25, "--out", "own")
    small = ("--set", "finetune.epochs=8", "--set", "finetune.shift=0", "--set", "finetune.flip=0.0")
    done = call(*words, *small)
    assert done.returncode == 0, done.stderr
    assert "epoch 8 of 8: loss" in done.stderr
    certified = call(
        "certify", "--model", f"{own}:trained", "--data", "digits", "--images", 50, "--num-estimation", 500, "--json"
    )
    assert certified.returncode == 0, certified.stderr
    figures = json.loads(certified.stdout)
    assert (figures["noise"], figures["sigma"]) == ("gaussian", 0.25)
    assert figures["accuracy"][0]["certified"]["estimate"] > 0.7
    assert "holds a trained network" in refusal(call(*words, *small))


def test_an_interrupted_training_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, recipe = load_images("digits", split="train")[:400], tiny(tmp_path, "finetune.epochs=3")
    noise = rush.Gaussian(0.25)

    def train(folder: str) -> None:
        namespace: dict[str, object] = {}
        exec(MODULE, namespace)
        train_module(namespace["net"](), "net", images, recipe, noise, tmp_path / folder)  # type: ignore[operator]

    train("whole")
    finished = loop.TrainingRun._finish_epoch

    def stopping(self: loop.TrainingRun, epoch: int) -> None:
        finished(self, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_finish_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    train("parts")
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "parts/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
    with pytest.raises(RunError, match="holds a trained network"):
        train("parts")


def test_photos_are_resampled_and_an_attempt_that_failed_leaves_the_folder_free(call: Call, own: str) -> None:
    for name in ("cat/a", "cat/b", "dog/c", "dog/d"):
        file = Path(f"photos/train/{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (12, 20), np.uint8)).save(file)
    words = ("finetune", "--model", f"{own}:two", "--data", "photos", "--size", 8, "--sigma", 0.25, "--out", "own")
    small = ("--set", "finetune.epochs=1", "--set", "finetune.warmup_epochs=0")
    assert "exceeds the 4 training images" in refusal(call(*words, *small))
    done = call(*words, *small, "--set", "finetune.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert Path("own/model/model.json").is_file()
    others = ("finetune", "--model", f"{own}:net", "--data", "photos", "--sigma", 0.25, "--out", "other")
    assert "must accept such images" in refusal(call(*others))
    assert "shape (2, 10) for 2 images, expected (2, 2)" in refusal(call(*others, "--size", 8))
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a run folder, or --model module:function with --data, --sigma and --out"),
        (
            ("--model", "{}:net", "--data", "digits", "--out", "x", "--sigma", 1, "--set", "data.size=8"),
            "--set data.size=8: --model reads fields of finetune, execution, seed alone",
        ),
        (("--model", "{}:net", "--data", "digits", "--out", "x"), "--sigma and --out"),
        (
            ("--model", "{}:number", "--data", "digits", "--out", "x", "--sigma", 1),
            "gave int, expected a torch.nn",
        ),
        (("folder", "--model", "{}:net"), "are for a network without a run"),
        (("--model", "{}:net", "--data", "digits", "--data", "b", "--out", "x", "--sigma", 1), "names one data set"),
        (
            ("--model", "{}:net", "--data", "digits", "--out", "x", "--sigma", 1, "--set", "finetune.mode=linear"),
            "trains a head of this library",
        ),
        (("--model", "{}:net", "--data", "digits", "--out", ".", "--sigma", 1), "is not empty"),
        (("--model", "{}:net", "--data", "digits", "--out", "x", "--sigma", 1, "--weights", "no.pt"), "no.pt"),
    ],
)
def test_what_cannot_be_trained_says_why(words: tuple[object, ...], message: str, call: Call, own: str) -> None:
    assert message in refusal(call("finetune", *(str(word).format(own) for word in words)))
