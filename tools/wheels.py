"""Collect the wheels that a machine without a package index lacks, so that this project runs there.

    python tools/wheels.py DIR --have installed.txt [--python 3.12] [--extra test]

``installed.txt`` is what ``python3 -m pip list --format=freeze`` prints on that machine, which must have torch. The
dependencies are those of pyproject.toml, the versions those of constraints.txt. docs/gpu.md shows the whole way.
"""

import argparse
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = 5, 28  # of glibc 2.x, whose wheels are taken
Fetch = Callable[[Requirement], Path]


def collect(requirements: Iterable[Requirement], installed: Mapping[str, Version], fetch: Fetch, python: str) -> None:
    """Fetch every requirement that ``installed`` does not meet, and what the fetched wheels require in turn.

    Args:
        requirements: What the project needs.
        installed: Version of each package that the machine has, by canonical name.
        fetch: Downloads the wheel of a requirement and returns its path.
        python: Version of Python there, e.g. "3.12".

    Raises:
        SystemExit: torch is missing, which is not brought along, or a fetched version does not meet a requirement.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    versions, pending = dict(installed), list(requirements)
    fetched: set[str] = set()
    while pending:
        requirement = pending.pop(0)
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if name in versions and requirement.specifier.contains(versions[name], prereleases=True):
            continue
        if name == "torch":
            raise SystemExit(f"the machine needs {requirement}, it has {versions.get(name, 'none')}; install it there")
        if name in fetched:
            raise SystemExit(f"{requirement} is needed, constraints.txt brings {versions[name]}; correct it there")
        wheel = fetch(requirement)
        versions[name] = parse_wheel_filename(wheel.name)[1]
        fetched.add(name)
        pending += [requirement, *wheel_requirements(wheel)]


def project_requirements(extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield the dependencies of pyproject.toml and of its ``extras``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"]:
        yield Requirement(text)
    for extra in extras:
        yield from map(Requirement, project["optional-dependencies"][extra])


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """Return what the metadata of a wheel require."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        found = message_from_bytes(opened.read(name)).get_all("Requires-Dist", [])
    return [Requirement(text) for text in found]


def read_installed(text: str) -> dict[str, Version]:
    """Return the versions in the output of ``pip list --format=freeze``; lines without ``==`` are passed over."""
    pairs = [line.strip().split("==") for line in text.splitlines() if line.count("==") == 1]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def pip_download(folder: Path, python: str, machine: str) -> Fetch:
    """Return a function that downloads single wheels for ``python`` on a Linux ``machine`` into ``folder``."""
    tags = [f"manylinux_2_{minor}" for minor in range(NEWEST, OLDEST - 1, -1)] + ["manylinux2014", "manylinux1"]
    platforms = [word for tag in tags for word in ("--platform", f"{tag}_{machine}")]
    fixed = ["-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]

    def fetch(requirement: Requirement) -> Path:
        print(requirement, flush=True)
        before = set(folder.glob("*.whl"))
        given = [f"{requirement.name}{requirement.specifier}", "-c", str(ROOT / "constraints.txt"), "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *fixed, *platforms, *given], check=True)
        new = set(folder.glob("*.whl")) - before
        name = canonicalize_name(requirement.name)
        return next(wheel for wheel in new or before if parse_wheel_filename(wheel.name)[0] == name)

    return fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--have", type=Path, required=True, help="output of pip list --format=freeze on that machine")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--machine", default="x86_64", help="its processor, e.g. aarch64")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml, e.g. test")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    fetch = pip_download(arguments.folder, arguments.python, arguments.machine)
    installed = read_installed(arguments.have.read_text(encoding="utf-8"))
    collect(project_requirements(arguments.extra), installed, fetch, arguments.python)


if __name__ == "__main__":
    main()
