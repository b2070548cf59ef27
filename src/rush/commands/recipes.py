"""``rush recipes`` and ``rush cost``: the shipped recipes, and what training by a recipe takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rush.commands.run_folders import Data, Overrides, data_roots
from rush.commands.terminal import print_lines, print_table


def recipes() -> None:
    """List the shipped recipes."""
    from rush.recipe.load import recipe_headline, recipe_names

    print_table(("recipe", "about"), [(name, recipe_headline(name)) for name in recipe_names()])


def cost(
    names: Annotated[list[str], Parameter(name="recipes")],
    *,
    steps: int | None = None,
    file: Annotated[Path | None, Parameter(name="--json")] = None,
    data: Data = None,
    overrides: Overrides = None,
) -> None:
    """Estimate training cost on this machine by timing a few steps of each recipe and extrapolating. No data is needed
    if the recipe names its data set.

    Args:
        names: Names of shipped recipes or paths of .toml files; times are also shown relative to the first recipe.
        steps: Steps to time per stage, after the same number of warm-up steps; 4 by default.
        file: File for all figures, as JSON.
    """
    from rush.recipe.load import load_recipe

    recipes = [load_recipe(name, overrides or (), data_roots(data)) for name in names]
    from rush.commands.cost import COST_HEADER, STAGE_HEADER, STEPS, cost_rows, measure_apart, stage_rows, write_costs

    costs = [measure_apart(recipe, STEPS if steps is None else steps) for recipe in recipes]
    title = f"Cost of training, every figure extrapolated (steps measured: {costs[0].measured_steps})"
    print_table(COST_HEADER, cost_rows(costs), title)
    print_table(STAGE_HEADER, stage_rows(costs), "By stage, every figure extrapolated")
    print_lines(f"extrapolated from steps measured on {text}" for text in dict.fromkeys(c.conditions for c in costs))
    if file is not None:
        write_costs(file, costs)
        print_lines([f"written to {file}"])
