"""The documentation site: it builds without a warning, has every page and name, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import reference
import rush
from documentation import PAGES, ROOT
from rush.commands.app import COMMANDS
from rush.recipe.load import recipe_names
from rush.recipe.schema import Recipe, Section


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, for which every warning is an error: links to nothing, pages that are in no menu."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", ROOT / "docs", "-d", folder / "trees"]
    done = subprocess.run([*command, ROOT, folder / "html"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def page(site: Path, name: str) -> str:
    return unescape((site / name).with_suffix(".html").read_text(encoding="utf-8"))


def fields(section: type[Section], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{path}{name}.")
        else:
            yield path + name


def test_the_menu_is_readmes_list_of_pages(site: Path) -> None:
    entry = r'<li class="toctree-l1[^"]*"><a class="reference internal" href="([^"#]+)\.html">'
    menu = re.findall(entry, page(site, "README"))
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Documentation")[1].split("\n## ")[0]
    listed = re.findall(r"\]\(([^)]+)\.md\)", section)
    assert menu == listed
    assert {f"{name}.md" for name in listed} | {"README.md"} >= set(PAGES)
    assert "url=README.html" in (site / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//|<link[^>]*href="(?:https?:)?//|url\(['"]?(?:https?:)?//"""
    )
    files = [file for file in site.rglob("*") if file.suffix in (".html", ".css")]
    assert len(files) > len(PAGES)
    assert [file.name for file in files if loaded.search(file.read_text(encoding="utf-8"))] == []


def test_every_field_of_a_recipe_is_described(site: Path) -> None:
    text = page(site, "docs/recipes")
    names = list(fields(Recipe))
    assert len(names) > 100
    assert [name for name in names if f'id="confval-{name}"' not in text] == []
    directives = re.findall(r"```{confval} (\S+)\n(?::.*\n)+\n(.*)\n```", reference.recipe_fields())
    assert {name for name, _ in directives} == set(names)
    assert [name for name, description in directives if not description] == [], "describe them under Attributes"


def test_every_recipe_has_its_notes_and_what_it_changes(site: Path) -> None:
    text = page(site, "docs/recipes")
    for name in recipe_names():
        section = text.split(f'<section id="{name}">')[1].split("</section>")[0]
        words = re.sub(r"<[^>]+>", "", section)
        assert all(f"{note}: " in words for note in ("source", "literature", "measured", "command"))
    splitting = text.split('<section id="cifar10-small-splitting">')[1].split("</section>")[0]
    assert 'href="#cifar10-small-gaussian"' in splitting
    assert 'href="results.html"' in splitting


def test_every_public_name_and_command_is_described(site: Path) -> None:
    api, options = page(site, "docs/api"), page(site, "docs/options")
    assert [name for name in rush.__all__ if f'id="rush.{name}"' not in api] == []
    assert 'id="rush.certification.certificates.Certificates.accuracy"' in api
    assert 'id="rush.errors.SandwichError"' in api
    assert [name for name in COMMANDS if f'<section id="rush-{name}">' not in options] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("certify.alpha", [":type: number > 0 and < 0.5", ":default: `0.001`"]),
        ("pretrain.adversary.steps", [":type: integer ≥ 1", ":default: `5`"]),
        ("finetune.adversary.steps", [":default: `10`"]),
        ("pretrain.batch_size", [":default: must be given", "images per step, over all processes"]),
        ("pretrain.temperature", ["by default 0.2 for MoCo"]),
        ("certify.radii", [":type: list of numbers ≥ 0", ":default: not set"]),
        ("pretrain.views.crop_scale", [":type: 2 numbers > 0", ":default: `[0.2, 1.0]`"]),
        ("execution.tile", [':type: integer or `"auto"`', ':default: `"auto"`']),
        ("pretrain.views.blur", ["probabilities of the horizontal flip, colour change, greyscale and blur"]),
    ],
)
def test_type_default_and_description_of_a_field(path: str, expected: list[str]) -> None:
    (field,) = re.findall(rf"```{{confval}} {re.escape(path)}\n(.*?)```", reference.recipe_fields(), re.DOTALL)
    assert [part for part in expected if part not in field] == []


def test_a_field_without_a_fixed_default_shows_none() -> None:
    (field,) = re.findall(r"```{confval} pretrain\.temperature\n(.*?)```", reference.recipe_fields(), re.DOTALL)
    assert ":default:" not in field


def test_a_marker_of_nothing_is_refused() -> None:
    with pytest.raises(SystemExit, match="nothing is generated as 'recipe'; NAME must be one of commands, recipes"):
        reference.filled("<!-- generated: recipe -->")
