"""The examples in the docstrings of the public functions and classes run and print what they say."""

import doctest
from pathlib import Path

import pytest

import rush
from tiny import run_tiny

WITH_EXAMPLES = (
    *("certify", "certify_changed", "noisy_features"),
    *("load_images", "SmoothedClassifier", "attack", "audit", "load"),
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_public_name_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "load":
        (tmp_path / "runs").mkdir()
        run_tiny(tmp_path, stages=("pretrain", "finetune")).path.rename(tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)
    examples = [test for test in doctest.DocTestFinder().find(getattr(rush, name), f"rush.{name}") if test.examples]
    runner, output = doctest.DocTestRunner(), list[str]()
    for test in examples:
        runner.run(test, out=output.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(output)
