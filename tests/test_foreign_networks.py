"""Networks as they come from outside: they write to what they are given, reuse their output, change, or look around."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rush
from rush.attacks.threat import ThreatModel, norms
from rush.choices import Decision
from rush.errors import ModelError
from rush.evaluation.attack import verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Model, RandomDefender, defend
from rush.evaluation.verdict import VerdictSettings
from rush.runtime.execution import Execution
from rush.runtime.randomness import stream

CLASSES, TILE, SHAPE = 4, 32, (3, 4, 4)
WEIGHT = torch.randn((48, CLASSES), generator=stream(0, "foreign weights")) / 7
BALL, SETTINGS = ThreatModel("linf", 16 / 255), VerdictSettings(0.001, 100, seed=0)

Layer = Callable[[Tensor], Tensor]


def scores(x: Tensor) -> Tensor:
    return (x.flatten(1)[:, :, None].tanh() * WEIGHT).sum(1)


class Net(nn.Module):
    """Gives what ``answer`` computes; with ``copies``, of a copy of its input."""

    def __init__(self, answer: Layer, copies: bool = False) -> None:
        super().__init__()
        self.answer, self.copies = answer, copies
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x.clone()) if self.copies else self.answer(x)


def images(count: int = TILE) -> tuple[Tensor, Tensor]:
    x = torch.rand((count, *SHAPE), generator=stream(0, "foreign images"))
    return x, torch.arange(count) % CLASSES


def _smoothed(network: nn.Module) -> rush.SmoothedClassifier:
    return rush.SmoothedClassifier(network, 0.1, CLASSES, execution=Execution(tile=TILE))


# --- what writes to its input ---------------------------------------------------------------------------------------


def _through_numpy(x: Tensor) -> Tensor:
    x.detach().numpy()[...] -= 0.5
    return scores(x)


def _afterwards(x: Tensor) -> Tensor:
    logits = scores(x)
    x.detach().zero_()
    return logits


def _assigned(x: Tensor) -> Tensor:
    x[:, 0] = 0.5
    return scores(x)


WRITING: dict[str, Layer] = {
    "normalizes in place": lambda x: scores(x.sub_(0.5).div_(0.25)),
    "clamps in place": lambda x: scores(x.clamp_(0.2, 0.8)),
    "begins with a ReLU in place": lambda x: scores(nn.functional.relu(x.sub_(0.4), inplace=True)),
    "assigns to a channel": _assigned,
    "writes through data": lambda x: scores(x.data.mul_(2)),
    "writes through NumPy": _through_numpy,
    "erases what it has used": _afterwards,
    "gives back its input": lambda x: x.sub_(0.5).flatten(1)[:, :CLASSES],
}


def _points(model: Model, x: Tensor, y: Tensor, method: str) -> np.ndarray:
    given = {"steps": 3} if method in ("pgd", "mifgsm", "apgd", "fmn", "square", "random") else {}
    with np.errstate(all="ignore"):
        result = rush.attack(model, (x, y), BALL, method, max_votes=400, **given)  # type: ignore[arg-type]
    assert float(norms(result.adversarial, x, "linf").max()) <= BALL.epsilon + 1e-6
    assert 0 <= float(result.adversarial.min()) <= float(result.adversarial.max()) <= 1
    return np.concatenate([result.adversarial.flatten().numpy(), result.verdict, result.counts.flatten()])


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("count", [3, TILE])
def test_a_network_that_writes_to_its_input_gives_what_its_copying_twin_gives(
    name: str, smoothed: bool, count: int
) -> None:
    """In every use, also where the images fill a tile; the caller's images stay as they are."""
    (x, y), outcomes = images(count), []
    for copies in (True, False):
        network, own = Net(WRITING[name], copies), x.clone()
        model = _smoothed(network) if smoothed else network
        found = [_points(model, own, y, method) for method in ("none", "fgsm", "pgd", "apgd", "fmn", "square")]
        found.append(verdict(model, (own, y), x.clone(), BALL, max_votes=400).counts.flatten())
        if isinstance(model, rush.SmoothedClassifier):
            found.append(rush.certify(model, (own, y), num_estimation=300).counts.flatten())
            found.append(model.predict(own, 200).numpy())
            found.append(model.log_probs(own, 4, stream(0, "draws")).detach().numpy().flatten())
            found.append(model.as_module(4, stream(0, "draws"))(own).detach().numpy().flatten())
        assert torch.equal(own, x)
        outcomes.append(np.concatenate(found))
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize("name", ["normalizes in place", "gives back its input"])
def test_a_random_network_that_writes_to_its_input(name: str) -> None:
    """Seeded alike, it gives what its copying twin gives."""
    (x, y), outcomes = images(5), []
    for copies in (True, False):
        network = Net(lambda x: WRITING[name](x) + 0.05 * torch.randn(len(x), CLASSES), copies)
        own = x.clone()
        result = rush.attack(network, (own, y), BALL, "pgd", steps=2, eot_samples=2, decision="vote", max_votes=200)
        assert torch.equal(own, x)
        outcomes.append(np.concatenate([result.adversarial.flatten().numpy(), result.counts.flatten()]))
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


class OneBuffer(nn.Module):
    """Gives its logits in the same tensor at every call."""

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__()
        self.spread, self.kept = spread, torch.empty(0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = scores(x) + self.spread * torch.randn(len(x), CLASSES)
        if x.requires_grad or len(x) != len(self.kept):
            self.kept = logits.detach().clone()
            return logits
        return self.kept.copy_(logits.detach())


def test_a_network_that_reuses_its_output_is_read_before_it_writes_again() -> None:
    x, y = images(3 * 256)
    result = rush.attack(OneBuffer(), (x, y), BALL, "none")
    assert result.counts.argmax(1).tolist() == scores(x).argmax(1).tolist()
    models = _smoothed(OneBuffer()), _smoothed(Net(scores))
    one, other = (rush.certify(model, (x[:8], y[:8]), num_estimation=500) for model in models)
    assert one.counts.tolist() == other.counts.tolist()
    drawn = defend(OneBuffer(spread=0.5), CLASSES, "mean")
    assert isinstance(drawn, RandomDefender)
    draws = drawn._probabilities(x[:4], 20, stream(0, "draws"))
    assert len({draw.tobytes() for draw in draws.transpose(1, 0, 2)}) == 20


# --- what is no fixed function of one image -------------------------------------------------------------------------


class Switching(nn.Module):
    """``scores`` until a number of calls, then those of the classes in another order."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls, self.seen = calls, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return scores(x) if self.seen <= self.calls else scores(x).flip(1)


LATER = "of one image are no longer those|of an image that is in every tile depend"


Use = Callable[[nn.Module, Tensor, Tensor], object]
SMOOTHED: dict[str, Use] = {
    "certify": lambda net, x, y: rush.certify(_smoothed(net), (x, y), num_estimation=300),
    "sequential": lambda net, x, y: rush.certify(_smoothed(net), (x, y), "sequential", num_estimation=1000),
    "predict": lambda net, x, _: _smoothed(net).predict(x, 200),
    "attack": lambda net, x, y: rush.attack(
        _smoothed(net), (x, y), BALL, "pgd", steps=10, eot_samples=2, max_votes=400
    ),
    "verdict": lambda net, x, y: verdict(_smoothed(net), (x, y), x, BALL, max_votes=400),
}
PLAIN: dict[str, Use] = {
    "attack": lambda net, x, y: rush.attack(net, (x, y), BALL, "pgd", steps=40),
    "worst case": lambda net, x, y: rush.attack(net, (x, y), BALL, "worst-case"),
}


@pytest.mark.parametrize("calls", [6, 7, 12, 13, 30])
def test_a_network_that_changes_after_its_inspection_fails_whatever_used_it(calls: int) -> None:
    def vote(net: nn.Module, x: Tensor, y: Tensor) -> object:
        return rush.attack(net, (x, y), BALL, "none", decision="vote", max_votes=200)

    for use in (*SMOOTHED.values(), *PLAIN.values(), vote):
        with pytest.raises(ModelError, match=f"{LATER}|of one image depend|for the same|so it is random"):
            use(Switching(calls), *images(8))


def test_a_network_that_changed_is_no_longer_the_one_that_voted() -> None:
    x, _ = images(4)
    network = Switching(10**9)
    smoothed = _smoothed(network)
    smoothed.counts(x, 100, smoothed.streams(0, "votes", "abcd"))
    smoothed.recheck()
    network.calls = network.seen
    with pytest.raises(ModelError, match="of one image are no longer those"):
        smoothed.recheck()


@pytest.mark.parametrize("name", [*SMOOTHED, "audit"])
def test_whatever_votes_asks_again_at_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = images(8)
    y = scores(x).argmax(1)

    def refuse(_: rush.SmoothedClassifier) -> None:
        raise ModelError("asked again")

    def audit(net: nn.Module, x: Tensor, y: Tensor) -> object:
        return rush.audit(_smoothed(net), (x, y), BALL, max_votes=400)

    monkeypatch.setattr(rush.SmoothedClassifier, "recheck", refuse)
    with pytest.raises(ModelError, match="asked again"):
        SMOOTHED.get(name, audit)(Net(scores), x, y)


def _has_a_bright_pixel(x: Tensor) -> bool:
    return float(x.max()) > 1.42


def test_a_neighbour_that_matters_rarely_is_found() -> None:
    """One bright pixel anywhere turns all rows, in about one tile of eight.

    The odds that the inspection alone meets such a tile are even, and the same seed always gives the same answer.
    """
    x, y = images(16)
    network = Net(lambda x: scores(x).flip(1) if _has_a_bright_pixel(x) else scores(x))
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(_has_a_bright_pixel(given[0])))
    with pytest.raises(ModelError, match=f"{LATER}|neighbours"):
        rush.certify(_smoothed(network), (x, y), num_estimation=5000)
    assert 0 < np.mean(seen) < 0.5


def test_every_tile_is_watched_by_an_image_that_is_in_all_of_them() -> None:
    """One tile in the middle of a long certification, which no look at random tiles meets."""

    class Once(Switching):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return scores(x) + float(self.seen == self.calls) * scores(x).flip(1)

    x, y = images(16)
    calls = Switching(10**9)
    rush.certify(_smoothed(calls), (x, y), num_estimation=2000)
    for call in (30, 100, calls.seen // 2, calls.seen - 5):
        with pytest.raises(ModelError, match=LATER):
            rush.certify(_smoothed(Once(call)), (x, y), num_estimation=2000)


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, CLASSES)).eval()


LOOKING: dict[str, Callable[[], nn.Module]] = {
    "batch statistics": _batch_norm,
    "the mean of the batch": lambda: Net(lambda x: scores(x - x.mean(0))),
    "the next image": lambda: Net(lambda x: scores(x + 0.2 * x.roll(1, 0))),
    "the row": lambda: Net(lambda x: scores(x) * (1 + (torch.arange(len(x)) % 2)[:, None])),
}


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_network_that_looks_at_its_batch_is_refused_at_every_door(name: str, count: int) -> None:
    x, y = images(count)
    doors: list[Use] = [
        *SMOOTHED.values(),
        *PLAIN.values(),
        lambda net, x, y: verdict(net, (x, y), x, BALL),
        lambda net, x, y: Evaluation.of(net, (x, y), BALL, SETTINGS),
    ]
    for door in doors:
        with pytest.raises(ModelError, match=r"neighbours|its row|no running statistics"):
            door(LOOKING[name](), x, y)


class OwnGenerator(nn.Module):
    """Draws from a generator of its own, which no seed of the process pins."""

    def __init__(self, answer: Layer) -> None:
        super().__init__()
        self.answer, self.generator = answer, torch.Generator()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x) + 0.1 * torch.randn((len(x), CLASSES), generator=self.generator)


@pytest.mark.parametrize("decision", ["vote", "mean", "single"])
@pytest.mark.parametrize("own", [False, True])
def test_a_random_network_that_looks_at_its_batch_is_refused(decision: Decision, own: bool) -> None:
    x, y = images(8)

    def network(answer: Layer) -> nn.Module:
        return OwnGenerator(answer) if own else Net(lambda x: answer(x) + 0.1 * torch.randn(len(x), CLASSES))

    rush.attack(network(scores), (x, y), BALL, "none", decision=decision, max_votes=100)
    mixing: list[Layer] = [lambda x: scores(x - x.mean(0)), lambda x: scores(x + 0.5 * x.roll(1, 0))]
    for answer in mixing:
        with pytest.raises(ModelError, match=r"neighbours|depend on the other images"):
            Evaluation.of(network(answer), (x, y), BALL, SETTINGS, decision)
    noisy = nn.Sequential(_batch_norm(), Net(lambda z: z + torch.randn_like(z))).eval()
    with pytest.raises(ModelError, match="no running statistics"):
        rush.attack(noisy, (x, y), BALL, "none", decision=decision, max_votes=100)
