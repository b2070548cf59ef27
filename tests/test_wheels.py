"""The wheels for a machine without a package index: what it lacks, what that needs in turn, and nothing else."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

SCRIPT = Path(__file__).parents[1] / "tools" / "wheels.py"
SPECIFICATION = importlib.util.spec_from_file_location("wheels", SCRIPT)
assert SPECIFICATION is not None
assert SPECIFICATION.loader is not None
wheels = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(wheels)

INDEX = {
    "command-line": ("3.1", ["Colours>=2", "parser; python_version < '3.12'", "docs; extra == 'docs'"]),
    "colours": ("2.4", []),
    "checks": ("1.0", ["checks_core==7.1", "numbers>=1"]),
    "checks-core": ("7.1", ["checks"]),
    "parser": ("1.0", []),
}
"""Version of each package that can be fetched, and what it requires."""


class Index:
    """Writes the wheel of a requirement when it is fetched, and notes its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def __call__(self, requirement: Requirement) -> Path:
        name = requirement.name.lower().replace("_", "-")
        self.fetched.append(name)
        version, needed = INDEX[name]
        stem = f"{name.replace('-', '_')}-{version}"
        path = self.folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            lines = [f"Requires-Dist: {text}\n" for text in needed]
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\n{''.join(lines)}")
        return path


def collected(folder: Path, needed: list[str], installed: dict[str, str], python: str = "3.12") -> list[str]:
    index = Index(folder)
    have = wheels.read_installed("\n".join(f"{name}=={version}" for name, version in installed.items()))
    wheels.collect(map(Requirement, needed), have, index, python)
    return index.fetched


def test_what_is_missing_is_fetched_with_what_it_requires_and_nothing_twice(tmp_path: Path) -> None:
    needed = ["torch>=2.8", "numbers>=1.2", "command-line>=3", "checks", "Checks>=1"]
    have = {"torch": "2.11.0+cu130", "Numbers": "1.26", "unused": "1"}
    assert collected(tmp_path, needed, have) == ["command-line", "checks", "colours", "checks-core"]
    assert collected(tmp_path, needed, have, "3.11") == ["command-line", "checks", "colours", "parser", "checks-core"]
    assert collected(tmp_path, needed, {**have, "colours": "2.0", "checks": "1.0"}) == ["command-line"]


def test_a_package_that_is_too_old_is_fetched(tmp_path: Path) -> None:
    have = {"command-line": "3.1", "colours": "1.9"}
    assert collected(tmp_path, ["command-line>=3", "colours>=2"], have) == ["colours"]


@pytest.mark.parametrize(("have", "text"), [({}, "it has none"), ({"torch": "2.7.1"}, r"it has 2\.7\.1")])
def test_torch_is_never_brought_along(tmp_path: Path, have: dict[str, str], text: str) -> None:
    with pytest.raises(SystemExit, match=rf"the machine needs torch>=2\.8, {text}; install it there"):
        collected(tmp_path, ["torch>=2.8"], have)


def test_a_pin_that_does_not_meet_a_requirement_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"colours>=3 is needed, constraints.txt brings 2\.4"):
        collected(tmp_path, ["colours", "colours>=3"], {})


def test_the_requirements_are_those_of_the_project() -> None:
    names = {requirement.name for requirement in wheels.project_requirements()}
    assert {"torch", "numpy", "pydantic", "cyclopts", "pooch"} <= names
    assert "pytest" not in names
    assert "pytest" in {requirement.name for requirement in wheels.project_requirements(["test"])}


def test_a_list_of_packages_is_read_as_pip_prints_it() -> None:
    text = "Jinja2==3.1.6\ntyping_extensions==4.16.0\nrush-smoothing @ file:///work\n-e git+there#egg=x\n\n"
    assert wheels.read_installed(text) == {"jinja2": Version("3.1.6"), "typing-extensions": Version("4.16.0")}
