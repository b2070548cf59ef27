"""The peers' own code at its best settings, against this library: certification and SimCLR, in CPU seconds.

    python benchmarks/peers.py certify --run results/cifar10-small --data CIFAR10 --smoothing SMOOTHING
    python benchmarks/peers.py sequential --run results/cifar10-small --data CIFAR10 --images 500
    python benchmarks/peers.py simclr --data CIFAR10

CIFAR10 is a folder with the data set (docs/data.md), and SMOOTHING the file code/core.py of the repository
locuslab/smoothing, in which the only device name is replaced to run it on a CPU. ART is adversarial-robustness-toolbox
1.20.1, and the SSL library is lightly 1.6.0. The latter needs torchvision, whose compiled operations it does not use:
where they cannot be loaded, empty operations of the same names replace them.

certify: fixed N on the same images and network, in float32, and ours in 8-bit integers, too. Our form of float32 is the
one that the library chooses for a run. First each peer's best batch is found among --batches, and its best layout of
the network, contiguous or channels last, on --searched images of 2,000 samples. Then all take turns, at N = 2,000 and
6,000; N = 100,000 is on the line through both. Classes and radii are compared with ours in float32 at N = 6,000: the
sides draw noise of their own.
sequential: seconds per image of one radius and of a curve, N up to 100,000, in float32 and in integers, against
locuslab's code at N = 100,000 as recorded by ``certify``. Under torchrun with two processes it is the wall time of two
cores.
simclr: views per CPU second of whole training steps: views, ResNet-18 of width 16, projector, loss, gradients, SGD.
lightly's transform, projector and loss run in its documented loop at the best batch of --batches. Images are decoded in
the main process, since workers cost CPU seconds, too. It runs in float32, and with bfloat16 and channels_last set by
hand.
Run one part at a time on an otherwise idle machine.
"""

import argparse
import importlib
import json
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import rush
from pretraining import HIDDEN, LEARNING_RATE, MOMENTUM, OUT, TEMPERATURE, WEIGHT_DECAY, Setting, rush_turn
from rush.models.classifier import Normalize
from rush.pipeline.precision import fastest_form, in_integers
from rush.runtime.distributed import joined_processes, rank, world_size
from rush.runtime.execution import Execution, decide_execution
from rush.smoothing.forward import try_forwards
from rush.training.pretrain import channel_statistics
from shared import (
    RECORDS,
    Row,
    benchmark_images,
    benchmark_parser,
    in_another_form,
    printed,
    record,
    setting_of,
    smoothed_model,
    spread,
)

ALPHA, SELECTION, CAP = 0.001, 100, 100_000
SHORT, LONG = 2_000, 6_000
CURVE = (0.0, 0.25, 0.5, 0.75)
Answer = tuple[int, float]  # class and radius
Certify = Callable[[Tensor, int, int], Answer]  # image (C, H, W), samples, batch


# --- certification ----------------------------------------------------------------------------------------------------


def locuslab(file: Path, network: nn.Module, sigma: float) -> Certify:
    """Return CERTIFY of the code in ``file``, on the CPU."""
    source = file.read_text(encoding="utf-8").replace("device='cuda'", "device='cpu'")
    source = source.replace("from scipy.stats import norm, binom_test", "from scipy.stats import norm")
    module = types.ModuleType("smoothing_core")
    exec(compile(source, str(file), "exec"), vars(module))
    smooth = module.Smooth(network, 10, sigma)

    def certify(x: Tensor, samples: int, batch: int) -> Answer:
        found, radius = smooth.certify(x, SELECTION, samples, ALPHA, batch)
        return int(found), float(radius)

    return certify


def art(network: nn.Module, sigma: float) -> Certify:
    """Return ``certify`` of ART, whose classes begin at 0 and which abstains by -1."""
    smoothing = importlib.import_module("art.estimators.certification.randomized_smoothing")
    smooth = smoothing.PyTorchRandomizedSmoothing(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        device_type="cpu",
        sample_size=SELECTION,
        scale=sigma,
        alpha=ALPHA,
    )

    def certify(x: Tensor, samples: int, batch: int) -> Answer:
        found, radius = smooth.certify(x[None].numpy(), n=samples, batch_size=batch)
        return int(found[0]), float(radius[0])

    return certify


def rush_certify(smoothed: rush.SmoothedClassifier) -> Certify:
    def certify(x: Tensor, samples: int, batch: int) -> Answer:  # noqa: ARG001
        found = rush.certify(
            smoothed, (x[None], torch.zeros(1, dtype=torch.int64)), num_estimation=samples, alpha=ALPHA
        )
        return int(found.prediction[0]), float(found.radius[0])

    return certify


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def best_setting(sides: Mapping[str, Certify], images: Tensor, batches: Sequence[int]) -> tuple[str, int]:
    """Return side and batch that certify ``images`` at N = 2,000 in the fewest CPU seconds, the least of two turns."""
    seconds = dict.fromkeys(product(sides, batches), np.inf)
    for _ in range(2):
        for name, batch in seconds:
            taken = cpu_seconds(lambda n=name, b=batch: answers(sides[n], images, SHORT, b))  # type: ignore[misc]
            seconds[name, batch] = min(seconds[name, batch], taken)
    print("CPU seconds:", {setting: round(least, 2) for setting, least in seconds.items()}, flush=True)
    return min(seconds, key=lambda setting: seconds[setting])


def answers(certify: Certify, images: Tensor, samples: int, batch: int) -> list[Answer]:
    return [certify(image, samples, batch) for image in images]


def certification(arguments: argparse.Namespace) -> None:
    models = certified_models(arguments)
    pixels = benchmark_images(arguments.data, arguments.images, arguments.seed).pixels()
    smoothed, stored = models["float32"], smoothed_model(arguments.run)
    layouts = {"contiguous": False, "channels last": True}
    networks = {
        name: in_another_form(stored, Execution(channels_last=last)).classifier for name, last in layouts.items()
    }
    makers: dict[str, Callable[[nn.Module, float], Certify]] = {
        "locuslab/smoothing": partial(locuslab, arguments.smoothing),
        "ART": art,
    }
    sides = {f"this library, {precision}": rush_certify(model) for precision, model in models.items()}
    batches, forms = dict.fromkeys(sides, smoothed.execution.rows((3, 32, 32))), dict.fromkeys(sides, "its own")
    for side in sides.values():
        answers(side, pixels[:1], SHORT, 0)  # compiles and inspects
    for peer, maker in makers.items():
        tried = {name: maker(network, smoothed.sigma) for name, network in networks.items()}
        forms[peer], batches[peer] = best_setting(tried, pixels[: arguments.searched], arguments.batches)
        sides[peer] = tried[forms[peer]]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, list[Answer]] = {}
    for number in range(arguments.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            short = cpu_seconds(lambda n=name: answers(sides[n], pixels, SHORT, batches[n]))  # type: ignore[misc]
            began = time.process_time()
            found[name] = answers(sides[name], pixels, LONG, batches[name])
            long = time.process_time() - began
            seconds[name].append((short + (long - short) * (CAP - SHORT) / (LONG - SHORT)) / len(pixels))
    first = next(iter(sides))
    rows = []
    for name in sides:
        same = [(own, other) for own, other in zip(found[first], found[name], strict=True) if own[0] == other[0]]
        rows.append(
            printed(
                {
                    "code": name,
                    "layout": forms[name],
                    "batch": batches[name],
                    "CPU s per image at N = 100,000 [least, greatest]": spread(seconds[name]),
                    "times ours": statistics.median(seconds[name]) / statistics.median(seconds[first]),
                    "equal classes": f"{len(same)} of {len(pixels)}",
                    "largest difference of radii": max(abs(own[1] - other[1]) for own, other in same),
                }
            )
        )
    record(arguments, "peers-certify", rows, {**conditions_of(smoothed, len(pixels)), "rounds": arguments.rounds})


def certified_models(arguments: argparse.Namespace) -> dict[str, rush.SmoothedClassifier]:
    """Return the run's network under real-valued Gaussian noise, as the peers have it, in float32 and in integers.

    float32 has the layout and the form, compiled or not, that the library chooses for the work of N = 100,000.
    """
    stored, shape = smoothed_model(arguments.run), (3, 32, 32)
    execution = Execution(folded=True, threads=torch.get_num_threads())
    plain = in_another_form(stored, execution, rush.Gaussian(stored.sigma))
    execution, _ = fastest_form(plain.classifier, execution, shape, 10)
    execution, _ = try_forwards(execution.place(plain.classifier), execution, shape, 10, CAP * arguments.images)
    train = rush.load_images("cifar10", split="train", root=arguments.data)
    integers = in_integers(plain, train, arguments.seed)
    return {"float32": in_another_form(stored, execution, plain.noise), "int8": integers}


def conditions_of(smoothed: rush.SmoothedClassifier, images: int) -> Row:
    setting = {name: value for name, value in setting_of(smoothed).items() if name != "precision"}
    return {**setting, "images": images, "alpha": ALPHA, "N of the selection": SELECTION}


def sequential(arguments: argparse.Namespace) -> None:
    images, peer = benchmark_images(arguments.data, arguments.images, arguments.seed), peer_seconds()
    models, rows = certified_models(arguments), list[Row]()
    for precision, smoothed in models.items():
        for what, radii, count in (("one radius", (0.25,), len(images)), ("curve", CURVE, arguments.curve_images)):
            chosen = images[:: max(1, len(images) // count)]
            began, cpu = time.perf_counter(), time.process_time()
            found = rush.certify(
                smoothed, chosen, "sequential", num_estimation=CAP, alpha=ALPHA, radii=radii, stopping="power"
            )
            elapsed, cpu = (time.perf_counter() - began) / len(found), (time.process_time() - cpu) / len(found)
            row: Row = {
                "precision": precision,
                "what": what,
                "radii": ", ".join(f"{radius:g}" for radius in radii),
                "images": len(found),
                "samples per image": float(found.num_samples.mean()),
                "wall s per image": elapsed,
                "wall minutes for 10,000": 10_000 * elapsed / 60,
            }
            if peer is not None and world_size() == 1:
                row["times fewer CPU s than locuslab/smoothing at N = 100,000"] = peer / cpu
            if rank() == 0:
                rows.append(printed(row))
    if rank() == 0:
        conditions: Row = {**conditions_of(models["float32"], len(images)), "processes": world_size()}
        record(arguments, f"peers-sequential-{world_size()}", rows, conditions)


def peer_seconds() -> float | None:
    """Return the CPU seconds per image of locuslab's code that ``certify`` recorded."""
    file = RECORDS / "peers-certify.json"
    if not file.exists():
        return None
    row = next(row for row in json.loads(file.read_text())["rows"] if row["code"] == "locuslab/smoothing")
    return float(next(value for name, value in row.items() if name.startswith("CPU s"))[0])


# --- SimCLR -----------------------------------------------------------------------------------------------------------


def lightly_parts() -> Any:
    """Import lightly, with empty operations where torchvision's compiled ones cannot be loaded."""
    library, defined = torch.library.Library("torchvision", "DEF"), set[str]()
    while True:
        try:
            importlib.import_module("torchvision")
            break
        except RuntimeError as error:
            missing = re.search(r"torchvision::(\w+) does not exist", str(error))
            if missing is None or missing[1] in defined:
                raise
            defined.add(missing[1])
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    names = ("lightly.transforms", "lightly.loss", "lightly.models.modules")
    transforms, loss, modules = map(importlib.import_module, names)
    return types.SimpleNamespace(
        library=library,  # as long as this lives, its operations exist
        transform=transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0),
        loss=loss.NTXentLoss(temperature=TEMPERATURE),
        projector=modules.SimCLRProjectionHead,
    )


class Views(Dataset[list[Tensor]]):
    """Two views by lightly's transform of one image at a time."""

    def __init__(self, images: NDArray[np.uint8], transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def lightly_rate(setting: Setting, parts: Any, batch: int, execution: Execution, steps: int) -> float:
    """Return views per CPU second of ``steps`` training steps after one that warms up."""
    encoder = setting.encoder()
    head = parts.projector(encoder.features, HIDDEN, OUT)
    network = execution.place(nn.Sequential(encoder, head)).train()
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE / 100, MOMENTUM, weight_decay=WEIGHT_DECAY)
    pixels = setting.images.images.permute(0, 2, 3, 1).contiguous().numpy()
    loader = iter(DataLoader(Views(pixels, parts.transform), batch, shuffle=True, drop_last=True))

    def step() -> None:
        view_a, view_b = next(loader)
        with execution.autocast():
            projected_a, projected_b = (network(execution.layout(view)) for view in (view_a, view_b))
            loss = parts.loss(projected_a, projected_b)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def turn() -> None:
        for _ in range(steps):
            step()

    step()
    return 2 * batch * steps / cpu_seconds(turn)


def rush_rate(setting: Setting, steps: int) -> float:
    """Return views per CPU second of the library's own pre-training, with everything that it does beside steps."""
    turn = rush_turn(setting, "none")
    turn(1)  # loads what is loaded once
    return 2 * setting.batch * 2 * steps / cpu_seconds(lambda: turn(steps))  # two epochs


def simclr(arguments: argparse.Namespace) -> None:
    images = rush.load_images("cifar10", split="train", root=arguments.data).without_labels()
    normalize, parts = Normalize(*channel_statistics(images)), lightly_parts()
    rows = []
    for name in ("float32", "bfloat16"):
        execution = decide_execution("cpu", name)
        setting = Setting(images, normalize, 16, 256, execution)
        tried = {
            batch: max(
                lightly_rate(setting, parts, batch, execution, max(1, arguments.steps * 256 // batch)) for _ in range(2)
            )
            for batch in arguments.batches
        }
        print("lightly, views per CPU second by batch:", {key: round(rate) for key, rate in tried.items()}, flush=True)
        batch = max(tried, key=lambda key: tried[key])
        rates: list[tuple[float, float]] = []
        for number in range(arguments.rounds):
            turns = [
                lambda: rush_rate(setting, arguments.steps),  # noqa: B023 - called at once
                lambda: lightly_rate(setting, parts, batch, execution, max(1, arguments.steps * 256 // batch)),  # noqa: B023
            ]
            order = (0, 1) if number % 2 == 0 else (1, 0)
            found = {which: turns[which]() for which in order}
            rates.append((found[0], found[1]))
        rows.append(
            printed(
                {
                    "precision": name if name == "float32" else "bfloat16, channels_last by hand",
                    "ours, views per CPU s": statistics.median(own for own, _ in rates),
                    "lightly": statistics.median(other for _, other in rates),
                    "its batch": batch,
                    "ratio [least, greatest]": spread([own / other for own, other in rates]),
                }
            )
        )
    conditions: Row = {"noise": "none", "network": "ResNet-18, width 16", "our batch": 256, "rounds": arguments.rounds}
    record(arguments, "peers-simclr", rows, conditions)


def main() -> None:
    parser = benchmark_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("certify", certification), ("sequential", sequential), ("simclr", simclr)):
        part = commands.add_parser(name)
        part.set_defaults(function=function)
        part.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
        part.add_argument("--threads", type=int, default=1)
        part.add_argument("--seed", type=int, default=0)
        if name != "simclr":
            part.add_argument("--run", type=Path, required=True)
            part.add_argument("--images", type=int, default=10 if name == "certify" else 500)
        if name != "sequential":
            part.add_argument("--rounds", type=int, default=5)
            part.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1000])
    commands.choices["certify"].add_argument("--searched", type=int, default=5, help="images of the search")
    commands.choices["certify"].add_argument("--smoothing", type=Path, required=True, help="core.py of locuslab")
    commands.choices["sequential"].add_argument("--curve-images", type=int, default=100)
    commands.choices["simclr"].add_argument("--steps", type=int, default=8, help="of a turn, of 256 images")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with joined_processes():
        arguments.function(arguments)


if __name__ == "__main__":
    main()
