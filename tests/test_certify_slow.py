"""Certification at length: memory that does not grow."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


MEASURE = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import rush
from exact_models import square_half_space, square_images
import numpy as np
from rush.smoothing.classifier import SmoothedClassifier

def certified(count, votes):
    x = square_images(np.linspace(-0.5, 0.5, count), 0)
    y = torch.ones(count, dtype=torch.int64)
    rush.certify(SmoothedClassifier(square_half_space(), 0.25, 2), (x, y), {method!r}, 100, votes)

certified(3, 2000)  # whatever is loaded and kept at the first call
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
certified({count}, {votes})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def growth(method: str, count: int, votes: int) -> float:
    """MiB by which the peak of a fresh process grows when it certifies so many images with so many votes."""
    code = MEASURE.format(tests=str(Path(__file__).parent), method=method, count=count, votes=votes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    return float(done.stdout) / 1024


@pytest.mark.parametrize("method", ["clopper-pearson", "sequential"])
def test_memory_does_not_grow_with_the_votes(method: str) -> None:
    """A million votes an image; kept at once as float32 noise on 2x2 pixels they would be 16 MB, as votes 8 MB."""
    assert growth(method, 3, 1000) < 2
    assert growth(method, 3, 1_000_000) < 4


@pytest.mark.parametrize("method", ["clopper-pearson", "sequential"])
def test_memory_grows_by_the_certificates_alone(method: str) -> None:
    """Measured: 2 to 3 KiB an image, its certificate in pieces. The generators alone are 5 KiB an image and go."""
    assert growth(method, 30, 200) < 2
    assert growth(method, 6000, 200) < 6000 * 6 / 1024


LARGE = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import rush
from rush.runtime.randomness import stream
from rush.smoothing.noise import make_noise

layers = torch.nn.Conv2d(3, 4, 7, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
network = torch.nn.Sequential(*layers, torch.nn.Linear(4, 10)).eval()
x = torch.randint(0, 256, (2, 3, 224, 224), generator=stream(0, "x")) / 255
noise = make_noise({noise!r}, 0.5)
rows = []
network[0].register_forward_pre_hook(lambda _, images: rows.append(len(images[0])))
smoothed = rush.SmoothedClassifier(network, noise=noise, num_classes=10)
rush.certify(smoothed, (x, torch.zeros(2, dtype=torch.int64)), num_estimation={votes})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, max(rows))
"""


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
def test_memory_at_224_pixels_does_not_grow_with_the_votes(noise: str) -> None:
    """A hundred copies of such an image take 60 MB, 10,000 would take 6 GB. The tile is chosen by its size."""
    peaks = []
    for votes in (100, 10_000):
        code = LARGE.format(tests=str(Path(__file__).parent), noise=noise, votes=votes)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
        peak, rows = map(int, done.stdout.split())
        assert rows == 16
        peaks.append(peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
