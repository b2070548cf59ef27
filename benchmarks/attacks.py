"""The strength of the attacks, against the original AutoAttack on deterministic networks, paired on the same images.

    python benchmarks/attacks.py reference --data CIFAR10 --robust results/cifar10-pgd --cache CACHE
    python benchmarks/attacks.py deterministic --data CIFAR10 --robust results/cifar10-pgd --cache CACHE

CIFAR10 is a folder with the data set (docs/data.md). CACHE keeps the result of every attack on every batch of images,
so that a stopped run resumes. The original code is pyautoattack 0.2.0 (pip install -c constraints.txt
pyautoattack==0.2.0), with its defaults: seed 0, APGD of 100 steps from one random start, Square of 5,000 queries, the
suite "standard" of APGD, targeted APGD, targeted FAB and Square.

reference: the original's side. deterministic: this library's on the same images, and one table for every network.
An image stands if the network's plain output at the returned point is its label, for both sides by the same forward.
Points must lie in the ball and in [0, 1]. Only images that the network gets right are attacked. The networks are those
of reference_models.py, which compute in bfloat16 inside: both sides attack this same fixed function. Passes are counted
at the network, images forward and backward + images forward alone, over the number of attacked images.
The original's Square shrinks its squares as for 10,000 queries whatever its budget. --attacks square-as-theirs is this
library's Square with the same sizes.
After a change of the library give --ours another name: what is cached under the old name is not computed again.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rush
from reference_models import plain_resnet18, robust_network
from rush.attacks.apgd import apgd
from rush.attacks.gradient import plain
from rush.attacks.losses import Loss, cross_entropy, dlr
from rush.attacks.square import square
from rush.attacks.threat import norms
from rush.data.images import ImageSet
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream
from rush.statistics import paired_difference
from shared import Row, benchmark_images, benchmark_parser, in_percent, labels_of, printed, record, save_arrays

STEPS = 100
SLACK = 1e-6  # float32 rounding of a point at the edge of the ball
SINGLE = ("apgd-ce", "apgd-dlr", "square")
AS_THEIRS = "square-as-theirs"  # our Square with the sizes of squares of the original
THEIR_SCHEDULE = 10_000  # the queries that the original's sizes of squares are made for, whatever its budget


@dataclass(frozen=True)
class Case:
    """A network and a threat model; ``queries`` is the budget of Square where it is compared alone."""

    network: Literal["robust", "plain"]
    epsilon: float
    queries: int


CASES = {
    "robust-8": Case("robust", 8 / 255, 5_000),
    "plain-1": Case("plain", 1 / 255, 1_000),
    "plain-0.5": Case("plain", 0.5 / 255, 1_000),
}


# --- what an attack found ---------------------------------------------------------------------------------------------

Attacker = Callable[[nn.Module, ImageSet], Tensor]


@dataclass(frozen=True)
class Found:
    """One attack on N images: which the network had right and which still stand, (N,); its points; its cost."""

    ids: NDArray[np.str_]
    clean: NDArray[np.bool_]
    standing: NDArray[np.bool_]
    adversarial: NDArray[np.float32]
    seconds: float
    gradients: int
    forwards: int

    def save(self, path: Path) -> None:
        save_arrays(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Found":
        with np.load(path) as stored:
            values: dict[str, Any] = {name: stored[name] for name in stored.files}
        return cls(**{name: value if value.ndim else value.item() for name, value in values.items()})

    @classmethod
    def join(cls, parts: list["Found"]) -> "Found":
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "clean", "standing", "adversarial")
        }
        spent = {name: sum(getattr(part, name) for part in parts) for name in ("seconds", "gradients", "forwards")}
        return cls(**joined, **spent)

    @property
    def cost(self) -> str:
        attacked = max(1, int(self.clean.sum()))
        return f"{self.seconds:,.0f} s, {self.gradients / attacked:,.0f} + {self.forwards / attacked:,.0f} passes"


class Counted(nn.Module):
    """The network itself; counts the images that it is asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gradients = self.forwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradients += len(x)
        else:
            self.forwards += len(x)
        return self.network(x)


def found_by(
    attacker: Attacker, name: str, folder: Path, network: nn.Module, images: ImageSet, epsilon: float, batch: int
) -> Found:
    """What ``attacker`` finds on all images, batch by batch, each kept in ``folder``."""
    parts = []
    for start in range(0, len(images), batch):
        path = folder / f"{name}-{start:05d}.npz"
        part = images[start : start + batch]
        if not path.exists():
            _attack_batch(attacker, network, part, epsilon).save(path)
        parts.append(Found.load(path))
        if not np.array_equal(parts[-1].ids, part.ids):
            raise SystemExit(f"{path} is about other images; use another --cache")
    found = Found.join(parts)
    print(f"  {folder.name} {name}: {100 * found.standing.mean():.1f} % stand, {found.cost}", flush=True)
    return found


def _attack_batch(attacker: Attacker, network: nn.Module, images: ImageSet, epsilon: float) -> Found:
    x, clean = images.pixels(), correct(network, images.pixels(), images)
    counted, adversarial, started = Counted(network), images.pixels(), time.perf_counter()
    if clean.any():
        adversarial[torch.from_numpy(clean)] = attacker(counted, images[clean]).detach()
    seconds = time.perf_counter() - started
    if norms(adversarial, x, "linf").max() > epsilon + SLACK or adversarial.min() < 0 or adversarial.max() > 1:
        raise SystemExit("an attack returned a point outside the ball or outside [0, 1]")
    standing = clean & correct(network, adversarial, images)
    return Found(
        images.ids, clean, standing, adversarial.numpy(), seconds, counted.gradients, counted.forwards
    )  # fmt: skip


def correct(network: nn.Module, points: Tensor, images: ImageSet) -> NDArray[np.bool_]:
    """Whether the network's class at each point is the label, by the forward that judges everywhere."""
    return (Execution().tiled_logits(network, points).argmax(1) == labels_of(images)).numpy()


# --- reference --------------------------------------------------------------------------------------------------------


def reference(arguments: argparse.Namespace) -> None:
    for case, network, images in cases(arguments):
        reference_side(arguments, case, network, images)


def reference_side(arguments: argparse.Namespace, case: str, network: nn.Module, images: ImageSet) -> dict[str, Found]:
    epsilon, queries = CASES[case].epsilon, CASES[case].queries
    found = {}
    for attack in dict.fromkeys(their_name(attack) for attack in arguments.attacks):
        attacker = partial(original, attack=attack, epsilon=epsilon, queries=queries)
        folder = arguments.cache / case / f"original-{arguments.images}"
        name = cached_name(attack, queries)
        found[attack] = found_by(attacker, name, folder, network, images, epsilon, arguments.batch)
    return found


def original(network: nn.Module, images: ImageSet, *, attack: str, epsilon: float, queries: int) -> Tensor:
    """The points of pyautoattack: of one of its attacks with the parameters of "standard", or of all of "standard"."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    suite = AutoAttack(network, norm="Linf", eps=epsilon, seed=0, version="standard", device="cpu")
    if attack != "standard":
        suite.attacks_to_run = [attack]
        suite.square.n_queries = queries
    points, _ = suite.run_standard_evaluation(images.pixels(), labels_of(images), batch_size=len(images))
    return points


# --- deterministic ----------------------------------------------------------------------------------------------------


def deterministic(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for case, network, images in cases(arguments):
        theirs = reference_side(arguments, case, network, images)
        ours = our_side(arguments, case, network, images)
        rows += comparison(case, ours, theirs)
    conditions: Row = {"noise": "none, deterministic networks", "norm": "linf", "difference": "95 %, paired"}
    record(arguments, "attacks-deterministic", rows, conditions)


def our_side(arguments: argparse.Namespace, case: str, network: nn.Module, images: ImageSet) -> dict[str, Found]:
    epsilon, queries = CASES[case].epsilon, CASES[case].queries
    attackers: dict[str, Attacker] = {
        "apgd-ce": partial(our_apgd, epsilon=epsilon, loss=cross_entropy),
        "apgd-dlr": partial(our_apgd, epsilon=epsilon, loss=dlr),
        "square": partial(our_square, epsilon=epsilon, queries=queries),
        AS_THEIRS: partial(our_square, epsilon=epsilon, queries=queries, schedule=THEIR_SCHEDULE),
        "standard": partial(our_worst_case, epsilon=epsilon),
    }
    folder = arguments.cache / case / f"{arguments.ours}-{arguments.images}"
    return {
        attack: found_by(
            attackers[attack], cached_name(attack, queries), folder, network, images, epsilon, arguments.batch
        )
        for attack in arguments.attacks
    }


def our_apgd(network: nn.Module, images: ImageSet, *, epsilon: float, loss: Loss) -> Tensor:
    threat, x = rush.ThreatModel("linf", epsilon), images.pixels()
    start = threat.random_start(x, streams(images, "apgd"))
    best, _ = apgd(plain(network, Execution()), x, labels_of(images), threat, steps=STEPS, loss=loss, start=start)
    return best


def our_square(
    network: nn.Module, images: ImageSet, *, epsilon: float, queries: int, schedule: int | None = None
) -> Tensor:
    threat = rush.ThreatModel("linf", epsilon)
    log_probs, generators = plain(network, Execution()), streams(images, "square")
    return square(log_probs, images.pixels(), labels_of(images), threat, generators, queries=queries, schedule=schedule)


def our_worst_case(network: nn.Module, images: ImageSet, *, epsilon: float) -> Tensor:
    return rush.attack(network, images, rush.ThreatModel("linf", epsilon), method="worst-case").adversarial


def streams(images: ImageSet, name: str) -> list[torch.Generator]:
    return [stream(0, "benchmark", name, str(own)) for own in images.ids]


def comparison(case: str, ours: dict[str, Found], theirs: dict[str, Found]) -> list[Row]:
    rows: list[Row] = []
    for name, own in ours.items():
        other = theirs[their_name(name)]
        row: Row = {
            "network": CASES[case].network,
            "epsilon": f"{255 * CASES[case].epsilon:g}/255",
            "images": len(own.clean),
            "clean, %": 100 * float(own.clean.mean()),
            "attack": {"standard": "worst case / standard"}.get(name, name),
            "queries of Square alone": CASES[case].queries if "square" in name else None,
            "ours stands, %": 100 * float(own.standing.mean()),
            "theirs, %": 100 * float(other.standing.mean()),
            "difference, points": in_percent(paired_difference(own.standing, other.standing)),
            "ours": own.cost,
            "theirs": other.cost,
        }
        rows.append(printed(row))
    return rows


# --- shared -----------------------------------------------------------------------------------------------------------


def their_name(attack: str) -> str:
    return "square" if attack == AS_THEIRS else attack


def cached_name(attack: str, queries: int) -> str:
    return f"{attack}-{queries}" if attack.startswith("square") else attack


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Module, ImageSet]]:
    images = benchmark_images(arguments.data, arguments.images)
    for case in arguments.cases:
        network = plain_resnet18() if CASES[case].network == "plain" else robust_network(arguments.robust)
        print(f"{case}: {len(images)} images", flush=True)
        yield case, network, images


def main() -> None:
    parser = benchmark_parser(__doc__)
    parts = {"reference": reference, "deterministic": deterministic}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--robust", type=Path, help="folder with the adversarially trained network")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what every attack found")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--attacks", nargs="+", choices=(*SINGLE, AS_THEIRS, "standard"), default=(*SINGLE, "standard"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--ours", default="ours", help="name of this version's results in --cache")
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
