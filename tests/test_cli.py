"""The command line: what it prints and where, how it exits, and what a kill of the whole process leaves.

Calls that need torch cost seconds as processes of their own; where the process is not what is tested, they are made
within this one.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image

from commands import COMMAND, ENVIRONMENT, TWO_PROCESSES, Call, refusal, rush
from rush.certification.certify import certify
from rush.commands.app import COMMANDS
from rush.data.sources import load_images
from rush.models.storage import load
from rush.records.folder import RunFolder
from rush.training.checkpoint import TrainingCheckpoint
from tiny import EVERY_RUN, differing, part_of, results, without_time, write_tiny


def modules_after(*arguments: str) -> set[str]:
    """Names of the modules that the command had imported when it ended."""
    code = """
import atexit, sys
atexit.register(lambda: sys.stderr.write("\\nMODULES " + " ".join(sys.modules)))
from rush.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    return set(done.stderr.split("\nMODULES ")[1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        *[(command, "--help") for command in ("", *COMMANDS)],
        ("--version",),
        ("recipes",),
        ("run", "digit"),
        ("run", "digits", "--set", "pretrain.epoch=3"),
        ("certify", "/nowhere"),
    ],
    ids=" ".join,
)
def test_help_and_refused_recipes_do_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    modules = modules_after(*filter(None, arguments))
    assert "rush.commands.app" in modules
    assert not {"torch", "numpy", "scipy"} & modules


def test_help_names_every_command_of_the_flow_and_the_traceback() -> None:
    text = rush("--help").stdout
    lines = [line.strip("│ ").split() for line in text.splitlines()]
    for command in (
        "run",
        *EVERY_RUN,
        "teach",
        "report",
        "ladder",
        "verdict",
        "predict",
        "compare",
        "cost",
        "recipes",
        "info",
    ):
        assert any(words[:1] == [command] and len(words) > 4 for words in lines), f"{command} is not described"
    assert "--traceback" in text


def test_a_command_imports_the_module_of_no_other() -> None:
    commands = {f"rush.commands.{module}" for module in COMMANDS.values()}
    assert modules_after("info", "/nowhere") & commands == {"rush.commands.info"}


def test_an_interrupted_command_says_how_to_resume(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("rush.commands.recipes.print_table", interrupt)
    done = call("recipes")
    assert (done.returncode, done.stderr) == (130, "rush: interrupted; run the same command again to resume\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("digit",), "no recipe 'digit', did you mean 'digits'?"),
        (("digits", "--set", "pretrain.epoch=3"), "pretrain.epoch: unknown key, did you mean 'epochs'?"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line_before_a_folder_is_made(
    words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    assert told in refusal(rush("run", *words, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_recipes_are_listed_with_what_they_are() -> None:
    done = rush("recipes")
    assert done.returncode == 0
    assert done.stderr == ""
    for name in ("cifar10", "cifar10-small", "digits"):
        assert f" {name} " in done.stdout


def test_an_unknown_command_and_a_missing_argument_fail_without_a_traceback(call: Call) -> None:
    for arguments, message in (
        (("certfy", "x"), "certfy"),
        (("teach",), "requires an argument"),
        (("run", "x", "--sett"), "--sett"),
    ):
        done = call(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def test_a_folder_that_is_no_run_is_refused_by_every_command_that_takes_one(call: Call, tmp_path: Path) -> None:
    for command in ("finetune", "certify", "attack", "ladder", "audit", "report", "info"):
        message = refusal(call(command, tmp_path))
        assert "holds no recipe.json, so it is not a run folder; start one with `rush run RECIPE" in message


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rush recipes` meets an error that nobody raises on purpose."""

    def fail() -> list[str]:
        raise ValueError("first line\n  second line")

    monkeypatch.setattr("rush.recipe.load.recipe_names", fail)
    monkeypatch.delenv("RUSH_TRACEBACK", raising=False)


def short(*_: object, **__: object) -> NoReturn:
    """Stands for a call that finds no memory."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little. More advice.")


@pytest.mark.parametrize(
    ("stage", "place"),
    [("certify", "rush.pipeline.certify.certify_each"), ("attack", "rush.evaluation.candidates.pgd")],
)
def test_a_stage_without_memory_names_the_tile_and_resumes_to_the_same_result(
    stage: str, place: str, tiny_run: Path, call: Call, tmp_path: Path
) -> None:
    run = part_of(tiny_run, tmp_path / "run", "certify", "attack", "audit").path
    if stage == "attack":
        assert call("certify", run).returncode == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, short)
        message = refusal(call(stage, run))
    told = f"rush: {stage}: there is not enough memory (OutOfMemoryError: CUDA out of memory. Tried to "
    assert message.startswith(told)
    assert "Lower execution.tile" in message
    assert "the same command then resumes" in message
    assert call(stage, run).returncode == 0
    names = ("certificates.tsv",) if stage == "certify" else ("certificates.tsv", "attacks.tsv")
    for name in names:
        assert without_time((run / name).read_text()) == without_time((tiny_run / name).read_text())


def test_a_prediction_without_memory_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    monkeypatch.setattr("rush.commands.predict.predict_files", short)
    message = refusal(call("predict", tiny_run, "image.png"))
    assert "not enough memory (OutOfMemoryError: CUDA out of memory" in message
    assert "Lower execution.tile" in message


@pytest.mark.usefixtures("broken")
def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(call: Call) -> None:
    done = call("recipes")
    assert done.stderr.count("\n") == 1
    text = refusal(done)
    assert text.startswith("rush: internal error: ValueError: first line second line; ")
    assert "please report it" in text
    assert text.endswith("which --traceback shows")


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("words", [("--traceback", "recipes"), ("recipes", "--traceback")])
def test_a_traceback_is_shown_where_it_is_asked_for(words: tuple[str, ...], call: Call) -> None:
    done = call(*words)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "in fail" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("rush: internal error: ValueError: first line second line")


@pytest.mark.usefixtures("broken")
def test_a_traceback_can_be_asked_for_in_the_environment(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("RUSH_TRACEBACK", value)
        assert call("recipes").stderr.startswith("Traceback") == shown


def test_a_traceback_of_a_refusal_is_shown_with_its_cause(call: Call, tmp_path: Path) -> None:
    assert "no recipe 'digit'" in refusal(call("run", "digit"))
    done = call("run", "digit", "--traceback")
    assert "Traceback" in done.stderr
    assert "rush.errors.ConfigError: no recipe 'digit'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("rush: no recipe 'digit'")
    assert not (tmp_path / "run").exists()


def stopped_when(
    ready: Callable[[], bool], *arguments: object, by: signal.Signals = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """Start the command, and send the signal once it is ``ready`` or has ended by itself."""
    child = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while child.poll() is None and not ready():
        time.sleep(0.002)
    child.send_signal(by)
    _, told = child.communicate(timeout=60)
    return subprocess.CompletedProcess(child.args, child.returncode, None, told)


Finished: TypeAlias = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run folder of `rush run`, killed once in its pre-training, and what the second start of the command said."""
    folder = tmp_path_factory.mktemp("command")
    arguments = ("run", write_tiny(folder), "--out", folder / "run")
    killed = stopped_when((folder / "run/checkpoints/pretrain.pt").exists, *arguments)
    assert killed.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return folder / "run", rush(*arguments)


def test_a_killed_run_goes_on_by_the_same_command_and_ends_with_the_bits_of_the_library(
    finished: Finished, tiny_run: Path
) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert differing(results(tiny_run), results(folder)) == []


def test_a_run_says_its_stages_on_standard_error_and_its_report_on_standard_output(finished: Finished) -> None:
    """Nothing is coloured or animated, as nobody watches."""
    folder, done = finished
    assert f"report: {folder}/report.html" in done.stdout
    assert (folder / "report.html").stat().st_size > 10_000
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.endswith("...")] == [f"{stage} ..." for stage in EVERY_RUN]
    reach = [line for line in lines if "votes per image that all agree" in line]
    assert [lines.index(line) for line in reach] == [lines.index("certify ...") + 1]
    assert sum(line.endswith(" s") for line in lines) == 5
    estimates = [line.split(":")[0] for line in lines if re.search(": (at most|about) .* per second here", line)]
    assert estimates == ["certify", "attack", "audit"]
    assert len(lines) == 14
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "\r" not in text
    assert "images/s" not in done.stderr


def test_stages_one_by_one_are_the_same_run(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    recipe, folder = write_tiny(tmp_path), tmp_path / "run"
    assert call("pretrain", recipe, "--out", folder).returncode == 0
    message = refusal(call("certify", folder))
    assert f"stage finetune is not finished; run `rush finetune {folder}` first" in message
    for command in ("finetune", "certify", "attack", "audit"):
        done = call(command, folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"{command} ...\n{command}: ")
    assert differing(results(tiny_run), results(folder)) == []


def test_a_finished_run_is_kept_and_reported_again(call: Call, finished: Finished) -> None:
    folder, first = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = call("run", folder)
    assert again.stderr.splitlines() == [f"{stage}: already finished, skipping" for stage in EVERY_RUN]
    assert again.stdout == first.stdout
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before


def test_a_changed_field_of_a_finished_stage_is_refused(call: Call, finished: Finished) -> None:
    folder, _ = finished
    recipe = (folder / "recipe.json").read_bytes()
    message = refusal(call("run", folder, "--set", "smoothing.sigma=0.5"))
    assert "already holds stage finetune made with different values of smoothing.sigma" in message
    assert (folder / "recipe.json").read_bytes() == recipe


def test_info_tells_state_and_figures(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    half = part_of(tiny_run, tmp_path / "half", "attack").path
    rows = [line.split("│") for line in call("info", half).stdout.splitlines()]
    states = {cells[0].strip(): cells[1].strip() for cells in rows if len(cells) == 2}
    assert [states[stage] for stage in EVERY_RUN[:4]] == ["finished"] * 3 + ["not finished"]
    assert states["ACR"].endswith("(N = 200)")
    assert states["data"] == "digits (1,397 in train, 400 in test)"
    assert states["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert states["noise"] == "discrete, sigma 0.25"
    assert states["labels"] == "1,397 training images"
    assert re.fullmatch(r"[\d.]+ s of work, \d{4}-\S+ to \d{4}-\S+", states["time"])
    assert float(states["size"].removesuffix(" MB")) > 0


def test_predict_answers_like_the_library_for_every_file(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    images = load_images("digits", "test")[slice(6)]
    files = []
    for number, image in enumerate(images.images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image[0].numpy()).save(files[-1])
    done = call("predict", tiny_run, *files, "--num-samples", 400, "--seed", 5)
    assert done.returncode == 0, done.stderr
    smoothed = load(tiny_run, device="cpu")
    pair = (images.pixels(), images.labels)
    expected = certify(smoothed, pair, num_selection=40, num_estimation=360, bound="two-classes", seed=5)
    assert len(set(expected.prediction)) > 1
    answers = [line.split("\t")[1] for line in done.stdout.splitlines()]
    assert answers == ["abstain" if label == -1 else str(label) for label in expected.prediction]


def test_predict_refuses_another_size_unless_told_to_resize(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    image = load_images("digits", "test").images[0, 0].numpy()
    large = np.kron(image, np.ones((3, 3), np.uint8))
    file = tmp_path / "large.png"
    Image.fromarray(large).save(file)
    message = refusal(call("predict", tiny_run, file))
    assert f"{file} is 24x24, the model takes 8x8; give --resize" in message
    done = call("predict", tiny_run, file, "--resize", "--num-samples", 100)
    assert done.returncode == 0, done.stderr
    answer = done.stdout.split("\t")[1]
    assert answer in {"abstain", *map(str, range(10))}


def test_a_warning_of_this_library_is_one_line(tmp_path: Path) -> None:
    """What a folder holds besides images is said without a place in the code."""
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 100).save(tmp_path / split / name / "0.png")
    (tmp_path / "test/a/sound.wav").write_bytes(b"RIFF")
    code = (
        "import rush.__main__ as program, rush\n"
        "program._show_own_warnings_in_one_line()\n"
        f"rush.load_images({str(tmp_path)!r}, 'test')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rush: warning: {tmp_path}: 1 entries are omitted")


def test_predict_refuses_a_folder_that_is_not_there(call: Call, tmp_path: Path) -> None:
    told = refusal(call("predict", tmp_path / "none", tmp_path / "image.png"))
    assert "is not a directory; give a run folder" in told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_of_the_whole_command_change_no_bit(tiny_run: Path, tmp_path: Path) -> None:
    """Killed after a random time, whatever it is doing, imports included; finished by the command itself."""
    chance = random.Random(0)
    arguments = ("run", write_tiny(tmp_path), "--out", tmp_path / "run")
    started = time.monotonic()
    assert rush(*arguments[:2], "--out", tmp_path / "timing").returncode == 0
    whole = time.monotonic() - started
    for _ in range(20):
        due = time.monotonic() + chance.uniform(0.3, 0.9) * whole
        stopped_when(lambda due=due: time.monotonic() >= due, *arguments)  # type: ignore[misc]
    assert rush(*arguments).returncode == 0
    assert differing(results(tiny_run), results(tmp_path / "run")) == []


def test_a_terminal_gets_a_progress_bar_with_rate(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart of the silent run: without it, that test would pass with progress broken."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = call("pretrain", write_tiny(tmp_path), "--out", tmp_path / "run").stderr
    assert "images/s" in shown
    assert "2560/2560" in shown  # two epochs of ten batches of 128


def test_a_training_that_is_asked_to_stop_keeps_its_work_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("pretrain", write_tiny(tmp_path), "--out", out, "--set", "pretrain.epochs=4000")
    done = stopped_when((out / "checkpoints/pretrain.pt").exists, *arguments, by=signal.SIGTERM)
    assert done.returncode == 143
    assert "rush: pretrain: stopped by SIGTERM after " in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert "Traceback" not in done.stderr
    state = TrainingCheckpoint(out / "checkpoints/pretrain.pt", RunFolder.open(out).fingerprint("pretrain")).load()
    assert state is not None
    assert 0 < state["number"] < 4000 * 10


@pytest.mark.timeout(240)
def test_two_processes_share_all_stages(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = rush("run", write_tiny(tmp_path), "--out", out, command=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    finished = {stage: json.loads((out / f"stages/{stage}.json").read_text()) for stage in EVERY_RUN}
    assert [figures["processes"] for figures in finished.values()] == [2] * 5
    assert done.stdout.count(f"report: {out / 'report.html'}") == 1
    # every event once, and the passes of both processes
    epochs = RunFolder.open(out).events("epoch", "pretrain")
    assert [event["epoch"] for event in epochs] == [1, 2]
    assert [event["passes"] for event in epochs] == [2 * 10 * 128] * 2


def test_a_run_begins_with_the_encoder_of_another(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "fewer"
    changes = ("--set", "finetune.label_fraction=0.2", "--set", "name=fewer")
    done = call("finetune", tiny_run, "--out", out, *changes)
    assert done.returncode == 0, done.stderr
    assert RunFolder.open(out).recipe.name == "fewer"
    figures = json.loads((out / "stages/finetune.json").read_text())
    assert figures["labelled_images"] == 279
    for name in ("stages/pretrain.json", "checkpoints/encoder.safetensors"):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes()
    refused = call("finetune", tiny_run, "--out", tmp_path / "other", "--set", "pretrain.epochs=1")
    assert "was pre-trained with different values of pretrain.epochs" in refusal(refused)
    assert not (tmp_path / "other").exists()
