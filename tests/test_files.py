"""What is written: whole or not at all, through no link inside a run folder, and in one line where it cannot be."""

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rush.errors import RunError, RushError, WriteError
from rush.records.certificates import drop_unfinished_line
from rush.runtime.files import (
    append_text,
    cut_file,
    make_folder,
    write_arrays,
    write_atomically,
    write_bytes,
    write_json,
    write_text,
)

Write = Callable[[Path], None]
WRITERS: dict[str, Write] = {
    "text": lambda path: write_text(path, "new"),
    "bytes": lambda path: write_bytes(path, b"new"),
    "json": lambda path: write_json(path, {}),
    "arrays": lambda path: write_arrays(path),
    "append": lambda path: append_text(path, "new"),
    "cut": lambda path: cut_file(path, 0),
    "drop": drop_unfinished_line,
}
FILES = ("log.jsonl", "report.html", "certificates.tsv", "attacks.tsv", "audit.json", "provenance.json", "recipe.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("precious, without a line feed")
    return file


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", FILES)
def test_a_link_in_a_run_folder_is_refused(run: Path, victim: Path, name: str, writer: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(RunError, match=rf"{name} is a link to .*victim"):
        WRITERS[writer](run / name)
    assert victim.read_text() == "precious, without a line feed"
    assert (run / name).is_symlink()


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in ("cut", "drop")])
@pytest.mark.parametrize("name", ["new.tsv", "log.jsonl"])
def test_a_link_that_leads_nowhere_makes_no_file(run: Path, tmp_path: Path, name: str, writer: str) -> None:
    (run / name).symlink_to(tmp_path / "made")
    with pytest.raises(RunError, match="is a link"):
        WRITERS[writer](run / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("link", "file"),
    [
        ("stages", "stages/certify.json"),
        ("checkpoints", "checkpoints/pretrain.pt"),
        ("attacks", "attacks/images.npz"),
        ("attacks/parts", "attacks/parts/clean-0000.npz"),
        ("model", "model/model.json"),
        ("certificates.parts", "certificates.parts/0.tsv"),
    ],
)
@pytest.mark.parametrize("other_run", [False, True])
def test_a_folder_that_is_a_link_is_refused(run: Path, tmp_path: Path, link: str, file: str, other_run: bool) -> None:
    """Also where it leads to another run folder."""
    target = tmp_path / "target"
    target.mkdir()
    if other_run:
        (target / "recipe.json").write_text("{}")
    (target / Path(file).name).write_text("precious")
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(target)
    for write in WRITERS.values():
        with pytest.raises(RunError, match=rf"{link} is a link to"):
            write(run / file)
    with pytest.raises(RunError, match="is a link"):
        make_folder(run / link)
    assert (target / Path(file).name).read_text() == "precious"
    assert len(list(target.iterdir())) == 1 + other_run


def test_links_before_the_run_folder_are_followed(run: Path, tmp_path: Path) -> None:
    """The run folder's own path may be a link, also beside a recipe.json that has nothing to do with it."""
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "runs").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(run)
    append_text(tmp_path / "link" / "log.jsonl", "one\n")
    append_text(tmp_path / "runs" / "run" / "log.jsonl", "two\n")
    write_text(tmp_path / "link" / "stages" / "x.json", "x")
    assert (run / "log.jsonl").read_text() == "one\ntwo\n"
    assert (run / "stages" / "x.json").read_text() == "x"


def test_a_link_outside_a_run_folder_is_written_through(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim)
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert victim.read_text() == "new"


def test_a_temporary_is_never_somebody_elses(run: Path, victim: Path) -> None:
    """What lies under the temporary's name is removed, a link without a look at its target; a folder there is told."""
    partial = run / ".report.html.partial"
    partial.symlink_to(victim)
    write_text(run / "report.html", "page")
    assert victim.read_text() == "precious, without a line feed"
    assert (run / "report.html").read_text() == "page"
    partial.write_text("of a kill")
    write_text(run / "report.html", "again")
    assert (run / "report.html").read_text() == "again"
    assert sorted(path.name for path in run.iterdir()) == ["recipe.json", "report.html"]
    partial.mkdir()
    with pytest.raises(WriteError, match=r"report\.html cannot be written"):
        write_text(run / "report.html", "page")


def test_a_pipe_is_neither_waited_for_nor_written_to(run: Path) -> None:
    os.mkfifo(run / "log.jsonl")
    with pytest.raises(RunError):
        append_text(run / "log.jsonl", "x")
    reader = os.open(run / "log.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(RunError, match="not a regular file"):
        append_text(run / "log.jsonl", "x")
    os.close(reader)


@pytest.mark.parametrize("name", ["text", "bytes", "json", "arrays", "append"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_what_the_system_refuses_is_one_line(
    run: Path, name: str, code: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "file").write_text("old\n")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(WriteError, match=rf"run/file cannot be written: {os.strerror(code)}\. .* resumes$"):
            WRITERS[name](run / "file")
    assert (run / "file").read_text() == "old\n"
    assert sorted(path.name for path in run.iterdir()) == ["file", "recipe.json"]
    WRITERS[name](run / "file")
    assert (run / "file").read_bytes() != b"old\n"


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_text(run / "log.jsonl", "first\n")
    write = os.write

    def full(descriptor: int, content: memoryview) -> int:
        if len(content) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:-39])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(WriteError, match="No space left"):
            append_text(run / "log.jsonl", "x" * 100 + "\n")
    assert (run / "log.jsonl").read_text() == "first\n"
    append_text(run / "log.jsonl", "second\n", header="header\n")
    assert (run / "log.jsonl").read_text() == "first\nsecond\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_a_real_limit_of_the_system(tmp_path: Path) -> None:
    """A file may not grow beyond 1,000 bytes: the old content stays, in both ways of writing."""
    code = f"""
import resource
from pathlib import Path
from rush.errors import WriteError
from rush.runtime.files import append_text, write_text
folder = Path({str(tmp_path)!r})
write_text(folder / "a", "old\\n"); append_text(folder / "b", "old\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write, name in ((write_text, "a"), (append_text, "b")):
    try:
        write(folder / name, "x" * 2000)
    except WriteError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written: File too large") == 2
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_write_error_is_both_of_the_run_and_of_the_system() -> None:
    error = WriteError("a/file", "No space left on device")
    assert isinstance(error, RunError)
    assert isinstance(error, RushError)
    assert isinstance(error, OSError)
    assert error.reason == "No space left on device"


def test_files_get_the_permissions_of_the_process(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", lambda target: target.write_bytes(b"") and None)
    append_text(tmp_path / "b", "")
    (tmp_path / "c").write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "abc"}
    assert len(modes) == 1
