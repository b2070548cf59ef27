"""What a training cost: rows by whether they can go back, time, and energy where a counter can be read."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rush.training.meter as meter_module
from rush.training.meter import Cost, Meter, peak_memory


def test_rows_count_by_whether_anything_asks_for_a_gradient() -> None:
    network, x = nn.Linear(3, 2), torch.zeros(5, 3)
    meter = Meter(network)
    network(x)  # not within the context
    with meter.running():
        network(x)  # a weight asks
        with torch.no_grad():
            network(x[:2])
        network.requires_grad_(False)
        network(x[:3])
        network(x[:1].clone().requires_grad_())  # the input asks
    network(x)
    assert (meter.cost.passes, meter.cost.forward_passes) == (6, 5)


def test_several_networks_are_counted_together() -> None:
    query, key = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    meter = Meter(query, key)
    with meter.running():
        query(torch.zeros(4, 3))
        key(torch.zeros(7, 3))
    assert (meter.cost.passes, meter.cost.forward_passes) == (4, 7)


def test_time_is_added_to_what_was_counted_before() -> None:
    meter = Meter(nn.Linear(1, 1))
    meter.cost = Cost(passes=10, seconds=100.0, joules=meter.cost.joules)
    with meter.running():
        first = meter.read()
        second = meter.read()
    assert 100 < first.seconds <= second.seconds < 160
    assert second.minus(first).passes == 0
    assert first.passes == 10


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two packages' energy counters in microjoules, and a zone within a package that is part of it."""
    monkeypatch.setattr(meter_module, "_RAPL", tmp_path)
    files = [tmp_path / zone / "energy_uj" for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")]
    for file in files:
        file.parent.mkdir()
        file.write_text("1000000\n")
    return files


def test_the_energy_of_all_packages_is_added_up(counters: list[Path]) -> None:
    meter = Meter(nn.Linear(1, 1))
    with meter.running():
        counters[0].write_text("4000000\n")
        counters[2].write_text("3000000\n")
        assert meter.read().joules == 3.0
        counters[1].write_text("1500000\n")
        assert meter.read().joules == 3.5


def test_a_counter_that_starts_again_takes_nothing_away(counters: list[Path]) -> None:
    meter = Meter(nn.Linear(1, 1))
    with meter.running():
        counters[0].write_text("0\n")
        assert meter.read().joules == 0.0
        counters[0].write_text("2000000\n")
        assert meter.read().joules == 2.0


def test_without_a_counter_that_may_be_read_no_energy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counters: list[Path]
) -> None:
    counters[0].write_text("secret")
    assert Meter(nn.Linear(1, 1)).cost.joules is None
    monkeypatch.setattr(meter_module, "_RAPL", tmp_path / "nowhere")
    assert Meter(nn.Linear(1, 1)).cost.joules is None


def test_a_difference_tells_no_energy_unless_both_do() -> None:
    assert Cost(5, 3, 2.0, 7.0).minus(Cost(1, 1, 0.5, 2.0)) == Cost(4, 2, 1.5, 5.0)
    assert Cost(5, joules=7.0).minus(Cost(1, joules=None)).joules is None


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory("cpu")
    assert before is not None
    assert before > 50e6  # torch alone
    held = torch.ones(40_000_000)
    after = peak_memory("cpu")
    assert after is not None
    assert after >= before
    assert held.numel() == 40_000_000
