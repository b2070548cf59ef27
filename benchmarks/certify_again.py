"""The cost of certifying a network again after it has changed, against certifying the changed network by itself.

    python benchmarks/certify_again.py changed --run runs/digits
    python benchmarks/certify_again.py heads --run runs/digits

changed: the network of a run, certified with a fixed number of votes, and three changes of it: weights rounded to
bfloat16, weights rounded to 8 bits per tensor, and a few steps of fine-tuning. All levels are equal: 0.001 in all, half
of it for the old certificate where there is one. Votes are those of both networks, selection included. "least N" is the
smallest fixed number of votes, in hundreds, that certifies as much at a radius as ``rush.certify_changed`` does. "least
sequential" is the smallest mean number of votes, over several caps, with which the sequential rule does so by itself at
all radii. Both are chosen after the votes were seen, which favours them.
heads: the time of a head on cached features against the whole network's.
Run one part at a time on an otherwise idle machine.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import rush
from rush.certification.certificates import Certificates
from rush.certification.incremental import ChangedCertificates
from rush.certification.recertify import recompute
from rush.errors import InputError
from rush.models.classifier import Classifier
from rush.runtime.randomness import seeded_init, stream
from shared import Row, benchmark_parser, labels_of, printed, record, setting_of, smoothed_model

ALPHA, CAP = 0.001, 10_000
CAPS = (500, 1000, 1500, 2000, 3000, 4000, 5000, 7000, CAP)
RADII = (0.125, 0.25, 0.375, 0.5)


def changed(arguments: argparse.Namespace) -> None:
    old = smoothed_model(arguments.run, compiled=False)
    images = rush.load_images("digits", split="test")[: arguments.images]
    certified_old = rush.certify(old, images, num_estimation=arguments.old_votes, alpha=ALPHA / 2)
    print(f"{len(images)} images, sigma {old.sigma:g}, old certificates from {arguments.old_votes:,} votes per image")
    rows = [row("none", "old network", certified_old)]
    networks = {
        "bfloat16": rounded_bfloat16(old.classifier),
        "8-bit": rounded_8_bit(old.classifier),
        "finetuned": finetuned(old, arguments.steps),
    }
    for title in arguments.changes:
        network = networks[title]
        new = rush.SmoothedClassifier(network, noise=old.noise, num_classes=10, execution=old.execution)
        started = time.perf_counter()
        fixed = rush.certify(new, images, num_estimation=CAP, alpha=ALPHA)
        rows.append(row(title, f"by itself, fixed N = {CAP:,}", fixed, time.perf_counter() - started))
        for grid in (RADII, *((radius,) for radius in RADII[1:])):
            name = "grid" if len(grid) > 1 else f"r = {grid[0]:g}"
            started = time.perf_counter()
            own = rush.certify(new, images, "sequential", num_estimation=CAP, alpha=ALPHA, radii=grid)
            rows.append(row(title, f"by itself, sequential, {name}", own, time.perf_counter() - started, grid))
            started = time.perf_counter()
            again = rush.certify_changed(
                certified_old, old, new, images, "sequential", CAP, ALPHA / 2, radii=grid, seed=arguments.seed
            )
            seconds = time.perf_counter() - started
            equal: Row = {
                "least N": least(fixed, again, grid),
                "least sequential": least_sequential(fixed, again, grid),
            }
            rows.append(row(title, f"again, sequential, {name}", again, seconds, grid, equal))
        for pairs in arguments.pairs:
            started = time.perf_counter()
            again = rush.certify_changed(
                certified_old, old, new, images, num_pairs=pairs, alpha_difference=ALPHA / 2, seed=arguments.seed
            )
            seconds = time.perf_counter() - started
            differing = 100 * float(again.differing.sum() / again.pairs.sum())
            equal = {"least N": least(fixed, again), "pairs that differ, %": differing}
            rows.append(row(title, f"again, {pairs:,} pairs", again, seconds, RADII, equal))
    conditions: Row = {**setting_of(old), "images": len(images), "alpha": ALPHA, "cap": CAP}
    record(arguments, "certify-again", rows, {**conditions, "votes of the old certificates": arguments.old_votes})


def row(
    change: str,
    name: str,
    certificates: Certificates | ChangedCertificates,
    seconds: float | None = None,
    radii: Sequence[float] = RADII,
    equal: Row | None = None,
) -> Row:
    """Return and print a row, with the fewest votes that certify as much in ``equal``."""
    head: Row = {
        "change": change,
        "procedure": name,
        "votes per image": round(certificates.num_samples.mean()),
        "s per image": None if seconds is None else seconds / len(certificates),
    }
    accuracies: Row = {f"at {r:g}, %": 100 * certificates.accuracy(r) if r in radii else None for r in RADII}
    return printed({**head, **accuracies, **(equal or {})})


def least(fixed: Certificates, again: ChangedCertificates, radii: Sequence[float] = RADII) -> str:
    """The least fixed number of votes per image, selection included, that certifies as much as ``again``, by radius."""
    numbers = range(100, CAP + 1, 100)
    smaller = [recompute(fixed, num_estimation=number) for number in numbers]
    found = []
    for radius in radii:
        enough = [
            n for n, each in zip(numbers, smaller, strict=True) if each.accuracy(radius) >= again.accuracy(radius)
        ]
        found.append(f"{enough[0] + fixed.num_selection:,}" if enough else f"> {CAP:,}")
    return ", ".join(found)


def least_sequential(fixed: Certificates, again: ChangedCertificates, radii: Sequence[float]) -> str:
    """The least mean number of votes of the sequential rule that certifies as much as ``again``, with its cap."""
    found = []
    for cap in CAPS:
        try:
            each = recompute(fixed, bound="geometric", num_estimation=cap, radii=radii)
        except InputError:  # a radius is beyond reach
            continue
        if all(each.accuracy(radius) >= again.accuracy(radius) for radius in radii):
            found.append((each.num_samples.mean(), cap))
    return f"{min(found)[0]:,.0f} (cap {min(found)[1]:,})" if found else "none"


def rounded_bfloat16(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).bfloat16().float().eval()


@torch.no_grad()
def rounded_8_bit(network: nn.Module) -> nn.Module:
    """Round every tensor of weights to 255 levels between minus and plus its largest magnitude."""
    result = copy.deepcopy(network).eval()
    for parameter in result.parameters():
        if parameter.ndim > 1:
            step = parameter.abs().max() / 127
            parameter.copy_((parameter / step).round() * step)
    return result


def finetuned(old: rush.SmoothedClassifier, steps: int) -> nn.Module:
    """Take a few steps under Gaussian noise on the training split, BatchNorm in evaluation mode."""
    network = copy.deepcopy(old.classifier).eval().requires_grad_(True)
    train = rush.load_images("digits", split="train")
    x, y, generator = train.pixels(), labels_of(train), stream(0, "benchmark", "finetune")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(steps):
        batch = torch.randperm(len(x), generator=generator)[:128]
        noisy = x[batch] + rush.Gaussian(old.sigma).sample(x[batch].shape, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(noisy), y[batch]).backward()
        optimizer.step()
    return network.requires_grad_(False)


def heads(arguments: argparse.Namespace) -> None:
    model = smoothed_model(arguments.run, compiled=False)
    images = rush.load_images("digits", split="test")[: arguments.images]
    assert isinstance(model.classifier, Classifier)
    encoder = nn.Sequential(model.classifier.normalize, model.classifier.encoder).eval()
    started = time.perf_counter()
    features = rush.noisy_features(
        encoder, images, noise=model.noise, num_estimation=CAP, execution=model.execution, max_gigabytes=16
    )
    drawn = time.perf_counter() - started
    width = features.features.shape[2]
    rows: list[Row] = []
    for title, head in (
        ("its own head", model.classifier.head),
        ("another head", seeded_init(nn.Linear(width, 10), stream(0, "benchmark", "head")).eval()),
    ):
        started = time.perf_counter()
        cached = features.certify(head, 10)
        middle = time.perf_counter()
        whole = rush.certify(features.compose(head, 10), images, num_estimation=CAP)
        end = time.perf_counter()
        same = all(np.array_equal(getattr(cached, name), getattr(whole, name)) for name in ("counts", "radius"))
        row: Row = {
            "head": title,
            "cached, s": middle - started,
            "whole network, s": end - middle,
            "ratio": (end - middle) / (middle - started),
            "same counts and radii": "yes" if same else "no",
        }
        rows.append(printed(row))
    cache: Row = {"features": width, "cache, GB": features.gigabytes, "drawn in, s": drawn}
    conditions: Row = {**setting_of(model), "images": len(images), "votes": CAP}
    record(arguments, "certify-again-heads", rows, {**conditions, **printed(cache)})


def main() -> None:
    parser = benchmark_parser(__doc__)
    parts = {"changed": changed, "heads": heads}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--run", type=Path, required=True, help="run folder of a network on the digits")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--old-votes", type=int, default=CAP)
    parser.add_argument("--pairs", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--changes", nargs="+", default=["bfloat16", "8-bit", "finetuned"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
