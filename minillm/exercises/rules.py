"""What an answer may not use: the very thing that its part asks the student to build.

A rule over the syntax tree, so comments and strings do no harm and nothing is run. A forbidden name is either dotted,
and then matches what is imported under that name or below it (``tokenizers``, ``torch.nn.functional.softmax``, also
through an alias: ``F.softmax``), or a single word, and then also matches any attribute, imported name or name that the
answer finds in the namespace (``x.softmax(-1)``), though not a function of that name which the student defines. Where a
check imports the name, the student's own would be replaced by it before it is called, so that is no excuse. It makes
the shortcut visible, not impossible: ``getattr`` with a computed string gets through, and solutions are public anyway.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from minillm.exercises.format import Exercise, parse, role

_ALWAYS = {
    "minillm.exercises": "the checks' own tools are not part of an answer",
    "IPython": "an answer is plain Python",
    "get_ipython": "an answer is plain Python",
    "importlib": "write the import as an import",
    "pkgutil": "write the import as an import",
    "runpy": "write the import as an import",
    "__import__": "write the import as an import",
    "builtins": "an answer is plain Python",
    "eval": "write the code itself",
    "exec": "write the code itself",
    "sys.exit": "it ends the whole notebook: return instead",
    "os._exit": "it ends the whole notebook: return instead",
    "os.abort": "it ends the whole notebook: return instead",
    "os.kill": "it ends the whole notebook: return instead",
    "exit": "it ends the whole notebook: return instead",
    "quit": "it ends the whole notebook: return instead",
}


@dataclass(frozen=True)
class Surroundings:
    """What the rest of the notebook leaves in the namespace that an answer runs in."""

    imports: Mapping[str, str] = field(default_factory=dict)  # of setup and check cells: local name -> dotted name
    imported_by_checks: frozenset[str] = frozenset()  # nobody's own: a check binds them after the answer has run
    own: frozenset[str] = frozenset()  # names that setup cells and the student's other cells define


def surroundings(exercise: Exercise, written: Iterable[str]) -> Surroundings:
    """What an answer to ``exercise`` meets there, where ``written`` are all cells that the student wrote."""
    setup, checks = (
        "\n".join(cell.source for cell in exercise.notebook.cells if role(cell) == kind) for kind in ("setup", "check")
    )
    own: set[str] = set()
    for source in (setup, *written):
        try:
            own |= _own_names(parse(source))
        except SyntaxError:
            continue  # that cell is not run
    own |= {name for part in exercise.parts for name in part.defines}
    return Surroundings({**aliases(checks), **aliases(setup)}, frozenset(aliases(checks)), frozenset(own))


@lru_cache(maxsize=256)
def aliases(source: str) -> Mapping[str, str]:
    """What the imports of ``source`` bind: local name -> dotted name (``F`` -> ``torch.nn.functional``)."""
    bound: dict[str, str] = {}
    try:
        tree = parse(source)
    except SyntaxError:
        return bound
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                bound[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                bound[name.asname or name.name] = f"{'.' * node.level}{node.module or ''}.{name.name}"
    return bound


def violation(source: str, forbidden: Iterable[str], around: Surroundings) -> tuple[int, str] | None:
    """The first forbidden use in ``source``, as (line, sentence), or None.

    Args:
        source: an answer that parses.
        forbidden: the part's forbidden names.
        around: what names from elsewhere in the notebook stand for.
    """
    tree = parse(source)
    rules = dict.fromkeys(forbidden, "that is what this part asks you to build") | _ALWAYS
    bound = {**around.imports, **aliases(source)}
    own = (_own_names(tree) | around.own) - around.imported_by_checks
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return node.lineno, f"imports everything from {node.module}: name what you import"
        for used, from_import in _uses(node, bound, own):
            for name, reason in rules.items():
                if _matches(used, name, from_import, own):
                    return node.lineno, f"uses {used.lstrip('.')}: {reason}"
    return None


_NAMING = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar


def _own_names(tree: ast.AST) -> set[str]:
    """Names that the code gives to things of its own: functions, classes, variables, arguments."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, _NAMING) and node.name is not None:
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    return own


def _uses(node: ast.AST, bound: Mapping[str, str], own: set[str]) -> list[tuple[str, bool]]:
    """Dotted names that ``node`` uses, each with whether its root comes from outside the answer: it is imported, a
    builtin, or left in the namespace by a cell of somebody else's."""
    if isinstance(node, ast.Import):
        return [(name.name, True) for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(f"{node.module or ''}.{name.name}", True) for name in node.names]
    if isinstance(node, ast.Name):
        if node.id in own:
            return []
        return [(bound.get(node.id, node.id), True)]
    if isinstance(node, ast.Attribute):
        path = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            path.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in bound and value.id not in own:
            return [(".".join([bound[value.id], *reversed(path)]), True)]
        return [("." + node.attr, False)]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) > 1
    ):
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [("." + name.value, False)]
    return []


def _matches(used: str, name: str, from_import: bool, own: set[str]) -> bool:
    if from_import and (used == name or used.startswith(name + ".")):
        return True
    if "." in name or name in _ALWAYS:
        return False
    last = used.rpartition(".")[2]
    return last == name and (from_import or name not in own)
