"""A classifier that is no fixed function of one image is found before any sample is drawn."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exact_models import Bins, square_half_space
from rush.errors import ModelError, NumericsWarning, RushWarning
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.inspection import check_forward, check_structure

TILE = 16
CLASSES = 10
CALLS = "same tile of images change from call to call, by up to .* more than rounding explains"
NEIGHBOURS = "of one image depend on its neighbours in the tile, by up to .* more than rounding explains"
POSITION = "of one image depend on its row in the tile, by up to .* more than rounding explains"

Forward = Callable[[Tensor], Tensor]

WEIGHT = torch.randn((48, CLASSES), generator=stream(0, "inspection weights")) / 7
ROWS = torch.arange(512.0)[:, None]


def _tile(count: int = TILE, size: int = 4) -> Tensor:
    generator = stream(0, "inspection", count, size)
    x = torch.rand((count, 3, size, size), generator=generator)
    return x + 0.25 * torch.randn(x.shape, generator=generator)


def plain(x: Tensor) -> Tensor:
    """A fixed function of one image, smooth and not linear; computed row by row, so that no kernel adds last bits."""
    rows = x.flatten(1)[:, :, None]
    return (rows.tanh() * WEIGHT).sum(1)


class Counter:
    """Forward that counts its calls and keeps what it was given."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.inputs.append(x.clone())
        return self.forward(x)


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rush.errors.NumericsWarning")  # last bits are the processor's
def test_layers_of_one_image_are_let_through() -> None:
    kept = nn.BatchNorm2d(4)
    kept.track_running_stats = False  # it holds its statistics and uses them in evaluation mode
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), kept, nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Dropout(), nn.Flatten(),
        nn.LayerNorm(16), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    check_structure(network)
    del network[4]
    check_forward(network, _tile())


def test_a_layer_in_training_mode_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 3)).eval()
    check_structure(network)
    network[1].train()
    with pytest.raises(ModelError, match=r"training mode \(first such layer: 1, 1 in all\).*eval\(\)"):
        check_structure(network)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d]
)
def test_a_batchnorm_without_running_statistics_is_named(layer: type[nn.Module]) -> None:
    arguments = () if layer is nn.LazyBatchNorm2d else (4,)
    bare = layer(*arguments, track_running_stats=False)
    another = nn.BatchNorm2d(4, track_running_stats=False)
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm2d(4), bare), another).eval()
    with pytest.raises(ModelError, match=r"first such layer: 1\.1, 2 in all.*neighbours.*track_running_stats=True"):
        check_structure(network)
    with pytest.raises(ModelError, match=r"\(the module itself\)"):
        check_structure(bare.eval())


@pytest.mark.filterwarnings("ignore::rush.errors.NumericsWarning")  # last bits are the processor's
def test_a_batchnorm_whose_statistics_were_taken_away_is_found_by_both_checks() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).eval()
    check_structure(network)
    check_forward(network, _tile())
    network[0].running_mean = network[0].running_var = None
    with pytest.raises(ModelError, match="first such layer: 0"):
        check_structure(network)
    with pytest.raises(ModelError, match=NEIGHBOURS):
        check_forward(network, _tile())


# --- what is let through --------------------------------------------------------------------------------------------


def _step(x: Tensor) -> Tensor:
    return F.one_hot((x.mean((1, 2, 3)) > 0.5).long(), 2).float()


FIXED: dict[str, Forward] = {
    "plain": plain,
    "constant": lambda x: torch.tensor([1.5, -0.3, 0.1]).expand(len(x), 3),
    "all equal": lambda x: torch.full((len(x), 3), 0.1),
    "all zero": lambda x: torch.zeros(len(x), 3),
    "equal in a row": lambda x: x.mean((1, 2, 3))[:, None].expand(-1, 3),
    "hard decision": _step,
    "log-probabilities": lambda x: plain(x).log_softmax(1),
    "huge": lambda x: plain(x) * 1e37,
    "tiny": lambda x: plain(x) * 1e-37,
    "far from zero": lambda x: plain(x) + 1e6,
    "half precision": lambda x: plain(x).half(),
    "overwrites its input": lambda x: plain(x.sub_(0.5)),
    "nothing for one image": lambda x: plain(x) * ~_is(x, 3),
    "not finite where it is too bright": lambda x: plain(x) / (x.mean((1, 2, 3)) < 1)[:, None],
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("count", [1, 2, 3, TILE])
def test_fixed_functions_of_one_image_pass_without_a_word(name: str, count: int) -> None:
    check_forward(FIXED[name], _tile(count))


def test_exact_models_pass() -> None:
    x = torch.rand((TILE, 1, 2, 2), generator=stream(0, "exact"))
    for model in (square_half_space(), Bins([0.2, 0.4, 0.6])):
        check_structure(model)
        check_forward(model, x)


@pytest.mark.filterwarnings("ignore::rush.errors.NumericsWarning")  # last bits are the processor's
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_networks_that_are_trained_here_pass(precision: str) -> None:
    execution = Execution(precision=precision, tile=TILE)  # type: ignore[arg-type]
    network = _resnet()
    check_structure(network)
    check_forward(lambda x: execution.tiled_logits(network, x), _tile(size=16), execution.precision)


def _resnet() -> nn.Module:
    encoder = build_encoder("resnet18", 8, 3)
    network = Classifier(Normalize([0.5] * 3, [0.25] * 3), encoder, linear_head(encoder.features, CLASSES))
    seeded_init(network, stream(0, "inspection"))
    return network.eval()


# --- the calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_four_calls_of_a_full_tile_and_the_callers_tile_unchanged(count: int) -> None:
    tile = _tile(count)
    kept = tile.clone()
    counter = Counter(FIXED["overwrites its input"])
    check_forward(counter, tile)
    assert torch.equal(tile, kept)
    assert [x.shape for x in counter.inputs] == [tile.shape] * 4
    assert torch.equal(counter.inputs[0], tile)
    assert torch.equal(counter.inputs[1], tile)
    stayed = [i for i in range(count) if torch.equal(counter.inputs[2][i], tile[i])]
    assert stayed == [i for i in range(count) if bin(i).count("1") % 2 == 0]
    assert torch.equal(counter.inputs[3][1:], tile[:-1])
    assert torch.equal(counter.inputs[3][0], tile[-1])


def test_a_single_row_is_called_twice() -> None:
    counter = Counter(lambda x: plain(x - x.mean(0)))
    check_forward(counter, _tile(1))
    assert len(counter.inputs) == 2


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    check_forward(plain, _tile())
    assert torch.equal(before, torch.random.get_rng_state())


# --- chance ---------------------------------------------------------------------------------------------------------


class Calls:
    """Logits that change with the number of the call."""

    def __init__(self, step: float) -> None:
        self.step, self.calls = step, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return plain(x) * (1 + self.step * (self.calls % 3))


class Learner(nn.Module):
    """Batch statistics that go on being averaged in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        F.batch_norm(x, self.mean, self.var, training=True)  # type: ignore[arg-type]
        return plain(F.batch_norm(x, self.mean, self.var))  # type: ignore[arg-type]


RANDOM: dict[str, Callable[[], Forward]] = {
    "dropout layer": lambda: lambda x: plain(nn.Dropout(0.1).train()(x)),
    "functional dropout": lambda: lambda x: plain(F.dropout(x, 0.1, training=True)),
    "rare dropout": lambda: lambda x: plain(F.dropout(x, 0.01, training=True)),
    "noise": lambda: lambda x: plain(x + 0.1 * torch.randn_like(x)),
    "one noise for all": lambda: lambda x: plain(x + 0.1 * torch.randn(x.shape[1:])),
    "weak noise": lambda: lambda x: plain(x + 0.02 * torch.randn_like(x)),
    "random class": lambda: lambda x: torch.rand(len(x), CLASSES),
    "a counter": lambda: Calls(0.1),
    "an average that is updated": lambda: Learner().eval(),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("count", [1, TILE])
def test_chance_and_memory_are_refused(name: str, count: int) -> None:
    """Seeded, so that a run is like another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(ModelError, match=CALLS):
            check_forward(RANDOM[name](), _tile(count))


# --- neighbours -----------------------------------------------------------------------------------------------------


def _attention() -> nn.Module:
    """A transformer that takes the images of a tile for the words of a sentence: batch_first is forgotten."""
    layer = nn.TransformerEncoderLayer(12, 2, 16)
    network = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (4, 4)), nn.Flatten(1), nn.Unflatten(1, (4, 12)), layer)
    whole = nn.Sequential(network, nn.Flatten(), nn.Linear(48, 3)).eval()
    generator = stream(0, "attention")
    with torch.no_grad():
        for weights in whole.parameters():
            if weights.ndim > 1:
                nn.init.normal_(weights, std=weights.shape[1] ** -0.5, generator=generator)
    return whole


MIXED: dict[str, Forward] = {
    "functional batch norm": lambda x: plain(F.batch_norm(x, None, None, training=True)),
    "late batch norm": lambda x: F.batch_norm(plain(x), None, None, training=True),
    "centring by the batch mean": lambda x: plain(x - x.mean(0)),
    "logits less their mean": lambda x: plain(x) - plain(x).mean(0),
    "scaling by the largest pixel": lambda x: plain(x / x.abs().max()),
    "softmax over the batch": lambda x: plain(x).softmax(0),
    "attention across the batch": _attention(),
    "an image before": lambda x: plain(x + 0.1 * x.roll(1, 0)),
    "mixing in the reversed tile": lambda x: plain(0.9 * x + 0.1 * x.flip(0)),
    "running sum": lambda x: plain(x.cumsum(0)),
    "first image": lambda x: plain(x - 0.1 * x[:1]),
    "last image": lambda x: plain(x - 0.1 * x[-1:]),
    "infinite among bright ones": lambda x: plain(x) / (x.mean() < 1).float(),
    "no number among bright ones": lambda x: plain(x) + torch.where(x.mean() < 1, 0.0, math.nan),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("count", [4, 7, TILE, 64])
def test_what_mixes_images_is_refused(name: str, count: int) -> None:
    with pytest.raises(ModelError, match=f"{NEIGHBOURS}|{POSITION}") as caught:
        check_forward(MIXED[name], _tile(count))
    if name not in {"mixing in the reversed tile", "first image", "last image"}:  # some are seen by moving rows alone
        assert "neighbours" in str(caught.value)
    assert ("by up to inf where" in str(caught.value)) == ("among bright ones" in name)


@pytest.mark.parametrize("count", range(2, 34))
def test_pairs_at_any_distance_are_found_in_tiles_of_any_size(count: int) -> None:
    """One partner is enough, whichever it is: at a distance, mirrored, in the same pair or in the other half."""
    tile = _tile(count)
    partners = [torch.arange(count).roll(distance) for distance in range(1, count)]
    partners += [torch.arange(count).flip(0), (torch.arange(count) ^ 1).clamp(max=count - 1)]
    for partner in partners:
        with pytest.raises(ModelError, match=f"{NEIGHBOURS}|{POSITION}"):
            check_forward(lambda x, partner=partner: plain(x + 0.1 * x[partner]), tile)  # type: ignore[misc]


def test_images_that_are_all_the_same_do_not_hide_it() -> None:
    tile = _tile(1).expand(TILE, -1, -1, -1)
    check_forward(plain, tile)
    with pytest.raises(ModelError, match=NEIGHBOURS):
        check_forward(MIXED["centring by the batch mean"], tile)
    with pytest.raises(ModelError, match=POSITION):
        check_forward(PLACED["row number"], tile)


@pytest.mark.parametrize("pixels", [torch.zeros, torch.ones])
def test_black_or_white_images_do_not_hide_it(pixels: Callable[..., Tensor]) -> None:
    tile = pixels(TILE, 3, 4, 4)
    tile[::2] += 0.01 * _tile()[::2]
    with pytest.raises(ModelError, match=NEIGHBOURS):
        check_forward(MIXED["logits less their mean"], tile)


# --- position -------------------------------------------------------------------------------------------------------


def _seeded_noise(x: Tensor) -> Tensor:
    return plain(x + 0.1 * torch.randn(x.shape, generator=stream(0, "fixed")))


PLACED: dict[str, Forward] = {
    "row number": lambda x: plain(x) + torch.linspace(0, 1, len(x))[:, None],
    "first row": lambda x: plain(x) * (1 + 0.1 * (ROWS[: len(x)] == 0)),
    "last row": lambda x: plain(x) * (1 + 0.1 * (ROWS[: len(x)] == len(x) - 1)),
    "every other row": lambda x: plain(x) * (1 + 0.1 * (ROWS[: len(x)] % 2)),
    "second half": lambda x: plain(x) * (1 + 0.1 * (ROWS[: len(x)] >= len(x) / 2)),
    "distance from the middle": lambda x: plain(x) * (1 + 0.1 * (ROWS[: len(x)] - (len(x) - 1) / 2 + 0.3).abs()),
    "noise of a fixed seed": _seeded_noise,
}


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("count", [2, 3, 5, TILE])
def test_what_depends_on_the_row_is_refused(name: str, count: int) -> None:
    with pytest.raises(ModelError, match=POSITION):
        check_forward(PLACED[name], _tile(count))


# --- how much -------------------------------------------------------------------------------------------------------


def _moved(size: float, scale: float = 1.0, offset: float = 0.0) -> dict[str, Forward]:
    """Logits of spread ``scale`` that move by ``size`` of it: with the call, with the neighbours, with the row."""
    calls: list[None] = []

    def by_call(x: Tensor) -> Tensor:
        calls.append(None)
        return scale * (_even(x) + size * (len(calls) % 2)) + offset

    return {
        "change from call to call": by_call,
        "depend on its neighbours": lambda x: scale * (_even(x) + size * (x.mean() > 1)) + offset,
        "depend on its row": lambda x: scale * (_even(x) + size * (ROWS[: len(x)] % 2)) + offset,
    }


def _even(x: Tensor) -> Tensor:
    """Logits of mean 0 and standard deviation 1 over the classes."""
    logits = plain(x)
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)


KINDS = tuple(_moved(0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-30, 0.0), (1e30, 0.0), (1.0, 1e4), (1e-3, 0.0)])
def test_differences_are_judged_by_the_spread_of_the_logits(kind: str, scale: float, offset: float) -> None:
    with pytest.raises(ModelError, match=kind):
        check_forward(_moved(0.02, scale, offset)[kind], _tile())
    with pytest.warns(NumericsWarning, match=f"{kind}.*which may be rounding.*votes") as caught:
        check_forward(_moved(0.01, scale, offset)[kind], _tile())
    assert f"{0.01 * scale:.2g} where" in str(caught[0].message) or offset
    assert len(caught) == 1
    assert issubclass(NumericsWarning, RushWarning)
    assert issubclass(RushWarning, UserWarning)


def test_a_forward_with_every_difference_is_warned_of_once() -> None:
    """What changes from call to call differs in every comparison."""
    by_call, by_row = (_moved(0.001)[kind] for kind in (KINDS[0], KINDS[2]))
    with pytest.warns(NumericsWarning, match=KINDS[0]) as caught:
        check_forward(lambda x: by_call(x) + by_row(x), _tile())
    assert len(caught) == 1
    large = _moved(0.1)[KINDS[2]]
    with pytest.raises(ModelError, match=KINDS[2]):  # a small difference does not excuse a large one
        check_forward(lambda x: by_call(x) + large(x), _tile())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_more(kind: str) -> None:
    with pytest.raises(ModelError, match=kind):
        check_forward(_moved(0.15)[kind], _tile(), "bfloat16")
    with pytest.warns(NumericsWarning, match=kind):
        check_forward(_moved(0.1)[kind], _tile(), "bfloat16")
    with pytest.raises(ModelError, match=kind):
        check_forward(_moved(0.1)[kind], _tile(), "float32")
    rounded = _moved(0.1)[kind]  # a classifier may compute in bfloat16 by itself; its logits tell
    with pytest.warns(NumericsWarning, match=kind):
        check_forward(lambda x: rounded(x).bfloat16(), _tile(), "float32")


def test_the_rounding_of_a_deep_network_in_bfloat16_is_no_dependence() -> None:
    """Even rows in bfloat16, odd ones in float32 with rounded logits: more than two kernels of one precision differ."""
    network, tile = _resnet(), _tile(size=16)
    coarse, fine = Execution(precision="bfloat16"), Execution()

    def two_kernels(x: Tensor) -> Tensor:
        return torch.where(ROWS[: len(x)] % 2 == 0, coarse.logits(network, x), fine.logits(network, x).bfloat16())

    with pytest.warns(NumericsWarning, match="depend on its row"):
        check_forward(two_kernels, tile)
    with pytest.raises(ModelError, match=POSITION):
        check_forward(lambda x: two_kernels(x) * (1 + 0.2 * (ROWS[: len(x)] % 2)), tile)


@pytest.mark.parametrize(("offset", "dtype"), [(1e6, torch.float32), (10.0, torch.bfloat16), (1e3, torch.float16)])
def test_logits_far_from_zero_round_by_their_magnitude(offset: float, dtype: torch.dtype) -> None:
    """Last bits of 1e6 are 6 % of a spread of 1."""
    with pytest.warns(NumericsWarning, match="row in the tile"):
        check_forward(
            lambda x: ((_even(x) + offset).to(dtype) * (1 + torch.finfo(dtype).eps * (ROWS[: len(x)] % 2))).to(dtype),
            _tile(),
        )


def test_a_constant_whose_last_bit_changes_is_a_warning_and_more_is_an_error() -> None:
    one = torch.full((TILE, 3), 1 / 3)
    with pytest.warns(NumericsWarning, match="row in the tile"):
        check_forward(lambda x: one * (1 + 2**-23 * (ROWS[: len(x)] % 2)), _tile())
    with pytest.raises(ModelError, match=POSITION):
        check_forward(lambda x: one * (1 + 1e-5 * (ROWS[: len(x)] % 2)), _tile())


def _is(x: Tensor, row: int) -> Tensor:
    """Where the images ``x`` are the one at ``row`` of the tile, (B, 1)."""
    return x[:, :1, 0, 0] == _tile()[row, 0, 0, 0]


def test_one_image_of_huge_logits_hides_no_other() -> None:
    """Nor is its own rounding, a millionth of them, taken for more."""

    def uneven(x: Tensor, moved: float) -> Tensor:
        odd = ROWS[: len(x)] % 2
        return torch.where(_is(x, 0), 1e6 * _even(x) * (1 + 1e-6 * odd), _even(x) + moved * odd)

    with pytest.raises(ModelError, match=POSITION) as caught:
        check_forward(lambda x: uneven(x, 0.05), _tile())
    assert "by up to 0.05 where those of an image have a standard deviation of 1," in str(caught.value)
    with pytest.warns(NumericsWarning, match="row in the tile"):
        check_forward(lambda x: uneven(x, 0.0), _tile())


def test_one_image_of_logits_that_are_not_zero_is_judged_by_its_own() -> None:
    def single(x: Tensor, moved: float) -> Tensor:
        return torch.where(_is(x, 3), _even(x), 0.0) + moved * _is(x, 5) * (ROWS[: len(x)] % 2)

    check_forward(lambda x: single(x, 0.0), _tile())
    with pytest.raises(ModelError, match=POSITION):
        check_forward(lambda x: single(x, 0.01), _tile())


def test_an_image_whose_logits_tie_is_judged_by_the_others() -> None:
    """A tie has no spread of its own; the rounding on the way to it is that of the whole tile."""

    def tied(x: Tensor) -> Tensor:
        logits = torch.where(_is(x, 3), 0.1, _even(x))
        return logits + 0.005 * (ROWS[: len(x)] % 2)

    with pytest.warns(NumericsWarning, match="row in the tile"):
        check_forward(tied, _tile())


# --- logits that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        check_forward(lambda x: torch.where(ROWS[: len(x)] == 5, value, plain(x)), _tile())


@pytest.mark.parametrize("wrong", [lambda x: plain(x)[:, 0], lambda x: plain(x).mean(0, keepdim=True), torch.clone])
def test_logits_of_another_shape_are_refused(wrong: Forward) -> None:
    text = r"one logit per image \(shape \(16,\)\)|logits of shape \(.*\) for 16 images, expected \(16, classes\)"
    with pytest.raises(ModelError, match=text):
        check_forward(wrong, _tile())
