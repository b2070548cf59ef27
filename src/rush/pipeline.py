"""The stages of a run: each reads what the stage before left in the run folder, hands plain arguments on and writes its
own part."""

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates, join_certificates
from rush.certification.certify import certify_each
from rush.certification.rules import Rule, make_rule
from rush.certification.sequential import UNDECIDED
from rush.certification.table import append_certificates, drop_unfinished_line, read_certificates, write_certificates
from rush.config import AdversaryConfig, AttackConfig, FinetuneConfig, PretrainConfig, Recipe, TrainingConfig
from rush.data.batches import Resident, TrainingImages
from rush.data.images import ImageSet, evaluation_order, hold_out, stratified_subset
from rush.data.noisy_views import NoiseSchedule
from rush.data.sources import decoded_bytes, load_images
from rush.data.streaming import Stream, open_stream
from rush.data.views import Views
from rush.engine.checkpoint import TrainingCheckpoint
from rush.engine.distributed import barrier, in_turn, rank, world_size
from rush.engine.forward import try_forwards
from rush.engine.loop import Keeping, Schedule
from rush.engine.precision import Execution, decide_execution
from rush.engine.probes import classifier_figures, encoder_figures, knn_correct, representations
from rush.engine.runs import RunFolder
from rush.errors import ConfigError, DataError, RunError
from rush.evaluation.audit import AuditReport, audit, write_audit
from rush.evaluation.defenders import Model, defend
from rush.evaluation.ladder import curve, epsilon_text, ladder, plain_ladder
from rush.evaluation.plans import Plan, Suite
from rush.evaluation.results import AttackResult
from rush.evaluation.robust import Judging, evaluate
from rush.evaluation.sandwich import Sandwich, check_sandwich, sandwich_plan, sandwich_positions, sandwich_threat
from rush.evaluation.table import write_attacks
from rush.finetuning import Objective, finetune
from rush.inputs import LabelledPixels, labelled_pixels
from rush.models.classifier import Classifier
from rush.noise import Gaussian
from rush.objectives.classification import cat_rs, consistency, gaussian, pgd_at, smoothadv, standard, trades
from rush.options import FinetuneObjective, Stage, parse_fraction
from rush.pretraining import ACL, Method, MoCo, SimCLR, channel_statistics, pretrain
from rush.randomness import seeded_init, stream
from rush.saving import (
    ClassifierSpec,
    load_plain,
    load_smoothed,
    load_weights,
    read_description,
    save_plain,
    save_smoothed,
    save_weights,
)
from rush.smoothing import SmoothedClassifier

ENCODER = Path("checkpoints/encoder.safetensors")
CERTIFICATES = Path("certificates.tsv")
CERTIFICATE_PARTS = Path("certificates.parts")
AUDIT = Path("audit.json")
NOT_SMOOTHED = "the classifier is not smoothed (smoothing.sigma = 0): nothing is certified"
_SAMPLE = 20_000  # of streamed images: what statistics and nearest neighbours are taken from
_BANK_IMAGES = 10_000  # for the live figures; the figure at the end takes all training images
_SEQUENTIAL_SHARE = 0.2  # of the cap that a sequential certification draws on average, for the trial of the forward


@dataclass(frozen=True)
class Conditions:
    """What every stage of a run shares: its folder, its recipe and the recorded execution."""

    run: RunFolder
    recipe: Recipe
    execution: Execution

    @classmethod
    def of(cls, run: RunFolder) -> "Conditions":
        wanted = run.recipe.execution
        torch.set_num_threads(run.recorded("threads") or torch.get_num_threads())
        return cls(run, run.recipe, decide_execution(wanted.device, wanted.precision, wanted.tile))

    def log(self, event: str, **values: Any) -> None:
        """Write one event of the run, in the first process."""
        if rank() == 0:
            self.run.log(event, **values)

    def begin(self, stage: Stage) -> None:
        """Log that an attempt at ``stage`` begins, once for all processes."""
        if rank() == 0:
            self.run.begin(stage)

    def images(self, split: str) -> ImageSet:
        """A split of the recipe's data, checked to be the one this run has used before; its fingerprint is recorded."""
        if split in self.run.loaded:
            return self.run.loaded[split]
        data = self.recipe.data
        images = load_images(data.name, split=split, root=data.root, size=data.size)
        self._record(split, images)
        self.run.loaded[split] = images
        return images

    def training_images(self) -> ImageSet | Stream:
        """The training images without those that are held out."""
        return self._divided[0]

    def held_out_images(self) -> ImageSet | None:
        """The training images that neither training sees; None where none is held out."""
        return self._divided[1]

    def pretraining_images(self) -> TrainingImages:
        """What pre-training draws from: the images of its split but the held-out ones, without labels."""
        split, held = self.recipe.data.pretrain_split, self.held_out_images()
        if split == "train":
            return self.source(self.training_images().without_labels())
        images = self._split(split)
        if held is not None:
            images = _without(images, np.concatenate([held.ids, np.char.add("train/", held.ids)]))
        return self.source(images.without_labels())

    def known_images(self, count: int | None = None) -> ImageSet:
        """Training images in memory: all, or at most ``count`` that are not held out, of streams a random sample."""
        images = self._split("train") if count is None else self.training_images()
        if isinstance(images, ImageSet):
            return images if count is None else images[: min(count, len(images))]
        wanted = min(count or _SAMPLE, len(images) - 1)
        return images.holding_out(wanted, stream(self.recipe.seed, "known images"))[1]

    def source(self, images: ImageSet | Stream) -> TrainingImages:
        """``images`` as a training draws from them, on the device."""
        if isinstance(images, Stream):
            return images
        return Resident(images, self.execution.device, rank(), world_size())

    @cached_property
    def _divided(self) -> tuple[ImageSet | Stream, ImageSet | None]:
        train, count = self._split("train"), self.recipe.data.held_out
        if not count:
            return train, None
        generator = stream(self.recipe.seed, "held out")
        return hold_out(train, count, generator) if isinstance(train, ImageSet) else train.holding_out(count, generator)

    def _split(self, split: str) -> ImageSet | Stream:
        """A split in memory, or streamed where it would take more than the recipe's share of it."""
        data = self.recipe.data
        limit = int(data.memory_gb * 2**30)
        if split in self.run.loaded or decoded_bytes(data.name, split, data.root, size=data.size) <= limit:
            return self.images(split)
        streamed = open_stream(
            data.name,
            split,
            root=data.root,
            size=data.size,
            memory=limit,
            device=self.execution.device,
            rank=rank(),
            processes=world_size(),
        )
        self._record(split, streamed)
        return streamed

    def _record(self, split: str, images: ImageSet | Stream) -> None:
        """Check that this run has used these images before, or note that it does now."""
        found = {split: {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}}
        in_turn(lambda: self.run.record_provenance(self.execution.as_dict(), found))

    def keeping(self, stage: Stage) -> Keeping:
        """Where and how often a training is kept."""
        checkpoint = TrainingCheckpoint(self.run.path / f"checkpoints/{stage}.pt", self.run.fingerprint(stage))
        execution = self.recipe.execution
        return Keeping(checkpoint, execution.checkpoint_minutes, execution.on_nonfinite)

    def evaluation_images(self, count: int | None, num_classes: int) -> tuple[list[int], LabelledPixels]:
        """The first ``count`` test images (all for None) of one seeded order, with their positions in the split.

        Certification and attacks take the beginning of the same order: whatever their numbers, they speak of the same
        images.
        """
        test = self.images("test")
        if count is not None and count > len(test):
            raise ConfigError(
                f"the recipe asks for {count} test images, {test.name} has {len(test)}; "
                "lower certify.images and attack.images"
            )
        order = evaluation_order(len(test), count, self.recipe.seed)
        return order, labelled_pixels(test[order], num_classes)


def run_pretrain(run: RunFolder) -> None:
    """Pre-train the encoder on the training images without their labels, then its kNN accuracy on the test images,
    once."""
    if run.finished("pretrain"):
        return
    here = Conditions.of(run)
    train, test = here.known_images(), here.images("test")
    _check_separate(train, test)
    here.begin("pretrain")
    config, recipe = here.recipe.pretrain, here.recipe
    classifier = new_classifier(recipe, train)
    source = here.pretraining_images()
    pretrain(
        source,
        classifier.encoder,
        classifier.normalize,
        method=method_of(config),
        views=Views(**config.views.model_dump()),
        noise=NoiseSchedule(**config.noise.model_dump()),
        schedule=schedule_of(config),
        projector_hidden=config.projector_hidden,
        projector_out=config.projector_out,
        seed=recipe.seed,
        execution=here.execution,
        compile_mode=recipe.execution.compile_training,
        keeping=here.keeping("pretrain"),
        monitor=_watch_encoder(here, classifier),
        log=here.log,
    )
    if rank() == 0:
        knn = _knn_accuracy(classifier, train, test, config.knn_neighbours, here.execution)
        save_weights(classifier.encoder, run.path / ENCODER)
        figures = {**_training_figures(run, "pretrain", len(source)), "objective": config.objective}
        run.finish("pretrain", **figures, knn_accuracy=knn)
    barrier()


def run_finetune(run: RunFolder) -> None:
    """Train the classifier on the pre-trained encoder and save the model, smoothed where the recipe has noise."""
    if run.finished("finetune"):
        return
    run.require("pretrain")
    here = Conditions.of(run)
    train = here.known_images()
    here.begin("finetune")
    config, recipe = here.recipe.finetune, here.recipe
    labelled = _labelled(here.training_images(), recipe)
    classifier = new_classifier(recipe, train)
    load_weights(classifier.encoder, run.path / ENCODER)
    finetune(
        labelled,
        classifier,
        objective=objective_of(config),
        noise=_noise(recipe),
        mode=config.mode,
        head_epochs=config.head_epochs,
        views=Views.weak(shift_pad=config.shift, flip=config.flip),
        schedule=schedule_of(config),
        seed=recipe.seed,
        execution=here.execution,
        compile_mode=recipe.execution.compile_training,
        keeping=here.keeping("finetune"),
        monitor=_watch_classifier(here, classifier),
        log=here.log,
    )
    if rank() == 0:
        forward = _save_model(here, classifier, train)
        figures = {**_training_figures(run, "finetune", len(labelled)), "objective": config.objective}
        run.finish("finetune", **figures, mode=config.mode, labelled_images=len(labelled), forward=forward)
    barrier()


def run_certify(run: RunFolder) -> None:
    """Certify the evaluation images, each written as soon as it is decided, and in the end ``certificates.tsv``.

    Goes on behind a kill with the images that are missing; with several processes each takes its share of them. Without
    noise there is nothing to certify, which is all that the stage then says.
    """
    if run.finished("certify"):
        return
    run.require("finetune")
    here = Conditions.of(run)
    if _noise(here.recipe) is None:
        _certify_nothing(here)
        return
    smoothed = load_smoothed(run.path / "model", here.execution)
    config = here.recipe.certify
    indices, pixels = here.evaluation_images(config.images, smoothed.num_classes)
    rule = make_rule(sigma=smoothed.sigma, num_images=len(pixels), **config.model_dump(exclude={"images"}))
    parts = run.path / CERTIFICATE_PARTS
    here.begin("certify")
    done = in_turn(lambda: _read_parts(run.path, rule, dict(zip(indices, pixels.ids, strict=True))))
    missing = [position for position, index in enumerate(indices) if index not in done]
    for position, certificate in certify_each(
        smoothed, pixels, rule, here.recipe.seed, missing[rank() :: world_size()]
    ):
        append_certificates(parts / f"{rank()}.tsv", certificate, [indices[position]])
    barrier()
    if rank() == 0:
        done = _read_parts(run.path, rule, dict(zip(indices, pixels.ids, strict=True)))
        certificates = join_certificates([done[index] for index in indices])
        write_certificates(run.path / CERTIFICATES, certificates, indices)
        shutil.rmtree(parts, ignore_errors=True)
        run.finish("certify", **_certify_figures(certificates))
    barrier()


def _certify_nothing(here: Conditions) -> None:
    here.begin("certify")
    if rank() == 0:
        here.run.finish("certify", seconds=0.0, images=0, certified=False, reason=NOT_SMOOTHED)
    barrier()


def run_attack(run: RunFolder) -> None:
    """Climb the ladder, follow accuracy against epsilon and attack inside every certified ball, of which there is none
    without noise; a group of images that was judged before is not attacked again. With several processes each takes its
    share of the groups.

    Raises: SandwichError when certified images are broken inside their radius more often than chance explains; the
    results are kept.
    """
    if run.finished("attack"):
        return
    run.require("certify")
    here = Conditions.of(run)
    here.begin("attack")
    barrier()
    siege = _Siege.of(here)
    results = [siege.evaluate(plan) for plan in siege.rungs]
    curve_ = [siege.evaluate(plan, threat, siege.curve_rows) for threat, plan in siege.curve]
    sandwich = Sandwich(0, (), 0)
    if siege.smoothed is not None:
        certificates = _read_certificates(run)
        results += siege.inside(certificates)
        sandwich = check_sandwich(certificates, [*results, *curve_], siege.config.alpha)
    if rank() == 0:
        write_attacks(run.path, results, dict(zip(siege.pixels.ids, siege.indices, strict=True)), siege.pixels)
        run.finish("attack", **_attack_figures(siege, results, curve_, sandwich))
    barrier()
    sandwich.require()


def run_audit(run: RunFolder) -> None:
    """Audit the recipe's evaluation on the first attacked images and write ``audit.json``."""
    if run.finished("audit"):
        return
    run.require("attack")
    run.begin("audit")
    started = time.perf_counter()
    report = audit_run(run)
    write_audit(run.path / AUDIT, report)
    figures = {"verdict": report.verdict, "images": report.images, "evaluation": report.evaluation}
    run.finish("audit", seconds=time.perf_counter() - started, **figures)


def audit_run(run: RunFolder, rung: str | None = None) -> AuditReport:
    """The audit of a run's evaluation: of the ladder's ``rung``, or of the one that the recipe names.

    Raises: ConfigError for a rung that the ladder does not have; RunError where the attack stage is not finished.
    """
    run.require("attack")
    here = Conditions.of(run)
    config, siege = here.recipe.audit, _Siege.of(here)
    rows = list(range(min(config.images or len(siege.pixels), len(siege.pixels))))
    certificates = None if siege.smoothed is None else _read_certificates(run)
    return audit(
        siege.model,
        siege.pixels.select(rows),
        siege.threat,
        siege.audited(rung or config.rung, rows),
        config.tolerance,
        certificates=certificates,
        alpha=config.alpha,
        max_votes=config.max_votes,
        seed=here.recipe.seed,
    )


def run_stage(run: RunFolder, stage: Stage) -> None:
    """Run one stage by its name; a finished one is kept as it is.

    Raises: RunError where another process is at work, or where several processes would do a stage that knows one.
    """
    stages = {
        "pretrain": run_pretrain,
        "finetune": run_finetune,
        "certify": run_certify,
        "attack": run_attack,
        "audit": run_audit,
    }
    if world_size() > 1 and stage == "audit" and not run.finished(stage):
        raise RunError(f"stage {stage} runs in one process; start `rush {stage} {run.path}` without torchrun")
    with run.alone() if rank() == 0 else nullcontext():
        stages[stage](run)


def _save_model(here: Conditions, classifier: Classifier, train: ImageSet) -> dict[str, Any]:
    """Save what is used in the end, and say how it is computed."""
    folder, spec, shape = here.run.path / "model", _spec(here.recipe, train), train.images.shape[1:]
    noise = _noise(here.recipe)
    if noise is None:
        save_plain(folder, classifier, spec, here.execution.device, shape)
        return {"compile_mode": "none"}
    execution, forward = _choose_forward(here, classifier, train)
    save_smoothed(folder, classifier, spec, noise.sigma, execution, shape)
    return forward


def _choose_forward(here: Conditions, classifier: Classifier, train: ImageSet) -> tuple[Execution, dict[str, Any]]:
    """How judged samples are to be computed: as the recipe says, or what a short trial shows to be soonest done."""
    wanted, config = here.recipe.execution.compile, here.recipe.certify
    execution = here.execution
    if wanted != "auto":
        return replace(execution, compile_mode=wanted), {"compile_mode": wanted}
    images = config.images or len(here.images("test"))
    share = _SEQUENTIAL_SHARE if config.method == "sequential" else 1.0
    passes = int(images * (config.num_selection + share * config.num_estimation))
    placed = execution.place(classifier).eval()
    chosen, trial = try_forwards(placed, execution, train.images.shape[1:], train.num_classes, passes)
    return chosen, {"compile_mode": chosen.compile_mode, **trial}


def _certify_figures(certificates: Certificates) -> dict[str, Any]:
    seconds = float(certificates.seconds.sum())
    rule = certificates.rule
    return {
        "seconds": seconds,
        "processes": world_size(),
        "images": len(certificates),
        **asdict(rule),
        "statement": rule.statement,
        "forward_passes_per_image": float(certificates.num_samples.mean()),
        "undecided": int((certificates.outcome == UNDECIDED).sum()),
        "images_per_second": len(certificates) / seconds,
    }


def _read_parts(folder: Path, rule: Rule, ids: dict[int, str]) -> dict[int, Certificates]:
    """The certificates that are written already, by their images' indices.

    Raises: RunError when they were made under another rule or of other images.
    """
    found: dict[int, Certificates] = {}
    for part in (folder / CERTIFICATES, *sorted((folder / CERTIFICATE_PARTS).glob("*.tsv"))):
        drop_unfinished_line(part)
        indices, certificates = read_certificates(part) or ((), None)
        if certificates is None:
            continue
        if certificates.rule != rule:
            raise RunError(f"{part} was made under another rule than the recipe's; move it away and certify again")
        for row, index in enumerate(indices):
            if ids.get(index) != certificates.ids[row]:
                raise RunError(f"{part} holds other images than this recipe certifies; move it away and certify again")
            found[index] = certificates.select([row])
    (folder / CERTIFICATE_PARTS).mkdir(exist_ok=True)
    return found


@dataclass(frozen=True)
class _Siege:
    """What the attack stage and the audit share: model, images, threat, attackers and how points are judged.

    model: the smoothed classifier, or the classifier itself where the recipe has no noise. curve_rows: the images that
    are also attacked at rising epsilon.
    """

    path: Path
    config: AttackConfig
    model: Model
    num_classes: int
    indices: list[int]
    pixels: LabelledPixels
    threat: ThreatModel
    rungs: list[Plan | Suite]
    curve: list[tuple[ThreatModel, Plan]]
    judging: Judging

    @classmethod
    def of(cls, here: Conditions) -> "_Siege":
        config = here.recipe.attack
        model, num_classes = _load_model(here)
        indices, pixels = here.evaluation_images(config.images, num_classes)
        threat = ThreatModel(config.norm, parse_fraction(config.epsilon))
        smoothed = isinstance(model, SmoothedClassifier)
        rungs = _smoothed_rungs(config, threat, num_classes) if smoothed else _plain_rungs(config, num_classes)
        draws = config.strong_eot_samples if smoothed else 0
        curve_ = curve(threat, pixels.x[0].numel(), config.steps, draws) if config.curve_images else []
        # one verdict a rung and point of the curve, and one inside the certified ball
        judging = Judging(config.alpha / (len(rungs) + len(curve_) + 1), config.max_votes, here.recipe.seed)
        return cls(here.run.path, config, model, num_classes, indices, pixels, threat, rungs, curve_, judging)

    @property
    def smoothed(self) -> SmoothedClassifier | None:
        """The model where it is smoothed, so that there are certificates."""
        return self.model if isinstance(self.model, SmoothedClassifier) else None

    @property
    def curve_rows(self) -> list[int]:
        return list(range(min(self.config.curve_images, len(self.pixels))))

    def evaluate(
        self, plan: Plan | Suite, threat: ThreatModel | None = None, rows: list[int] | None = None
    ) -> AttackResult:
        """One attacker on all images or those in ``rows``; what is in the run's parts is read, not attacked again."""
        pixels = self.pixels if rows is None else self.pixels.select(rows)
        parts = self.path / "attacks/parts"
        defender = defend(self.model, self.num_classes)
        return evaluate(defender, pixels, threat or self.threat, plan, self.judging, parts)

    def inside(self, certificates: Certificates) -> list[AttackResult]:
        """The attack inside the balls of the images that are certified with the right class; [] where none is."""
        positions = sandwich_positions(certificates, self.pixels.ids)
        if not positions:
            return []
        balls = sandwich_threat(certificates, self.pixels.select(positions).ids)
        return [self.evaluate(sandwich_plan(self.config.steps), balls, positions)]

    def audited(self, name: str | None, rows: list[int]) -> AttackResult | None:
        """The ladder's rung of this name on ``rows``; None, for the audit's default, without a name.

        Raises: ConfigError when there is no such rung.
        """
        if name is None:
            return None
        known = {plan.name: plan for plan in self.rungs}
        if name not in known:
            raise ConfigError(f"the ladder has no rung {name!r}; it has {', '.join(known)}")
        return self.evaluate(known[name]).select(rows)


def _attack_figures(
    siege: _Siege, results: list[AttackResult], curve_: list[AttackResult], sandwich: Sandwich
) -> dict[str, Any]:
    rungs, config = [_rung_figures(result) for result in results], siege.config
    return {
        "seconds": sum(float(result.seconds.sum()) for result in (*results, *curve_)),
        "processes": world_size(),
        "threat": {"norm": config.norm, "epsilon": parse_fraction(config.epsilon), "epsilon_text": config.epsilon},
        "alpha": config.alpha,
        "level": siege.judging.level,
        "num_verdicts": len(results) + len(curve_),
        "max_votes": config.max_votes,
        "rungs": [rung for rung in rungs if rung["name"] != "sandwich"],
        **({"curve": _curve_figures(curve_)} if curve_ else {}),
        "sandwich": {
            **next((rung for rung in rungs if rung["name"] == "sandwich"), {}),
            "checked": sandwich.checked,
            "violations": list(sandwich.violations),
            "allowed": sandwich.allowed,
            **({} if siege.smoothed is not None else {"reason": NOT_SMOOTHED}),
        },
    }


def _load_model(here: Conditions) -> tuple[Model, int]:
    """The run's model, smoothed where its recipe has noise, and its number of classes."""
    folder = here.run.path / "model"
    if _noise(here.recipe) is None:
        classifier = load_plain(folder, here.execution.device)
        return classifier, len(read_description(folder)["classes"])
    smoothed = load_smoothed(folder, here.execution)
    return smoothed, smoothed.num_classes


def _smoothed_rungs(config: AttackConfig, threat: ThreatModel, num_classes: int) -> list[Plan | Suite]:
    return ladder(
        config.steps,
        parse_fraction(config.step_size) / parse_fraction(config.epsilon),
        config.restarts,
        config.eot_samples,
        threat=threat,
        num_classes=num_classes,
        strong_steps=config.strong_steps,
        strong_eot_samples=config.strong_eot_samples,
        strong_restarts=config.strong_restarts,
        queries=config.queries,
    )


def _plain_rungs(config: AttackConfig, num_classes: int) -> list[Plan | Suite]:
    """The ladder of deterministic networks, without its strong attackers where the recipe wants none."""
    rungs = plain_ladder(num_classes)
    if config.strong_steps:
        return rungs
    return [rung for rung in rungs if isinstance(rung, Plan) and rung.method in ("none", "fgsm", "pgd")]


def _rung_figures(result: AttackResult) -> dict[str, Any]:
    plan = result.plan
    own: dict[str, Any]
    if isinstance(plan, Suite):
        broken_by = np.bincount(result.attacker[result.broken], minlength=len(plan.plans))
        own = {
            "suite": plan.version,
            "attackers": dict(zip((p.name for p in plan.plans), broken_by.tolist(), strict=True)),
        }
    else:
        budget = ("method", "loss", "gradient", "steps", "step_size", "restarts", "eot_samples")
        own = {name: getattr(plan, name) for name in budget}
    return {"name": plan.name, "label": plan.label, **own, **result.budget, "seconds": float(result.seconds.sum())}


def _curve_figures(results: list[AttackResult]) -> dict[str, Any]:
    points = [
        {
            "epsilon": float(result.threat.epsilon),
            "epsilon_text": epsilon_text(result.threat.norm, float(result.threat.epsilon)),
            "broken": int(result.broken.sum()),
            "held": int(result.held.sum()),
            "undecided": int(result.undecided.sum()),
        }
        for result in results
    ]
    return {"label": results[0].plan.label, "images": len(results[0]), "points": points}


def _read_certificates(run: RunFolder) -> Certificates:
    read = read_certificates(run.path / CERTIFICATES)
    if read is None:
        raise RunError(
            f"{run.path / CERTIFICATES} is missing or empty; remove stages/certify.json and run `rush certify` again"
        )
    return read[1]


def _check_separate(train: ImageSet, test: ImageSet) -> None:
    if torch.equal(train.images, test.images):
        raise DataError(
            f"{train.name} gives the same {len(train)} images for train and test; nothing measured on them would hold "
            "for new images: give it separate splits (docs/data.md)"
        )


def _spec(recipe: Recipe, train: ImageSet) -> ClassifierSpec:
    mean, std = channel_statistics(train)
    model = recipe.model
    return ClassifierSpec(model.encoder, model.width, train.images.shape[1], mean, std, train.classes, stem=model.stem)


def new_classifier(recipe: Recipe, train: ImageSet) -> Classifier:
    """The recipe's classifier with its seeded initial weights."""
    classifier = _spec(recipe, train).build()
    seeded_init(classifier, stream(recipe.seed, "classifier", "weights"))
    return classifier


def method_of(config: PretrainConfig) -> Method:
    """The pre-training method that the recipe names."""
    if config.objective == "moco":
        return MoCo(config.temperature, config.queue, config.key_momentum, config.shuffle_groups)
    if config.objective == "acl":
        return ACL(config.temperature, **_budget(config.adversary))
    return SimCLR(config.temperature, config.micro_batch)


def objective_of(config: FinetuneConfig) -> Objective:
    """The fine-tuning objective that the recipe names, with its options."""
    budget = _budget(config.adversary)
    objectives: dict[FinetuneObjective, Objective] = {
        "standard": lambda e: standard(e.logits, e.x, e.y),
        "gaussian": lambda e: gaussian(e.logits, e.x, e.y, e.noise, e.generator),
        "consistency": lambda e: consistency(
            e.logits, e.x, e.y, e.noise, e.generator, **config.consistency.model_dump()
        ),
        "smoothadv": lambda e: smoothadv(
            e.logits,
            e.evaluated,
            e.x,
            e.y,
            e.noise,
            e.generator,
            draws=config.smoothadv.draws,
            epsilon=config.smoothadv.epsilon_at(e.epoch),
            steps=config.smoothadv.steps,
        ),
        "cat-rs": lambda e: cat_rs(e.logits, e.evaluated, e.x, e.y, e.noise, e.generator, **config.cat_rs.model_dump()),
        "pgd-at": lambda e: pgd_at(e.logits, e.evaluated, e.x, e.y, e.generator, **budget),
        "trades": lambda e: trades(e.logits, e.evaluated, e.x, e.y, e.generator, **budget, beta=config.trades.beta),
    }
    return objectives[config.objective]


def _noise(recipe: Recipe) -> Gaussian | None:
    """The noise of the smoothed classifier; None where the classifier itself is used."""
    return Gaussian(recipe.smoothing.sigma) if recipe.smoothing.sigma else None


def _budget(adversary: AdversaryConfig) -> dict[str, Any]:
    return {
        "epsilon": parse_fraction(adversary.epsilon),
        "step_size": parse_fraction(adversary.step_size),
        "steps": adversary.steps,
    }


def _without(images: ImageSet | Stream, ids: np.ndarray) -> ImageSet | Stream:
    """The images that have none of these ids."""
    if isinstance(images, ImageSet):
        return images[np.flatnonzero(~np.isin(images.ids, ids))]
    return replace(images, rows=images.rows[~np.isin(images.records.ids()[images.rows], ids)])


def _watch_encoder(here: Conditions, classifier: Classifier) -> Callable[[int], dict[str, Any]] | None:
    """Live figures of the encoder on the held-out images; None where none is held out."""
    held, config = here.held_out_images(), here.recipe.pretrain
    if held is None or held.labels is None:
        return None
    known = here.known_images(_BANK_IMAGES)
    noise, represent = _noise(here.recipe), _Represent(classifier)

    def figures(epoch: int) -> dict[str, Any]:
        if epoch % config.monitor_epochs and epoch != config.epochs:
            return {}
        return encoder_figures(
            represent, known, held, noise, here.execution, neighbours=config.knn_neighbours, seed=here.recipe.seed
        )

    return figures


def _watch_classifier(here: Conditions, classifier: Classifier) -> Callable[[int], dict[str, Any]] | None:
    """Live figures of the classifier on the held-out images; None where none is held out."""
    held, config = here.held_out_images(), here.recipe.finetune
    if held is None:
        return None
    noise = _noise(here.recipe)

    def figures(epoch: int) -> dict[str, Any]:
        if epoch % config.monitor_epochs and epoch != config.epochs:
            return {}
        return classifier_figures(classifier, held, noise, here.execution, here.recipe.seed)

    return figures


def schedule_of(config: TrainingConfig) -> Schedule:
    return Schedule(**config.model_dump(include=set(Schedule.__dataclass_fields__)))


def _labelled(train: ImageSet | Stream, recipe: Recipe) -> ImageSet | Stream:
    """The training images whose labels fine-tuning may read: all, a fraction or so many a class, stratified and
    seeded."""
    config = recipe.finetune
    if train.labels is None:
        raise DataError(f"{train.name} (train) has no labels; fine-tuning needs them")
    if config.labels_per_class is None and config.label_fraction == 1.0:
        return train
    wanted = config.label_fraction if config.labels_per_class is None else config.labels_per_class * train.num_classes
    generator = stream(recipe.seed, "finetune", "labels")
    if isinstance(train, ImageSet):
        return stratified_subset(train, wanted, generator)
    return train.holding_out(wanted if isinstance(wanted, int) else round(wanted * len(train)), generator)[1]


class _Represent(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.represent(x)


def _knn_accuracy(
    classifier: Classifier, train: ImageSet, test: ImageSet, neighbours: int, execution: Execution
) -> dict[str, int] | None:
    """Nearest-neighbour votes of the test images among the training images; None where labels are missing."""
    if train.labels is None or test.labels is None:
        return None
    represent = execution.place(_Represent(classifier)).eval()
    bank, queries = (representations(images, represent, execution) for images in (train, test))
    correct = knn_correct(bank, train.labels.to(bank.device), queries, test.labels.to(bank.device), neighbours)
    return {"correct": correct, "total": len(test), "neighbours": neighbours}


def _training_figures(run: RunFolder, stage: Stage, images: int) -> dict[str, Any]:
    """Cost of a training from its logged epochs, the last event of each; an epoch repeated after a kill counts once."""
    epochs = list({event["epoch"]: event for event in run.events("epoch", stage)}.values())
    seconds = sum(event["seconds"] for event in epochs)
    joules = [event.get("joules") for event in epochs]
    return {
        "seconds": seconds,
        "epochs": len(epochs),
        "images": images,
        "passes_per_image": sum(event["passes"] for event in epochs) / images,
        "forward_passes_per_image": sum(event["forward_passes"] for event in epochs) / images,
        "images_per_second": images * len(epochs) / seconds if seconds else None,
        "peak_memory": max((event["peak_memory"] or 0 for event in epochs), default=None),
        "joules": None if None in joules else sum(joules),
        "processes": world_size(),
    }
