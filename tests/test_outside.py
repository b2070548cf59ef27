"""Any model on the command line: its certificates, attacks, audit, ladder and verdict, and their refusals."""

import importlib
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rush
from commands import Call, refusal
from rush.auditing.audit import AuditReport
from rush.choices import VERDICTS
from rush.commands.external import ExternalEvaluation, load_model
from rush.commands.external import call as call_by_name
from rush.commands.ladder import rung_rows
from rush.commands.verdict import judge_file
from rush.data.images import evaluation_order
from rush.data.sources import load_images
from rush.errors import ConfigError, DataError, InputError, ModelError
from rush.evaluation.attack import verdict
from rush.evaluation.ladder import curve, grey_radius, ladder, plain_ladder
from rush.evaluation.plans import Suite
from rush.recipe.schema import AttackConfig
from rush.records.certificates import read_certificates
from rush.records.folder import RunFolder
from rush.smoothing.classifier import SmoothedClassifier

THREAT = rush.ThreatModel("linf", 0.1)
MODELS = """
import torch
from torch import nn
from rush import SmoothedClassifier

class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 10, generator=generator))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.weight

class Noisy(Sums):
    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x))

def sums(): return Sums()
def noisy(): return Noisy()
def smoothed(): return SmoothedClassifier(Sums(), 0.25, 10)
def nothing(): return 3
def raises(): return torch.zeros(2) @ torch.zeros(3)
def loads(): return Sums().load_state_dict({"other": torch.zeros(1)})
def reads(): return open("weights.pt")
def imports(): import nowhere_at_all
def leaves(): raise SystemExit(2)
def needs(width): return Sums()
def trains(): return Sums().train()
def refuses(): return SmoothedClassifier(Sums(), -1, 10)
net = Sums()

class Two(Sums):
    def forward(self, x):
        return super().forward(x)[:, :2]

def two(): return Two()
def named(): return SmoothedClassifier(Two(), 0.25, 2, classes=("dog", "cat"))
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with models, in the working folder, known to this test alone."""
    name = f"models_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_module_is_found_in_the_working_folder_and_smoothed_where_asked(outside: str) -> None:
    assert type(load_model(f"{outside}:sums", None, 10)).__name__ == "Sums"
    made = load_model(f"{outside}:sums", 0.5, 10)
    assert isinstance(made, SmoothedClassifier)
    assert made.sigma == 0.5
    assert load_model(f"{outside}:smoothed", None, 10).sigma == 0.25
    assert type(load_model(f"{outside}:net", None, 10)).__name__ == "Sums"  # a network itself


@pytest.mark.parametrize(
    ("name", "sigma", "message"),
    [
        ("nowhere_at_all:sums", None, "No module named 'nowhere_at_all'.*in the folder of the module"),
        ("{}:absent", None, "has no function 'absent'"),
        ("{}:nothing", None, r"gave int, expected a torch\.nn\.Module"),
        ("{}:", None, "must read module:function"),
        ("{}", None, r"--model models_\d+ is neither module:function, e.g. mymodels:net, nor a run folder"),
        ("{}:smoothed", 0.5, "its own noise; omit --sigma"),
    ],
)
def test_what_is_no_model_is_refused(outside: str, name: str, sigma: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(name.format(outside), sigma, 10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"\(\) failed: RuntimeError: inconsistent tensor size.* \(models_\d+\.py, line 24\); .*--traceback"),
        (
            "loads",
            'failed: RuntimeError: .*Missing key.*: "weight"\\. Unexpected key.* \\(models_\\d+\\.py, line 25\\)',
        ),
        ("reads", r"failed: FileNotFoundError: .*weights\.pt.* \(models_\d+\.py, line 26\)"),
        ("imports", "failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("leaves", r"failed: SystemExit: 2 \(models_\d+\.py, line 28\)"),
        ("needs", "failed: TypeError: needs.. missing 1 required positional argument: 'width'"),
    ],
)
def test_what_a_users_function_raises_is_one_line_with_its_place(outside: str, function: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        load_model(f"{outside}:{function}", None, 10)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nowhere_at_all", "importing .* failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(:", "importing .* failed: SyntaxError: invalid syntax"),
        ("1 / 0", r"importing .* failed: ZeroDivisionError: division by zero \(broken_module\.py, line 1\)"),
        ("import sys; sys.exit('usage')", "importing .* failed: SystemExit: usage"),
    ],
)
def test_what_a_users_module_raises_is_one_line(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text(content)
    importlib.invalidate_caches()
    try:
        with pytest.raises(ModelError, match=message):
            load_model("broken_module:f", None, 10)
    finally:
        sys.modules.pop("broken_module", None)


def test_errors_of_this_library_pass_through_a_users_function(outside: str) -> None:
    with pytest.raises(InputError, match=r"^sigma must be a finite number > 0"):
        load_model(f"{outside}:refuses", None, 10)


def test_a_network_in_training_mode_is_one_line(call: Call, outside: str) -> None:
    text = refusal(call("ladder", "--model", f"{outside}:trains", "--data", "digits", "--images", 2))
    assert "training mode" in text


def test_several_folders_of_a_model_from_outside_are_roots(call: Call, outside: str, tmp_path: Path) -> None:
    """--data names its images; of a run folder, which has a name of its own, it is where they lie."""
    for name in "ab":
        (tmp_path / name).mkdir()
    roots = ("--root", tmp_path / "a", "--root", tmp_path / "b")
    text = refusal(call("ladder", "--model", f"{outside}:net", "--data", "no-such-set", *roots))
    assert f"{tmp_path}/a/no-such-set or {tmp_path}/b/no-such-set does not exist" in text
    text = refusal(call("ladder", "--model", f"{outside}:net", "--data", "digits", "--data", "cifar10"))
    assert "--data names one data set, got digits, cifar10; give the folders that hold it with --root" in text


def test_a_run_folder_takes_several_data_folders_in_every_command(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert call("audit", run, "--data", tmp_path / "a", "--data", tmp_path / "b").returncode == 0
    assert RunFolder.open(run).recipe.data.root == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_thresholds_of_a_command_are_fractions_in_pixel_units() -> None:
    assert ExternalEvaluation(norm="linf", epsilon="8/255").threat.epsilon == 8 / 255
    with pytest.raises(InputError, match="exceeds the pixel range"):
        _ = ExternalEvaluation(norm="linf", epsilon="8").threat
    with pytest.raises(ConfigError, match="--epsilon: 'much' is not a number"):
        _ = ExternalEvaluation(norm="l2", epsilon="much").threat


def test_an_audit_of_any_model_is_written_and_read_back(call: Call, outside: str, tmp_path: Path) -> None:
    """Random weights: nearly every digit is misclassified without an attack, so nothing can be overestimated."""
    model = ("--model", f"{outside}:sums", "--data", "digits", "--epsilon", "8/255", "--images", 70)
    done = call("audit", *model, "--out", "a.json")
    assert done.returncode == 0, done.stderr
    report = AuditReport.from_json(json.loads((tmp_path / "a.json").read_text()))
    assert report.images == 70
    assert done.stdout.splitlines()[:3] == report.summary()[:3]
    assert "PGD-20, cross-entropy (the default)" in done.stdout
    assert report.reference_accuracy <= report.evaluation_accuracy < 0.4


def test_a_ladder_of_any_model_ends_with_the_worst_case(call: Call, outside: str) -> None:
    done = call("ladder", "--model", f"{outside}:sums", "--data", "digits", "--epsilon", "4/255", "--images", 12)
    assert done.returncode == 0, done.stderr
    labels = [rung.label for rung in plain_ladder(10)]
    assert all(label in done.stdout for label in labels)
    assert done.stderr.count(" %") == len(labels)


def test_a_random_model_must_say_what_it_is_used_for(call: Call, outside: str) -> None:
    command = ("ladder", "--model", f"{outside}:noisy", "--data", "digits", "--images", 4)
    assert 'decision="vote"' in refusal(call(*command))


def test_a_run_folder_keeps_its_own_threat_model(call: Call, tiny_run: Path) -> None:
    assert "--epsilon belongs to --model" in refusal(call("audit", tiny_run, "--epsilon", "4/255"))
    assert "give a run folder, or --model" in refusal(call("audit"))
    assert "--rung belongs to a run folder" in refusal(call("audit", "--model", "a:b", "--rung", "frozen"))


def test_a_rung_of_a_run_is_audited_beside_the_runs_own_audit(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    before = (copy / "audit.json").read_bytes()
    done = call("audit", copy, "--rung", "frozen")
    assert done.returncode == 0, done.stderr
    report = AuditReport.from_json(json.loads((copy / "audit-frozen.json").read_text()))
    assert report.evaluation == "one noise draw frozen before the loop"
    assert (copy / "audit.json").read_bytes() == before
    assert "the ladder has no rung 'eot-3'; it has clean, transfer, frozen" in refusal(
        call("audit", copy, "--rung", "eot-3")
    )


def test_points_in_a_file_are_judged_like_points_in_memory(outside: str, tmp_path: Path) -> None:
    images = load_images("digits", split="test")[:30]
    points = (images.pixels() + 0.02).clamp(0, 1)
    file, threat = tmp_path / "points.npz", rush.ThreatModel("linf", 0.03)
    np.savez(file, adversarial=points.numpy()[::-1], ids=np.array(images.ids)[::-1])
    external = ExternalEvaluation(f"{outside}:smoothed", ["digits"], images=None)
    model = external.classifier
    result = judge_file(file, external.pixels, model, threat, max_votes=400)
    whole = verdict(model, images, points, threat, max_votes=400)
    assert result.ids == tuple(reversed(whole.ids))
    np.testing.assert_array_equal(result.verdict[::-1], whole.verdict)
    assert result.broken.any()
    assert result.held.any()

    grey = (points * 255).round().to(torch.uint8).numpy()
    np.savez(file, adversarial=grey, images=images.images.numpy(), labels=images.labels)
    alone = judge_file(file, None, model, threat, max_votes=400)
    assert len(alone) == 30
    assert alone.linf.max() == pytest.approx(5 / 255, abs=1e-6)  # 0.02 is 5.1 grey levels


BLANK = np.zeros((3, 1, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.zeros(3)}, "has no array 'adversarial'; it has points"),
        ({"adversarial": BLANK, "ids": np.array(["a", "b", "c"])}, "names 3 images .* not in the data set, first a"),
        ({"adversarial": BLANK, "ids": np.array([0.0, 1.0, 2.0])}, "must be text or integers of shape"),
        ({"adversarial": BLANK, "ids": np.array([["0"], ["1"], ["2"]])}, "must be text or integers of shape"),
        ({"adversarial": BLANK, "ids": np.array([b"\xff", b"a", b"b"])}, "bytes that are not UTF-8"),
    ],
)
def test_points_of_named_images_that_cannot_be_judged_say_why(
    arrays: dict[str, np.ndarray], message: str, outside: str, tmp_path: Path
) -> None:
    external = ExternalEvaluation(f"{outside}:sums", ["digits"], images=3)
    np.savez(tmp_path / "points.npz", **arrays)
    with pytest.raises(DataError, match=message):
        judge_file(tmp_path / "points.npz", external.pixels, external.classifier, THREAT)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"adversarial": BLANK[:, 0]},
            r"must be \(N, C, H, W\), float in \[0, 1\] or uint8, got float32 \(3, 8, 8\)",
        ),
        ({"labels": np.array(["0", "1", "2"])}, r"labels in .* must be class indices, integers .* got <U1 \(3,\)"),
        ({"labels": np.array([0, 1, 1.7])}, r"labels in .* got float64 \(3,\)"),
        ({"labels": np.array([0.0, 1, 2])}, r"labels in .* got float64 \(3,\)"),
        ({"labels": np.array([True, False, True])}, r"labels in .* got bool \(3,\)"),
        ({"labels": np.array([[0], [1], [2]])}, r"labels in .* got int64 \(3, 1\)"),
        ({"images": np.zeros((3, 1, 8, 8), np.uint16)}, "images in .* must be .* float in .* or uint8, got uint16"),
        ({"images": np.zeros((3, 1, 8, 8), np.int64)}, "images in .* got int64"),
    ],
)
def test_arrays_of_another_kind_in_a_file_are_refused(
    arrays: dict[str, np.ndarray], message: str, outside: str, tmp_path: Path
) -> None:
    file, model = tmp_path / "points.npz", load_model(f"{outside}:sums", None, 10)
    np.savez(file, **{"adversarial": BLANK, "images": BLANK, "labels": np.array([0, 1, 2]), **arrays})
    with pytest.raises(DataError, match=message):
        judge_file(file, None, model, THREAT)


@pytest.mark.parametrize("kind", [">f4", "<f8", np.float16, np.longdouble, np.uint8])
def test_pixels_of_every_float_type_and_byte_order_are_read(kind: str, outside: str, tmp_path: Path) -> None:
    file, model = tmp_path / "points.npz", load_model(f"{outside}:sums", None, 10)
    images = load_images("digits", split="test")[:3]
    pixels = images.images.numpy() if kind is np.uint8 else images.pixels().numpy().astype(kind)
    np.savez(file, adversarial=pixels, images=images.pixels().numpy(), labels=images.labels)
    result = judge_file(file, None, model, THREAT)
    assert result.linf.max() <= 2.0**-12


def test_ids_may_be_bytes_or_integers_and_must_differ(outside: str, tmp_path: Path) -> None:
    file, external = tmp_path / "points.npz", ExternalEvaluation(f"{outside}:sums", ["digits"], images=3)
    pixels, model = external.pixels, external.classifier
    x, names = pixels.x.numpy(), list(pixels.ids)
    np.savez(file, adversarial=x, ids=np.array([name.encode() for name in names]))
    assert judge_file(file, pixels, model, THREAT).ids == tuple(names)
    numbered = replace(pixels, ids=("0", "1", "2"))
    np.savez(file, adversarial=x, ids=np.arange(3))
    assert judge_file(file, numbered, model, THREAT).ids == ("0", "1", "2")
    np.savez(file, adversarial=x, ids=np.array([0, 1, 1]))
    with pytest.raises(DataError, match="has a duplicate id, 1; give one point per image"):
        judge_file(file, numbered, model, THREAT)


def test_a_file_that_is_no_archive_of_arrays_is_refused(outside: str, tmp_path: Path) -> None:
    model = load_model(f"{outside}:sums", None, 10)
    with pytest.raises(DataError, match="does not exist"):
        judge_file(tmp_path / "absent.npz", None, model, THREAT)
    (tmp_path / "text.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read as arrays"):
        judge_file(tmp_path / "text.npz", None, model, THREAT)
    np.save(tmp_path / "single.npy", np.zeros((3, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"truncated or not an \.npz file"):
        judge_file(tmp_path / "single.npy", None, model, THREAT)
    np.savez(tmp_path / "objects.npz", adversarial=np.array([{}, {}], object))
    with pytest.raises(DataError, match="it holds object, allowed are plain numbers and text"):
        judge_file(tmp_path / "objects.npz", None, model, THREAT)
    whole = tmp_path / "whole.npz"
    np.savez(whole, adversarial=np.random.default_rng(0).random((3, 1, 8, 8)))
    damaged = bytearray(whole.read_bytes())
    damaged[300:310] = b"0123456789"
    whole.write_bytes(damaged)
    with pytest.raises(DataError, match=r"whole\.npz.* cannot be read: "):
        judge_file(whole, None, model, THREAT)


def test_an_audit_on_the_command_line_says_first_that_it_cannot_hold(call: Call, outside: str) -> None:
    done = call("audit", "--model", f"{outside}:sums", "--data", "digits", "--images", 5, "--max-votes", 200)
    assert done.returncode == 0, done.stderr
    assert "5 images can show `overestimated`, but not `holds` at tolerance 0.05" in done.stderr.splitlines()[0]
    assert "takes at least 59" in done.stdout or "overestimated:" in done.stdout


def test_the_ladder_climbs_from_no_attack_to_the_worst_case() -> None:
    threat = rush.ThreatModel("linf", 8 / 255)
    config = AttackConfig(eot_samples=(1, 4))
    rungs = ladder(config, threat, 10)
    names = [rung.name for rung in rungs]
    strong = ["apgd", "apgd-margin", "apgd-targets", "apgd-restarts", "square", "worst-case"]
    assert names == ["clean", "transfer", "frozen", "eot-1", "eot-4", *strong]
    assert isinstance(rungs[-1], Suite)
    assert "the paper's protocol" in rungs[3].label
    assert "paper" not in ladder(config, rush.ThreatModel("linf", 4 / 255), 10)[3].label
    assert [rung.name for rung in ladder(config.replace(strong_steps=0), threat, 10)] == names[:5]


@pytest.mark.parametrize(("norm", "last"), [("linf", 0.5), ("l2", 0.5 * 8), ("l1", 0.5 * 64)])
def test_the_curve_ends_where_every_image_can_be_made_grey(norm: str, last: float) -> None:
    assert grey_radius(norm, 64) == last  # type: ignore[arg-type]
    points = curve(rush.ThreatModel(norm, 0.1), 64, 10, 4)  # type: ignore[arg-type]
    epsilons = [float(threat.epsilon) for threat, _ in points]
    assert epsilons[0] == 0.025
    assert epsilons[-1] == last
    assert epsilons == sorted(set(epsilons))
    assert len({plan.name for _, plan in points}) == len(points)


def test_rows_of_a_ladder_pair_each_rung_with_the_one_before(outside: str) -> None:
    external = ExternalEvaluation(f"{outside}:smoothed", ["digits"], epsilon="0.05", images=10)
    results = [
        rush.attack(external.classifier, external.pixels, external.threat, method) for method in ("none", "fgsm")
    ]
    first, second = rung_rows(results)
    assert first[4] == ""
    assert second[4].startswith(("−", "+0"))
    assert second[1] == "16 + 0"


def test_call_needs_a_function() -> None:
    with pytest.raises(ConfigError, match="must read module:function"):
        call_by_name("module")


def test_points_are_judged_under_a_seed_drawn_after_them_which_repeats(
    call: Call, outside: str, tmp_path: Path
) -> None:
    images = load_images("digits", split="test")[:40]
    np.savez(tmp_path / "points.npz", adversarial=images.pixels().numpy(), ids=np.array(images.ids))
    command = ("verdict", "points.npz", "--model", f"{outside}:smoothed", "--data", "digits")

    def judged(*options: object) -> list[str]:
        done = call(*command, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    seeds = []
    for _ in range(2):
        shown = judged()
        (line,) = [line for line in shown if "--seed" in line]
        seeds.append(int(line.rsplit("--seed ", 1)[1].split()[0]))
        again = judged("--seed", seeds[-1])
        one, other = ([line.split() for line in lines if "seed" not in line] for lines in (shown, again))
        assert one[2:] == other[2:]
    assert seeds[0] != seeds[1]  # equal once in 4 billion


def test_certificates_of_any_model_are_those_of_the_library_and_resume(
    call: Call, outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("certify", "--model", f"{outside}:sums", "--data", "digits", "--sigma", 0.25, "--images", 12)
    words = (*words, "--num-estimation", 1000, "--radii", 0.125)
    from rush.pipeline import certify as stage

    real = stage.certify_each

    def interrupted(*arguments: object) -> Iterator[object]:
        yield from itertools.islice(real(*arguments), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "certify_each", interrupted)
    assert call(*words).returncode == 130
    assert not (tmp_path / "certificates.tsv").exists()
    monkeypatch.setattr(stage, "certify_each", real)
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "l2 radius 0.125" in done.stdout
    indices, certificates = read_certificates(tmp_path / "certificates.tsv")
    images = load_images("digits", split="test")[indices]
    smoothed = load_model(f"{outside}:sums", 0.25, 10)
    options = {"method": "sequential", "num_estimation": 1000, "radii": (0.125,)}
    expected = rush.certify(smoothed, images, **options)
    np.testing.assert_array_equal(certificates.counts, expected.counts)
    np.testing.assert_array_equal(certificates.radius, expected.radius)
    assert sorted(path.name for path in tmp_path.iterdir() if "certificates" in path.name) == ["certificates.tsv"]
    assert "certificates.tsv exists; give another file to --out" in refusal(call(*words))
    again = call("certify", "--recompute", tmp_path / "certificates.tsv", "--alpha", 0.01)
    assert again.returncode == 0, again.stderr


def test_photos_are_resampled_and_the_order_of_their_classes_is_named_or_checked(
    call: Call, outside: str, tmp_path: Path
) -> None:
    for seed, name in enumerate(("cat/a", "cat/b", "dog/c")):
        file = tmp_path / f"photos/test/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 20), np.uint8)).save(file)
    words = ("certify", "--data", "photos", "--size", 8, "--num-estimation", 200, "--model")
    done = call(*words, f"{outside}:two", "--sigma", 0.25, "--noise", "discrete")
    assert done.returncode == 0, done.stderr
    assert f"{outside}:two names no classes: its logits are taken to be cat, dog\n" in done.stderr
    _, certificates = read_certificates(tmp_path / "certificates.tsv")
    smoothed = load_model(f"{outside}:two", 0.25, 2, "discrete")
    expected = rush.certify(smoothed, load_images("photos", split="test", size=8), "sequential", num_estimation=200)
    assert certificates.select(np.argsort(certificates.ids)).counts.tolist() == expected.counts.tolist()
    (tmp_path / "certificates.tsv").unlink()
    assert "dog, cat" in refusal(call(*words, f"{outside}:named"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("certify",), "give a run folder, or --model module:function with --data and --sigma"),
        (("certify", "--model", "{}:sums", "--data", "digits"), "is not smoothed, .* give --sigma"),
        (("certify", "--model", "{}:sums", "--data", "digits", "--noise", "laplace"), "--noise laplace needs --sigma"),
        (("certify", "--model", "{}:sums"), "--model module:function with --data"),
        (("certify", "--model", "{}:sums", "--recompute"), "--recompute needs a run folder"),
        (("certify", "folder", "--model", "{}:sums"), "give a run folder or --model .*:sums, not both"),
        (("certify", "folder", "--method", "sequential"), "--method belongs to --model"),
        (("attack",), "give a run folder, or --model module:function with --data"),
        (("attack", "folder", "--method", "pgd"), "--method belongs to --model; .* --set attack.FIELD="),
        (("attack", "folder", "--epsilon", "4/255"), "--epsilon belongs to --model"),
        (("attack", "--model", "{}:sums", "--data", "digits", "--steps", 3), "'worst-case' is a fixed suite"),
        (("attack", "--model", "{}:sums", "--data", "digits", "--step-size", "x"), "--step-size: 'x' is not a number"),
        (("attack", "--model", "{}:sums", "--data", "digits", "--eot-samples", "x"), "must be an integer or auto"),
    ],
)
def test_what_cannot_be_certified_or_attacked_says_why(
    words: tuple[object, ...], message: str, call: Call, outside: str
) -> None:
    assert re.search(message, refusal(call(*(str(word).format(outside) for word in words))))


def test_points_of_an_attack_on_any_model_are_judged_again(call: Call, outside: str, tmp_path: Path) -> None:
    model = ("--model", f"{outside}:sums", "--data", "digits", "--sigma", 0.25)
    attack = ("--method", "pgd", "--steps", 3, "--step-size", "4/255", "--eot-samples", 4, "--max-votes", 400)
    done = call("attack", *model, "--images", 10, *attack)
    assert done.returncode == 0, done.stderr
    assert "PGD-3, EOT 4" in done.stdout
    images = load_images("digits", split="test")
    images = images[evaluation_order(len(images), 10, 0)]
    budget = {"steps": 3, "step_size": 4 / 255, "eot_samples": 4, "max_votes": 400}
    smoothed = load_model(f"{outside}:sums", 0.25, 10)
    expected = rush.attack(smoothed, images, rush.ThreatModel("linf", 8 / 255), "pgd", **budget)
    with np.load(tmp_path / "adversarial.npz") as stored:
        np.testing.assert_array_equal(stored["adversarial"], expected.adversarial.numpy())
        assert [VERDICTS.index(each) for each in stored["verdicts"]] == expected.verdict.tolist()
    assert not (tmp_path / "adversarial.npz.parts").exists()
    (printed,) = re.findall(r"`rush (verdict adversarial\.npz .*)` judges the points again", done.stderr)
    named = ["--model", f"{outside}:sums", "--sigma", "0.25", "--data", "digits"]
    assert shlex.split(printed)[2:] == [*named, "--norm", "linf", "--epsilon", "8/255"]
    judged = call(*shlex.split(printed))
    assert judged.returncode == 0, judged.stderr
    assert "adversarial.npz exists; give another file to --out" in refusal(call("attack", *model))
