"""Time of one SimCLR view (crop, flip, four colour changes, greyscale) on the CPU: rush, kornia, a Pillow loop.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py --batch 512 --repeats 9

The benchmark prints one line per pipeline: median time per image with the least and the greatest of all repeats, images
per second, and how many times longer it takes than rush. The pipelines take turns, so that a disturbance of the machine
affects all of them. Input is random uint8 (B, 3, side, side), and every pipeline ends with float32 in [0, 1]. kornia is
omitted if it is not installed.

Before the clock starts, the pipelines are shown to draw from one distribution (``check_same_views``): crops of 0.2 to 1
of the area with ratios from 3/4 to 4/3, half of them mirrored, 0.8 of them with brightness, contrast and saturation
changed by up to 0.4 and hue by up to 0.1, 0.2 of them grey, no blur. The differences are small: the order of the colour
changes (kornia draws one for each batch), Pillow's 8 bits after every operation, and kornia's crop by resampling, which
aligns corners.
"""

import math
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp

from rush.data.views import random_view
from rush.recipe.schema import Views
from rush.runtime.randomness import stream
from shared import Row, benchmark_parser, printed, record, spread

CROP_SCALE, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
LOG_RATIO = (math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
SLICED, RESAMPLED = "kornia, crop by slicing", "kornia, crop by resampling"
PILLOW = "Pillow, one image at a time"
Pipeline = Callable[[torch.Tensor], torch.Tensor]


def rush_pipeline(blur: float, device: str = "cpu") -> Pipeline:
    views = Views(crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO, blur=blur)
    generator = stream(0, "benchmark", device=device)
    return lambda x: random_view(x.to(device), views, generator)


def one_by_one(pipeline: Pipeline) -> Pipeline:
    return lambda x: torch.cat([pipeline(image) for image in x.split(1)])


def kornia_pipeline(side: int, cropping_mode: str) -> Pipeline | None:
    try:
        import kornia.augmentation as K
    except (ImportError, OSError, RuntimeError):
        return None
    # Plain Sequential, because kornia's own container costs up to a tenth more.
    steps = torch.nn.Sequential(
        K.RandomResizedCrop(
            (side, side), scale=CROP_SCALE, ratio=CROP_RATIO, align_corners=False, cropping_mode=cropping_mode
        ),
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


def check_same_views(pipelines: dict[str, Pipeline | None], side: int, count: int = 8192) -> None:
    """Prints how far the distribution of every pipeline's views is from the first one's, by ``view_statistics``.

    The distance is Kolmogorov and Smirnov's: the greatest difference of two distribution functions, over ``count``
    views each. Raises: RuntimeError when it exceeds 0.05 (by chance, in fewer than one run in a million), or 0.12 for
    kornia's crop by resampling: corners on corners make a distance of 0.07 in the width, and 0.05 are for chance.
    """
    probes = textured(count, side), coloured(count, side)
    expected: dict[str, np.ndarray] = {}
    for name, run in pipelines.items():
        if run is None:
            continue
        found = view_statistics(*(run(x).cpu() for x in probes))
        expected = expected or found
        distances = {
            key: float(ks_2samp(value, expected[key], method="asymp").statistic) for key, value in found.items()
        }
        if found is not expected:
            told = ", ".join(f"{key} {distance:.3f}" for key, distance in distances.items())
            print(f"distance of views by {name}: {told}")
        if max(distances.values()) > (0.12 if name == RESAMPLED else 0.05):
            raise RuntimeError(f"{name} draws other views than {next(iter(pipelines))}: distances {distances}")


def textured(count: int, side: int) -> torch.Tensor:
    """Equal grey images, uint8: noise on a slope from left to right. Crops and blur change how rough they are, flips
    the sign of the slope, contrast the spread."""
    noise = torch.rand(side, side, generator=stream(0, "benchmark", "texture"))
    grey = 255 * (0.5 + 0.07 * torch.linspace(-1, 1, side) + 0.14 * (noise - 0.5))
    return grey.to(torch.uint8).expand(count, 3, side, side).contiguous()


def coloured(count: int, side: int) -> torch.Tensor:
    """Equal images of one colour, uint8; no crop changes them."""
    return torch.tensor([150, 100, 120], dtype=torch.uint8).view(3, 1, 1).expand(count, 3, side, side).contiguous()


def view_statistics(texture: torch.Tensor, colour: torch.Tensor) -> dict[str, np.ndarray]:
    """One figure for every view of ``textured`` and ``coloured`` images, by what it tells of."""
    luma = (texture * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    spread = luma.std((1, 2))
    red, green, blue = colour.mean((2, 3)).unbind(1)
    mean = 0.299 * red + 0.587 * green + 0.114 * blue
    across, up = (red - blue) / mean, (red - 2 * green + blue) / (3**0.5 * mean)
    chroma = torch.hypot(across, up)
    found = {
        "width": luma.diff(dim=2).abs().mean((1, 2)) / spread,
        "height": luma.diff(dim=1).abs().mean((1, 2)) / spread,
        "ratio": luma.diff(dim=2).abs().mean((1, 2)) / luma.diff(dim=1).abs().mean((1, 2)),
        "flip": (luma * torch.linspace(-1, 1, luma.shape[2])).sum((1, 2)).sign(),
        "brightness": mean,
        "contrast": spread / luma.mean((1, 2)),
        "contrast and saturation": torch.where(chroma < 0.005, 0, chroma),
        "hue": torch.where(chroma < 0.005, 0, torch.atan2(up, across)),
        "grey": (chroma < 0.005).float(),
    }
    # Views that one operation left alone have one and the same value, up to rounding; blurred so that rounding does not
    # tell them apart.
    dither = 0.01 * torch.randn(len(luma), generator=stream(0, "benchmark", "dither"))
    return {name: (value + dither).numpy() for name, value in found.items()}


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
    parser = benchmark_parser(__doc__)
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
        SLICED: kornia_pipeline(arguments.side, "slice"),
        RESAMPLED: kornia_pipeline(arguments.side, "resample"),
        PILLOW: pillow_pipeline,
        "rush, half of the images blurred": rush_pipeline(0.5),
    }
    others = SLICED, RESAMPLED, PILLOW
    check_same_views({name: candidates[name] for name in ("rush", *others)}, arguments.side)
    times = measure({name: run for name, run in candidates.items() if run is not None}, x, arguments.repeats)
    print(f"SimCLR view of {tuple(x.shape)} uint8, {arguments.threads} thread(s), {arguments.repeats} repeats")
    rush = statistics.median(times["rush"])
    rows: list[Row] = []
    for name, values in times.items():
        row: Row = {
            "pipeline": name,
            "microseconds per image [least, greatest]": spread(values),
            "images/s": 1e6 / statistics.median(values),
            "times rush": statistics.median(values) / rush,
        }
        rows.append(printed(row))
    conditions: Row = {"noise": "none", "images per batch": len(x), "side": arguments.side, "rounds": arguments.repeats}
    record(arguments, "views", rows, conditions)


if __name__ == "__main__":
    main()
