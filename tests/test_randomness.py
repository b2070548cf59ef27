"""Streams: what they depend on, how many bits of their name they keep, and weights that come from them alone."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from rush.errors import InputError
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head, projector
from rush.runtime.lines import escape
from rush.runtime.randomness import seeded_init, stream

GOLDEN = [229167, 447017, 161932, 65489]


def numbers(seed: int, *names: str | int, count: int = 64) -> list[int]:
    return torch.randint(0, 2**20, (count,), generator=stream(seed, *names)).tolist()


def key(*parts: str | int) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


@pytest.mark.parametrize("name", [(0, "certify", "digits-0001"), (7,), (2**70, "a", 3)])
def test_a_stream_is_the_mersenne_twister_whose_words_numpy_fills_from_sha256_of_the_name(
    name: tuple[int, str | int],
) -> None:
    twister = np.random.MT19937()
    words = np.random.SeedSequence(int.from_bytes(key(*name), "little")).generate_state(624).astype(np.uint32)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    # 2,000 numbers: three refills of the 624 words
    assert numbers(*name, count=2000) == (twister.random_raw(2000) % 2**20).tolist()


def test_published_numbers_stay_what_they_are() -> None:
    # A change here changes every certificate that was ever computed: it needs a new format of the run folder.
    assert numbers(0, "certify", "digits-0001", count=4) == GOLDEN


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a"), (1, "a")),
        ((0, "a"), (0, "b")),
        ((0, "1"), (0, 1)),
        ((0, "a", "b"), (0, "ab")),
        ((0, "a", "b"), (0, "b", "a")),
        ((0, "a"), (0, "a", "")),
        ((0, 1, 2), (0, 12)),
        ((0, "a', 'b"), (0, "a", "b")),
        ((0, 5), (5, 0)),
        ((0,), (2**32,)),
        ((1, "a"), (2**64 + 1, "a")),
    ],
)
def test_names_that_differ_in_anything_give_unrelated_numbers(
    one: tuple[int, str | int], other: tuple[int, str | int]
) -> None:
    first, second = numbers(*one), numbers(*other)
    # 64 equal pairs of 20 bits by chance: each 2**-20; one is seen with odds of 6e-5, two of 2e-9
    assert sum(a == b for a, b in zip(first, second, strict=True)) <= 1


def test_streams_whose_first_32_bits_agree_are_still_unrelated() -> None:
    """``manual_seed`` keeps 32 bits on the CPU: the two names found here would share every number."""
    one, other = colliding_names()
    low = [int.from_bytes(key(0, name)[:8], "little") for name in (one, other)]
    assert low[0] != low[1]
    weak = [torch.randint(0, 2**20, (8,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in low]
    assert weak[0] == weak[1], "torch's own seeding keeps more bits now; the state need not be filled by hand"
    assert numbers(0, one) != numbers(0, other)
    words = [stream(0, name).get_state()[24 : 24 + 8 * 624].view(torch.int64) for name in (one, other)]
    # a word agrees by chance with odds of 2**-32
    assert int((words[0] == words[1]).sum()) == 0


def colliding_names() -> tuple[str, str]:
    """Two names whose keys share the low 32 bits; among 300,000 fixed names there are about ten such pairs."""
    seen: dict[bytes, str] = {}
    for number in range(300_000):
        name = f"image-{number}"
        low = key(0, name)[:4]
        if low in seen:
            return seen[low], name
        seen[low] = name
    raise AssertionError("no two names collide; look further")


def test_a_stream_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = numbers(0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert numbers(0, "a") == first


def test_normal_numbers_do_not_start_with_one_left_over_from_another_stream() -> None:
    used = stream(0, "a")
    torch.randn(1, generator=used)  # torch keeps the second of a pair of normal numbers for the next call
    fresh = [torch.randn(3, generator=stream(0, "b")).tolist() for _ in range(2)]
    assert fresh[0] == fresh[1]


def test_text_of_numpy_names_the_same_stream_as_plain_text() -> None:
    # NumPy 2 prints np.str_('a'), NumPy 1 'a': an id taken from an array of ids must not name another stream
    assert numbers(0, np.array(["digits-0001"])[0]) == numbers(0, "digits-0001")


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", None])
def test_a_seed_that_is_no_non_negative_integer_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed must be an integer >= 0, got"):
        stream(seed, "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, 1.5, True, ("a",), b"a", np.int64(3)])
def test_a_name_that_is_neither_text_nor_integer_is_refused(name: object) -> None:
    with pytest.raises(InputError, match=r"stream names must be str or int, got .* of type"):
        stream(0, "a", name)  # type: ignore[arg-type]


def small_classifier() -> Classifier:
    encoder = build_encoder("small", 4, 1)
    return Classifier(Normalize([0.3], [0.4]), encoder, linear_head(64, 10))


def initial(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    return seeded_init(module, stream(seed, "weights")).state_dict()


def test_initial_weights_do_not_depend_on_the_global_generator_and_leave_it_alone() -> None:
    torch.manual_seed(1)
    one = small_classifier()
    torch.manual_seed(2)
    other = small_classifier()
    assert not torch.equal(one.head.weight, other.head.weight)  # type: ignore[arg-type]  # torch's own draws differ
    before = torch.get_rng_state()
    first, second = initial(one), initial(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = initial(small_classifier(), seed=1)
    drawn = [name for name in first if first[name].ndim > 1 and "normalize" not in name] + ["head.bias"]
    assert len(drawn) == 5
    assert not any(torch.equal(first[name], again[name]) for name in drawn)


@pytest.mark.parametrize(
    "module",
    [build_encoder("resnet18", 4, 3), build_encoder("small", 4, 1), projector(16, 8, 4), linear_head(16, 10)],
    ids=["resnet18", "small", "projector", "head"],
)
def test_no_weight_and_no_statistic_survives_from_before(module: nn.Module) -> None:
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    assert all(bool(tensor.isfinite().all()) for tensor in initial(module).values())


def test_initial_weights_have_the_documented_spread() -> None:
    convolution, linear = nn.Conv2d(32, 64, 3), nn.Linear(400, 100)
    initial(nn.ModuleList([convolution, linear]))
    # standard error of a standard deviation over 18,432 numbers is 0.5 %; five of them: odds below 1e-6
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.026)
    largest = linear.weight.abs().max().item()
    assert 0.0499 < largest <= 0.05  # of 40,000 uniform draws; all below 0.0499: odds (0.998)**40000 < 1e-34


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\tb", "a\u2028b", "\0", "\x1b[31m"])
def test_any_image_id_names_a_stream_of_its_own(name: str) -> None:
    """Also bytes of a file name that are not UTF-8; what it looks like when escaped is another name."""
    drawn = [torch.rand(4, generator=stream(0, "certify", text)).tolist() for text in (name, escape(name), "plain")]
    assert drawn[0] not in drawn[1:]
    assert drawn[0] == torch.rand(4, generator=stream(0, "certify", name)).tolist()
