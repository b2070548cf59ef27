"""The paper's network from images to the whole ladder, by one command in a stated number of minutes.

    python benchmarks/full_size.py --data CIFAR10 --minutes 9 --out OUT

trains ResNet-18 (``--width 64``) on CIFAR-10 by SimCLR, fine-tunes it under noise, and certifies and attacks the
result, on whatever device there is. CIFAR10 is a folder with the data set (docs/data.md). Several folders are joined.

There are two phases, and --phase selects one of them. *probe* (at most 100 s) measures the device and writes
``plan.json``. It needs no data. *run* follows the plan, unattended. Its items, in order of value: (a) SimCLR; (b)
nearest neighbours and linear probe; (c) fine-tuning under noise of four sigmas, and with 10 % and 1 % of the labels;
(d) Gaussian training from scratch for as many passes as one of these and its share of (a); (e) the protocol grid beside
the paper's 87.9 / 77.8; (f) the ladder to EOT 64; (g) the worst case; (h) certified curves; (i) the sandwich; (j) the
textbook's certificates; (k) one radius on all test images.

Each item has a share of the minutes and a minimum. An item that would overrun takes fewer images, the first ones of the
seeded order, and an item whose minimum does not fit is omitted. Both cases are reported. Nothing starts in the last
tenth. Finished items are kept in the work folder, by default OUT.work, and the same command resumes after them.
``results.md`` in OUT shows the results so far, ``results.json`` has all figures, ``tables.tar.gz`` one line per image,
and ``weights-*.safetensors`` the encoder and one classifier in float16. Nothing is chosen on test images.

``--tiny`` runs every item in seconds, on a tiny network and few images. It is for tests, and runs on the CPU unless
--device is given.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import rush
from full_size_items import ITEMS, Bench, Item, OmittedError, Rates, Sizes, changed
from full_size_page import page
from full_size_probe import Scale, device_facts, probe
from full_size_store import Clock, Store
from rush.data.images import ImageSet, hold_out
from rush.errors import RushError
from rush.recipe.load import load_recipe
from rush.recipe.schema import Recipe
from rush.records.folder import commit, versions
from rush.runtime.execution import decide_execution
from rush.runtime.machine import machine
from rush.runtime.randomness import stream

PROBE_MINUTES = 100 / 60
FULL = (
    "name=cifar10-full",
    "pretrain.batch_size=1024",
    "pretrain.views.greyscale=0.1",
    "pretrain.warmup_epochs=1",
    "finetune.warmup_epochs=0.2",
    "certify.num_estimation=10000",
    "attack.max_votes=1000",
    "attack.eot_samples=[1, 4, 16, 64]",
)
TINY = (
    "name=cifar10-tiny",
    "model.encoder=small",
    "pretrain.batch_size=64",
    "pretrain.warmup_epochs=0",
    "pretrain.projector_hidden=16",
    "pretrain.projector_out=8",
    "finetune.batch_size=32",
    "finetune.warmup_epochs=0",
    "certify.num_estimation=200",
    "attack.max_votes=300",
    "attack.steps=3",
    "attack.eot_samples=[1, 2]",
)
TINY_SIZES = Sizes(
    grid=3, ladder=2, worst=1, curve=6, radius=8, sandwich=3, textbook=2, least=3, least_worst=1, textbook_samples=300,
    tenth=0.25, hundredth=0.1, epochs=4, neighbours=(5, 10),
)  # fmt: skip
TINY_SCALE = Scale(seconds=0.05, batches=(64,), tiles=(16,), compile_seconds=0.0, rivals=("pgd-at",))
TINY_IMAGES = (256, 64)  # training and test images
TINY_WIDTH = 4


@dataclass(frozen=True)
class Order:
    """What a call asks for."""

    data: tuple[Path, ...]
    minutes: float
    out: Path
    work: Path
    width: int = 64
    tiny: bool = False
    phases: tuple[str, ...] = ("probe", "run")
    max_file_mb: float = 16.0
    max_files: int = 8
    device: str = "auto"
    items: tuple[Item, ...] = field(default=ITEMS, repr=False)

    @property
    def recipe(self) -> Recipe:
        """The recipe of all trainings."""
        if self.tiny:
            device = "cpu" if self.device == "auto" else self.device
            precision = "float32" if device == "cpu" else "auto"
            placed = [f"execution.device={device}", f"execution.precision={precision}"]
            return load_recipe("cifar10", [*TINY, *placed, f"model.width={TINY_WIDTH}"])
        return load_recipe("cifar10", [*FULL, f"model.width={self.width}", f"execution.device={self.device}"])

    @property
    def sizes(self) -> Sizes:
        return TINY_SIZES if self.tiny else Sizes()

    def scale(self, device: str) -> Scale:
        """How the probe measures on ``device``."""
        if self.tiny:
            return TINY_SCALE
        if torch.device(device).type == "cuda":
            return Scale()
        # On a CPU large batches leave the cache, and compiling a training step takes longer than it saves.
        return Scale(batches=(256, 1024), tiles=(256,), compile_seconds=0.0)


def full_size(order: Order) -> int:
    """Carry out ``order``; the exit status: 1 when the sandwich found more violations than chance explains."""
    store = Store(order.out, order.work, order.max_file_mb, order.max_files)
    if "probe" in order.phases and (order.phases == ("probe",) or store.plan() is None):
        store.write_plan(probed(order))
    if "run" not in order.phases:
        return 0
    plan = store.plan()
    if plan is None:
        raise RushError(f"{order.out} holds no plan.json; run with --phase probe first, or without --phase")
    return run(order, store, plan)


def probed(order: Order) -> dict[str, Any]:
    """The plan that the probe of this device gives."""
    recipe = order.recipe
    execution = decide_execution(recipe.execution.device, recipe.execution.precision)
    execution.configure()
    say(f"probe: {execution.device}, {execution.precision}")
    plan = probe(recipe, execution, order.scale(execution.device), Clock(min(PROBE_MINUTES, order.minutes / 3)))
    say(f"probe: {plan['seconds']:.0f} s; {plan['choices']}")
    return plan


def run(order: Order, store: Store, plan: dict[str, Any]) -> int:
    """Compute the items that are not finished yet, in their order, by ``plan``."""
    probe_seconds = float(plan["seconds"]) if "probe" in order.phases else 0.0
    clock = Clock(order.minutes - probe_seconds / 60, store.used("run"))
    bench = bench_of(order, store, plan, clock)
    store.begin(
        {
            "recipe": bench.recipe.model_dump(mode="json"),
            "choices": plan["choices"],
            "images": [bench.train.fingerprint, bench.test.fingerprint],
            "execution": bench.execution.as_dict(),
        }
    )
    facts = conditions(order, bench, plan)
    names = [item.name for item in order.items]
    for position, item in enumerate(order.items):
        if (store.item(item.name) or {"status": "failed"})["status"] == "failed":
            shares = sum(later.share for later in order.items[position:])
            store.finish(item.name, figures_of(item, bench, clock.allotted(item.share, shares)))
            store.keep_time("run", clock)
        store.publish(names, page(facts, {name: found for name in names if (found := store.item(name))}))
    say(f"run: {clock.elapsed:.0f} s of {60 * clock.minutes:.0f} s; {store.out / 'results.md'}")
    sandwich = store.item("i") or {}
    return int(len(sandwich.get("violations", ())) > sandwich.get("allowed", 0))


def figures_of(item: Item, bench: Bench, seconds: float) -> dict[str, Any]:
    """The figures of one item, or why it is omitted."""
    head = {"item": item.name, "title": item.title, "allotted": seconds}
    began = bench.clock.elapsed
    say(f"({item.name}) {item.title}: {seconds:.0f} s")
    try:
        found = {**head, "status": "done", **item.figures(bench, seconds)}
    except OmittedError as reason:
        found = {**head, "status": "omitted", "reason": str(reason)}
    except Exception as error:  # the run is unattended: one item that fails must not cost the others
        known = isinstance(error, RushError)
        if not known:
            traceback.print_exc()
        found = {**head, "status": "failed", "reason": str(error) if known else f"{type(error).__name__}: {error}"}
    found["seconds"] = bench.clock.elapsed - began
    told = "" if found["status"] == "done" else f": {found['reason']}"
    say(f"({item.name}) {found['status']} after {found['seconds']:.1f} s{told}")
    return found


def bench_of(order: Order, store: Store, plan: dict[str, Any], clock: Clock) -> Bench:
    """What the items share, with images and execution as the plan says."""
    choices = plan["choices"]
    recipe = planned(order.recipe, choices)
    execution = decide_execution(recipe.execution.device, recipe.execution.precision, choices["tile"])
    execution = replace(execution, compile_mode=choices["compile_mode"])
    execution.configure()
    train, test = images_of(order)
    return Bench(recipe, order.sizes, store, clock, execution, Rates(**plan["rates"]), train, test)


def planned(recipe: Recipe, choices: dict[str, Any]) -> Recipe:
    """The recipe with the plan's form of a training step and batch of SimCLR; the learning rate follows the square root
    of the batch."""
    batch = choices["batch_size"]
    rate = recipe.pretrain.learning_rate * (batch / recipe.pretrain.batch_size) ** 0.5
    return changed(
        recipe,
        pretrain={"batch_size": batch, "learning_rate": rate},
        execution={"compile_training": choices["compile_training"]},
    )


def images_of(order: Order) -> tuple[ImageSet, ImageSet]:
    """The training and the test images, few of them for ``--tiny``."""
    train, test = (rush.load_images("cifar10", split=split, root=list(order.data)) for split in ("train", "test"))
    if order.tiny:
        train, test = (
            hold_out(images, count, stream(0, "tiny"))[1] if count < len(images) else images
            for images, count in zip((train, test), TINY_IMAGES, strict=True)
        )
    return train, test


def conditions(order: Order, bench: Bench, plan: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the figures must know."""
    return {
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "device": device_facts(bench.execution),
        "execution": bench.execution.as_dict(),
        "minutes": order.minutes,
        "network": plan["network"],
        "images": {"train": len(bench.train), "test": len(bench.test)},
        "plan": plan,
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> Order:
    """The order that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=(), help="folders with CIFAR-10, joined")
    parser.add_argument("--minutes", type=float, required=True, help="what the phases may take together")
    parser.add_argument("--out", type=Path, required=True, help="folder for plan, results and weights")
    parser.add_argument("--work", type=Path, help="folder for finished items, by default OUT.work")
    parser.add_argument("--phase", choices=("probe", "run"), help="only this phase; both by default")
    parser.add_argument("--width", type=int, default=64, help="channels of the network's first stage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-file-mb", type=float, default=16.0, help="largest file in OUT")
    parser.add_argument("--max-files", type=int, default=8, help="most files in OUT")
    parser.add_argument("--tiny", action="store_true", help="every item in seconds, for tests")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes:g}")
    phases = ("probe", "run") if given.phase is None else (given.phase,)
    if "run" in phases and not given.data:
        parser.error("--data is needed for the run: give the folders with CIFAR-10")
    work = given.work or given.out.with_name(given.out.name + ".work")
    return Order(
        tuple(given.data), given.minutes, given.out, work, given.width, given.tiny, phases, given.max_file_mb,
        given.max_files, given.device,
    )  # fmt: skip


def main() -> int:
    try:
        return full_size(parse())
    except RushError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
