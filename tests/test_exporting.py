"""Classifiers for other software: ONNX files with torch's logits, and folders in the form of a hub."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pandas
import pytest
import torch
from torch import Tensor, nn

import rush
from commands import Call, refusal
from documentation import block_with
from rush.errors import InputError, MissingExtraError, ModelError, RunError
from rush.exporting import onnx as onnx_module
from rush.exporting.hub import push_to_hub, save_pretrained
from rush.exporting.onnx import export_onnx
from rush.models.storage import ClassifierSpec
from rush.records.folder import RunFolder
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier

COMMANDS = Path(__file__).parents[1] / "docs/commands.md"


def onnx_logits(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixels": x.numpy()})[0])


@pytest.mark.parametrize("encoder", ["small", "resnet18", "preactresnet18", "wideresnet28"])
def test_logits_are_those_of_torch_for_every_batch(encoder: str, tmp_path: Path) -> None:
    spec = ClassifierSpec(encoder, 4, 3, [0.5] * 3, [0.25] * 3, tuple("abcde"))  # type: ignore[arg-type]
    network = seeded_init(spec.build(), stream(0, "weights")).eval()
    smoothed = SmoothedClassifier(network, noise=rush.DiscreteGaussian(0.5), num_classes=5, classes=list("abcde"))
    export_onnx(smoothed, tmp_path / "model.onnx", (3, 16, 16))
    for count in (1, 2, 7):
        x = torch.rand(count, 3, 16, 16, generator=stream(count, "x"))
        with torch.no_grad():
            torch.testing.assert_close(onnx_logits(tmp_path / "model.onnx", x), network(x), atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["rush"])
    assert about == {"noise": "discrete", "sigma": 0.5, "classes": list("abcde"), "image_shape": [3, 16, 16]}


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)

    file = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="give image_shape"):
        export_onnx(Branching().eval(), file)
    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        export_onnx(Branching().eval(), file, (1, 2, 2))
    half = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval().bfloat16()
    with pytest.raises(ModelError, match="in half precision"):
        export_onnx(half, file, (1, 2, 2))
    monkeypatch.setattr(onnx_module, "_TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="logits of onnxruntime differ from torch's by"):
        export_onnx(half.float(), file, (1, 2, 2))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"export to ONNX needs onnxscript .*pip install onnxscript"):
        export_onnx(half, file, (1, 2, 2))
    assert not file.exists()


def test_the_documented_lines_smooth_an_exported_run(
    call: Call, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("export", tiny_run, "--to", "onnx")
    assert done.returncode == 0, done.stderr
    block = block_with("docs/models.md", "import json")
    images = rush.load_images("digits", "test")[:20]
    smoothed = rush.load(tiny_run, device="cpu")
    expected = smoothed.predict(images.pixels(), num_samples=1000)
    agreed = 0
    for image, label in zip(images.pixels().numpy(), expected.tolist(), strict=True):
        names = {"image": image}
        exec(block, names)
        assert names["counts"].sum() == 1000
        agreed += label == -1 or names["prediction"] == smoothed.classes[label]
    assert agreed == 20
    assert "model.onnx exists" in refusal(call("export", tiny_run, "--to", "onnx"))
    assert "--push belongs to --to hub" in refusal(call("export", tiny_run, "--to", "onnx", "--push", "a/b"))


def stand_in(shelf: Path) -> ModuleType:
    """The part of huggingface_hub that is used, with a folder in place of the hub."""
    module = ModuleType("huggingface_hub")

    class HfApi:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert exist_ok
            if "/" not in name:
                raise OSError("404 Client Error: Repository Not Found")
            (shelf / name).mkdir(parents=True)
            (shelf / name / "private").write_text(str(private))

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            shutil.copytree(folder_path, shelf / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert set(allow_patterns) == {"model.json", "config.json", "model.safetensors"}
        if revision not in (None, "v1") or not (shelf / name).is_dir():
            raise OSError(f"404 Client Error: {name} Not Found")
        return str(shelf / name)

    module.HfApi, module.snapshot_download = HfApi, snapshot_download  # type: ignore[attr-defined]
    return module


def test_a_run_goes_to_the_hub_and_comes_back(
    call: Call, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in(tmp_path / "hub"))
    done = call("export", tiny_run, "--to", "hub", "--out", tmp_path / "folder", "--push", "me/tiny", "--private")
    assert done.returncode == 0, done.stderr
    assert "https://hub/me/tiny/commit/1" in done.stdout
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == files
    assert (tmp_path / "hub/me/tiny/private").read_text() == "True"
    card = (tmp_path / "folder/README.md").read_text()
    assert card.startswith("---\nlibrary_name: rush-smoothing\n")
    for text in ("# tiny", "discrete noise of sigma 0.25", "| ACR | ", "| audit | ", "## Limits", "hf://OWNER/tiny"):
        assert text in card
    own = rush.load(tiny_run, device="cpu")
    for name in ("hf://me/tiny", "hf://me/tiny@v1"):
        assert rush.load(name, device="cpu").fingerprint() == own.fingerprint()
    with pytest.raises(RunError, match="hf://me/other cannot be loaded: OSError: 404"):
        rush.load("hf://me/other")
    with pytest.raises(RunError, match=r"nowhere was not uploaded: 404.*hf auth login"):
        push_to_hub(own, "nowhere")


def test_a_smoothed_classifier_follows_the_conventions_of_the_hub(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in(tmp_path / "hub"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    block = block_with("docs/models.md", "push_to_hub")
    exec(block, {})
    own = SmoothedClassifier.from_pretrained(tiny_run, device="cpu")
    own.save_pretrained(tmp_path / "folder", run=str(tiny_run))
    assert own.push_to_hub("me/tiny", private=True) == "https://hub/me/tiny/commit/1"
    assert "| ACR | " in (tmp_path / "folder/README.md").read_text()
    assert "| ACR | " not in (tmp_path / "hub/me/tiny/README.md").read_text()
    images = rush.load_images("digits", "test")[:5]
    certified = rush.certify(own, images, num_estimation=100)
    for name in ("me/tiny", "me/tiny@v1", "hf://me/tiny", tmp_path / "folder", str(tmp_path / "folder")):
        loaded = SmoothedClassifier.from_pretrained(name, device="cpu")
        assert loaded.fingerprint() == own.fingerprint()
        assert np.array_equal(rush.certify(loaded, images, num_estimation=100).counts, certified.counts)
    with pytest.raises(RunError, match="hf://me/other cannot be loaded"):
        SmoothedClassifier.from_pretrained("me/other")
    own.classifier.kind = own.kind
    rush.save(own.classifier, tmp_path / "plain")
    with pytest.raises(RunError, match=r"not smoothed; rush\.load loads it"):
        SmoothedClassifier.from_pretrained(tmp_path / "plain")


def test_a_card_without_a_run_claims_nothing(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    save_pretrained(SmoothedClassifier(network, 0.25, 10), tmp_path / "folder")
    card = (tmp_path / "folder/README.md").read_text()
    assert "certified at" not in card
    assert "gaussian noise of sigma 0.25" in card
    assert rush.load(tmp_path / "folder", classifier=network).sigma == 0.25


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"loading hf://me/tiny needs huggingface_hub .*pip install hugging"):
        rush.load("hf://me/tiny")


def test_figures_of_training_are_read_by_tensorboard_and_pandas(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = call("export", tiny_run, "--to", "tensorboard", "--out", tmp_path / "board")
    assert done.returncode == 0, done.stderr
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    events = RunFolder.open(tiny_run).events("epoch", "pretrain")
    losses = board.Scalars("pretrain/loss")
    assert [(scalar.step, scalar.value) for scalar in losses] == [
        (event["epoch"], pytest.approx(event["loss"])) for event in events
    ]
    (line,) = re.findall(r"`pandas\.read_json\((.*?)\)`", COMMANDS.read_text(encoding="utf-8"))
    assert line == '"RUN/log.jsonl", lines=True'
    frame = pandas.read_json(tiny_run / "log.jsonl", lines=True)
    read = frame[(frame.event == "epoch") & (frame.stage == "pretrain")].loss.tolist()
    assert read == pytest.approx([event["loss"] for event in events])
