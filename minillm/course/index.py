"""The course index: which chapters there are, and for each technique its module, test, notebook, exercise and oracle.

All of it is read from one file, ``course.toml``. What the files themselves can tell is not written there: a chapter is
written when its notebook exists, and a technique's notebook and exercise are those of its chapter. :func:`problems`
says what in the index is untrue, and :func:`readme` writes the two tables of README.md from it.
"""

import base64
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from minillm.course.notebooks import read_notebook

CHAPTERS = ("<!-- chapters: begin -->", "<!-- chapters: end -->")
COVERAGE = ("<!-- coverage: begin -->", "<!-- coverage: end -->")


@dataclass(frozen=True)
class Chapter:
    """One chapter: ``notebooks/NN_name.ipynb``, and ``exercises/NN_name.ipynb`` unless ``exercise`` is false."""

    number: int
    name: str
    part: str
    question: str
    techniques: str
    exercise: bool = True

    @property
    def stem(self) -> str:
        return f"{self.number:02d}_{self.name}"

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def notebook(self) -> str:
        return f"notebooks/{self.stem}.ipynb"

    @property
    def exercise_files(self) -> tuple[str, ...]:
        """The student's notebook and its source, or nothing for a chapter without an exercise."""
        return (f"exercises/{self.stem}.ipynb", f"exercises/solutions/{self.stem}.ipynb") if self.exercise else ()


@dataclass(frozen=True)
class Technique:
    """A technique: its modules (the first one is its home), the tests that prove it, and what these compare with."""

    name: str
    chapter: int
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    oracle: str


@dataclass(frozen=True)
class Support:
    """Modules that teach no technique (the command line, pictures, the exercise machine), tested all the same."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """README's picture: a copy in ``file`` of what the cell with id ``cell`` of ``notebook`` draws."""

    file: str
    notebook: str
    cell: str


@dataclass(frozen=True)
class Course:
    """The content of ``course.toml``, and the repository folder that its paths are relative to."""

    root: Path
    chapters: tuple[Chapter, ...]
    techniques: tuple[Technique, ...]
    support: tuple[Support, ...]
    pictures: tuple[Picture, ...]

    @property
    def rows(self) -> tuple[Technique | Support, ...]:
        """All rows that name modules and tests."""
        return (*self.techniques, *self.support)

    def written(self, chapter: Chapter) -> bool:
        """Whether the chapter's notebook exists."""
        return (self.root / chapter.notebook).is_file()

    def chapter(self, number: int) -> Chapter:
        """The chapter of that number; ``ValueError`` where there is none."""
        for chapter in self.chapters:
            if chapter.number == number:
                return chapter
        raise ValueError(f"course.toml has no chapter {number}; it has 0 to {len(self.chapters) - 1}")


def load_course(root: Path | str) -> Course:
    """Read ``root/course.toml``; ``ValueError`` names the row and what is wrong with it."""
    root = Path(root)
    path = root / "course.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: the course index belongs at the top of the repository") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    unknown = sorted(set(content) - {"chapter", "technique", "support", "picture"})
    if unknown:
        raise ValueError(f"{path}: unknown section {unknown[0]!r}; allowed are chapter, technique, support, picture")
    course = Course(
        root,
        _rows(Chapter, content.get("chapter", []), path),
        _rows(Technique, content.get("technique", []), path),
        _rows(Support, content.get("support", []), path),
        _rows(Picture, content.get("picture", []), path),
    )
    numbers = [chapter.number for chapter in course.chapters]
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{path}: chapters must be numbered 0, 1, 2, ... in order, got {numbers}")
    for technique in course.techniques:
        course.chapter(technique.chapter)
    return course


Row = TypeVar("Row", Chapter, Technique, Support, Picture)


def _rows(kind: type[Row], tables: list[dict[str, Any]], path: Path) -> tuple[Row, ...]:
    rows = []
    for table in tables:
        where = f"{path}: [[{kind.__name__.lower()}]] {table.get('name', '(without a name)')}"
        known = {field.name: field for field in fields(kind)}
        for key, value in table.items():
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; allowed are {', '.join(known)}")
            expected: type = list if key in ("modules", "tests") else known[key].type  # type: ignore[assignment]
            if type(value) is not expected or not (value or expected in (bool, int)):
                raise ValueError(f"{where}: {key} must be a {expected.__name__} and not empty, got {value!r}")
        missing = [name for name, field in known.items() if field.default is MISSING and name not in table]
        if missing:
            raise ValueError(f"{where}: {missing[0]} is missing")
        values: dict[str, Any] = {key: tuple(value) if type(value) is list else value for key, value in table.items()}
        rows.append(kind(**values))
    return tuple(rows)


def problems(course: Course) -> list[str]:
    """Every statement of the index that the files contradict, each as one sentence; empty when all is true."""
    found: list[str] = []
    for row in course.rows:
        for path in (*row.modules, *row.tests):
            if not (course.root / path).is_file():
                found.append(f"{row.name}: there is no file {path}")
    for chapter in course.chapters:
        for path in chapter.exercise_files if course.written(chapter) else ():
            if not (course.root / path).is_file():
                found.append(f"chapter {chapter.stem} is written, but there is no {path}")
    chapters = {path for chapter in course.chapters for path in (chapter.notebook, *chapter.exercise_files)}
    for pattern in ("notebooks/*.ipynb", "exercises/*.ipynb", "exercises/solutions/*.ipynb"):
        for path in _files(course.root, pattern):
            if path not in chapters:
                found.append(f"{path} belongs to no chapter of course.toml")
    named = [path for row in course.rows for path in row.modules]
    for path in _files(course.root, "minillm/**/*.py"):
        # A package's __init__.py that only re-exports is no room of its own.
        if not path.endswith("__init__.py") and named.count(path) != 1:
            found.append(f"{path} is named {named.count(path)} times in course.toml; each module belongs to one row")
    tests = {path for row in course.rows for path in row.tests}
    for path in _files(course.root, "tests/**/test_*.py"):
        if path not in tests:
            found.append(f"{path} is the test of no row in course.toml")
    return found


def _files(root: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if not path.name.startswith("."))


def chapter_table(course: Course) -> str:
    """The chapters as a Markdown table; a chapter that is not written yet has no link."""
    lines = ["| | chapter | the question | techniques | exercise |", "|---|---|---|---|---|"]
    part = ""
    for chapter in course.chapters:
        if chapter.part != part:
            part = chapter.part
            lines.append(f"| | **{part}** | | | |")
        name, exercise = f"{chapter.title} *(planned)*", ""
        if course.written(chapter):
            name = f"[{chapter.title}]({chapter.notebook})"
            exercise = f"[{chapter.number:02d}]({chapter.exercise_files[0]})" if chapter.exercise else "none"
        lines.append(f"| {chapter.number:02d} | {name} | {chapter.question} | {chapter.techniques} | {exercise} |")
    return "\n".join(lines)


def coverage_table(course: Course) -> str:
    """The techniques as a Markdown table: module, test, notebook, exercise, oracle. A planned face says so."""
    lines = ["| technique | module | test | notebook | exercise | compared with |", "|---|---|---|---|---|---|"]
    for technique in course.techniques:
        chapter = course.chapter(technique.chapter)
        number = f"{chapter.number:02d}"
        notebook, exercise = f"{number} *(planned)*", f"{number} *(planned)*"
        if course.written(chapter):
            notebook = f"[{number}]({chapter.notebook})"
            exercise = f"[{number}]({chapter.exercise_files[0]})" if chapter.exercise else "none"
        modules = ", ".join(f"[{_short(path, 'minillm/')}]({path})" for path in technique.modules)
        tests = ", ".join(f"[{Path(path).stem}]({path})" for path in technique.tests)
        lines.append(f"| {technique.name} | {modules} | {tests} | {notebook} | {exercise} | {technique.oracle} |")
    return "\n".join(lines)


def _short(path: str, prefix: str) -> str:
    return path.removeprefix(prefix).removesuffix(".py").replace("/", ".")


def readme(text: str, course: Course) -> str:
    """``text`` with both tables between their markers written anew; a missing or doubled marker: ``ValueError``."""
    for (begin, end), table in ((CHAPTERS, chapter_table(course)), (COVERAGE, coverage_table(course))):
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README.md must hold {begin} and then {end}, each once")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def picture(course: Course, row: Picture) -> bytes:
    """The PNG that the notebook has saved under that cell; ``ValueError`` when it has none."""
    for cell in read_notebook(course.root / row.notebook).cells:
        for output in cell.get("outputs", []) if cell.id == row.cell else []:
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output.data["image/png"])
    raise ValueError(f"{row.notebook} has no picture under a cell {row.cell!r}, which course.toml wants in {row.file}")
