"""The page of ``rush compare --html``: the tables of the terminal, curves, and nothing from outside."""

import csv
import io
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from commands import Call, refusal
from rush.errors import ConfigError
from rush.reporting.compare import all_tables, read_comparison
from rush.reporting.comparison_page import check_name, render_comparison
from rush.reporting.plots import certified_curves
from test_report import Page, certificates_of, make_full, make_sequential, write_run

RESULTS = Path(__file__).parents[1] / "results"
PLAIN, L1 = RESULTS / "cifar10-small-pgd-at", RESULTS / "cifar10-small-splitting" / "sigma-0.5"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with certificates in l2, one with certificates in l1, one without."""
    folder = tmp_path_factory.mktemp("compared")
    return [make_full(write_run(folder / "first")), write_run(folder / "<b>second"), L1, PLAIN]


def cells(html: str) -> list[list[list[str]]]:
    rows = [
        re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in re.findall(r"<table.*?</table>", html, re.DOTALL)
    ]
    return [
        [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in table] for table in rows
    ]


def test_the_page_has_the_tables_of_the_terminal(paths: list[Path], call: Call, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    done = call("compare", *paths, "--html", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"comparison: {target}")
    html = target.read_text(encoding="utf-8")
    expected = all_tables(*read_comparison(paths))
    assert cells(html) == [[list(header), *map(list, rows)] for _, header, rows in expected]
    for title, _, _ in expected:
        assert f"<h2>{title}</h2>" in unescape(html)
    assert call("compare", *paths).stdout in done.stdout


def test_the_page_has_a_curve_for_each_norm_with_its_values(paths: list[Path]) -> None:
    runs, comparison = read_comparison(paths)
    html = render_comparison(runs, comparison)
    page = Page(html)
    sections = re.findall(r'<section id="([\w-]+)">', html)
    assert sections[:4] == ["certified-l2", "certified-l1", "epsilon-linf", "epsilon-l1"]
    assert re.findall(r'href="#([\w-]+)"', html.split("</nav>")[0]) == sections
    (drawn, *_) = [label for label in page.labels if label.startswith("Certified accuracy over the radius: first")]
    assert drawn.endswith("first: 58.3 % at 0; <b>second: 58.3 % at 0")
    links = re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)" download="certified-l2\.csv"', html)
    header, *rows = csv.reader(io.StringIO(unquote(unescape(links[0]))))
    assert header == ["log", "ℓ2 radius", "certified accuracy"]
    certificates = certificates_of(paths[0])
    assert {row[0] for row in rows} == {"first", "<b>second"}
    for name, radius, accuracy in rows:
        assert float(accuracy) == pytest.approx(certificates.accuracy(float(radius))), name


def test_the_page_stands_alone(paths: list[Path]) -> None:
    page = Page(render_comparison(*read_comparison(paths)))
    assert {load[:5] for load in page.loads if not load.startswith("#")} == {"data:"}
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert (page.tags.count("script"), "b" in page.tags) == (1, False)


def test_equal_files_give_an_equal_page(paths: list[Path]) -> None:
    assert render_comparison(*read_comparison(paths[:2])) == render_comparison(*read_comparison(paths[:2]))


def test_many_logs_have_different_lines(paths: list[Path]) -> None:
    runs, comparison = read_comparison(paths[:1])
    assert comparison is not None
    logs = tuple(replace(comparison.logs[0], name=f"log {number}") for number in range(6))
    html = render_comparison(runs, replace(comparison, logs=logs))
    (drawn,) = re.findall(r'<svg class="plot" data-name="certified-l2-wide".*?</svg>', html, re.DOTALL)
    styles = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="(fill: none; stroke[^"]*)"', drawn)
    lines = [style for style in styles if "stroke-width: 1.6" in style]
    assert len(set(lines)) == len(lines) == 6


def test_the_radii_of_a_grid_are_dots(tmp_path: Path) -> None:
    """A dot per radius, and one in the legend."""
    grid = certificates_of(make_sequential(write_run(tmp_path / "run")))
    assert grid.rule.radii is not None
    drawn = str(certified_curves([("grid", grid)], "name", "wide"))
    plain = str(certified_curves([("plain", certificates_of(write_run(tmp_path / "plain")))], "name", "wide"))
    ticks = [svg.count('<use href="#name-') for svg in (drawn, plain)]
    assert re.search(r"grid</text>", drawn)
    assert ticks[0] - ticks[1] == len(grid.rule.radii) + 1 + axis_ticks(drawn) - axis_ticks(plain)


def axis_ticks(svg: str) -> int:
    return len(re.findall(r'id="name-(?:x|y)tick_\d+"', svg))


def test_without_noise_there_is_a_page_without_certificates() -> None:
    page = Page(render_comparison(*read_comparison([PLAIN])))
    assert "Without certificates" in page.text
    assert "Certified accuracy over" not in page.text


def test_a_file_that_is_no_page_is_not_overwritten(paths: list[Path], call: Call, tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    log.write_bytes((paths[0] / "certificates.tsv").read_bytes())
    before = log.read_bytes()
    assert "--html must name a file that ends with .html" in refusal(call("compare", log, "--html", log))
    assert log.read_bytes() == before
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="must name a file"):
        check_name(tmp_path / "folder.html")


def test_json_and_page_can_be_asked_for_together(paths: list[Path], call: Call, tmp_path: Path) -> None:
    done = call("compare", paths[0], "--html", tmp_path / "a.HTML", "--json")
    assert done.stdout.startswith("{")
    assert "comparison:" not in done.stdout
    assert (tmp_path / "a.HTML").stat().st_size > 10_000
