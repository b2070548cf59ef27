"""Certification logs, public ones and our own, read into one form, written in the public form, and doubted.

A public log is a tab-separated table ``idx label predict radius correct time``, one line an image; predict -1 means
abstained. It says neither sigma nor alpha nor the number of samples. Our ``certificates.tsv`` opens with the same
columns, followed by its own, among them the votes and the rule of the certification; what it says is derived from
these alone (``certification.table``).
"""

import codecs
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy import special

from rush.certification.certificates import of_pictures
from rush.certification.sequential import UNDECIDED
from rush.certification.table import read_certificates
from rush.choices import CertifyMethod, Level
from rush.errors import ConfigError, DataError, RunError
from rush.runtime.files import write_text
from rush.runtime.lines import read_lines, read_object
from rush.statistics import Interval, share_interval

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
TABLE = "certificates.tsv"
# What the public logs of CIFAR-10 and ImageNet were made with (Cohen et al. 2019) and do not say themselves.
PUBLIC_ALPHA = 0.001
PUBLIC_NUM_ESTIMATION = 100_000
TimeFormat = Literal["seconds", "clock"]

_DIGITS = 6  # decimals of a written radius
_LONGEST_HEADER = 10_000  # bytes
_TIE_STEP = 0.25  # accuracies are published at multiples of it
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)")


@dataclass(frozen=True, eq=False)
class CertificationLog:
    """Certificates of N images under one rule: arrays (N,), radii in [0, 1] pixel units, predict -1 where abstained.

    alpha: level of each certificate (``level`` image) or of all ``num_images`` together (family). num_estimation: votes
    that bound an image, the largest number for a sequential rule. radii: the grid a radius was taken from, None for any
    radius. p_lower, num_samples (selection and estimation together), ids, undecided (a larger radius was still open
    after the last vote): None where the log does not say. pixels: for each image the hash of its pixels, by which
    copies of one picture are known. rounding: how far each radius as printed may lie above what was certified, None
    where none does. dataset: fingerprint of the whole split that the images are from, None where it is not known.
    """

    name: str
    path: Path
    sigma: float
    method: CertifyMethod
    bound: str
    alpha: float
    level: Level
    num_images: int
    num_selection: int | None
    num_estimation: int
    radii: tuple[float, ...] | None
    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    ids: tuple[str, ...] | None = None
    p_lower: np.ndarray | None = None
    num_samples: np.ndarray | None = None
    undecided: np.ndarray | None = None
    pixels: tuple[str, ...] | None = None
    rounding: np.ndarray | None = None
    dataset: str | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def image_alpha(self) -> float:
        """The level of each certificate: alpha, or alpha / num_images for the family (Bonferroni)."""
        return self.alpha if self.level == "image" else self.alpha / self.num_images

    @property
    def level_text(self) -> str:
        """Which level speaks."""
        if self.level == "image":
            return f"each image by itself, alpha = {self.alpha:g}"
        return f"all {self.num_images:,} images together, alpha = {self.alpha:g}"

    @property
    def abstained(self) -> np.ndarray:
        return self.predict < 0

    @property
    def acr(self) -> float:
        """Average certified radius, wrong and abstained images counted as 0."""
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def ceiling(self) -> float:
        """sigma * Phi^-1(alpha^(1/N)), the radius when all N votes agree: no rule at this level can certify more."""
        return self.sigma * -float(special.ndtri(-math.expm1(math.log(self.image_alpha) / self.num_estimation)))

    @property
    def at_ceiling(self) -> np.ndarray:
        """Where the radius is the largest that the log can hold, as printed; the top of its grid where it has one.

        One vote less costs at least a hundredth of the radius, so that a ten-thousandth is free for rounding.
        """
        top = self.ceiling if self.radii is None else min(self.ceiling, self.radii[-1])
        return ~self.abstained & (self.radius >= top * (1 - 1e-4) - self._slack)

    @property
    def probability(self) -> np.ndarray:
        """Lower bounds on the probability of the predicted class: the log's own, else Phi(radius / sigma)."""
        return special.ndtr(self.radius / self.sigma) if self.p_lower is None else self.p_lower

    def certified(self, radius: float) -> np.ndarray:
        """Where the class is right and the certified radius is >= ``radius``."""
        return self.correct & (self.radius >= radius)

    def accuracy(self, radius: float) -> Interval:
        """Certified accuracy at ``radius`` with its exact 95 % interval over pictures, each counted once: as certified
        only if all of its copies are."""
        return self.share(self.certified(radius))

    def share(self, flags: np.ndarray) -> Interval:
        """The share of pictures whose copies all have ``flags`` (N,), with its exact 95 % interval."""
        pictures = of_pictures(flags, self.pixels)
        return share_interval(int(pictures.sum()), len(pictures))

    @property
    def num_copies(self) -> int | None:
        """Number of images beyond the first of each picture; None where pictures cannot be told apart."""
        return None if self.pixels is None else len(self) - len(set(self.pixels))

    @property
    def _slack(self) -> np.ndarray | float:
        return 0.0 if self.rounding is None else self.rounding


@dataclass(frozen=True)
class Finding:
    """Something about a log that its reader should know; ``count`` images show it."""

    name: str
    text: str
    count: int


def read_log(
    path: Path | str, sigma: float | None = None, alpha: float | None = None, num_estimation: int | None = None
) -> CertificationLog:
    """The log in the file ``path``, public or our own, or in the run folder ``path``.

    What a public log does not say is taken from the arguments; else sigma from the file's name (``sigma_0.25``, or
    ``noise_0.25`` where there is no sigma), alpha 0.001, num_estimation 100,000. A log of our own says all this in its
    column ``rule``; an argument that contradicts it is an error. Its classes and radii are those of its votes.
    Raises: ConfigError for a number that is missing, not allowed or contradicted; DataError for a damaged public log,
    RunError for a damaged or missing file of our own, both naming file and line.
    """
    path = Path(path)
    given = {"sigma": sigma, "alpha": alpha, "num_estimation": num_estimation}
    _check_conditions({key: value for key, value in given.items() if value is not None}, f"{path}")
    file = path / TABLE if path.is_dir() else path
    own = _is_own(_read_lines(file)[0].split("\t"))
    home = file.parent if own and file.name == TABLE else None  # the run folder
    if own:
        parts = {**_own_log(file, given), "dataset": None if home is None else _fingerprint(home)}
    else:
        table = _read_table(file)
        parts = {**_read_rows(table), **_public_conditions(table, given)}
        parts["rounding"] = _rounding(table.columns["radius"])
    name = (home or file).resolve().name.removesuffix(".tsv").removesuffix(".txt")
    return CertificationLog(name=name, path=path, **parts)


def name_sigma(path: Path | str) -> float | None:
    """The sigma that a file's name says, None where it says none or several."""
    for word in ("sigma", "noise"):
        found = {float(text) for text in re.findall(rf"{word}[_=-]?(\d+(?:\.\d+)?)", Path(path).name.lower())}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def states_sigma(path: Path | str) -> bool:
    """Whether the log at ``path`` says its sigma: a run folder, a log of our own, or by the file's name."""
    path = Path(path)
    return path.is_dir() or name_sigma(path) is not None or (path.is_file() and _holds_own(path))


def write_log(path: Path | str, log: CertificationLog, time_format: TimeFormat = "seconds") -> None:
    """Write the six public columns of ``log`` to ``path``, so that existing scripts read it.

    Radii have six decimals, rounded toward zero: what is read back is never larger. Those that were printed with fewer
    digits keep them. Times are seconds, or h:mm:ss.ffffff for ``clock``.
    Raises: ConfigError for an unknown time format; RunError where ``path`` holds a log of our own, whose votes would be
    lost.
    """
    path = Path(path)
    if time_format not in get_args(TimeFormat):
        raise ConfigError(f"unknown time format {time_format!r}; allowed: {', '.join(get_args(TimeFormat))}")
    if path.is_file() and _holds_own(path):
        raise RunError(f"{path} holds certificates with their votes, which would be lost; give another file")
    lines = [
        "\t".join(fields)
        for fields in zip(
            *(map(str, column.tolist()) for column in (log.idx, log.label, log.predict)),
            (_radius_text(radius, log.rounding is not None) for radius in log.radius.tolist()),
            map(str, log.correct.astype(int).tolist()),
            (_time_text(seconds, time_format) for seconds in log.seconds.tolist()),
            strict=True,
        )
    ]
    write_text(path, "\n".join(["\t".join(COLUMNS), *lines]) + "\n")


def flags(log: CertificationLog) -> tuple[Finding, ...]:
    """What is wrong with ``log``, or what its figures must not be read without."""
    findings = (_beyond_ceiling(log), _rounded(log), _grid_ties(log), _above_bound(log), _off_grid(log))
    return tuple(f for f in (*findings, *_odd_radii(log), _unfinished(log)) if f is not None and f.count)


def _beyond_ceiling(log: CertificationLog) -> Finding:
    beyond = log.radius > log.ceiling * (1 + 1e-9)
    count, largest = int(beyond.sum()), float(log.radius.max())
    text = (
        f"{count:,} of {len(log):,} radii, up to {largest:g}, are larger than {log.ceiling:.6g}, the largest that "
        f"N = {log.num_estimation:,} samples can certify at level {log.image_alpha:g}"
    )
    least = float((log.radius - log._slack).max())
    if least > log.ceiling:
        logarithm = float(special.log_ndtr(least / log.sigma))
        text += (
            "; rounding does not explain it, sigma, alpha or N are not as said: needs alpha >= "
            f"{math.exp(log.num_estimation * logarithm):.2g} or N >= {math.log(log.image_alpha) / logarithm:,.0f}"
        )
    return Finding("beyond-ceiling", text, count)


def _rounded(log: CertificationLog) -> Finding | None:
    if log.rounding is None:
        return None
    text = (
        "radii are printed with few digits, to the nearest unless their source says otherwise: each may lie up to half "
        f"a unit of its last digit, here up to {log.rounding.max():.2g}, above what was certified"
    )
    return Finding("rounded", text, int((log.rounding > 0).sum()))


def _grid_ties(log: CertificationLog) -> Finding | None:
    if log.rounding is None:
        return None
    below = np.floor((log.radius + 1e-12) / _TIE_STEP) * _TIE_STEP
    ties = log.correct & (below > 0) & (log.radius - log.rounding < below)
    worst = max(np.unique(below[ties], return_counts=True)[1], default=0)
    text = (
        f"{ties.sum():,} right images stand at a multiple of {_TIE_STEP:g} only if their radius was not rounded up: "
        f"up to {100 * worst / len(log):.2f} points of certified accuracy at one radius"
    )
    return Finding("grid-ties", text, int(ties.sum()))


def _above_bound(log: CertificationLog) -> Finding | None:
    if log.p_lower is None or log.method != "clopper-pearson":
        return None
    proven = log.sigma * special.ndtri(np.clip(log.p_lower, 0.5, 1.0))
    above = ~log.abstained & (log.radius > proven * (1 + 1e-9))
    return Finding("above-bound", "radii are larger than sigma * Phi^-1(p_lower) of their own line", int(above.sum()))


def _off_grid(log: CertificationLog) -> Finding | None:
    if log.radii is None:
        return None
    off = (log.radius > 0) & ~np.isin(log.radius.round(_DIGITS), np.round(log.radii, _DIGITS))
    return Finding("off-grid", "radii are not on the grid of the log's rule", int(off.sum()))


def _odd_radii(log: CertificationLog) -> tuple[Finding, ...]:
    abstained = log.abstained & (log.radius > 0)
    zero = ~log.abstained & (log.radius == 0) & (log.radii is None)  # 0 may be a radius of a grid
    return (
        Finding("abstained-with-radius", "images abstain and have a radius above 0", int(abstained.sum())),
        Finding("predicted-without-radius", "images have a class and the radius 0", int(zero.sum())),
    )


def _unfinished(log: CertificationLog) -> Finding:
    missing = max(0, log.num_images - len(log))
    return Finding("unfinished", f"{missing:,} of the {log.num_images:,} images that were planned are missing", missing)


@dataclass(frozen=True)
class _Table:
    """The cells of a public log by column."""

    file: Path
    columns: Mapping[str, list[str]]

    def damaged(self, row: int, what: str) -> DataError:
        return _damaged(self.file, row + 2, what)


def _damaged(file: Path, line: int, what: str) -> DataError:
    return DataError(f"{file}, line {line}: {what}; get the log again, or mend the line")


def _is_own(header: list[str]) -> bool:
    """Whether ``header`` is that of our own tables, also of one whose votes were left out."""
    return tuple(header[: len(COLUMNS)]) == COLUMNS and {"id", "p_lower"} <= set(header)


def _holds_own(file: Path) -> bool:
    with open(file, "rb") as opened:
        first = opened.readline(_LONGEST_HEADER)
    return _is_own(first.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").rstrip("\r\n").split("\t"))


def _read_lines(file: Path) -> list[str]:
    try:
        lines = read_lines(file)
    except FileNotFoundError:
        raise RunError(
            f"{file} is missing; give a log file, or the folder of a run that `rush certify` has finished"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a log: {error}; give a tab-separated text file") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines or [""]


def _read_table(file: Path) -> _Table:
    header, *lines = _read_lines(file)
    names = header.split("\t")
    if tuple(names[: len(COLUMNS)]) != COLUMNS or len(set(names)) < len(names):
        raise DataError(
            f"{file}, line 1: a log opens with the tab-separated columns {' '.join(COLUMNS)}, got {header[:100]!r}"
        )
    if not lines:
        raise _damaged(file, 1, "no image follows")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise _damaged(file, number, f"{len(row)} fields instead of {len(names)}")
    return _Table(file, {name: [row[place] for row in rows] for place, name in enumerate(names)})


def _own_log(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Our own certificates, as their votes give them. Raises: ConfigError where ``given`` contradicts their rule."""
    read = read_certificates(file)
    if read is None:
        raise RunError(f"{file}, line 1: no image follows; move the file away and certify again")
    indices, certificates = read
    rule = asdict(certificates.rule)
    for key, value in given.items():
        if value is not None and rule[key] != value:
            raise ConfigError(f"{file} says {key} = {rule[key]}, {value} was given; leave it away")
    del rule["futility"]
    return {
        **rule,
        "idx": np.array(indices),
        "label": certificates.labels,
        "predict": certificates.prediction,
        "radius": certificates.radius,
        "correct": certificates.correct,
        "seconds": certificates.seconds,
        "ids": certificates.ids,
        "p_lower": certificates.p_lower,
        "num_samples": certificates.num_samples,
        "undecided": certificates.outcome == UNDECIDED,
        "pixels": certificates.pixels,
    }


def _read_rows(table: _Table) -> dict[str, Any]:
    """The six public columns, checked against each other."""
    whole = {name: _parsed(table, name, _whole_number) for name in ("idx", "label", "predict", "correct")}
    radius, seconds = _parsed(table, "radius", _positive_number), _parsed(table, "time", _seconds)
    checks = {
        "idx and label must be >= 0": np.minimum(whole["idx"], whole["label"]) < 0,
        "predict must be a class, or -1 for abstained": whole["predict"] < -1,
        "correct does not agree with predict and label": whole["correct"] != (whole["predict"] == whole["label"]),
        "the image (idx) stands in the table before": ~_first_of_each(whole["idx"]),
    }
    for what, wrong in checks.items():
        if wrong.any():
            raise table.damaged(int(wrong.argmax()), what)
    correct = whole.pop("correct").astype(bool)
    return {**whole, "correct": correct, "radius": radius, "seconds": seconds}


def _first_of_each(values: np.ndarray) -> np.ndarray:
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _parsed(table: _Table, column: str, parse: Callable[[str], float]) -> np.ndarray:
    values = []
    for row, cell in enumerate(table.columns[column]):
        try:
            values.append(parse(cell))
        except (ValueError, OverflowError) as error:
            raise table.damaged(row, f"{column} {cell[:60]!r} {error}") from None
    return np.array(values)


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        raise ValueError("is not a whole number")
    return int(text)


def _positive_number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE) or not math.isfinite(float(text)):
        raise ValueError("is not a finite number >= 0")
    return float(text)


def _seconds(text: str) -> float:
    clock = _CLOCK.fullmatch(text)
    if clock is None:
        return _positive_number(text)
    days, hours, minutes, seconds = (part or "0" for part in clock.groups())
    return 86400 * int(days) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _rounding(texts: list[str]) -> np.ndarray | None:
    """Half a unit of the last digit that each radius is printed with, 0.0 for 0; None where six decimals are printed.

    Trailing zeros are missing in some logs: digits and decimals are the largest numbers of them in the table, and the
    coarser of the two counts.
    """
    parts = [Decimal(text) for text in texts]
    positive = [part for part in parts if part > 0]
    digits = max((len(part.as_tuple().digits) for part in positive), default=0)
    decimals = -min((int(part.as_tuple().exponent) for part in positive), default=-_DIGITS)
    if not positive or (decimals >= _DIGITS and digits >= _DIGITS):
        return None
    units = [max(10.0**-decimals, 10.0 ** (part.adjusted() - digits + 1)) if part > 0 else 0.0 for part in parts]
    return 0.5 * np.array(units)


def _public_conditions(table: _Table, given: Mapping[str, Any]) -> dict[str, Any]:
    sigma = name_sigma(table.file) if given["sigma"] is None else given["sigma"]
    if sigma is None:
        raise ConfigError(
            f"{table.file} is a public log, which does not say its noise, and its name does not either "
            "(sigma_0.25, noise_0.25); give --sigma"
        )
    return {
        "sigma": sigma,
        "alpha": PUBLIC_ALPHA if given["alpha"] is None else given["alpha"],
        "num_estimation": PUBLIC_NUM_ESTIMATION if given["num_estimation"] is None else given["num_estimation"],
        "num_selection": None,
        "method": "clopper-pearson",
        "bound": "clopper-pearson",
        "level": "image",
        "num_images": len(table.columns["idx"]),
        "radii": None,
    }


def _check_conditions(values: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError naming ``source`` unless each of ``values`` is allowed."""
    for key, (allowed, holds) in _CONDITIONS.items():
        if key in values and not holds(values[key]):
            raise ConfigError(f"{source}: {key} must be {allowed}, got {values[key]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_CONDITIONS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sigma": ("a number > 0", lambda value: _is_number(value) and value > 0),
    "alpha": ("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1),
    "num_estimation": ("a whole number >= 1", _is_count),
}


def _fingerprint(folder: Path) -> str | None:
    """What the run folder says of its test images, None where it says nothing."""
    file = folder / "provenance.json"
    if not file.is_file():
        return None
    try:
        found: Any = read_object(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}; restore it from a copy, or certify again") from error
    for key in ("data", "test", "fingerprint"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _radius_text(radius: float, printed_short: bool) -> str:
    """``radius`` with six decimals, rounded toward zero; without trailing zeros where it was ``printed_short``."""
    # Decimal(repr) is the shortest decimal that reads back as this float, so that 0.529 stays 0.529.
    text = str(Decimal(repr(radius)).quantize(Decimal(1).scaleb(-_DIGITS), rounding=ROUND_FLOOR))
    return f"{float(text)}" if printed_short and (float(text) >= 1e-4 or float(text) == 0) else text


def _time_text(seconds: float, time_format: TimeFormat) -> str:
    return str(timedelta(seconds=seconds)) if time_format == "clock" else repr(seconds)
