"""A run whose folder came from somebody else, or whose disk is full: nothing is overwritten, nothing is lost."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from commands import Call, refusal
from rush.choices import Stage
from rush.errors import CheckpointError, RunError
from rush.pipeline.stages import run_stage
from rush.records.folder import RunFolder
from rush.reporting.page import write_report
from tiny import differing, part_of, results, tiny


@pytest.mark.parametrize(
    ("stage", "link"),
    [
        ("finetune", "model"),
        ("finetune", "checkpoints/finetune.pt"),
        ("finetune", "log.jsonl"),
        ("certify", "certificates.parts"),
        ("certify", "certificates.parts/0.tsv"),
        ("certify", "certificates.tsv"),
        ("certify", "stages/certify.json"),
        ("attack", "attacks"),
        ("attack", "attacks/parts"),
        ("attack", "attacks.tsv"),
        ("audit", "audit.json"),
        ("audit", "provenance.json"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_stage_writes_through_no_link(stage: Stage, link: str, kind: str, tiny_run: Path, tmp_path: Path) -> None:
    run, target = part_of(tiny_run, tmp_path / "run", stage), tmp_path / "target"
    path = run.path / link
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        target.write_text(path.read_text() if path.exists() else "precious")
    elif kind == "folder":
        target.mkdir()
        (target / "0.tsv").write_text("precious, without a line feed")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = {str(file): file.read_bytes() for file in [target, *target.rglob("*")] if file.is_file()}
    try:
        run_stage(run, stage)
    except (RunError, CheckpointError):
        pass
    else:  # a finished stage, or a file that is only read
        assert (stage, link, kind) in {("certify", "stages/certify.json", "file"), ("audit", "provenance.json", "file")}
    assert before == {str(file): file.read_bytes() for file in [target, *target.rglob("*")] if file.is_file()}
    assert path.is_symlink()


@pytest.mark.parametrize("name", ["recipe.json", "provenance.json", "stages/certify.json", "audit.json"])
def test_every_file_of_a_run_has_a_format_and_a_newer_one_is_refused(
    name: str, tiny_run: Path, tmp_path: Path, call: Call
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert json.loads((run / "log.jsonl").read_text().split("\n")[0])["format"] == 1
    for table, newest in (("certificates.tsv", 2), ("attacks.tsv", 1)):
        header, *lines = (run / table).read_text().split("\n")[:-1]
        assert header.endswith("\tformat")
        assert all(line.endswith(f"\t{newest}") for line in lines)
    values = json.loads((run / name).read_text())
    newest = 3 if name == "recipe.json" else 1
    assert values["format"] == newest
    (run / name).write_text(json.dumps({**values, "format": newest + 1}))
    assert f"{name} has format {newest + 1}, this version reads {newest}; read it with" in refusal(call("info", run))


def test_a_report_writes_through_no_link(tiny_run: Path, tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(tiny_run, run)
    target.write_text("precious")
    (run / ".report.html.partial").symlink_to(target)
    write_report(run)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(target)
    with pytest.raises(RunError, match=r"report\.html is a link to"):
        write_report(run)
    assert target.read_text() == "precious"


def test_the_run_folder_itself_may_be_a_link(tiny_run: Path, tmp_path: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "certify")
    (tmp_path / "link").symlink_to(run.path)
    run_stage(RunFolder.open(tmp_path / "link"), "certify")
    assert results(run.path)["certificates.tsv"] == results(tiny_run)["certificates.tsv"]


def fill_disk(patch: pytest.MonkeyPatch, write: int, call: str = "fsync", code: int = errno.ENOSPC) -> None:
    """From its number ``write`` on, every ``call`` to the system is refused."""
    numbers, plain = itertools.count(1), getattr(os, call)

    def refuse(*given: object, **named: object) -> object:
        if next(numbers) >= write:
            raise OSError(code, os.strerror(code))
        return plain(*given, **named)

    patch.setattr(os, call, refuse)


@pytest.mark.parametrize(
    ("stage", "write"),
    [("finetune", 1), ("finetune", 6), ("certify", 2), ("certify", 9), ("certify", 23), ("attack", 4), ("audit", 2)],
)
def test_a_stage_on_a_full_disk_says_so_in_a_line_and_resumes_with_the_same_bits(
    stage: Stage, write: int, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = part_of(tiny_run, tmp_path / "run", stage)
    with monkeypatch.context() as patch:
        fill_disk(patch, write)
        with pytest.raises((RunError, CheckpointError), match=r"cannot be written: No space left on device") as caught:
            run_stage(run, stage)
    assert str(caught.value).count("\n") == 0
    assert not list(run.path.rglob("*.partial"))
    run_stage(run, stage)
    assert differing(results(tiny_run), results(run.path)) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_commands_say_in_a_line_what_cannot_be_written(
    code: int, tiny_run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    commands = (
        ("report", run),
        ("certify", run, "--recompute", "--alpha", "0.01", "--out", tmp_path / "new.tsv"),
        ("certify", run, "--set", "execution.checkpoint_minutes=3"),
        ("finetune", run, "--out", tmp_path / "branch"),
        ("pretrain", tmp_path / "tiny.toml", "--out", tmp_path / "first"),
    )
    tiny(tmp_path)
    before = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for command in commands:
        with monkeypatch.context() as patch:
            fill_disk(patch, 1, "replace", code)
            assert f"cannot be written: {os.strerror(code)}" in refusal(call(*command)), command
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before


def test_a_garbage_log_is_told_and_not_deleted(tiny_run: Path, tmp_path: Path) -> None:
    run = part_of(tiny_run, tmp_path / "run", "certify")
    for garbage in (b"\x80\x81\x82", b"text of somebody", b"\x00\x01garbage\n"):
        (run.path / "log.jsonl").write_bytes(garbage)
        with pytest.raises(RunError, match=r"log\.jsonl"):
            run_stage(run, "certify")
        assert (run.path / "log.jsonl").read_bytes()[: len(garbage)] == garbage
    (run.path / "log.jsonl").unlink()
    run_stage(run, "certify")
    assert json.loads((run.path / "stages" / "certify.json").read_text())["started"] is not None


@pytest.mark.parametrize("change", ["label", "pixels"])
def test_certificates_of_other_labels_or_pixels_are_not_resumed(change: str, tiny_run: Path, tmp_path: Path) -> None:
    """One line of a part speaks of another label, and agrees with itself; or of another picture."""
    run = part_of(tiny_run, tmp_path / "run", "certify")
    lines = [line.split("\t") for line in (tiny_run / "certificates.tsv").read_text().splitlines()]
    if change == "label":
        lines[3][1] = str((int(lines[3][1]) + 1) % 10)
        lines[3][4] = str(int(lines[3][1] == lines[3][2]))
    else:
        lines[3][lines[0].index("pixels")] = "f" * 32
    (run.path / "certificates.parts").mkdir()
    text = "".join("\t".join(line) + "\n" for line in lines)
    (run.path / "certificates.parts" / "0.tsv").write_text(text)
    with pytest.raises(RunError, match=r"0\.tsv holds other images than this recipe certifies"):
        run_stage(run, "certify")
    (tmp_path / "again").mkdir()
    again = part_of(tiny_run, tmp_path / "again" / "run", "attack")
    (again.path / "certificates.tsv").write_text(text)
    told = r"certificates\.tsv: image '.*' has another label or other pixels than in the data"
    with pytest.raises(RunError, match=told):
        run_stage(again, "attack")


def test_a_radius_written_into_the_table_reaches_no_stage(tiny_run: Path, tmp_path: Path, call: Call) -> None:
    run = part_of(tiny_run, tmp_path / "run", "attack")
    lines = [line.split("\t") for line in (run.path / "certificates.tsv").read_text().splitlines()]
    lines[2][3] = "9.000000"
    (run.path / "certificates.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    told = r"certificates\.tsv, line 3: radius is 9, its votes and rule give"
    for work in (lambda: run_stage(run, "attack"), lambda: write_report(run.path)):
        with pytest.raises(RunError, match=told):
            work()
    for command in (("certify", run.path, "--recompute"), ("compare", run.path), ("report", run.path)):
        assert "line 3: radius is 9, its votes and rule give" in refusal(call(*command))
