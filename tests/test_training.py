"""Every method and objective of the recipes: what it costs, that it resumes to the same bits, and that several
processes train as one."""

from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import on_ranks
from rush.choices import FinetuneMode, FinetuneObjective
from rush.data.batches import Resident
from rush.data.images import ImageSet
from rush.data.noisy_views import NoiseSchedule
from rush.data.sources import load_images
from rush.data.views import Views
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.pipeline.train import objective_of
from rush.recipe.schema import FinetuneConfig
from rush.runtime.distributed import rank, world_size
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from rush.training.checkpoint import TrainingCheckpoint
from rush.training.finetune import finetune
from rush.training.loop import Keeping, Schedule
from rush.training.pretrain import ACL, Method, MoCo, SimCLR, pretrain

SCHEDULE = Schedule(
    epochs=2, batch_size=32, optimizer="sgd", learning_rate=0.05, momentum=0.9, weight_decay=1e-3, warmup_epochs=1
)
IMAGES, EPOCH_IMAGES = 100, 96  # three whole batches
VIEWS = Views(crop_scale=(0.5, 1.0), greyscale=0.0)


def images() -> ImageSet:
    return load_images("digits", "train")[slice(IMAGES)]


def classifier() -> Classifier:
    encoder = build_encoder("small", 4, 1)
    features = encoder.features
    assert isinstance(features, int)
    built = Classifier(Normalize([0.3], [0.38]), encoder, linear_head(features, 10))
    seeded_init(built, stream(0, "weights"))
    return built


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


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


def pretrained(
    method: Method,
    keeping: Keeping = Keeping(),  # noqa: B008
    log: Callable[..., None] = lambda *_, **__: None,
    views: Any = VIEWS,
    noise: NoiseSchedule | None = None,
    own: Classifier | None = None,
    **given: Any,
) -> Classifier:
    own = own or classifier()
    pretrain(
        Resident(images().without_labels(), "cpu", rank(), world_size()),
        own.encoder,
        own.normalize,
        method=method,
        views=views,
        noise=noise or NoiseSchedule("none", (0.0, 0.0), 0.0),
        schedule=SCHEDULE,
        projector_hidden=16,
        projector_out=8,
        seed=0,
        execution=Execution(),
        keeping=keeping,
        log=log,
        **given,
    )
    return own


def finetuned(
    name: FinetuneObjective,
    mode: FinetuneMode = "full",
    keeping: Keeping = Keeping(),  # noqa: B008
    log: Callable[..., None] = lambda *_, **__: None,
    head_epochs: int = 1,
) -> Classifier:
    config = FinetuneConfig.model_validate(
        {
            "epochs": 2,
            "batch_size": 32,
            "learning_rate": 0.05,
            "objective": name,
            "consistency": {"draws": 3},
            "smoothadv": {"draws": 2, "steps": 3},
            "cat_rs": {"draws": 2, "steps": 3},
            "adversary": {"steps": 4},
        }
    )
    own = classifier()
    finetune(
        images(),
        own,
        objective=objective_of(config),
        noise=Gaussian(0.25),
        mode=mode,
        head_epochs=head_epochs,
        views=Views.weak(shift_pad=1, flip=0.0),
        schedule=SCHEDULE,
        seed=0,
        execution=Execution(),
        keeping=keeping,
        log=log,
    )
    return own


METHODS: dict[str, tuple[Method, tuple[float, float]]] = {
    "simclr": (SimCLR(), (2, 0)),
    "simclr, cached": (SimCLR(micro_batch=8), (2, 2)),
    "moco": (MoCo(queue=64), (1, 1)),
    "acl": (ACL(steps=3), (4 + 2 * 3, 0)),
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
    (method, passes), told = METHODS[name], Epochs()
    pretrained(method, log=told)
    assert told.passes == passes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fine_tuning_costs_the_passes_that_it_says(name: FinetuneObjective) -> None:
    told = Epochs()
    finetuned(name, log=told)
    assert told.passes == OBJECTIVES[name]


def breaking_after(calls: int, views: Views) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The views, broken off at a call; each step calls them twice."""
    left = iter(range(calls))

    def broken(x: Tensor, generator: torch.Generator) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return views(x, generator)

    return broken


@pytest.mark.parametrize("name", METHODS)
def test_a_pre_training_broken_off_in_an_epoch_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Queue, key network and the second normalization are resumed with the rest."""
    method, _ = METHODS[name]
    keeping = Keeping(TrainingCheckpoint(tmp_path / "state.pt", "recipe"), minutes=0)
    noise = NoiseSchedule("one", (0.0, 0.5), 2.0) if name != "acl" else None
    undisturbed = bits(pretrained(method, noise=noise))
    with pytest.raises(KeyboardInterrupt):
        pretrained(method, keeping, views=breaking_after(2 * 4, VIEWS), noise=noise)
    assert bits(pretrained(method, keeping, noise=noise)) == undisturbed
    assert undisturbed != bits(classifier())


def test_the_methods_train_different_encoders() -> None:
    found = [bits(pretrained(METHODS[name][0])) for name in ("simclr", "moco", "acl")]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_encoder_of_acl_comes_back_with_the_normalization_of_the_adversarial_views() -> None:
    """With attacks of almost no size the two normalizations see the same views: then, and only then, they agree."""

    def running_means(epsilon: float, monitored: list[Tensor]) -> Tensor:
        own = classifier()

        def look(_: int) -> dict[str, Any]:
            monitored[:] = [own.encoder.layers[1].running_mean.clone()]  # type: ignore[union-attr, index]
            return {}

        pretrained(ACL(epsilon=epsilon, step_size=epsilon, steps=1), own=own, monitor=look)
        mean = own.encoder.layers[1].running_mean  # type: ignore[union-attr, index]
        assert isinstance(mean, Tensor)
        return mean

    clean: list[Tensor] = []
    torch.testing.assert_close(running_means(1e-6, clean), clean[0], atol=1e-4, rtol=0)
    adversarial = running_means(0.5, clean)
    assert float((adversarial - clean[0]).abs().max()) > 0.01


def test_linear_then_full_trains_the_head_alone_at_first() -> None:
    told = Epochs()
    own = finetuned("gaussian", "linear-then-full", log=told)
    assert [(event["passes"], event["forward_passes"]) for event in told.events] == [
        (0, EPOCH_IMAGES),
        (EPOCH_IMAGES, 0),
    ]
    assert bits(own.encoder) != bits(classifier().encoder)
    head_only = Epochs()
    kept = finetuned("gaussian", "linear-then-full", log=head_only, head_epochs=2)
    assert bits(kept.encoder) == bits(classifier().encoder)
    assert bits(kept.head) != bits(classifier().head)
    assert bits(kept.head) == bits(finetuned("gaussian", "linear").head)


@pytest.mark.slow
def test_a_compiled_encoder_trains_alike_and_is_counted_alike() -> None:
    """Compiled kernels round otherwise: six steps of SGD leave 1e-4."""
    told = Epochs()
    plain, compiled = pretrained(SimCLR()), pretrained(SimCLR(), log=told, compile_mode="default")
    assert told.passes == (2, 0)
    assert bits(compiled) != bits(plain)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
    assert "forward" not in vars(compiled.encoder)


# --- several processes ------------------------------------------------------------------------------------------------


def mirrored(x: Tensor, _: torch.Generator) -> Tensor:
    """A view that draws nothing, so that it is the same on any number of processes."""
    x = x.float() / 255
    return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.3, x.flip(3), x.flip(2))


def trained_on_ranks(folder: str, method: Method, broken: bool) -> dict[str, Tensor]:
    keeping = Keeping(TrainingCheckpoint(Path(folder) / "state.pt", "recipe"))
    views: Any = breaking_after(2 * 4, mirrored) if broken else mirrored  # type: ignore[arg-type]
    try:
        own = pretrained(method, keeping, views=views)
    except KeyboardInterrupt:
        own = classifier()
    return {name: tensor.detach() for name, tensor in own.state_dict().items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        torch.allclose(found[name].double(), own.double(), atol=2e-5, rtol=1e-4) for name, own in expected.items()
    )


@pytest.mark.timeout(240)
def test_two_processes_train_as_one_and_go_on_where_one_stopped(processes: ForkServerContext, tmp_path: Path) -> None:
    """Float32 sums round otherwise: six steps of SGD leave 2e-5; without shared statistics it would be 1e-2."""
    method = SimCLR()
    for name in ("alone", "both", "resumed"):
        (tmp_path / name).mkdir()
    alone = trained_on_ranks(str(tmp_path / "alone"), method, broken=False)
    both = on_ranks(processes, partial(trained_on_ranks, str(tmp_path / "both"), method, False), 2, tmp_path / "both")
    assert all(torch.equal(both[0][name], both[1][name]) for name in alone)
    assert close(both[0], alone)
    trained_on_ranks(str(tmp_path / "resumed"), method, broken=True)
    work = partial(trained_on_ranks, str(tmp_path / "resumed"), method, False)
    resumed = on_ranks(processes, work, 2, tmp_path / "resumed")
    assert close(resumed[0], alone)
    assert not close(alone, {name: own.detach() for name, own in classifier().state_dict().items()})


def test_a_batch_that_processes_cannot_share_equally_is_refused() -> None:
    source = Resident(images(), "cpu", 1, 3)
    with pytest.raises(Exception, match=r"batch_size = 32 cannot be shared equally by 3 processes; make it a multiple"):
        next(source.batches(stream(0, "order"), 32))
    shares = [Resident(images(), "cpu", own, 4) for own in range(4)]
    parts = [next(share.batches(stream(0, "order"), 32)).labels for share in shares]
    whole = next(Resident(images()).batches(stream(0, "order"), 32)).labels
    assert whole is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)
