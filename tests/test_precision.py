"""The one forward: a sample's logits depend on neither its row nor its neighbours, in any precision."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from exact_models import Recorder
from rush.certification.certify import certify
from rush.choices import EncoderName, Precision
from rush.errors import ConfigError, ModelError
from rush.models.classifier import Classifier, Normalize
from rush.models.encoders import build_encoder
from rush.models.heads import linear_head
from rush.runtime.execution import Execution, check_eval_mode, decide_execution, foreign_call, without_tf32
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier

TILE = 64


def _classifier(name: EncoderName, execution: Execution) -> nn.Module:
    encoder = build_encoder(name, 8, 3)
    network = Classifier(Normalize([0.5] * 3, [0.25] * 3), encoder, linear_head(encoder.features, 10))  # type: ignore[arg-type]
    seeded_init(network, stream(0, "precision", name))
    return execution.place(network).eval()


def _images(count: int) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=stream(0, "precision images"))


@pytest.fixture(params=["float32", "bfloat16"])
def execution(request: pytest.FixtureRequest) -> Execution:
    """Both precisions run on every processor; where bfloat16 is not native it is emulated."""
    precision: Precision = request.param
    return Execution(precision=precision, channels_last=precision == "bfloat16", tile=TILE)


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_logits_depend_on_neither_row_nor_neighbours_nor_padding(name: EncoderName, execution: Execution) -> None:
    """To the bit: alone in a padded tile, at any row of a full one, among others, in the last unfinished tile."""
    network, x = _classifier(name, execution), _images(150)
    whole = execution.tiled_logits(network, x)
    assert len(whole.unique(dim=0)) == 150
    order = torch.randperm(150, generator=stream(0, "order"))
    assert torch.equal(execution.tiled_logits(network, x[order]), whole[order])
    for row in (0, 17, 63, 64, 149):
        assert torch.equal(execution.tiled_logits(network, x[row : row + 1]), whole[row : row + 1])
    copies = x[3:4].expand(TILE, -1, -1, -1)
    assert torch.equal(execution.tiled_logits(network, copies), whole[3:4].expand(TILE, -1))
    assert torch.equal(execution.tiled_logits(network, x[5:42]), whole[5:42])


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_votes_depend_on_no_tile_mate(name: EncoderName, execution: Execution) -> None:
    smoothed = SmoothedClassifier(_classifier(name, execution), 0.5, 10, execution=execution)
    x, ids = _images(5), list("abcde")
    whole = smoothed.vote_blocks(x, 130, smoothed.streams(0, "test", ids))
    assert (whole.sum((0, 1)) > 0).sum() > 1
    for chosen in ([2], [4, 1]):
        part = smoothed.vote_blocks(x[chosen], 130, smoothed.streams(0, "test", [ids[i] for i in chosen]))
        assert torch.equal(part, whole[chosen])


def test_the_last_tile_is_filled_and_its_padding_dropped() -> None:
    recorder = Recorder(nn.Flatten())
    x = _images(10)
    logits = Execution(tile=4).tiled_logits(recorder, x)
    assert [len(batch) for batch in recorder.inputs] == [4, 4, 4]
    assert torch.equal(logits, x.flatten(1))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 8, 8), 256), ((3, 32, 32), 256), ((3, 32, 33), 128), ((3, 64, 64), 64), ((3, 96, 96), 16), ((1, 900, 9), 32)],
)
def test_the_rows_of_a_tile_follow_from_the_size_of_the_images_unless_given(
    shape: tuple[int, int, int], rows: int
) -> None:
    """In every batch that is judged: of networks, of votes and of a smoothed classifier whose shape is not known."""
    assert (Execution().rows(shape), Execution(tile=50).rows(shape)) == (rows, 50)
    recorder, x = (
        Recorder(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())),
        torch.rand((2, *shape), generator=stream(0, "x")),
    )
    Execution().tiled_logits(recorder, x)
    smoothed = SmoothedClassifier(recorder, 0.25, 4 * shape[0])
    certificates = certify(smoothed, (x, torch.zeros(2, dtype=torch.int64)), num_selection=20, num_estimation=90)
    assert {len(batch) for batch in recorder.inputs} == {rows}
    given = SmoothedClassifier(recorder, 0.25, 4 * shape[0], execution=Execution(tile=rows))
    again = certify(given, (x, torch.zeros(2, dtype=torch.int64)), num_selection=20, num_estimation=90)
    assert (certificates.counts == again.counts).all()


def test_bfloat16_computes_in_bfloat16_and_returns_float32() -> None:
    x = _images(8)
    exact = Execution().tiled_logits(_classifier("small", Execution()), x)
    half = Execution(precision="bfloat16")
    rounded = half.tiled_logits(_classifier("small", half), x)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_tiled_logits_are_those_that_gradients_flow_through(execution: Execution) -> None:
    network, x = _classifier("small", execution), _images(TILE)
    leaf = x.clone().requires_grad_(True)
    logits = execution.logits(network, leaf)
    assert logits.requires_grad
    torch.testing.assert_close(logits.detach(), execution.tiled_logits(network, x), rtol=0.02, atol=0.02)
    assert not execution.tiled_logits(network, leaf).requires_grad
    (gradient,) = torch.autograd.grad(logits.sum(), leaf)
    assert gradient.dtype == torch.float32
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_the_layout_changes_no_value() -> None:
    x = _images(2)
    laid = Execution(channels_last=True).layout(x)
    assert laid.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid, x)


def test_a_device_that_is_not_there_is_refused() -> None:
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"device '{absent}' cannot be used.*use auto, cpu, cuda or mps"):
        decide_execution(absent)
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        decide_execution("gpu")


def test_what_is_asked_for_is_decided_and_recorded() -> None:
    decided = decide_execution("cpu", "bfloat16", tile=32)
    expected = {"device": "cpu", "precision": "bfloat16", "tile": 32, "threads": torch.get_num_threads()}
    assert {name: getattr(decided, name) for name in expected} == expected
    assert {name: decided.as_dict()[name] for name in expected} == expected
    assert decide_execution("cpu", "float32").precision == "float32"


@pytest.fixture
def kernel_flags() -> Iterator[Callable[[], dict[str, object]]]:
    """What torch's flags for CUDA kernels are, which can be set without a device; put back afterwards."""

    def flags() -> dict[str, object]:
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        return {
            "deterministic": cudnn.deterministic,
            "benchmark": cudnn.benchmark,
            "tf32": (products.allow_tf32, cudnn.allow_tf32),
        }

    before = flags()
    yield flags
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["deterministic"], before["benchmark"]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before["tf32"]  # type: ignore[misc]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("bfloat16", True)])
def test_kernels_are_chosen_by_the_execution_on_cuda_alone(
    deterministic: bool, precision: Precision, tf32: bool, kernel_flags: Callable[[], dict[str, object]]
) -> None:
    before = kernel_flags()
    Execution("cpu", precision, deterministic=deterministic).configure()
    assert kernel_flags() == before
    execution = Execution("cuda:0", precision, deterministic=deterministic)
    assert execution.configure() is execution
    expected = {"deterministic": deterministic, "benchmark": not deterministic, "tf32": (tf32, tf32)}
    assert kernel_flags() == expected
    with without_tf32("cuda"):
        assert kernel_flags() == {**expected, "tf32": (False, False)}
    assert kernel_flags() == expected


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_a_configured_process_reuses_the_memory_of_freed_tensors_without_clearing_its_pages() -> None:
    program = """
import resource, torch
from rush.runtime.execution import Execution
Execution("cpu").configure()
def fill():
    for _ in range(20):
        torch.ones(12_000_000)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
before = faults()
fill()
print(faults() - before)
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 1000  # 11,700 pages of 4 KiB for each of the 20 tensors, when they are cleared


def test_an_execution_of_fastest_kernels_is_another_one_and_others_keep_the_text_that_fingerprints_are_made_of() -> (
    None
):
    usual = Execution(tile=100, threads=1)
    assert repr(usual) == (
        "Execution(device='cpu', precision='float32', channels_last=False, tile=100, threads=1, folded=False, "
        "compile_mode='none')"
    )
    assert repr(Execution()) == repr(Execution(tile=256))
    assert repr(replace(usual, deterministic=False)) == f"{repr(usual)[:-1]}, deterministic=False)"
    assert usual.as_dict()["deterministic"] is True
    assert decide_execution("cpu", deterministic=False).as_dict()["deterministic"] is False


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")],
)
def test_a_network_that_finds_no_memory_is_not_blamed(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, foreign_call(torch.zeros(1, 1, 2, 2)):
        raise error
    assert raised.value is error


def test_a_layer_in_training_mode_is_named() -> None:
    network = _classifier("resnet18", Execution())
    check_eval_mode(network)
    network.get_submodule("encoder.stages.2.norm1").train()
    with pytest.raises(ModelError, match=r"encoder\.stages\.2\.norm1, 1 in all.*call classifier\.eval\(\) first"):
        check_eval_mode(network)
    with pytest.raises(ModelError, match=r"\(the module itself\)"):
        check_eval_mode(nn.Identity())
