"""The probe of the full-size run: the speed of the device at each task, and the plan that follows from it.

Everything is measured on random images and seeded weights, which cost the same as real ones. A part that fails or no
longer fits into the time is named in the plan with its reason, and the run falls back on the eager form.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import rush
from full_size_items import Events, changed, training_settings
from full_size_store import Clock
from rush.attacks.gradient import fresh_noise, loss_and_gradient
from rush.attacks.losses import cross_entropy
from rush.choices import CompileMode, TrainingCompile
from rush.commands.cost import STEPS, conditions_text, measure
from rush.data.batches import Resident
from rush.data.images import ImageSet
from rush.errors import RushError
from rush.models.classifier import Classifier
from rush.pipeline.context import training_noise
from rush.pipeline.train import new_classifier, spec_of
from rush.recipe.load import load_recipe
from rush.recipe.schema import Recipe
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing.forward import Forward
from rush.smoothing.noise import Gaussian
from rush.training.budget import clock
from rush.training.finetune import finetune
from rush.training.pretrain import pretrain
from shared import labels_of

BATCHES = (512, 1024)
RIVALS = ("pgd-at", "trades", "smoothadv", "acl")
RIVAL_SECONDS = 10.0
MODEL_PASSES = 2_000_000  # forward passes that the run asks of a model: what a compilation must pay off on
SIGMA = 0.25
_CLEARLY = 0.95  # of the fastest batch's rate: less is clearly slower
_COMPILING = 25.0  # seconds that compiling a training step is expected to take
# Fields of a trial. Random images teach nothing, so the learning rate is nearly 0.
_TWO_EPOCHS: dict[str, Any] = {"epochs": 2, "minutes": None, "learning_rate": 1e-9, "warmup_epochs": 0.0}


@dataclass(frozen=True)
class Scale:
    """How long a part measures, in seconds, and on how much.

    Attributes:
        seconds: of each measurement, warm-up apart.
        batches: of SimCLR; the run takes the last one unless another is clearly faster.
        tiles: of the judged forward.
        compile_seconds: what a compiled form may take to compile; 0 tries none.
        rivals: adversarial trainings whose step is timed.
    """

    seconds: float = 1.0
    batches: tuple[int, ...] = BATCHES
    tiles: tuple[int, ...] = (1024, 2000)
    compile_seconds: float = 40.0
    rivals: tuple[str, ...] = RIVALS


@dataclass
class Probe:
    """One probe: its recipe, execution and clock, and what it has found so far."""

    recipe: Recipe
    execution: Execution
    scale: Scale
    clock: Clock
    found: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[bool]:
        """Within the context part ``name`` is measured, if True is given: it expects to take ``seconds``.

        What it raises is noted, and the probe continues.
        """
        if self.clock.until_last_start < seconds:
            self.skipped[name] = f"not tried: {seconds:.0f} s did not fit any more"
            yield False
            return
        try:
            yield True
        except Exception as error:  # a form that cannot be used here must not end the probe
            self.skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def probe(recipe: Recipe, execution: Execution, scale: Scale, clock: Clock) -> dict[str, Any]:
    """Return the plan: what was measured, what was skipped and why, and the choices that follow."""
    own = Probe(recipe, execution, scale, clock)
    batch = _batch(own)
    _captured_step(own, batch)
    _eager_forwards(own)
    attack = _attack_pass(own)
    finetuning = _finetuning(own)
    _rivals(own)
    tile, compile_mode = _fastest_forward(own)
    _engine(own, replace(execution, tile=tile, compile_mode=compile_mode))
    form = _fastest_form(own, batch)
    forward = own.found["forward"][f"{tile} {compile_mode}"]["samples_per_second"]
    return {
        "conditions": conditions_text(execution),
        "device": device_facts(execution),
        "network": f"{recipe.model.encoder}, width {recipe.model.width}",
        "choices": {
            "batch_size": batch,
            "compile_training": form,
            "tile": tile,
            "compile_mode": compile_mode,
        },
        "rates": {"training": finetuning, "forward": forward, "attack": attack},
        "measured": own.found,
        "skipped": own.skipped,
        "seconds": clock.elapsed,
    }


def device_facts(execution: Execution) -> dict[str, Any]:
    """Name, memory and driver of the device, as far as they are known."""
    if torch.device(execution.device).type != "cuda":
        return {"name": execution.device}
    properties = torch.cuda.get_device_properties(execution.device)
    return {"name": properties.name, "memory": properties.total_memory, "driver": _driver()}


def _driver() -> str | None:
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no package or no driver: a fact is missing, nothing else
        return None


# --- parts ------------------------------------------------------------------------------------------------------------


def _batch(probe: Probe) -> int:
    """SimCLR steps, eager, by batch; the run's batch."""
    steps: dict[str, Any] = probe.found.setdefault("simclr", {})
    for batch in probe.scale.batches:
        with probe.part(f"simclr none {batch}", 4 * probe.scale.seconds) as fits:
            if fits:
                steps[f"none {batch}"] = _simclr(probe, "none", batch)
    rates = {
        batch: steps[f"none {batch}"]["views_per_second"] for batch in probe.scale.batches if f"none {batch}" in steps
    }
    if not rates:
        raise RushError(f"no training step could be measured: {probe.skipped}")
    wanted = max(rates)
    return wanted if rates[wanted] >= _CLEARLY * max(rates.values()) else max(rates, key=lambda batch: rates[batch])


def _captured_step(probe: Probe, batch: int) -> None:
    """The whole step as a CUDA graph, and the eager one with any algorithm, where there is a CUDA device."""
    if torch.device(probe.execution.device).type != "cuda":
        return
    with probe.part(f"simclr graph {batch}", 5 + 4 * probe.scale.seconds) as fits:
        if fits:
            probe.found["simclr"][f"graph {batch}"] = _simclr(probe, "graph", batch)
    with probe.part(f"simclr any algorithm {batch}", 4 * probe.scale.seconds) as fits:
        if fits:
            probe.found["simclr"][f"none {batch}, any algorithm"] = _simclr(probe, "none", batch, deterministic=False)


def _fastest_form(probe: Probe, batch: int) -> TrainingCompile:
    """The encoder compiled, where that fits; the form of the step that is clearly the fastest."""
    steps, limit = probe.found["simclr"], probe.scale.compile_seconds
    with probe.part(f"simclr default {batch}", _COMPILING + 4 * probe.scale.seconds) as fits:
        if fits and limit:
            steps[f"default {batch}"] = _simclr(probe, "default", batch)
    best: TrainingCompile = "none"
    most = steps[f"none {batch}"]["views_per_second"]
    gains: tuple[tuple[TrainingCompile, float], ...] = (("graph", 1.02), ("default", 1.08))  # the run compiles again
    for form, gain in gains:
        tried = steps.get(f"{form} {batch}")
        if tried and tried["warm_up_seconds"] <= limit and tried["views_per_second"] > gain * most:
            best, most = form, tried["views_per_second"]
    return best


def _simclr(probe: Probe, form: TrainingCompile, batch: int, deterministic: bool = True) -> dict[str, Any]:
    recipe = changed(probe.recipe, execution={"compile_training": form}, pretrain={"batch_size": batch})
    execution = replace(probe.execution, deterministic=deterministic)
    execution.configure()

    def run(steps: int) -> list[dict[str, Any]]:
        images, events = _random_images(recipe, steps * batch), Events()
        source = Resident(images.without_labels(), execution.device)
        classifier = _classifier(recipe)
        pretrain(
            source,
            classifier.encoder,
            classifier.normalize,
            recipe.pretrain.replace(**_TWO_EPOCHS),
            training_settings(recipe, execution, events),
        )
        return events.epochs

    try:
        measured = _measured(run, probe.scale.seconds)
    finally:
        probe.execution.configure()
    rate = measured["images_per_second"]
    return {**measured, "views_per_second": 2 * rate, "step_seconds": batch / rate}


def _eager_forwards(probe: Probe) -> None:
    """The judged forward, eager, by tile."""
    found: dict[str, Any] = probe.found.setdefault("forward", {})
    for tile in probe.scale.tiles:
        with probe.part(f"forward {tile} none", 2 * probe.scale.seconds) as fits:
            if fits:
                found[f"{tile} none"] = _forward(probe, tile, "none")


def _fastest_forward(probe: Probe) -> tuple[int, CompileMode]:
    """The judged forward, compiled, where that fits; tile and form that get a model's passes done soonest."""
    found, tile = probe.found["forward"], probe.scale.tiles[-1]
    if probe.scale.compile_seconds:
        with probe.part(f"forward {tile} default", _COMPILING / 2 + 2 * probe.scale.seconds) as fits:
            if fits:
                found[f"{tile} default"] = _forward(probe, tile, "default")
    total = {
        name: entry["compile_seconds"] + MODEL_PASSES / entry["samples_per_second"] for name, entry in found.items()
    }
    tile_text, best = min(total, key=lambda name: total[name]).split(" ", 1)
    return int(tile_text), "default" if best == "default" else "none"


def _forward(probe: Probe, tile: int, mode: CompileMode) -> dict[str, Any]:
    execution = replace(probe.execution, tile=tile, compile_mode=mode)
    images = _random_images(probe.recipe, 1)
    network = execution.place(_classifier(probe.recipe)).eval()
    forward = Forward(network, execution, images.num_classes)
    x = torch.full((tile, *images.shape), 0.5, device=execution.device)
    began = clock(execution.device)
    forward(x)
    compile_seconds = 0.0 if mode == "none" else clock(execution.device) - began
    return {"samples_per_second": _rate(lambda: forward(x), tile, probe), "compile_seconds": compile_seconds}


def _attack_pass(probe: Probe) -> float:
    """Forward and backward to the input of the smoothed classifier, 16 draws each of 16 images; passes per second."""
    images, device = _random_images(probe.recipe, 16), probe.execution.device
    smoothed = _smoothed(probe, replace(probe.execution, tile=probe.scale.tiles[0]))
    x, y = images.pixels(device=device), labels_of(images).to(device)
    seen = fresh_noise(smoothed, 16, smoothed.streams(0, "probe", [str(row) for row in range(16)]))
    rate = _rate(lambda: loss_and_gradient(seen, x, y, cross_entropy), 16 * 16, probe)
    probe.found["attack"] = {"passes_per_second": rate, "draws": 16, "images": 16}
    return rate


def _engine(probe: Probe, execution: Execution) -> None:
    """The certification engine against the bare forward of the same form."""
    with probe.part("engine", 4 * probe.scale.seconds) as fits:
        if not fits:
            return
        images, smoothed = _random_images(probe.recipe, 16), _smoothed(probe, execution)
        bare = probe.found["forward"][f"{execution.tile} {execution.compile_mode}"]["samples_per_second"]
        each = max(200, int(bare * probe.scale.seconds / 16))
        rush.certify(smoothed, images, num_estimation=200)  # inspects the model, and compiles it
        began = time.perf_counter()
        certificates = rush.certify(smoothed, images, num_estimation=each)
        rate = float(certificates.num_samples.sum()) / (time.perf_counter() - began)
        probe.found["engine"] = {"samples_per_second": rate, "of_bare_forward": rate / bare}


def _finetuning(probe: Probe) -> float:
    """Training under noise, eager; images per second."""
    recipe = probe.recipe
    batch = recipe.finetune.batch_size

    def run(steps: int) -> list[dict[str, Any]]:
        images, events = _random_images(recipe, steps * batch), Events()
        finetune(
            images,
            _classifier(recipe),
            recipe.finetune.replace(**_TWO_EPOCHS),
            training_settings(recipe, probe.execution, events),
            noise=training_noise(recipe),
        )
        return events.epochs

    probe.found["finetune"] = {"batch_size": batch, **_measured(run, probe.scale.seconds)}
    return float(probe.found["finetune"]["images_per_second"])


def _rivals(probe: Probe) -> None:
    """A step of each adversarial training, in a few seconds together."""
    limit = probe.clock.elapsed + RIVAL_SECONDS
    for name in probe.scale.rivals:
        with probe.part(f"step of {name}", RIVAL_SECONDS / len(RIVALS)) as fits:
            if fits and probe.clock.elapsed > limit:
                probe.skipped[f"step of {name}"] = f"not tried: the {RIVAL_SECONDS:.0f} s of these steps were over"
            elif fits:
                probe.found.setdefault("rivals", {})[name] = _rival(probe, name)


def _rival(probe: Probe, name: str) -> dict[str, Any]:
    model = probe.recipe.model
    overrides = [f"model.width={model.width}", f"data.name={probe.recipe.data.name}"]
    overrides += [f"execution.device={probe.execution.device}"]
    if name != "acl":
        overrides.append("pretrain.epochs=0")
    if torch.device(probe.execution.device).type != "cuda":
        overrides += ["pretrain.batch_size=32", "finetune.batch_size=32"]
    recipe = load_recipe(f"cifar10-{name}", overrides)
    cost = measure(recipe, steps=STEPS if torch.device(probe.execution.device).type == "cuda" else 1)
    stage = cost.stages[0]
    batch = (recipe.pretrain if stage.stage == "pretrain" else recipe.finetune).batch_size
    return {
        "objective": stage.objective,
        "batch_size": batch,
        "step_seconds": stage.seconds_per_step,
        "images_per_second": stage.images_per_second,
        "passes_per_image_and_epoch": stage.passes / (stage.steps * batch),
        "peak_memory": stage.peak_memory,
        "joules_per_step": None if stage.joules is None else stage.joules / stage.steps,
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured(run: Callable[[int], list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    """Images per second of a training's second epoch, of about ``seconds``, the first one being its warm-up.

    Args:
        run: trains two epochs of the given number of steps each and returns their logged figures.
        seconds: of the epoch that counts.
    """
    began = time.perf_counter()
    short = run(3)[-1]  # a capture, in the third step, is in the first epoch
    warm_up_seconds = time.perf_counter() - began - short["seconds"]
    steps = max(3, min(200, int(3 * seconds / max(short["seconds"], 1e-3))))
    epoch = short if steps <= 3 else run(steps)[-1]
    return {
        "images_per_second": epoch["images_per_second"],
        "steps": steps,
        "warm_up_seconds": warm_up_seconds,
        "peak_memory": epoch["peak_memory"],
    }


def _rate(work: Callable[[], object], amount: int, probe: Probe) -> float:
    """How much of ``amount`` per call ``work`` does per second, after two calls that warm up."""
    for _ in range(2):
        work()
    began, done = clock(probe.execution.device), 0
    while (elapsed := clock(probe.execution.device) - began) < probe.scale.seconds:
        work()
        done += amount
    return done / elapsed


def _random_images(recipe: Recipe, count: int) -> ImageSet:
    generator = stream(recipe.seed, "probe", "images")
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageSet(pixels, labels, tuple(map(str, range(10))), np.arange(count).astype(str), "random", "train")


def _classifier(recipe: Recipe) -> Classifier:
    return new_classifier(spec_of(recipe, _random_images(recipe, 16)), recipe.seed)


def _smoothed(probe: Probe, execution: Execution) -> rush.SmoothedClassifier:
    network = execution.place(_classifier(probe.recipe)).eval()
    return rush.SmoothedClassifier(network, noise=Gaussian(SIGMA), num_classes=10, execution=execution)
