"""Deterministic CIFAR-10 networks that attacks are compared on, and the training of the robust one.

    python benchmarks/reference_models.py --data CIFAR10 --out results/cifar10-pgd

trains the small robust network (adversarial training, Madry et al. 2018), resumable after every epoch, and writes its
weights, ``model.json`` and ``accuracy.json`` to the folder. Both networks compute in bfloat16 where the processor does
that natively, and their first and last layer always in float32: a bfloat16 input or output is a quantiser, an 8-bit
pixel has steps of half its spacing, and an attack would be measured against that. The mixed forward itself is attacked:
a fixed function, the same for every attacker. On 64 test images the mixed ResNet-18's logits (standard deviation 5.2)
are within 0.008 of float32 on average, and the median cosine between the two gradients is 0.996.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rush
from rush.attacks.gradient import plain
from rush.attacks.pgd import pgd
from rush.data.batches import Batch, Resident
from rush.data.images import ImageSet
from rush.data.views import random_view
from rush.models.classifier import Classifier
from rush.models.storage import ClassifierSpec, load_weights, save_weights
from rush.recipe.schema import Schedule, WeakViews
from rush.runtime.execution import Execution, decide_execution
from rush.runtime.files import write_json
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.forward import fold_batch_norm
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.loop import CheckpointPolicy, TrainingRun
from shared import labels_of

EPSILON = 8 / 255
ATTACK_STEPS, ATTACK_STEP_SIZE = 3, 2.5 / 3  # the step is a share of epsilon
SCHEDULE = Schedule(
    epochs=7, batch_size=128, optimizer="sgd", learning_rate=0.15, momentum=0.9, weight_decay=5e-4, warmup_epochs=1
)
SPEC = ClassifierSpec(
    "resnet18", 16, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), [str(k) for k in range(10)]
)


# --- the mixed forward ------------------------------------------------------------------------------------------------


class Float32Conv2d(nn.Conv2d):
    """A convolution computed in float32 whatever the autocast around it; its output is rounded to the autocast's type,
    or the whole first stage, whose shortcuts add to it, would run in float32."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(narrow)


class Float32Linear(nn.Linear):
    """A linear layer in float32 whatever the autocast around it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Mixed(nn.Module):
    """Pixels (B, 3, H, W) float32 in [0, 1] -> logits (B, K) float32; the layers between in bfloat16 where native."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.execution = replace(decide_execution(), folded=False)
        self.network = self.execution.place(ends_in_float32(network))

    def forward(self, x: Tensor) -> Tensor:
        return self.execution.logits(self.network, x)


def ends_in_float32(network: nn.Module) -> nn.Module:
    """``network`` with its first convolution and its linear layers (one: the last) computing in float32."""
    convolutions = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    linears = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    for name in (*convolutions[:1], *linears):
        layer = network.get_submodule(name)
        network.set_submodule(name, _in_float32(layer))
    return network


def _in_float32(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        twin: nn.Module = Float32Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        assert isinstance(layer, nn.Conv2d)
        shape: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
        twin = Float32Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **shape)
    twin.load_state_dict(layer.state_dict())
    return twin


# --- the two networks -------------------------------------------------------------------------------------------------


def plain_resnet18() -> nn.Module:
    """The plainly trained ResNet-18 (about 94 % clean) that the package pyautoattack brings, in evaluation mode."""
    spec = find_spec("pyautoattack.examples.resnet")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs pyautoattack: pip install -c constraints.txt pyautoattack")
    from pyautoattack.examples.resnet import ResNet18

    network = ResNet18()
    weights = torch.load(Path(spec.origin).with_name("model_test.pt"), weights_only=True, map_location="cpu")
    network.load_state_dict(weights)
    return frozen(network)


def robust_network(folder: Path) -> nn.Module:
    """The adversarially trained network in ``folder``, in evaluation mode."""
    spec = ClassifierSpec(**json.loads((folder / "model.json").read_text(encoding="utf-8"))["classifier"])
    network = spec.build()
    load_weights(network, folder / "model.safetensors")
    return frozen(network)


def frozen(network: nn.Module) -> nn.Module:
    """The mixed forward of ``network`` with BatchNorm folded, in evaluation mode, without gradients for its weights."""
    return Mixed(fold_batch_norm(network.eval())).eval().requires_grad_(False)


# --- adversarial training ---------------------------------------------------------------------------------------------


def train_pgd(images: ImageSet, out: Path, schedule: Schedule, seed: int) -> Classifier:
    """A network trained on PGD points at l-inf 8/255, in evaluation mode; goes on from the checkpoint in ``out``.

    The attack of a step starts at random in the ball and sees the network in evaluation mode; the loss is that of the
    last iterate alone, in training mode.
    """
    classifier = seeded_init(SPEC.build(), stream(seed, "pgd-network", "init"))
    assert isinstance(classifier, Classifier)
    assert images.labels is not None
    mixed = Mixed(classifier)
    weak = WeakViews(shift_pad=4)
    recipe = json.dumps([asdict(SPEC), schedule.model_dump(), EPSILON, ATTACK_STEPS, ATTACK_STEP_SIZE, seed])

    def step(batch: Batch, _epoch: float, generator: torch.Generator) -> Tensor:
        assert batch.labels is not None
        adversarial = training_point(mixed, random_view(batch.images, weak, generator), batch.labels, generator)
        loss = F.cross_entropy(mixed.train()(adversarial), batch.labels)
        loss.backward()
        return loss.detach()

    TrainingRun(
        classifier,
        step,
        name="pgd-network",
        images=Resident(images),
        schedule=schedule,
        seed=seed,
        checkpoints=CheckpointPolicy(TrainingCheckpoint(out / "training.pt", recipe)),
        log=lambda _, **values: print(json.dumps(values), flush=True),
    ).run()
    return classifier.eval()


def training_point(mixed: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """The last iterate of a short PGD from a random start, without gradients."""
    low, high = (x - EPSILON).clamp_(min=0), (x + EPSILON).clamp_(max=1)
    point = low + (high - low) * torch.rand(x.shape, generator=generator)
    mixed.eval().requires_grad_(False)
    for _ in range(ATTACK_STEPS):
        point.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(mixed(point), y, reduction="sum"), point)
        point = torch.clamp(point.detach() + ATTACK_STEP_SIZE * EPSILON * gradient.sign(), low, high)
    mixed.requires_grad_(True)
    return point


# --- its accuracy -----------------------------------------------------------------------------------------------------


def pgd_accuracy(model: nn.Module, images: ImageSet, steps: int, seed: int) -> tuple[float, float]:
    """Clean and PGD accuracy of ``model`` at 8/255, step 2/255, one random start, best iterate."""
    threat, labels = rush.ThreatModel("linf", EPSILON), labels_of(images)
    log_probs = plain(model, Execution())
    clean = broken = 0
    for start in range(0, len(images), 250):
        rows = range(start, min(start + 250, len(images)))
        x, y = images.pixels(slice(rows.start, rows.stop)), labels[rows.start : rows.stop]
        starts = [stream(seed, "pgd-network", "test", row) for row in rows]
        best, _ = pgd(log_probs, x, y, threat, steps=steps, step_size=0.25, start=threat.random_start(x, starts))
        with torch.no_grad():
            right, left = model(x).argmax(1) == y, model(best).argmax(1) == y
        clean += int(right.sum())
        broken += int((~(right & left)).sum())
    return clean / len(images), 1 - broken / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint, by default --out")
    parser.add_argument("--epochs", type=int, default=SCHEDULE.epochs)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = partial(rush.load_images, "cifar10", root=arguments.data)
    started = time.perf_counter()
    schedule = SCHEDULE.replace(epochs=arguments.epochs)
    classifier = train_pgd(load(split="train"), arguments.work or arguments.out, schedule, arguments.seed)
    seconds = time.perf_counter() - started
    save_weights(classifier, arguments.out / "model.safetensors")
    recipe = {
        "norm": "linf", "epsilon": "8/255", "attack_steps": ATTACK_STEPS,
        "attack_step_size_over_epsilon": ATTACK_STEP_SIZE, "schedule": schedule.model_dump(), "seed": arguments.seed,
    }  # fmt: skip
    write_json(arguments.out / "model.json", {"classifier": asdict(SPEC), "training": recipe})
    test = load(split="test")[: arguments.test_images]
    clean, robust = pgd_accuracy(robust_network(arguments.out), test, 20, arguments.seed)
    found = {"images": len(test), "clean": clean, "pgd20": robust, "training_seconds": round(seconds)}
    write_json(arguments.out / "accuracy.json", found)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
