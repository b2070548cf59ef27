"""Device, precision and form of a classifier's forward pass: decided once per run, recorded and enforced."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from rush.choices import CompileMode, Precision, PrecisionChoice, TileChoice, TrainingCompile
from rush.errors import ConfigError, ModelError, RushError
from rush.runtime.lines import one_line
from rush.runtime.memory import is_out_of_memory, keep_freed_memory

_SMALLEST_TILE, _LARGEST_TILE = 16, 256  # rows, where they depend on the size of the images
_TILE_PIXELS = 256 * 32 * 32  # positions of a tile, which determine the memory of activations


@dataclass(frozen=True)
class Execution:
    """The one forward pass of a run.

    Attributes:
        device: device that holds the tensors.
        precision: dtype that autocast computes in, where "float32" means no autocast. With "int8" the network itself
            computes in integers (``smoothing.quantized``), and what surrounds it in float32.
        channels_last: memory layout of 4-d tensors.
        tile: fixed number of rows of every judged batch, the last one padded. "auto" chooses it by the images' size
            (``rows``).
        threads: number of CPU threads when the execution was decided.
        folded: whether BatchNorm is folded into the convolutions for judged samples.
        compile_mode: mode of torch.compile for judged samples, or "none".
        deterministic: whether cuDNN must use algorithms that give the same bits every time. Otherwise it uses the
            fastest (see ``configure``).
    """

    device: str = "cpu"
    precision: Precision = "float32"
    channels_last: bool = False
    tile: TileChoice = "auto"
    threads: int = 0
    folded: bool = False
    compile_mode: CompileMode = "none"
    deterministic: bool = True

    def __repr__(self) -> str:
        """Return the fields in the form of older versions, so that their fingerprints stay valid.

        ``deterministic`` is omitted where it is True, and the tile "auto" is written as 256, the default of those
        versions.
        """
        values = asdict(self) | ({"tile": _LARGEST_TILE} if self.tile == "auto" else {})
        names = [name for name in values if name != "deterministic" or not self.deterministic]
        return f"Execution({', '.join(f'{name}={values[name]!r}' for name in names)})"

    def rows(self, shape: Sequence[int]) -> int:
        """Return the number of rows of a tile of images of ``shape`` (C, H, W).

        It is ``tile`` or, for "auto", the largest power of two in [16, 256] with at most 256 x 32 x 32 positions in
        the tile, so that memory does not grow with the images: 256 up to 32 x 32, 64 at 64 x 64, 16 from 91 x 91 on.
        """
        if self.tile != "auto":
            return self.tile
        fitting = _TILE_PIXELS // (shape[-2] * shape[-1])
        return min(max(1 << fitting.bit_length() >> 1, _SMALLEST_TILE), _LARGEST_TILE)

    def configure(self) -> "Execution":
        """Set how this process computes and allocates, and return this execution.

        On a CPU the memory of freed tensors is kept for the next ones (``memory.keep_freed_memory``). On CUDA, cuDNN
        uses deterministic algorithms or, with ``deterministic`` False, benchmarks all and uses the fastest; products
        of float32 matrices and float32 convolutions are computed in TF32 where the precision is bfloat16, and in
        float32 otherwise. The commands call it. A program that uses the library calls it once, before anything is
        computed.
        """
        device = torch.device(self.device).type
        if device == "cpu":
            keep_freed_memory()
        elif device == "cuda":
            torch.backends.cudnn.deterministic = self.deterministic
            torch.backends.cudnn.benchmark = not self.deterministic
            _allow_tf32(self.precision == "bfloat16", self.precision == "bfloat16")
        return self

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device and layout, and return it."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return module.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]

    def layout(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W) on the device in the run's layout, values unchanged."""
        x = x.to(self.device)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x.contiguous()

    def copied(self, x: Tensor) -> Tensor:
        """Return a copy of the images (B, C, H, W) on the device in the run's layout, for foreign code."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.device, copy=True, memory_format=layout)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context in which networks are evaluated or trained."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=enabled)

    def logits(self, classifier: nn.Module, x: Tensor) -> Tensor:
        """Return logits (B, K) in float32, differentiable in ``x`` (B, C, H, W) float32.

        The classifier gets a copy of ``x`` and its output is copied: it may overwrite its input and reuse its output.

        Raises:
            ModelError: The classifier raises, or returns something other than a real tensor.
        """
        with foreign_call(x):
            return self.unguarded_logits(classifier, x)

    def unguarded_logits(self, classifier: nn.Module, x: Tensor) -> Tensor:
        """Return ``logits`` without translating exceptions, in a form that torch.compile can trace."""
        with self.autocast():
            logits = classifier(self.copied(x))
        if not isinstance(logits, Tensor) or logits.is_complex():
            kind = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"the classifier returned {kind}, expected a real tensor of logits (B, K); wrap it in a "
                "module that returns the logits alone"
            )
        return logits.to(torch.float32, copy=True)

    def tiled_logits(self, classifier: nn.Module, x: Tensor) -> Tensor:
        """Return logits (B, K) without gradients, computed in tiles.

        The last tile is padded with copies of its first row, so that every call has the same shape.
        """
        rows, logits = self.rows(x.shape[1:]), []
        with torch.no_grad():
            for part in x.split(rows):
                padding = part[:1].expand(rows - len(part), *part.shape[1:])
                tile = torch.cat([part, padding]) if len(padding) else part
                logits.append(self.logits(classifier, tile)[: len(part)])
            return torch.cat(logits)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for ``provenance.json``, with torch's version: another version may compute other bits."""
        return {**asdict(self), "torch": torch.__version__}


def decide_execution(
    device: str = "auto", precision: PrecisionChoice = "auto", tile: TileChoice = "auto", deterministic: bool = True
) -> Execution:
    """Choose the execution for this machine, with BatchNorm folded.

    Whether compilation pays is measured later (``smoothing.forward.try_forwards``).

    Args:
        device: a device of torch, or "auto" for cuda, else mps, else cpu.
        precision: "auto" for bfloat16 where the processor computes in it natively, else float32. "int8" is for judged
            samples. It gives the same as "auto" for training, because a network has no integers before it is trained.
        tile: see ``Execution``.
        deterministic: see ``Execution``.

    Raises:
        ConfigError: The requested device is not available, or cannot compute in "int8".
    """
    chosen = _best_device() if device == "auto" else _checked_device(device)
    kind = torch.device(chosen).type
    resolved: Precision = "bfloat16" if _native_bfloat16(kind) else "float32"
    if precision == "int8":
        check_integers(chosen)
    elif precision != "auto":
        resolved = precision
    threads = torch.get_num_threads()
    return in_precision(
        Execution(chosen, tile=tile, threads=threads, folded=True, deterministic=deterministic), resolved
    )


def in_precision(execution: Execution, precision: Precision) -> Execution:
    """Return ``execution`` in another precision, with the layout in which CPUs and NVIDIA GPUs train fastest.

    A network in integers has no BatchNorm that could be folded, and contiguous tensors.
    """
    layout = precision != "int8" and torch.device(execution.device).type != "mps"
    folded = execution.folded and precision != "int8"
    return replace(execution, precision=precision, channels_last=layout, folded=folded)


def check_integers(device: str) -> None:
    """Raise ConfigError unless networks in 8-bit integers can be computed on ``device``, without saturated sums."""
    if torch.device(device).type != "cpu":
        raise ConfigError(
            f'precision "int8" is for the CPU, and the device is {device}; choose the device "cpu" or another precision'
        )
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        raise ConfigError(
            'precision "int8" needs a processor with integer dot products (VNNI), which this one lacks; choose another '
            'precision, e.g. "auto"'
        )


@contextmanager
def foreign_call(x: Tensor) -> Iterator[None]:
    """Turn exceptions of a classifier that runs on images like ``x`` within the context into a ModelError.

    Errors of this library and out-of-memory errors pass unchanged.
    """
    try:
        yield
    except RushError:
        raise
    except Exception as error:  # foreign code may raise anything
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise
        images = f"{str(x.dtype).removeprefix('torch.')} images of shape {tuple(x.shape)} on {x.device}"
        raise ModelError(
            f"the classifier was given {images} and raised {one_line(error)}; it must accept such images"
        ) from error


@contextmanager
def without_tf32(device: str) -> Iterator[None]:
    """Compute float32 in float32 within the context, also on a CUDA device where TF32 is allowed."""
    if torch.device(device).type != "cuda":
        yield
        return
    before = _tf32_is_allowed()
    _allow_tf32(False, False)
    try:
        yield
    finally:
        _allow_tf32(*before)


def device_of(module: nn.Module) -> str:
    """Return the device of the first parameter of ``module``, or the CPU without parameters."""
    parameter = next(module.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)


@contextmanager
def compiled(module: nn.Module, mode: TrainingCompile) -> Iterator[None]:
    """Compile the forward of ``module`` within the context, with its hooks outside the compiled part.

    The modes "none" and "graph" (which captures the whole step) change nothing.
    """
    if mode in ("none", "graph"):
        yield
        return
    module.forward = torch.compile(module.forward, mode=mode)
    try:
        yield
    finally:
        del module.forward


def check_eval_mode(module: nn.Module) -> None:
    """Raise ModelError if a layer of ``module`` is in training mode.

    In training mode its outputs may be stochastic or depend on the rest of the batch.
    """
    training = [name or "(the module itself)" for name, layer in module.named_modules() if layer.training]
    if training:
        raise ModelError(
            f"the classifier is in training mode (first such layer: {training[0]}, {len(training)} in all); "
            "batch statistics and dropout make its logits stochastic or dependent on the rest of the batch: call "
            "classifier.eval() first"
        )


def _allow_tf32(products: bool, convolutions: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions deprecate this interface, older ones lack its successor
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


def _tf32_is_allowed() -> tuple[bool, bool]:
    """Return whether products and convolutions may use TF32."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and later: the older interface cannot be read once the newer one is set
        return products.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    return products.allow_tf32, cudnn.allow_tf32


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _checked_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}; use auto, cpu, cuda or mps") from error
    return device


def _native_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
