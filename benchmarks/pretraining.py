"""The speed of contrastive pre-training: views per second of whole training steps, and of the augmentation alone.

    python benchmarks/pretraining.py --data CIFAR10 --threads 2

CIFAR10 is a folder with the data set (docs/data.md). Every step consists of two views of each of 256 CIFAR-10 images,
ResNet-18 of width 16 and projector, NT-Xent, backward pass, SGD. Ours is ``rush.training.pretrain.pretrain`` itself,
by its own clock: images on the device, batched views, bfloat16 and channels_last where the processor computes in
bfloat16, else float32.

Whole steps, ours against
  (a) one image after the other, as the SSL libraries do: Pillow in two DataLoader workers, float32 (target: >= 2);
  (b) kornia on whole batches, float32 (target: above 1); and with our precision and layout, so that what remains is the
      augmentation;
  the bare network: forward and backward pass on ready-made views, our precision and layout, no loss, no optimizer
      (target: >= 0.85);
  our augmentation alone: the ratio is its share of our step (target: < 0.10).
Augmentation alone, ours against kornia (target: >= 4) and one image after the other in two workers (target: >= 8). It
begins with 8-bit images and ends with float32 views. benchmarks/augmentation.py shows that all draw the same views.

Ours and the other take turns of about --seconds, --rounds times, and each round gives one ratio. The median, least and
greatest ratio and the median rates are printed. The DataLoader runs at full speed whenever it is timed: its start and
its first batches are excluded. Run the benchmark on an otherwise idle machine.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

import rush
from augmentation import (
    CROP_RATIO,
    CROP_SCALE,
    PILLOW,
    RESAMPLED,
    SLICED,
    Pipeline,
    check_same_views,
    kornia_pipeline,
    pillow_pipeline,
    pillow_view,
    rush_pipeline,
    to_tensor,
)
from rush.choices import TrainingCompile
from rush.data.batches import Resident
from rush.data.images import ImageSet
from rush.models.classifier import Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import projector
from rush.recipe.schema import PretrainConfig, Views
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.machine import machine
from rush.runtime.randomness import seeded_init, stream
from rush.training.contrastive import nt_xent
from rush.training.loop import TrainingSettings
from rush.training.optim import build_optimizer
from rush.training.pretrain import channel_statistics, pretrain
from shared import Row, benchmark_parser, printed, record, spread

WORKERS = 2
# As in the recipe cifar10-small.
TEMPERATURE, HIDDEN, OUT = 0.5, 512, 128
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.3, 0.9, 1e-4

Turn = Callable[[int], float]  # seconds that so many steps take


@dataclass(frozen=True)
class Target:
    """What a ratio should be; ``told`` is printed."""

    told: str
    met: Callable[[float], bool]


@dataclass(frozen=True)
class Setting:
    """What all candidates share."""

    images: ImageSet
    normalize: Normalize
    width: int
    batch: int
    execution: Execution

    def encoder(self) -> nn.Module:
        return seeded_init(build_encoder("resnet18", self.width, 3), stream(0, "benchmark", "encoder"))

    def batches(self) -> Iterator[Tensor]:
        """Random batches of 8-bit images on the device, without end."""
        pixels, generator = self.images.images.to(self.execution.device), stream(0, "benchmark", "order")
        while True:
            chosen = torch.randint(len(pixels), (self.batch,), generator=generator)
            yield pixels[chosen.to(pixels.device)]


# --- the candidates ---------------------------------------------------------------------------------------------------


def rush_turn(setting: Setting, compile_mode: TrainingCompile) -> Turn:
    """The library's pre-training as a user starts it: the only place here that knows how. Two epochs of ``steps``, of
    which the first warms up."""

    def turn(steps: int) -> float:
        rates: list[float] = []

        def log(event: str, **figures: float) -> None:
            if event == "epoch":
                rates.append(figures["images_per_second"])

        pretrain(
            Resident(setting.images[: steps * setting.batch], setting.execution.device),
            setting.encoder(),
            setting.normalize,
            PretrainConfig(
                epochs=2,
                batch_size=setting.batch,
                learning_rate=LEARNING_RATE,
                momentum=MOMENTUM,
                weight_decay=WEIGHT_DECAY,
                warmup_epochs=1.0,
                temperature=TEMPERATURE,
                projector_hidden=HIDDEN,
                projector_out=OUT,
                views=Views(crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO),
            ),
            TrainingSettings(seed=0, execution=setting.execution, compile_mode=compile_mode, log=log),
        )
        return steps * setting.batch / rates[-1]

    return turn


class Trainer:
    """A plain training step on two batches of ready views."""

    def __init__(self, setting: Setting, execution: Execution) -> None:
        encoder = setting.encoder()
        assert isinstance(encoder.features, int)
        head = seeded_init(projector(encoder.features, HIDDEN, OUT), stream(0, "benchmark", "projector"))
        self.execution, self.normalize = execution, setting.normalize
        self.network = execution.place(nn.Sequential(encoder, head)).train()
        # Without a schedule the full learning rate would diverge.
        self.optimizer = build_optimizer(self.network, "sgd", LEARNING_RATE / 100, MOMENTUM, WEIGHT_DECAY)

    def step(self, view_a: Tensor, view_b: Tensor) -> None:
        both = self.normalize(torch.cat([view_a, view_b]).to(self.execution.device))
        self.optimizer.zero_grad(set_to_none=True)
        with self.execution.autocast():
            z = self.network(self.execution.layout(both))
        projected_a, projected_b = z.float().chunk(2)
        nt_xent(projected_a, projected_b, TEMPERATURE).backward()
        self.optimizer.step()

    def forward_backward(self, ready: Tensor, gradient: Tensor) -> None:
        self.network.zero_grad(set_to_none=True)
        with self.execution.autocast():
            z = self.network(ready)
        z.backward(gradient.to(z.dtype))


def batched_turn(setting: Setting, execution: Execution, pipeline: Pipeline) -> Turn:
    """Training on views that ``pipeline`` makes of whole batches."""
    trainer, batches = Trainer(setting, execution), setting.batches()

    def step() -> None:
        x = next(batches)
        with torch.no_grad():
            views = pipeline(x), pipeline(x)
        trainer.step(*views)

    return repeated(step, execution)


def bare_turn(setting: Setting) -> Turn:
    trainer = Trainer(setting, setting.execution)
    x = next(setting.batches()).float() / 255
    ready = setting.execution.layout(setting.normalize(torch.cat([x, x.flip(3)])))
    gradient = torch.full((len(ready), OUT), 1e-3, device=ready.device)
    return repeated(lambda: trainer.forward_backward(ready, gradient), setting.execution)


def augmentation_turn(setting: Setting, pipeline: Pipeline) -> Turn:
    """Two views of every image of a batch, and nothing else."""
    batches = setting.batches()

    def step() -> None:
        x = next(batches)
        with torch.no_grad():
            pipeline(x), pipeline(x)

    return repeated(step, setting.execution)


def repeated(step: Callable[[], None], execution: Execution) -> Turn:
    def turn(steps: int) -> float:
        synchronize(execution)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(execution)
        return time.perf_counter() - started

    return turn


class PerImage(Dataset[tuple[Tensor, Tensor]]):
    """Two Pillow views of one image at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.rng = random.Random(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return to_tensor(pillow_view(image, self.rng)), to_tensor(pillow_view(image, self.rng))


def seed_worker(worker: int) -> None:
    information = get_worker_info()
    assert information is not None
    information.dataset.rng.seed(worker)  # type: ignore[attr-defined]


def per_image_turn(setting: Setting, use: Callable[[Tensor, Tensor], None], execution: Execution) -> Turn:
    """Batches from two workers, each given to ``use``.

    The workers have an endless queue before them, so that they are as busy at the end of a turn as in its middle, and
    are ended behind it, so that they take no time from the next turn.
    """
    data = PerImage(setting.images.images.cpu())
    sampler = RandomSampler(data, replacement=True, num_samples=2**40, generator=stream(0, "benchmark", "order"))
    loader = DataLoader(data, setting.batch, sampler=sampler, num_workers=WORKERS, worker_init_fn=seed_worker)

    def turn(steps: int) -> float:
        batches = iter(loader)
        step = repeated(lambda: use(*next(batches)), execution)
        step(2 * WORKERS)
        return step(steps)

    return turn


def synchronize(execution: Execution) -> None:
    if torch.device(execution.device).type != "cpu":
        torch.accelerator.synchronize()


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(name: str, ours: Turn, other: Turn, target: Target | None, arguments: argparse.Namespace) -> Row:
    """Prints and returns the ratios of rates, ours / other, of turns that follow each other; who begins changes."""
    candidates = (ours, other)
    steps = [enough_steps(turn, arguments.seconds) for turn in candidates]
    rates: list[tuple[float, float]] = []
    for number in range(arguments.rounds):
        found = {}
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which] = 2 * arguments.batch * steps[which] / candidates[which](steps[which])
        rates.append((found[0], found[1]))
    ratios = [own / others for own, others in rates]
    reached = target is not None and target.met(statistics.median(ratios))
    own, others = (statistics.median(column) for column in zip(*rates, strict=True))
    row: Row = {
        "views/s": name,
        "ours": own,
        "other": others,
        "ratio [least, greatest]": spread(ratios),
        "target": None if target is None else f"{target.told}, {'met' if reached else 'missed'}",
    }
    return printed(row)


def enough_steps(turn: Turn, seconds: float) -> int:
    """Steps of a turn of about ``seconds``, a multiple of the workers' number; the first turn warms up."""
    turn(WORKERS)
    return WORKERS * max(1, math.ceil(seconds / turn(WORKERS)))


def whole_steps(setting: Setting, arguments: argparse.Namespace) -> list[Row]:
    plain = decide_execution(arguments.device, "float32")
    # Whichever is faster: slicing goes from image to image, which an accelerator would wait for.
    mode = "slice" if torch.device(plain.device).type == "cpu" else "resample"
    ours, kornia = rush_turn(setting, arguments.compile), kornia_pipeline(32, mode)
    loaded = per_image_turn(setting, Trainer(setting, plain).step, plain)
    rows = [compare("(a) one image at a time, float32", ours, loaded, at_least(2), arguments)]
    if kornia is not None:
        rows.append(compare("(b) kornia, float32", ours, batched_turn(setting, plain, kornia), above(1), arguments))
        precision = f"kornia, {setting.execution.precision}, our layout"
        rows.append(compare(precision, ours, batched_turn(setting, setting.execution, kornia), None, arguments))
    rows.append(compare("bare forward and backward", ours, bare_turn(setting), at_least(0.85), arguments))
    alone = augmentation_turn(setting, rush_views(setting))
    rows.append(compare("our augmentation alone (ratio: its share)", ours, alone, below(0.10), arguments))
    return rows


def augmentation_alone(setting: Setting, arguments: argparse.Namespace) -> list[Row]:
    ours, rows = augmentation_turn(setting, rush_views(setting)), list[Row]()
    for name, mode in ((SLICED, "slice"), (RESAMPLED, "resample")):
        kornia = kornia_pipeline(32, mode)
        if kornia is not None:
            turn = augmentation_turn(setting, kornia)
            rows.append(compare(name, ours, turn, at_least(4), arguments))
    loaded = per_image_turn(setting, lambda view_a, view_b: None, decide_execution("cpu"))  # noqa: ARG005
    rows.append(compare(f"one image at a time, {WORKERS} workers", ours, loaded, at_least(8), arguments))
    return rows


def rush_views(setting: Setting) -> Pipeline:
    return rush_pipeline(0.0, setting.execution.device)


def at_least(least: float) -> Target:
    return Target(f">= {least:g}", lambda ratio: ratio >= least)


def above(bound: float) -> Target:
    return Target(f"> {bound:g}", lambda ratio: ratio > bound)


def below(bound: float) -> Target:
    return Target(f"< {bound:g}", lambda ratio: ratio < bound)


def print_conditions(setting: Setting, arguments: argparse.Namespace) -> None:
    kind, execution = machine(), setting.execution
    found = [f"{name} {metadata.version(name)}" for name in ("torch", "kornia", "pillow", "numpy")]
    print(f"{kind['processor']}, {kind['cores']} cores; device {execution.device}, {torch.get_num_threads()} threads")
    layout = "channels_last" if execution.channels_last else "contiguous"
    network = f"ResNet-18 of width {setting.width}, {setting.batch} images a step"
    print(f"ours: {execution.precision}, {layout}, compile {arguments.compile}; {network}")
    print(
        f"{arguments.rounds} rounds of turns of {arguments.seconds:g} s; python {python_version()}, {', '.join(found)}"
    )


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=get_args(TrainingCompile), default="none", help="of our network")
    parser.add_argument("--part", choices=("steps", "augmentation", "all"), default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # kornia draws from torch's global generator
    execution = decide_execution(arguments.device)
    images = rush.load_images("cifar10", split="train", root=arguments.data).without_labels()
    normalize = Normalize(*channel_statistics(images)).to(execution.device)
    setting = Setting(images, normalize, arguments.width, arguments.batch, execution)
    print_conditions(setting, arguments)
    check_same_views(
        {
            "rush": rush_views(setting),
            SLICED: kornia_pipeline(32, "slice"),
            RESAMPLED: kornia_pipeline(32, "resample"),
            PILLOW: pillow_pipeline,
        },
        32,
    )
    conditions: Row = {
        "noise": "none",
        "network": f"ResNet-18, width {setting.width}",
        "images per step": setting.batch,
        "precision of ours": execution.precision,
        "device": execution.device,
        "rounds": arguments.rounds,
    }
    for part, measure in (("steps", whole_steps), ("augmentation", augmentation_alone)):
        if arguments.part in ("all", part):
            print(part)
            record(arguments, f"pretraining-{part}", measure(setting, arguments), conditions)


if __name__ == "__main__":
    main()
