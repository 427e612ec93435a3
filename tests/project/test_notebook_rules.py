"""What every committed notebook keeps to, so that twenty chapters read as one book. Running them is nbval's part."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode

from minillm.course.notebooks import normalise, notebook_bytes, read_notebook

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS, SOLUTIONS, STUDENTS = (
    sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.ipynb"))
    for folder in ("notebooks", "exercises/solutions", "exercises")
)
ALL = [*CHAPTERS, *SOLUTIONS, *STUDENTS]

every_notebook = pytest.mark.parametrize("name", ALL)
executed_notebook = pytest.mark.parametrize("name", [*CHAPTERS, *SOLUTIONS])
chapter = pytest.mark.parametrize("name", CHAPTERS)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    """(cell id, MIME type, text) of everything that was printed or shown and is not a picture in base 64."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data: dict[str, Any] = (
                {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
            )
            found += [(cell.id, kind, str(value)) for kind, value in data.items() if kind != "image/png"]
    return found


def code_lines(source: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())


@every_notebook
def test_size(name: str) -> None:
    assert (ROOT / name).stat().st_size <= 1_500_000, (
        "above 1.5 MB a notebook is slow to open and GitHub may not show it"
    )


@every_notebook
def test_is_in_the_normal_form(name: str) -> None:
    notebook = read_notebook(ROOT / name)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells), "two cells have one id"
    assert (ROOT / name).read_bytes() == notebook_bytes(normalise(notebook)), (
        "write it with minillm.course.notebooks.write_notebook"
    )


@every_notebook
def test_holds_no_path_of_a_machine(name: str) -> None:
    notebook = read_notebook(ROOT / name)
    machine = re.compile(r"/(home|root|Users|tmp|private|work|mnt|opt)/\w|\b[A-Z]:\\\w|ipykernel_\d")
    for cell in notebook.cells:
        assert not machine.search(cell.source), f"{cell.id}: {machine.search(cell.source)}"
    for cell_id, _, text in outputs(notebook):
        assert not machine.search(text), f"output of {cell_id}: {machine.search(text)}"


@every_notebook
def test_is_plain_python(name: str) -> None:
    """No magics or shell lines: nbval does not notice when one of them fails, and a module could not hold them."""
    for cell in code_cells(read_notebook(ROOT / name)):
        ast.parse(cell.source, filename=cell.id)


@every_notebook
def test_pictures_are_in_the_notebook(name: str) -> None:
    notebook = read_notebook(ROOT / name)
    remote = re.compile(r"!\[[^\]]*\]\(\s*https?:|<(img|script|iframe|link)\b[^>]*https?:", re.IGNORECASE)
    assert not remote.search(prose(notebook))
    assert not [cell_id for cell_id, _, text in outputs(notebook) if remote.search(text)]
    for target in re.findall(r"\]\((?!https?:|#|attachment:)([^)\s]+)\)", prose(notebook)):
        assert ((ROOT / name).parent / target.split("#")[0]).exists(), f"a link to {target}, which is not there"


@executed_notebook
def test_is_executed_in_order_without_errors(name: str) -> None:
    cells = [cell for cell in code_cells(read_notebook(ROOT / name)) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert not [output for output in cell.outputs if output.output_type == "error"], cell.id
        assert not [o for o in cell.outputs if o.output_type == "stream" and "Warning" in o.text], f"{cell.id} warns"


@every_notebook
def test_widgets_have_a_still_picture_beside_them(name: str) -> None:
    """Where no kernel runs (GitHub, paper) a widget is a line of text."""
    notebook = read_notebook(ROOT / name)
    widgets = [cell_id for cell_id, kind, _ in outputs(notebook) if kind == "application/vnd.jupyter.widget-view+json"]
    pictures = sum("image/png" in o.get("data", {}) for cell in code_cells(notebook) for o in cell.outputs)
    assert not widgets or pictures
    assert "widgets" not in notebook.metadata


@chapter
def test_a_chapter_is_a_lesson(name: str) -> None:
    notebook = read_notebook(ROOT / name)
    lengths = {cell.id: code_lines(cell.source) for cell in code_cells(notebook)}
    long = {cell_id: n for cell_id, n in lengths.items() if n > 20}
    assert not long, f"cells of more than 20 lines of code: {long}"
    assert sum(lengths.values()) / len(lengths) <= 10, "the cells are long on average: take smaller steps"
    words = len(re.findall(r"\w+", prose(notebook)))
    assert 3 <= words / sum(lengths.values()) <= 25, "words of prose for each line of code"
    figures = sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)
    assert figures >= 3, f"{figures} figures; a chapter has at least three, drawn from data that it measured"


@chapter
def test_a_chapter_begins_with_its_title_and_says_what_it_takes(name: str) -> None:
    notebook = read_notebook(ROOT / name)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    opening = "\n".join(cell.source for cell in notebook.cells[:4] if cell.cell_type == "markdown").lower()
    assert re.search(r"prerequisite|you need", opening), "the opening does not say which chapters come first"
    assert "minute" in opening, "the opening does not say how long it takes"
    titles = re.findall(r"^#+ .*$", prose(notebook), re.MULTILINE)
    assert sum(title.startswith("# ") for title in titles) == 1, "one title; sections begin with ##"


@chapter
def test_a_chapter_explains_as_it_goes(name: str) -> None:
    kinds = "".join("m" if cell.cell_type == "markdown" else "c" for cell in read_notebook(ROOT / name).cells)
    assert "ccccc" not in kinds, "five code cells in a row, with no sentence on what to notice"
