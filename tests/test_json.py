"""What the commands print with ``--json``: the keys of docs/commands.md, and nothing that JSON does not have."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rush
from commands import Call
from rush.commands.audit import FAILED
from rush.records.read_run import read_run

DOCS = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
MODELS = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
"""


def documented(section: str, table: int = 0) -> set[str]:
    """The keys in the first column of a table of a section."""
    text = re.split(r"^### ", DOCS, flags=re.M)
    body = next(part for part in text if part.startswith(section))
    rows = re.split(r"\n\n", body)
    tables = [block for block in rows if block.startswith("| key")]
    return {key for line in tables[table].splitlines()[2:] for key in re.findall(r"`(\w+)`", line.split("|")[1])}


def value_of(call: Call, *words: object) -> Any:
    done = call(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "json_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield "json_models:net"
    sys.modules.pop("json_models", None)


def test_any_model(call: Call, models: str) -> None:
    model = ("--model", models, "--data", "digits", "--images", 5)
    certified = value_of(call, "certify", *model, "--sigma", 0.25, "--num-estimation", 200)
    assert set(certified) == documented("rush certify")
    attacked = value_of(call, "attack", *model, "--method", "pgd", "--steps", 2)
    assert set(attacked) == documented("rush attack")
    assert attacked["images"] == attacked["broken"] + attacked["held"] + attacked["undecided"] == 5
    judged = value_of(call, "verdict", "adversarial.npz", "--model", models, "--data", "digits")
    assert set(judged) == documented("rush attack") | {"seed"}
    assert judged["broken"] == attacked["broken"]
    rungs = value_of(call, "ladder", *model)
    assert {frozenset(rung) for rung in rungs} == {frozenset(documented("rush attack"))}
    assert rungs[-1]["suite"]
    audited = value_of(call, "audit", *model)
    assert audited == json.loads(Path("audit.json").read_text())


def test_a_run(call: Call, tiny_run: Path) -> None:
    info = value_of(call, "info", tiny_run)
    assert set(info) == documented("rush info")
    assert info["bytes"] == sum(path.stat().st_size for path in tiny_run.rglob("*") if path.is_file())
    results = read_run(tiny_run)
    assert results.certificates is not None
    assert info["certificates"]["acr"] == results.certificates.acr
    assert value_of(call, "certify", tiny_run) == info["certificates"]
    assert value_of(call, "attack", tiny_run) == info["attacks"]
    assert value_of(call, "ladder", tiny_run) == info["attacks"]
    assert set(info["attacks"]) == documented("rush attack", table=1)
    assert value_of(call, "audit", tiny_run) == info["audit"]
    recomputed = value_of(call, "certify", tiny_run, "--recompute", "--alpha", 0.01)
    assert recomputed["alpha"] == 0.01
    assert set(recomputed) == documented("rush certify")


def test_a_comparison(call: Call, tiny_run: Path) -> None:
    compared = value_of(call, "compare", tiny_run, tiny_run / "certificates.tsv", "--radii", 0, "--radii", 0.125)
    assert set(compared) == documented("rush compare")
    assert compared["radii"] == [0, 0.125]
    assert set(compared["logs"][0]) == documented("rush certify") | {"name", "path", "dataset"}
    (pair,) = compared["pairs"]
    assert set(pair) == {"first", "second", "refused", "images", "assumed", "notes", "rows"}
    assert compared["runs"][0]["folder"] == str(tiny_run)


def test_a_verification(call: Call, tiny_run: Path) -> None:
    verified = value_of(call, "verify", tiny_run, "--images", 2)
    assert set(verified) == documented("rush verify")
    assert verified["identical"] is True


def test_recipes(call: Call) -> None:
    listed = value_of(call, "recipes")
    assert {"digits", "cifar10-small"} <= {recipe["name"] for recipe in listed}


@pytest.mark.parametrize(("worst", "status"), [("holds", FAILED), ("undecided", FAILED), ("overestimated", 0)])
def test_the_status_of_an_audit_follows_its_verdict(worst: str, status: int, call: Call, tiny_run: Path) -> None:
    assert value_of(call, "audit", tiny_run)["verdict"] == "undecided"
    done = call("audit", tiny_run, "--fail-on", worst)
    assert done.returncode == status
    assert "undecided: " in done.stdout


def test_results_of_the_library_tell_themselves(tmp_path: Path) -> None:
    images = rush.load_images("digits", "test")[:20]
    import torch

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    smoothed = rush.SmoothedClassifier(network, sigma=0.25, num_classes=10)
    fixed = rush.certify(smoothed, images, num_estimation=300)
    sequential = rush.certify(smoothed, images, "sequential", num_estimation=300, radii=(0, 0.1))
    attacked = rush.attack(smoothed, images, rush.ThreatModel("linf", 8 / 255), steps=2, max_votes=200)
    for result in (fixed, sequential, attacked):
        assert len(repr(result)) < 200
        assert repr(result).startswith(f"{type(result).__name__}(")
        assert "20 images" in result.summary()
        json.dumps(result.to_dict())
        frame = result.to_pandas()
        assert len(frame) == 20
        assert list(frame["id"]) == list(images.ids)
        axes = result.plot()
        axes.figure.savefig(tmp_path / "plot.png")
        assert result.plot(axes) is axes
    assert "sigma 0.25, clopper-pearson, 400 samples per image" in fixed.summary()
    assert "sigma 0.25, sequential with the bound geometric, " in sequential.summary()
    np.testing.assert_array_equal(fixed.to_pandas()["radius"], fixed.radius)
    (line,) = [line for line in fixed.plot().get_lines() if len(line.get_xdata()) > 2]
    assert line.get_ydata()[0] == fixed.accuracy(0)
    assert fixed.to_dict(radii=[0.1])["accuracy"][0]["certified"]["estimate"] == fixed.accuracy(0.1)
