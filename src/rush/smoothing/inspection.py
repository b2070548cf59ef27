"""Is a classifier one fixed function of one image? Checked before any sampling, at random tiles and at the end.

Every guarantee is about votes of one function f under noise. A classifier that is stochastic, that changes in the
course of its calls, or whose logits for an image depend on the other images or on its row in the tile, is no such
function. ``check_structure`` reads what the layers declare. ``check_forward`` measures what only a call can show.
``Watch`` keeps some of the first images with their logits and asks for them again later, in other company.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rush.choices import Precision
from rush.errors import ModelError, NumericsWarning
from rush.runtime.execution import check_eval_mode
from rush.runtime.randomness import stream

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
_LATER = _Question(
    "of one image are no longer those that it gave before, or depend on the other images or on its row in the tile",
    "the classifier must be one fixed function of one image from the first call to the last: remove counters, caches, "
    "updated averages and whatever depends on the rest of the batch; nothing that was computed with it is kept",
    "",
)
SENTINEL_MOVED = (
    "the classifier's logits of an image that is in every tile depend on the other images, or changed from one tile to "
    f"another, by more than rounding explains: {_LATER.remedy}"
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
    notes = list(filter(None, compare_calls(forward, tile, precision)))
    if notes:
        warnings.warn(notes[0], NumericsWarning, stacklevel=2)


def compare_calls(
    forward: Callable[[Tensor], Tensor], tile: Tensor, precision: Precision = "float32", movable: bool = True
) -> Iterator[str]:
    """Make the calls of ``check_forward`` one by one; yield for each what to warn of, empty where nothing differs.

    Args:
        forward, tile, precision: as in ``check_forward``.
        movable: whether an image's logits may be compared at another row; not where each row has its own seeded draw.

    Raises:
        ModelError: at the first difference that is no rounding.
    """
    first = _logits(forward, tile)
    if not bool(first.isfinite().all()):
        raise ModelError("the classifier gave logits that are not finite; such a vote has no class")
    yield _judge(first, _logits(forward, tile), precision, _CALLS)
    if len(tile) > 1:
        stay, replaced = with_others_replaced(tile)
        yield _judge(first[stay], _logits(forward, replaced)[stay], precision, _NEIGHBOURS)
        if movable:
            yield _judge(first, _logits(forward, tile.roll(1, 0)).roll(-1, 0), precision, _POSITION)


class Sentinel:
    """One image in every tile whose logits must stay what they are, whatever the other rows hold.

    Args:
        logits: what the forward gave for a whole tile (T, K); the sentinel's row is the last.
        precision: what the forward computes in.
    """

    def __init__(self, logits: Tensor, precision: Precision) -> None:
        _, limits = _rounding(_compared(logits), precision)
        self._expected, self._limit = logits[-1].clone(), float(limits[-1])

    def unmoved(self, logits: Tensor) -> Tensor:
        """Return whether the last row of ``logits`` (T, K) is as it was, up to rounding: a bool () on its device."""
        return (logits[-1] - self._expected).abs().amax() <= self._limit


class Watch:
    """A few images with the logits that a forward gave for them, to be asked for again.

    The forward is asked again after a random number of observed tiles, ``spacing`` on average, and by ``conclude``.
    It then gets kept images and new ones mixed, at other rows than before, so that one call shows a function that has
    changed, a dependence on neighbours and one on the row. What counts as rounding is said in ``check_forward``; a
    difference of that size passes without a warning, which the first inspection gives.

    Args:
        forward: maps images (T, C, H, W) to logits (T, K).
        tile, logits: images (T, C, H, W) to keep, with what the forward gave for them, (T, K).
        precision: what the forward computes in.
        movable: whether an image may be asked for at another row; not where a row has its own seeded draw.
        spacing: mean number of observed tiles between two calls; the sequence is the same in every process.

    Cost: one call per ``spacing`` tiles on average, and one per ``conclude``; the memory of one tile.

    Raises:
        ModelError: if logits differ by more than rounding explains.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        tile: Tensor,
        logits: Tensor,
        precision: Precision = "float32",
        movable: bool = True,
        spacing: int = 64,
    ) -> None:
        self._forward, self._precision, self._movable, self._spacing = forward, precision, movable, spacing
        self._tile, self._logits = tile.clone(), _compared(logits)
        self._generator = stream(0, "inspection")
        self._remaining = self._draw(2 * spacing - 1) + 1

    @property
    def shape(self) -> torch.Size:
        """Shape (T, C, H, W) of the tiles that are observed."""
        return self._tile.shape

    def observe(self, tile: Tensor, logits: Tensor | None = None) -> None:
        """Check now and then that the logits (T, K) of ``tile``, shaped like the kept one, depend on nothing else.

        The forward is asked for them where they are not given. Raises: ModelError, see the class.
        """
        self._remaining -= 1
        if self._remaining == 0:
            self._remaining = self._draw(2 * self._spacing - 1) + 1
            self._ask(tile, _compared(self._forward(tile) if logits is None else logits))

    @torch.no_grad()
    def conclude(self) -> None:
        """Ask for half of the kept images again, the others replaced. Raises: ModelError, see the class."""
        self._ask(_replaced(self._tile), None)

    def _ask(self, tile: Tensor, logits: Tensor | None) -> None:
        """Compare in one call the images that stay of the kept tile with its logits, and the others with theirs."""
        stay = _staying(len(tile))
        shift = self._draw(len(tile)) if self._movable else 0
        mixed = torch.where(_column(stay, tile), self._tile, tile)
        now = _logits(self._forward, mixed.roll(shift, 0)).roll(-shift, 0)
        _judge(self._logits[stay], now[stay], self._precision, _LATER)
        if logits is not None and len(tile) > 1:
            _judge(logits[~stay], now[~stay], self._precision, _LATER)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))


def check_logits(logits: Tensor, rows: int, num_classes: int | None = None) -> Tensor:
    """Return ``logits`` if they are finite and (rows, num_classes), any number >= 2 of classes where that is None.

    Raises: ModelError.
    """
    if logits.shape in ((rows,), (rows, 1)):
        raise ModelError(
            f"the classifier gave one logit per image (shape {tuple(logits.shape)}), expected one per class; a binary "
            "classifier with a single logit z becomes one with two by returning torch.cat([-z, z], 1)"
        )
    allowed = f"({rows}, {num_classes or 'classes'})"
    if logits.ndim != 2 or len(logits) != rows or (num_classes is not None and logits.shape[1] != num_classes):
        raise ModelError(
            f"the classifier gave logits of shape {tuple(logits.shape)} for {rows} images, expected {allowed}; it must "
            "return one row of logits per image, one per class"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError("the classifier gave logits that are not finite; such a vote has no class")
    return logits


def with_others_replaced(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return which images of ``tile`` (T, C, H, W) stay, bool (T,), and the tile with the others replaced.

    Those stay whose row has an even number of ones in binary, row 0 among them; see ``check_forward``.
    """
    stay = _staying(len(tile))
    return stay, torch.where(_column(stay, tile), tile, _replaced(tile))


def _staying(rows: int) -> Tensor:
    return torch.tensor([row.bit_count() % 2 == 0 for row in range(rows)])


def _column(mask: Tensor, tile: Tensor) -> Tensor:
    return mask.to(tile.device)[:, None, None, None]


def _replaced(tile: Tensor) -> Tensor:
    """Images of another brightness and contrast: within [0, 1] where ``tile`` is, else brighter than white."""
    inside = bool((tile >= 0).all()) and bool((tile <= 1).all())
    return (1 - tile) / 2 if inside else 3 - 2 * tile


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
    return _compared(logits)


def _compared(logits: Tensor) -> Tensor:
    return logits.detach().cpu().double()


def is_rounding(expected: Tensor, found: Tensor, precision: Precision) -> bool:
    """Return whether logits (R, K) of the same images differ by no more than rounding; see ``check_forward``."""
    expected, found = _compared(expected), _compared(found)
    gaps = (found - expected).abs().amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return bool((gaps <= _rounding(expected, precision)[1]).all())


def _judge(expected: Tensor, found: Tensor, precision: Precision, question: _Question) -> str:
    """Compares logits (R, K) of the same images from two calls; returns what to warn of, empty when they are equal."""
    gaps = (found - expected).abs().amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not bool((gaps > 0).any()):
        return ""
    spreads, limits = _rounding(expected, precision)
    worst = int((gaps / limits).nan_to_num(nan=0.0).argmax())  # 0 / 0: an image of equal logits that did not move
    finding = (
        f"the classifier's logits {question.finding}, by up to {gaps[worst]:.2g} where those of an image have a "
        f"standard deviation of {spreads[worst]:.2g}"
    )
    if gaps[worst] > limits[worst]:
        raise ModelError(f"{finding}, more than rounding explains: {question.remedy}")
    return f"{finding}, which may be rounding: {question.consequence}"


def _rounding(logits: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Spreads (R,) of logits (R, K) and how far rounding may move them, (R,); see ``check_forward``."""
    deviations = logits.std(1, correction=0)
    spreads = deviations.maximum(deviations.median())
    resolution = _resolution(logits)
    inside = RELATIVE * max(ARITHMETIC[precision], resolution) * spreads
    return spreads, inside + ULPS * resolution * logits.abs().amax(1)


def _resolution(logits: Tensor) -> float:
    """Epsilon of the coarsest type that holds every one of these numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(dtype).double(), logits):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps
