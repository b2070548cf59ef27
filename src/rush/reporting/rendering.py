"""HTML pages from templates, in one style. A page loads nothing, which its content security policy enforces."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rush.reporting import wording
from rush.runtime.lines import printable

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Plot:
    """The same plot for wide and for narrow screens."""

    wide: Markup
    narrow: Markup


def plots_of(draw: Callable[..., Markup], name: str, *values: Any) -> Plot:
    """Return both forms of the plot that ``draw`` makes of ``values``."""
    return Plot(draw(*values, f"{name}-wide", "wide"), draw(*values, f"{name}-narrow", "narrow"))


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Return the page of ``template`` as HTML.

    Text in ``context`` is escaped, including characters that cannot be encoded or are not visible.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "acr": wording.acr_text,
        "attackers": wording.attackers_text,
        "audited": wording.audited_threat_text,
        "bounds": wording.bounds,
        "budget": wording.budget_text,
        "count": wording.count,
        "count_or_dash": wording.count_or_dash,
        "d": wording.d_text,
        "duration": wording.duration,
        "figure": wording.figure_text,
        "lower": wording.lower_text,
        "level": wording.level_text,
        "method": wording.method_text,
        "percent": wording.percent,
        "points": wording.points,
        "radius": wording.radius_text,
        "samples": wording.samples_text,
        "share": wording.share,
        "verdict": wording.audit_sentence,
    }
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    own = {"script": Markup(script), "script_digest": digest, "style": Markup(_read("style.css"))}
    return environment.get_template(template).render({**own, **context})


def _script() -> str:
    """Return the script of every page, as it stands between its tags."""
    return "\n" + _read("script.js")


@cache
def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _visible(value: object) -> object:
    """Return ``value`` with unencodable and invisible characters escaped, if it is text but not markup."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
