"""Noise on views: its distribution, its ramp, its draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rush.choices import NoisyViewsOption
from rush.data.noisy_views import add_noise
from rush.errors import ConfigError, InputError
from rush.recipe.schema import NoiseSchedule
from rush.runtime.randomness import stream

SHAPE = (400, 3, 16, 16)


def views() -> tuple[Tensor, Tensor]:
    generator = stream(0, "views")
    return torch.rand(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator)


def sizes(schedule: NoiseSchedule, epoch: float) -> list[Tensor]:
    """Root mean square of the noise of every image, for both views."""
    noisy = add_noise(*views(), schedule, epoch, stream(1, "noise"))
    changes = [(new - old).double() for new, old in zip(noisy, views(), strict=True)]
    return [change.square().mean((1, 2, 3)).sqrt() for change in changes]


@pytest.mark.parametrize("option", ["one", "both"])
def test_every_image_has_a_sigma_uniform_in_the_range(option: NoisyViewsOption) -> None:
    low, high = 0.2, 0.8
    first, second = sizes(NoiseSchedule(views=option, sigma=(low, high), ramp_epochs=0), 0.0)
    assert (first == 0).all() if option == "one" else (first > 0).all()
    # An image's root mean square of 768 values is its sigma within a share of 1/sqrt(2 x 768) = 0.0255; six of these
    # are passed by one of 800 images with odds of 2e-6. The mean of 400 sigmas uniform in the range deviates by
    # 0.6/sqrt(12 x 400) = 0.0087, their standard deviation 0.1732 by 0.0039: six each, odds below 1e-8.
    for found in (second,) if option == "one" else (first, second):
        assert found.min() > low * (1 - 6 * 0.0255)
        assert found.max() < high * (1 + 6 * 0.0255)
        assert abs(found.mean() - 0.5) < 6 * 0.0087
        assert abs(found.std() - 0.6 / math.sqrt(12)) < 6 * 0.0039
    if option == "both":
        # independent: the correlation of 400 pairs deviates by 1/20, six of them with odds of 2e-9
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 6 / 20


def test_the_noise_is_normal_and_not_clipped() -> None:
    x, _ = views()
    schedule = NoiseSchedule(views="both", sigma=(0.5, 0.5), ramp_epochs=0)
    noisy, other = add_noise(x, x, schedule, 0.0, stream(1, "noise"))
    z = ((noisy - x) / 0.5).double().flatten()
    count = z.numel()  # 307,200 values: six standard deviations of each moment, odds below 1e-8 for all of them
    assert abs(z.mean()) < 6 / math.sqrt(count)
    assert abs(z.square().mean() - 1) < 6 * math.sqrt(2 / count)
    assert abs(z.pow(4).mean() - 3) < 6 * math.sqrt(96 / count)
    assert noisy.min() < -1
    assert noisy.max() > 2
    # the views' noises are independent: their products deviate by 1/sqrt(count)
    assert abs((z * ((other - x) / 0.5).double().flatten()).mean()) < 6 / math.sqrt(count)


def test_the_greatest_sigma_rises_linearly_and_then_stays() -> None:
    schedule = NoiseSchedule(views="both", sigma=(0.1, 0.5), ramp_epochs=4)
    found = [schedule.highest(epoch) for epoch in (0.0, 1.0, 2.5, 4.0, 100.0)]
    assert found == pytest.approx([0.1, 0.2, 0.35, 0.5, 0.5])
    assert NoiseSchedule(views="both", sigma=(0.1, 0.5), ramp_epochs=0).highest(0.0) == 0.5
    # at the start every sigma is the lowest: 800 images within six of their deviations, odds of 2e-6
    for start in sizes(schedule, 0.0):
        assert (start / 0.1 - 1).abs().max() < 6 * 0.0255
    for half in sizes(schedule, 2.0):  # the greatest of 400 uniform values lies in its upper tenth but for 5e-19
        assert 0.28 * (1 - 6 * 0.0255) < half.max() < 0.3 * (1 + 6 * 0.0255)


def test_draws_come_in_the_stated_order_and_the_views_stay_as_they_are() -> None:
    view_a, view_b = views()
    kept = view_a.clone(), view_b.clone()
    schedule = NoiseSchedule(views="both", sigma=(0.0, 0.4), ramp_epochs=2)
    noisy, again = (add_noise(view_a, view_b, schedule, 1.0, stream(1, "noise")) for _ in range(2))
    generator = stream(1, "noise")
    for found, view in zip(noisy, kept, strict=True):
        sigma = torch.rand(len(view), generator=generator) * 0.2
        expected = view + sigma.view(-1, 1, 1, 1) * torch.randn(view.shape, generator=generator)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(view_a, kept[0])
    assert torch.equal(view_b, kept[1])
    assert all(torch.equal(first, second) for first, second in zip(noisy, again, strict=True))


def test_without_noise_the_same_tensors_come_back_and_nothing_is_drawn() -> None:
    view_a, view_b = views()
    generator = stream(1, "noise")
    before = generator.get_state()
    none, one = (NoiseSchedule(views=option, sigma=(0.0, 0.5), ramp_epochs=1) for option in ("none", "one"))
    found = add_noise(view_a, view_b, none, 3.0, generator)
    assert found[0] is view_a
    assert found[1] is view_b
    assert torch.equal(generator.get_state(), before)
    assert add_noise(view_a, view_b, one, 3.0, generator)[0] is view_a


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"views": "two"}, r"views: Input should be 'none', 'one' or 'both' \(given: 'two'\)"),
        ({"sigma": (0.5, 0.25)}, r"sigma: must be \(least, greatest\), got \[0.5, 0.25\]"),
        ({"sigma": (-0.1, 0.25)}, r"sigma.0: .* greater than or equal to 0 \(given: -0.1\)"),
        ({"sigma": (0.1, math.inf)}, r"sigma.1: .* finite number \(given: inf\)"),
        ({"sigma": (0.1, math.nan)}, r"sigma.1: .* finite number \(given: nan\)"),
        ({"sigma": 0.5}, r"sigma: .* valid tuple \(given: 0.5\)"),
        ({"sigma": (0.1, 0.2, 0.3)}, "sigma: .* at most 2 items"),
        ({"sigma": (True, True)}, r"sigma.0: must be a number \(given: True\)"),
        ({"views": "one", "sigma": (0.0, 0.0)}, 'views = "one" needs a sigma above 0'),
        ({"ramp_epochs": -1}, r"ramp_epochs: .* greater than or equal to 0 \(given: -1\)"),
        ({"ramp_epochs": math.nan}, "ramp_epochs: .* finite number"),
    ],
)
def test_values_out_of_range_are_refused(values: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=f"NoiseSchedule: {text}"):
        NoiseSchedule(**{"views": "both", **values})


def test_noise_needs_a_generator() -> None:
    with pytest.raises(InputError, match=r"need an explicit torch\.Generator"):
        add_noise(*views(), NoiseSchedule(views="one", sigma=(0.0, 0.5), ramp_epochs=0), 0.0, None)  # type: ignore[arg-type]
