"""The growth of cost with samples, images, the side of images and processes, and what keeping freed memory saves.

    python benchmarks/scaling.py sizes
    python benchmarks/scaling.py processes --part certify
    python benchmarks/scaling.py memory

sizes: CPU seconds of fixed-N certification of an untrained ResNet-18 of width 8, doubled four times in one of: samples
per image, images, side of the images. The exponent is the slope of the logarithms. Linear growth is 1, and 2 for the
side, whose square is the number of pixels. Peak memory of the process is that of the largest.
processes: wall seconds of a stage of the recipe digits in one process and in two under torchrun, one thread each: the
training of the encoder, certification, attacks. Earlier stages are computed once.
memory: CPU seconds of work with an untrained ResNet-18 of width 16, in processes that return freed memory to the
system, as the C library does by default, and in processes that keep it, as the commands do, by turns.
Run it on an otherwise idle machine.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import rush
from rush.models.classifier import Classifier
from rush.models.storage import ClassifierSpec
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.randomness import seeded_init, stream
from rush.training.contrastive import nt_xent
from shared import Row, benchmark_parser, printed, record, spread

STAGES = ("pretrain", "finetune", "certify", "attack")
WORK = {"training steps": "five of SimCLR, 512 views", "certification": "2,000 samples of 8 images", "attack": "PGD-20"}


def sizes(arguments: argparse.Namespace) -> None:
    execution = Execution(threads=torch.get_num_threads(), folded=True)
    smoothed = rush.SmoothedClassifier(untrained(8), 0.25, 10, execution=execution)

    def seconds(samples: int, images: int, side: int) -> float:
        x = torch.rand(images, 3, side, side, generator=stream(0, "benchmark", "images"))
        started = time.process_time()
        rush.certify(smoothed, (x, torch.zeros(images, dtype=torch.int64)), num_estimation=samples)
        return time.process_time() - started

    seconds(1_000, 1, 32)  # warms up
    grown: dict[str, tuple[list[int], Callable[[int], float]]] = {
        "samples per image": ([1_000, 2_000, 4_000, 8_000, 16_000], lambda value: seconds(value, 2, 32)),
        "images": ([2, 4, 8, 16, 32], lambda value: seconds(1_000, value, 32)),
        "side of the images": ([16, 32, 64, 128], lambda value: seconds(2_000, 1, value)),
    }
    rows: list[Row] = []
    for what, (values, cost) in grown.items():
        least = [min(cost(value) for _ in range(arguments.rounds)) for value in values]
        slope = float(np.polyfit(np.log(values), np.log(least), 1)[0])
        row: Row = {"what grows": f"{what}, {values[0]:,} to {values[-1]:,}", "exponent": round(slope, 2)}
        row["CPU s, least and greatest"] = f"{least[0]:.2f} and {least[-1]:.2f}"
        row["peak memory of the process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rows.append(printed(row))
    record(arguments, "scaling-sizes", rows, {"noise": "gaussian", "network": "ResNet-18, width 8", "device": "cpu"})


def untrained(width: int) -> Classifier:
    spec = ClassifierSpec("resnet18", width, 3, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"))
    network = spec.build()
    seeded_init(network, stream(0, "benchmark", "scaling"))
    return network.eval()


def memory(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name, amount in WORK.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * arguments.rounds):
            kept = bool(number % 2)
            words = ["work", "--threads", str(arguments.threads), "--name", name, *(["--kept"] if kept else [])]
            found = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            seconds[kept].append(float(found.stdout))
        ratios = [returned / kept for returned, kept in zip(seconds[False], seconds[True], strict=True)]
        row: Row = {"work": f"{name}, {amount}"}
        row |= {"CPU s, memory returned": spread(seconds[False]), "CPU s, memory kept": spread(seconds[True])}
        rows.append(printed({**row, "times as fast": spread(ratios)}))
    execution = decide_execution("cpu")
    conditions: Row = {"noise": "gaussian", "sigma": 0.25, "network": "ResNet-18, width 16"}
    conditions |= {"precision": execution.precision, "rounds": arguments.rounds}
    record(arguments, "scaling-memory", rows, conditions)


def work(arguments: argparse.Namespace) -> None:
    """Do one kind of work, the first time unmeasured, and print its CPU seconds."""
    execution = decide_execution("cpu")
    if arguments.kept:
        execution.configure()
    network = execution.place(untrained(16))
    assert isinstance(network, Classifier)
    smoothed = rush.SmoothedClassifier(network, 0.25, 10, execution=execution)
    x = torch.rand(512, 3, 32, 32, generator=stream(0, "benchmark", "images"))
    labels = torch.zeros(len(x), dtype=torch.int64)

    def training() -> None:
        for _ in range(5):
            first, second = execution.logits(network.train(), x).chunk(2)
            nt_xent(first, second, 0.5).backward()

    def certification() -> None:
        rush.certify(smoothed, (x[:8], labels[:8]), num_estimation=2_000)

    def attack() -> None:
        rush.attack(smoothed, (x[:32], labels[:32]), threat=rush.ThreatModel("linf", 8 / 255), method="pgd", steps=20)

    jobs = dict(zip(WORK, (training, certification, attack), strict=True))
    job = jobs[arguments.name]
    job()
    started = time.process_time()
    job()
    print(time.process_time() - started)


def processes(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for name in STAGES[: STAGES.index(arguments.part)]:
            stage(run, name, 1)
        rows: list[Row] = []
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for number in range(arguments.rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                copy = Path(folder) / "copy"
                shutil.rmtree(copy, ignore_errors=True)
                if run.exists():
                    shutil.copytree(run, copy)
                began = time.perf_counter()
                stage(copy, arguments.part, count)
                seconds[count].append(time.perf_counter() - began)
        for count, found in seconds.items():
            rows.append(
                printed(
                    {
                        "stage of digits": arguments.part,
                        "processes": count,
                        "wall s [least, greatest]": spread(found),
                        "times one process": statistics.median(seconds[1]) / statistics.median(found),
                    }
                )
            )
    record(arguments, f"scaling-{arguments.part}", rows, {"noise": "discrete", "recipe": "digits"})


def stage(run: Path, name: str, count: int) -> None:
    """Run one stage with the loading that a command has; the first of a run makes its folder."""
    words = ["-m", "rush", name, *(["digits", "--out", str(run)] if not run.exists() else [str(run)])]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *words], env=environment, check=True, capture_output=True)


def main() -> None:
    parser = benchmark_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("sizes", sizes), ("processes", processes), ("memory", memory), ("work", work)):
        part = commands.add_parser(name)
        part.set_defaults(function=function)
        part.add_argument("--rounds", type=int, default=3)
        part.add_argument("--threads", type=int, default=1)
    commands.choices["processes"].add_argument("--part", choices=("pretrain", "certify", "attack"), required=True)
    commands.choices["work"].add_argument("--name", choices=tuple(WORK), required=True)
    commands.choices["work"].add_argument("--kept", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
