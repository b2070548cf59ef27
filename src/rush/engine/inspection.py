"""Is a classifier one fixed function of one image? Asked once, before any sampling.

Every guarantee is about votes of one function f under noise. A classifier that draws chance, or whose logits for an
image depend on the other images or on its row in the tile, is no such function. What the layers tell is read by
``check_structure``; what only a call can show is measured by ``check_forward``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rush.engine.precision import check_eval_mode
from rush.errors import ModelError, NumericsWarning
from rush.options import Precision

RELATIVE = 16  # epsilons of the arithmetic, of the spread of the logits: what rounding inside a deep network explains
ULPS = 4  # epsilons of the logits' own type, of their magnitude: what rounding of the logits themselves explains
# Convolutions and products in float32 may be computed in TF32, whose mantissa has 10 bits like that of float16.
ARITHMETIC: dict[Precision, float] = {"float32": 2**-10, "bfloat16": 2**-7}


@dataclass(frozen=True)
class _Question:
    """What was changed between two calls, what to do about a real difference, what a last-bit one means."""

    finding: str
    remedy: str
    consequence: str


_CALLS = _Question(
    "for the same tile of images change from call to call",
    "the classifier must be one fixed function: remove dropout, noise, counters and updated averages that act in "
    "evaluation mode",
    "its kernels are not deterministic, and the same command may give other votes; "
    "torch.use_deterministic_algorithms(True) asks for kernels that are",
)
_NEIGHBOURS = _Question(
    "of one image depend on its neighbours in the tile",
    "the classifier must be a function of one image: remove batch statistics, attention across the batch (batch_first) "
    "and whatever else mixes images",
    "votes may depend on the tile: the other images in flight may turn a close one",
)
_POSITION = _Question(
    "of one image depend on its row in the tile",
    "the classifier must be a function of one image: remove row indices, noise drawn from a fixed seed, and whatever "
    "reads a certain row",
    "votes may depend on the tile: another order of images may turn a close one",
)


def check_structure(module: nn.Module) -> None:
    """Raises ModelError when a layer of ``module`` is in training mode, or is a BatchNorm that normalizes by the
    statistics of the batch even in evaluation mode, as it does without running statistics.

    InstanceNorm, LayerNorm and GroupNorm look at one image and are fine with and without running statistics; so is a
    BatchNorm that holds them and no longer tracks them. Costs no forward call.
    """
    check_eval_mode(module)
    found = [name or "(the module itself)" for name, layer in module.named_modules() if _uses_batch_statistics(layer)]
    if found:
        raise ModelError(
            f"a BatchNorm layer has no running statistics (first such layer: {found[0]}, {len(found)} in all) and "
            "takes those of the batch even in evaluation mode, so that an image's logits depend on its neighbours: "
            "train the classifier with track_running_stats=True, or with GroupNorm in place of that layer"
        )


def check_forward(forward: Callable[[Tensor], Tensor], tile: Tensor, precision: Precision = "float32") -> None:
    """Raises ModelError unless ``forward`` is, up to rounding, one fixed function of one image.

    forward: maps a full tile (T, C, H, W) to logits (T, K). tile: float32 pixels, T >= 1, best the noisy images that
    are to be judged; it is not changed. precision: what the forward computes in.

    Four calls at most, without gradients: the tile; the same again; with about half of the rows replaced; with every
    image moved one row on. Logits of the same image are compared. The rows that stay are those whose number has an
    even number of ones in binary (the Thue-Morse sequence), a pattern that has no period and splits every pair
    (2k, 2k + 1), so that whatever mixes rows at some distance, in groups or in halves meets replaced ones; the others
    become 3 - 2x, brighter than white and of twice the contrast, so that no statistic of the batch stays. A function
    of the row that moving by one row leaves alone is a constant one. A single row has no neighbours and no other place.

    What counts as rounding: at most 16 epsilons of the arithmetic (2^-7 for bfloat16, 2^-10 for float32, which may be
    computed in TF32) of the standard deviation over the classes, the image's own or the tile's median, whichever is
    larger; plus 4 epsilons of the type that holds the logits, of their magnitude. That is 12.5 % in bfloat16 and 1.6 %
    in float32. Measured on a ResNet-18 and on a trained small network: bfloat16 differs from float32, and from bfloat16
    in another memory layout, by at most 3 %, float32 with its sums in another order by less than 0.001 %; batch
    statistics in one layer, centring by the batch and dropout of 1 % by 25 % and more. In between, rounding and a weak
    dependence look alike, hence the warning with its size. Logits that jump, as those of a hard decision do, turn a
    last bit into an error.

    Nothing is drawn here; the forward itself may advance the global generator.
    Raises: ModelError naming the dependence and its size, also for logits that are not finite or not (T, K).
    Warns: NumericsWarning, once, for the first difference in that order that is not zero, yet no more than rounding;
    a forward that changes from call to call differs in the other comparisons too.
    """
    first = _logits(forward, tile)
    if not bool(first.isfinite().all()):
        raise ModelError("the classifier gave logits that are not finite; such a vote has no class")
    notes = [_judge(first, _logits(forward, tile), precision, _CALLS)]
    if len(tile) > 1:
        stay = torch.tensor([row.bit_count() % 2 == 0 for row in range(len(tile))])
        replaced = torch.where(stay.to(tile.device)[:, None, None, None], tile, 3 - 2 * tile)
        notes.append(_judge(first[stay], _logits(forward, replaced)[stay], precision, _NEIGHBOURS))
        notes.append(_judge(first, _logits(forward, tile.roll(1, 0)).roll(-1, 0), precision, _POSITION))
    if any(notes):
        warnings.warn(next(filter(None, notes)), NumericsWarning, stacklevel=2)


def _uses_batch_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is None and layer.running_var is None


@torch.no_grad()
def _logits(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits (T, K) in float64 on the CPU; the forward gets a copy, which it may overwrite."""
    logits = forward(x.clone())
    if logits.ndim != 2 or len(logits) != len(x):
        raise ModelError(
            f"the classifier gave logits of shape {tuple(logits.shape)} for {len(x)} images, "
            f"expected ({len(x)}, classes)"
        )
    return logits.cpu().double()


def _judge(expected: Tensor, found: Tensor, precision: Precision, question: _Question) -> str:
    """Compares logits (R, K) of the same images from two calls; returns what to warn of, empty when they are equal."""
    gaps = (found - expected).abs().amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not bool((gaps > 0).any()):
        return ""
    own = expected.std(1, correction=0)
    spreads = own.maximum(own.median())
    resolution = _resolution(expected)
    limits = RELATIVE * max(ARITHMETIC[precision], resolution) * spreads + ULPS * resolution * expected.abs().amax(1)
    worst = int((gaps / limits).nan_to_num(nan=0.0).argmax())  # 0 / 0: an image of equal logits that did not move
    finding = (
        f"the classifier's logits {question.finding}, by up to {gaps[worst]:.2g} where those of an image have a "
        f"standard deviation of {spreads[worst]:.2g}"
    )
    if gaps[worst] > limits[worst]:
        raise ModelError(f"{finding}, more than rounding explains: {question.remedy}")
    return f"{finding}, which may be rounding: {question.consequence}"


def _resolution(logits: Tensor) -> float:
    """Epsilon of the coarsest type that holds every one of these numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(dtype).double(), logits):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps
