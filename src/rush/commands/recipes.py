"""``rush recipes`` and ``rush cost``: the shipped recipes, and the cost of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from rush.commands.run_folders import Data, Overrides, data_roots, open_run
from rush.commands.terminal import Json, print_json, print_lines, print_notes, print_table

recipes = App(name="recipes", help="List the shipped recipes, or show one with all its fields.")


@recipes.default
def list_recipes(*, json: Json = False) -> None:
    """List the shipped recipes, or show one with all its fields."""
    from rush.recipe.load import recipe_headline, recipe_names

    rows = [(name, recipe_headline(name)) for name in recipe_names()]
    if json:
        print_json([{"name": name, "about": about} for name, about in rows])
    else:
        print_table(("recipe", "about"), rows)


@recipes.command
def show(recipe: str, *, overrides: Overrides = None) -> None:
    """Print a recipe as TOML with every default and everything that its base gives.

    Args:
        recipe: Name of a shipped recipe, path of a .toml file, or a run folder.
    """
    from rush.recipe.load import load_recipe
    from rush.recipe.text import to_toml

    run = Path(recipe, "recipe.json").is_file()
    resolved = open_run(Path(recipe)).recipe if run else load_recipe(recipe, overrides or ())
    sys.stdout.write(to_toml(resolved))


def cost(
    names: Annotated[list[str], Parameter(name="recipes")],
    *,
    steps: int | None = None,
    out: Path | None = None,
    json: Json = False,
    data: Data = None,
    overrides: Overrides = None,
) -> None:
    """Estimate the cost of recipes on this machine by timing a few steps and passes, and extrapolating. No data is
    needed if the recipe names its data set.

    Args:
        names: Names of shipped recipes or paths of .toml files; times are also shown relative to the first recipe.
        steps: Steps to time per stage, after the same number of warm-up steps; 4 by default.
        out: File for all figures, as JSON.
    """
    from rush.recipe.load import load_recipe

    recipes = [load_recipe(name, overrides or (), data_roots(data)) for name in names]
    from rush.commands.cost import (
        COST_HEADER,
        EVALUATION_HEADER,
        STAGE_HEADER,
        STEPS,
        cost_rows,
        costs_value,
        evaluation_rows,
        measure_apart,
        stage_rows,
    )

    costs = [measure_apart(recipe, STEPS if steps is None else steps) for recipe in recipes]
    if out is not None:
        from rush.runtime.files import write_json

        write_json(out, costs_value(costs))
        print_notes([f"written to {out}"])
    if json:
        print_json(costs_value(costs))
        return
    title = f"Cost of training, every figure extrapolated (steps measured: {costs[0].measured_steps})"
    print_table(COST_HEADER, cost_rows(costs), title)
    print_table(STAGE_HEADER, stage_rows(costs), "By stage, every figure extrapolated")
    print_table(EVALUATION_HEADER, evaluation_rows(costs), "After training, every figure extrapolated")
    print_lines(f"extrapolated from steps measured on {text}" for text in dict.fromkeys(c.conditions for c in costs))
