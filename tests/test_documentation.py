"""The code of README.md and docs/: Python runs, the parser accepts the commands, and the rest says why it is not run.

The marks are described in ``documentation.py``.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts.exceptions import CycloptsError, MissingArgumentError
from torch import nn

import rush
from documentation import PAGES, REASONS, ROOT, Block, anchors, blocks, commands, links, mentions
from rush.commands.app import app
from rush.recipe.load import load_recipe, recipe_names
from tiny import run_tiny

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_HERE = [block for block in BLOCKS if block.language == "python" and block.mark in ("", "given")]
SHELL = [block for block in BLOCKS if block.language == "sh"]
# Budgets of the pages, and those of the tests.
SMALLER = {
    "[:100]": "[:4]",
    "[:60]": "[:4]",
    "num_estimation=10_000": "num_estimation=1000",
    "max_votes=10_000": "max_votes=400",
    "steps=100": "steps=4",
    'eot_samples="auto"': "eot_samples=2",
}


def names_for(block: Block, network: nn.Module) -> dict[str, Any]:
    """What a block may take as given."""
    images, threat = rush.load_images("digits", split="test")[:4], rush.ThreatModel("linf", 8 / 255)
    smoothed = rush.SmoothedClassifier(network, noise=rush.DiscreteGaussian(0.1), num_classes=10)
    values = {"network": network, "model": smoothed, "smoothed": smoothed, "images": images, "threat": threat}
    values |= {"x": images.pixels(), "y": images.labels, "points": images.pixels()}
    values |= {"rush": rush, "torch": torch}
    return {name: values[name] for name in block.given}


@pytest.fixture(scope="session")
def folder_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/digits``, from which blocks run; it is a run of seconds."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "runs").mkdir()
    run_tiny(folder, stages=("pretrain", "finetune")).path.rename(folder / "runs/digits")
    return folder


@pytest.mark.parametrize("page", sorted({block.page for block in RUN_HERE}))
def test_python_runs(
    page: str, digits_network: nn.Module, folder_of_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page in their order, each with the names of those before it."""
    monkeypatch.chdir(folder_of_runs)
    names: dict[str, Any] = {}
    for block in (block for block in RUN_HERE if block.page == page):
        code = block.code
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        names |= names_for(block, digits_network)
        exec(compile("\n" * block.line + code, block.page, "exec"), names)


def words_of_rush(words: list[str]) -> list[str] | None:
    """The arguments of ``rush`` in a command, None for another command."""
    if words[0].rpartition("/")[2] == "rush":
        return words[1:]
    module = [place for place, pair in enumerate(pairwise(words)) if pair == ("-m", "rush")]
    return words[module[0] + 2 :] if module else None


def check_rush(words: list[str]) -> None:
    """Raise what the command line would, for words, options, recipes and overrides that it does not have."""
    words = [word for word in words if word not in ("--traceback", "--help", "-q", "-v")]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    values = bound.arguments
    recipe = values.get("recipe")
    if recipe is not None and re.fullmatch(r"[a-z0-9-]+", recipe):
        assert recipe in recipe_names(), f"{recipe} is not a shipped recipe"
    load_recipe(recipe if recipe in recipe_names() else "cifar10-small-simclr", values.get("overrides") or ())


def check_command(words: list[str]) -> None:
    """Raise an error for a command that would be refused, or that this test does not know."""
    if (arguments := words_of_rush(words)) is not None:
        check_rush(arguments)
    elif words[0] == "make":
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", text, re.MULTILINE), f"make has no {name}"
    elif words[0].rpartition("/")[2] in ("python", "python3", "sh", "bash") and "." in words[1]:
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    else:
        raise LookupError(f"{words[0]!r} is neither rush nor make nor a script of the repository: give a mark")


def shell_fault(block: Block) -> str | None:
    """What is wrong with a shell block, None where nothing is."""
    for words in commands(block.code):
        try:
            check_command(words)
        except LookupError as error:
            if block.mark != "not run":
                return f"{block.place}: {error}"
        except (CycloptsError, AssertionError, rush.errors.RushError) as error:
            return f"{block.place}: {' '.join(words)}: {error}"
    return None


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_accepted(block: Block) -> None:
    assert shell_fault(block) is None


def mention_fault(words: list[str]) -> str | None:
    """What is wrong with a command within a text. Arguments may be missing, words in capitals stand for any value."""
    words = [word for word in words[1:] if word != "..."]
    try:
        check_rush(words)
    except MissingArgumentError:  # raised before options are read
        _, apps, _ = app.parse_commands(words)
        options = {name for argument in apps[-1].assemble_argument_collection() for name in argument.names}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
        return f"{' '.join(words)}: there is no {', '.join(unknown)}" if unknown else None
    except CycloptsError as error:
        return None if re.search(r'"[A-Z]+"', str(error)) else f"{' '.join(words)}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """The site's build checks links as it resolves them; readers of the files have GitHub's anchors."""
    found = [(path, anchor) for path, anchor in links(page) if not path.exists()]
    assert found == []
    assert [(path.name, anchor) for path, anchor in links(page) if anchor and anchor not in anchors(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_the_text_exist(page: str) -> None:
    assert [fault for words in mentions(page) if (fault := mention_fault(words))] == []


def mark_fault(block: Block) -> str | None:
    """What is wrong with language and mark of a block, None where nothing is."""
    if block.language not in ("python", "sh", "text"):
        return f"{block.place}: a block in {block.language or 'no language'} is neither run nor parsed; use text"
    if block.mark == "not run" and block.text not in REASONS:
        return f"{block.place}: {block.text!r} is not one of the reasons {', '.join(REASONS)}"
    if block.mark == "run by":
        test = ROOT / block.text
        if not test.is_file() or Path(block.page).name not in test.read_text(encoding="utf-8"):
            return f"{block.place}: {block.text} does not read this page"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [fault for block in blocks(page) if (fault := mark_fault(block))] == []
    assert 2 * len(blocks(page)) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a fence is not understood"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```sh\nrush run digits --nope\n```", "Unknown option: --nope"),
        ("<!-- not run: takes minutes -->\n```sh\nrush certify RUN --level famly\n```", "famly"),
        ("```sh\nrush run digits --set certify.alfa=0.01\n```", "alfa"),
        ("```sh\nrush run digitz\n```", "digitz is not a shipped recipe"),
        ("```sh\ntorchrun --nproc-per-node 8 -m rush certify RUN --nope\n```", "--nope"),
        ("```sh\nmake demonstration\n```", "make has no demonstration"),
        ("```sh\npython tools/nothing.py\n```", "tools/nothing.py does not exist"),
        ("```sh\npip install rush\n```", "give a mark"),
        ("```sh\nrush run digits \\\n  --sed 1 # seed\n```", "--sed"),
    ],
)
def test_a_wrong_command_is_found(text: str, fault: str) -> None:
    (block,) = blocks("page.md", text)
    assert fault in str(shell_fault(block))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("rush export RUN --two onnx --out model.onnx", "--two"),
        ("rush audit --faill-on VERDICT", "--faill-on"),
        ("rush sertify RUN", "sertify"),
        ("rush certify RUN --level famly", "famly"),
    ],
)
def test_a_wrong_command_within_the_text_is_found(words: str, fault: str) -> None:
    assert fault in str(mention_fault(words.split()))


@pytest.mark.parametrize("words", ["rush export RUN", "rush audit --fail-on VERDICT", "rush COMMAND --help"])
def test_a_command_within_the_text_may_be_incomplete(words: str) -> None:
    assert mention_fault(words.split()) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```yaml\na: 1\n```", "a block in yaml"),
        ("```\na\n```", "a block in no language"),
        ("<!-- not run: boring -->\n```python\n1 / 0\n```", "'boring' is not one of the reasons"),
        ("<!-- run by: tests/test_views.py -->\n```python\n1 / 0\n```", "tests/test_views.py does not read"),
    ],
)
def test_a_wrong_mark_is_found(text: str, fault: str) -> None:
    (block,) = blocks("page.md", text)
    assert fault in str(mark_fault(block))
