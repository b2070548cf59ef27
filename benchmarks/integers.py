"""Gains and losses of 8-bit integers: speed of certification, certified accuracy, error by layer, kernels.

    python benchmarks/integers.py speed --run results/cifar10-small --data CIFAR10
    python benchmarks/integers.py loss --run results/cifar10-small --data CIFAR10
    python benchmarks/integers.py layers --run results/cifar10-small --data CIFAR10

CIFAR10 is a folder with the data set (docs/data.md).

speed: CPU seconds per image of fixed-N certification of the run's network in float32 and bfloat16, both folded,
compiled and with channels last, and in 8-bit integers, by turns.
loss: the same test images certified sequentially in float32 and in integers, with equal noise; paired differences.
Accuracy under --draws draws of noise for two choices of the scales: by the histogram of an activation, which the
library uses, and by its least and greatest value.
layers: relative error of every convolution's output, and the operations that take the time. With ONEDNN_VERBOSE=1 in
the environment, the kernels are printed, too.
Run it on an otherwise idle machine, on a processor with integer dot products.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import MinMaxObserver
from torch.profiler import ProfilerActivity, profile

import rush
from rush.data.images import ImageSet
from rush.pipeline.precision import in_integers
from rush.runtime.execution import in_precision
from rush.runtime.randomness import stream
from rush.smoothing.quantized import Quantized
from rush.statistics import paired_difference
from shared import (
    Row,
    benchmark_images,
    benchmark_parser,
    in_another_form,
    in_percent,
    labels_of,
    printed,
    record,
    setting_of,
    smoothed_model,
    spread,
)

RADII = (0.0, 0.25, 0.5)
PRECISIONS = ("float32", "bfloat16", "int8")


class Bench:
    """The run's network in all precisions, and the images."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.train = rush.load_images("cifar10", split="train", root=arguments.data)
        self.test = benchmark_images(arguments.data, arguments.images, arguments.seed)
        self.stored = smoothed_model(arguments.run)
        self.seed = arguments.seed
        self.models = {name: self.model(name) for name in PRECISIONS}

    def model(self, precision: str) -> rush.SmoothedClassifier:
        execution = in_precision(self.stored.execution, "float32" if precision == "int8" else precision)  # type: ignore[arg-type]
        if precision == "int8":
            return in_integers(in_another_form(self.stored, execution), self.train, self.seed)
        return in_another_form(self.stored, replace(execution, folded=True, compile_mode="default"))

    def conditions(self) -> Row:
        return {**setting_of(self.models["int8"]), "images": len(self.test)}


def speed(arguments: argparse.Namespace) -> None:
    bench, seconds = Bench(arguments), {name: list[float]() for name in PRECISIONS}
    for number in range(arguments.rounds + 1):
        for name in PRECISIONS[:: 1 if number % 2 else -1]:
            started = time.process_time()
            rush.certify(bench.models[name], bench.test, num_estimation=arguments.samples)
            if number:  # the first turn warms up
                seconds[name].append((time.process_time() - started) / len(bench.test))
    rows = [
        printed(
            {
                "precision": name,
                "CPU s per image [least, greatest]": spread(seconds[name]),
                "times int8": float(np.median(seconds[name]) / np.median(seconds["int8"])),
            }
        )
        for name in PRECISIONS
    ]
    record(
        arguments, "integers-speed", rows, {**bench.conditions(), "N": arguments.samples, "rounds": arguments.rounds}
    )


def loss(arguments: argparse.Namespace) -> None:
    bench, rows = Bench(arguments), list[Row]()
    certified = {}
    for name in ("float32", "int8"):
        found = rush.certify(
            bench.models[name], bench.test, "sequential", num_estimation=10_000, radii=RADII, stopping="power"
        )
        certified[name] = np.stack([found.correct & (found.radius >= radius) for radius in RADII])
    for radius, plain, integers in zip(RADII, certified["float32"], certified["int8"], strict=True):
        row: Row = {
            "what": f"certified at l2 {radius:g}",
            "float32, %": round(100 * plain.mean(), 1),
            "int8, %": round(100 * integers.mean(), 1),
            "int8 less float32, points": in_percent(paired_difference(integers, plain)),
        }
        rows.append(printed(row))
    chosen = {"histogram": bench.models["int8"]}
    with mock.patch("torch.ao.quantization.observer.HistogramObserver", MinMaxObserver):
        chosen["least and greatest value"] = bench.model("int8")
    plain_right = noisy_accuracy(bench, bench.models["float32"], arguments.draws)
    for name, model in chosen.items():
        right = noisy_accuracy(bench, model, arguments.draws)
        row = {
            "what": f"accuracy under {arguments.draws} draws of noise, scales by {name}",
            "float32, %": round(100 * plain_right.mean(), 2),
            "int8, %": round(100 * right.mean(), 2),
            "int8 less float32, points": (
                100 * (right - plain_right).mean(),
                *(100 * ((right - plain_right).mean() + side * 1.96 * error(right - plain_right)) for side in (-1, 1)),
            ),
        }
        rows.append(printed(row))
    record(arguments, "integers-loss", rows, bench.conditions())


def noisy_accuracy(bench: Bench, model: rush.SmoothedClassifier, draws: int) -> np.ndarray:
    """Share of right answers of each image, (N,), under equal draws for all models."""
    x, y = bench.test.pixels(), labels_of(bench.test)
    generators = model.streams(bench.seed, "benchmark/noise", bench.test.ids.tolist())
    counts = model.counts(x, draws, generators)
    return counts.gather(1, y[:, None])[:, 0].numpy() / draws


def error(differences: np.ndarray) -> float:
    """Standard error of the mean over images."""
    return float(differences.std() / len(differences) ** 0.5)


def layers(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    classifier = bench.models["int8"].classifier
    quantized = next(layer for layer in classifier.modules() if isinstance(layer, Quantized))
    integers, smooth = quantized._forms
    x = noisy(bench.test, bench.stored)[:256]
    with torch.no_grad():
        inputs = classifier.normalize(x)  # type: ignore[operator]
        exact = outputs_of(smooth, inputs, nn.Conv2d)
        found = outputs_of(integers, inputs, torch.ao.nn.quantized.Conv2d)
    rows: list[Row] = []
    for number, ((own, with_relu), (other, _)) in enumerate(zip(found, exact, strict=True)):
        expected = other.relu() if with_relu else other
        rows.append(
            printed({"convolution": number + 1, "relative error": float((own - expected).std() / expected.std())})
        )
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        quantized(inputs)
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))
    record(arguments, "integers-layers", rows, bench.conditions())


def noisy(images: ImageSet, smoothed: rush.SmoothedClassifier) -> Tensor:
    x = images.pixels()
    return x + smoothed.noise.sample(x.shape, stream(0, "benchmark", "layers"))


def outputs_of(network: nn.Module, x: Tensor, kind: type) -> list[tuple[Tensor, bool]]:
    """Outputs of the layers of a kind, in their order, and whether each is that of a ReLU in the layer."""
    found: list[tuple[Tensor, bool]] = []

    def keep(layer: nn.Module, _: object, output: Tensor) -> None:
        value = output.dequantize() if output.is_quantized else output
        found.append((value, "ReLU" in type(layer).__name__))

    hooks = [layer.register_forward_hook(keep) for layer in network.modules() if isinstance(layer, kind)]
    network(x)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = benchmark_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parts: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
        "speed": (speed, 20),
        "loss": (loss, 1000),
        "layers": (layers, 256),
    }
    for name, (function, images) in parts.items():
        part = commands.add_parser(name)
        part.set_defaults(function=function)
        part.add_argument("--run", type=Path, required=True)
        part.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
        part.add_argument("--images", type=int, default=images)
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--threads", type=int, default=1)
    commands.choices["speed"].add_argument("--samples", type=int, default=2000)
    commands.choices["speed"].add_argument("--rounds", type=int, default=5)
    commands.choices["loss"].add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
