"""The full-size run on a tiny network: every item, its files and counts, and its figures against the library's own."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import full_size
import full_size_items
import full_size_probe
import rush
from encoded_images import png
from full_size import TINY_IMAGES, Order, parse
from full_size_items import GRID, ITEMS, SIGMAS, Bench, Item, nearest_to_paper
from full_size_store import Clock, Store, in_rounds, load_shards
from rush.data.batches import Resident
from rush.data.images import stratified_subset
from rush.errors import RunError, RushError
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import defend
from rush.evaluation.verdict import VerdictSettings
from rush.models.classifier import Represent
from rush.models.storage import load_weights
from rush.pipeline.context import training_noise
from rush.pipeline.train import new_classifier, spec_of
from rush.recipe.load import load_recipe
from rush.records.certificates import read_certificates
from rush.runtime.execution import decide_execution
from rush.runtime.randomness import stream
from rush.training.finetune import finetune
from rush.training.loop import TrainingSettings
from rush.training.pretrain import pretrain
from rush.training.probes import knn_correct, representations
from test_parquet import write

TIMES = {
    "seconds", "allotted", "training_seconds", "images_per_second", "views_per_second", "seconds_per_image",
    "peak_memory", "joules", "textbook", "ours",
}  # fmt: skip
MINUTES = 20.0  # never reached: what a tiny run computes depends on its sizes alone


def write_images(folder: Path, name: str, count: int, first: int) -> None:
    """Images whose colour and brightness say their class, under noise."""
    rng = np.random.default_rng(first)
    labels = [(first + row) % 10 for row in range(count)]
    shade = np.linspace(-60, 60, 32)[:, None, None]
    pixels = [
        (rng.normal(100, 30, (32, 32, 3)) + 60 * (np.arange(3) == label % 3) + shade * (label >= 5)).clip(0, 255)
        for label in labels
    ]
    contents: list[bytes | None] = [png(own.astype(np.uint8)) for own in pixels]
    paths: list[str | None] = [f"{first + row}.png" for row in range(count)]
    write(folder / name, range(count), labels, names=list("abcdefghij"), paths=paths, contents=contents)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CIFAR-10 in miniature, its training shards in two folders."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write_images(first, "train-00000-of-00002.parquet", 150, 0)
    write_images(second, "train-00001-of-00002.parquet", 150, 150)
    write_images(second, "test-00000-of-00001.parquet", 80, 1000)
    return first, second


def order_for(folder: Path, data: tuple[Path, ...], **changes: Any) -> Order:
    order = Order(data, MINUTES, folder / "out", folder / "work", tiny=True)
    return replace(order, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: tuple[Path, Path]) -> Order:
    """The undisturbed tiny run."""
    order = order_for(tmp_path_factory.mktemp("full"), data)
    assert full_size.full_size(order) == 0
    return order


def items_of(order: Order) -> dict[str, Any]:
    return json.loads((order.out / "results.json").read_text())["items"]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def bench_of(order: Order) -> Bench:
    store = Store(order.out, order.work, order.max_file_mb, order.max_files)
    plan = store.plan()
    assert plan is not None
    return full_size.bench_of(order, store, plan, Clock(MINUTES))


def assert_weights(module: torch.nn.Module, file: Path) -> None:
    stored = load_file(file)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_every_item_is_done_with_its_counts(finished: Order) -> None:
    items = items_of(finished)
    assert {name: item["status"] for name, item in items.items()} == {item.name: "done" for item in ITEMS}
    sizes, (train, test) = finished.sizes, TINY_IMAGES
    expected = {
        "a": train, "b": test, "d": train, "e": sizes.grid, "f": sizes.ladder, "g": sizes.worst, "h": sizes.curve,
        "j": sizes.textbook, "k": sizes.radius,
    }  # fmt: skip
    assert {name: items[name]["images"] for name in expected} == expected
    assert 0 < items["i"]["images"] <= sizes.sandwich
    trained = {f"noise-{sigma:g}": train for sigma in SIGMAS} | {"tenth-0.25": train // 4, "hundredth-0.25": 26}
    assert {name: figures["images"] for name, figures in items["c"]["models"].items()} == trained
    cells = items["e"]["cells"]
    assert len(cells) == 2 * len(SIGMAS)
    assert all(tuple(cell) == GRID for cell in cells.values())
    assert all(rung["images"] == sizes.grid for cell in cells.values() for rung in cell.values())
    assert all(list(model) == [*GRID, "eot-2"] for model in items["f"]["models"].values())
    assert items["i"]["violations"] == []


def test_scratch_gets_the_passes_of_a_fine_tuning_and_its_share_of_the_pre_training(finished: Order) -> None:
    items = items_of(finished)
    epochs, models = finished.sizes.epochs, 6
    assert epochs is not None
    assert items["a"]["passes_per_image"] == 2 * epochs
    assert items["d"]["wanted_passes_per_image"] == epochs + 2 * epochs / models
    assert items["d"]["passes_per_image"] == round(epochs + 2 * epochs / models)


def test_what_is_published_fits_and_shows_every_item(finished: Order) -> None:
    files = sorted(finished.out.iterdir())
    assert [file.name for file in files] == [
        "plan.json", "results.json", "results.md", "tables.tar.gz", "weights-encoder-1-of-1.safetensors",
        "weights-noise-0.25-1-of-1.safetensors",
    ]  # fmt: skip
    page = (finished.out / "results.md").read_text()
    assert all(f"| ({item.name}) {item.title} | done |" in page for item in ITEMS)
    assert "| paper |  | 87.9 | 77.8 | 77.8 | 77.8 |" in page
    with tarfile.open(finished.out / "tables.tar.gz") as archive:
        names = archive.getnames()
        assert sum(name.startswith("attacks-") for name in names) == 8 + 3 + 2 + 1
        assert sum(name.startswith("certificates-") for name in names) == 3 + 1
        archive.extractall(finished.work / "unpacked", filter="data")
    read = read_certificates(finished.work / "unpacked/certificates-scratch-0.25.tsv")
    assert read is not None
    assert len(read[1]) == finished.sizes.curve


def test_pretraining_is_that_of_the_library(finished: Order) -> None:
    bench = bench_of(finished)
    recipe = load_recipe("cifar10", [*full_size.TINY, "model.width=4"])
    settings = TrainingSettings(seed=recipe.seed, execution=decide_execution("cpu", "float32", 16))
    classifier = new_classifier(spec_of(recipe, bench.train), 0)
    config = recipe.pretrain.replace(epochs=finished.sizes.epochs)
    source = Resident(bench.train.without_labels())
    pretrain(source, classifier.encoder, classifier.normalize, config, settings)
    assert_weights(classifier, bench.weights("encoder"))


def test_fine_tuning_is_that_of_the_library_on_the_pre_trained_encoder(finished: Order) -> None:
    bench = bench_of(finished)
    recipe = load_recipe("cifar10", [*full_size.TINY, "model.width=4", "smoothing.sigma=0.25"])
    labelled = stratified_subset(bench.train, 0.25, stream(0, "finetune", "labels"))
    classifier = new_classifier(spec_of(recipe, bench.train), 0)
    load_weights(classifier, bench.weights("encoder"))
    config = recipe.finetune.replace(epochs=finished.sizes.epochs)
    settings = TrainingSettings(seed=recipe.seed, execution=decide_execution("cpu", "float32", 16))
    finetune(labelled, classifier, config, settings, noise=training_noise(recipe))
    assert_weights(classifier, bench.weights("tenth-0.25"))


def test_nearest_neighbours_and_linear_head_are_those_of_the_library(finished: Order) -> None:
    bench, figures = bench_of(finished), items_of(finished)["b"]
    classifier = bench.new_classifier()
    load_weights(classifier, bench.weights("linear"))
    pretrained = load_file(bench.weights("encoder"))
    assert all(torch.equal(own, pretrained[f"encoder.{name}"]) for name, own in classifier.encoder.state_dict().items())

    represent = Represent(classifier.eval())
    known, asked = (representations(images, represent, bench.execution) for images in (bench.train, bench.test))
    labels, truth = bench.train.labels, bench.test.labels
    assert labels is not None
    assert truth is not None
    assert figures["knn_correct"] == {str(k): knn_correct(known, labels, asked, truth, k) for k in (5, 10)}
    with torch.no_grad():
        predicted = classifier(bench.test.pixels()).argmax(1)
    assert figures["linear_correct"] == int((predicted == truth).sum())


@pytest.mark.parametrize("name", ["noise-0.12", "linear-0.5"])
def test_a_cell_of_the_grid_is_the_library_attack(finished: Order, name: str) -> None:
    bench, cell = bench_of(finished), items_of(finished)["e"]["cells"][name]
    smoothed = bench.smoothed(name)
    assert smoothed.sigma == float(name.split("-")[1])
    pixels = bench.pixels.select(list(range(finished.sizes.grid)))
    settings = VerdictSettings(level=0.001 / 9, max_votes=300, seed=0)
    evaluation = Evaluation(defend(smoothed), pixels, rush.ThreatModel("linf", 8 / 255), settings)
    for rung in GRID:
        result = evaluation.run(bench.rungs[rung])
        found = (int(result.broken.sum()), int(result.held.sum()), int(result.undecided.sum()))
        assert found == tuple(cell[rung][what] for what in ("broken", "held", "undecided")), rung
        stored = bench.attacked(name, bench.rungs[rung], len(pixels))
        assert stored is not None
        assert stored.counts.tolist() == result.counts.tolist()
        assert torch.equal(stored.adversarial, result.adversarial)


@pytest.mark.parametrize("name", ["noise-0.25", "scratch-0.25", "hundredth-0.25"])
def test_certificates_are_those_of_the_library(finished: Order, name: str) -> None:
    bench, figures = bench_of(finished), items_of(finished)["h"]["models"][name]
    pixels = bench.pixels.select(list(range(finished.sizes.curve)))
    expected = rush.certify(bench.smoothed(name), pixels, "sequential", num_estimation=200)
    stored = bench.certificates(name)
    assert stored is not None
    assert stored.rule == expected.rule
    assert stored.radius.tolist() == expected.radius.tolist()
    assert stored.counts.tolist() == expected.counts.tolist()
    assert figures["accuracy"]["0.25"] == expected.accuracy(0.25)
    assert figures["acr"] == expected.acr


def test_published_weights_are_the_stored_ones_in_half_precision(finished: Order) -> None:
    stored = load_file(finished.work / "models/noise-0.25.safetensors")
    published = load_shards(finished.out, "noise-0.25")
    assert published.keys() == stored.keys()
    for name, tensor in stored.items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(published[name], expected), name


# --- kill and restart -------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_after_its_finished_items(
    finished: Order, data: tuple[Path, Path], tmp_path: Path
) -> None:
    order = order_for(tmp_path, data)
    command = [sys.executable, full_size.__file__, "--tiny", "--minutes", MINUTES, "--data", *data]
    command += ["--out", order.out, "--work", order.work]
    paths = os.pathsep.join([*map(str, sys.path), str(Path(full_size.__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    begun = order.work / "items/c-noise-0.12.json"
    try:
        deadline = time.monotonic() + 200
        while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert begun.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {name: (order.work / f"items/{name}.json").stat().st_mtime_ns for name in ("a", "b", "c-noise-0.06")}
    assert not (order.work / "items/e.json").exists()
    assert full_size.full_size(order) == 0
    assert {name: (order.work / f"items/{name}.json").stat().st_mtime_ns for name in kept} == kept
    assert without_times(items_of(order)) == without_times(items_of(finished))


def test_seconds_of_earlier_starts_count(finished: Order) -> None:
    store = Store(finished.out, finished.work, 16, 8)
    used = store.used("run")
    assert used > 0
    assert Clock(MINUTES, used).elapsed >= used
    assert store.used("probe") == 0


def test_a_folder_of_another_run_is_refused(finished: Order) -> None:
    store = Store(finished.out, finished.work, 16, 8)
    with pytest.raises(RunError, match="holds a run under other conditions \\(choices: was "):
        store.begin({"choices": "others"})


# --- time -------------------------------------------------------------------------------------------------------------


class FakeClock(Clock):
    """A clock that moves when it is told to."""

    now = 0.0

    @property
    def elapsed(self) -> float:
        return self.now


def test_rounds_give_every_job_the_same_first_images_and_end_in_time() -> None:
    clock = FakeClock(100.0)
    seen: dict[str, list[int]] = {"first": [], "second": []}

    def job(name: str, seconds: float) -> Any:
        def work(rows: list[int]) -> int:
            seen[name] += rows
            clock.now += seconds * len(rows)
            return len(rows)

        return work

    jobs = {"first": job("first", 1.0), "second": job("second", 3.0)}
    images, answers = in_rounds(jobs, wanted=500, minimum=20, seconds=400, clock=clock)
    assert images == 100  # 400 s at 4 s per image
    assert seen["first"] == seen["second"] == list(range(100))
    assert answers == {"first": [20, 20, 40, 20], "second": [20, 20, 40, 20]}
    assert clock.now == 400


def test_rounds_stop_at_the_number_of_images_that_is_wanted() -> None:
    images, answers = in_rounds({"only": len}, wanted=50, minimum=20, seconds=60, clock=FakeClock(100.0))
    assert (images, answers) == (50, {"only": [20, 20, 10]})


def test_a_round_that_the_last_tenth_cuts_short_is_dropped() -> None:
    clock = FakeClock(10.0)  # the last tenth begins at 540 s

    def work(rows: list[int]) -> list[int]:
        clock.now += 20 * len(rows)
        return rows

    images, answers = in_rounds({"a": work, "b": work}, wanted=40, minimum=10, seconds=1e6, clock=clock)
    assert images == 10
    assert answers == {"a": [list(range(10))], "b": [list(range(10))]}
    assert in_rounds({"a": work, "b": work}, wanted=40, minimum=10, seconds=1e6, clock=clock)[0] == 0


def test_allotments_share_what_is_left() -> None:
    clock = FakeClock(10.0)
    assert clock.allotted(1, 4) == pytest.approx(0.9 * 600 / 4)
    clock.now = 300
    assert clock.allotted(1, 2) == pytest.approx((0.9 * 600 - 300) / 2)
    clock.now = 590
    assert clock.allotted(1, 1) == 0
    assert clock.until_last_start == -50


def test_an_item_that_does_not_fit_is_named_with_its_minimum(finished: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(finished)
    monkeypatch.setattr(bench, "rates", replace(bench.rates, attack=1e-3))
    items = {item.name: item for item in ITEMS}
    found = full_size.figures_of(items["e"], bench, seconds=10)
    assert found["status"] == "omitted"
    assert found["reason"].startswith("its minimum, 3 images per cell, needs about ")
    assert found["reason"].endswith("; 15 s are left")
    monkeypatch.setattr(bench, "sizes", replace(bench.sizes, epochs=None))
    found = full_size.figures_of(items["a"], bench, seconds=1e-3)
    assert found["status"] == "omitted"
    assert found["reason"].startswith("its minimum is one epoch: pretrain.minutes = ")


def test_a_fine_tuning_without_time_for_all_images_takes_fewer(
    finished: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(finished)
    encoder = load_file(bench.weights("encoder"))
    bench.store = Store(tmp_path / "out", tmp_path / "work", 16, 8)
    bench.weights("encoder").parent.mkdir(parents=True)
    save_file(encoder, bench.weights("encoder"))
    bench.sizes, bench.rates = replace(bench.sizes, epochs=None), replace(bench.rates, training=100.0)
    monkeypatch.setattr(full_size_items, "LEAST_TRAINING", 40)

    def trained(seconds: float) -> tuple[int, int, int, int]:
        figures = full_size_items._finetuned(bench, "noise-0.5", 0.5, 1.0, seconds, pretrained=True)
        return tuple(figures[name] for name in ("images", "wanted_images", "epochs", "passes"))  # type: ignore[return-value]

    assert trained(1.0) == (85, 256, 1, 64)  # 85 of the 100 images per second; two whole batches of 32
    assert trained(0.1) == (40, 256, 1, 32)
    images, wanted, epochs, _ = trained(3.5)  # 297 images
    assert (images, wanted) == (256, 256)
    assert epochs >= 1


def test_what_needs_an_omitted_item_is_omitted(finished: Order, tmp_path: Path) -> None:
    bench = bench_of(finished)
    bench.store = Store(tmp_path / "out", tmp_path / "work", 16, 8)
    bench.store.finish("a", {"status": "done"})
    bench.store.finish("c", {"status": "omitted"})
    for item in ITEMS[3:]:
        found = full_size.figures_of(item, bench, seconds=10)
        assert found["status"] == "omitted"
        assert found["reason"].startswith("it needs item (")


def test_the_plan_gives_batch_rate_and_form(tmp_path: Path) -> None:
    recipe = Order((), 9.0, tmp_path, tmp_path).recipe
    planned = full_size.planned(recipe, {"batch_size": 256, "compile_training": "default"})
    assert planned.pretrain.batch_size == 256
    assert planned.pretrain.learning_rate == pytest.approx(recipe.pretrain.learning_rate / 2)
    assert planned.execution.compile_training == "default"


def test_nothing_starts_in_the_last_tenth(finished: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(finished)
    monkeypatch.setattr(bench, "clock", FakeClock(10.0))
    bench.clock.now = 541  # type: ignore[attr-defined]

    def work(*_: object) -> dict[str, Any]:
        pytest.fail("it was started")

    found = full_size.figures_of(Item("x", "some item", 1.0, work), bench, 10)
    assert (found["status"], found["reason"]) == ("omitted", "the last tenth of the minutes had begun")


def test_a_failed_item_is_named_and_tried_again(data: tuple[Path, Path], tmp_path: Path) -> None:
    calls = []

    def work(_bench: Bench, _seconds: float) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 1:
            raise RushError("the disk is full")
        return {"images": 1}

    order = order_for(tmp_path, data, items=(Item("x", "some item", 1.0, work),))
    assert full_size.full_size(order) == 0
    assert items_of(order)["x"]["reason"] == "the disk is full"
    assert full_size.full_size(replace(order, phases=("run",))) == 0
    assert items_of(order)["x"]["status"] == "done"
    assert full_size.full_size(order) == 0
    assert len(calls) == 2


# --- probe ------------------------------------------------------------------------------------------------------------


def probe_of(
    monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **rates: tuple[float, float] | str
) -> full_size_probe.Probe:
    """A probe in which a SimCLR step has these views per second and seconds of warm-up by ``<form>_<batch>``; a text is
    the error that it ends with."""

    def simclr(_probe: object, form: str, batch: int, deterministic: bool = True) -> dict[str, Any]:
        measured = rates[f"{form}_{batch}" if deterministic else f"any_{batch}"]
        if isinstance(measured, str):
            raise RuntimeError(measured)
        return {"views_per_second": measured[0], "warm_up_seconds": measured[1]}

    monkeypatch.setattr(full_size_probe, "_simclr", simclr)
    recipe, execution = load_recipe("cifar10", full_size.TINY), replace(decide_execution("cpu"), device=device)
    return full_size_probe.Probe(recipe, execution, full_size_probe.Scale(), Clock(10.0))


@pytest.mark.parametrize(
    ("graph", "default", "best"),
    [
        ((120.0, 3.0), (150.0, 30.0), "default"),
        ((120.0, 3.0), (150.0, 41.0), "graph"),  # 40 s are allowed
        ((120.0, 3.0), (119.0, 30.0), "graph"),
        ((101.0, 3.0), (100.0, 30.0), "none"),  # not faster by 2 %
        ("no such operation", "no compiler", "none"),
    ],
)
def test_the_probe_takes_the_fastest_form_of_a_step(
    monkeypatch: pytest.MonkeyPatch, graph: Any, default: Any, best: str
) -> None:
    probe = probe_of(
        monkeypatch, "cuda", none_512=(90.0, 1.0), none_1024=(100.0, 1.0), any_1024=(105.0, 1.0), graph_1024=graph,
        default_1024=default,
    )  # fmt: skip
    batch = full_size_probe._batch(probe)
    full_size_probe._captured_step(probe, batch)
    assert (batch, full_size_probe._fastest_form(probe, batch)) == (1024, best)
    assert probe.found["simclr"]["none 1024, any algorithm"]["views_per_second"] == 105.0
    failed = {f"simclr {form} 1024": f"RuntimeError: {text}" for form, text in (("graph", graph), ("default", default))}
    assert probe.skipped == (failed if isinstance(graph, str) else {})


@pytest.mark.parametrize(("small", "batch"), [(104.0, 1024), (106.0, 512)])
def test_the_probe_takes_a_smaller_batch_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, small: float, batch: int
) -> None:
    probe = probe_of(monkeypatch, none_512=(small, 1.0), none_1024=(100.0, 1.0))
    assert full_size_probe._batch(probe) == batch


def test_a_part_that_no_longer_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(monkeypatch, none_512=(90.0, 1.0), none_1024=(100.0, 1.0))
    probe.clock = FakeClock(1.0)
    probe.clock.now = 52.0
    with probe.part("large", 3.0) as fits:
        assert not fits
    assert probe.skipped == {"large": "not tried: 3 s did not fit any more"}
    with probe.part("small", 1.0) as fits:
        assert fits


def test_the_forms_of_a_step_are_those_of_the_library(finished: Order) -> None:
    """On this device a captured step runs as it is."""
    recipe, execution = finished.recipe, decide_execution("cpu", "float32", 16)
    probe = full_size_probe.Probe(recipe, execution, full_size.TINY_SCALE, Clock(10.0))
    for form, deterministic in (("none", True), ("graph", True), ("none", False)):
        measured = full_size_probe._simclr(probe, form, 32, deterministic)  # type: ignore[arg-type]
        assert measured["views_per_second"] == 2 * measured["images_per_second"] > 0


# --- files and orders -------------------------------------------------------------------------------------------------


def test_weights_are_cut_into_shards_that_fit(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", tmp_path / "work", max_file_mb=0.05, max_files=20)
    module = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(6)))  # 20 kB each in float16
    store.out.mkdir()
    store.keep_weights("own", module)
    store.publish([], "page")
    shards = sorted(store.out.glob("weights-own-*.safetensors"))
    assert [shard.name for shard in shards] == [f"weights-own-{number}-of-3.safetensors" for number in (1, 2, 3)]
    assert all(shard.stat().st_size <= 0.05 * 2**20 for shard in shards)
    loaded = load_shards(store.out, "own")
    assert all(torch.equal(loaded[name], own.half().float()) for name, own in module.state_dict().items())


def test_what_does_not_fit_is_left_out_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", tmp_path / "work", max_file_mb=0.05, max_files=5)
    store.out.mkdir()
    store.keep_weights("large", torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(6))))
    store.keep_weights("small", torch.nn.Linear(3, 3))
    store.publish([], "page")
    assert len(list(store.out.iterdir())) <= 5
    assert json.loads((store.out / "results.json").read_text())["left_out"] == ["large.safetensors: 3 files"]
    assert load_shards(store.out, "small").keys() == {"weight", "bias"}


def test_the_nearest_models_are_those_of_the_smallest_distance() -> None:
    def cell(clean: float, *robust: float) -> dict[str, Any]:
        return {rung: {"accuracy": value} for rung, value in zip(GRID, (clean, *robust), strict=True)}

    cells = {
        "noise-0.06": cell(0.90, 0.10, 0.20, 0.05),
        "noise-0.25": cell(0.879, 0.778, 0.5, 0.5),  # the main one is no candidate
        "linear-0.06": cell(0.85, 0.10, 0.70, 0.05),
        "linear-0.5": cell(0.20, 0.778, 0.1, 0.1),
    }
    assert nearest_to_paper(cells) == ["linear-0.06", "noise-0.06"]


def test_a_run_without_a_plan_is_refused(tmp_path: Path, data: tuple[Path, Path]) -> None:
    with pytest.raises(RushError, match=r"holds no plan\.json; run with --phase probe first"):
        full_size.full_size(order_for(tmp_path, data, phases=("run",)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = parse(["--data", "a", "b", "--minutes", "9", "--out", str(tmp_path / "out"), "--phase", "run"])
    assert (order.data, order.minutes, order.phases) == ((Path("a"), Path("b")), 9.0, ("run",))
    assert order.work == tmp_path / "out.work"
    assert parse(["--minutes", "1", "--out", "o", "--phase", "probe"]).data == ()
    for wrong, told in (
        (["--minutes", "1", "--out", "o"], "--data is needed"),
        (["--minutes", "0", "--out", "o"], "must be above 0"),
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert told in capsys.readouterr().err


def test_the_recipe_of_the_full_size(tmp_path: Path) -> None:
    recipe = Order((), 9.0, tmp_path, tmp_path, width=64).recipe
    assert (recipe.model.encoder, recipe.model.width) == ("resnet18", 64)
    assert (recipe.pretrain.batch_size, recipe.pretrain.views.greyscale) == (1024, 0.1)
    assert (recipe.attack.steps, recipe.attack.epsilon, recipe.attack.step_size) == (20, "8/255", "2/255")
    assert (recipe.attack.eot_samples, recipe.attack.max_votes) == ((1, 4, 16, 64), 1000)
    assert (recipe.certify.method, recipe.certify.num_estimation) == ("sequential", 10_000)
