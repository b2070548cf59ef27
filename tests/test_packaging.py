"""What surrounds the package: citation, container, workflow and source distribution name what exists and agree."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import rush
from documentation import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["tool"]["hatch"]["build"]["targets"]
CLASSIFIED = [found for text in PROJECT["classifiers"] if (found := re.fullmatch(r".*Python :: (3\.\d+)", text))]
PYTHONS = [found[1] for found in CLASSIFIED]
NEEDED = (PROJECT["readme"], *PROJECT["license-files"], *BUILD["wheel"]["packages"], *BUILD["wheel"]["force-include"])
"""Files and folders of which the wheel is built, besides pyproject.toml."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load_yaml(name: str) -> Any:
    return yaml.safe_load(read(name))


# Python versions


def test_every_file_names_the_same_python_versions() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [version for minor in range(30) if (version := f"3.{minor}") in allowed] == PYTHONS
    lowest, highest = PYTHONS[0].replace(".", ", "), f"3, {int(PYTHONS[-1][2:]) + 1}"
    assert f"({lowest}) <= v < ({highest})" in read("Makefile")
    named = f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    for page in ("README.md", "docs/gpu.md", "Makefile"):
        assert named in " ".join(read(page).split()), f"{page} does not say {named}"


# Citation


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = load_yaml("CITATION.cff")
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == rush.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert set(citation["keywords"]) <= set(PROJECT["keywords"])
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert f"]({paper['url']})" in read("README.md")
    assert [author["family-names"] for author in paper["authors"]] == ["Pang", "Liu", "Zhou"]


# Badges


def test_the_badges_of_the_readme_are_true() -> None:
    badges = dict(re.findall(r"\[!\[([^]]+)\]\((docs/static/\w+\.svg)\)\]", read("README.md")))
    paper = PROJECT["urls"]["Paper"].rpartition("/")[2]
    assert list(badges) == [f"Python {' | '.join(PYTHONS)}", f"license {PROJECT['license']}", f"arXiv {paper}"]
    for text, file in badges.items():
        name, value = re.findall(r"<text[^>]*>([^<]+)</text>", read(file))
        assert f"{name} {value}".lower() == text.lower()


# Container


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and rest of every instruction of a Dockerfile."""
    lines = "\n".join(line for line in text.split("\n") if line and not line.startswith("#"))
    for line in lines.replace("\\\n", " ").split("\n"):
        name, _, rest = line.partition(" ")
        yield name, rest


DOCKERFILE = list(instructions(read("Dockerfile")))
COPIED = [source for name, rest in DOCKERFILE if name == "COPY" for source in shlex.split(rest)[:-1]]


def test_what_the_image_copies_exists_and_is_all_that_docker_reads() -> None:
    assert [source for source in COPIED if not (ROOT / source).exists()] == []
    rules = [line for line in read(".dockerignore").split("\n") if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(COPIED)


def test_the_image_holds_what_the_wheel_is_built_of() -> None:
    assert {*NEEDED, "pyproject.toml", "constraints.txt"} == set(COPIED)


def test_every_install_in_the_image_is_of_the_tested_versions() -> None:
    commands = [rest for name, rest in DOCKERFILE if name == "RUN" and "pip install" in rest]
    assert len(commands) == 2
    assert [command for command in commands if "-c constraints.txt" not in command] == []


def test_the_image_runs_the_command_as_a_user_without_rights() -> None:
    last = dict(DOCKERFILE)  # the last instruction of each name
    assert last["ENTRYPOINT"] == '["rush"]'
    assert "rush" in PROJECT["scripts"]
    assert re.search(rf"useradd [^&]*\b{last['USER']}\b", last["RUN"])
    assert last["FROM"] in [f"python:{version}-slim" for version in PYTHONS]
    assert f"ARG TORCH_INDEX={last['ARG'].partition('=')[2]}" in read("Dockerfile")
    assert f"TORCH_INDEX={last['ARG'].partition('=')[2]}`" in read("README.md")


# Workflow


WORKFLOW = load_yaml(".github/workflows/ci.yml")


def test_the_workflow_runs_the_checks_on_every_python_version() -> None:
    (job,) = WORKFLOW["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]


def test_what_the_workflow_names_exists() -> None:
    assert set(WORKFLOW[True]) == {"push", "pull_request"}  # YAML reads the key "on" as true
    for step in (step for job in WORKFLOW["jobs"].values() for step in job["steps"]):
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            program, script = step["run"].split()
            assert program == "bash"
            assert (ROOT / script).is_file(), f"{script} does not exist"
        else:
            assert re.fullmatch(r"actions/(checkout|setup-python)@v\d+", step["uses"])
        for name in step.get("env", {}):
            assert re.search(rf"^{name} \?=", read("Makefile"), re.MULTILINE), f"make reads no {name}"
        for file in step.get("with", {}).get("cache-dependency-path", "").split():
            assert (ROOT / file).is_file(), f"{file} does not exist"


# Source distribution


def test_the_source_distribution_has_what_the_wheel_is_built_of_and_no_other_results() -> None:
    included = BUILD["sdist"]["include"]
    anywhere = [pattern for pattern in included if not pattern.startswith("/")]
    assert anywhere == [], "without a slash, a pattern matches at any depth"
    names = {pattern[1:] for pattern in included}
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert {*NEEDED, "constraints.txt"} <= names
    assert {name for name in names if name.startswith("results")} == {"results/cifar10-small/model"}


@pytest.mark.parametrize("name", NEEDED)
def test_what_the_wheel_is_built_of_exists(name: str) -> None:
    assert (ROOT / name).exists()
