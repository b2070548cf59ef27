"""The sections of recipes, frozen and validated. The library uses these objects as they are. Torch is not imported."""

import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rush.choices import (
    STAGES,
    CertifyBound,
    CertifyMethod,
    CompileChoice,
    EncoderName,
    FinetuneMode,
    FinetuneObjective,
    Level,
    NoiseName,
    NoisyViewsOption,
    Norm,
    OnNonfinite,
    OptimizerName,
    PrecisionChoice,
    PretrainObjective,
    Stage,
    Stem,
    Stopping,
    TileChoice,
    TrainingCompile,
    fewest_samples,
    parse_fraction,
)
from rush.errors import ConfigError

_GIVEN = reprlib.Repr()
_GIVEN.maxstring = _GIVEN.maxother = _GIVEN.maxlong = 100


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


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


def _check_tile(value: object) -> object:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536):
        raise ValueError('must be "auto" or a whole number from 1 to 65536')
    return value


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"must be (least, greatest), got {list(value)}")
    return value


Whole = Annotated[int, BeforeValidator(_not_boolean)]
Real = Annotated[float, BeforeValidator(_not_boolean)]
Count = Annotated[Whole, Field(ge=1)]
CountOrZero = Annotated[Whole, Field(ge=0)]
Votes = Annotated[Whole, Field(ge=100)]
Share = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Probability = Annotated[Real, Field(gt=0, lt=0.5)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_check_ascending)]
NonNegativeRange = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_check_ascending)]
Tile = Annotated[TileChoice, BeforeValidator(_check_tile)]
DataRoot = Annotated[str | tuple[str, ...] | None, BeforeValidator(_check_root)]
Fraction = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_positive_fraction)]  # e.g. "8/255"
WITHOUT_NOISE: tuple[FinetuneObjective, ...] = ("standard", "pgd-at", "trades")
"""Fine-tuning objectives that draw no smoothing noise."""


class Section(BaseModel):
    """Base class of the sections of a recipe. They are immutable, with every value validated and no unknown fields.

    Raises:
        ConfigError: a value is not allowed. The message names the field, the value given and the values allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {error_text(error, type(self))}") from None

    # pydantic then validates nested sections without a call of __init__, so that errors keep their whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, validated again. Fields that were never set keep their default."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})


class DataConfig(Section):
    """The images.

    Attributes:
        name: name or path for ``rush.load_images``.
        root: directory of official archives or shards, or a list of directories whose shards are joined.
        pretrain_split: images of pre-training, e.g. "train+unlabeled". Fine-tuning reads ``train``.
        size: side of the images in pixels. None keeps them as stored.
        test_images: number of training images drawn as the test split, whatever the seed, for data without one. A test
            split of the data is then not read. 0 reads it.
        held_out: number of training images reserved for monitoring, seen by neither training stage. 0 disables
            monitoring.
        memory_gb: pre-training images that would take more memory than this are streamed from disk.
    """

    name: str
    root: DataRoot = None
    pretrain_split: str = "train"
    size: Annotated[Whole, Field(ge=4, le=4096)] | None = None
    test_images: CountOrZero = 0
    held_out: CountOrZero = 0
    memory_gb: Positive = 8.0

    @property
    def memory_bytes(self) -> int:
        """``memory_gb`` in bytes, a gigabyte being 2**30."""
        return int(self.memory_gb * 2**30)


class ModelConfig(Section):
    """The encoder.

    Attributes:
        encoder: its architecture (``models.encoders``).
        width: channels of the first stage.
        stem: "standard" is the ResNets' stem for large images.
    """

    encoder: EncoderName
    width: Annotated[Whole, Field(ge=1, le=1024)] = 64
    stem: Stem = "small"


class SmoothingConfig(Section):
    """Smoothing noise, and its standard deviation in [0, 1] pixel units.

    Under "discrete" noise, Gaussian noise rounded to multiples of 1/255, certificates hold in floating point too
    (``smoothing.discrete``), and attacked points are rounded to 8-bit images. "gaussian" is drawn in float32. Both
    certify in l2, "uniform" and "laplace" in l1. Training under "discrete" draws real-valued noise. "splitting" noise
    has finitely many draws, all of which vote: its l1 certificates are exact (``smoothing.splitting``).

    With sigma = 0 there is no noise. The classifier itself is used and attacked, and nothing is certified. The ladder
    is the one of deterministic networks, whose attackers have fixed budgets. Of the recipe's budgets, attack.steps
    applies to the curve, and attack.strong_steps = 0 ends the ladder with PGD-100.

    Attributes:
        sigma: standard deviation in every pixel. 0 for no noise.
        noise: kind of the noise.
    """

    sigma: NonNegative
    noise: NoiseName = "discrete"


class ExecutionConfig(Section):
    """Device, precision and compilation of networks, and the checkpoints of training.

    Attributes:
        device: "auto" for cuda, else mps, else cpu, or the name of a device of torch.
        precision: "auto" is bfloat16 where the processor computes in it. On a CPU, a short benchmark then chooses
            precision and layout in which samples are judged (``pipeline.precision``). "int8" trains as "auto" does and
            judges in 8-bit integers (``smoothing.quantized``).
        tile: fixed batch size of every certified, predicted or judged sample. "auto" chooses it by the images' size
            (``runtime.execution``). A run that has begun keeps its tile.
        compile: torch.compile for these samples. "auto" tries it where there is much to certify, and uses it if a short
            benchmark finds it faster.
        compile_training: torch.compile for networks in training. "graph" captures the whole step instead, on CUDA.
        checkpoint_minutes: interval between checkpoints within an epoch. One is always written at the end of an epoch.
        on_nonfinite: reaction to a loss or gradient that is not finite: "stop", or "skip" the batch.
        deterministic: whether to use, on CUDA, algorithms that give the same bits every time. With false the fastest
            are allowed, and two runs of one seed may differ in their last bits.
    """

    device: str = "auto"
    precision: PrecisionChoice = "auto"
    tile: Tile = "auto"
    compile: CompileChoice = "auto"
    compile_training: TrainingCompile = "none"
    checkpoint_minutes: Positive = 10.0
    on_nonfinite: OnNonfinite = "stop"
    deterministic: bool = True


class Views(Section):
    """Distribution of one random view of an image (``data.views``).

    The defaults are SimCLR's for CIFAR-10 (Chen et al. 2020, appendix A and B.9, with colour strength 0.5 and no blur),
    except for crops from 0.2 of the area, where SimCLR uses 0.08.

    Attributes:
        crop_scale: least and greatest area of the crop, as a share of the image. (1, 1) disables the crop.
        crop_ratio: least and greatest width / height of the crop, uniform in its logarithm.
        flip, jitter, greyscale, blur: probabilities of the horizontal flip, colour change, greyscale and blur.
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
        hue: the shift is uniform in [-value, value], in turns.
        blur_sigma: least and greatest sigma of the blur, in pixels.
        noise_sigma: standard deviation of the Gaussian noise added last, in [0, 1] pixel units. The noise is never
            clipped.
    """

    crop_scale: PositiveRange = (0.2, 1.0)
    crop_ratio: PositiveRange = (0.75, 1.3333333333333333)
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[Real, Field(ge=0, le=0.5)] = 0.1
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

    @property
    def crops(self) -> bool:
        """Whether views are crops."""
        return self.crop_scale != (1.0, 1.0)


class WeakViews(Views):
    """Random shift over black borders and horizontal flip, the weak augmentation of supervised training.

    Attributes:
        shift_pad: greatest shift along each axis, in pixels (pad and crop). Excludes a crop.
    """

    crop_scale: PositiveRange = (1.0, 1.0)
    jitter: Share = 0.0
    greyscale: Share = 0.0
    shift_pad: CountOrZero

    @model_validator(mode="after")
    def _shift_or_crop(self) -> Self:
        if self.shift_pad and self.crops:
            raise ValueError(
                f"shift_pad={self.shift_pad} and crop_scale={self.crop_scale} exclude each other; "
                "set crop_scale=(1.0, 1.0) to shift or shift_pad=0 to crop"
            )
        return self


class Schedule(Section):
    """Length, batch size and optimizer of a training stage.

    Attributes:
        epochs, minutes: length of the training stage, exactly one of them. With minutes, the number of epochs that end
            within them is fixed at the start, by a trial of the steps (``training.budget``).
        optimizer: see ``training.optim``.
        batch_size: images per step, over all processes.
        learning_rate: largest learning rate, reached at the end of the warm-up. It then decays as a half-cosine.
        momentum: momentum of the optimizer, or the first beta of AdamW.
        weight_decay: weight decay, which is not applied to biases and normalization parameters.
        warmup_epochs: length of the linear warm-up of the learning rate.
        ema_decay: the result is the exponential moving average of the weights with this decay. 0 disables it.
        monitor_epochs: number of epochs from one measurement of the live figures to the next.
    """

    epochs: CountOrZero | None = None
    minutes: Positive | None = None
    batch_size: Annotated[Whole, Field(ge=2)]
    optimizer: OptimizerName = "sgd"
    learning_rate: Positive
    momentum: Decay = 0.9
    weight_decay: NonNegative = 1e-4
    warmup_epochs: NonNegative = 0.0
    ema_decay: Decay = 0.0
    monitor_epochs: Count = 5

    @model_validator(mode="after")
    def _epochs_or_minutes(self) -> Self:
        if self.epochs is None and self.minutes is None:
            raise ValueError("give epochs, or minutes")
        if self.epochs is not None and self.minutes is not None:
            raise ValueError(f"give epochs or minutes, not both (given: {self.epochs} and {self.minutes:g})")
        return self

    @property
    def ramps(self) -> dict[str, float]:
        """Number of epochs of each ramp in use, by field, without the warm-up of the learning rate."""
        return {}


class NoiseSchedule(Section):
    """Gaussian noise on contrastive views (``data.noisy_views``), so that one encoder serves every sigma.

    The standard deviation of a noisy view is uniform in [low, highest(epoch)] for each image, in [0, 1] pixel units,
    where highest rises from low to high over the first ``ramp_epochs`` epochs.

    Attributes:
        views: the views that carry noise.
        sigma: (low, high).
        ramp_epochs: length of the ramp. 0 starts at high.
    """

    views: NoisyViewsOption = "none"
    sigma: NonNegativeRange = (0.0, 0.5)
    ramp_epochs: NonNegative = 0.0

    @model_validator(mode="after")
    def _noise_that_is_some(self) -> Self:
        if self.views != "none" and self.sigma[1] == 0:
            raise ValueError(f'views = "{self.views}" needs a sigma above 0, got {self.sigma}; or set views = "none"')
        return self

    def highest(self, epoch: float) -> float:
        """Return the greatest sigma after ``epoch`` epochs (fractional, 0 at the start)."""
        low, high = self.sigma
        share = min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs > 0 else 1.0
        return low + (high - low) * share


class AdversaryConfig(Section):
    """The l-inf attack inside adversarial training. Its sizes are numbers or fractions such as "8/255".

    Attributes:
        epsilon: radius of the ball, in pixel units.
        step_size: size of a step, in pixel units.
        steps: number of steps.
    """

    epsilon: Fraction = "8/255"
    step_size: Fraction = "2/255"
    steps: Count = 10

    @model_validator(mode="after")
    def _epsilon_in_pixels(self) -> Self:
        _check_pixel_range(self.epsilon)
        return self

    @property
    def budget(self) -> dict[str, Any]:
        """The keyword arguments of the attack: ``epsilon`` and ``step_size`` as floats, and ``steps``."""
        epsilon, step_size = parse_fraction(self.epsilon), parse_fraction(self.step_size)
        return {"epsilon": epsilon, "step_size": step_size, "steps": self.steps}


class PretrainConfig(Schedule):
    """Contrastive pre-training (``training.pretrain``). 0 epochs leave the encoder untrained.

    Attributes:
        objective: "simclr" (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"),
            "moco" (version 2: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning") or "acl"
            (Jiang et al. 2020, "Robust Pre-Training by Adversarial Contrastive Learning", dual stream).
        temperature: temperature of the loss, by default 0.2 for MoCo, as in its source, and 0.5 for the others.
        projector_hidden, projector_out: widths of the projector.
        micro_batch: SimCLR only. Images per pass through the network, with cached gradients (Gao et al. 2021), for
            batches larger than memory.
        queue: MoCo only. Number of keys kept, a multiple of the batch size.
        key_momentum: MoCo only. Momentum of the key network's weights.
        shuffle_groups: MoCo only. Number of random groups of a batch whose keys are normalized separately, so that
            their statistics do not reveal which key belongs to which query.
        adversary: ACL only. The attack on the views.
        knn_neighbours: number of neighbours of the kNN accuracy.
        noise: noise on the views. Not with ACL.
    """

    objective: PretrainObjective = "simclr"
    temperature: Positive = Field(default_factory=lambda values: 0.2 if values.get("objective") == "moco" else 0.5)
    projector_hidden: Count = 512
    projector_out: Count = 128
    micro_batch: Count | None = None
    queue: Count = 4096
    key_momentum: Decay = 0.99
    shuffle_groups: Count = 4
    adversary: AdversaryConfig = AdversaryConfig(steps=5)
    knn_neighbours: Count = 200
    views: Views = Views()
    noise: NoiseSchedule = NoiseSchedule()

    @model_validator(mode="after")
    def _options_of_the_objective(self) -> Self:
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


class TeachConfig(Section):
    """Teaching (``training.teaching``): the pre-trained encoder labels the images whose labels are not read.

    In the first round a linear classifier on the encoder, fitted to the labelled images, gives every other image a
    probability of each class. With ``epochs``, it is first trained with its encoder on clean images, where its own
    confident answers serve as labels (``training.self_training``). In every further round the teacher is a classifier
    that was fine-tuned on the labels of the round before. Fine-tuning then trains on all images.

    Attributes:
        rounds: 0 omits the stage.
        epochs: epochs over all images in which the classifier of the first round learns from its own answers.
        temperature: p becomes p^(1 / temperature), divided by its sum. Below 1, labels are sharper than the teacher's.
        balance: divide p by the mean of each class over the images first, so that no class is taught more often.
        confidence: an image has the weight (largest p)^confidence. 0 gives all images the same weight.
        threshold: images whose largest p is below it have weight 0.
        draws: noisy copies per image over which a fine-tuned teacher averages.
    """

    rounds: CountOrZero = 0
    epochs: CountOrZero = 0
    temperature: Positive = 0.5
    balance: bool = False
    confidence: NonNegative = 0.0
    threshold: Share = 0.0
    draws: Count = 8


class ConsistencyConfig(Section):
    """Consistency regularization (Jeong and Shin 2020).

    Attributes:
        draws: noise draws per image.
        weight: weight of the consistency term.
        entropy_weight: weight of the entropy in it.
    """

    draws: Annotated[Whole, Field(ge=2)] = 2
    weight: NonNegative = 20.0
    entropy_weight: NonNegative = 0.5


class SmoothAdvConfig(Section):
    """SmoothAdv (Salman et al. 2019): an l2 attack on the smoothed classifier.

    Attributes:
        draws: noise draws per image.
        epsilon: radius of the attack after the warm-up, in pixel units.
        steps: number of steps of the attack.
        warmup_epochs: number of epochs over which the radius rises.
    """

    draws: Count = 2
    epsilon: Positive = 0.25
    steps: Count = 10
    warmup_epochs: NonNegative = 10.0

    def epsilon_at(self, epoch: float) -> float:
        """Return the radius after ``epoch`` epochs, which is never 0, since the attack needs a ball."""
        share = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.epsilon * max(share, 1e-3)


class CatRsConfig(Section):
    """Confidence-aware training (Jeong et al. 2023).

    Attributes:
        draws: noise draws per image.
        epsilon: l2 radius of the attack on the noise of confident images.
        steps: number of steps of the attack.
        weight: weight of the loss at the attacked noise.
    """

    draws: Annotated[Whole, Field(ge=2)] = 4
    epsilon: Positive = 0.25
    steps: Count = 4
    weight: NonNegative = 0.5


class TradesConfig(Section):
    """TRADES (Zhang et al. 2019).

    Attributes:
        beta: weight of the robust term.
    """

    beta: NonNegative = 6.0


class FinetuneConfig(Schedule):
    """Supervised training (``training.finetune``).

    Attributes:
        objective: all but standard, pgd-at and trades train under noise of ``smoothing.sigma``.
        mode: "full" trains every weight, "linear" the head on a frozen encoder, and "linear-then-full" the head alone
            for ``head_epochs`` of the epochs and then every weight (Kumar et al. 2022).
        head_epochs: number of epochs that train the head alone, with the mode "linear-then-full".
        label_fraction, labels_per_class: labels that are read, stratified. Give at most one of them.
        flip, shift: the weak augmentation, see ``WeakViews``.
    """

    epochs: Count | None = None
    objective: FinetuneObjective = "gaussian"
    mode: FinetuneMode = "full"
    head_epochs: Count = 1
    label_fraction: Annotated[Real, Field(gt=0, le=1)] = 1.0
    labels_per_class: Count | None = None
    flip: Share = 0.5
    shift: CountOrZero = 4
    consistency: ConsistencyConfig = ConsistencyConfig()
    smoothadv: SmoothAdvConfig = SmoothAdvConfig()
    cat_rs: CatRsConfig = CatRsConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    trades: TradesConfig = TradesConfig()

    @model_validator(mode="after")
    def _one_way_to_choose_labels(self) -> Self:
        if self.labels_per_class is not None and self.label_fraction != 1.0:
            raise ValueError("give label_fraction or labels_per_class, not both")
        if self.mode == "linear-then-full" and self.epochs is not None and self.head_epochs >= self.epochs:
            raise ValueError(f"head_epochs = {self.head_epochs} must be fewer than epochs = {self.epochs}")
        return self

    @property
    def views(self) -> WeakViews:
        """The weak augmentation before noise and attack."""
        return WeakViews(shift_pad=self.shift, flip=self.flip)

    @property
    def ramps(self) -> dict[str, float]:
        return {"smoothadv.warmup_epochs": self.smoothadv.warmup_epochs} if self.objective == "smoothadv" else {}


class CertifyConfig(Section):
    """Certification (``rush.certify``).

    Attributes:
        images: number of images, the first of a seeded order of the test split. None certifies all.
        num_selection: votes per image that select the class.
        num_estimation: votes per image for the bound. With the sequential method, it is the largest number.
        alpha: probability of a false certificate.
        level: "image" for alpha per image, "family" for all certificates together.
        radii: the grid, in pixel units. None allows any radius or, with the sequential method, multiples of sigma / 2.
        method: "exact" for splitting noise, with which the fields below do not matter.
        futility: the sequential method gives up a radius whose certification has become less probable than this.
        bound: None for the first bound of the method. "two-classes" (both methods) pays off where there are many
            classes.
        stopping: "power" for giving up as under ``futility``, "test" for a test at the level ``futility``.
    """

    images: Count | None = None
    method: CertifyMethod = "clopper-pearson"
    num_selection: Count = 100
    num_estimation: Count = 100_000
    alpha: Probability = 0.001
    radii: tuple[NonNegative, ...] | None = None
    level: Level = "image"
    futility: Probability = 0.01
    bound: CertifyBound | None = None
    stopping: Stopping = "power"

    @model_validator(mode="after")
    def _can_certify(self) -> Self:
        family = self.images if self.level == "family" and self.images is not None else 1
        fewest = fewest_samples(self.alpha / family)
        if self.num_estimation < fewest:
            shared = f", shared by {family} images" if family > 1 else ""
            raise ValueError(
                f"num_estimation must be at least {fewest} to certify anything at alpha = {self.alpha}{shared}"
            )
        return self


class AttackConfig(Section):
    """The ladder of attackers and the verdict.

    Attributes:
        images: number of images, the first of a seeded order of the test split. None attacks all.
        norm: norm of the threat model.
        epsilon, step_size: numbers or fractions such as "8/255".
        steps, restarts: steps and restarts of the PGD rungs.
        eot_samples: noise draws per gradient, one PGD rung for each.
        strong_steps: steps of the APGD rungs, which are followed by Square and the worst-case suite. 0 ends the ladder
            at the last of ``eot_samples``.
        strong_eot_samples: noise draws per gradient of the APGD rungs.
        strong_restarts: restarts of the last APGD rung.
        queries: queries of Square.
        curve_images: number of images that are also attacked at rising epsilon.
        alpha: probability that any verdict of the stage on an image is false.
        max_votes: largest number of judging votes per point.
    """

    images: Count | None = None
    norm: Norm = "linf"
    epsilon: Fraction = "8/255"
    steps: Count = 20
    step_size: Fraction = "2/255"
    restarts: Count = 1
    eot_samples: tuple[Count, ...] = (1, 4, 16, 64, 256)
    strong_steps: CountOrZero = 50
    strong_eot_samples: Count = 16
    strong_restarts: Count = 5
    queries: Count = 1000
    curve_images: CountOrZero = 100
    alpha: Probability = 0.001
    max_votes: Votes = 10_000

    @model_validator(mode="after")
    def _epsilon_in_pixels(self) -> Self:
        if self.norm == "linf":
            _check_pixel_range(self.epsilon)
        if list(self.eot_samples) != sorted(set(self.eot_samples)) or not self.eot_samples:
            raise ValueError(f"eot_samples must be ascending and distinct, got {list(self.eot_samples)}")
        return self

    @property
    def step_share(self) -> float:
        """The step size as a share of epsilon."""
        return parse_fraction(self.step_size) / parse_fraction(self.epsilon)


class AuditConfig(Section):
    """The audit of an evaluation.

    Attributes:
        images: number of images, the first of those that were attacked. None audits all of these.
        rung: the ladder's rung to audit. None audits PGD-20 with EOT 20.
        tolerance: the largest acceptable share of images that the audit newly breaks.
        alpha: probability that any verdict on an image is false.
        max_votes: largest number of judging votes per point.
    """

    images: Count | None = 100
    rung: str | None = None
    tolerance: Annotated[Real, Field(gt=0.01, lt=1)] = 0.05
    alpha: Probability = 0.001
    max_votes: Votes = 4000


class Recipe(Section):
    """One run from pre-training to report. Examples are the recipes shipped in ``rush/recipes``.

    Attributes:
        name: name of the run, and of its folder in ``runs``. Letters, digits, dots, dashes and underscores.
        seed: seed of all draws.
        quick: whether it is a trial of a recipe, whose figures mean nothing (``recipe.load.quickened``).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: CountOrZero = 0
    quick: bool = False
    data: DataConfig
    model: ModelConfig
    smoothing: SmoothingConfig
    execution: ExecutionConfig = ExecutionConfig()
    pretrain: PretrainConfig
    teach: TeachConfig = TeachConfig()
    finetune: FinetuneConfig
    certify: CertifyConfig = CertifyConfig()
    attack: AttackConfig = AttackConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _noise_where_it_is_trained_with(self) -> Self:
        objective = self.finetune.objective
        if self.smoothing.sigma == 0 and objective not in WITHOUT_NOISE:
            raise ValueError(
                f"smoothing.sigma = 0 leaves the classifier without noise, and finetune.objective = {objective} trains "
                f"under it; set smoothing.sigma above 0, e.g. 0.25, or finetune.objective to one of "
                f"{', '.join(WITHOUT_NOISE)}"
            )
        return self

    @model_validator(mode="after")
    def _integers_under_noise(self) -> Self:
        if self.execution.precision == "int8" and (
            self.smoothing.sigma == 0 or self.execution.compile not in ("auto", "none")
        ):
            raise ValueError(
                "execution.precision = int8 is for smoothed classifiers that are not compiled; set smoothing.sigma "
                "above 0 and execution.compile to auto or none, or choose another precision"
            )
        return self

    @model_validator(mode="after")
    def _exact_for_splitting_noise(self) -> Self:
        noise, method = self.smoothing.noise, self.certify.method
        if self.smoothing.sigma > 0 and (noise == "splitting") != (method == "exact"):
            raise ValueError(
                f"smoothing.noise = {noise} is not certified by certify.method = {method}; splitting noise has the "
                "method exact, which no other noise has"
            )
        if noise == "splitting" and self.finetune.objective == "cat-rs":
            raise ValueError("finetune.objective = cat-rs climbs added noise, and smoothing.noise = splitting is not")
        return self

    @model_validator(mode="after")
    def _labels_that_can_be_taught(self) -> Self:
        if self.teach.rounds and self.finetune.objective == "cat-rs":
            raise ValueError("finetune.objective = cat-rs needs one right class per image, and teach.rounds gives none")
        if self.teach.rounds > 1 and self.finetune.minutes is not None:
            raise ValueError("teach.rounds above 1 trains several classifiers: give finetune.epochs and not minutes")
        return self

    @model_validator(mode="after")
    def _one_step_to_capture(self) -> Self:
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

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run of this recipe."""
        return tuple(stage for stage in STAGES if stage != "teach" or self.teach.rounds)

    def training(self, stage: Stage) -> Schedule:
        """Return the section of the training ``stage``."""
        return self.pretrain if stage == "pretrain" else self.finetune

    def to_json(self) -> str:
        """Return the resolved recipe as JSON, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


# The sections that determine what a stage computes, besides those of the stages before it.
STAGE_SECTIONS: Mapping[Stage, tuple[str, ...]] = {
    "pretrain": ("name", "seed", "data", "model", "execution", "pretrain"),
    "teach": ("teach", "smoothing", "finetune"),  # which labels are read, and how further teachers are trained
    "finetune": (),
    "certify": ("certify",),
    "attack": ("attack",),
    "audit": ("audit",),
}


def error_text(error: ValidationError, section: type[BaseModel]) -> str:
    """Describe every wrong value of ``section`` by its field, the problem and the value given."""
    follow_on = "default_factory_not_called"  # the error of a default that depends on another wrong value
    return "; ".join(_explain(entry, section) for entry in error.errors() if entry["type"] != follow_on)


def closest(name: str, allowed: Sequence[str]) -> str:
    """Return a hint at the allowed name that ``name`` resembles, or "" if there is none."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _explain(entry: Any, section: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        allowed = _fields_at(entry["loc"][:-1], section)
        return f"{field}: unknown key{closest(str(entry['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    message = entry["msg"].removeprefix("Value error, ")
    without_value = entry["type"] == "missing" or isinstance(entry["input"], dict)
    value = "" if without_value else f" (given: {_GIVEN.repr(entry['input'])})"
    return f"{field}: {message}{value}".removeprefix(": ")  # an error that joins sections has no location


def _fields_at(location: tuple[Any, ...], section: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        section = annotation
    return sorted(section.model_fields)
