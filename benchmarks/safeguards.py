"""What the safeguards against foreign networks cost: certification and PGD with and without them, by turns.

    python benchmarks/safeguards.py --run results/cifar10-small --data CIFAR10

The safeguards: a network gets a copy of its input and its logits are copied; one image stays in every tile; images are
asked for again at random tiles and at the end. Without them: the input itself, no such image, no such question. Both
run in one process on the same images, alternating which comes first. For each the median of the ratios of the times of
a round, with the 95 % interval of the median from the order statistics (binomial), over --rounds rounds.

certify: one radius (0.25), sequential, at most 10,000 samples per image. pgd: PGD-20 at 8/255 with 16 draws per
gradient and its verdicts on the smoothed classifier; PGD-20 on the same network without noise.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import stats

import rush
from rush import voting
from rush.engine import inspection
from rush.engine.precision import Execution
from rush.inputs import labelled_pixels
from shared import smoothed_model

THREAT = rush.ThreatModel("linf", 8 / 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of a smoothed classifier")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, default=16, help="images to certify and attack")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, each with and without the safeguards")
    arguments = parser.parse_args()
    smoothed = smoothed_model(arguments.run, compiled=False)
    images = labelled_pixels(rush.load_images("cifar10", split="test", root=arguments.data)[: arguments.images])
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{smoothed.execution}, {len(images)} images, {arguments.rounds} rounds")
    work: dict[str, Callable[[], object]] = {
        "certify": lambda: rush.certify(smoothed, images, "sequential", num_estimation=10_000, radii=(0.25,)),
        "pgd, smoothed": lambda: rush.attack(smoothed, images, THREAT, "pgd", eot_samples=16, max_votes=1000),
        "pgd, plain": lambda: rush.attack(smoothed.classifier, images, THREAT, "pgd"),
    }
    for name, run in work.items():
        run()
        ratios = [ratio(run, first=number % 2 == 0) for number in range(arguments.rounds)]
        low, high = median_interval(ratios)
        print(
            f"{name}: {100 * (np.median(ratios) - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]",
            flush=True,
        )


def ratio(run: Callable[[], object], first: bool) -> float:
    """Time with the safeguards over the time without; ``first``: those with come first."""
    seconds = {}
    for guarded in (first, not first):
        with ExitStack() as stack:
            if not guarded:
                stack.enter_context(without_safeguards())
            started = time.perf_counter()
            run()
            seconds[guarded] = time.perf_counter() - started
    return seconds[True] / seconds[False]


@contextmanager
def without_safeguards() -> Iterator[None]:
    def bare(execution: Execution, classifier: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with execution.autocast():
            return classifier(execution.layout(x)).float()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Execution, "unguarded_logits", bare))
        stack.enter_context(mock.patch.object(voting, "_SENTINEL_TILE", 10**9))
        for name in ("observe", "conclude"):
            stack.enter_context(mock.patch.object(inspection.Watch, name))
        yield


def median_interval(values: list[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with probability >= 95 %."""
    ordered, count = sorted(values), len(values)
    rank = int(stats.binom.ppf(0.025, count, 0.5))
    return ordered[max(0, rank - 1)], ordered[min(count - 1, count - rank)]


if __name__ == "__main__":
    main()
