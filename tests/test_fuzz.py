"""Generated bad input at every door: it is accepted or refused by an error of this library, and nothing is written.

The slow part draws 10,000 inputs. A hang is a test that runs out of time.
"""

import contextlib
import io
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import rush
from rush.__main__ import main
from rush.data.sources import load_images
from rush.errors import RushError
from rush.models.imported import load_imported
from rush.models.storage import ClassifierSpec, save_smoothed
from rush.recipe.load import load_recipe
from rush.records.certificates import read_certificates
from rush.records.read_run import read_run
from rush.runtime.execution import Execution
from rush.runtime.randomness import seeded_init, stream
from rush.smoothing.classifier import SmoothedClassifier
from rush.smoothing.noise import Gaussian
from tiny import TINY

FEW = 40
MANY = 1250  # for each of eight doors
COUNTS = [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 2**63, -(2**70), 10**40]),
    st.floats(allow_nan=True),
    st.integers(-300, 300),
)
VALUES = st.one_of(
    NUMBERS,
    st.text(max_size=12),
    st.sampled_from([None, True, False, "", "8/255", "1/0", "gaussian", "sequential", "linf", "é\x00", [], {}, [1, 2]]),
    st.lists(NUMBERS, max_size=3),
    st.sampled_from([np.int8(3), np.float16(0.5), np.array(2), np.array([1, 2]), torch.tensor(1), b"x", object()]),
)
SECTIONS = ("data", "model", "smoothing", "execution", "pretrain", "teach", "finetune", "certify", "attack", "audit")


def fuzz(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def both(strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any, Any], None]], Any]:
    """Decorator of a test of one generated value, run with few of them and, slowly, with many."""

    def decorate(check: Callable[[Any, Any], None]) -> Any:
        @pytest.mark.parametrize(
            "count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
        )
        def test(count: int, world: "World") -> None:
            before = world.files()

            @fuzz(count)
            @given(strategy)
            def run(value: Any) -> None:
                with contextlib.suppress(RushError):
                    check(world, value)

            run()
            assert world.files() == before

        test.__doc__ = check.__doc__
        return test

    return decorate


class World:
    """What the doors are tried with: a folder that must stay as it is, a scratch folder, models and images."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.scratch = folder / "kept", folder / "scratch"
        self.folder.mkdir()
        self.scratch.mkdir()
        shutil.copytree(run, self.folder / "run")
        spec = ClassifierSpec("small", 2, 1, [0.5], [0.25], tuple("0123456789"))
        classifier = seeded_init(spec.build(), stream(0, "weights"))
        save_smoothed(self.folder / "model", classifier, spec, Gaussian(0.25), Execution(tile=16), (1, 8, 8))
        self.smoothed = SmoothedClassifier(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval(),
            0.25,
            10,
            execution=Execution(tile=16),
        )
        self.images = load_images("digits", "test")[:2]

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def damaged(self, name: str, damage: tuple[int, bytes, float]) -> Path:
        """A copy of a file or folder of ``name`` in the scratch folder, the file damaged."""
        source, target = self.folder / name, self.scratch / Path(name).name
        shutil.rmtree(self.scratch)
        self.scratch.mkdir()
        content = source.read_bytes()
        target.write_bytes(damaged(content, damage))
        return target


def damaged(content: bytes, damage: tuple[int, bytes, float]) -> bytes:
    """Replace, insert or cut bytes at a place, by the sign of the first number."""
    kind, new, share = damage
    place = int(share * len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + new + content[place:]
    return content[:place] + new + content[place + len(new) :]


DAMAGE = st.tuples(st.integers(0, 2), st.binary(min_size=1, max_size=8), st.floats(0, 1))


@pytest.fixture
def world(tmp_path: Path, tiny_run: Path) -> World:
    return World(tmp_path, tiny_run)


@both(DAMAGE)
def test_recipes_with_damage(world: World, damage: tuple[int, bytes, float]) -> None:
    """A recipe file with changed bytes."""
    file = world.scratch / "recipe.toml"
    file.write_bytes(damaged(TINY.encode(), damage))
    load_recipe(str(file))


FIELD = st.one_of(
    st.tuples(st.sampled_from(SECTIONS), st.text("abcdefghijklmnopqrstuvwxyz_.", max_size=12)),
    st.tuples(st.just("finetune"), st.sampled_from(["epochs", "objective", "learning_rate", "batch_size", "mode"])),
    st.tuples(st.just("certify"), st.sampled_from(["radii", "alpha", "method", "bound", "images", "num_estimation"])),
    st.tuples(st.just("attack"), st.sampled_from(["epsilon", "eot_samples", "norm", "step_size", "max_votes"])),
    st.tuples(st.just("data"), st.sampled_from(["size", "held_out", "test_images", "memory_gb", "name", "root"])),
)


@both(st.tuples(FIELD, VALUES))
def test_overrides_of_every_kind(world: World, given_: tuple[tuple[str, str], Any]) -> None:
    """Fields that exist and fields that do not, with values of every kind."""
    (section, field), value = given_
    file = world.scratch / "recipe.toml"
    file.write_text(TINY)
    load_recipe(str(file), [f"{section}.{field}={value}"])


@both(st.tuples(st.sampled_from(["model.json", "model.safetensors"]), DAMAGE))
def test_models_with_damage(world: World, given_: tuple[str, tuple[int, bytes, float]]) -> None:
    """A model folder with one damaged file, loaded and read as weights of another network."""
    name, damage = given_
    folder = world.scratch / "model"
    shutil.copytree(world.folder / "model", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damaged((world.folder / "model" / name).read_bytes(), damage))
    if name.endswith("safetensors"):
        target = ClassifierSpec("small", 2, 1, [0.5], [0.25], tuple("0123456789")).build()
        with contextlib.suppress(RushError):
            load_imported(target, folder / name)
    rush.load(folder, device="cpu")


RUN_FILES = [
    "stages/certify.json",
    "stages/attack.json",
    "recipe.json",
    "log.jsonl",
    "attacks.tsv",
    "audit.json",
    "certificates.tsv",
    "provenance.json",
    "model/model.json",
]


@both(st.tuples(st.sampled_from(RUN_FILES), DAMAGE))
def test_run_folders_with_damage(world: World, given_: tuple[str, tuple[int, bytes, float]]) -> None:
    """One damaged file of a run, which is read as a report does."""
    name, damage = given_
    folder = world.scratch / "run"
    if not folder.exists():
        shutil.copytree(world.folder / "run", folder)
    content = (world.folder / "run" / name).read_bytes()
    (folder / name).write_bytes(damaged(content, damage))
    try:
        read_run(folder)
        if name == "certificates.tsv":
            read_certificates(folder / name)
    finally:
        (folder / name).write_bytes(content)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, kind)
    return buffer.getvalue()


@both(st.tuples(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), DAMAGE))
def test_image_files_with_damage(world: World, given_: tuple[str, tuple[int, bytes, float]]) -> None:
    """A folder of class folders with one damaged file."""
    kind, damage = given_
    for name in "ab":
        (world.scratch / "set" / name).mkdir(parents=True, exist_ok=True)
        (world.scratch / "set" / name / "0.png").write_bytes(encoded("PNG"))
    (world.scratch / "set/a/1.png").write_bytes(damaged(encoded(kind), damage))
    load_images(world.scratch / "set", "train", size=8)


ARRAYS = st.dictionaries(
    st.sampled_from(["images", "labels", "ids", "classes", "x_train", "y_train", "other"]),
    st.one_of(
        st.builds(
            lambda shape, kind: np.zeros(shape, kind),
            st.lists(st.integers(0, 9), max_size=5),
            st.sampled_from(["u1", "f4", "f8", "i8", "?", "U3", "S2", "c8", ">u2", "M8[s]"]),
        ),
        st.just(np.arange(4)),
        st.just(np.zeros((4, 8, 8), np.uint8)),
    ),
    max_size=4,
)


@both(st.tuples(ARRAYS, DAMAGE))
def test_archives_of_every_kind(world: World, given_: tuple[dict[str, np.ndarray], tuple[int, bytes, float]]) -> None:
    """An .npz file with arrays of every shape and type, whole and damaged."""
    arrays, damage = given_
    file = world.scratch / "set.npz"
    np.savez(file, **arrays)
    content = file.read_bytes()
    for part in (content, damaged(content, damage)):
        file.write_bytes(part)
        try:
            load_images(file, "train")
        except RushError:
            continue


ARGUMENTS = {
    "certify": ("method", "num_selection", "alpha", "radii", "level", "futility", "seed", "in_flight", "bound"),
    "attack": ("method", "step_size", "eot_samples", "gradient", "loss", "targets", "decision", "alpha", "seed"),
    "threat": ("norm", "epsilon"),
    "smoothed": ("sigma", "num_classes", "classes", "image_shape"),
    "load_images": ("split", "size", "root"),
    "predict": ("num_samples", "alpha", "seed"),
}
CALL = st.sampled_from(sorted(ARGUMENTS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.dictionaries(st.sampled_from(ARGUMENTS[name]), VALUES, min_size=1, max_size=2)
    )
)


@both(CALL)
def test_calls_with_arguments_of_every_kind(world: World, given_: tuple[str, dict[str, Any]]) -> None:
    """The public functions with small work and one or two wrong arguments."""
    name, arguments = given_
    if any(isinstance(value, int) and not isinstance(value, bool) and value > 300 for value in arguments.values()):
        arguments = dict.fromkeys(arguments, -1)  # a huge amount of work may be asked for
    threat = rush.ThreatModel("linf", 0.02)
    calls: dict[str, Callable[[], object]] = {
        "certify": lambda: rush.certify(world.smoothed, world.images, **({"num_estimation": 30} | arguments)),
        "attack": lambda: rush.attack(
            world.smoothed, world.images, threat, **({"steps": 1, "max_votes": 40} | arguments)
        ),
        "threat": lambda: rush.ThreatModel(**({"norm": "l2", "epsilon": 0.1} | arguments)),
        "smoothed": lambda: SmoothedClassifier(torch.nn.Linear(2, 2), **({"sigma": 0.1, "num_classes": 2} | arguments)),
        "load_images": lambda: rush.load_images("digits", **arguments),
        "predict": lambda: world.smoothed.predict(world.images.pixels(), **({"num_samples": 30} | arguments)),
    }
    calls[name]()


KNOWN = [
    "certify",
    "attack",
    "predict",
    "info",
    "recipes",
    "show",
    "--json",
    "--set",
    "x=1",
    "--model",
    "a:b",
    "-q",
    "--data",
    "digits",
    "verify",
    "--images",
    "-3",
    "nan",
    "--out",
    "export",
    "--to",
    "onnx",
    "--",
    "compare",
    "report",
    "ladder",
    "--recompute",
    "--redo",
]
WORDS = st.lists(
    st.one_of(st.sampled_from(KNOWN), st.text(max_size=8).filter(lambda text: "\x00" not in text)),
    min_size=1,
    max_size=5,
)


@both(WORDS)
def test_command_lines(world: World, words: list[str]) -> None:
    """Words in any order end with a status and no traceback, and leave the working folder empty."""
    if words[0] in ("run", "pretrain", "finetune", "doctor", "init"):
        return
    place = world.scratch / "cwd"
    place.mkdir(exist_ok=True)
    here, arguments = os.getcwd(), sys.argv
    errors = io.StringIO()
    try:
        os.chdir(place)
        sys.argv = ["rush", *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about its use in tests
            status = 0
            try:
                main()
            except SystemExit as stop:
                status = stop.code or 0
    finally:
        os.chdir(here)
        sys.argv = arguments
    text = errors.getvalue()
    assert status in (0, 1, 2), (words, status)
    assert "Traceback" not in text, (words, text)
    assert "internal error" not in text, (words, text)
    assert list(place.iterdir()) == [], words
