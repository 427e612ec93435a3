"""Who may import whom: floors, no circles, no oracle libraries, and a quick `import minillm`. Read from the source."""

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minillm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A room imports rooms of lower floors only; never one of its own floor or of a floor above.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"report", "presets"},
    {"inference", "finetuning", "planner"},
    {"training"},
    {"distributed"},
    {"models"},
    {"layers", "optim", "quantization", "data"},
    {"kernels", "tokenizers", "costs"},
]
# Beside the house: each may import, and be imported by, only what is said here.
ASIDE: dict[str, set[str]] = {"plots": set(), "course": set(), "exercises": {"course"}}
MAY_USE_ASIDES: dict[str, set[str]] = {"cli": {"exercises"}, "report": {"plots"}, "exercises": {"course"}}
ORACLES = {"tokenizers", "transformers", "sentencepiece", "tiktoken", "hypothesis", "psutil"}

# What is imported under a name that is not the distribution's: its module, or a part that its documentation names.
PART_OF = {"PIL": "pillow", "cycler": "matplotlib", "google": "protobuf", "jupyter_client": "nbclient"}


def room(module: str) -> str:
    """`minillm.layers.attention` -> `layers`; `minillm` itself -> an empty string."""
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, inside_functions: bool) -> Iterator[str]:
    """Full names of what the file imports; what only type checkers read (`if TYPE_CHECKING:`) does not count."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which floor it reaches"
            assert node.module is not None
            # `from minillm.data import corpora` may import a module: count both readings.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("minillm"))
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    own = room(name_of(path))
    level = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    assert own in level or own in ASIDE or own == "", f"{own} has no floor: add it to DESIGN's floors and to this test"
    for module in imports(path, inside_functions=True):
        other = room(module)
        if not module.startswith("minillm.") or other == own or not _is_room(other):
            continue
        if other in ASIDE:
            assert other in MAY_USE_ASIDES.get(own, set()), f"{own} imports {module}, which is aside"
        elif own in ASIDE:
            assert other in ASIDE[own], f"{own} is aside and imports {module}"
        else:
            assert level[own] < level[other], f"{own} imports {module}, which is not on a lower floor"


def _is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_there_is_no_circle_between_modules() -> None:
    names = {name_of(path) for path in MODULES}
    graph = {
        name_of(path): {module for module in imports(path, inside_functions=False) if module in names}
        for path in MODULES
    }
    # An __init__ that re-exports is imported before its own modules; that is how packages work, and no circle.
    for name, targets in graph.items():
        targets -= {name} | {target for target in targets if name.startswith(f"{target}.")}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail, name))}"
        if name not in finished:
            for target in graph[name]:
                visit(target, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_party_imports_are_declared_and_no_oracle_is_among_them(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">=")[0].replace("-", "_") for line in project["dependencies"]}
    course = {line.split(">=")[0].replace("-", "_") for line in project["optional-dependencies"]["course"]}
    allowed = declared | (course if room(name_of(path)) in ("course", "exercises") else set())
    allowed |= {"triton"} if room(name_of(path)) == "kernels" else set()
    allowed |= {part for part, whole in PART_OF.items() if whole in allowed}
    for module in imports(path, inside_functions=False):
        top = module.split(".")[0]
        if top != "minillm" and top not in sys.stdlib_module_names:
            assert top not in ORACLES, f"{name_of(path)} imports {top}: what tests compare with is not part of minillm"
            assert top in allowed, f"{name_of(path)} imports {top}, which pyproject.toml does not declare for it"


def test_costs_and_tokenizers_and_plots_need_no_torch() -> None:
    for path in MODULES:
        if room(name_of(path)) in ("costs", "plots", "tokenizers", "course"):
            assert "torch" not in {module.split(".")[0] for module in imports(path, inside_functions=True)}, path


def test_import_minillm_is_quick_and_needs_next_to_nothing() -> None:
    """No clock: what takes time is what gets loaded."""
    code = "import sys, minillm; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {
        "torch",
        "numpy",
        "matplotlib",
        "triton",
        "IPython",
        "ipykernel",
        "jupyterlab",
        "tqdm",
        "regex",
    }


def test_the_whole_package_works_without_triton_jupyter_display_or_oracles(tmp_path: Path) -> None:
    """Import every module with these made impossible to import, and with no display.

    Except the kernels themselves, which start with `import triton`: nothing else may import them but inside a function.
    """
    absent = [
        *sorted(ORACLES),
        "triton",
        "IPython",
        "ipywidgets",
        "jupyterlab",
        "ipykernel",
        "pytest",
        "nbval",
        "nbformat",
    ]
    modules = [
        name_of(path)
        for path in MODULES
        if room(name_of(path)) not in ("course", "exercises", "__main__") and path.name != "__main__.py"
        if not (room(name_of(path)) == "kernels" and "triton" in set(imports(path, inside_functions=False)))
    ]
    code = (
        f"import sys, importlib\nfor name in {absent!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    environment = {"PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_no_room_for_odds_and_ends() -> None:
    for path in MODULES:
        assert not {"utils", "util", "helpers", "misc", "common", "tools"} & set(name_of(path).split(".")), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short(path: Path) -> None:
    """At most 300 lines of code; docstrings, which carry formulas, shapes and sources, and comments are not counted."""
    text = path.read_text(encoding="utf-8")
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    assert len(code) <= 300, f"{len(code)} lines of code: one technique a file, readable from top to bottom"


_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
