"""What a run stores is of one model: weights that were replaced meanwhile are noticed at every stage."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rush
from certifying import as_older
from rush.certification.certificates import join_certificates
from rush.errors import InputError, ModelError, RunError
from rush.pipeline import certify as certify_stage
from rush.pipeline.stages import run_stage
from rush.records.certificates import append_certificates, read_certificates
from rush.records.folder import RunFolder
from rush.smoothing.classifier import SmoothedClassifier
from tiny import without_time

OTHER = "of another model than the run's|made with another model, or"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    """A copy of a whole run."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def _forget(run: RunFolder, *stages: str) -> None:
    for stage in stages:
        (run.path / f"stages/{stage}.json").unlink(missing_ok=True)


def _replace_weights(run: RunFolder) -> None:
    file = run.path / "model/model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if weights[name].is_floating_point())
    weights[name][0] += 0.01
    save_file(weights, file)


def _interrupt_certification(run: RunFolder) -> Path:
    """All but five images are certified and lie in a part, which is returned, as a kill leaves them."""
    _forget(run, "certify", "attack", "audit", "report")
    table = run.path / "certificates.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.unlink()
    part = run.path / "certificates.parts/0.tsv"
    part.parent.mkdir(exist_ok=True)
    part.write_text("".join(lines[:-5]))
    return part


def _table(run: RunFolder) -> list[list[str]]:
    return without_time((run.path / "certificates.tsv").read_text())


def test_an_interrupted_certification_goes_on_with_the_same_model_only(run: RunFolder) -> None:
    before = _table(run)
    _interrupt_certification(run)
    run_stage(run, "certify")
    assert _table(run) == before
    part = _interrupt_certification(run)
    left = part.read_text()
    _replace_weights(run)
    with pytest.raises(RunError, match=OTHER):
        run_stage(run, "certify")
    assert part.read_text() == left
    assert run.finished("certify") is None


def test_parts_that_name_no_model_are_not_gone_on_with(run: RunFolder) -> None:
    as_older(_interrupt_certification(run))
    with pytest.raises(RunError, match="or names none"):
        run_stage(run, "certify")


@pytest.mark.parametrize("stage", ["attack", "audit"])
def test_certificates_of_another_model_are_no_floor_of_an_attack(run: RunFolder, stage: Any) -> None:
    _forget(run, "attack", "audit", "report") if stage == "attack" else _forget(run, "audit", "report")
    shutil.rmtree(run.path / "attacks/parts")
    _replace_weights(run)
    with pytest.raises(RunError, match=OTHER):
        run_stage(run, stage)


def test_an_older_table_that_names_no_model_is_attacked_as_it_is(run: RunFolder) -> None:
    _forget(run, "attack", "audit", "report")
    as_older(run.path / "certificates.tsv")
    run_stage(run, "attack")


def test_lines_of_two_models_are_refused(run: RunFolder, tmp_path: Path) -> None:
    table = run.path / "certificates.tsv"
    lines = table.read_text().split("\n")
    cells = lines[3].split("\t")
    assert cells[-2] == lines[2].split("\t")[-2]
    cells[-2] = "0" * 64
    lines[3] = "\t".join(cells)
    table.write_text("\n".join(lines))
    with pytest.raises(RunError, match="line 4: its model is not that of line 2"):
        read_certificates(table)
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).eval() for _ in range(2)]
    models = [SmoothedClassifier(network, 0.1, 2) for network in networks]
    x = torch.rand(2, 1, 1, 2)
    parts = [rush.certify(model, (x, torch.tensor([0, 1])), num_estimation=100) for model in models]
    assert parts[0].model != parts[1].model
    append_certificates(tmp_path / "c.tsv", parts[0], [0, 1])
    read = read_certificates(tmp_path / "c.tsv")
    assert read is not None
    assert read[1].model == parts[0].model == models[0].fingerprint()
    with pytest.raises(InputError, match="different models"):
        join_certificates(parts)


def test_a_model_that_turns_out_to_be_no_fixed_function_leaves_no_certificate(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _table(run)
    _interrupt_certification(run)

    def failing(*_: Any) -> Iterator[Any]:
        yield from list(certify_each(*_))[:3]
        raise ModelError("no fixed function")

    certify_each = certify_stage.certify_each
    monkeypatch.setattr(certify_stage, "certify_each", failing)
    with pytest.raises(ModelError, match="no fixed function"):
        run_stage(run, "certify")
    assert not (run.path / "certificates.parts").exists()
    assert run.finished("certify") is None
    monkeypatch.undo()
    run_stage(run, "certify")
    assert _table(run) == before
