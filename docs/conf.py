"""The documentation site, built by ``make docs``: the Markdown pages of the repository and the reference to the code.

The source folder is the repository, so that a link between two files is the same on the site and where the repository
is hosted. The list of pages under "Documentation" in README.md is the navigation.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import reference  # noqa: E402
import rush  # noqa: E402

project = "RUSH"
release = rush.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**.md", "results/**.md"]
exclude_patterns = [".*", "build", "runs", "src", "tests"]

myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
smartquotes = False  # which would turn the dashes of options into others
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = ["Random", "Cost"]
napoleon_use_rtype = False

html_theme = "furo"
html_title = "RUSH"
html_copy_source = False
html_show_copyright = False
html_use_index = False  # the search finds the same names
html_static_path = ["static"]
html_css_files = ["site.css"]

_NAVIGATION = re.compile(r"^## Documentation\n(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
_CAPTION = re.compile(r"^- \*\*(.+?)\*\*: (.*?)(?=^- |\Z)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\.md\)")


def contents(readme: str) -> str:
    """Return the navigation: one hidden table of contents for every line of README's list of pages."""
    (section,) = _NAVIGATION.findall(readme)
    return "\n\n".join(
        "\n".join(
            [
                "```{toctree}\n:hidden:",
                f":caption: {caption}\n",
                *(f"{' '.join(title.split())} <{page}>" for title, page in _LINK.findall(links)),
                "```",
            ]
        )
        for caption, links in _CAPTION.findall(section)
    ).replace(":caption: Start\n", ":caption: Start\n\nHome <self>", 1)


def _complete(_: Sphinx, page: str, source: list[str]) -> None:
    source[0] = reference.filled(source[0])
    if page == root_doc:
        source[0] += "\n\n" + contents(source[0])
    if page == "results/README":
        source[0] += "\n\n```{toctree}\n:hidden:\n:glob:\n\n*/*\n```"


def _write_index(app: Sphinx, error: Exception | None) -> None:
    """Send the readers of the folder to its first page."""
    if error is None:
        forward = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>RUSH</title>\n'
        (Path(app.outdir) / "index.html").write_text(forward, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register what completes the pages."""
    app.connect("source-read", _complete)
    app.connect("build-finished", _write_index)
