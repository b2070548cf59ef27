"""Strength and speed of the attacks on smoothed classifiers. All subcommands use the trained classifier of --run.

    python benchmarks/smoothed_attacks.py gradient --run results/cifar10-small --data CIFAR10
    python benchmarks/smoothed_attacks.py strength --run results/cifar10-small --data CIFAR10 --cache CACHE
    python benchmarks/smoothed_attacks.py tenfold  --run results/cifar10-small --data CIFAR10 --cache CACHE

gradient: gradient samples per second with everything that an attack's step does (noise drawn, common generators, loss,
backward pass) against bare forward and backward passes of the same network on ready-made noise, by turns; and the
cosine of a gradient of m draws with the expected one, for independent and for antithetic draws.

strength: the worst-case suite against two others of the same budget, at most 4,000 passes per image, all judged by this
library's verdict on the same images. Images that are broken without an attack are attacked by none. The first author's
published attack (PGDRS): from the image itself, steps of 2/255 along the sign of the gradient of the log mean softmax
over 32 fresh draws, 125 steps. AutoAttack "rand" (pyautoattack 0.2.0): APGD-CE and APGD-DLR, 100 steps of 20 passes
each. It sees the smoothed classifier as a network that draws one noise per pass. The figures are paired differences,
and wall seconds per image with the verdict, to be measured with --threads 1 on an otherwise idle machine.

tenfold: the images that the suite does not break (of the first --tenfold images), attacked with ten times its budget.

CACHE keeps finished groups, so that a stopped run resumes. --data is not needed for the digits.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rush
from rush.attacks.gradient import fresh_noise, loss_and_gradient
from rush.attacks.losses import cross_entropy
from rush.choices import AttackName, parse_fraction
from rush.data.checks import labelled_pixels
from rush.data.images import ImageSet, stratified_subset
from rush.evaluation.attack import verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import defend
from rush.evaluation.plans import scaled, worst_case
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.randomness import stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.statistics import paired_difference, share_interval
from shared import (
    Row,
    benchmark_parser,
    in_percent,
    labels_of,
    printed,
    record,
    save_arrays,
    setting_of,
    smoothed_model,
    spread,
)

ALPHA, MAX_VOTES = 0.001, 10_000
PGDRS_STEPS, PGDRS_DRAWS, PGDRS_STEP = 125, 32, 2 / 255
PASSES = {"PGDRS": f"{PGDRS_STEPS * PGDRS_DRAWS:,}", "AutoAttack rand": "at most 4,000"}
GROUP = 64


# --- gradient ---------------------------------------------------------------------------------------------------------


def gradient(arguments: argparse.Namespace) -> None:
    smoothed, images = model_and_images(arguments)
    x, y = images.pixels(), labels_of(images)
    rows = [printed(rate_of(smoothed, x, y, draws, arguments.repeats)) for draws in (1, 4, 16, 64)]
    record(arguments, "attacks-gradient-speed", rows, {**setting_of(smoothed), "turns": arguments.repeats})
    rows = [
        printed(
            {
                "draws": draws,
                "cosine, independent": cosines(smoothed, x[:32], y[:32], draws, antithetic=False),
                "cosine, antithetic": cosines(smoothed, x[:32], y[:32], draws, antithetic=True),
            }
        )
        for draws in (4, 16, 64)
    ]
    record(arguments, "attacks-gradient-cosine", rows, {**setting_of(smoothed), "images": len(x[:32])})


def rate_of(smoothed: SmoothedClassifier, x: Tensor, y: Tensor, draws: int, repeats: int) -> Row:
    rows = max(1, smoothed.execution.rows(x.shape[1:]) // draws)
    x, y = x[:rows], y[:rows]
    generators = [stream(0, "benchmark", row) for row in range(rows)]
    seen, logits = fresh_noise(smoothed, draws, generators), smoothed.differentiable()
    noisy = (x[:, None] + smoothed.sample_noise(x, draws, generators)).flatten(0, 1)
    labels = y.repeat_interleave(draws)

    def attack() -> None:
        loss_and_gradient(seen, x, y, cross_entropy)

    def bare() -> None:
        ready = noisy.detach().requires_grad_(True)
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits(ready), labels, reduction="sum"), ready)

    ratios, rates = [], []
    for _ in range(repeats):
        first, second = seconds_of(attack), seconds_of(bare)
        ratios.append(second / first)
        rates.append(rows * draws / first)
    return {
        "EOT": draws,
        "gradient samples/s": float(np.median(rates)),
        "of bare passes [least, greatest]": spread(ratios),
    }


def seconds_of(work: Callable[[], None], least: float = 2.0) -> float:
    """Of one call, over at least so many seconds."""
    work()
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < least:
        work()
        calls += 1
    return elapsed / calls


def cosines(smoothed: SmoothedClassifier, x: Tensor, y: Tensor, draws: int, antithetic: bool) -> float:
    def mean_gradient(name: str, samples: int, repeats: int) -> Tensor:
        seen = fresh_noise(smoothed, samples, [stream(0, name, row) for row in range(len(x))], antithetic)
        return torch.stack([loss_and_gradient(seen, x, y, cross_entropy)[1].flatten(1) for _ in range(repeats)]).mean(0)

    expected = mean_gradient("expected", 256, 8)
    found = [mean_gradient(f"found {turn}", draws, 1) for turn in range(8)]
    return float(torch.stack([torch.cosine_similarity(own, expected) for own in found]).mean())


# --- strength ---------------------------------------------------------------------------------------------------------


def strength(arguments: argparse.Namespace) -> None:
    smoothed, images = model_and_images(arguments)
    clean = evaluated(arguments, smoothed, images, "none")
    images = images[np.flatnonzero(~clean.broken)]
    suite = evaluated(arguments, smoothed, images, "worst-case")
    rows = [printed(row_of("no attack", clean))]
    for name, attack in (("PGDRS", pgdrs), ("AutoAttack rand", autoattack_rand)):
        points, seconds = attacked(arguments, smoothed, images, name, attack)
        result = verdict(smoothed, images, points, threat_of(arguments), alpha=ALPHA, max_votes=MAX_VOTES, name=name)
        gap = paired_difference(~suite.broken, ~result.broken)
        row = row_of(name, result, seconds) | {"passes per image": PASSES[name]}  # a verdict takes none
        rows.append(printed(row | {"worst case minus it, points": in_percent(gap)}))
    rows.append(printed(row_of("worst case", suite)))
    record(arguments, f"attacks-{recipe(arguments)['data']['name']}", rows, conditions(arguments, smoothed))


def evaluated(
    arguments: argparse.Namespace, smoothed: SmoothedClassifier, images: ImageSet, method: AttackName
) -> AttackResult:
    return rush.attack(
        smoothed,
        images,
        threat_of(arguments),
        method,
        alpha=ALPHA,
        max_votes=MAX_VOTES,
        resume=arguments.cache / method,
    )


def attacked(
    arguments: argparse.Namespace,
    smoothed: SmoothedClassifier,
    images: ImageSet,
    name: str,
    attack: Callable[[SmoothedClassifier, ImageSet, float], Tensor],
) -> tuple[Tensor, float]:
    """Return the points of another attack and the seconds it took, group by group from the cache."""
    parts, seconds, epsilon = [], 0.0, float(threat_of(arguments).epsilon)
    for first in range(0, len(images), GROUP):
        path = arguments.cache / name.lower().replace(" ", "-") / f"{first:05d}.npz"
        if not path.exists():
            started = time.perf_counter()
            points = attack(smoothed, images[first : first + GROUP], epsilon).detach().numpy()
            save_arrays(path, points=points, seconds=time.perf_counter() - started)
        with np.load(path) as stored:
            parts.append(torch.from_numpy(stored["points"]))
            seconds += float(stored["seconds"])
    joined = torch.cat(parts)
    if smoothed.noise.eight_bit:
        joined = threat_of(arguments).on_grid(joined, images.pixels())
    return joined, seconds


def pgdrs(smoothed: SmoothedClassifier, images: ImageSet, epsilon: float) -> Tensor:
    """The first author's attack as it was published in its second form (noise drawn anew at every step)."""
    x, y = images.pixels(), labels_of(images)
    generators = [stream(0, "benchmark", "pgdrs", str(own)) for own in images.ids]
    rows = max(1, smoothed.execution.rows(x.shape[1:]) // PGDRS_DRAWS)
    found = []
    for first in range(0, len(x), rows):
        own, labels = x[first : first + rows], y[first : first + rows]
        seen = fresh_noise(smoothed, PGDRS_DRAWS, generators[first : first + rows], antithetic=False)
        delta = torch.zeros_like(own)
        for _ in range(PGDRS_STEPS):
            _, slope = loss_and_gradient(seen, (own + delta).clamp(0, 1), labels, cross_entropy)
            delta = (delta + PGDRS_STEP * slope.sign()).clamp(-epsilon, epsilon)
        found.append((own + delta).clamp(0, 1))
    return torch.cat(found)


def autoattack_rand(smoothed: SmoothedClassifier, images: ImageSet, epsilon: float) -> Tensor:
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    module = smoothed.as_module(num_samples=1, generator=stream(0, "benchmark", "rand", str(images.ids[0])))
    suite = AutoAttack(module, norm="Linf", eps=epsilon, seed=0, version="rand", device="cpu")
    points, _ = suite.run_standard_evaluation(images.pixels(), labels_of(images), batch_size=GROUP)
    return points


# --- tenfold ----------------------------------------------------------------------------------------------------------


def tenfold(arguments: argparse.Namespace) -> None:
    smoothed, images = model_and_images(arguments)
    images = images[np.flatnonzero(~evaluated(arguments, smoothed, images, "none").broken)]
    before = evaluated(arguments, smoothed, images, "worst-case")
    first = list(range(min(arguments.tenfold or len(before), len(before))))
    images, before = images[first], before.select(first)
    left = np.flatnonzero(~before.broken)
    suite = scaled(worst_case("random", smoothed.num_classes), 10)
    pixels, settings = labelled_pixels(images[left]), VerdictSettings(ALPHA, MAX_VOTES, seed=1)
    evaluation = Evaluation(defend(smoothed), pixels, threat_of(arguments), settings)
    after = evaluation.run(suite, arguments.cache / "tenfold")
    standing = ~before.broken
    standing[left[after.broken]] = False
    rows = [
        printed(row_of("worst case", before)),
        printed(
            {
                "attacker": f"ten times the budget on the {len(left)} images left",
                "images": len(before),
                "accuracy, %": in_percent(share_interval(int(standing.sum()), len(standing))),
                "passes per image": f"{after.passes.mean():,.0f} + {after.forward_passes.mean():,.0f}",
                "seconds": float(after.seconds.sum()),
                "lower by, points": in_percent(paired_difference(~before.broken, standing)),
            }
        ),
    ]
    record(arguments, "attacks-tenfold", rows, conditions(arguments, smoothed))


# --- shared -----------------------------------------------------------------------------------------------------------


def row_of(name: str, result: AttackResult, before: float = 0.0) -> Row:
    """Return the row of a result, whose points took ``before`` seconds beside those that it knows of."""
    budget = result.budget
    return {
        "attacker": name,
        "images": len(result),
        "accuracy, %": in_percent(result.interval),
        "held, %": 100 * float(result.held.mean()),
        "passes per image": f"{budget['passes_per_image']:,.0f} + {budget['forward_passes_per_image']:,.0f}",
        "votes per image": budget["votes_per_image"],
        "seconds per image": (before + float(result.seconds.sum())) / len(result),
    }


def conditions(arguments: argparse.Namespace, smoothed: SmoothedClassifier) -> Row:
    attack = recipe(arguments)["attack"]
    level: Row = {"alpha": ALPHA, "most votes": MAX_VOTES, "intervals": "95 %, differences paired"}
    return {**setting_of(smoothed), "threat": f"{attack['norm']} {attack['epsilon']}", **level}


def threat_of(arguments: argparse.Namespace) -> rush.ThreatModel:
    """The threat model of the run's recipe."""
    attack = recipe(arguments)["attack"]
    return rush.ThreatModel(attack["norm"], parse_fraction(attack["epsilon"]))


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    return json.loads((arguments.run / "recipe.json").read_text())


def model_and_images(arguments: argparse.Namespace) -> tuple[SmoothedClassifier, ImageSet]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    test = rush.load_images(recipe(arguments)["data"]["name"], split="test", root=arguments.data)
    images = stratified_subset(test, arguments.images, stream(0, "benchmark", "images"))
    return smoothed_model(arguments.run, compiled=False), images


def main() -> None:
    parser = benchmark_parser(__doc__)
    parts = {"gradient": gradient, "strength": strength, "tenfold": tenfold}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--run", type=Path, required=True, help="run folder with the trained classifier")
    parser.add_argument("--data", type=Path, help="folder with the data set of the run")
    parser.add_argument("--cache", type=Path, help="folder for finished groups")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--tenfold", type=int, help="of the suite's images so many; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.part != "gradient" and arguments.cache is None:
        parser.error(f"{arguments.part} needs --cache")
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
