"""Cost and reach of exact l1 certificates, against sampled ones, on one network trained under splitting noise.

    OMP_NUM_THREADS=1 python benchmarks/splitting.py --run RUN --data CIFAR10

Seconds per image over --images test images, in turns of 5: all draws of splitting noise, and the same network under
uniform noise of the same sigma by both sampling methods with at most --num-estimation votes. The network was not
trained under uniform noise, so its accuracies under that noise would not be a fair comparison and are not printed.
"""

import time
from pathlib import Path

import numpy as np
import torch

import rush
from rush.choices import CertifyMethod
from shared import Row, benchmark_images, benchmark_parser, printed, record, setting_of, smoothed_model

TURN = 5


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a classifier under splitting noise")
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--num-estimation", type=int, default=10_000)
    arguments = parser.parse_args()
    exact = smoothed_model(arguments.run)
    uniform = rush.SmoothedClassifier(
        exact.classifier,
        noise=rush.Uniform(exact.sigma),
        num_classes=exact.num_classes,
        execution=exact.execution,
        image_shape=exact.image_shape,
    )
    images = benchmark_images(arguments.data, arguments.images)
    sides: list[tuple[rush.SmoothedClassifier, CertifyMethod]] = [
        (exact, "exact"),
        (uniform, "clopper-pearson"),
        (uniform, "sequential"),
    ]
    times, samples = np.zeros((len(images) // TURN, len(sides))), np.zeros((len(images) // TURN, len(sides)))
    for turn in range(len(times)):
        chosen = images[turn * TURN : (turn + 1) * TURN]
        for side in np.roll(range(len(sides)), turn).tolist():
            model, method = sides[side]
            started = time.perf_counter()
            certificates = rush.certify(model, chosen, method, num_estimation=arguments.num_estimation)
            times[turn, side] = (time.perf_counter() - started) / TURN
            samples[turn, side] = certificates.num_samples.mean()
    print(f"{exact.execution.device}, {exact.execution.precision}, {torch.get_num_threads()} threads, {exact.noise}")
    rows: list[Row] = []
    for (model, method), seconds, number in zip(sides, np.median(times, 0), samples.mean(0), strict=True):
        row: Row = {
            "noise": model.noise.name,
            "method": method,
            "s per image, median": float(seconds),
            "samples per image": round(number),
        }
        rows.append(printed(row))
    conditions: Row = {**setting_of(exact), "noise": "by row", "images": len(images), "turns": len(times)}
    record(arguments, "splitting", rows, conditions)


if __name__ == "__main__":
    main()
