"""course.toml is true, README's tables are made from it, and untruths are noticed."""

import shutil
from base64 import b64encode
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from minillm.course.__main__ import main
from minillm.course.index import (
    CHAPTERS,
    COVERAGE,
    chapter_table,
    coverage_table,
    load_course,
    picture,
    problems,
    readme,
)

ROOT = Path(__file__).resolve().parents[2]

COURSE = """\
[[chapter]]
number = 0
name = "quickstart"
part = "One"
question = "What?"
techniques = "all"
exercise = false

[[chapter]]
number = 1
name = "two_words"
part = "One"
question = "How?"
techniques = "some"

[[technique]]
name = "Adding"
chapter = 1
modules = ["minillm/sums/add.py"]
tests = ["tests/sums/test_add.py"]
oracle = "math.fsum"
"""
README = f"# A course\n\n{CHAPTERS[0]}\nold\n{CHAPTERS[1]}\n\nbetween\n\n{COVERAGE[0]}\n{COVERAGE[1]}\n\nafter\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository whose index is true, with chapter 0 written and chapter 1 planned."""
    (tmp_path / "course.toml").write_text(COURSE)
    (tmp_path / "README.md").write_text(README)
    for name in (
        *("notebooks/00_quickstart.ipynb", "minillm/__init__.py", "minillm/sums/__init__.py"),
        *("minillm/sums/add.py", "tests/sums/test_add.py"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_the_index_is_true() -> None:
    assert problems(load_course(ROOT)) == []


def test_the_readme_is_made_from_the_index() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == readme(text, load_course(ROOT)), "README.md's tables differ from course.toml: run `make readme`"


def test_the_readmes_pictures_are_the_notebooks() -> None:
    course = load_course(ROOT)
    for row in course.pictures:
        assert f"]({row.file})" in (ROOT / "README.md").read_text()
        assert (ROOT / row.file).read_bytes() == picture(course, row), "run `make readme`"


def test_the_chapters_are_the_23_of_the_plan() -> None:
    course = load_course(ROOT)
    assert [chapter.number for chapter in course.chapters] == list(range(23))
    assert len({chapter.part for chapter in course.chapters}) == 4


def test_a_written_chapters_techniques_have_all_four_faces() -> None:
    course = load_course(ROOT)
    for technique in course.techniques:
        chapter = course.chapter(technique.chapter)
        if course.written(chapter):
            assert chapter.exercise, f"{technique.name}: chapter {chapter.stem} has no exercise to hold its fourth face"
            for face in (*technique.modules, *technique.tests, chapter.notebook, *chapter.exercise_files):
                assert (ROOT / face).is_file(), f"{technique.name}: {face}"


def test_every_technique_names_its_oracle_and_its_test_files_hold_tests() -> None:
    for technique in load_course(ROOT).techniques:
        assert len(technique.oracle) > 3, technique.name
        for path in technique.tests:
            assert "def test_" in (ROOT / path).read_text(), f"{path} has no test"


def test_a_true_index_has_no_problems(repository: Path) -> None:
    assert problems(load_course(repository)) == []


@pytest.mark.parametrize(
    ("make", "remove", "problem"),
    [
        (None, "minillm/sums/add.py", "Adding: there is no file minillm/sums/add.py"),
        (None, "tests/sums/test_add.py", "Adding: there is no file tests/sums/test_add.py"),
        (
            "notebooks/01_two_words.ipynb",
            None,
            "chapter 01_two_words is written, but there is no exercises/01_two_words.ipynb",
        ),
        ("notebooks/07_stray.ipynb", None, "notebooks/07_stray.ipynb belongs to no chapter"),
        (
            "exercises/solutions/00_quickstart.ipynb",
            None,
            "exercises/solutions/00_quickstart.ipynb belongs to no chapter",
        ),
        ("minillm/sums/subtract.py", None, "minillm/sums/subtract.py is named 0 times"),
        ("tests/sums/test_more.py", None, "tests/sums/test_more.py is the test of no row"),
    ],
)
def test_an_untruth_is_noticed(repository: Path, make: str | None, remove: str | None, problem: str) -> None:
    if make is not None:
        (repository / make).parent.mkdir(parents=True, exist_ok=True)
        (repository / make).touch()
    if remove is not None:
        (repository / remove).unlink()
    assert any(problem in found for found in problems(load_course(repository)))


def test_tables_link_only_to_what_exists(repository: Path) -> None:
    course = load_course(repository)
    assert "| 00 | [quickstart](notebooks/00_quickstart.ipynb) | What? | all | none |" in chapter_table(course)
    assert "| 01 | two words *(planned)* | How? | some |  |" in chapter_table(course)
    row = "| Adding | [sums.add](minillm/sums/add.py) | [test_add](tests/sums/test_add.py) "
    assert row + "| 01 *(planned)* | 01 *(planned)* | math.fsum |" in coverage_table(course)
    for path in (
        "notebooks/01_two_words.ipynb",
        "exercises/01_two_words.ipynb",
        "exercises/solutions/01_two_words.ipynb",
    ):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).touch()
    assert problems(course) == []
    links = "| [01](notebooks/01_two_words.ipynb) | [01](exercises/01_two_words.ipynb) |"
    assert links in coverage_table(course)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("number = 1", "number = 2", r"numbered 0, 1, 2, \.\.\. in order, got \[0, 2\]"),
        ("chapter = 1", "chapter = 9", "no chapter 9; it has 0 to 1"),
        ('oracle = "math.fsum"', "", r"\[\[technique\]\] Adding: oracle is missing"),
        ('oracle = "math.fsum"', 'orakle = "math.fsum"', r"Adding: unknown key 'orakle'; allowed are name, chapter"),
        ('modules = ["minillm/sums/add.py"]', "modules = []", "Adding: modules must be a list and not empty"),
        ("number = 0", 'number = "0"', "quickstart: number must be a int"),
        ("[[technique]]", "[[trick]]", "unknown section 'trick'"),
        ("[[technique]]", "[[technique]", "course.toml: "),
    ],
)
def test_a_mistake_in_the_index_is_named(repository: Path, old: str, new: str, words: str) -> None:
    (repository / "course.toml").write_text(COURSE.replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_course(repository)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the course index belongs at the top"):
        load_course(tmp_path)


def test_readme_keeps_the_text_around_the_tables(repository: Path) -> None:
    text = readme(README, load_course(repository))
    assert "\nold\n" not in text
    assert text.startswith("# A course\n\n" + CHAPTERS[0])
    assert "\n\nbetween\n\n" in text
    assert text.endswith("\n\nafter\n")
    assert readme(text, load_course(repository)) == text


@pytest.mark.parametrize("marker", [*CHAPTERS, *COVERAGE])
def test_readme_without_a_marker_is_refused(repository: Path, marker: str) -> None:
    for text in (README.replace(marker, ""), README + marker):
        with pytest.raises(ValueError, match=r"README\.md must hold"):
            readme(text, load_course(repository))


def test_the_command_copies_pictures_out_of_notebooks(repository: Path) -> None:
    index = COURSE + '[[picture]]\nfile = "images/a.png"\nnotebook = "notebooks/00_quickstart.ipynb"\ncell = "curve"\n'
    (repository / "course.toml").write_text(index)
    drawn = nbformat.v4.new_output("display_data", {"image/png": b64encode(b"a picture").decode(), "text/plain": "?"})
    cell = nbformat.v4.new_code_cell("draw()", id="curve", outputs=[nbformat.v4.new_output("stream", text="!"), drawn])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), repository / "notebooks/00_quickstart.ipynb")
    result = CliRunner().invoke(main, ["readme", "--root", str(repository)])
    assert result.exit_code == 0, result.output
    assert (repository / "images/a.png").read_bytes() == b"a picture"
    (repository / "course.toml").write_text(index.replace('"curve"', '"other"'))
    result = CliRunner().invoke(main, ["readme", "--root", str(repository)])
    assert result.exit_code == 1
    assert "no picture under a cell 'other'" in result.output


def test_the_command_writes_the_readme(repository: Path) -> None:
    (repository / "minillm/sums/subtract.py").touch()
    result = CliRunner().invoke(main, ["readme", "--root", str(repository)])
    assert result.exit_code == 0, result.output
    assert "subtract.py is named 0 times" in result.output
    assert "quickstart.ipynb" in (repository / "README.md").read_text()
    shutil.rmtree(repository / "notebooks")
    (repository / "README.md").write_text("no markers")
    result = CliRunner().invoke(main, ["readme", "--root", str(repository)])
    assert result.exit_code == 1
    assert "must hold" in result.output
    assert (repository / "README.md").read_text() == "no markers"
