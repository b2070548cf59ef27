"""A network of this library is inspected once per machine, and again after any change; others in every process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rush
from rush.errors import ModelError, NumericsWarning
from rush.models.classifier import Classifier
from rush.models.storage import ClassifierSpec
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.runtime.user_cache import VARIABLE
from rush.smoothing import forward as forward_module
from rush.smoothing import inspected
from rush.smoothing.forward import Forward

SPEC = ClassifierSpec("small", 4, 1, (0.3,), (0.4,), tuple("0123"))
EXECUTION = Execution(tile=8, threads=1, folded=True)


def network(seed: int = 0, spec: ClassifierSpec = SPEC) -> Classifier:
    built = spec.build()
    seeded_init(built, stream(seed, "inspected"))
    return built.eval().requires_grad_(False)


def tile(rows: int = 8) -> Tensor:
    return torch.rand(rows, 1, 8, 8, generator=stream(0, "inspected/tile"))


@pytest.fixture
def inspections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a new forward on a tile, as a new process does, and returns how often it was inspected."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    real, count = forward_module.check_forward, [0]

    def counted(*arguments: object) -> bool:
        count[0] += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forward_module, "check_forward", counted)

    def run(model: nn.Module, execution: Execution = EXECUTION, rows: int = 8) -> int:
        count[0] = 0
        Forward(model, execution, 4)(tile(rows))
        return count[0]

    return run


def test_it_is_inspected_once_and_gives_the_same_logits(inspections: Callable[..., int]) -> None:
    model = network()
    fresh = Forward(network(), EXECUTION, 4)(tile())
    assert inspections(model) == 0  # by the line above, of an equal network
    assert torch.equal(Forward(model, EXECUTION, 4)(tile()), fresh)
    assert inspections(network(seed=1)) == 1
    assert inspections(network(seed=1)) == 0


def _other_weight(model: Classifier) -> None:
    model.head.get_parameter("weight").data[0, 0] += 1e-6


def _other_statistics(model: Classifier) -> None:
    next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)).get_buffer("running_var").add_(1e-3)


def _other_epsilon(model: Classifier) -> None:
    next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)).eps = 1e-4


def _other_layer(model: Classifier) -> None:
    model.head = nn.Sequential(nn.Identity(), model.head)


@pytest.mark.parametrize("change", [_other_weight, _other_statistics, _other_epsilon, _other_layer])
def test_a_changed_network_is_inspected(change: Callable[[Classifier], None], inspections: Callable[..., int]) -> None:
    assert inspections(network()) == 1
    changed = network()
    change(changed)
    assert inspections(changed.eval()) == 1
    assert inspections(network()) == 0


def test_another_execution_tile_machine_or_code_is_inspected(
    inspections: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspections(network()) == 1
    assert inspections(network(), replace(EXECUTION, folded=False)) == 1
    assert inspections(network(), replace(EXECUTION, channels_last=True)) == 1
    assert inspections(network(), rows=4) == 1
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert inspections(network()) == 1
    monkeypatch.setattr(inspected, "device_name", lambda _: "another")
    assert inspections(network()) == 1
    monkeypatch.setattr(inspected, "_code", lambda: "changed")
    assert inspections(network()) == 1
    assert inspections(network()) == 0


class Foreign(nn.Linear):
    """A linear layer whose code is not this library's."""


def _foreign(model: Classifier) -> None:
    weight = model.head.get_parameter("weight")
    model.head = Foreign(weight.shape[1], weight.shape[0])


def _hooked(model: Classifier) -> None:
    model.encoder.register_forward_hook(lambda _, __, output: output * 2)


def _hooked_before(model: Classifier) -> None:
    model.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))


def _replaced(model: Classifier) -> None:
    linear = model.head.forward
    model.head.forward = lambda x: linear(2 * x)  # type: ignore[method-assign]


def _by_hand(model: Classifier) -> None:
    model.spec = None


@pytest.mark.parametrize("change", [_foreign, _hooked, _hooked_before, _replaced, _by_hand])
def test_what_is_not_wholly_of_this_library_is_inspected_each_time(
    change: Callable[[Classifier], None], inspections: Callable[..., int], tmp_path: Path
) -> None:
    model = network()
    change(model)
    execution = replace(EXECUTION, folded=False)
    assert [inspections(model.eval(), execution) for _ in range(2)] == [1, 1]
    assert inspections(nn.Sequential(model).eval(), execution) == 1
    assert not (tmp_path / "cache").exists()


def test_a_difference_that_may_be_rounding_is_told_in_every_process(
    inspections: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def logits(_: Execution, module: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        return module(x) * (1 + 1e-6 * calls[0])

    monkeypatch.setattr(Execution, "unguarded_logits", logits)
    for _ in range(2):
        with pytest.warns(NumericsWarning, match="change from call to call"):
            assert inspections(network()) == 1


def test_a_known_network_is_still_run_again_at_the_end(inspections: Callable[..., int]) -> None:
    model = network()
    assert inspections(model) == 1
    forward = Forward(model, replace(EXECUTION, folded=False), 4)
    forward(tile())
    forward = Forward(model, replace(EXECUTION, folded=False), 4)
    forward(tile())
    forward.recheck()
    model.head.get_parameter("weight").data.neg_()
    with pytest.raises(ModelError, match="no longer those that it gave before"):
        forward.recheck()


def test_nothing_is_kept_where_the_cache_is_off(
    inspections: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert [inspections(network()) for _ in range(2)] == [1, 1]


def test_the_votes_are_the_same(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = rush.load_images("digits", split="test")[:5]
    fresh = rush.certify(rush.load(tiny_run, device="cpu"), images, num_estimation=200)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for _ in range(2):
        kept = rush.certify(rush.load(tiny_run, device="cpu"), images, num_estimation=200)
        assert torch.equal(torch.as_tensor(kept.counts), torch.as_tensor(fresh.counts))
    assert len(list((tmp_path / "inspected").iterdir())) == 1
