"""Time of one SimCLR view (crop, flip, four colour changes, greyscale) on the CPU: rush, kornia, a Pillow loop.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py --batch 512 --repeats 9

Prints one line per pipeline: median time per image with the least and the greatest of all repeats, images per second,
and how many times longer it takes than rush. The pipelines take turns, so that a disturbance of the machine meets all
of them. Input is random uint8 (B, 3, side, side); every pipeline ends with float32 in [0, 1]. kornia is left out when
it is not installed.

Before the clock starts, the pipelines are shown to draw from one distribution (``check_same_views``): crops of 0.2 to 1
of the area with ratios from 3/4 to 4/3, half of them mirrored, 0.8 of them with brightness, contrast and saturation
changed by up to 0.4 and hue by up to 0.1, 0.2 of them grey, no blur. What differs is small: the order of the colour
changes (kornia draws one for each batch), kornia's aligned corners, and Pillow's 8 bits after every operation.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance

from rush.data.views import Views
from rush.randomness import stream

CROP_SCALE, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
LOG_RATIO = (math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
Pipeline = Callable[[torch.Tensor], torch.Tensor]


def rush_pipeline(blur: float, device: str = "cpu") -> Pipeline:
    views = Views(crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO, blur=blur)
    generator = stream(0, "benchmark", device=device)
    return lambda x: views(x, generator)


def one_by_one(pipeline: Pipeline) -> Pipeline:
    return lambda x: torch.cat([pipeline(image) for image in x.split(1)])


def kornia_pipeline(side: int, cropping_mode: str) -> Pipeline | None:
    try:
        import kornia.augmentation as K
    except (ImportError, OSError, RuntimeError):
        return None
    # Plain Sequential, because kornia's own container costs up to a tenth more.
    steps = torch.nn.Sequential(
        K.RandomResizedCrop((side, side), scale=CROP_SCALE, ratio=CROP_RATIO, cropping_mode=cropping_mode),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    )
    return lambda x: steps(x.float() / 255)


def pillow_pipeline(x: torch.Tensor) -> torch.Tensor:
    """One image after the other, as a data loader's worker does it."""
    rng = random.Random(0)
    images = x.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.stack([to_tensor(pillow_view(Image.fromarray(image), rng)) for image in images])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def pillow_view(image: Image.Image, rng: random.Random) -> Image.Image:
    image = pillow_crop(image, rng)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.8:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(0.6, 1.4))
        image = pillow_hue(image, rng.uniform(-0.1, 0.1))
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def pillow_crop(image: Image.Image, rng: random.Random) -> Image.Image:
    side = image.width
    for _ in range(10):
        area, ratio = side * side * rng.uniform(*CROP_SCALE), math.exp(rng.uniform(*LOG_RATIO))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if width <= side and height <= side:
            left, top = rng.randint(0, side - width), rng.randint(0, side - height)
            return image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return image


def pillow_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(round(turns * 255) % 256))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def check_same_views(pipelines: dict[str, Pipeline | None], side: int, count: int = 4096) -> None:
    """Prints ``view_statistics`` of ``count`` views by every pipeline; each is compared with the first one's.

    Raises: RuntimeError when one differs by more than 4 % of the first one's and five standard errors (by chance, in
    fewer than one run in ten thousand).
    """
    expected: dict[str, tuple[float, float]] = {}
    for name, run in pipelines.items():
        if run is None:
            continue
        found = view_statistics(run(ramps(count, side)))
        told = ", ".join(f"{statistic} {mean:.3g}" for statistic, (mean, _) in found.items())
        print(f"views by {name}: {told}")
        expected = expected or found
        for statistic, (mean, error) in found.items():
            first, first_error = expected[statistic]
            if abs(mean - first) > 0.04 * abs(first) + 5 * math.hypot(error, first_error):
                raise RuntimeError(f"{name}: {statistic} is {mean:.4f}, expected about {first:.4f}")


def ramps(count: int, side: int) -> torch.Tensor:
    """Equal images, uint8: red rises from left to right, green from top to bottom, blue is constant.

    A crop shows in how steep they are, a flip in the sign.
    """
    rise = torch.linspace(64, 192, side)
    image = torch.stack([rise.expand(side, side), rise[:, None].expand(side, side), torch.full((side, side), 100.0)])
    return image.to(torch.uint8).expand(count, 3, side, side).contiguous()


def view_statistics(views: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Mean over views of ``ramps``, and its standard error, of what every single operation moves."""
    place = torch.linspace(-1, 1, views.shape[-1]) / views[0, 0].numel()
    across, down = (views * place).sum((2, 3)), (views * place[:, None]).sum((2, 3))
    colours, luma = views.mean((2, 3)), views.mean((1, 2, 3))
    each = {
        "mirrored": (across.sum(1) < 0).float(),
        "grey": ((views.amax(1) - views.amin(1)).amax((1, 2)) < 0.004).float(),
        "steepness across": across.abs().amax(1),
        "its square": across.abs().amax(1) ** 2,
        "steepness down": down.amax(1),
        "its square down": down.amax(1) ** 2,
        "brightness": luma,
        "its square about the mean": (luma - luma.mean()) ** 2,
        "red": colours[:, 0],
        "blue": colours[:, 2],
        "spread of colours": colours.std(1),
    }
    return {name: (float(value.mean()), float(value.std()) / len(value) ** 0.5) for name, value in each.items()}


def measure(pipelines: dict[str, Pipeline], x: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Microseconds per image of every repeat, by pipeline, after one run each to warm up."""
    for run in pipelines.values():
        run(x)
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, run in pipelines.items():
            start = time.perf_counter()
            run(x)
            times[name].append((time.perf_counter() - start) / len(x) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # kornia draws from torch's global generator
    x = torch.randint(0, 256, (arguments.batch, 3, arguments.side, arguments.side), dtype=torch.uint8)
    candidates = {
        "rush": rush_pipeline(0.0),
        "rush, one image at a time": one_by_one(rush_pipeline(0.0)),
        "kornia, crop by slicing": kornia_pipeline(arguments.side, "slice"),
        "kornia, crop by resampling": kornia_pipeline(arguments.side, "resample"),
        "Pillow, one image at a time": pillow_pipeline,
        "rush, half of the images blurred": rush_pipeline(0.5),
    }
    check_same_views({name: run for name, run in candidates.items() if "blurred" not in name}, arguments.side)
    times = measure({name: run for name, run in candidates.items() if run is not None}, x, arguments.repeats)
    print(f"SimCLR view of {tuple(x.shape)} uint8, {arguments.threads} thread(s), {arguments.repeats} repeats")
    print(f"{'pipeline':34s}{'us/image':>10s}{'least':>10s}{'greatest':>10s}{'images/s':>12s}{'x rush':>9s}")
    rush = statistics.median(times["rush"])
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):10.1f}{max(values):10.1f}"
        print(f"{name:34s}{median:10.1f}{spread}{1e6 / median:12,.0f}{median / rush:9.1f}")


if __name__ == "__main__":
    main()
