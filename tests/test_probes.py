"""The linear probe against scikit-learn's logistic regression, an independent solver of the same convex problem."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from rush.runtime.randomness import stream
from rush.training.probes import linear_correct, linear_probe


def clouds(rows: int, name: str) -> tuple[Tensor, Tensor]:
    """Representations (rows, 12) of four overlapping classes, on scales that differ a hundredfold, and their labels."""
    generator = stream(0, "clouds", name)
    centres = torch.randn(4, 12, generator=stream(0, "centres"))
    labels = torch.randint(4, (rows,), generator=generator)
    scale = torch.logspace(-1, 1, 12)
    return (centres[labels] * 0.5 + torch.randn(rows, 12, generator=generator)) * scale + 3, labels


def test_the_probe_is_the_optimum_that_scikit_learn_finds() -> None:
    bank, labels = clouds(600, "bank")
    weight, bias = linear_probe(bank, labels, 4)
    mean, std = bank.mean(0), bank.std(0)
    standardised = ((bank - mean) / std).double().numpy()
    expected = LogisticRegression(max_iter=5000, tol=1e-10).fit(standardised, labels.numpy())
    np.testing.assert_allclose((weight * std).numpy(), expected.coef_, atol=2e-3)
    queries, truth = clouds(400, "queries")
    found = F.linear(queries, weight, bias).argmax(1)
    asked = ((queries - mean) / std).double().numpy()
    assert (found.numpy() == expected.predict(asked)).mean() > 0.99
    assert linear_correct(bank, labels, queries, truth) == int((found == truth).sum())


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_the_representations_does_not_matter(factor: float) -> None:
    bank, labels = clouds(200, "bank")
    weight, _ = linear_probe(bank, labels, 4)
    scaled, _ = linear_probe(factor * bank, labels, 4)
    torch.testing.assert_close(factor * scaled, weight, rtol=1e-2, atol=1e-3)
