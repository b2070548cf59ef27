"""Random augmentations (views) of a whole batch at once, on its device, with separate parameters for every image.

There are two layers. ``apply_view`` is a pure function of images and explicit parameters (``ViewParameters``).
``random_view`` draws the parameters from the *distribution* ``rush.recipe.schema.Views`` and applies the operations in
one fixed order: crop and flip, brightness, contrast, saturation, hue, greyscale, blur, noise. Nothing loops over
images, nothing waits for the device, no gradients flow, and the view of an image depends on its own parameters only.
Every view is clipped to [0, 1], except for the noise.

Semantics are those of torchvision (``RandomResizedCrop``, ``RandomHorizontalFlip``, ``ColorJitter``,
``RandomGrayscale``, ``GaussianBlur``) and of the operations of the same meaning in kornia, except for:

- The order of the four colour changes is fixed. torchvision and SimCLR shuffle it for each image, kornia for each
  batch.
- Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, as in kornia), so that grey stays grey. torchvision rounds 0.2989.
- Pixels are float32 throughout, as in kornia. Pillow and torchvision on uint8 round after every operation.
- Resizing is bilinear at half-pixel centres (align_corners=False), where kornia's RandomResizedCrop aligns corners by
  default. The output has the size of the input, so that a crop is only ever enlarged and antialiasing never applies.
- Crop boxes are drawn by ten simultaneous attempts, of which the first that fits is used. The distribution is the same,
  the draws differ.
- An image that is not jittered still passes through HSV if ``Views`` jitters at all, which changes its pixels by less
  than 2e-6.

Sources: the operations are those of Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", appendix A, with the values of B.9 for CIFAR-10 (colour strength 0.5, no blur). The crops are those of
Szegedy et al. 2015, "Going Deeper with Convolutions", section 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from rush.errors import InputError
from rush.recipe.schema import Views, WeakViews
from rush.runtime.numbers import as_real

_LUMA = (0.299, 0.587, 0.114)
_CROP_ATTEMPTS = 10
_CHUNK_VALUES = 128 * 3 * 32 * 32  # values per thread at a time on a CPU: they and their temporaries stay cached
_TINY_CHROMA = 1e-12  # below it a pixel is grey and its hue has no effect

# Columns of the uniform matrix of draw_parameters.
_AREA = slice(0, _CROP_ATTEMPTS)
_RATIO = slice(_CROP_ATTEMPTS, 2 * _CROP_ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _BLUR_SIGMA = range(20, 31)
_SHIFT = slice(31, 33)
_DRAWS = 33


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """Parameters of the operations for each image of a batch. None omits an operation for all of them.

    Attributes:
        boxes: (B, 4) float32, top, left, height and width in pixels (see ``crop_resize``).
        flip: (B,) bool.
        brightness, contrast, saturation: (B,) factors >= 0, where 1 changes nothing.
        hue: (B,) turns in [-0.5, 0.5], where 0 changes nothing.
        greyscale: (B,) bool.
        blur_sigma: (B,) in pixels, where 0 changes nothing.
    """

    boxes: Tensor | None = None
    flip: Tensor | None = None
    brightness: Tensor | None = None
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    greyscale: Tensor | None = None
    blur_sigma: Tensor | None = None

    def __getitem__(self, samples: slice) -> "ViewParameters":
        """Return the parameters of some of the images."""
        values = [getattr(self, field.name) for field in fields(self)]
        return ViewParameters(*(None if value is None else value[samples] for value in values))


@torch.no_grad()
def random_view(x: Tensor, views: Views, generator: torch.Generator) -> Tensor:
    """Return one random view of every image.

    Args:
        x: (B, C, H, W) with C 1 or 3; float32 in [0, 1] (not checked, which would wait for the device) or uint8, which
            is divided by 255.
        views: the distribution.
        generator: on the device of ``x``.

    Returns:
        float32 of the shape of ``x``, in [0, 1] except for the noise.

    Raises:
        InputError: ``x`` has another shape or type, or ``generator`` is missing or on another type of device.

    Random:
        One uniform matrix with a row per image (``draw_parameters``), then, where noise_sigma > 0, one standard normal
        value per pixel. The same generator state gives the same bits.
    """
    _check_images(x)
    _check_generator(generator, x.device)
    batch, _, height, width = x.shape
    view = apply_view(x, draw_parameters(views, batch, (height, width), generator))
    return gaussian_noise(view, views.noise_sigma, generator) if views.noise_sigma > 0 else view


def draw_parameters(views: Views, batch: int, size: tuple[int, int], generator: torch.Generator) -> ViewParameters:
    """Draw the parameters of one view of each of ``batch`` images of ``size`` (height, width).

    Random:
        ``torch.rand(batch, 33)`` for all options, so that no option changes the draws of another. There is a row per
        image. Its columns are the areas of ten crop attempts (0-9) and their ratios (10-19), the crop's top and left,
        flip, whether jittered, brightness, contrast, saturation, hue, greyscale, whether blurred, blur sigma (20-30),
        shift down and right (31-32).
    """
    _check_generator(generator)
    uniform = torch.rand(batch, _DRAWS, generator=generator, device=generator.device)
    shift = views.shift_pad if isinstance(views, WeakViews) else 0
    boxes = _shift_boxes(uniform, size, shift) if shift else None
    return ViewParameters(
        boxes=_crop_boxes(uniform, size, views.crop_scale, views.crop_ratio) if views.crops else boxes,
        flip=uniform[:, _FLIP] < views.flip if views.flip > 0 else None,
        **_colour_changes(views, uniform),
        greyscale=uniform[:, _GREY] < views.greyscale if views.greyscale > 0 else None,
        blur_sigma=_blur_sigmas(views, uniform) if views.blur > 0 else None,
    )


def apply_view(x: Tensor, parameters: ViewParameters) -> Tensor:
    """Apply the operations that ``parameters`` name, in the fixed order of this module.

    Nothing is random and ``x`` is not modified. On a CPU the batch is processed in pieces that fit the cache.

    Args:
        x: (B, C, H, W) float32 in [0, 1] or uint8.

    Returns:
        float32 in [0, 1].

    Raises:
        InputError: parameters do not match the images.
    """
    most = _CHUNK_VALUES * torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() <= most:
        return _apply_to_chunk(x, parameters)
    step = max(1, most // x[0].numel())
    view = torch.empty(x.shape, device=x.device)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        view[rows] = _apply_to_chunk(x[rows], parameters[rows])
    return view


def crop_resize(x: Tensor, boxes: Tensor, flip: Tensor | None = None) -> Tensor:
    """Enlarge each image's box to the whole image, then mirror it left to right where ``flip`` is true.

    Interpolation is bilinear with pixel centres at half-integers (align_corners=False). Pixels inside the image but
    outside the box have no influence. The outside of the image is black. A box of the image's own size at an integer
    offset is a shift.

    Args:
        x: (B, C, H, W) float32.
        boxes: (B, 4) float32, top, left, height, width in pixels.
        flip: (B,) bool or None.

    Raises:
        InputError: shapes do not match.
    """
    batch, _, height, width = x.shape
    _check_shape("boxes", boxes, (batch, 4))
    top, left, box_height, box_width = boxes.to(x.dtype).split(1, dim=1)
    rows = _sampling(top, box_height, height)
    columns = _sampling(left, box_width, width)
    if flip is not None:
        columns = torch.where(_per_sample("flip", flip, batch).view(batch, 1), columns.flip(1), columns)
    zero = columns.new_zeros(())  # the sum interleaves both without a copy of either
    grid = torch.view_as_real(torch.complex(columns, zero)[:, None, :] + torch.complex(zero, rows)[:, :, None])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def flip_horizontal(x: Tensor, flip: Tensor) -> Tensor:
    """Mirror images left to right where ``flip`` (B,) is true."""
    return torch.where(_per_sample("flip", flip, len(x)), x.flip(3), x)


# The colour changes in their order. ``x`` is float32 and may be overwritten; parameters are (B, 1, 1, 1). Writing in
# place saves a fifth of the time of a view on a CPU.


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor`` and clip to [0, 1]."""
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Return factor x + (1 - factor) m, clipped to [0, 1], with m the mean luma of the image."""
    mean = _luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Return factor x + (1 - factor) luma, clipped to [0, 1]. Unchanged if C = 1."""
    return x if x.shape[1] == 1 else torch.lerp(_luma(x), x, factor, out=x).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of every pixel in HSV, to 2e-6 (0 turns included). Unchanged if C = 1.

    HSV is the hexcone model (Smith 1978, "Color Gamut Transform Pairs"), computed without branches. With v the greatest
    and w the least channel of a pixel and c = v - w, its hue in sextants is sign(G - B) (1 + (G + B - R - w) / c)
    modulo 6. Conversely R, G, B are v - c clip(2 - |k - 2|, 0, 1) with k = (n + hue) mod 6 and n = 5, 3, 1.

    Args:
        turns: (B, 1, 1, 1) in [-0.5, 0.5], where 1 is the full circle (kornia's factor / 2 pi, torchvision's factor).
    """
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    six_chroma = chroma * 6
    hue = (chroma - least).add_(green).add_(blue).sub_(red)
    hue.div_(six_chroma.clamp(min=_TINY_CHROMA)).copysign_(green - blue)  # in turns, from -1/2 to 1/2
    # phase is k / 6: six sixths (a whole turn) are added to n because frac needs a positive argument
    offset = torch.arange(11, 6, -2, device=x.device).view(1, 3, 1, 1) / 6
    phase = (hue + (turns + offset)).frac_()
    # clip(2 - |k - 2|, 0, 1) = 2 - 6 clip(|k/6 - 1/3|, 1/6, 1/3)
    away = phase.sub_(1 / 3).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul(value.sub_(chroma, alpha=2), away, six_chroma, out=away).clamp_(0, 1)


def _greyscale(x: Tensor, selected: Tensor) -> Tensor:
    """Set all channels of the ``selected`` images to their luma. Unchanged if C = 1."""
    if x.shape[1] == 1:
        return x
    if not _on_cpu(x):  # weights of exactly 0 and 1 select, and nothing waits for the device
        return torch.lerp(_luma(x), x, 1 - selected.to(x.dtype)).clamp_(0, 1)
    rows = selected.flatten().nonzero().flatten()
    x[rows] = _luma(x[rows]).clamp_(0, 1).expand(-1, x.shape[1], -1, -1)
    return x


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Convolve each image with a normalised Gaussian of its own sigma, with reflected borders.

    Args:
        x: (B, C, H, W) float32.
        sigma: (B,) >= 0 in pixels, where 0 does not change the image.
        kernel_size: width of the Gaussian, odd, at most 2 min(H, W) - 1.

    Raises:
        InputError: ``kernel_size`` is not allowed.

    Cost:
        2 kernel_size passes over the images.
    """
    most = 2 * min(x.shape[2:]) - 1
    if kernel_size % 2 == 0 or not 1 <= kernel_size <= most:
        raise InputError(
            f"kernel_size must be odd and in [1, {most}] for images of shape {tuple(x.shape)}, got {kernel_size}"
        )
    radius = kernel_size // 2
    sigma = _per_sample("sigma", sigma, len(x)).view(-1, 1)
    distance = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    bell = torch.where(sigma > 0, torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2), (distance == 0).float())
    weights = (bell / bell.sum(1, keepdim=True)).view(len(x), kernel_size, 1, 1, 1).unbind(1)
    x = _weighted_shifts(F.pad(x, (0, 0, radius, radius), mode="reflect"), weights, dim=2)
    return _weighted_shifts(F.pad(x, (radius, radius, 0, 0), mode="reflect"), weights, dim=3).clamp_(0, 1)


def blur_kernel_size(side: int) -> int:
    """Return the greatest odd number up to a tenth of the side, at least 3 (SimCLR: a tenth of the side)."""
    return max(3, (side // 10 - 1) // 2 * 2 + 1)


def gaussian_noise(x: Tensor, sigma: float | Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise, which is *not* clipped.

    Args:
        sigma: standard deviation in [0, 1] pixel units, one number or (B,).
    """
    _check_images(x)
    _check_generator(generator, x.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    number = as_real(sigma)
    scale = _per_sample("sigma", sigma, len(x)) if number is None else number  # type: ignore[arg-type]
    return noise.mul_(scale).add_(unit_float(x))


def unit_float(x: Tensor) -> Tensor:
    """Return uint8 images as float32 x / 255, and float32 images unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _apply_to_chunk(x: Tensor, parameters: ViewParameters) -> Tensor:
    """Apply the operations in their order. The result never shares memory with ``x``."""
    view = unit_float(x)
    if parameters.boxes is not None:
        view = crop_resize(view, parameters.boxes, parameters.flip).clamp_(0, 1)
    elif parameters.flip is not None:
        view = flip_horizontal(view, parameters.flip)
    if view is x:
        view = x.clone()
    steps: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
        (_brightness, "brightness"),
        (_contrast, "contrast"),
        (_saturation, "saturation"),
        (_hue, "hue"),
        (_greyscale, "greyscale"),
    ]
    for step, name in steps:
        parameter = getattr(parameters, name)
        if parameter is not None:
            view = step(view, _per_sample(name, parameter, len(x)))
    if parameters.blur_sigma is not None:
        view = gaussian_blur(view, parameters.blur_sigma, blur_kernel_size(min(view.shape[2:])))
    return view


def _colour_changes(views: Views, uniform: Tensor) -> dict[str, Tensor | None]:
    """Return the factors of the four colour changes. Those of an image that is not jittered change nothing."""
    jittered = uniform[:, _JITTER] < views.jitter

    def drawn(strength: float, column: int, low: float, high: float, neutral: float) -> Tensor | None:
        if strength == 0 or views.jitter == 0:
            return None
        return torch.where(jittered, low + (high - low) * uniform[:, column], neutral)

    def factor(strength: float, column: int) -> Tensor | None:
        return drawn(strength, column, max(0.0, 1 - strength), 1 + strength, 1.0)

    return {
        "brightness": factor(views.brightness, _BRIGHTNESS),
        "contrast": factor(views.contrast, _CONTRAST),
        "saturation": factor(views.saturation, _SATURATION),
        "hue": drawn(views.hue, _HUE, -views.hue, views.hue, 0.0),
    }


def _blur_sigmas(views: Views, uniform: Tensor) -> Tensor:
    low, high = views.blur_sigma
    return torch.where(uniform[:, _BLUR] < views.blur, low + (high - low) * uniform[:, _BLUR_SIGMA], 0.0)


def _crop_boxes(
    uniform: Tensor, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Return boxes (B, 4), each the first of ten attempts that fits, at a uniform offset, or the central fallback."""
    height, width = size
    area = (scale[0] + (scale[1] - scale[0]) * uniform[:, _AREA]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniform[:, _RATIO])
    widths, heights = torch.sqrt(area * aspect).round_(), torch.sqrt(area / aspect).round_()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    fitting, first = fits.any(1), fits.int().argmax(1, keepdim=True)
    last_height, last_width = _fallback_crop(size, ratio)
    box_height = torch.where(fitting, heights.gather(1, first).squeeze(1), last_height)
    box_width = torch.where(fitting, widths.gather(1, first).squeeze(1), last_width)
    top = torch.where(fitting, _integer_offset(uniform[:, _TOP], height - box_height), (height - last_height) // 2)
    left = torch.where(fitting, _integer_offset(uniform[:, _LEFT], width - box_width), (width - last_width) // 2)
    return torch.stack([top, left, box_height, box_width], dim=1)


def _fallback_crop(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Return height and width of the greatest central crop whose ratio is allowed."""
    height, width = size
    if width < ratio[0] * height:
        return max(1, round(width / ratio[0])), width
    if width > ratio[1] * height:
        return height, max(1, round(height * ratio[1]))
    return height, width


def _integer_offset(uniform: Tensor, most: Tensor) -> Tensor:
    """Return integers uniform in 0..most. The minimum guards the rounding of uniform * (most + 1)."""
    return torch.minimum((uniform * (most + 1)).floor_(), most)


def _shift_boxes(uniform: Tensor, size: tuple[int, int], pad: int) -> Tensor:
    """Return boxes (B, 4) of the image's size, moved by whole pixels uniform in -pad..pad along each axis."""
    moves = (uniform[:, _SHIFT] * (2 * pad + 1)).floor_().clamp_(max=2 * pad) - pad
    top, left = moves.unbind(1)
    return torch.stack([top, left, torch.full_like(top, size[0]), torch.full_like(left, size[1])], dim=1)


def _sampling(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Return the positions (B, side) at which output pixels read, in grid_sample's units (-1 and 1 are the edges)."""
    share = torch.arange(0.5, side, device=start.device) / side
    place = torch.clamp(start + length * share - 0.5, min=start, max=start + length - 1)
    return (2 * place + 1) / side - 1


def _luma(x: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W). An image of one channel is its own luma."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _weighted_shifts(padded: Tensor, weights: tuple[Tensor, ...], dim: int) -> Tensor:
    """Return the sum over k of weights[k] (B, 1, 1, 1) times ``padded`` moved by k along ``dim``."""
    side = padded.shape[dim] - len(weights) + 1
    total = padded.narrow(dim, 0, side) * weights[0]
    for k, weight in enumerate(weights[1:], start=1):
        total.add_(padded.narrow(dim, k, side) * weight)
    return total


def _per_sample(name: str, value: Tensor, batch: int) -> Tensor:
    """Return ``value`` (B,) as (B, 1, 1, 1)."""
    _check_shape(name, value, (batch,))
    return value.view(batch, 1, 1, 1)


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name} must hold one row per image, shape {shape}, got {tuple(value.shape)}")


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"images must have shape (B, C, H, W) with C 1 or 3, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.uint8):
        raise InputError(f"images must be float32 in [0, 1] or uint8, got {x.dtype}; convert them with .float() first")


def _check_generator(generator: torch.Generator, device: torch.device | None = None) -> None:
    if not isinstance(generator, torch.Generator):
        raise InputError(f"views need an explicit torch.Generator, got {generator!r}; make one with rush.stream")
    if device is not None and generator.device.type != device.type:
        raise InputError(f"the generator is on {generator.device}, the images on {device}; both must be on one device")
