"""What is printed: plain text, whatever names from outside hold."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rush
from commands import Call, refusal
from rush.commands.terminal import print_lines, print_table

KEPT = Path(rush.__file__).parents[2] / "results" / "cifar10-small"
HOSTILE = "[final] [/bold] [link=x]y[/link] :smile: \x1b[31mred\x1b[2J\a\r\nrush: fine \u2028\u202e \udce9 \\["
SHOWN = (
    r"[final] [/bold] [link=x]y[/link] :smile: \x1b[31mred\x1b[2J\x07\x0d\x0arush: fine \u2028\u202e \udce9 " + "\\["
)


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_printed_as_they_are(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    print_lines([HOSTILE])
    print_lines([HOSTILE], stderr=True)
    print_table([HOSTILE, "head"], [(HOSTILE, "cell")], HOSTILE)
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 4
    assert err.count(SHOWN) == 1
    for text in ("\a", "\r", "\u2028", "\u202e", "\x1b[31", "\x1b[2J", "\U0001f604"):
        assert text not in out + err


def test_a_table_is_as_wide_as_its_text_in_a_pipe_and_shares_a_terminal_evenly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = "word " * 19 + "end", "word " * 39 + "end"
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table((short, "b"), [("a", long)])
    head, _, row = capsys.readouterr().out.splitlines()
    assert short in head
    assert long in row
    monkeypatch.setenv("COLUMNS", "61")
    print_table((short, "b"), [("a", long)])
    assert {line.index("│") for line in capsys.readouterr().out.splitlines() if "│" in line} == {29}


@pytest.mark.parametrize("command", ["report", "info", "compare"])
def test_the_name_of_a_run_is_not_eaten(command: str, call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run[final]:smile:"
    shutil.copytree(KEPT, run)
    done = call(command, run)
    assert done.returncode == 0
    assert "run[final]:smile:" in done.stdout


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[final]", "[final]"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        (":smile:", ":smile:"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nrush: fine", r"a\x0arush: fine"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_an_error_names_what_was_given(name: str, shown: str, call: Call, tmp_path: Path) -> None:
    assert f"/{shown} holds no recipe.json" in refusal(call("report", tmp_path / name))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("command", ["info", "report", "compare"])
def test_a_full_disk_behind_standard_output_is_one_line(command: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(KEPT, run)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rush", command, str(run)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    line = "rush: the output cannot be written: No space left on device; results computed so far are kept\n"
    assert done.stderr == line
    assert (run / "report.html").exists() == (command == "report")
