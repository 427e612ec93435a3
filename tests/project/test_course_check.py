"""`make course-check`: every notebook is run afresh and gets a line, a bad one stops nothing, no file changes."""

from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from minillm.course.__main__ import main
from minillm.course.check import check_notebooks


def write(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{place}") for place, source in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_every_notebook_gets_its_line_and_no_file_changes(tmp_path: Path) -> None:
    good = write(tmp_path / "good.ipynb", "from pathlib import Path", "assert Path('good.ipynb').exists()")
    raises = write(tmp_path / "raises.ipynb", "1 / 0")
    stuck = write(tmp_path / "stuck.ipynb", "import time\nwhile True: time.sleep(0.1)")
    dead = write(tmp_path / "dead.ipynb", "import os\nos._exit(3)")
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    paths = [raises, stuck, dead, broken, good]
    before = [path.read_bytes() for path in paths]
    lines: list[str] = []
    assert not check_notebooks(paths, timeout=4, report=lines.append)
    assert [path.read_bytes() for path in paths] == before
    assert len(lines) == 6
    for line, words in zip(
        lines,
        [
            "ZeroDivisionError: division by zero",
            "a cell takes longer than 4 s",
            "the kernel died",
            "is not a Jupyter notebook",
            "good.ipynb  2 code cells",
            "5 notebooks, 4 failed",
        ],
        strict=True,
    ):
        assert words in line
        assert " s  " in line


@pytest.mark.parametrize(("source", "status"), [("x = 1", 0), ("raise KeyError('x')", 1)])
def test_the_commands_exit_status_tells(tmp_path: Path, source: str, status: int) -> None:
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "00_one.ipynb", source)
    result = CliRunner().invoke(main, ["check", "--root", str(tmp_path)])
    assert result.exit_code == status, result.output
    assert f"1 notebooks, {status} failed" in result.output


def test_no_notebooks_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["check", "--root", str(tmp_path)])
    assert result.exit_code == 1
    assert "there are no notebooks under" in result.output
