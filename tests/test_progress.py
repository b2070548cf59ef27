"""Progress: a bar on a terminal, lines elsewhere where they are asked for, and nothing where it is not."""

import re
import sys

import pytest
import torch

import rush
from commands import Call
from rush.runtime import progress as module
from rush.runtime.progress import NOTHING, Parts, Shown, asked, progress, showing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test advances."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_so_often_with_rate_remaining_time_and_figures(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with showing(Shown(every=10)), progress("attack pgd", 1000, start=100) as advance:
        for step in range(25):
            clock[0] += 1
            advance(20, f"{step} broken")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "attack pgd: 300 of 1,000 images, 20 images/s, 0:00:35 left, 9 broken",
        "attack pgd: 500 of 1,000 images, 20 images/s, 0:00:25 left, 19 broken",
    ]


def test_parts_name_their_number_and_the_time_left_for_all(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three rungs is twice the work of the first; the third is as long as the first two together."""
    parts = Parts("rung", [1, 2, 3])
    for name in ("clean", "pgd"):
        with showing(Shown(every=10)), parts.next(), progress(name, 100) as advance:
            for _ in range(10):
                clock[0] += 10 if name == "clean" else 20
                advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rung 1 of 3, clean: 10 of 100 images, 1 images/s, 0:01:30 left, 0:09:50 in all"
    assert lines[10] == "rung 2 of 3, pgd: 10 of 100 images, 0.5 images/s, 0:03:00 left, 0:08:00 in all"
    assert lines[19] == "rung 2 of 3, pgd: 100 of 100 images, 0.5 images/s, 0:00:00 left, 0:05:00 in all"


def test_results_read_from_disk_do_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = Parts("rung", [1, 1])
    with showing(Shown(every=10)):
        with parts.next(), progress("clean", 100) as advance:
            advance(100, done_earlier=True)
        with parts.next(), progress("pgd", 100) as advance:
            advance(50, done_earlier=True)
            clock[0] += 20
            advance(10)
    assert capsys.readouterr().err == (
        "rung 2 of 2, pgd: 60 of 100 images, 0.5 images/s, 0:01:20 left, 0:01:20 in all\n"
    )


@pytest.mark.parametrize("shown", [None, NOTHING, asked(False)])
def test_nothing_is_shown_without_a_terminal_unless_asked_for(
    shown: Shown | None, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with showing(shown), progress("certify", 10) as advance:
        clock[0] += 1000
        advance(1)
    assert capsys.readouterr().err == ""


def test_a_bar_is_shown_on_a_terminal_unless_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with showing(NOTHING), progress("certify", 10) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    with Parts("rung", [1, 1]).next(), progress("attack", 10) as advance:
        advance(10, "3 broken")
    shown = capsys.readouterr().err
    assert "rung 1 of 2, attack" in shown
    assert "10/10" in shown
    assert "3 broken" in shown


def test_library_calls_show_what_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    smoothed = rush.SmoothedClassifier(network, sigma=0.25, num_classes=10)
    images = rush.load_images("digits", "test")[:4]
    calls = (
        lambda asked: rush.certify(smoothed, images, num_estimation=100, progress=asked),
        lambda asked: rush.attack(
            smoothed, images, rush.ThreatModel("linf", 0.02), steps=1, max_votes=200, progress=asked
        ),
    )
    for call in calls:
        for shown in (None, False):
            call(shown)
            assert capsys.readouterr().err == ""
        times = iter(range(0, 10**6, 11))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.time, "monotonic", lambda times=times: float(next(times)))
            call(True)
        assert re.search(r"of 4 images, .* images/s, .* left", capsys.readouterr().err)


def test_quiet_and_verbose_are_options_of_every_command(call: Call, tiny_run: object) -> None:
    assert "finished, skipping" in call("certify", tiny_run).stderr
    for words in (("-q", "certify", tiny_run), ("certify", tiny_run, "--quiet")):
        done = call(*words)
        assert (done.returncode, done.stderr) == (0, "")
    assert call("-v", "certify", tiny_run).returncode == 0
    assert call("certify", "-q", "nowhere").stderr.startswith("rush: ")
