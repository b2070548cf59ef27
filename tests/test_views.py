"""Views: each operation against kornia, the distribution against a slow loop, and the bits."""

import colorsys
import itertools
import math
from dataclasses import fields

import kornia
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rush.data.views import (
    ViewParameters,
    apply_view,
    blur_kernel_size,
    crop_resize,
    draw_parameters,
    flip_horizontal,
    gaussian_blur,
    gaussian_noise,
    random_view,
    unit_float,
)
from rush.errors import ConfigError, InputError
from rush.recipe.schema import Views, WeakViews
from rush.runtime.randomness import stream

FULL = Views(blur=0.5)
SAMPLES = 20_000
SIGMAS = 6.11  # a normal variable is farther out with probability 1e-9


def random_images(batch: int, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Random images with the hard colours in their first row: black, white, greys, primaries, ties, one uint8 step."""
    x = torch.rand(batch, channels, height, width, generator=stream(0, "images", batch, channels, height, width))
    hard = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.7, 0.7, 0.2), (0.2, 0.7, 0.7)]
    hard += [(0.7, 0.2, 0.7), (1, 1, 0), (1 / 255, 0, 0), (0.5, 0.5 + 1 / 255, 0.5)]
    for column, colour in enumerate(hard[:width]):
        x[:, :, 0, column] = torch.tensor(colour[:channels])
    return x


def factors(batch: int, low: float, high: float) -> Tensor:
    """Random values of the range with both of its ends among them."""
    values = low + (high - low) * torch.rand(batch, generator=stream(0, "factors", batch))
    values[0], values[1] = low, high
    return values


def changed(x: Tensor, **parameters: Tensor) -> Tensor:
    """Return the images after the operations named by ``parameters`` alone."""
    return apply_view(x, ViewParameters(**parameters))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("brightness", kornia.enhance.adjust_brightness_accumulative),
        ("contrast", kornia.enhance.adjust_contrast_with_mean_subtraction),
        ("saturation", kornia.enhance.adjust_saturation_with_gray_subtraction),
    ],
)
def test_colour_factors_equal_kornia(name, oracle, channels):
    """Brightness, contrast and saturation are kornia's of the same meaning, for factors from 0 over 1 to 2."""
    x, factor = random_images(16, channels), factors(16, 0.0, 2.0)
    factor[2] = 1.0
    torch.testing.assert_close(changed(x, **{name: factor}), oracle(x, factor), rtol=0, atol=1e-6)


def test_hue_equals_the_standard_librarys_hsv():
    """The branch-free hue is the HSV round trip of Python's colorsys in float64, over the whole circle."""
    x, turns = random_images(9, height=4, width=16), torch.tensor([-0.5, -0.3, -0.1, 0.0, 0.1, 0.2, 1 / 3, 0.4, 0.5])
    expected = torch.empty_like(x)
    for i, turn in enumerate(turns.tolist()):
        for row in range(4):
            for column in range(16):
                hue, saturation, value = colorsys.rgb_to_hsv(*x[i, :, row, column].tolist())
                expected[i, :, row, column] = torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value))
    torch.testing.assert_close(changed(x, hue=turns), expected, rtol=0, atol=2e-6)


def test_zero_turns_keep_every_uint8_pixel():
    """A hue of 0 gives back every colour of a grid over the uint8 cube, to 2e-6."""
    levels = torch.arange(0, 256, 5)
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 52, -1).to(torch.uint8)
    torch.testing.assert_close(changed(cube, hue=torch.zeros(1)), cube / 255, rtol=0, atol=2e-6)


def test_greyscale_equals_kornia_and_leaves_the_others():
    """Selected images have kornia's luma in all channels; the others keep their bits."""
    x = random_images(16)
    selected = torch.arange(16) % 3 == 0
    grey = changed(x, greyscale=selected)
    expected = kornia.color.rgb_to_grayscale(x[selected]).expand(-1, 3, -1, -1)
    torch.testing.assert_close(grey[selected], expected, rtol=0, atol=1e-6)
    assert torch.equal(grey[~selected], x[~selected])


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 20, 33)])
def test_crop_equals_slicing_resizing_and_flipping(channels, height, width):
    """Every image's box, cut out by slicing, enlarged by kornia's bilinear resize and mirrored by kornia's flip."""
    x, flip = random_images(64, channels, height, width), torch.arange(64) % 2 == 1
    boxes = draw_parameters(Views(crop_scale=(0.02, 1.0)), 64, (height, width), stream(0, "boxes")).boxes
    assert boxes is not None
    boxes[0] = torch.tensor([0, 0, height, width])
    boxes[1] = torch.tensor([height - 1, width - 1, 1, 1])
    boxes[2] = torch.tensor([0, width // 2, height, 1])
    resize = kornia.geometry.transform.resize
    for i, (top, left, h, w) in enumerate(boxes.int().tolist()):
        cut = x[i : i + 1, :, top : top + h, left : left + w]
        expected = resize(cut, (height, width), interpolation="bilinear", align_corners=False)
        expected = kornia.geometry.transform.hflip(expected) if flip[i] else expected
        torch.testing.assert_close(crop_resize(x, boxes, flip)[i : i + 1], expected, rtol=0, atol=2e-5)


def test_shift_equals_padding_and_slicing():
    """Boxes of the image's size at integer offsets are pad-and-crop with black, to the bit at 32 x 32."""
    x = random_images(81)
    moves = torch.cartesian_prod(torch.arange(-4, 5), torch.arange(-4, 5))
    boxes = torch.cat([moves, torch.full((81, 2), 32)], dim=1).float()
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    expected = torch.stack([padded[i, :, 4 + r : 36 + r, 4 + c : 36 + c] for i, (r, c) in enumerate(moves.tolist())])
    assert torch.equal(crop_resize(x, boxes), expected)


def test_flip_alone_equals_the_flip_of_a_whole_crop():
    """Mirroring by index and mirroring inside the crop agree, so that leaving the crop out changes nothing else."""
    x, flip = random_images(16), torch.arange(16) % 3 == 0
    whole = torch.tensor([0.0, 0.0, 32.0, 32.0]).expand(16, 4)
    assert torch.equal(flip_horizontal(x, flip), crop_resize(x, whole, flip))
    assert not torch.equal(flip_horizontal(x, flip), x)


@pytest.mark.parametrize(("height", "width", "kernel_size"), [(32, 32, 3), (96, 64, 9), (8, 8, 15)])
def test_blur_equals_kornia(height, width, kernel_size):
    """Separable blur with a sigma per image and reflected borders, from a nearly flat to a nearly pointed kernel."""
    x, sigma = random_images(8, 3, height, width), factors(8, 0.1, 5.0)
    oracle = kornia.filters.gaussian_blur2d
    expected = oracle(x, (kernel_size, kernel_size), sigma[:, None].expand(-1, 2), border_type="reflect")
    torch.testing.assert_close(gaussian_blur(x, sigma, kernel_size), expected, rtol=0, atol=1e-5)


def test_blur_with_sigma_zero_is_the_identity():
    """A sample that is not to be blurred keeps its bits while its neighbour is blurred."""
    x = random_images(2)
    blurred = gaussian_blur(x, torch.tensor([0.0, 1.0]), 5)
    assert torch.equal(blurred[0], x[0])
    assert (blurred[1] - x[1]).abs().max() > 0.05


@pytest.mark.parametrize(("side", "kernel_size"), [(8, 3), (32, 3), (64, 5), (96, 9), (224, 21)])
def test_blur_kernel_is_a_tenth_of_the_side(side, kernel_size):
    """The kernel is odd, at least 3 and never above a tenth of larger sides."""
    assert blur_kernel_size(side) == kernel_size


def test_noise_is_added_and_not_clipped():
    """The noise is sigma times the generator's next normal values, and leads outside of [0, 1]."""
    x, sigma = random_images(8), torch.linspace(0.0, 1.0, 8)
    noise = torch.randn(x.shape, generator=stream(0, "noise"))
    noisy = gaussian_noise(x, sigma, stream(0, "noise"))
    torch.testing.assert_close(noisy, x + sigma.view(8, 1, 1, 1) * noise, rtol=0, atol=1e-6)
    assert torch.equal(noisy[0], x[0])
    assert noisy.min() < 0
    assert noisy.max() > 1


def test_noise_comes_last_and_moves_no_other_draw():
    """With noise_sigma the view is the one without it plus 0.5 times noise drawn after the parameters."""
    x, generator = random_images(8), stream(0, "view")
    clean = random_view(x, FULL, generator)
    noise = torch.randn(x.shape, generator=generator)
    noisy = random_view(x, Views(blur=0.5, noise_sigma=0.5), stream(0, "view"))
    torch.testing.assert_close(noisy, clean + 0.5 * noise, rtol=0, atol=1e-6)


def slow_box(
    row: list[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> list[int]:
    """RandomResizedCrop's box for one image, attempt after attempt, from the uniform numbers of its row."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * row[attempt])
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** row[10 + attempt]
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(row[20] * (height - h + 1)), int(row[21] * (width - w + 1)), h, w]
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.9, 1.0), (0.5, 2.0)),
        (96, 20, (0.5, 1.0), (3 / 4, 4 / 3)),
        (20, 96, (0.5, 1.0), (3 / 4, 4 / 3)),
        (8, 8, (0.001, 0.1), (1.0, 1.0)),
    ],
)
def test_boxes_equal_a_slow_loop(height, width, scale, ratio):
    """First fitting attempt, offsets and fallback (tall and wide images never fit) are those of the loop over attempts.

    The loop is in float64; a rounding that falls the other way in float32 may move a box in at most 2 of 2,000 images.
    """
    views = Views(crop_scale=scale, crop_ratio=ratio)
    boxes = draw_parameters(views, 2000, (height, width), stream(0, "rows")).boxes
    uniform = torch.rand(2000, 33, generator=stream(0, "rows")).tolist()
    expected = torch.tensor([slow_box(row, height, width, scale, ratio) for row in uniform]).float()
    assert boxes is not None
    assert int((boxes != expected).any(1).sum()) <= 2


def assert_rate(hits: Tensor, probability: float) -> None:
    """The share of hits is within 6.11 standard deviations of its expectation: fails by chance once in 1e9."""
    deviation = math.sqrt(probability * (1 - probability) / hits.numel())
    assert abs(float(hits.float().mean()) - probability) <= SIGMAS * deviation


def test_probabilities_are_kept():
    """Flip, jitter, greyscale and blur happen as often as asked (odds of failing by chance: 4e-9)."""
    drawn = draw_parameters(Views(flip=0.3, jitter=0.6, greyscale=0.1, blur=0.7), SAMPLES, (32, 32), stream(0, "rates"))
    assert_rate(drawn.flip, 0.3)
    assert_rate(drawn.brightness != 1, 0.6)
    assert_rate(drawn.greyscale, 0.1)
    assert_rate(drawn.blur_sigma > 0, 0.7)
    assert torch.equal(drawn.hue != 0, drawn.brightness != 1)


def test_pairs_of_draws_are_independent():
    """Any two of nine events of rate 1/2 meet in a quarter of the samples (odds of failing by chance: 36e-9)."""
    half = draw_parameters(Views(flip=0.5, jitter=0.5, greyscale=0.5, blur=0.5), SAMPLES, (32, 32), stream(0, "pairs"))
    full = draw_parameters(Views(jitter=1.0, blur=1.0, blur_sigma=(1.0, 3.0)), SAMPLES, (32, 32), stream(0, "pairs"))
    events = [half.flip, half.brightness != 1, half.greyscale, half.blur_sigma > 0]
    events += [full.brightness > 1, full.contrast > 1, full.saturation > 1, full.hue > 0, full.blur_sigma > 2]
    for one, other in itertools.combinations(events, 2):
        assert_rate(one & other, 0.25)


def test_mean_area_of_crops():
    """The mean area of square crops is the integral of the rounded area (odds of failing by chance: 1e-9)."""
    boxes = draw_parameters(
        Views(crop_scale=(0.2, 1.0), crop_ratio=(1.0, 1.0)), SAMPLES, (32, 32), stream(0, "areas")
    ).boxes
    area = boxes[:, 2] * boxes[:, 3] / 1024
    grid = torch.linspace(0.2, 1.0, 100_001, dtype=torch.float64)
    exact = (grid * 1024).sqrt().round() ** 2 / 1024
    assert abs(float(area.mean()) - float(exact.mean())) <= SIGMAS * float(exact.std()) / math.sqrt(SAMPLES)


def test_factors_fill_their_ranges():
    """Factors and sigmas fill their ranges with the mean of a uniform variable (odds of failing by chance: 5e-9)."""
    views = Views(jitter=1.0, brightness=0.4, contrast=2.0, saturation=0.2, hue=0.1, blur=1.0, blur_sigma=(0.5, 2.0))
    drawn = draw_parameters(views, SAMPLES, (32, 32), stream(0, "ranges"))
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0, 3),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "blur_sigma": (0.5, 2.0),
    }
    for name, (low, high) in ranges.items():
        values = getattr(drawn, name).double()
        width = high - low
        assert low - 1e-6 <= values.min() < low + width / 100
        assert high - width / 100 < values.max() <= high + 1e-6
        assert abs(float(values.mean()) - (low + high) / 2) <= SIGMAS * width / math.sqrt(12 * SAMPLES)


def test_shifts_are_uniform():
    """Each of the 81 shifts of up to 4 pixels is equally frequent (chi-square; odds of failing by chance: 1e-9)."""
    boxes = draw_parameters(WeakViews(shift_pad=4), SAMPLES, (32, 32), stream(0, "shifts")).boxes
    places = ((boxes[:, 0] + 4) * 9 + boxes[:, 1] + 4).long()
    counts = torch.bincount(places, minlength=81).double()
    assert len(counts) == 81
    assert float(((counts - SAMPLES / 81) ** 2 / (SAMPLES / 81)).sum()) < 180.4  # the 1 - 1e-9 quantile


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_at_a_time_equals_the_batch(channels):
    """A view depends on its own parameters only: not on its row, its neighbours or the pieces of a large batch."""
    x = random_images(300, channels)
    parameters = draw_parameters(FULL, 300, (32, 32), stream(0, "one by one"))
    batch = apply_view(x, parameters)
    single = torch.cat([apply_view(x[i : i + 1], parameters[i : i + 1]) for i in range(300)])
    assert torch.equal(batch, single)


def test_order_of_the_operations():
    """The view is kornia's crop, flip, brightness, contrast, saturation, hue, greyscale and blur, in this order."""
    x, p = random_images(32), draw_parameters(FULL, 32, (32, 32), stream(0, "order"))
    for i in range(32):
        top, left, h, w = p.boxes[i].int().tolist()
        y = x[i : i + 1, :, top : top + h, left : left + w]
        y = kornia.geometry.transform.resize(y, (32, 32), interpolation="bilinear", align_corners=False)
        y = kornia.geometry.transform.hflip(y) if p.flip[i] else y
        y = kornia.enhance.adjust_brightness_accumulative(y, float(p.brightness[i]))
        y = kornia.enhance.adjust_contrast_with_mean_subtraction(y, float(p.contrast[i]))
        y = kornia.enhance.adjust_saturation_with_gray_subtraction(y, float(p.saturation[i]))
        y = kornia.enhance.adjust_hue(y, float(p.hue[i]) * 2 * math.pi)
        y = kornia.color.rgb_to_grayscale(y).expand(-1, 3, -1, -1) if p.greyscale[i] else y
        sigma = float(p.blur_sigma[i])
        y = kornia.filters.gaussian_blur2d(y, (3, 3), (sigma, sigma)) if sigma else y
        torch.testing.assert_close(apply_view(x, p)[i : i + 1], y, rtol=0, atol=1e-4)


def test_same_generator_state_same_bits():
    """One stream gives one view, the next call gives another one, and the global generator has no say."""
    x, views = random_images(64), Views(blur=0.5, noise_sigma=0.1)
    generator = stream(0, "same")
    torch.manual_seed(1)
    first, second = random_view(x, views, generator), random_view(x, views, generator)
    torch.manual_seed(2)
    assert torch.equal(first, random_view(x, views, stream(0, "same")))
    assert not torch.equal(first, second)


def test_options_do_not_move_other_draws():
    """Turning the blur on or the crop off leaves flip, colours and greyscale of every sample as they were."""
    plain = draw_parameters(Views(), 64, (32, 32), stream(0, "options"))
    other = draw_parameters(
        WeakViews(shift_pad=2, jitter=0.8, greyscale=0.2, blur=1.0), 64, (32, 32), stream(0, "options")
    )
    for name in ("flip", "brightness", "contrast", "saturation", "hue", "greyscale"):
        assert torch.equal(getattr(plain, name), getattr(other, name))


def test_uint8_equals_its_float():
    """uint8 is divided by 255 in float32 and nothing else; the images given are left as they are."""
    x = (random_images(200) * 255).round().to(torch.uint8)
    before = x.clone()
    assert torch.equal(unit_float(x), x.float() / 255)
    assert torch.equal(random_view(x, FULL, stream(0, "uint8")), random_view(x.float() / 255, FULL, stream(0, "uint8")))
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_input_is_not_changed_and_not_shared(channels):
    """No operation writes into the images, and a view in which nothing happens is a copy of its own."""
    x = random_images(16, channels)
    before = x.clone()
    random_view(x, FULL, stream(0, "input"))
    assert torch.equal(x, before)
    same = random_view(x, Views(crop_scale=(1.0, 1.0), flip=0.0, jitter=0.0, greyscale=0.0), stream(0, "input"))
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()


def test_views_stay_between_0_and_1():
    """Strong views of extreme images reach the ends of [0, 1] and never leave them."""
    x = random_images(256).round()
    view = random_view(
        x, Views(jitter=1.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, blur=0.5), stream(0, "range")
    )
    assert float(view.min()) == 0.0
    assert float(view.max()) == 1.0


def test_one_channel_ignores_saturation_hue_and_greyscale():
    """For images of one channel these three change nothing; brightness and contrast still do."""
    x = random_images(16, 1)
    colourless = Views(
        jitter=1.0,
        brightness=0.0,
        contrast=0.0,
        saturation=1.0,
        hue=0.5,
        greyscale=1.0,
        flip=0.0,
        crop_scale=(1.0, 1.0),
    )
    assert torch.equal(random_view(x, colourless, stream(0, "grey")), x)
    assert not torch.equal(
        random_view(x, WeakViews(shift_pad=0, flip=0.0), stream(0, "grey")),
        random_view(x, Views(crop_scale=(1.0, 1.0), flip=0.0), stream(0, "grey")),
    )


def test_weak_views_shift_and_flip_and_no_more():
    """WeakViews is the shift over black borders and the flip that its parameters name, and nothing else."""
    x = random_images(16)
    weak = random_view(x, WeakViews(shift_pad=4), stream(0, "weak"))
    parameters = draw_parameters(WeakViews(shift_pad=4), 16, (32, 32), stream(0, "weak"))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i, (top, left, _, _) in enumerate(parameters.boxes.int().tolist()):
        expected = padded[i, :, 4 + top : 36 + top, 4 + left : 36 + left]
        assert torch.equal(weak[i], expected.flip(2) if parameters.flip[i] else expected)
    used = {field.name for field in fields(parameters) if getattr(parameters, field.name) is not None}
    assert used == {"boxes", "flip"}


def test_an_empty_batch_gives_an_empty_view():
    """The last piece of a data set may be empty."""
    assert random_view(torch.empty(0, 3, 32, 32), FULL, stream(0, "empty")).shape == (0, 3, 32, 32)


class HostReads(TorchDispatchMode):
    """Collects the operations that would make the host wait for the device or copy from the host."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "lift_fresh",
        "_to_copy",
        "equal",
        "masked_select",
        "unique",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        moved = name != "_to_copy" or "device" in (kwargs or {})
        index_by_mask = name in ("index", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if (name in self.WAITING and moved) or index_by_mask:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", [Views(blur=0.5, noise_sigma=0.1), WeakViews(shift_pad=4)])
def test_nothing_waits_for_the_device(views, channels, monkeypatch):
    """Drawing and applying a view runs no operation that reads a value back to the host or copies one from it.

    Greyscale alone works otherwise on a CPU, where there is nobody to wait for: it is given the other way here.
    """
    x, generator = random_images(8, channels), stream(0, "waiting")
    monkeypatch.setattr("rush.data.views._on_cpu", lambda _: False)
    with HostReads() as reads:
        random_view(x, views, generator)
    assert reads.waiting == []
    with HostReads() as control:
        x[torch.tensor([True] * 8)].max().item()
    assert "_local_scalar_dense" in control.waiting


def test_greyscale_gives_the_same_bits_either_way(monkeypatch):
    x, selected = random_images(50, 3).float() / 255, torch.arange(50) % 3 == 0
    found = changed(x, greyscale=selected)
    monkeypatch.setattr("rush.data.views._on_cpu", lambda _: False)
    assert torch.equal(changed(x, greyscale=selected), found)


def test_applying_a_view_keeps_to_the_images_device():
    """On the meta device a tensor made elsewhere, or a value read, is an error: there is neither."""
    parameters = draw_parameters(FULL, 4, (32, 32), stream(0, "meta"))
    on_meta = ViewParameters(**{f.name: getattr(parameters, f.name).to("meta") for f in fields(parameters)})
    view = apply_view(torch.empty(4, 3, 32, 32, device="meta"), on_meta)
    assert view.device.type == "meta"


@pytest.mark.parametrize("generator", [None, 0, "seed"])
def test_a_missing_generator_is_an_error(generator):
    """There is no fallback to the global generator."""
    x = random_images(2)
    with pytest.raises(InputError, match=r"explicit torch\.Generator"):
        random_view(x, FULL, generator)
    with pytest.raises(InputError, match=r"explicit torch\.Generator"):
        draw_parameters(FULL, 2, (32, 32), generator)
    with pytest.raises(InputError, match=r"explicit torch\.Generator"):
        gaussian_noise(x, 0.1, generator)


def test_a_generator_of_another_device_is_an_error():
    """The error names both devices."""
    with pytest.raises(InputError, match="generator is on cpu, the images on meta"):
        random_view(torch.empty(2, 3, 8, 8, device="meta"), FULL, stream(0, "device"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, C, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(1, 2, 8, 8), r"C 1 or 3.*\(1, 2, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "float32.*float64"),
        ([[0.0]], "torch.Tensor, got list"),
    ],
)
def test_other_images_are_refused(images, message):
    """The error says what was given and what is allowed."""
    with pytest.raises(InputError, match=message):
        random_view(images, FULL, stream(0, "refused"))


def test_parameters_of_another_length_are_refused():
    """A factor for each image, a box for each image, an odd kernel that fits: nothing is broadcast in silence."""
    x = random_images(4)
    with pytest.raises(InputError, match=r"brightness .*\(4,\), got \(1,\)"):
        changed(x, brightness=torch.ones(1))
    with pytest.raises(InputError, match=r"boxes .*\(4, 4\), got \(4,\)"):
        crop_resize(x, torch.ones(4))
    for kernel_size in (4, 65, -1):
        with pytest.raises(InputError, match=rf"odd and in \[1, 63\].*got {kernel_size}"):
            gaussian_blur(x, torch.ones(4), kernel_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale.0: .* greater than 0 \(given: 0.0\)"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale: is a share of the image's area and at most 1, got \[0.5, 1.5\]"),
        ({"crop_scale": (0.8, 0.2)}, r"crop_scale: must be \(least, greatest\), got \[0.8, 0.2\]"),
        ({"crop_scale": 0.2}, r"crop_scale: .* valid tuple \(given: 0.2\)"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio.0"),
        ({"crop_ratio": (1.0, math.inf)}, "crop_ratio.1: .* finite number"),
        ({"blur_sigma": (0.1, math.nan)}, "blur_sigma.1: .* finite number"),
        ({"flip": 1.1}, r"flip: .* less than or equal to 1 \(given: 1.1\)"),
        ({"jitter": -0.1}, r"jitter: .* greater than or equal to 0 \(given: -0.1\)"),
        ({"greyscale": math.nan}, "greyscale: .* finite number"),
        ({"blur": True}, r"blur: must be a number \(given: True\)"),
        ({"brightness": -0.4}, "brightness: "),
        ({"contrast": math.inf}, "contrast: "),
        ({"hue": 0.6}, r"hue: .* less than or equal to 0.5 \(given: 0.6\)"),
        ({"noise_sigma": -1.0}, "noise_sigma: "),
        ({"shift_pad": -1}, r"shift_pad: .* greater than or equal to 0 \(given: -1\)"),
        ({"shift_pad": 1.5}, r"shift_pad: .*\(given: 1.5\)"),
        ({"shift_pad": 4, "crop_scale": (0.2, 1.0)}, "shift_pad=4 and .* exclude each other; set crop_scale="),
        ({"flp": 0.5}, r"flp: unknown key, did you mean 'flip'\?; allowed: blur, "),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    """At construction, with the name, the value given and the range allowed."""
    views = WeakViews if "shift_pad" in options else Views
    with pytest.raises(ConfigError, match=f"{views.__name__}: {message}"):
        views(**options)


def test_every_option_takes_the_same_draws():
    """Thirty-three uniform numbers a sample, whatever the options: all leave the generator in one state."""
    states = []
    for views in (Views(), WeakViews(shift_pad=4), Views(blur=1.0, flip=0.0)):
        generator = stream(0, "columns")
        draw_parameters(views, 7, (32, 32), generator)
        states.append(generator.get_state())
    expected = stream(0, "columns")
    torch.rand(7, 33, generator=expected)
    assert all(torch.equal(state, expected.get_state()) for state in states)
