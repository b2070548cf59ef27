"""Certification logs, public ones and our own, read into one form, written in the public form, and doubted.

A public log is a tab-separated table ``idx label predict radius correct time``, one line an image; predict -1 means
abstained. It says neither sigma nor alpha nor the number of samples. Our ``certificates.tsv`` opens with the same
columns and goes on with its own, among them the rule of the certification.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy import special

from rush.errors import ConfigError, DataError, RunError
from rush.evaluation.intervals import Interval, share_interval
from rush.files import write_text
from rush.options import CertifyMethod, Level

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
TABLE = "certificates.tsv"
# What the public logs of CIFAR-10 and ImageNet were made with (Cohen et al. 2019) and do not say themselves.
PUBLIC_ALPHA = 0.001
PUBLIC_NUM_ESTIMATION = 100_000
TimeFormat = Literal["seconds", "clock"]

_DIGITS = 6  # decimals of a written radius
_TIE_STEP = 0.25  # accuracies are published at multiples of it
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)")


@dataclass(frozen=True, eq=False)
class CertificationLog:
    """Certificates of N images under one rule: arrays (N,), radii in [0, 1] pixel units, predict -1 where abstained.

    alpha: level of each certificate (``level`` image) or of all ``num_images`` together (family). num_estimation: votes
    that bound an image, the largest number for a sequential rule. radii: the grid a radius was taken from, None for any
    radius. p_lower, num_samples (selection and estimation together), ids, undecided (a larger radius was still open
    after the last vote): None where the log does not say. rounding: how far each radius as printed may lie above what
    was certified, None where none does. dataset: fingerprint of the whole split that the images are from, None where it
    is not known.
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
        """Certified accuracy at ``radius`` with its exact 95 % interval over images."""
        return share_interval(int(self.certified(radius).sum()), len(self))

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
    ``noise_0.25`` where there is no sigma), alpha 0.001, num_estimation 100,000. A log of our own says all this, in its
    column ``rule`` or in the run folder's stages/certify.json; an argument that contradicts it is an error.
    Raises: ConfigError for a number that is missing, not allowed or contradicted; DataError for a damaged public log,
    RunError for a damaged or missing file of our own, both naming file and line.
    """
    path = Path(path)
    given = {"sigma": sigma, "alpha": alpha, "num_estimation": num_estimation}
    _check_conditions({key: value for key, value in given.items() if value is not None}, f"{path}", ConfigError)
    table = _read_table(path / TABLE if path.is_dir() else path)
    rows = _read_rows(table)
    if table.own:
        parts = {**_own_columns(table), **_own_conditions(table, given), "dataset": _fingerprint(table)}
    else:
        parts = {**_public_conditions(table, given), "rounding": _rounding(table.columns["radius"])}
    name = (table.home or table.file).resolve().name.removesuffix(".tsv").removesuffix(".txt")
    return CertificationLog(name=name, path=path, **rows, **parts)


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
    return path.is_dir() or name_sigma(path) is not None or (path.is_file() and _read_table(path).own)


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
    if path.exists() and _is_own(path.read_text(encoding="utf-8").split("\n", 1)[0].split("\t")):
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
    """The cells of a log by column; ``own`` where it has our columns too."""

    file: Path
    columns: Mapping[str, list[str]]
    own: bool

    @property
    def home(self) -> Path | None:
        """The run folder, where the table has the place and the name that it has in one."""
        return self.file.parent if self.own and self.file.name == TABLE else None

    def damaged(self, row: int, what: str) -> DataError | RunError:
        return _damaged(self.file, row + 2, what, self.own)


def _damaged(file: Path, line: int, what: str, own: bool) -> DataError | RunError:
    if own:
        return RunError(f"{file}, line {line}: {what}; move the file away and certify again")
    return DataError(f"{file}, line {line}: {what}; get the log again, or mend the line")


def _is_own(header: list[str]) -> bool:
    return tuple(header[: len(COLUMNS)]) == COLUMNS and {"id", "p_lower"} <= set(header)


def _read_table(file: Path) -> _Table:
    try:
        header, *lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except FileNotFoundError:
        raise RunError(
            f"{file} is missing; give a log file, or the folder of a run that `rush certify` has finished"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a log: {error}; give a tab-separated text file") from error
    names = header.split("\t")
    if tuple(names[: len(COLUMNS)]) != COLUMNS or len(set(names)) < len(names):
        raise DataError(
            f"{file}, line 1: a log opens with the tab-separated columns {' '.join(COLUMNS)}, got {header[:100]!r}"
        )
    own = _is_own(names)
    if not lines:
        raise _damaged(file, 1, "no image follows", own)
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise _damaged(file, number, f"{len(row)} fields instead of {len(names)}", own)
    return _Table(file, {name: [row[place] for row in rows] for place, name in enumerate(names)}, own)


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


def _own_columns(table: _Table) -> dict[str, Any]:
    ids = np.array(table.columns["id"])
    again = ~_first_of_each(ids)
    if again.any():
        raise table.damaged(int(again.argmax()), f"the image {ids[again][0]} stands in the table before")
    p_lower = _parsed(table, "p_lower", _positive_number)
    if (p_lower > 1).any():
        raise table.damaged(int((p_lower > 1).argmax()), "p_lower is larger than 1")
    samples = _parsed(table, "num_samples", _whole_number) if "num_samples" in table.columns else None
    outcome = np.array(table.columns["outcome"]) if "outcome" in table.columns else None
    return {
        "ids": tuple(table.columns["id"]),
        "p_lower": p_lower,
        "num_samples": samples,
        "undecided": None if outcome is None else outcome == "undecided",
    }


def _first_of_each(values: np.ndarray) -> np.ndarray:
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _parsed(table: _Table, column: str, parse: Callable[[str], float]) -> np.ndarray:
    values = []
    for row, cell in enumerate(table.columns[column]):
        try:
            values.append(parse(cell))
        except ValueError as error:
            raise table.damaged(row, f"{column} {cell!r} {error}") from None
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
    conditions = {
        "sigma": sigma,
        "alpha": PUBLIC_ALPHA if given["alpha"] is None else given["alpha"],
        "num_estimation": PUBLIC_NUM_ESTIMATION if given["num_estimation"] is None else given["num_estimation"],
    }
    return _completed(conditions, table)


def _own_conditions(table: _Table, given: Mapping[str, Any]) -> dict[str, Any]:
    said, source = _said(table)
    for key, value in given.items():
        if value is not None and said.get(key, value) != value:
            raise ConfigError(f"{source} says {key} = {said[key]}, {value} was given; leave it away")
    wanted = {**{key: value for key, value in given.items() if value is not None}, **said}
    missing = [key for key in given if wanted.get(key) is None]
    if missing:
        raise ConfigError(f"{table.file} does not say {', '.join(missing)}, nor does its folder; give it")
    _check_conditions(wanted, source, RunError)
    return _completed(wanted, table)


def _said(table: _Table) -> tuple[dict[str, Any], str]:
    """What the column ``rule`` says, else stages/certify.json beside; and which of them."""
    rules = table.columns.get("rule")
    if rules is not None:
        other = next((row for row, rule in enumerate(rules) if rule != rules[0]), None)
        if other is not None:
            raise table.damaged(other, "its rule is not that of the first image")
        return _object(rules[0], f"{table.file}, line 2, rule"), f"{table.file}"
    file = table.home / "stages" / "certify.json" if table.home is not None else None
    if file is None or not file.is_file():
        return {}, f"{table.file}"
    said = _object(_text(file), f"{file}")
    return {key: said[key] for key in ("sigma", "alpha", "num_selection", "num_estimation") if key in said}, f"{file}"


def _completed(conditions: Mapping[str, Any], table: _Table) -> dict[str, Any]:
    """All conditions of a log, those of a public one where ``conditions`` are silent."""
    images = len(table.columns["idx"])
    defaults = {"method": "clopper-pearson", "level": "image", "num_images": images, "num_selection": None}
    found = {**defaults, "radii": None, **conditions}
    keys = ("sigma", "alpha", "num_estimation", "num_selection", "method", "level", "num_images")
    grid = None if found["radii"] is None else tuple(float(radius) for radius in found["radii"])
    return {**{key: found[key] for key in keys}, "bound": str(found.get("bound", found["method"])), "radii": grid}


def _check_conditions(values: Mapping[str, Any], source: str, error: type[ConfigError] | type[RunError]) -> None:
    """Raises ``error`` naming ``source`` unless each of ``values`` is allowed."""
    for key, (allowed, holds) in _CONDITIONS.items():
        if key in values and not holds(values[key]):
            raise error(f"{source}: {key} must be {allowed}, got {values[key]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_grid(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list) or not value or not all(_is_number(radius) for radius in value):
        return False
    return value == sorted(set(value)) and value[0] >= 0


_CONDITIONS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sigma": ("a number > 0", lambda value: _is_number(value) and value > 0),
    "alpha": ("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1),
    **dict.fromkeys(("num_estimation", "num_selection", "num_images"), ("a whole number >= 1", _is_count)),
    "method": (" or ".join(get_args(CertifyMethod)), lambda value: value in get_args(CertifyMethod)),
    "level": (" or ".join(get_args(Level)), lambda value: value in get_args(Level)),
    "radii": ("null or a list of ascending numbers >= 0", _is_grid),
}


def _fingerprint(table: _Table) -> str | None:
    """What the run folder says of its test images, None where it says nothing."""
    file = table.home / "provenance.json" if table.home is not None else None
    if file is None or not file.is_file():
        return None
    found: Any = _object(_text(file), f"{file}")
    for key in ("data", "test", "fingerprint"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read: {error}; restore it from a copy") from error


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{source} is not JSON ({error}); restore the file from a copy, or certify again") from error
    if not isinstance(found, dict):
        raise RunError(f"{source} must be a JSON object, got {text[:60]!r}; restore the file, or certify again")
    return found


def _radius_text(radius: float, printed_short: bool) -> str:
    """``radius`` with six decimals, rounded toward zero; without trailing zeros where it was ``printed_short``."""
    # Decimal(repr) is the shortest decimal that reads back as this float, so that 0.529 stays 0.529.
    text = str(Decimal(repr(radius)).quantize(Decimal(1).scaleb(-_DIGITS), rounding=ROUND_FLOOR))
    return f"{float(text)}" if printed_short and (float(text) >= 1e-4 or float(text) == 0) else text


def _time_text(seconds: float, time_format: TimeFormat) -> str:
    return str(timedelta(seconds=seconds)) if time_format == "clock" else repr(seconds)
