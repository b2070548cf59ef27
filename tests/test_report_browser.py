"""The report in a browser: no error, no overflow at any width, the walk, enlarged images, saved files, printed pages.

It needs the extra ``browser`` and a Chromium: Playwright's own (``playwright install chromium``), one on the path, or
the one that the environment variable CHROME_BIN names.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rush.records.read_run import read_run
from rush.reporting.page import write_report
from rush.reporting.walk import STATES, walk_of
from test_report import EPSILON, make_full, write_certificates, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    named = os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        file = named or started.chromium.executable_path
        if not Path(file).exists():
            pytest.skip("needs a browser: `playwright install chromium`, or CHROME_BIN")
        opened = started.chromium.launch(executable_path=file, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_full(write_run(tmp_path_factory.mktemp("browser") / "run"))
    write_certificates(run, votes=dict.fromkeys((1, 2, 3), 500))  # of the images that hold, these are not proved
    return write_report(run)


def open_page(browser: Any, report: Path, **conditions: Any) -> tuple[Any, list[str]]:
    """The page without network, and the list of what its console says."""
    context = browser.new_context(offline=True, accept_downloads=True, **conditions)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    return page, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_fits_and_has_no_error(browser: Any, report: Path, width: int, scheme: str) -> None:
    page, said = open_page(browser, report, viewport={"width": width, "height": 900}, color_scheme=scheme)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    assert said == []
    page.context.close()


def test_the_walk_says_at_every_size_what_the_library_says(browser: Any, report: Path) -> None:
    """By the keyboard: the slider begins at the threat; every state and share is that of ``Walk.at``."""
    walk = walk_of(read_run(report.parent))
    assert walk is not None
    page, said = open_page(browser, report)
    slider = page.locator("#size")
    slider.focus()
    seen: set[str] = set()
    for key in ("", "ArrowRight", "ArrowLeft", "Home", "End", *["ArrowLeft"] * 40):
        if key:
            page.keyboard.press(key)
        shown = float(slider.input_value())
        epsilon = EPSILON if abs(shown - EPSILON) < walk.step / 2 else shown
        shares = {name: f"{100 * share:.1f} %" for name, share in walk.shares(epsilon).items()}
        assert {name: page.locator(f"b[data-share={name}]").inner_text() for name in shares} == shares
        known = walk.at(epsilon)
        states = page.evaluate(
            "[...document.querySelectorAll('[data-place]')].map(s => [s.dataset.place, s.dataset.state])"
        )
        assert [known[int(place)] for place, _ in states] == [state for _, state in states]
        seen |= set(known)
    assert seen == set(STATES)
    assert re.fullmatch(r"[\d.]+/255", page.locator(".walk output").inner_text())
    assert said == []
    page.context.close()


def test_images_enlarge_by_click_and_by_keyboard(browser: Any, report: Path) -> None:
    page, _ = open_page(browser, report)
    dialog, buttons = page.locator("dialog"), page.locator(".pictures button")
    buttons.nth(0).click()
    assert dialog.is_visible()
    first = dialog.inner_text()
    assert "clean image of digit 0" in first
    assert "certified ℓ2 radius" in first
    page.keyboard.press("ArrowRight")
    assert dialog.inner_text() != first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    buttons.nth(1).focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    dialog.get_by_text("Close").click()
    assert not dialog.is_visible()
    page.context.close()


def test_figures_and_tables_are_saved(browser: Any, report: Path, tmp_path: Path) -> None:
    page, _ = open_page(browser, report)
    with page.expect_download() as saved:
        page.locator("[data-svg]:visible").first.click()
    assert saved.value.suggested_filename == "curve.svg"
    saved.value.save_as(tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert "var(" not in text
    assert float(ElementTree.fromstring(text).attrib["width"]) > 300
    with page.expect_download() as saved:
        page.locator('#certificates a[download="certified.csv"]').click()
    saved.value.save_as(tmp_path / "certified.csv")
    assert (tmp_path / "certified.csv").read_text(encoding="utf-8").startswith("ℓ2 radius,certified accuracy,")
    page.context.close()


def test_the_page_prints_on_few_sheets(browser: Any, report: Path) -> None:
    page, _ = open_page(browser, report)
    pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
    assert 2 <= pages <= 8
    page.context.close()
