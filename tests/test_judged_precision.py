"""The form of judged samples is measured once per machine and network, and a saved model keeps its own."""

import json
from collections.abc import Callable
from dataclasses import replace
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
from rush.pipeline.precision import fastest_form, in_fastest_form
from rush.pipeline.verify import verify
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution, in_precision
from rush.runtime.user_cache import VARIABLE
from rush.smoothing.forward import Forward
from tiny import run_tiny

BFLOAT16 = in_precision(Execution(tile=8, threads=1, folded=True), "bfloat16")
FLOAT32 = in_precision(BFLOAT16, "float32")
Rates = dict[str, float]


def name_of(execution: Execution) -> str:
    return execution.precision + (
        ", channels_last" if execution.precision == "float32" and execution.channels_last else ""
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """A machine of these images a second in each form; returns the forms that it has measured."""

    def with_rates(float32: float, channels_last: float = 1.0, bfloat16: float = 1.0) -> list[str]:
        measured = list[str]()
        rates = {"float32": float32, "float32, channels_last": channels_last, "bfloat16": bfloat16}

        def rate(forward: Forward, tile: Tensor) -> float:
            assert tile.shape == (8, 1, 8, 8)
            forward(tile)
            measured.append(name_of(forward._execution))
            weights = [tensor for tensor in forward._module.parameters() if tensor.dim() == 4 and len(tensor[0]) > 1]
            layout = torch.channels_last if forward._execution.channels_last else torch.contiguous_format
            assert all(tensor.is_contiguous(memory_format=layout) for tensor in weights)
            return rates[measured[-1]]

        monkeypatch.setattr(module, "rate", rate)
        return measured

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return with_rates


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ((100.0, 109.0, 109.0), "float32"),
        ((100.0, 111.0, 120.0), "float32, channels_last"),
        ((100.0, 111.0, 123.0), "bfloat16"),
        ((100.0, 50.0, 111.0), "bfloat16"),
        ((100.0, 300.0, 50.0), "float32, channels_last"),
    ],
)
def test_another_form_judges_where_it_is_a_tenth_faster(
    rates: tuple[float, float, float], chosen: str, machine: Callable[..., list[str]], tiny_run: Path
) -> None:
    machine(*rates)
    classifier = rush.load(tiny_run, device="cpu").classifier
    execution, found = fastest_form(classifier, BFLOAT16, (1, 8, 8), 10)
    assert name_of(execution) == chosen
    assert replace(execution, precision="bfloat16", channels_last=True) == BFLOAT16
    assert list(found.values()) == list(rates)


def test_without_native_bfloat16_the_layout_is_chosen(machine: Callable[..., list[str]], tiny_run: Path) -> None:
    measured = machine(float32=200.0, channels_last=100.0)
    classifier = rush.load(tiny_run, device="cpu").classifier
    execution, _ = fastest_form(classifier, FLOAT32, (1, 8, 8), 10)
    assert (execution.precision, execution.channels_last) == ("float32", False)
    assert set(measured) == {"float32", "float32, channels_last"}


def test_a_network_from_outside_is_judged_in_the_fastest_form(
    machine: Callable[..., list[str]], tiny_run: Path
) -> None:
    machine(float32=100.0, channels_last=200.0)
    smoothed = rush.load(tiny_run, device="cpu")
    smoothed.execution = replace(smoothed.execution, tile=8)
    changed = in_fastest_form(smoothed, (1, 8, 8))
    assert name_of(changed.execution) == "float32, channels_last"
    with torch.no_grad():
        assert changed.predict(rush.load_images("digits", "test")[:2], num_samples=100).shape == (2,)


def test_it_is_measured_once_per_processor_threads_torch_and_network(
    machine: Callable[..., list[str]], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = rush.load(tiny_run, device="cpu").classifier
    measured = machine(float32=2.0)

    def choose(execution: Execution = BFLOAT16) -> int:
        measured.clear()
        assert fastest_form(classifier, execution, (1, 8, 8), 10)[0].precision == "float32"
        return len(measured)

    assert (choose(), choose()) == (6, 0)
    machine(float32=1.0, bfloat16=2.0)
    assert choose() == 0  # as it was chosen before
    measured = machine(float32=2.0)
    assert choose(in_precision(Execution(tile=8, threads=2, folded=True), "bfloat16")) == 6
    monkeypatch.setattr(module, "processor", lambda: "another")
    assert choose() == 6
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert choose() == 6
    classifier.head = torch.nn.Sequential(classifier.head).eval()
    assert choose() == 6
    monkeypatch.setenv(VARIABLE, "off")
    assert (choose(), choose()) == (6, 6)


def test_a_damaged_choice_is_made_again(machine: Callable[..., list[str]], tiny_run: Path, tmp_path: Path) -> None:
    classifier = rush.load(tiny_run, device="cpu").classifier
    measured = machine(float32=2.0)
    fastest_form(classifier, BFLOAT16, (1, 8, 8), 10)
    (file,) = (tmp_path / "cache/forms").iterdir()
    for text in ("", "[]", "{}", '{"bfloat16": "a", "float32": 1}'):
        file.write_text(text)
        measured.clear()
        assert fastest_form(classifier, BFLOAT16, (1, 8, 8), 10)[0].precision == "float32"
        assert len(measured) == 6
        assert set(json.loads(file.read_text())) == {"float32", "float32, channels_last", "bfloat16"}


def test_a_cache_that_cannot_be_written_stops_nothing(
    machine: Callable[..., list[str]], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = machine(float32=2.0)
    classifier = rush.load(tiny_run, device="cpu").classifier
    for folder in ("/proc/nowhere", str(tiny_run / "recipe.json")):
        monkeypatch.setenv(VARIABLE, folder)
        measured.clear()
        assert fastest_form(classifier, BFLOAT16, (1, 8, 8), 10)[0].precision == "float32"
        assert len(measured) == 6


@pytest.mark.parametrize("execution", [in_precision(Execution(tile=8), "int8"), Execution("cuda", "bfloat16", True)])
def test_there_is_no_choice_in_integers_and_on_a_gpu(
    execution: Execution, machine: Callable[..., list[str]], tiny_run: Path
) -> None:
    measured = machine(1.0)
    classifier = rush.load(tiny_run, device="cpu").classifier
    assert fastest_form(classifier, execution, (1, 8, 8), 10) == (execution, {})
    assert measured == []


def test_a_run_trains_in_one_precision_and_judges_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded precision holds for every later stage, whatever the machine would choose by then."""
    choices = list[str]()

    def float32(_: object, execution: Execution, *__: object) -> tuple[Execution, Rates]:
        choices.append(execution.precision)
        return replace(execution, precision="float32", channels_last=False), {"bfloat16": 1.0, "float32": 2.0}

    monkeypatch.setattr(train, "fastest_form", float32)
    monkeypatch.setattr("rush.runtime.execution._native_bfloat16", lambda _: True)
    fields = ("execution.precision=auto", "pretrain.epochs=0", "finetune.epochs=1", "certify.images=5")
    run = run_tiny(tmp_path, *fields, stages=("pretrain", "finetune", "certify"))
    assert choices == ["bfloat16"]
    assert json.loads((run.path / "provenance.json").read_text())["precision"] == "bfloat16"
    forward = run.require("finetune")["forward"]
    assert (forward["precision"], forward["forms"]["float32"]) == ("float32", 2.0)
    smoothed = rush.load(run.path, device="cpu")
    assert (smoothed.execution.precision, smoothed.execution.channels_last) == ("float32", False)
    assert verify(run, 2).differences == ()  # the training's precision is none
    again = load_smoothed(run.path / "model", in_precision(smoothed.execution, "bfloat16"))
    assert again.fingerprint() == smoothed.fingerprint()
    images = rush.load_images("digits", "test")[:5]
    assert np.array_equal(again.predict(images), smoothed.predict(images))
    pinned = run_tiny(tmp_path / "pinned", "execution.precision=bfloat16", *fields[1:], stages=("pretrain", "finetune"))
    assert RunFolder.open(pinned.path).require("finetune")["forward"]["precision"] == "bfloat16"
    assert len(choices) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_saved_model_keeps_its_layout(
    precision: Precision, channels_last: bool, tiny_run: Path, tmp_path: Path
) -> None:
    smoothed = rush.load(tiny_run, device="cpu")
    smoothed.execution = replace(smoothed.execution, precision=precision, channels_last=channels_last)
    rush.save(smoothed, tmp_path / "model")
    assert rush.load(tmp_path / "model", device="cpu").execution == smoothed.execution
    file = tmp_path / "model/model.json"
    description = json.loads(file.read_text())
    assert description["execution"].pop("channels_last") == channels_last
    file.write_text(json.dumps(description))  # as older versions wrote it: the layout followed from the precision
    older = rush.load(tmp_path / "model", device="cpu").execution
    assert older == replace(smoothed.execution, channels_last=precision == "bfloat16")
