"""Closed sets of string options, and constants, without heavy imports so that the command line starts quickly."""

import math
from fractions import Fraction
from typing import Literal

AttackMethod = Literal["none", "fgsm", "mifgsm", "pgd", "apgd", "square", "fmn", "random"]
AttackName = AttackMethod | Literal["worst-case", "paper"]
AuditVerdict = Literal["holds", "overestimated", "undecided"]
CertifyBound = Literal["clopper-pearson", "two-classes", "geometric", "beta"]
CertifyMethod = Literal["clopper-pearson", "sequential", "exact"]
CompileChoice = Literal["auto", "none", "default", "reduce-overhead"]
CompileMode = Literal["none", "default", "reduce-overhead"]
Decision = Literal["vote", "mean", "single"]
EncoderName = Literal["small", "resnet18", "resnet34", "resnet50", "preactresnet18", "wideresnet28", "wideresnet34"]
FinetuneMode = Literal["linear", "full", "linear-then-full"]
FinetuneObjective = Literal["standard", "gaussian", "consistency", "smoothadv", "cat-rs", "pgd-at", "trades"]
Gradient = Literal["fresh", "frozen", "transfer"]
Level = Literal["image", "family"]
NoiseName = Literal["gaussian", "discrete", "uniform", "laplace", "splitting"]
NoisyViewsOption = Literal["none", "one", "both"]
Norm = Literal["linf", "l2", "l1"]
OnNonfinite = Literal["stop", "skip"]
OptimizerName = Literal["sgd", "lars", "adamw"]
Precision = Literal["float32", "bfloat16", "int8"]
PrecisionChoice = Literal["auto", "float32", "bfloat16", "int8"]
PretrainObjective = Literal["simclr", "moco", "acl"]
SequentialBound = Literal["geometric", "beta", "two-classes"]
Stopping = Literal["power", "test"]
Stage = Literal["pretrain", "teach", "finetune", "certify", "attack", "audit"]
Start = Literal["random", "clean", "best"]
Stem = Literal["small", "standard"]
TileChoice = int | Literal["auto"]
TrainingCompile = Literal["none", "default", "reduce-overhead", "graph"]
Verdict = Literal["broken", "held", "undecided"]

ABSTAIN = -1  # the prediction where the votes do not decide
LEVELS = 255  # steps of an 8-bit pixel from 0 to 1
BLOCK = 100  # noise samples drawn together; votes are stored per block
TOTAL_VARIATION = 2e-11  # the largest between drawn and exact noise that bounds on probabilities leave room for

CERTIFIED_NORM: dict[NoiseName, Norm] = {
    "gaussian": "l2",
    "discrete": "l2",
    "uniform": "l1",
    "laplace": "l1",
    "splitting": "l1",
}
"""Norm of the ball that a certificate under each noise covers."""

VERDICTS: tuple[Verdict, ...] = ("broken", "held", "undecided")
STAGES: tuple[Stage, ...] = ("pretrain", "teach", "finetune", "certify", "attack", "audit")
TRAININGS: tuple[Stage, ...] = ("pretrain", "finetune")


def parse_fraction(text: str | float) -> float:
    """Return the number in ``text``, e.g. ``"8/255"`` or ``0.5``, or raise ValueError if it is not one."""
    try:
        return float(Fraction(text)) if isinstance(text, str) else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number or a fraction such as 8/255") from None


def splitting_draws(sigma: float) -> int:
    """Return the number of draws of splitting noise of deviation ``sigma`` (``smoothing.splitting``)."""
    return int(2 * math.sqrt(3) * sigma * LEVELS)


def fewest_samples(alpha: float) -> int:
    """Return the least number of votes that can show a probability above 1/2 at level ``alpha``.

    If all n votes agree, their lower bound alpha^(1/n), minus the 1e-10 that ``statistics.lower_bound`` subtracts for
    rounding, must exceed 1/2. No sigma needs fewer, but a tiny sigma may need more (``certification.rule``).
    """
    return math.floor(-math.log2(alpha) / (1 + math.log2(1 - 1e-10))) + 1
