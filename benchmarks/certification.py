"""The cost of certification: samples, wall time against the textbook procedure, the engine against the bare network.

    python benchmarks/certification.py samples --logs LOGS
    python benchmarks/certification.py classes
    python benchmarks/certification.py time --run results/cifar10-small --data CIFAR10 --logs LOGS
    python benchmarks/certification.py loss --run results/cifar10-small --data CIFAR10
    python benchmarks/certification.py engine
    python benchmarks/certification.py votes --run results/cifar10-small --data CIFAR10

LOGS is a folder with published certification logs named catrs_sigma_0.25.tsv, gaussian_sigma_0.5.tsv and so on, and
CIFAR10 a folder with the data set (docs/data.md).

samples: simulated votes with the class probabilities of published logs (ResNet-110, CIFAR-10, all 10,000 images).
Sequential against fixed N = 100,000 on the same votes: accuracy, mean samples, and their ratio to what certification
takes if p is known, min(N, ln(1/level) / KL(p || p_r)) for the largest radius that it certifies, and 0 if none. Beside
it are the truncated beta mixture, giving up by a test, and the Bonferroni correction over 1,000, 10,000 and 100,000
samples. What a log does not contain is assumed: for abstained images p is uniform in 0.2 to 0.5, and for images at the
ceiling 1 - p is exponential with mean 1/N.
classes: one class against two on simulated votes of 1,000 images, with a fixed N = 100,000 and sequentially, and the
time of a look. p_A = Phi(u), u uniform in -1.5 to 3.5. The rest falls to one other class, or to 99 others by a
Dirichlet distribution of parameter 0.2.
time: wall time per image. The textbook procedure is written plainly below: fixed N, one image at a time, batches of
1,000, float32, votes counted on the host.
loss: certified accuracy of the sequential rule minus that of fixed N on the same votes of real images.
engine: certified samples per second as a share of the bare compiled forward on ready-made noise, and that forward as a
share of the machine's bfloat16 matrix products.
votes: share of votes that another tile, float32 or eager execution changes.
Run one part at a time on an otherwise idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rush
from rush.certification.apply_rule import follow
from rush.certification.bounds import certified_radius, certify_counts, certify_two_classes
from rush.certification.certificates import Certificates
from rush.certification.recertify import recompute
from rush.certification.rule import Rule, make_rule, null_probability
from rush.certification.sequential import UNDECIDED
from rush.choices import SequentialBound, Stopping
from rush.data.checks import labelled_pixels
from rush.models.storage import ClassifierSpec
from rush.records.public_logs import read_log
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.forward import Forward, try_forwards
from rush.statistics import lower_bound
from shared import Row, benchmark_parser, printed, record, setting_of, smoothed_model, spread

CAP, ALPHA, BLOCK = 100_000, 0.001, 100
ONE_RADIUS = (("catrs", 0.25), ("gaussian", 0.25), ("catrs", 0.5), ("gaussian", 0.5), ("catrs", 1.0), ("gaussian", 1.0))
CURVES = {0.25: np.arange(0, 0.76, 0.25), 0.5: np.arange(0, 1.76, 0.25), 1.0: np.arange(0, 3.51, 0.5)}


# --- samples ----------------------------------------------------------------------------------------------------------


def samples(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name, sigma in ONE_RADIUS:
        log = read_log(arguments.logs / f"{name}_sigma_{sigma:.3g}{'.0' if sigma == 1 else ''}.tsv").certificates
        p = class_probabilities(log)
        votes = np.random.default_rng(arguments.seed).binomial(BLOCK, p[:, None], (len(p), CAP // BLOCK))
        for radii in ((sigma,), tuple(CURVES[sigma])):
            rows += compare_samples(f"{name} {sigma:g}", p, log.correct, votes, sigma, radii)
    record(arguments, "certification-samples", rows, {"noise": "gaussian", "images": len(p), **RULE})


def class_probabilities(log: Certificates) -> NDArray[np.float64]:
    """The probability of the predicted class (N,), recovered from radii; see the module for what a log cannot tell."""
    rng = np.random.default_rng(0)
    counts = np.arange(CAP // 2, CAP + 1)
    lower = lower_bound(counts, np.full(len(counts), CAP), ALPHA)
    p = np.interp(special.ndtr(log.radius / log.sigma), lower, counts / CAP)
    ceiling = log.radius >= 0.995 * log.sigma * special.ndtri(lower[-1])
    p[ceiling] = 1 - rng.exponential(1 / CAP, int(ceiling.sum()))
    abstained = log.prediction < 0
    p[abstained] = rng.uniform(0.2, 0.5, int(abstained.sum()))
    return p


def compare_samples(
    title: str, p: NDArray[Any], correct: NDArray[np.bool_], votes: NDArray[Any], sigma: float, radii: Sequence[float]
) -> list[Row]:
    nulls = np.array([null_probability(radius, sigma) for radius in radii])
    fixed = lower_bound(votes.sum(1), np.full(len(p), CAP), ALPHA)[:, None] > nulls
    head: Row = {"model, sigma": title, "radii": radii_text(radii)}
    certified = (fixed & correct[:, None]).mean(0)
    rows: list[Row] = [
        printed({**head, "rule": f"fixed N = {CAP:,}", "samples, mean": CAP, "certified, %": percents(certified)})
    ]
    compared: tuple[tuple[SequentialBound, Stopping], ...]
    compared = (("geometric", "power"), ("beta", "power"), ("geometric", "test"))
    for bound, stopping in compared:
        rule = replace(sequential_rule(sigma, radii, len(p), bound), stopping=stopping)
        passed, outcome, _, trials = follow(
            rule, list(votes.astype(np.uint8)), np.full(len(p), CAP), np.ones((len(p), 1), int)
        )
        accuracy = ((passed[:, None] > np.arange(len(radii))) & correct[:, None]).mean(0)
        known = known_p_bound(p, nulls, rule)
        row: Row = {
            **head,
            "rule": f"{bound}, giving up by {stopping}",
            "samples, mean": round(trials.mean()),
            "median": round(float(np.median(trials))),
            "times fewer": CAP / trials.mean(),
            "of known p": trials.mean() / known.mean(),
            "undecided, %": 100 * float((outcome == UNDECIDED).mean()),
            "certified, %": percents(accuracy),
            "largest loss, points": 100 * float((certified - accuracy).max()),
        }
        rows.append(printed(row))
    if len(radii) == 1:
        mean, passed_stage = bonferroni(votes, float(nulls[0]))
        accuracy = (passed_stage & correct).mean()
        row = {
            **head,
            "rule": "Bonferroni 1k/10k/100k",
            "samples, mean": round(mean),
            "times fewer": CAP / mean,
            "certified, %": percents([accuracy]),
            "largest loss, points": 100 * float(certified[0] - accuracy),
        }
        rows.append(printed(row))
    return rows


def known_p_bound(p: NDArray[Any], nulls: NDArray[Any], rule: Rule) -> NDArray[Any]:
    """min(N, ln(1/level) / KL(p || null)) of the largest null below p, 0 where there is none."""
    found = np.zeros(len(p))
    for null in nulls:
        found = np.maximum(found, np.where(p > null, np.log(1 / rule.image_alpha) / divergence(p, null), 0))
    return np.minimum(found, CAP)


def divergence(p: NDArray[Any], q: NDArray[Any] | float) -> NDArray[Any]:
    return np.maximum(special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q), 1e-12)


def bonferroni(votes: NDArray[Any], null: float) -> tuple[float, NDArray[np.bool_]]:
    """Stages of 1,000, 10,000 and 100,000 samples, each at a third of the level (after Horvath et al. 2022)."""
    stages = (1_000, 10_000, CAP)
    level, futility = ALPHA / len(stages), FUTILITY / len(stages)
    used, certified = np.full(len(votes), CAP), np.zeros(len(votes), bool)
    open_ = np.ones(len(votes), bool)
    for stage in stages:
        k = votes[:, : stage // BLOCK].sum(1)
        above = open_ & (lower_bound(k, np.full(len(k), stage), level) > null)
        below = open_ & (1 - lower_bound(stage - k, np.full(len(k), stage), futility) < null)
        certified |= above
        used[above | below] = stage
        open_ &= ~(above | below)
    return float(used.mean()), certified


# --- classes ----------------------------------------------------------------------------------------------------------


def classes(arguments: argparse.Namespace) -> None:
    rng, sigma, count = np.random.default_rng(arguments.seed), 0.5, 1_000
    p_a = special.ndtr(rng.uniform(-1.5, 3.5, count))
    rows: list[Row] = []
    for number in (2, 100):
        rest = rng.dirichlet([0.2] * (number - 1), count) if number > 2 else np.ones((count, 1))
        p = np.concatenate([p_a[:, None], (1 - p_a)[:, None] * rest], 1)
        selection = np.stack([rng.multinomial(100, own) for own in p])
        paths = [rng.multinomial(BLOCK, own, CAP // BLOCK).astype(np.uint8) for own in p]
        rows += compare_classes(number, sigma, selection, paths)
    looks: Row = {
        f"a look at 1,000 images, seven radii, {bound}, ms of processor time (median of 50)": 1e3 * look_seconds(bound)
        for bound in ("geometric", "two-classes")
    }
    conditions: Row = {"noise": "gaussian", "sigma": sigma, "images": count, **RULE, **printed(looks)}
    record(arguments, "certification-classes", rows, conditions)


def compare_classes(
    number: int, sigma: float, selection: NDArray[Any], paths: Sequence[NDArray[np.uint8]]
) -> list[Row]:
    selected, drawn = selection.argmax(1), np.full(len(paths), CAP)
    counts = np.stack([path.sum(0, dtype=np.int64) for path in paths])
    one_class = [path[:, own] for path, own in zip(paths, selected, strict=True)]
    rows: list[Row] = []
    for radii in ((sigma / 2,), tuple(np.arange(0, 1.76, 0.25))):
        head: Row = {"classes": number, "radii": radii_text(radii)}
        for name, fixed in (
            ("clopper-pearson", certify_counts(selection, counts, sigma, ALPHA)),
            ("two-classes", certify_two_classes(selection, counts, sigma, ALPHA)),
        ):
            reached = (fixed.prediction[:, None] >= 0) & (fixed.radius[:, None] >= np.array(radii))
            rule_text = f"fixed N = {CAP:,}, {name}"
            rows.append(
                printed({**head, "rule": rule_text, "samples, mean": CAP, "certified, %": percents(reached.mean(0))})
            )
        for bound, votes in (("geometric", one_class), ("two-classes", paths)):
            rule = sequential_rule(sigma, radii, len(paths), bound)
            passed, outcome, _, trials = follow(rule, votes, drawn, selection)
            reached = passed[:, None] > np.arange(len(radii))
            row: Row = {
                **head,
                "rule": f"sequential, {bound}",
                "samples, mean": round(trials.mean()),
                "median": round(float(np.median(trials))),
                "certified, %": percents(reached.mean(0)),
                "undecided, %": 100 * float((outcome == UNDECIDED).mean()),
            }
            rows.append(printed(row))
    return rows


def look_seconds(bound: str) -> float:
    rng = np.random.default_rng(0)
    tests = sequential_rule(0.5, [0.25 * step for step in range(7)], 1_000, bound).tests()
    trials, passed = np.full(1_000, 5_000), rng.integers(0, 7, 1_000)
    successes = rng.binomial(trials, rng.uniform(0.3, 1, 1_000))
    rivals = (rng.binomial(trials - successes, 0.5),) * 2
    seconds = []
    for _ in range(50):
        started = time.process_time()
        tests.look(passed, successes, trials, rivals)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


# --- time -------------------------------------------------------------------------------------------------------------


def textbook(model: nn.Module, x: Tensor, sigma: float, selection: int, estimation: int) -> tuple[int, float]:
    """CERTIFY as it is usually written, for one image (C, H, W): class and radius."""

    def sample(number: int) -> NDArray[np.int64]:
        counts = np.zeros(10, np.int64)
        with torch.no_grad():
            while number > 0:
                size = min(1000, number)
                number -= size
                batch = x.repeat((size, 1, 1, 1))
                noise = torch.randn_like(batch) * sigma
                for prediction in model(batch + noise).argmax(1).cpu().numpy():
                    counts[prediction] += 1
        return counts

    top = int(sample(selection).argmax())
    bound = lower_bound(sample(estimation)[top], estimation, ALPHA)
    return top, float(certified_radius(bound, sigma))


def wall_time(arguments: argparse.Namespace) -> None:
    stored = smoothed_model(arguments.run)
    sigma = stored.sigma
    images = labelled_pixels(real_images(arguments))
    pixels = images.x
    plain = smoothed_model(arguments.run).classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    per_image, row = textbook_time(plain, pixels, sigma, CAP, arguments.textbook_full)
    rows = [row, textbook_time(plain, pixels, sigma, arguments.textbook_samples, arguments.textbook_images)[1]]
    log = read_log(arguments.logs / f"catrs_sigma_{sigma:g}.tsv").certificates
    models = {
        "network": ("trained network", stored.classifier, (pixels, images.y)),
        "margins": ("linear margins of the logs", *margins_model(stored.classifier, sigma, log, len(images))),
    }
    for title, classifier, data in (models[name] for name in arguments.models):
        for what, radii in (("one radius", (sigma,)), ("curve", tuple(CURVES[sigma]))):
            execution, _ = try_forwards(classifier, stored_execution(), (3, 32, 32), 10, 10_000_000)
            smoothed = rush.SmoothedClassifier(classifier, sigma, 10, execution=execution)
            count = len(images) if what == "one radius" else min(len(images), arguments.curve_images)
            chosen = slice(0, None, len(images) // count)
            started = time.perf_counter()
            found = rush.certify(
                smoothed, (data[0][chosen], data[1][chosen]), "sequential", num_estimation=CAP, alpha=ALPHA, radii=radii
            )
            elapsed = (time.perf_counter() - started) / len(found)
            row = {
                "votes of": title,
                "radii": radii_text(radii),
                "images": len(found),
                "samples per image, with selection": round(found.num_samples.mean()),
                "s per image [least, greatest]": elapsed,
                "textbook / this": per_image / elapsed,
            }
            rows.append(printed(row))
    record(arguments, "certification-time", rows, {**setting_of(stored), **RULE})


def textbook_time(network: nn.Module, pixels: Tensor, sigma: float, estimation: int, count: int) -> tuple[float, Row]:
    """Return the mean seconds of the textbook on ``count`` images, and its row."""
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        textbook(network, pixels[number], sigma, 100, estimation)
        seconds.append(time.perf_counter() - started)
    mean = statistics.mean(seconds)
    row: Row = {
        "votes of": f"textbook, N = {estimation:,}",
        "images": count,
        "samples per image, with selection": estimation + 100,
        "s per image [least, greatest]": (mean, min(seconds), max(seconds)),
    }
    return mean, printed(row)


class Margins(nn.Module):
    """``network`` is evaluated for its cost alone; the logits are a plane's, computed in float32."""

    def __init__(self, network: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.network = network
        self.weight: Tensor
        self.register_buffer("weight", weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x).float()
        score = ((x - 0.5) * self.weight).sum((1, 2, 3))
        # 1e-30 changes no vote, and unlike 0 it does not let a compiler leave the network out
        return torch.cat([torch.stack([-score, score], 1) + 1e-30 * logits[:, :2], 1e-30 * logits[:, 2:] - 1e6], 1)


def margins_model(
    network: nn.Module, sigma: float, log: Certificates, count: int
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model of the network's cost whose class probabilities are every k-th of the log's, sorted."""
    p = np.sort(class_probabilities(log))[:: len(log) // count][:count]
    weight = torch.full((3, 32, 32), 3072**-0.5)
    margin = torch.from_numpy(sigma * special.ndtri(np.clip(p, 1e-6, 1 - 1e-6))).float()
    along = 1e-3 * torch.randn(count, 3, 32, 32, generator=stream(0, "benchmark", "along"))
    along -= (along * weight).sum((1, 2, 3), keepdim=True) * weight
    order = torch.randperm(count, generator=stream(0, "benchmark", "order"))
    x = 0.5 + margin.view(-1, 1, 1, 1) * weight + along
    return Margins(network, weight), (x[order], torch.ones(count, dtype=torch.int64))


# --- loss -------------------------------------------------------------------------------------------------------------


def loss(arguments: argparse.Namespace) -> None:
    stored = smoothed_model(arguments.run)
    images = real_images(arguments)
    execution, _ = try_forwards(stored.classifier, stored_execution(), (3, 32, 32), 10, 10_000_000)
    smoothed = rush.SmoothedClassifier(stored.classifier, stored.sigma, 10, execution=execution)
    started = time.perf_counter()
    fixed = rush.certify(smoothed, images, num_estimation=arguments.real_samples, alpha=ALPHA)
    print(f"{len(fixed)} images, N = {arguments.real_samples:,}, {execution}: {time.perf_counter() - started:.0f} s")
    sigma, rows = stored.sigma, list[Row]()
    for radii in ((sigma,), tuple(CURVES[sigma]), tuple(np.arange(0, fixed.largest_radius - 0.02, sigma / 2))):
        within = [float(radius) for radius in radii if radius < 0.98 * fixed.largest_radius]
        found = recompute(fixed, bound="geometric", radii=within)
        assert (np.isin(found.prediction, fixed.prediction)).all()
        for radius in found.rule.radii or ():
            row: Row = {
                "radii": radii_text(radii),
                "at": radius,
                "certified by fixed N, %": 100 * fixed.accuracy(radius),
                "sequentially, %": 100 * found.accuracy(radius),
                "samples, mean": round(found.num_samples.mean()),
            }
            rows.append(printed(row))
    conditions: Row = {**setting_of(smoothed), **RULE, "images": len(fixed), "N": arguments.real_samples}
    record(arguments, "certification-loss", rows, conditions)


# --- engine -----------------------------------------------------------------------------------------------------------


def engine(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for width in arguments.widths:
        spec = ClassifierSpec("resnet18", width, 3, (0.5,) * 3, (0.25,) * 3, [str(k) for k in range(10)])
        classifier = seeded_init(spec.build(), stream(0, "benchmark", "weights")).eval()
        execution = replace(decide_execution(tile=arguments.tile), compile_mode=arguments.compile)
        smoothed = rush.SmoothedClassifier(execution.place(classifier), 0.25, 10, execution=execution)
        x = torch.rand(16, 3, 32, 32, generator=stream(0, "benchmark", "images"))
        data = (x, torch.zeros(len(x), dtype=torch.int64))
        per_image = int(arguments.engine_samples[arguments.widths.index(width)])
        rush.certify(smoothed, data, num_estimation=200)  # compiles and inspects
        forward = Forward(classifier, execution, 10)
        tile = 0.5 + 0.25 * torch.randn(arguments.tile, 3, 32, 32, generator=stream(0, "benchmark", "tile"))
        forward(tile)
        bare, certified, products = [], [], []
        for _ in range(arguments.repeats):
            bare.append(rate(partial(forward, tile), len(tile), 5.0))
            started = time.perf_counter()
            found = rush.certify(smoothed, data, num_estimation=per_image)
            certified.append(found.num_samples.sum() / (time.perf_counter() - started))
            products.append(matrix_rate())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            classifier(tile[:1])
        flops = counter.get_total_flops()
        ratios = [c / b for c, b in zip(certified, bare, strict=True)]
        shares = [b * flops / m for b, m in zip(bare, products, strict=True)]
        row: Row = {
            "width": width,
            "bare forward, images/s": statistics.median(bare),
            "certified, samples/s": statistics.median(certified),
            "ratio [least, greatest]": spread(ratios),
            "GFLOP per image": flops / 1e9,
            "forward / matrix products [least, greatest]": spread(shares),
            "bfloat16 matrix products, GFLOP/s": statistics.median(products) / 1e9,
        }
        rows.append(printed(row))
    setting: Row = {**setting_of(smoothed), "tile": arguments.tile, "compile": arguments.compile}
    record(arguments, "certification-engine", rows, {**setting, "rounds": arguments.repeats})


def matrix_rate() -> float:
    """FLOP a second of a 2048 x 2048 product in bfloat16."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    return rate(lambda: a @ b, 2 * 2048**3, 2.0)


def rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    work()
    started, done = time.perf_counter(), 0.0
    while (elapsed := time.perf_counter() - started) < seconds:
        work()
        done += amount
    return done / elapsed


# --- votes ------------------------------------------------------------------------------------------------------------


def votes(arguments: argparse.Namespace) -> None:
    stored = smoothed_model(arguments.run)
    images = real_images(arguments)
    reference = replace(stored_execution(), compile_mode="default")
    others = {
        "eager": replace(reference, compile_mode="none"),
        "not folded": replace(reference, compile_mode="none", folded=False),
        "tile 64": replace(reference, tile=64),
        "tile 512": replace(reference, tile=512),
        "float32": replace(reference, compile_mode="none", precision="float32"),
    }
    changed, total = dict.fromkeys(others, 0), 0
    forwards = {name: Forward(stored.classifier, own, 10) for name, own in {"reference": reference, **others}.items()}
    executions = {"reference": reference, **others}
    for number in range(arguments.vote_images):
        noise = stored.noise.sample((1024, 3, 32, 32), stream(0, "benchmark", "votes", number))
        noisy = images.pixels(slice(number, number + 1)) + noise
        found = {
            name: torch.cat([forward(part) for part in noisy.split(executions[name].rows(noisy.shape[1:]))]).argmax(1)
            for name, forward in forwards.items()
        }
        total += len(noisy)
        for name in others:
            changed[name] += int((found[name] != found["reference"]).sum())
    print(f"votes of {arguments.vote_images} images, {total:,} samples; reference {reference}")
    rows = [
        printed({"execution": name, "votes that differ": count, "of all, %": 100 * count / total})
        for name, count in changed.items()
    ]
    conditions: Row = {**setting_of(stored), "images": arguments.vote_images, "samples": total}
    record(arguments, "certification-votes", rows, conditions)


# --- shared -----------------------------------------------------------------------------------------------------------

FUTILITY = 0.01
RULE: Row = {"alpha per image": ALPHA, "futility": FUTILITY, "cap": CAP}


def sequential_rule(sigma: float, radii: Sequence[float], count: int, bound: str) -> Rule:
    return make_rule(
        sigma=sigma, method="sequential", bound=bound, alpha=ALPHA, level="image", num_images=count,
        num_selection=100, num_estimation=CAP, radii=[float(radius) for radius in radii], futility=FUTILITY,
    )  # fmt: skip


def stored_execution() -> Execution:
    return decide_execution()


def real_images(arguments: argparse.Namespace) -> rush.ImageSet:
    """The first images of a seeded order of the test split."""
    test = rush.load_images("cifar10", split="test", root=arguments.data)
    return test[torch.randperm(len(test), generator=stream(0, "evaluation", "order"))[: arguments.images].tolist()]


def radii_text(radii: Sequence[float]) -> str:
    return f"{radii[0]:g}" if len(radii) == 1 else f"{radii[0]:g} to {radii[-1]:g} by {radii[1] - radii[0]:g}"


def percents(shares: Sequence[float] | NDArray[Any]) -> str:
    return "/".join(f"{100 * share:.2f}" for share in np.atleast_1d(shares))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parts = {"samples": samples, "classes": classes, "time": wall_time, "loss": loss, "engine": engine, "votes": votes}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--logs", type=Path, help="folder with the published logs")
    parser.add_argument("--run", type=Path, help="run folder with a trained network of width 16")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--models", nargs="+", choices=("network", "margins"), default=("network", "margins"))
    parser.add_argument("--curve-images", type=int, default=100)
    parser.add_argument("--textbook-images", type=int, default=20)
    parser.add_argument("--textbook-samples", type=int, default=20_000)
    parser.add_argument("--textbook-full", type=int, default=3, help="images with N = 100,000, the base of the ratios")
    parser.add_argument("--real-samples", type=int, default=10_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--engine-samples", type=int, nargs="+", default=[8_000, 800])
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--compile", default="default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vote-images", type=int, default=50)
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
