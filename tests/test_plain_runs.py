"""A run without noise: adversarial training goes through all stages, is attacked as what it is, and claims no proof.

Seeds are fixed, so nothing here fails by chance on one machine; the trained network's accuracies have wide margins.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rush
import rush.evaluation.evaluation
from commands import Call, refusal
from rush.choices import FinetuneObjective
from rush.commands.external import load_model
from rush.commands.predict import predict_files, source_of_run
from rush.errors import ConfigError, InputError, RunError
from rush.models.storage import load_plain, load_smoothed
from rush.pipeline.attackers import _plain_rungs
from rush.pipeline.stages import run_stage
from rush.recipe.schema import WITHOUT_NOISE, AttackConfig
from rush.records.folder import RunFolder
from rush.records.read_run import read_run
from rush.reporting.compare import compare_command
from rush.reporting.page import write_report
from rush.reporting.wording import summary_rows
from rush.smoothing.classifier import SmoothedClassifier
from rush.training.supervised import Examples
from tiny import EVERY_RUN, differing, part_of, results, run_tiny, tiny

PLAIN = (
    "smoothing.sigma=0",
    'finetune.objective="pgd-at"',
    "finetune.adversary.steps=2",
    'finetune.adversary.epsilon="16/255"',
    'finetune.adversary.step_size="12/255"',
    "finetune.epochs=4",
    "pretrain.epochs=0",
    "data.held_out=40",
    'attack.epsilon="16/255"',
    "attack.curve_images=2",
    "audit.images=2",
)
SMOOTHED = Path(__file__).parent.parent / "results/cifar10-small"
RUNGS = ["clean", "fgsm", "pgd-20", "pgd-100"]
GROUP = 8  # so that the attack stage has places to stop at


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rush.evaluation.evaluation, "GROUP", GROUP)
        yield


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of PGD adversarial training; tests read it or work on a copy."""
    return run_tiny(tmp_path_factory.mktemp("plain"), *PLAIN).path


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def broken(folder: Path, rung: str) -> dict[str, bool]:
    """By image id, what attacks.tsv says of the rung."""
    lines = [line.split("\t") for line in (folder / "attacks.tsv").read_text().splitlines()]
    return {line[2]: line[4] == "broken" for line in lines[1:] if line[0] == rung}


def classes_at(model: nn.Module, points: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(points)).argmax(1).numpy()


def test_every_stage_is_finished_and_nothing_is_certified(plain_run: Path) -> None:
    run = RunFolder.open(plain_run)
    assert all(run.require(stage)["seconds"] >= 0 for stage in EVERY_RUN)
    certify = run.require("certify")
    assert (certify["images"], certify["certified"]) == (0, False)
    assert "not smoothed" in certify["reason"]
    assert not list(plain_run.glob("certificates*"))
    attack = run.require("attack")
    assert [rung["name"] for rung in attack["rungs"]] == RUNGS
    assert (attack["sandwich"]["checked"], attack["sandwich"]["violations"]) == (0, [])
    assert "not smoothed" in attack["sandwich"]["reason"]
    assert len(attack["curve"]["points"]) == 6
    assert attack["curve"]["points"][-1]["broken"] == 2
    assert all(rung["eot_samples"] == 0 for rung in attack["rungs"])
    assert json.loads((plain_run / "audit.json").read_text())["evaluation"].startswith("PGD-20, cross-entropy (the")


def test_the_held_out_images_are_watched_without_noise(plain_run: Path) -> None:
    run = RunFolder.open(plain_run)
    assert run.events("monitor", "pretrain") == []
    (watched,) = run.events("monitor", "finetune")
    assert watched["epoch"] == 4
    assert 0.5 < watched["accuracy"] <= 1
    assert "accuracy_noisy" not in watched


def test_load_gives_the_network_that_was_attacked(plain_run: Path) -> None:
    model = rush.load(plain_run, device="cpu")
    assert isinstance(model, nn.Module)
    assert not isinstance(model, SmoothedClassifier)
    assert not any(layer.training for layer in model.modules())
    stored = arrays(plain_run / "attacks/images.npz")
    right = classes_at(model, stored["images"].astype(np.float32) / 255) == stored["labels"]
    assert broken(plain_run, "clean") == dict(zip(stored["ids"].tolist(), (~right).tolist(), strict=True))
    ladder = read_run(plain_run).ladder
    assert ladder is not None
    assert ladder.clean.accuracy.estimate == right.mean()
    assert ladder.clean.undecided == 0


def test_pgd_breaks_what_is_right_without_attack(plain_run: Path) -> None:
    ladder = read_run(plain_run).ladder
    assert ladder is not None
    clean, pgd = (next(rung for rung in ladder.rungs if rung.name == name) for name in ("clean", "pgd-20"))
    assert clean.accuracy.estimate > 0.5, "the network has learned nothing, so that this says nothing"
    assert pgd.accuracy.estimate < clean.accuracy.estimate
    model, stored = rush.load(plain_run, device="cpu"), arrays(plain_run / "attacks/images.npz")
    points = arrays(plain_run / "attacks/pgd-20.npz")
    wrong = classes_at(model, points["adversarial"]) != stored["labels"]  # type: ignore[arg-type]
    assert broken(plain_run, "pgd-20") == dict(zip(points["ids"].tolist(), wrong.tolist(), strict=True))
    assert np.abs(points["adversarial"] - stored["images"] / 255).max() <= 16 / 255 + 1e-6


def test_an_attack_stage_that_was_cut_off_ends_with_the_same_results(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = part_of(plain_run, tmp_path / "run", "attack", "audit")
    write_group = rush.evaluation.evaluation.write_group
    attacked: list[str] = []

    def counted(file: Path, *rest: Any, stop: bool) -> None:
        if stop and len(attacked) == 7:
            raise KeyboardInterrupt
        attacked.append(file.name)
        write_group(file, *rest)

    monkeypatch.setattr(rush.evaluation.evaluation, "write_group", partial(counted, stop=True))
    with pytest.raises(KeyboardInterrupt):
        run_stage(run, "attack")
    assert not run.finished("attack")
    monkeypatch.setattr(rush.evaluation.evaluation, "write_group", partial(counted, stop=False))
    run_stage(run, "attack")
    groups = -(-20 // GROUP)
    assert len(attacked) == len(RUNGS) * groups + 6, "a finished group was attacked again"
    (run.path / "audit.json").touch()  # left out of the comparison
    (run.path / "certificates.tsv").write_text("time\n")
    shutil.copytree(plain_run, tmp_path / "first")
    (tmp_path / "first/certificates.tsv").write_text("time\n")
    (tmp_path / "first/audit.json").write_text("")
    assert differing(results(tmp_path / "first"), results(run.path)) == []


def test_a_file_is_predicted_by_the_network_and_never_abstained_on(plain_run: Path, tmp_path: Path) -> None:
    stored = arrays(plain_run / "attacks/images.npz")
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for file, image in zip(files, stored["images"], strict=False):
        Image.fromarray(image[0]).save(file)
    found = predict_files(source_of_run(plain_run), files, num_samples=10, alpha=0.001, seed=0, resize=False)
    model = rush.load(plain_run, device="cpu")
    expected = classes_at(model, stored["images"][:5].astype(np.float32) / 255)  # type: ignore[arg-type]
    assert [answer.name for answer in found] == [str(label) for label in expected]
    assert {answer.radius for answer in found} == {None}


def test_the_network_of_a_run_can_be_smoothed_from_outside(plain_run: Path) -> None:
    smoothed = load_model(str(plain_run), 0.25, 10)
    assert isinstance(smoothed, SmoothedClassifier)
    assert smoothed.sigma == 0.25
    assert not isinstance(load_model(str(plain_run), None, 10), SmoothedClassifier)


def test_the_report_shows_the_attacks_and_says_why_nothing_is_proved(plain_run: Path) -> None:
    page = write_report(plain_run).read_text()
    assert "Nothing is certified: the classifier is used without smoothing noise" in page
    assert 'id="ladder"' in page
    assert 'id="audit"' in page
    assert "PGD-20" in page
    for absent in (
        'data-share="proved"',
        'id="certificates"',
        'id="sandwich"',
        "smoothed classifier",
        "unsound",
        'class="floor"',
    ):
        assert absent not in page, absent
    rows = dict(summary_rows(read_run(plain_run)))
    assert rows["certificates"].startswith("none: the classifier is used without smoothing noise")
    assert "sandwich" not in rows
    assert read_run(plain_run).missing == ()


def test_a_report_before_the_attack_names_what_is_missing(plain_run: Path, tmp_path: Path) -> None:
    run = part_of(plain_run, tmp_path / "run", "attack", "audit")
    page = write_report(run.path).read_text()
    assert "Nothing is certified" in page
    assert "Not attacked yet" in page
    assert "Not certified yet" not in page


def test_the_commands_show_such_a_run(plain_run: Path, call: Call) -> None:
    info = call("info", plain_run)
    assert (info.returncode, "without smoothing noise" in info.stdout) == (0, True)
    assert "PGD-100, small steps" in call("ladder", plain_run).stdout
    assert "certificates.tsv" in refusal(call("certify", plain_run, "--recompute", "--alpha", "0.01"))
    alone = call("compare", plain_run)
    assert (alone.returncode, "PGD-20" in alone.stdout) == (0, True)


def test_a_comparison_of_many_runs_breaks_no_word_of_a_narrow_terminal(
    plain_run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["first", "seed-1-trained-against-noise", "second", "seed-2", "seed-3-trained-for-half-as-long"]
    runs = [shutil.copytree(plain_run, tmp_path / name) for name in names]
    for columns in (60, 80, 90, 70):
        monkeypatch.setenv("COLUMNS", str(columns))
        narrow = call("compare", *runs).stdout
        assert max(map(len, narrow.splitlines())) <= columns
        assert all(name in narrow for name in names)
    monkeypatch.delenv("COLUMNS")
    piped = call("compare", *runs).stdout
    assert max(map(len, piped.splitlines())) > 110, "one table with a column for every run"
    words = [{word for word in text.split() if not word.startswith("━")} for text in (narrow, piped)]
    assert words[0] == words[1]


def test_runs_with_and_without_certificates_are_compared(plain_run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(plain_run, tmp_path / "again")
    tables = {title: (header, rows) for title, header, rows in compare_command([again, SMOOTHED, plain_run])}
    assert tables["Conditions"][0] == ("", "cifar10-small")
    header, rows = next(table for title, table in tables.items() if title.startswith("Accuracy under attack"))
    assert header == ("", "again", "cifar10-small", "run")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["sigma"] == ("none, not smoothed", "0.25, gaussian", "none, not smoothed")
    assert cells["images"] == ("20", "200", "20")
    assert cells["PGD-20"][0] == cells["PGD-20"][2] != "–" == cells["PGD-20"][1]
    first, other, third = cells["the same minus that of again, paired"]
    assert (first, other, third.split()[0]) == ("–", "different threat", "+0.0")
    assert [row[0] for row in tables["Without certificates"][1]] == ["again", "run"]


def test_runs_on_other_images_or_data_are_not_paired(plain_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain_run, tmp_path / "other")
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["data"]["test"]["fingerprint"] = "f00d"
    (other / "provenance.json").write_text(json.dumps(provenance))
    rows = compare_command([plain_run, other])[0][2]
    assert rows[-1][1:] == ("–", "not known to be the same data")


@pytest.mark.parametrize("objective", ["gaussian", "consistency", "smoothadv", "cat-rs"])
def test_an_objective_under_noise_is_refused_where_there_is_none(objective: FinetuneObjective, tmp_path: Path) -> None:
    wrong = (
        rf"smoothing\.sigma = 0 .* finetune\.objective = {objective} trains under it; set .* standard, pgd-at, trades"
    )
    with pytest.raises(ConfigError, match=wrong) as caught:
        tiny(tmp_path, "smoothing.sigma=0", f'finetune.objective="{objective}"')
    assert ": :" not in str(caught.value)
    assert tiny(tmp_path, f'finetune.objective="{objective}"').smoothing.sigma == 0.25


@pytest.mark.parametrize("objective", WITHOUT_NOISE)
def test_an_objective_without_noise_is_allowed_with_and_without(objective: FinetuneObjective, tmp_path: Path) -> None:
    for sigma in (0, 0.25):
        assert tiny(tmp_path, f"smoothing.sigma={sigma}", f'finetune.objective="{objective}"').smoothing.sigma == sigma


def test_an_objective_that_asks_for_noise_is_told_that_there_is_none() -> None:
    x = torch.zeros(1, 1, 8, 8)
    examples = Examples(nn.Identity(), nn.Identity(), x, torch.zeros(1).long(), None, torch.Generator(), 0.0)
    with pytest.raises(InputError, match="trains under the noise of the smoothed classifier, and there is none"):
        _ = examples.noise


def test_the_ladder_is_the_one_of_deterministic_networks_or_its_weak_part() -> None:
    whole = [rung.name for rung in _plain_rungs(AttackConfig(), 10)]
    assert whole == [*RUNGS, "apgd", "apgd-margin", "apgd-targets", "square", "worst-case"]
    assert [rung.name for rung in _plain_rungs(AttackConfig(strong_steps=0), 10)] == RUNGS


def test_a_model_folder_says_whether_it_is_smoothed(plain_run: Path, tmp_path: Path) -> None:
    description = json.loads((plain_run / "model/model.json").read_text())
    assert description["noise"] == {"name": "none"}
    assert description["execution"]["precision"] == "float32"
    with pytest.raises(RunError, match=r"not smoothed .* rush\.load returns it as it is"):
        load_smoothed(plain_run / "model", rush.runtime.execution.Execution())
    with pytest.raises(RunError, match="holds a smoothed classifier"):
        load_plain(SMOOTHED / "model", "cpu")
    folder = shutil.copytree(plain_run / "model", tmp_path / "model")
    (folder / "model.json").write_text(json.dumps(description | {"noise": {"name": "cauchy"}}))
    supported = "gaussian, discrete, uniform, laplace, splitting, none; "
    with pytest.raises(RunError, match=f"has noise 'cauchy', this version supports {supported}"):
        rush.load(folder, device="cpu")
