"""For authors and instructors: ``python -m minillm.course readme`` and ``python -m minillm.course check``."""

import sys
from pathlib import Path

import click

from minillm.course.check import check_notebooks
from minillm.course.index import load_course, picture, problems, readme
from minillm.course.notebooks import write_atomically

ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="The repository's top folder. [default: the current one]",
)


@click.group()
def main() -> None:
    """Keep the course true: its index, its README and its notebooks."""


@main.command("readme")
@ROOT
def write_readme(root: Path) -> None:
    """Write the tables of README.md anew from course.toml, and its pictures from the notebooks.

    \b
    Example:
      $ python -m minillm.course readme
    """
    try:
        course = load_course(root)
        path = root / "README.md"
        write_atomically(path, readme(path.read_text(encoding="utf-8"), course).encode())
        for row in course.pictures:
            write_atomically(root / row.file, picture(course, row))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for problem in problems(course):
        click.echo(f"course.toml: {problem}", err=True)


@main.command("check")
@ROOT
@click.option("--timeout", type=click.IntRange(min=1), default=600, show_default=True, help="Seconds a cell may take.")
@click.argument("notebooks", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def check(root: Path, timeout: int, notebooks: tuple[Path, ...]) -> None:
    """Execute notebooks afresh and report the time of each; the files themselves stay as they are.

    Without NOTEBOOKS: all of notebooks/ and exercises/solutions/. The exit status is 1 when one fails.

    \b
    Example:
      $ python -m minillm.course check notebooks/00_quickstart.ipynb
    """
    found = notebooks or sorted(root.glob("notebooks/*.ipynb")) + sorted(root.glob("exercises/solutions/*.ipynb"))
    if not found:
        raise click.ClickException(f"there are no notebooks under {root.resolve()}")
    sys.exit(0 if check_notebooks(found, timeout=timeout, report=click.echo) else 1)


if __name__ == "__main__":
    main()
