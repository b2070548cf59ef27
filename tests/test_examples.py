"""The examples in the docstrings of the public functions and classes run and print what they say."""

import doctest

import pytest

import rush

WITH_EXAMPLES = ("certify", "load_images", "SmoothedClassifier", "attack", "audit", "load")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_public_name_run(name: str) -> None:
    examples = [test for test in doctest.DocTestFinder().find(getattr(rush, name), f"rush.{name}") if test.examples]
    if not examples:
        pytest.skip(f"rush.{name} has no example yet")
    runner, output = doctest.DocTestRunner(), []
    for test in examples:
        runner.run(test, out=output.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(output)
