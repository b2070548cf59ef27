"""Recipes: read from TOML, overridden field by field, validated once and frozen; nothing here imports torch."""

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from rush.choices import (
    CertifyMethod,
    CompileChoice,
    EncoderName,
    FinetuneMode,
    FinetuneObjective,
    Level,
    NoisyViewsOption,
    Norm,
    OnNonfinite,
    OptimizerName,
    PrecisionChoice,
    PretrainObjective,
    Stage,
    Stem,
    TrainingCompile,
    fewest_samples,
    parse_fraction,
)


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_pixel_range(epsilon: str) -> None:
    if parse_fraction(epsilon) > 1:
        raise ValueError(f"epsilon = {epsilon} exceeds the pixel range [0, 1]; did you mean {epsilon}/255?")


def _positive_fraction(value: str) -> str:
    if parse_fraction(value) <= 0:
        raise ValueError(f"must be > 0, got {value}")
    return value


def _check_root(value: object) -> object:
    folders = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (folders and all(isinstance(folder, str) for folder in folders)):
        raise ValueError("must be a folder, or a list of at least one folder")
    return value


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"must be (least, greatest), got {list(value)}")
    return value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, lt=0.5)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_check_ascending)]
NonNegativeRange = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_check_ascending)]
DataRoot = Annotated[str | tuple[str, ...] | None, BeforeValidator(_check_root)]
Fraction = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_positive_fraction)]  # e.g. "8/255"
WITHOUT_NOISE: tuple[FinetuneObjective, ...] = ("standard", "pgd-at", "trades")
"""Fine-tuning objectives that draw no smoothing noise."""


class Section(BaseModel):
    """A part of a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Which images: a name or path for ``rush.load_images``; ``root`` is where official archives or shards lie, one
    folder or a list of folders whose shards are joined.

    pretrain_split: what pre-training reads, e.g. "train+unlabeled"; fine-tuning reads ``train``. size: side of the
    images, None as stored. held_out: so many training images are kept out of both trainings and watched during them;
    0 watches nothing. memory_gb: training images of pre-training that would take more of it stream from the disk.
    """

    name: str
    root: DataRoot = None
    pretrain_split: str = "train"
    size: Annotated[int, Field(ge=4, le=4096)] | None = None
    held_out: Annotated[int, Field(ge=0)] = 0
    memory_gb: Positive = 8.0

    @property
    def memory_bytes(self) -> int:
        """``memory_gb`` in bytes, a gigabyte being 2**30."""
        return int(self.memory_gb * 2**30)


class ModelConfig(Section):
    """The encoder and its width (channels of the first stage); ``standard`` is the ResNets' stem for large images."""

    encoder: EncoderName
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    stem: Stem = "small"


class SmoothingConfig(Section):
    """Standard deviation of the smoothing noise, in [0, 1] pixel units.

    0: no noise at all. The classifier itself is what is used and attacked, and nothing is certified. Its ladder is the
    one of deterministic networks, whose attackers have fixed budgets: of the recipe's, attack.steps are those of the
    curve, and attack.strong_steps = 0 ends the ladder with PGD-100.
    """

    sigma: NonNegative


class ExecutionConfig(Section):
    """How the classifier is run: ``tile`` is the fixed batch size of every certified, predicted or judged sample.

    compile: torch.compile for these samples; ``auto`` tries it where there is much to certify, and keeps it where it
    pays. compile_training: of the networks in training; "graph" captures the whole step instead, on CUDA.
    checkpoint_minutes: a training is kept so often, beside the end of every epoch. on_nonfinite: what a loss or
    gradient that is not finite does: "stop", or "skip" its batch.
    deterministic: on CUDA, algorithms that give the same bits every time; false allows the fastest, and two runs of one
    seed may then differ in their last bits.
    """

    device: str = "auto"
    precision: PrecisionChoice = "auto"
    tile: Annotated[int, Field(ge=1, le=65536)] = 256
    compile: CompileChoice = "auto"
    compile_training: TrainingCompile = "none"
    checkpoint_minutes: Positive = 10.0
    on_nonfinite: OnNonfinite = "stop"
    deterministic: bool = True


class ViewsConfig(Section):
    """Distribution of one contrastive view; probabilities and strengths as in SimCLR (Chen et al. 2020, appendix A and
    B.9)."""

    crop_scale: PositiveRange = (0.2, 1.0)
    crop_ratio: PositiveRange = (0.75, 1.3333333333333333)
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    greyscale: Share = 0.2
    blur: Share = 0.0
    blur_sigma: PositiveRange = (0.1, 2.0)
    noise_sigma: NonNegative = 0.0

    @field_validator("crop_scale")
    @classmethod
    def _share_of_the_image(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError(f"is a share of the image's area and at most 1, got {list(value)}")
        return value


class TrainingConfig(Section):
    """What both trainings share.

    epochs or minutes: how long it lasts, exactly one of them. minutes: as many epochs as end within them; the number is
    fixed at the start by a trial of the steps.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    minutes: Positive | None = None
    batch_size: Annotated[int, Field(ge=2)]
    optimizer: OptimizerName = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    warmup_epochs: NonNegative = 0.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    monitor_epochs: Count = 5

    @model_validator(mode="after")
    def _epochs_or_minutes(self) -> "TrainingConfig":
        if self.epochs is None and self.minutes is None:
            raise ValueError("give epochs, or minutes")
        if self.epochs is not None and self.minutes is not None:
            raise ValueError(f"give epochs or minutes, not both (given: {self.epochs} and {self.minutes:g})")
        return self

    @property
    def ramps(self) -> dict[str, float]:
        """Number of epochs over which something rises to its value, by field, for those fields that are in use.

        The warm-up of the learning rate is not among them.
        """
        return {}


class NoiseConfig(Section):
    """Gaussian noise on the contrastive views, so that one encoder serves every sigma.

    views: which of the two carry it. sigma: an image's own is uniform between these, in [0, 1] pixel units.
    ramp_epochs: the greatest rises to its value over so many epochs.
    """

    views: NoisyViewsOption = "none"
    sigma: NonNegativeRange = (0.0, 0.5)
    ramp_epochs: NonNegative = 0.0


class AdversaryConfig(Section):
    """The attack inside adversarial training, in l-inf; numbers or fractions such as "8/255"."""

    epsilon: Fraction = "8/255"
    step_size: Fraction = "2/255"
    steps: Count = 10

    @model_validator(mode="after")
    def _epsilon_in_pixels(self) -> "AdversaryConfig":
        _check_pixel_range(self.epsilon)
        return self


class PretrainConfig(TrainingConfig):
    """Contrastive pre-training; 0 epochs leave the encoder untrained, i.e. fine-tuning starts from scratch.

    objective: simclr (Chen et al. 2020a); moco (version 2, Chen et al. 2020b), with a queue of so many keys, a key
    network of this momentum and keys normalized in so many random groups of the batch; or acl (Jiang et al. 2020) with
    its adversary. micro_batch: so many images at a time go through the network, gradients cached (Gao et al. 2021), for
    batches larger than memory.
    """

    objective: PretrainObjective = "simclr"
    temperature: Positive = 0.5
    projector_hidden: Count = 512
    projector_out: Count = 128
    micro_batch: Count | None = None
    queue: Count = 4096
    key_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    shuffle_groups: Count = 4
    adversary: AdversaryConfig = AdversaryConfig(steps=5)
    knn_neighbours: Count = 200
    views: ViewsConfig = ViewsConfig()
    noise: NoiseConfig = NoiseConfig()

    @model_validator(mode="after")
    def _whole_batches(self) -> "PretrainConfig":
        if self.objective == "moco" and self.queue % self.batch_size:
            raise ValueError(f"queue = {self.queue} must be a multiple of batch_size = {self.batch_size}")
        if self.micro_batch is not None and self.objective != "simclr":
            raise ValueError("micro_batch is for the objective simclr, whose loss spans the batch")
        if self.objective == "acl" and self.noise.views != "none":
            raise ValueError("acl attacks images in [0, 1], noise leaves that range; set noise.views to none")
        return self

    @property
    def ramps(self) -> dict[str, float]:
        return {"noise.ramp_epochs": self.noise.ramp_epochs} if self.noise.views != "none" else {}


class ConsistencyConfig(Section):
    """Jeong and Shin 2020: weight of the consistency term, weight of the entropy in it, noise draws an image."""

    draws: Annotated[int, Field(ge=2)] = 2
    weight: NonNegative = 20.0
    entropy_weight: NonNegative = 0.5


class SmoothAdvConfig(Section):
    """Salman et al. 2019: l2 attack of radius ``epsilon`` on the smoothed classifier, reached over the warm-up."""

    draws: Count = 2
    epsilon: Positive = 0.25
    steps: Count = 10
    warmup_epochs: NonNegative = 10.0

    def epsilon_at(self, epoch: float) -> float:
        """The radius after ``epoch`` epochs; never 0, at which an attack has no ball."""
        share = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.epsilon * max(share, 1e-3)


class CatRsConfig(Section):
    """Jeong et al. 2023, confidence-aware training: attack on the noise of confident images, and its weight."""

    draws: Annotated[int, Field(ge=2)] = 4
    epsilon: Positive = 0.25
    steps: Count = 4
    weight: NonNegative = 0.5


class TradesConfig(Section):
    """Zhang et al. 2019: weight of the robust term."""

    beta: NonNegative = 6.0


class FinetuneConfig(TrainingConfig):
    """Supervised training; every objective but standard, pgd-at and trades is under noise of ``smoothing.sigma``.

    mode: "linear" trains the head on a frozen encoder, "full" every weight, "linear-then-full" the head alone for
    ``head_epochs`` of the epochs and then every weight.
    """

    epochs: Count | None = None
    objective: FinetuneObjective = "gaussian"
    mode: FinetuneMode = "full"
    head_epochs: Count = 1
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    labels_per_class: Count | None = None
    flip: Share = 0.5
    shift: Annotated[int, Field(ge=0)] = 4
    consistency: ConsistencyConfig = ConsistencyConfig()
    smoothadv: SmoothAdvConfig = SmoothAdvConfig()
    cat_rs: CatRsConfig = CatRsConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    trades: TradesConfig = TradesConfig()

    @model_validator(mode="after")
    def _one_way_to_choose_labels(self) -> "FinetuneConfig":
        if self.labels_per_class is not None and self.label_fraction != 1.0:
            raise ValueError("give label_fraction or labels_per_class, not both")
        if self.mode == "linear-then-full" and self.epochs is not None and self.head_epochs >= self.epochs:
            raise ValueError(f"head_epochs = {self.head_epochs} must be fewer than epochs = {self.epochs}")
        return self

    @property
    def ramps(self) -> dict[str, float]:
        return {"smoothadv.warmup_epochs": self.smoothadv.warmup_epochs} if self.objective == "smoothadv" else {}


class CertifyConfig(Section):
    """Certification (``rush.certify``); ``images`` are the first so many of the test split, None all.

    radii: the grid, in pixel units; None: any radius, or with the sequential method multiples of sigma / 2.
    """

    images: Count | None = None
    method: CertifyMethod = "clopper-pearson"
    num_selection: Count = 100
    num_estimation: Count = 10_000
    alpha: Probability = 0.001
    radii: tuple[NonNegative, ...] | None = None
    level: Level = "image"
    futility: Probability = 0.01

    @model_validator(mode="after")
    def _can_certify(self) -> "CertifyConfig":
        family = self.images if self.level == "family" and self.images is not None else 1
        fewest = fewest_samples(self.alpha / family)
        if self.num_estimation < fewest:
            shared = f", shared by {family} images" if family > 1 else ""
            raise ValueError(
                f"num_estimation must be at least {fewest} to certify anything at alpha = {self.alpha}{shared}"
            )
        return self


class AttackConfig(Section):
    """The ladder of attackers and the verdict; ``epsilon`` is a number or a fraction such as "8/255".

    strong_steps: of the APGD rungs, with which Square and the worst-case suite come; 0 ends the ladder at the last of
    ``eot_samples``. curve_images: so many images are also attacked at rising epsilon.
    """

    images: Count | None = None
    norm: Norm = "linf"
    epsilon: Fraction = "8/255"
    steps: Count = 20
    step_size: Fraction = "2/255"
    restarts: Count = 1
    eot_samples: tuple[Count, ...] = (1, 4, 16, 64, 256)
    strong_steps: Annotated[int, Field(ge=0)] = 50
    strong_eot_samples: Count = 16
    strong_restarts: Count = 5
    queries: Count = 1000
    curve_images: Annotated[int, Field(ge=0)] = 100
    alpha: Probability = 0.001
    max_votes: Annotated[int, Field(ge=100)] = 10_000

    @model_validator(mode="after")
    def _epsilon_in_pixels(self) -> "AttackConfig":
        if self.norm == "linf":
            _check_pixel_range(self.epsilon)
        if list(self.eot_samples) != sorted(set(self.eot_samples)) or not self.eot_samples:
            raise ValueError(f"eot_samples must be ascending and distinct, got {list(self.eot_samples)}")
        return self


class AuditConfig(Section):
    """The audit of an evaluation: of PGD-20 with EOT 20 by default, or of the ladder's rung of this name."""

    images: Count | None = 100
    rung: str | None = None
    tolerance: Annotated[float, Field(gt=0.01, lt=1)] = 0.05
    alpha: Probability = 0.001
    max_votes: Annotated[int, Field(ge=100)] = 4000


class Recipe(Section):
    """One run from pre-training to report; see the recipes shipped in ``rush/recipes``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    model: ModelConfig
    smoothing: SmoothingConfig
    execution: ExecutionConfig = ExecutionConfig()
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    certify: CertifyConfig = CertifyConfig()
    attack: AttackConfig = AttackConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _noise_where_it_is_trained_with(self) -> "Recipe":
        objective = self.finetune.objective
        if self.smoothing.sigma == 0 and objective not in WITHOUT_NOISE:
            raise ValueError(
                f"smoothing.sigma = 0 leaves the classifier without noise, and finetune.objective = {objective} trains "
                f"under it; set smoothing.sigma above 0, e.g. 0.25, or finetune.objective to one of "
                f"{', '.join(WITHOUT_NOISE)}"
            )
        return self

    @model_validator(mode="after")
    def _one_step_to_capture(self) -> "Recipe":
        if self.execution.compile_training != "graph":
            return self
        trained = {"finetune": self.finetune, **({"pretrain": self.pretrain} if self.pretrain.epochs != 0 else {})}
        wrong = [f"{name}.optimizer = lars" for name, stage in trained.items() if stage.optimizer == "lars"]
        if self.finetune.mode == "linear-then-full":
            wrong.append("finetune.mode = linear-then-full")
        if wrong:
            raise ValueError(
                f"execution.compile_training = graph captures one kind of step, which {wrong[0]} does not have; change "
                "one of the two"
            )
        return self

    def training(self, stage: Stage) -> TrainingConfig:
        """Return the section of the training ``stage``."""
        return self.pretrain if stage == "pretrain" else self.finetune

    def to_json(self) -> str:
        """The resolved recipe, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


# The sections that decide what a stage computes, beside those of the stages before it.
STAGE_SECTIONS: Mapping[Stage, tuple[str, ...]] = {
    "pretrain": ("name", "seed", "data", "model", "execution", "pretrain"),
    "finetune": ("smoothing", "finetune"),
    "certify": ("certify",),
    "attack": ("attack",),
    "audit": ("audit",),
}
