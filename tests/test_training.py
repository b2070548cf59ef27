"""Every method and objective of the recipes: what it costs, that it resumes to the same bits, and that several
processes train as one."""

from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainings
from ranks import on_ranks
from rush.choices import FinetuneObjective
from rush.data.batches import Resident
from rush.data.views import random_view
from rush.recipe.schema import AdversaryConfig, FinetuneConfig, NoiseSchedule, PretrainConfig, Views
from rush.runtime.randomness import stream
from trainings import ALWAYS, SIMCLR, View, bits, classifier, digits, finetuned, kept, pretrained

EPOCH_IMAGES = 96  # three whole batches
FINETUNE = FinetuneConfig.model_validate(
    {
        **dict(trainings.FINETUNE),
        "consistency": {"draws": 3},
        "smoothadv": {"draws": 2, "steps": 3},
        "cat_rs": {"draws": 2, "steps": 3},
        "adversary": {"steps": 4},
    }
)


class Epochs:
    """Keeps what a training logs."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward, forward alone, for each image of an epoch."""
        return tuple(self.events[0][name] / EPOCH_IMAGES for name in ("passes", "forward_passes"))  # type: ignore[return-value]


METHODS: dict[str, tuple[PretrainConfig, tuple[float, float]]] = {
    "simclr": (SIMCLR, (2, 0)),
    "simclr, cached": (SIMCLR.replace(micro_batch=8), (2, 2)),
    "moco": (SIMCLR.replace(objective="moco", queue=64), (1, 1)),
    "acl": (SIMCLR.replace(objective="acl", adversary=AdversaryConfig(steps=3)), (4 + 2 * 3, 0)),
}
OBJECTIVES: dict[FinetuneObjective, tuple[float, float]] = {
    "standard": (1, 0),
    "gaussian": (1, 0),
    "consistency": (3, 0),
    "smoothadv": (2 * (3 + 1), 0),
    "cat-rs": (2 * 2 + 2 * 3, 0),
    "pgd-at": (4 + 1, 0),
    "trades": (4 + 2, 1),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_pre_training_costs_the_passes_that_it_says(name: str) -> None:
    (config, passes), log = METHODS[name], Epochs()
    pretrained(config, log=log)
    assert log.passes == passes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fine_tuning_costs_the_passes_that_it_says(name: FinetuneObjective) -> None:
    log = Epochs()
    finetuned(FINETUNE.replace(objective=name), log=log)
    assert log.passes == OBJECTIVES[name]


def breaking_after(calls: int, view: View = random_view) -> View:
    """Return ``view``, interrupted at a call; each step calls it twice."""
    left = iter(range(calls))

    def broken(x: Tensor, views: Views, generator: torch.Generator) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return view(x, views, generator)

    return broken


@pytest.mark.parametrize("name", METHODS)
def test_a_pre_training_broken_off_in_an_epoch_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Queue, key network and the second normalization are resumed with the rest."""
    config, _ = METHODS[name]
    checkpoints = kept(tmp_path, ALWAYS)
    if name != "acl":
        config = config.replace(noise=NoiseSchedule(views="one", ramp_epochs=2))
    undisturbed = bits(pretrained(config))
    with pytest.raises(KeyboardInterrupt):
        pretrained(config, view=breaking_after(2 * 4), checkpoints=checkpoints)
    assert bits(pretrained(config, checkpoints=checkpoints)) == undisturbed
    assert undisturbed != bits(classifier())


def test_the_methods_train_different_encoders() -> None:
    found = [bits(pretrained(METHODS[name][0])) for name in ("simclr", "moco", "acl")]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_encoder_of_acl_comes_back_with_the_normalization_of_the_adversarial_views() -> None:
    """With attacks of almost no size the two normalizations see the same views: then, and only then, they agree."""

    def running_means(epsilon: float, monitored: list[Tensor]) -> Tensor:
        trained = classifier()

        def look(_: int) -> dict[str, Any]:
            monitored[:] = [trained.encoder.layers[1].running_mean.clone()]  # type: ignore[union-attr, index]
            return {}

        adversary = AdversaryConfig(epsilon=str(epsilon), step_size=str(epsilon), steps=1)
        pretrained(SIMCLR.replace(objective="acl", adversary=adversary), start=trained, monitor=look)
        mean = trained.encoder.layers[1].running_mean  # type: ignore[union-attr, index]
        assert isinstance(mean, Tensor)
        return mean

    clean: list[Tensor] = []
    torch.testing.assert_close(running_means(1e-6, clean), clean[0], atol=1e-4, rtol=0)
    adversarial = running_means(0.5, clean)
    assert float((adversarial - clean[0]).abs().max()) > 0.01


def test_linear_then_full_trains_the_head_alone_at_first() -> None:
    log, gradual = Epochs(), FINETUNE.replace(mode="linear-then-full")
    trained = finetuned(gradual, log=log)
    assert [(event["passes"], event["forward_passes"]) for event in log.events] == [
        (0, EPOCH_IMAGES),
        (EPOCH_IMAGES, 0),
    ]
    assert bits(trained.encoder) != bits(classifier().encoder)
    head_only = finetuned(gradual.model_copy(update={"head_epochs": 2}))  # all epochs, which a recipe refuses
    assert bits(head_only.encoder) == bits(classifier().encoder)
    assert bits(head_only.head) != bits(classifier().head)
    assert bits(head_only.head) == bits(finetuned(FINETUNE.replace(mode="linear")).head)


@pytest.mark.slow
def test_a_compiled_encoder_trains_alike_and_is_counted_alike() -> None:
    """Compiled kernels round otherwise: six steps of SGD leave 1e-4."""
    log = Epochs()
    plain, compiled = pretrained(), pretrained(log=log, compile_mode="default")
    assert log.passes == (2, 0)
    assert bits(compiled) != bits(plain)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
    assert "forward" not in vars(compiled.encoder)


# --- several processes ------------------------------------------------------------------------------------------------


def mirrored(x: Tensor, _views: Views, _generator: torch.Generator) -> Tensor:
    """A view that draws nothing, so that it is the same on any number of processes."""
    x = x.float() / 255
    return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.3, x.flip(3), x.flip(2))


def trained_on_ranks(folder: str, broken: bool) -> dict[str, Tensor]:
    try:
        view = breaking_after(2 * 4, mirrored) if broken else mirrored
        trained = pretrained(view=view, checkpoints=kept(Path(folder)))
    except KeyboardInterrupt:
        trained = classifier()
    return {name: tensor.detach() for name, tensor in trained.state_dict().items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        torch.allclose(found[name].double(), own.double(), atol=2e-5, rtol=1e-4) for name, own in expected.items()
    )


@pytest.mark.timeout(240)
def test_two_processes_train_as_one_and_go_on_where_one_stopped(processes: ForkServerContext, tmp_path: Path) -> None:
    """Float32 sums round otherwise: six steps of SGD leave 2e-5; without shared statistics it would be 1e-2."""
    for name in ("alone", "both", "resumed"):
        (tmp_path / name).mkdir()
    alone = trained_on_ranks(str(tmp_path / "alone"), broken=False)
    both = on_ranks(processes, partial(trained_on_ranks, str(tmp_path / "both"), False), 2, tmp_path / "both")
    assert all(torch.equal(both[0][name], both[1][name]) for name in alone)
    assert close(both[0], alone)
    trained_on_ranks(str(tmp_path / "resumed"), broken=True)
    work = partial(trained_on_ranks, str(tmp_path / "resumed"), False)
    resumed = on_ranks(processes, work, 2, tmp_path / "resumed")
    assert close(resumed[0], alone)
    assert not close(alone, {name: own.detach() for name, own in classifier().state_dict().items()})


def test_a_batch_that_processes_cannot_share_equally_is_refused() -> None:
    source = Resident(digits(), "cpu", 1, 3)
    with pytest.raises(Exception, match=r"batch_size = 32 cannot be shared equally by 3 processes; make it a multiple"):
        next(source.batches(stream(0, "order"), 32))
    shares = [Resident(digits(), "cpu", own, 4) for own in range(4)]
    parts = [next(share.batches(stream(0, "order"), 32)).labels for share in shares]
    whole = next(Resident(digits()).batches(stream(0, "order"), 32)).labels
    assert whole is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)
