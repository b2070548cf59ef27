"""Certification shared among processes, and taken up where it was interrupted: the bits of one undisturbed process."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

import rush.pipeline.certify
import rush.pipeline.stages
from certifying import METHODS, assert_same, certified, pixel_images
from ranks import on_ranks
from rush.certification.certificates import Certificates
from rush.certification.certify import certify_each
from rush.certification.recertify import recompute
from rush.errors import RunError
from rush.pipeline.attack import audit_run
from rush.pipeline.certify import CERTIFICATE_PARTS, CERTIFICATES
from rush.pipeline.stages import run_stage
from rush.records.certificates import append_certificates, read_certificates, write_certificates
from rush.records.folder import RunFolder
from rush.runtime.distributed import rank
from tiny import EVERY_RUN, run_tiny

WORLD = 2


def certify_shard(folder: Path) -> None:
    """In one of two processes: all certificates of some images, as ``rush.certify`` returns them, left in
    ``folder``."""
    for method in METHODS:
        for count in (1, 9):
            found = certified(method, pixel_images(count))
            write_certificates(folder / f"{method}-{count}-{rank()}.tsv", found, range(count))


@pytest.mark.timeout(120)
def test_two_processes_return_the_certificates_of_one(processes: ForkServerContext, tmp_path: Path) -> None:
    """Nine images, so that the shares are unequal, and one, so that a process has none."""
    on_ranks(processes, partial(certify_shard, tmp_path), WORLD, tmp_path)
    for method in METHODS:
        for count in (1, 9):
            expected = certified(method, pixel_images(count))
            for own in range(WORLD):
                found = read_certificates(tmp_path / f"{method}-{count}-{own}.tsv")
                assert found is not None
                assert_same(found[1], expected)


# The stage of a run


def lines_but_times(path: Path) -> list[list[str]]:
    return [line.split("\t")[:5] + line.split("\t")[6:] for line in path.read_text().splitlines()]


def uncertified(tiny_run: Path, folder: Path) -> RunFolder:
    """A copy of the finished run that is yet to be certified."""
    shutil.copytree(tiny_run, folder)
    for name in ("certificates.tsv", "stages/certify.json", "stages/attack.json", "attacks.tsv"):
        (folder / name).unlink()
    shutil.rmtree(folder / "attacks")
    return RunFolder.open(folder)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return uncertified(tiny_run, tmp_path / "run")


@pytest.fixture
def finished(tiny_run: Path) -> tuple[list[int], Certificates]:
    """Indices and certificates of the undisturbed run."""
    found = read_certificates(tiny_run / CERTIFICATES)
    assert found is not None
    return found


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions whose certificates the stage did not find."""
    asked: list[int] = []

    def recorded(smoothed: Any, pixels: Any, rule: Any, seed: int, positions: Sequence[int]) -> Iterator[Any]:
        asked.extend(positions)
        return certify_each(smoothed, pixels, rule, seed, positions)

    monkeypatch.setattr(rush.pipeline.certify, "certify_each", recorded)
    return asked


def write_part(run: RunFolder, name: str, finished: tuple[list[int], Certificates], rows: list[int]) -> Path:
    indices, certificates = finished
    path = run.path / CERTIFICATE_PARTS / name
    path.parent.mkdir(exist_ok=True)
    append_certificates(path, certificates.select(rows), [indices[row] for row in rows])
    return path


def test_parts_of_two_processes_are_taken_up_by_one(
    tiny_run: Path, run: RunFolder, finished: tuple[list[int], Certificates], asked_for: list[int]
) -> None:
    """As they lie after a kill, in the order in which the images were decided, the last line of one torn."""
    write_part(run, "0.tsv", finished, [4, 0, 2, 8])
    torn = write_part(run, "1.tsv", finished, [1, 5, 3])
    torn.write_bytes(torn.read_bytes()[:-20])
    run_stage(run, "certify")
    assert asked_for == [3, 6, 7, *range(9, 20)]
    assert lines_but_times(run.path / CERTIFICATES) == lines_but_times(tiny_run / CERTIFICATES)
    kept, undisturbed = ((path / CERTIFICATES).read_text().splitlines() for path in (run.path, tiny_run))
    for row in (4, 0, 2, 8, 1, 5):  # the measured times, too
        assert kept[row + 1] == undisturbed[row + 1]
    assert not (run.path / CERTIFICATE_PARTS).exists()
    figures = run.require("certify")
    assert figures["images"] == 20
    found = read_certificates(run.path / CERTIFICATES)
    assert found is not None
    assert figures["seconds"] == pytest.approx(found[1].seconds.sum(), abs=1e-3)


@pytest.mark.parametrize("parts", [True, False])
def test_a_run_killed_between_its_table_and_its_summary_certifies_nothing_again(
    parts: bool, tiny_run: Path, run: RunFolder, finished: tuple[list[int], Certificates], asked_for: list[int]
) -> None:
    """Before or after its parts were removed."""
    shutil.copy(tiny_run / CERTIFICATES, run.path)
    if parts:
        write_part(run, "0.tsv", finished, list(range(0, 20, 2)))
        write_part(run, "1.tsv", finished, list(range(1, 20, 2)))
    run_stage(run, "certify")
    assert asked_for == []
    assert (run.path / CERTIFICATES).read_bytes() == (tiny_run / CERTIFICATES).read_bytes()
    assert not (run.path / CERTIFICATE_PARTS).exists()


def test_an_empty_part_and_a_torn_header_are_passed_over(tiny_run: Path, run: RunFolder) -> None:
    (run.path / CERTIFICATE_PARTS).mkdir()
    (run.path / CERTIFICATE_PARTS / "0.tsv").write_text("idx\tlabel\tpre")
    (run.path / CERTIFICATE_PARTS / "1.tsv").touch()
    run_stage(run, "certify")
    assert lines_but_times(run.path / CERTIFICATES) == lines_but_times(tiny_run / CERTIFICATES)


def test_parts_of_another_rule_or_of_other_images_are_refused(
    tiny_run: Path, finished: tuple[list[int], Certificates], tmp_path: Path
) -> None:
    indices, certificates = finished
    other_rule = recompute(certificates, alpha=0.002)
    other_image = replace(certificates, ids=(*certificates.ids[:3], "another", *certificates.ids[4:]))
    for number, (wrong, text) in enumerate(
        [
            ((indices, other_rule), "0.tsv was made under another rule; move it away and certify"),
            ((indices, other_image), "0.tsv holds other images than this recipe certifies; move it away and certify"),
            (([*indices[:3], 399_999, *indices[4:]], certificates), "0.tsv holds other images than this recipe"),
        ]
    ):
        run = uncertified(tiny_run, tmp_path / str(number))
        write_part(run, "0.tsv", wrong, [0, 3])
        with pytest.raises(RunError, match=re.escape(text)):
            run_stage(run, "certify")
        assert not run.finished("certify")
        assert not (run.path / CERTIFICATES).exists()


def test_a_damaged_part_is_named_with_its_line(run: RunFolder, finished: tuple[list[int], Certificates]) -> None:
    part = write_part(run, "1.tsv", finished, [0, 3, 5])
    part.write_text(re.sub("\t(certified|undecided)\t", "\tperhaps\t", part.read_text(), count=1))
    with pytest.raises(RunError, match=r"1\.tsv, line 2: .*move the file away and certify again"):
        run_stage(run, "certify")


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, "-m", "rush", *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False, timeout=250,
    )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", [pytest.param("clopper-pearson", marks=pytest.mark.slow), "sequential"])
def test_the_stage_under_torchrun_leaves_the_table_of_one_process(method: str, tmp_path: Path) -> None:
    overrides = (f"certify.method={method}", "certify.images=21", "certify.num_estimation=700")
    alone = run_tiny(tmp_path, *overrides, stages=EVERY_RUN[:2])
    shutil.copytree(alone.path, tmp_path / "shared")
    run_stage(alone, "certify")
    done = torchrun("certify", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    assert lines_but_times(tmp_path / "shared" / CERTIFICATES) == lines_but_times(alone.path / CERTIFICATES)
    shared = RunFolder.open(tmp_path / "shared")
    assert shared.require("certify")["processes"] == WORLD
    assert len(shared.events("started", "certify")) == len(shared.events("finished", "certify")) == 1
    assert not (shared.path / CERTIFICATE_PARTS).exists()
    assert done.stderr.count("certify ...") == 1  # one process speaks


@pytest.mark.timeout(300)
def test_the_audit_under_torchrun_is_that_of_one_process(tiny_run: Path, tmp_path: Path) -> None:
    """Of the run and of one of its rungs; one process writes and speaks."""
    run = RunFolder.open(shutil.copytree(tiny_run, tmp_path / "run"))
    alone = json.loads((run.path / "audit.json").read_text())
    for name in ("stages/audit.json", "audit.json"):
        (run.path / name).unlink()
    done = torchrun("audit", run.path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run.path / "audit.json").read_text()) == alone
    assert run.require("audit")["processes"] == WORLD
    assert done.stdout.count(f"in {run.path / 'audit.json'}") == done.stderr.count("audit ...") == 1
    done = torchrun("audit", run.path, "--rung", "frozen")
    assert done.returncode == 0, done.stderr
    expected = audit_run(run, "frozen").to_json()
    assert json.loads((run.path / "audit-frozen.json").read_text()) == json.loads(json.dumps(expected))
