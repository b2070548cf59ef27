"""Hostile and broken models, recipes and run folders: each is refused by an error that names it, within bounds."""

import json
import os
import struct
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rush
from bounded import refused
from rush.errors import ConfigError
from rush.models.description import read_description
from rush.models.storage import ClassifierSpec, load_smoothed, save_plain, save_smoothed
from rush.recipe.load import load_recipe
from rush.records.folder import RunFolder
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.noise import Gaussian
from tiny import TINY, write_tiny

HUGE = 10**400
SPEC = ClassifierSpec("small", 2, 1, [0.5], [0.25], tuple("0123456789"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A smoothed classifier as a finished run leaves it."""
    classifier = seeded_init(SPEC.build(), stream(0, "weights"))
    save_smoothed(tmp_path / "model", classifier, SPEC, Gaussian(0.25), Execution(tile=64), (1, 8, 8))
    return tmp_path


def load(folder: Path) -> Any:
    return rush.load(folder, device="cpu")


def change(folder: Path, place: str, value: Any) -> None:
    """Put ``value`` at the dotted ``place`` of model.json; ``...`` takes the place away."""
    file = folder / "model/model.json"
    description = json.loads(file.read_text())
    *path, last = place.split(".")
    part = description
    for key in path:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    file.write_text(json.dumps(description))


CHANGES = [
    *(("execution.tile", value) for value in (0, -1, 2.5, 1e10, True, "64", None, [64], 65537, HUGE, 64.0)),
    *(
        ("noise.sigma", value)
        for value in (HUGE, -HUGE, float("nan"), float("inf"), "0.25", -1, 0, True, None, [1], 1e300)
    ),
    *(("execution.precision", value) for value in ("float8", "auto", "", 32, None, ["float32"])),
    *(("execution.compile_mode", value) for value in ("max-autotune", "auto", "", True, None, {})),
    *(("execution.folded", value) for value in ("false", 1, None)),
    *(("classifier.width", value) for value in (0, -1, 10**9, HUGE, 2.0, True, "2", None)),
    *(("classifier.in_channels", value) for value in (0, 3, 10**9, HUGE, True)),
    *(("classifier.mean", value) for value in ([], [0.5, 0.5], ["0.5"], [None], 0.5, [float("nan")], [HUGE], [1e300])),
    *(("classifier.std", value) for value in ([0], [-1.0], [float("inf")], [1e-300], [True])),
    *(
        ("classifier.classes", value)
        for value in ([], ["a"], ["a"] * 10, list(range(10)), "0123456789", None, {"a": 1})
    ),
    ("classifier.classes", ["a", "", *"cdefghij"]),
    ("classifier.classes", [str(k) for k in range(100_001)]),
    *(("classifier.encoder", value) for value in ("vit", 3, None, "x" * 10_000, ["small"])),
    *(("classifier.stem", value) for value in ("none", "standard", 3, None)),
    ("classifier.heads", 2),
    *(("image_shape", value) for value in ([], [1, 8], [1, 8, 8, 8], [3, 8, 8], [1, 0, 8], [1, -8, 8], [1, 8.0, 8])),
    *(("image_shape", value) for value in ([1, 65536, 65536], [1, HUGE, 8], "188", None, [True, 8, 8], {"a": 1})),
    *(("classes", value) for value in (["a"], 3, list(range(10)))),
    *(("resized", value) for value in ("yes", 1, None)),
    *(("format", value) for value in (2, "1", None, HUGE, True, [1], 1.5)),
    *(("noise.name", value) for value in ("cauchy", None, ["gaussian"], {}, 3, "none")),
    *((place, ...) for place in ("format", "noise", "noise.name", "noise.sigma")),
    *((place, ...) for place in ("classifier", "classifier.std", "classifier.width")),
    *((place, ...) for place in ("execution", "execution.tile", "execution.precision", "image_shape")),
    *((place, value) for place in ("noise", "classifier", "execution") for value in (None, [], "x", 3)),
]


@pytest.mark.parametrize(
    ("place", "value"), CHANGES, ids=[f"{k}-{place}-{str(v)[:20]}" for k, (place, v) in enumerate(CHANGES)]
)
def test_a_description_that_says_what_cannot_be_is_refused(place: str, value: Any, folder: Path) -> None:
    change(folder, place, value)
    with pytest.raises(rush.errors.RunError) as caught:
        load(folder)
    told = str(caught.value)
    assert str(folder / "model/model.json") in told
    assert "restore it" in told or "update rush-smoothing" in told or "allowed" in told or "only 'small'" in told
    assert "\n" not in told
    assert len(told) < 1200


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("format", 99, "format 99, this version reads 1; update"),
        (
            "noise.name",
            "cauchy",
            "noise 'cauchy', this version supports gaussian, discrete, uniform, laplace, splitting, none; ",
        ),
        ("classifier.encoder", "vit", r"model\.json: unknown encoder 'vit'"),
        ("classifier.stem", "none", r"model\.json: unknown stem 'none'"),
        ("classifier.stem", "standard", r"model\.json: encoder 'small' has no 'standard' stem"),
    ],
)
def test_what_this_version_does_not_have_is_named(place: str, value: Any, text: str, folder: Path) -> None:
    change(folder, place, value)
    with pytest.raises(rush.errors.RunError, match=text):
        load(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / "model" / name).unlink()
    with pytest.raises(rush.errors.RunError, match=f"{name} is missing"):
        load(folder)


def stored(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model/model.json").write_bytes(content)


def placed(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """``make`` something in the place of a file of the model."""

    def damage(folder: Path) -> None:
        (folder / "model" / name).unlink()
        make(folder / "model" / name)

    return damage


def headed(length: int, header: bytes, rest: bytes = b"") -> Callable[[Path], object]:
    return lambda folder: (folder / "model/model.safetensors").write_bytes(struct.pack("<Q", length) + header + rest)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / "model" / name, (folder / "model" / name).stat().st_size // 2)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "model/model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return damage


def tensor(length: int, start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}


def claimed(*entries: dict[str, Any]) -> Callable[[Path], object]:
    header = json.dumps(dict(zip("xy", entries, strict=False))).encode()
    return headed(len(header), header, bytes(64))


def wide(folder: Path) -> None:
    """A network of 26 GB in a file of some hundred bytes."""
    for place, value in (("encoder", "resnet50"), ("width", 1024)):
        change(folder, f"classifier.{place}", value)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep nesting": (stored(b"[" * 200_000 + b"]" * 200_000), "model.json is damaged"),
    "deep objects": (stored(b'{"a":' * 200_000), "model.json is damaged"),
    "an integer of 10,000 digits": (stored(b'{"format": ' + b"9" * 10_000 + b"}"), "model.json is damaged"),
    "not UTF-8": (stored(b'{"format": "\xff"}'), "model.json is damaged"),
    "UTF-16": (stored("{}".encode("utf-16")), "model.json is damaged"),
    "empty": (stored(b""), "model.json is damaged"),
    "a number": (stored(b"1"), "model.json is damaged"),
    "null": (stored(b"null"), "model.json is damaged"),
    "a list": (stored(b"[1]"), "model.json is damaged"),
    "truncated": (cut("model.json"), "model.json is damaged"),
    "long": (placed("model.json", lambda p: (p.touch(), os.truncate(p, 3 << 30))), "more than 16777216 bytes"),
    "a pipe": (placed("model.json", os.mkfifo), "model.json is damaged (it is a pipe"),
    "a directory": (placed("model.json", os.mkdir), "model.json is damaged (it is a directory"),
    "a device": (placed("model.json", lambda p: p.symlink_to("/dev/zero")), "model.json is damaged (it is a pipe"),
    "a wide network": (wide, "model.safetensors does not fit"),
    "a header of 2^62 bytes": (headed(2**62, b"{}"), "model.safetensors does not fit or is damaged"),
    "a header of 90 MB": (headed(90 << 20, b"{}"), "model.safetensors does not fit or is damaged"),
    "a nested header": (headed(100_000, b"[" * 50_000 + b"]" * 50_000), "does not fit or is damaged"),
    "a header that is no object": (headed(2, b"[]"), "model.safetensors does not fit or is damaged"),
    "a header that is no text": (headed(4, b"\xff" * 4), "model.safetensors does not fit or is damaged"),
    "a tensor of 10^15 bytes": (claimed(tensor(10**15, 0, 4 * 10**15)), "does not fit or is damaged"),
    "a negative shape": (claimed(tensor(-1, 0, 4)), "does not fit or is damaged"),
    "an unknown type": (claimed(tensor(1, 0, 4, "X9")), "does not fit or is damaged"),
    "overlapping tensors": (claimed(tensor(8, 0, 32), tensor(8, 16, 48)), "does not fit or is damaged"),
    "a tensor less": (tensors(lambda w: w.pop("head.bias")), "'head.bias' is missing"),
    "a tensor more": (tensors(lambda w: w.update(more=torch.zeros(2))), "'more' is ((2,), 'F32'), expected none"),
    "another shape": (tensors(lambda w: w.update({"head.bias": torch.zeros(9)})), "'head.bias' is ((9,), 'F32')"),
    "another type": (
        tensors(lambda w: w.update({"head.bias": torch.zeros(10).half()})),
        "'head.bias' is ((10,), 'F16')",
    ),
    "integers": (tensors(lambda w: w.update({"head.bias": torch.zeros(10).long()})), "'head.bias' is ((10,), 'I64')"),
    "weights in a pipe": (placed("model.safetensors", os.mkfifo), "model.safetensors is a pipe"),
    "weights in a directory": (placed("model.safetensors", os.mkdir), "model.safetensors is a directory"),
    "weights on a device": (placed("model.safetensors", lambda p: p.symlink_to("/dev/zero")), "safetensors is a pipe"),
    "truncated weights": (cut("model.safetensors"), "model.safetensors does not fit or is damaged"),
    "empty weights": (placed("model.safetensors", Path.touch), "model.safetensors does not fit or is damaged"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_before_it_takes_memory(
    name: str, folder: Path, processes: ForkServerContext
) -> None:
    damage, text = DAMAGES[name]
    damage(folder)
    told = refused(processes, load, folder)
    assert text in told
    assert str(folder / "model") in told
    assert "restore it" in told


def test_a_byte_order_mark_before_a_description_is_read_over(folder: Path) -> None:
    file = folder / "model/model.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(folder).num_classes == 10


def test_what_older_versions_did_not_write_is_filled_in(folder: Path) -> None:
    omitted = ("execution.folded", "execution.compile_mode", "execution.channels_last")
    for place in (*omitted, "classes", "resized", "classifier.stem"):
        change(folder, place, ...)
    description = read_description(folder / "model")
    defaults = {"folded": False, "compile_mode": "none", "channels_last": False}
    assert description["execution"] == {"precision": "float32", "tile": 64, **defaults}
    assert (description["classes"], description["resized"]) == (list("0123456789"), False)
    assert description["classifier"]["stem"] == "small"
    assert load_smoothed(folder / "model", Execution()).num_classes == 10


def test_a_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    classifier = seeded_init(SPEC.build(), stream(0, "weights"))
    save_plain(tmp_path, classifier, SPEC, "cpu", (1, 8, 8), True)
    description = read_description(tmp_path)
    defaults = {"noise": {"name": "none", "sigma": None}, "activations": None}
    assert description == json.loads((tmp_path / "model.json").read_text()) | defaults
    assert description["resized"] is True


RECIPES: dict[str, tuple[bytes, str]] = {
    "a long line": (b"x = " + b"[" * 30_000 + b"]" * 30_000, "a line of more than 4096 bytes"),
    "deep lists": (b"x = " + b"[" * 2000 + b"]" * 2000, "is not valid TOML"),
    "lists on lines of their own": (b"x = " + b"[\n" * 15_000 + b"]\n" * 15_000, "is not valid TOML"),
    "lists of fifty": (TINY.encode() + b"x = " + b"[" * 50 + b"]" * 50, "more than 16 deep"),
    "deep tables": (b"[" + b"a." * 2000 + b"a]\n", "more than 16 deep"),
    "deep keys": (b"".join(b"%d." % k + b"a." * 2000 + b"a = 1\n" for k in range(16)), "more than 16 deep"),
    "an integer of 4,080 digits": (b"seed = 1\nx = " + b"9" * 4080, "an integer has 13554 bits"),
    "an integer of 4,000 hexadecimal digits": (b"seed = 0x" + b"f" * 4000, "an integer has 16000 bits"),
    "an integer of 65 bits": (b"seed = 18446744073709551616", "an integer has 65 bits"),
    "a float without end": (TINY.replace("sigma = 0.25", "sigma = 1e999").encode(), "smoothing.sigma"),
    "not UTF-8": (b'name = "\xff"', "must be a short text file in UTF-8"),
    "UTF-16": ('name = "x"'.encode("utf-16"), "must be a short text file in UTF-8"),
    "a zero byte": (b'name = "a\0b"', "is not valid TOML"),
    "two megabytes": (b"#\n" * (1 << 20), "it has more than 65536 bytes"),
    "a base of lists": (b"base = [[1]]", "base must name another recipe"),
    "a base of thousands of letters": (b'base = "' + b"x" * 4000 + b'"', "no recipe"),
    "a base that is no path": (b'base = "a\\u0000b"', "no recipe"),
    "a long text": (b'seed = "' + b"x" * 4000 + b'"', "seed"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path, processes: ForkServerContext) -> None:
    content, text = RECIPES[name]
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    told = refused(processes, load_recipe, str(file))
    assert text in told
    assert "mine.toml" in told or "no recipe" in told
    assert len(told) < 3000


def test_a_byte_order_mark_before_a_recipe_and_a_run_is_read_over(tmp_path: Path) -> None:
    file = write_tiny(tmp_path)
    recipe = load_recipe(str(file))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(str(file)) == recipe
    run = RunFolder.create(tmp_path / "run", recipe)
    (run.path / "recipe.json").write_bytes(b"\xef\xbb\xbf" + recipe.to_json().encode())
    assert RunFolder.open(run.path).recipe == recipe


@pytest.mark.parametrize(
    "override", ["seed=" + "9" * 5000, "seed=0x" + "f" * 5000, "certify.radii=" + "[" * 9000, "a" + ".a" * 9000 + "=1"]
)
def test_a_hostile_override_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(write_tiny(tmp_path)), [override])
    assert len(str(caught.value)) < 3000


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"seed": "\xff"}',
        b'{"seed": 18446744073709551616}',
        b"[]",
        b"",
    ],
)
def test_a_hostile_recipe_of_a_run_is_refused(content: bytes, tmp_path: Path, processes: ForkServerContext) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    told = refused(processes, RunFolder.open, tmp_path)
    assert str(tmp_path / "recipe.json") in told


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + ".toml", "a\0b.toml"])
def test_a_text_that_is_no_recipe_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe(name)
