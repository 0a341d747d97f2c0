"""Finds the recipes that come with Ratchet, which are named without a path: `pipeline run quickstart`."""

import os
from pathlib import Path

from contracts.errors import UserError, did_you_mean
from pipelines.environments.paths import configs

PREFIX = "recipe:"


def recipes() -> dict[str, Path]:
    """The file of each recipe, by its name."""
    paths = [*configs().glob("*.yaml"), *configs().glob("recipes/*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: (len(path.parts), path.stem))}


def find_config(named: str | Path) -> Path:
    """The file that a command's CONFIG names: the user's own, or else the recipe of that name.

    Raises:
        UserError: there is neither.
    """
    path, known = Path(named), recipes()
    if str(named) in known and not path.is_file():
        return known[str(named)]
    if path.exists():
        return path
    hint = did_you_mean(path.stem, known)
    raise UserError(f"config file {path} does not exist.{hint} Recipes by name: {', '.join(known)}.")


def origin_of(path: Path, run: Path) -> str:
    """The reference to its config file that a run records: the name of a recipe, or another file's path relative to
    the run's directory."""
    path = path.resolve()
    name = next((name for name, recipe in recipes().items() if recipe.resolve() == path), None)
    return f"{PREFIX}{name}" if name else os.path.relpath(path, run)


def describe_recipes() -> str:
    """Each recipe's name and the first line of its file, one per line."""
    first = {name: path.read_text().partition("\n")[0].lstrip("# ") for name, path in recipes().items()}
    return "".join(f"{name:<24} {line}\n" for name, line in first.items())
