"""Accuracy per class, and the confusion of classes, of the smoothed prediction."""

from dataclasses import dataclass

import numpy as np

from rush.certification.certificates import Certificates
from rush.records.read_run import RunResults
from rush.reporting.compare import class_accuracies
from rush.reporting.wording import headline_radius
from rush.statistics import Interval

MOST_CLASSES = 20
"""Number of classes up to which each of them is shown."""


@dataclass(frozen=True)
class ClassAccuracy:
    """Shares of the images of one class that are predicted correctly, and certified correctly at a radius."""

    name: str
    images: int
    predicted: Interval
    certified: Interval


@dataclass(frozen=True)
class Confusion:
    """The number of images by label (row) and prediction (column). The last column counts abstentions."""

    names: tuple[str, ...]
    counts: np.ndarray

    @property
    def pairs(self) -> list[tuple[str, str, int]]:
        """Label, prediction and number of the wrong predictions, the most frequent first."""
        names = (*self.names, "abstained")
        wrong = [
            (self.names[label], names[predicted], int(self.counts[label, predicted]))
            for label, predicted in np.argwhere(self.counts > 0).tolist()
            if label != predicted
        ]
        return sorted(wrong, key=lambda pair: -pair[2])


def accuracy_by_class(results: RunResults) -> list[ClassAccuracy]:
    """Return the classes that have certified images, the one with the lowest certified accuracy first."""
    certificates = results.certificates
    assert certificates is not None
    predicted = class_accuracies(certificates, 0.0)
    certified = class_accuracies(certificates, headline_radius(certificates))
    counts = np.bincount(certificates.labels)
    rows = [
        ClassAccuracy(results.class_name(label), int(counts[label]), predicted[label], certified[label])
        for label in predicted
    ]
    return sorted(rows, key=lambda row: row.certified.estimate)


def confusion(results: RunResults) -> Confusion:
    """Return the confusion of the classes that occur among labels and predictions."""
    certificates: Certificates | None = results.certificates
    assert certificates is not None
    seen = np.union1d(certificates.labels, certificates.prediction[~certificates.abstained])
    places = {label: place for place, label in enumerate(seen.tolist())}
    counts = np.zeros((len(seen), len(seen) + 1), np.int64)
    columns = [places.get(predicted, len(seen)) for predicted in certificates.prediction.tolist()]
    np.add.at(counts, ([places[label] for label in certificates.labels.tolist()], columns), 1)
    return Confusion(tuple(map(results.class_name, seen.tolist())), counts)
