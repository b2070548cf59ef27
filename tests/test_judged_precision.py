"""The precision of judged samples is measured once per machine and network, and a saved model keeps its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rush
from rush.choices import Precision
from rush.models.storage import load_smoothed
from rush.pipeline import precision as module
from rush.pipeline import train
from rush.pipeline.precision import faster_precision
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution, in_precision
from rush.runtime.user_cache import VARIABLE
from rush.smoothing.forward import Forward
from tiny import run_tiny

BFLOAT16 = in_precision(Execution(tile=8, threads=1, folded=True), "bfloat16")
Rates = dict[Precision, float]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Rates], list[Precision]]:
    """A machine of these images a second in each precision; returns the precisions that it has measured."""

    def with_rates(rates: Rates) -> list[Precision]:
        measured = list[Precision]()

        def rate(forward: Forward, tile: Tensor) -> float:
            assert tile.shape == (8, 1, 8, 8)
            forward(tile)
            measured.append(forward._execution.precision)
            return rates[measured[-1]]

        monkeypatch.setattr(module, "rate", rate)
        return measured

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return with_rates


@pytest.mark.parametrize(("rate", "chosen"), [(109.0, "bfloat16"), (111.0, "float32"), (50.0, "bfloat16")])
def test_float32_judges_where_it_is_a_tenth_faster(
    rate: float, chosen: Precision, machine: Callable[[Rates], list[Precision]], tiny_run: Path
) -> None:
    machine({"bfloat16": 100.0, "float32": rate})
    classifier = rush.load(tiny_run, device="cpu").classifier
    execution, rates = faster_precision(classifier, BFLOAT16, (1, 8, 8), 10)
    assert execution == in_precision(BFLOAT16, chosen)
    assert execution.channels_last == (chosen == "bfloat16")
    assert rates == {"bfloat16": 100.0, "float32": rate}


def test_it_is_measured_once_per_processor_threads_torch_and_network(
    machine: Callable[[Rates], list[Precision]], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = rush.load(tiny_run, device="cpu").classifier
    measured = machine({"bfloat16": 1.0, "float32": 2.0})

    def choose(execution: Execution = BFLOAT16) -> int:
        measured.clear()
        assert faster_precision(classifier, execution, (1, 8, 8), 10)[0].precision == "float32"
        return len(measured)

    assert (choose(), choose()) == (4, 0)
    machine({"bfloat16": 2.0, "float32": 1.0})
    assert choose() == 0  # as it was chosen before
    measured = machine({"bfloat16": 1.0, "float32": 2.0})
    assert choose(in_precision(Execution(tile=8, threads=2, folded=True), "bfloat16")) == 4
    monkeypatch.setattr(module, "processor", lambda: "another")
    assert choose() == 4
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert choose() == 4
    classifier.head = torch.nn.Sequential(classifier.head).eval()
    assert choose() == 4
    monkeypatch.setenv(VARIABLE, "off")
    assert (choose(), choose()) == (4, 4)


def test_a_damaged_choice_is_made_again(
    machine: Callable[[Rates], list[Precision]], tiny_run: Path, tmp_path: Path
) -> None:
    classifier = rush.load(tiny_run, device="cpu").classifier
    measured = machine({"bfloat16": 1.0, "float32": 2.0})
    faster_precision(classifier, BFLOAT16, (1, 8, 8), 10)
    (file,) = (tmp_path / "cache/precision").iterdir()
    for text in ("", "[]", "{}", '{"bfloat16": "a", "float32": 1}'):
        file.write_text(text)
        measured.clear()
        assert faster_precision(classifier, BFLOAT16, (1, 8, 8), 10)[0].precision == "float32"
        assert len(measured) == 4
        assert set(json.loads(file.read_text())) == {"bfloat16", "float32"}


def test_a_cache_that_cannot_be_written_stops_nothing(
    machine: Callable[[Rates], list[Precision]], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = machine({"bfloat16": 1.0, "float32": 2.0})
    classifier = rush.load(tiny_run, device="cpu").classifier
    for folder in ("/proc/nowhere", str(tiny_run / "recipe.json")):
        monkeypatch.setenv(VARIABLE, folder)
        measured.clear()
        assert faster_precision(classifier, BFLOAT16, (1, 8, 8), 10)[0].precision == "float32"
        assert len(measured) == 4


@pytest.mark.parametrize("execution", [Execution(tile=8), Execution("cuda", "bfloat16", True)])
def test_there_is_no_choice_in_float32_and_on_a_gpu(
    execution: Execution, machine: Callable[[Rates], list[Precision]], tiny_run: Path
) -> None:
    measured = machine({})
    classifier = rush.load(tiny_run, device="cpu").classifier
    assert faster_precision(classifier, execution, (1, 8, 8), 10) == (execution, {})
    assert measured == []


def test_a_run_trains_in_one_precision_and_judges_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded precision holds for every later stage, whatever the machine would choose by then."""
    choices = list[str]()

    def float32(_: object, execution: Execution, *__: object) -> tuple[Execution, Rates]:
        choices.append(execution.precision)
        return in_precision(execution, "float32"), {"bfloat16": 1.0, "float32": 2.0}

    monkeypatch.setattr(train, "faster_precision", float32)
    monkeypatch.setattr("rush.runtime.execution._native_bfloat16", lambda _: True)
    fields = ("execution.precision=auto", "pretrain.epochs=0", "finetune.epochs=1", "certify.images=5")
    run = run_tiny(tmp_path, *fields, stages=("pretrain", "finetune", "certify"))
    assert choices == ["bfloat16"]
    assert json.loads((run.path / "provenance.json").read_text())["precision"] == "bfloat16"
    forward = run.require("finetune")["forward"]
    assert (forward["precision"], forward["precisions"]["float32"]) == ("float32", 2.0)
    smoothed = rush.load(run.path, device="cpu")
    assert (smoothed.execution.precision, smoothed.execution.channels_last) == ("float32", False)
    again = load_smoothed(run.path / "model", in_precision(smoothed.execution, "bfloat16"))
    assert again.fingerprint() == smoothed.fingerprint()
    images = rush.load_images("digits", "test")[:5]
    assert np.array_equal(again.predict(images), smoothed.predict(images))
    pinned = run_tiny(tmp_path / "pinned", "execution.precision=bfloat16", *fields[1:], stages=("pretrain", "finetune"))
    assert "precisions" not in RunFolder.open(pinned.path).require("finetune")["forward"]
    assert len(choices) == 1
