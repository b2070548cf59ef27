"""Reference pages made from the code: commands, recipes with their fields, and public names.

A page shows one of them where it has the marker ``<!-- generated: NAME -->``. ``docs/conf.py`` replaces the marker when
it builds the site, so that nothing generated is kept in the repository.
"""

import inspect
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import docstring_parser

import rush
from rush.commands.app import app
from rush.errors import RushError, RushWarning
from rush.recipe.load import recipe_headline, recipe_names, recipe_text
from rush.recipe.schema import Recipe, Section

MARKER = re.compile(r"^<!-- generated: (\S+) -->$", re.MULTILINE)
_SOURCE_NOTES = ("source", "literature", "measured", "command")
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_REQUIRED = "must be given"
_PLURALS = {"integer": "integers", "number": "numbers", "string": "texts"}


def filled(page: str) -> str:
    """Return ``page`` with what each of its markers names.

    Raises SystemExit if a marker names nothing that is generated.
    """

    def made(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise SystemExit(f"nothing is generated as {match[1]!r}; NAME must be one of {', '.join(PARTS)}")
        return PARTS[match[1]]()

    return MARKER.sub(made, page)


def commands() -> str:
    """Return every command with its options."""
    app.resolved_commands()  # imports the modules of the commands
    text = app.generate_docs(output_format="markdown", heading_level=1)
    return text[text.index("## rush run\n") :]


def recipes() -> str:
    """Return the shipped recipes: the headline, the notes on source and figures, and what each gives."""
    return "\n\n".join(_recipe(name) for name in recipe_names())


def recipe_fields() -> str:
    """Return every field of a recipe, by section, with type, default, allowed values and description."""
    return "\n\n".join(_sections(Recipe, None, ()))


def public_names() -> str:
    """Return the names of ``rush`` as directives of autodoc, then the classes of what its functions return."""
    functions = [name for name in rush.__all__ if inspect.isfunction(getattr(rush, name))]
    classes = [name for name in rush.__all__ if inspect.isclass(getattr(rush, name))]
    constants = [name for name in rush.__all__ if name not in (*functions, *classes)]
    groups = {
        "Functions": [f".. autofunction:: rush.{name}" for name in functions],
        "Classes": [_class(f"rush.{name}") for name in classes],
        "Constants": [f".. data:: rush.{name}\n   :value: {getattr(rush, name)!r}" for name in constants],
        "Results": [_class(name) for name in _returned(functions)],
        "Errors and warnings": [f".. autoexception:: rush.errors.{name}" for name in _errors()],
    }
    return "\n\n".join(f"## {title}\n\n{_restructured(directives)}" for title, directives in groups.items())


PARTS: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "recipes": recipes,
    "recipe-fields": recipe_fields,
    "public-names": public_names,
}


def _class(name: str) -> str:
    return f".. autoclass:: {name}\n   :members:"


def _restructured(directives: list[str]) -> str:
    return "```{eval-rst}\n" + "\n\n".join(directives) + "\n```"


def _returned(functions: list[str]) -> list[str]:
    """Return the full names of the classes that public functions return, without those that are public themselves."""
    public = [getattr(rush, name) for name in rush.__all__]
    results = [typing.get_type_hints(getattr(rush, name))["return"] for name in functions]
    own = [kind for kind in results if inspect.isclass(kind) and kind.__module__.startswith("rush.")]
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in dict.fromkeys(own) if kind not in public]


def _errors() -> list[str]:
    kinds = inspect.getmembers(rush.errors, inspect.isclass)
    return [name for name, kind in kinds if issubclass(kind, RushError | RushWarning)]


def _recipe(name: str) -> str:
    comments, body = _parts(recipe_text(name))
    notes = "\n".join(f"- **{note}**: {comments[note]}" for note in _SOURCE_NOTES)
    base = tomllib.loads(body).get("base")
    values = body[body.index("\n[") :].strip()  # below base and name
    origin = f"What it changes in [{base}](#{base}):" if base else "What it gives; every other field has its default:"
    return f"### {name}\n\n{recipe_headline(name)}\n\n{notes}\n\n{origin}\n\n```toml\n{values}\n```"


def _parts(text: str) -> tuple[dict[str, str], str]:
    """Return the notes in the comments at the head of a recipe by their names, and the TOML below.

    Pages and other recipes that the notes name are links.
    """
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    head = "\n".join(line.removeprefix("#").strip() for line in lines[1:end])
    pieces = re.split(rf"^({'|'.join(_SOURCE_NOTES)}): ", head, flags=re.MULTILINE)[1:]
    notes = dict(zip(pieces[::2], (" ".join(piece.split()) for piece in pieces[1::2]), strict=True))
    linked = {note: re.sub(r"\bdocs/([\w-]+\.md)\b", r"[\1](\1)", content) for note, content in notes.items()}
    linked = {note: re.sub(r"\b([\w-]+)\.toml\b", r"[\1](#\1)", content) for note, content in linked.items()}
    return {**linked, "command": f"`{notes['command']}`"}, "\n".join(lines[end:])


def _sections(section: type[Section], instance: Section | None, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of a section and of those within it; ``instance`` holds the defaults, if it has any."""
    properties = section.model_json_schema()["properties"]
    descriptions = _descriptions(section)
    nested = {name: kind for name, field in section.model_fields.items() if (kind := _section(field.annotation))}
    title = f"`{'.'.join(path)}`" if path else "Top level"
    fields = [
        _field(".".join((*path, name)), properties[name], _default(section, instance, name), descriptions.get(name, ""))
        for name in section.model_fields
        if name not in nested
    ]
    yield "\n\n".join([f"{'###' if len(path) < 2 else '####'} {title}", _about(section), *fields])
    for name, kind in nested.items():
        default = _default(section, instance, name)
        yield from _sections(kind, default if isinstance(default, Section) else None, (*path, name))


def _section(annotation: object) -> type[Section] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, Section) else None


def _default(section: type[Section], instance: Section | None, name: str) -> object:
    """Return the default of a field, ``_REQUIRED`` if it has none, or Ellipsis if it depends on other fields."""
    if instance is not None:
        return getattr(instance, name)
    field = section.model_fields[name]
    if field.is_required():
        return _REQUIRED
    return ... if field.default_factory is not None else field.default


def _about(section: type[Section]) -> str:
    """Return the docstring of a section without its fields."""
    return inspect.getdoc(section).split("\nAttributes:\n")[0].strip()  # type: ignore[union-attr]


def _descriptions(section: type[Section]) -> dict[str, str]:
    """Return what the docstrings of a section and of its bases say of each field.

    A text on several fields names them.
    """
    entries = [
        (entry.arg_name.split(", "), " ".join((entry.description or "").split()))
        for kind in reversed(section.__mro__)
        if issubclass(kind, Section) and kind.__doc__
        for entry in docstring_parser.parse(kind.__doc__, docstring_parser.DocstringStyle.GOOGLE).params
    ]
    return {
        name: text if len(names) == 1 else f"{', '.join(f'`{name}`' for name in names)}: {text}"
        for names, text in entries
        for name in names
    }


def _field(path: str, schema: Mapping[str, Any], default: object, description: str) -> str:
    """Return a directive for one field, with a link to it and an entry in the search."""
    options = [f":type: {_words(schema)}", *([] if default is ... else [f":default: {_shown(default)}"])]
    return "\n".join(["```{confval} " + path, *options, "", description, "```"])


def _shown(default: object) -> str:
    return str(default) if default is _REQUIRED else "not set" if default is None else f"`{_toml(default)}`"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _words(schema: Mapping[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(map(_words, kinds))
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return "one of " + ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} {_plural(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list of {_plural(schema['items'])}"
    return _bounded({"string": "text", "boolean": "`true` or `false`"}.get(schema["type"], schema["type"]), schema)


def _plural(schema: Mapping[str, Any]) -> str:
    return _bounded(_PLURALS[schema["type"]], schema)


def _bounded(word: str, schema: Mapping[str, Any]) -> str:
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([word, " and ".join(bounds)]).strip()
