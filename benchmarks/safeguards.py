"""The cost of the safeguards against foreign networks: calls with and without them, by turns.

    OMP_NUM_THREADS=1 python benchmarks/safeguards.py --run results/cifar10-small --data CIFAR10

The safeguards: a network gets a copy of its input and its logits are copied; one image stays in every tile; images are
evaluated again at random tiles and at the end. Without them: the input itself, no such image, no such evaluation.

Calls alternate one by one, so that both sides meet the same state of the machine, and which comes first alternates too.
For each kind of call, the figure is the median of the ratios of --rounds pairs, with the 95 % interval of the median
from the order statistics (binomial). One tile of votes is the forward of a full tile, observed. One step of PGD is the
loss and gradient of 16 draws per image on the smoothed classifier, and of the network without noise.

What these calls do not show is counted: rows of the sentinel, tiles evaluated again, and the tile at the end, for a
certification of --tiles tiles.
"""

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
from rush.attacks.gradient import fresh_noise, loss_and_gradient, plain
from rush.attacks.losses import cross_entropy
from rush.data.checks import labelled_pixels
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.smoothing import inspection
from rush.smoothing.forward import Forward
from shared import Row, benchmark_parser, printed, record, setting_of, smoothed_model

DRAWS, SPACING = 16, 64


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder of a smoothed classifier")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=101, help="pairs of calls, with and without the safeguards")
    parser.add_argument("--tiles", type=int, default=1000, help="tiles of the certification whose calls are counted")
    arguments = parser.parse_args()
    smoothed = smoothed_model(arguments.run, compiled=False)
    num_rows = smoothed.execution.rows((3, 32, 32))
    x = labelled_pixels(rush.load_images("cifar10", split="test", root=arguments.data)[:num_rows]).x
    y = torch.zeros(len(x), dtype=torch.int64)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{smoothed.execution}, {arguments.rounds} rounds")
    tile = x + smoothed.noise.sample(x.shape, stream(0, "tile"))
    forward = Forward(smoothed.classifier, smoothed.execution, smoothed.num_classes)
    few = x[: num_rows // DRAWS]
    draws = fresh_noise(smoothed, DRAWS, [stream(0, "draws", row) for row in range(len(few))])
    network = plain(smoothed.classifier, Execution())
    calls: dict[str, Callable[[], object]] = {
        "tile of votes": lambda: forward(tile),
        "PGD step, smoothed": lambda: loss_and_gradient(draws, few, y[: len(few)], cross_entropy),
        "PGD step, plain": lambda: loss_and_gradient(network, x[:64], y[:64], cross_entropy),
    }
    rows: list[Row] = []
    for name, call in calls.items():
        for _ in range(3):
            call()
        ratios = [time_ratio(call, first=number % 2 == 0) for number in range(arguments.rounds)]
        more = [100 * (ratio - 1) for ratio in (float(np.median(ratios)), *median_interval(ratios))]
        rows.append(printed({"call": name, "pairs": len(ratios), "more time, % [95 %]": more}))
    extra = arguments.tiles / (num_rows - 1) + arguments.tiles / SPACING + 1
    counted: Row = {f"more tiles of a certification of {arguments.tiles:,}, %": 100 * extra / arguments.tiles}
    record(arguments, "safeguards", rows, {**setting_of(smoothed), **printed(counted)})


def time_ratio(call: Callable[[], object], first: bool) -> float:
    """Time with the safeguards over the time without; ``first``: those with come first."""
    seconds = {}
    for guarded in (first, not first):
        with ExitStack() as stack:
            if not guarded:
                stack.enter_context(without_safeguards())
            started = time.process_time()
            call()
            seconds[guarded] = time.process_time() - started
    return seconds[True] / seconds[False]


@contextmanager
def without_safeguards() -> Iterator[None]:
    def bare(execution: Execution, classifier: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with execution.autocast():
            return classifier(execution.layout(x)).float()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Execution, "unguarded_logits", bare))
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
