"""The cost and effect of discrete noise, against Gaussian noise in float32, on one trained network.

    OMP_NUM_THREADS=1 python benchmarks/discrete_noise.py draws
    OMP_NUM_THREADS=1 python benchmarks/discrete_noise.py certify --run results/cifar10-small --data CIFAR10

draws: nanoseconds per value to draw noise and add it to an image, in blocks of 100 copies of 3x32x32 pixels.
certify: --images test images certified under either noise by the same rule, in turns of 10 images. The figures are the
ratio of wall times over the turns, samples per image, and the paired difference of certified accuracy at every radius.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import rush
from rush.certification.certificates import Certificates, join_certificates
from rush.choices import CertifyMethod
from rush.runtime.randomness import stream
from rush.smoothing.noise import Noise
from rush.statistics import paired_difference
from shared import Row, benchmark_images, benchmark_parser, in_percent, printed, record, smoothed_model

TURN = 10
SIGMAS = (0.12, 0.25, 0.5, 1.0)


def draws(arguments: argparse.Namespace) -> None:
    pixels, out = torch.randint(0, 256, (3, 32, 32)) / 255, torch.empty(100, 3, 32, 32)
    generator, rows = stream(0, "draws"), list[Row]()
    for sigma in SIGMAS:
        noises: tuple[Noise, Noise] = (rush.Gaussian(sigma), rush.DiscreteGaussian(sigma))
        for noise in noises:
            noise.add(pixels, out, generator)
        times = np.array(
            [[seconds_of(noise, pixels, out, generator) for noise in noises] for _ in range(arguments.rounds)]
        )
        gaussian, discrete = (np.median(times, 0) / out.numel() * 1e9).tolist()
        rows.append(printed({"sigma": sigma, "gaussian, ns per value": gaussian, "discrete, ns per value": discrete}))
    conditions: Row = {"noise": "gaussian and discrete", "values per block": out.numel(), "blocks": arguments.rounds}
    record(arguments, "discrete-draws", rows, conditions)


def seconds_of(noise: Noise, pixels: Tensor, out: Tensor, generator: torch.Generator) -> float:
    started = time.perf_counter()
    noise.add(pixels, out, generator)
    return time.perf_counter() - started


def certify(arguments: argparse.Namespace) -> None:
    trained = smoothed_model(arguments.run)
    images = benchmark_images(arguments.data, arguments.images)
    execution = trained.execution
    models = [
        rush.SmoothedClassifier(
            trained.classifier,
            noise=noise,
            num_classes=trained.num_classes,
            execution=execution,
            image_shape=images.shape,
        )
        for noise in (rush.Gaussian(trained.sigma), rush.DiscreteGaussian(trained.sigma))
    ]
    print(f"{execution.device}, {execution.precision}, {torch.get_num_threads()} threads, sigma {trained.sigma:g}")
    methods: tuple[CertifyMethod, ...] = ("clopper-pearson", "sequential")
    rows = [row for method in methods for row in compare(models, images, method, arguments.num_estimation)]
    conditions: Row = {
        "noise": "gaussian and discrete",
        "sigma": trained.sigma,
        "images": len(images),
        "N": arguments.num_estimation,
        "device": execution.device,
        "precision": execution.precision,
        "intervals": "95 %, differences paired",
    }
    record(arguments, "discrete-certify", rows, conditions)


def compare(
    models: Sequence[rush.SmoothedClassifier], images: rush.ImageSet, method: CertifyMethod, num_estimation: int
) -> list[Row]:
    """Certify ``images`` with both models in turns, and return the ratio of times and the differences of accuracy."""
    parts: list[list[Certificates]] = [[], []]
    times = np.zeros((len(images) // TURN, 2))
    for model in models:  # inspection, compilation and thresholds are paid once
        rush.certify(model, images[:TURN], method, num_estimation=1000)
    for turn in range(len(times)):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            started = time.perf_counter()
            chosen = images[turn * TURN : (turn + 1) * TURN]
            parts[which].append(rush.certify(models[which], chosen, method, num_estimation=num_estimation))
            times[turn, which] = time.perf_counter() - started
    gaussian, discrete = map(join_certificates, parts)
    ratio = times[:, 1] / times[:, 0]
    interval = stats.bootstrap((ratio,), np.median, rng=0).confidence_interval
    total = times[:, 1].sum() / times[:, 0].sum()
    median = float(np.median(ratio))
    times_row: Row = {
        "method": method,
        "figure": f"wall time, discrete / gaussian {total:.3f} in all; median of {len(ratio)} turns",
        "discrete minus gaussian, or ratio": (median, float(interval.low), float(interval.high)),
    }
    samples: Row = {
        "method": method,
        "figure": "samples per image",
        "gaussian": round(gaussian.num_samples.mean()),
        "discrete": round(discrete.num_samples.mean()),
    }
    rows = [printed(times_row), printed(samples)]
    for radius in gaussian.table_radii:
        row: Row = {
            "method": method,
            "figure": f"certified at l2 {radius:g}, %",
            "gaussian": 100 * gaussian.accuracy(radius),
            "discrete": 100 * discrete.accuracy(radius),
            "discrete minus gaussian, or ratio": in_percent(
                paired_difference(discrete.certified(radius), gaussian.certified(radius))
            ),
        }
        rows.append(printed(row))
    return rows


def main() -> None:
    parser = benchmark_parser(__doc__)
    parts = {"draws": draws, "certify": certify}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--run", type=Path, help="run folder with a trained classifier")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--num-estimation", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
