"""Resolved recipes as TOML."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rush.recipe.schema import Recipe


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML with every default, which reads back as the same recipe.

    TOML has no value for a field that is not set, so such a field becomes a comment.
    """
    return "\n".join(_lines(recipe.model_dump(mode="json"), ())).strip("\n") + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table, its own values first."""
    if path:
        yield f"\n[{'.'.join(path)}]"
    for name, value in values.items():
        if value is None:
            yield f"# {name} is not set"
        elif not isinstance(value, dict):
            yield f"{name} = {_text(value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, (*path, name))


def _text(value: Any) -> str:
    """Return a plain value as TOML: JSON except for numbers that JSON does not have."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool | int) else repr(value)
