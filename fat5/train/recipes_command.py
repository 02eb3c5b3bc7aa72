"""The recipes that come with FAT5, and `fat5 recipes`."""

from pathlib import Path
from typing import Any

import click

import fat5


def shipped() -> dict[str, Path]:
    """Give the recipes that come with FAT5 by name: those of the installed package, or of the checkout."""
    package = Path(fat5.__file__).parent
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary(path: Path) -> str:
    """Give the first sentence of a recipe's heading."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip("# ") == "" or not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")


def _find(name: str) -> Path:
    known = shipped()
    if name not in known:
        raise click.UsageError(f"there is no recipe {name}; there are {', '.join(known)}")
    return known[name]


class RecipeFile(click.Path):
    """A recipe's file or, where there is no such file, the name of one that comes with FAT5."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Look a name up."""
        known = shipped()
        if not Path(value).exists() and str(value) in known:
            return known[str(value)]
        return super().convert(value, param, ctx)


@click.group("recipes")
def recipes() -> None:
    """The recipes that come with FAT5."""


@recipes.command("list")
def list_() -> None:
    """List them by name, with what each does."""
    known = shipped()
    width = max(map(len, known))
    for name, path in known.items():
        click.echo(f"{name:{width}}  {summary(path)}")


@recipes.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(_find(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("to", type=click.Path(path_type=Path), required=False)
def copy(name: str, to: Path | None) -> None:
    """Copy the recipe NAME to a file of your own, TO, or NAME.yaml in the current folder."""
    text = _find(name).read_text(encoding="utf-8")
    to = to or Path(f"{name}.yaml")
    to = to / f"{name}.yaml" if to.is_dir() else to
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise click.ClickException(f"{to} exists already; give another name") from error
    except OSError as error:
        raise click.ClickException(f"cannot write {to}: {error}") from error
    click.echo(to)
