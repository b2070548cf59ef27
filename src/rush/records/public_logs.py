"""Certification logs, public ones and this library's, as ``Certificates`` with further values from their files.

A public log is a tab-separated table ``idx label predict radius correct time`` with one line per image. A predict of -1
means abstained. It contains neither sigma nor alpha nor the number of samples. This library's ``certificates.tsv``
opens with the same columns.
"""

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rush.certification.certificates import Certificates
from rush.certification.rule import CLOPPER_PEARSON, Rule, make_rule
from rush.certification.sequential import UNDECIDED
from rush.errors import ConfigError, DataError, InputError, RunError
from rush.records.certificates import PUBLIC_COLUMNS, TABLE, read_certificates
from rush.records.read_run import read_provenance, test_fingerprint
from rush.records.tsv import Table, parse_real
from rush.runtime.lines import read_lines

# Settings of the public logs of CIFAR-10 and ImageNet (Cohen et al. 2019), which do not contain them.
PUBLIC_ALPHA = 0.001
PUBLIC_NUM_SELECTION = 100
PUBLIC_NUM_ESTIMATION = 100_000

_DIGITS = 6  # decimals of a radius that is not rounded further
_LONGEST_HEADER = 10_000  # bytes
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)")
_ENDING = "; get the log again, or mend the line"


@dataclass(frozen=True, eq=False)
class CertificateTable:
    """The ``certificates`` of N images in the file or run folder ``path``.

    Attributes:
        idx: positions of the images in their split, int64 (N,).
        published: whether it is a public log. Its votes are not known: ``counts`` and ``selection`` have no classes,
            ``blocks`` are empty, ``p_lower`` follows from the radius and ``ids`` from ``idx``.
        rounding: largest excess of each printed radius over the certified one, float64 (N,), None without rounding.
        dataset: fingerprint of the whole split that the images are from, None if it is not known.
    """

    name: str
    path: Path
    idx: NDArray[np.int64]
    certificates: Certificates
    published: bool = False
    rounding: NDArray[np.float64] | None = None
    dataset: str | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def rule(self) -> Rule:
        return self.certificates.rule

    @property
    def slack(self) -> NDArray[np.float64] | float:
        """Largest excess of each printed radius over the certified one, 0.0 without rounding."""
        return 0.0 if self.rounding is None else self.rounding

    @property
    def at_ceiling(self) -> NDArray[np.bool_]:
        """Images whose printed radius is the largest that the rule can certify, (N,).

        For rounding, a public log is allowed a ten-thousandth: under Gaussian noise, one vote less costs at least a
        hundredth of the radius.
        """
        top = self.rule.largest_radius * (1 - 1e-4 if self.published else 1)
        return ~self.certificates.abstained & (self.certificates.radius >= top - self.slack)


def read_log(
    path: Path | str, sigma: float | None = None, alpha: float | None = None, num_estimation: int | None = None
) -> CertificateTable:
    """Return the log in the file ``path``, a public one or this library's, or in the run folder ``path``.

    The settings of a public log are taken from the arguments. The defaults are the sigma in the file's name
    (``sigma_0.25``, or ``noise_0.25`` if it has no sigma), alpha 0.001 and num_estimation 100,000. Logs of this library
    hold these settings in the column ``rule``, and their classes and radii follow from their votes.

    Args:
        path: log, or run folder with ``certificates.tsv``.
        sigma: standard deviation of the noise, in [0, 1] pixel units.
        alpha: failure probability per certificate.
        num_estimation: estimation samples per image.

    Raises:
        ConfigError: a number is missing, not allowed or contradicted.
        DataError: a public log is damaged. The message names file and line.
        RunError: a file of this library is damaged or missing. The message names file and line.
    """
    path = Path(path)
    conditions = {"sigma": sigma, "alpha": alpha, "num_estimation": num_estimation}
    file = path / TABLE if path.is_dir() else path
    lines = _read_lines(file)
    published = not _is_own(lines[0].split("\t"))
    folder = file.parent if not published and file.name == TABLE else None  # the run folder
    name = (folder or file).resolve().name.removesuffix(".tsv").removesuffix(".txt")
    if published:
        return _public_log(name, file, lines, conditions)
    read = read_certificates(file)
    if read is None:
        raise RunError(f"{file}, line 1: no image follows; move the file away and certify again")
    for key, value in conditions.items():
        stored = getattr(read[1].rule, key)
        if value is not None and value != stored:
            raise ConfigError(f"{file} has {key} = {stored}, but {value} was given; omit it")
    provenance = {} if folder is None else read_provenance(folder)
    return CertificateTable(name, path, np.array(read[0]), read[1], dataset=test_fingerprint(provenance))


def name_sigma(path: Path | str) -> float | None:
    """Return the sigma in a file's name, or None if it contains none or several."""
    for word in ("sigma", "noise"):
        sigmas = {float(text) for text in re.findall(rf"{word}[_=-]?(\d+(?:\.\d+)?)", Path(path).name.lower())}
        if sigmas:
            return sigmas.pop() if len(sigmas) == 1 else None
    return None


def states_sigma(path: Path | str) -> bool:
    """Return whether the sigma of a log is known: from a run folder, a log of this library, or the file's name."""
    path = Path(path)
    return path.is_dir() or name_sigma(path) is not None or (path.is_file() and _holds_own(path))


def _is_own(header: list[str]) -> bool:
    """Return whether ``header`` is that of this library's tables, with or without votes."""
    return tuple(header[: len(PUBLIC_COLUMNS)]) == PUBLIC_COLUMNS and {"id", "p_lower"} <= set(header)


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


def _public_log(name: str, path: Path, lines: list[str], conditions: Mapping[str, Any]) -> CertificateTable:
    """Return the public log in ``lines``, after a check of its columns against each other."""
    names = lines[0].split("\t")
    if tuple(names[: len(PUBLIC_COLUMNS)]) != PUBLIC_COLUMNS or len(set(names)) < len(names):
        opening = f"a log opens with the tab-separated columns {' '.join(PUBLIC_COLUMNS)}"
        raise DataError(f"{path}, line 1: {opening}, got {lines[0][:100]!r}")
    table = Table.parse(path, lines, _ENDING, DataError)
    idx, labels, prediction, correct = (table.whole(column) for column in ("idx", "label", "predict", "correct"))
    radius, seconds = table.real("radius"), np.array(table.parsed("time", _seconds))
    table.check(np.minimum(idx, labels) >= 0, "idx and label must be >= 0")
    table.check(prediction >= -1, "predict must be a class, or -1 for abstained")
    table.check(correct == (prediction == labels), "correct does not agree with predict and label")
    table.check_unique("idx", idx)
    rule = _public_rule(path, len(idx), conditions)
    certificates = Certificates(
        prediction=prediction,
        radius=radius,
        p_lower=special.ndtr(radius / rule.sigma),
        num_samples=np.full(len(idx), rule.num_samples),
        counts=np.zeros((len(idx), 0), np.int64),
        blocks=(np.zeros(0, np.uint8),) * len(idx),
        selection=np.zeros((len(idx), 0), np.int64),
        outcome=np.full(len(idx), UNDECIDED, np.uint8),
        seconds=seconds,
        labels=labels,
        ids=tuple(map(str, idx.tolist())),
        rule=rule,
    )
    return CertificateTable(name, path, idx, certificates, published=True, rounding=_rounding(table.cells["radius"]))


def _public_rule(path: Path, num_images: int, conditions: Mapping[str, Any]) -> Rule:
    """Return the rule of a public log from ``conditions``. Defaults are the sigma in its name and the usual values."""
    default = {"sigma": name_sigma(path), "alpha": PUBLIC_ALPHA, "num_estimation": PUBLIC_NUM_ESTIMATION}
    values: dict[str, Any] = {key: default[key] if value is None else value for key, value in conditions.items()}
    if values["sigma"] is None:
        raise ConfigError(
            f"{path} is a public log, which does not contain its sigma, and neither does its name "
            "(sigma_0.25, noise_0.25); give --sigma"
        )
    try:
        return make_rule(
            **values,
            method=CLOPPER_PEARSON,
            level="image",
            num_images=num_images,
            num_selection=PUBLIC_NUM_SELECTION,
            radii=None,
            futility=PUBLIC_ALPHA,
        )
    except InputError as error:
        raise ConfigError(f"{path}: {error}") from error


def _seconds(text: str) -> float:
    clock = _CLOCK.fullmatch(text)
    if clock is None:
        return parse_real(text)
    days, hours, minutes, seconds = (part or "0" for part in clock.groups())
    return 86400 * int(days) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _rounding(texts: list[str]) -> np.ndarray | None:
    """Return half a unit of the last digit that each radius is printed with, 0.0 for 0.

    It is None if six decimals are printed. Some logs omit trailing zeros, so the largest numbers of digits and decimals
    in the table are used, and the coarser of the two applies.
    """
    parts = [Decimal(text) for text in texts]
    positive = [part for part in parts if part > 0]
    digits = max((len(part.as_tuple().digits) for part in positive), default=0)
    decimals = -min((int(part.as_tuple().exponent) for part in positive), default=-_DIGITS)
    if not positive or (decimals >= _DIGITS and digits >= _DIGITS):
        return None
    units = [max(10.0**-decimals, 10.0 ** (part.adjusted() - digits + 1)) if part > 0 else 0.0 for part in parts]
    return 0.5 * np.array(units)
