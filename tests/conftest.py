"""What every test runs under, and what several files share: a network, a finished run, cheap child processes."""

import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch import nn

from commands import Call
from rush.__main__ import main
from rush.data.sources import load_images
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import SmallEncoder
from rush.models.heads import linear_head
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.user_cache import VARIABLE
from tiny import run_tiny


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> Iterator[None]:
    """No image comes from an earlier process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "off")
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits_network() -> nn.Module:
    """A small convolutional network in evaluation mode, trained on the digits for a few seconds without noise."""
    generator = stream(0, "test network")
    encoder = SmallEncoder(width=8)
    network = Classifier(Normalize((0.3,), (0.38,)), encoder, linear_head(encoder.features, 10))
    seeded_init(network, generator).train()
    images = load_images("digits", split="train")
    assert images.labels is not None
    x, y = images.pixels(), images.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished, undisturbed run of the tiny recipe; tests read it or work on a copy."""
    return run_tiny(tmp_path_factory.mktemp("tiny")).path


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Where child processes come from: a server that has imported the library once and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rush.pipeline.stages", "sklearn.datasets", "torch.distributed", "torch._dynamo", "pytest"]
    )
    return context


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``rush`` as it starts from the shell, but within this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def started(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = ["rush", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            with warnings.catch_warnings():  # cyclopts doubts that a test means to read the command line
                warnings.filterwarnings("ignore", message="Cyclopts application invoked without tokens")
                main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)

    return started
