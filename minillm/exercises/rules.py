"""What an answer may not use: the very thing that its part asks the student to build.

A rule over the syntax tree, so comments and strings do no harm and nothing is run. A forbidden name is either dotted,
and then matches what is imported under that name or below it (``tokenizers``, ``torch.nn.functional.softmax``, also
through an alias: ``F.softmax``), or a single word, and then also matches any attribute or imported name
(``x.softmax(-1)``), though not a function of that name which the student defines. It makes the shortcut visible, not
impossible: ``getattr`` with a computed string gets through, and solutions are public anyway.
"""

import ast
import builtins
from collections.abc import Iterable, Mapping

from minillm.exercises.format import parse

_ALWAYS = {
    "minillm.exercises": "the checks' own tools are not part of an answer",
    "IPython": "an answer is plain Python",
    "get_ipython": "an answer is plain Python",
    "importlib": "write the import as an import",
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
_BUILTINS = {*dir(builtins), "get_ipython", "exit", "quit"}  # the latter two are site's


def aliases(source: str) -> dict[str, str]:
    """What the imports of ``source`` bind: local name -> dotted name (``F`` -> ``torch.nn.functional``)."""
    bound: dict[str, str] = {}
    try:
        tree = parse(source)
    except (SyntaxError, ValueError):
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


def violation(source: str, forbidden: Iterable[str], known: Mapping[str, str]) -> tuple[int, str] | None:
    """The first forbidden use in ``source``, as (line, sentence), or None.

    Args:
        source: an answer that parses.
        forbidden: the part's forbidden names.
        known: what names from elsewhere in the notebook stand for (:func:`aliases` of the setup cells).
    """
    tree = parse(source)
    rules = dict.fromkeys(forbidden, "that is what this part asks you to build") | _ALWAYS
    bound = {**known, **aliases(source)}
    own = _own_names(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return node.lineno, f"imports everything from {node.module}: name what you import"
        for used, from_import in _uses(node, bound, own):
            for name, reason in rules.items():
                if _matches(used, name, from_import, own):
                    return node.lineno, f"uses {used.lstrip('.')}: {reason}"
    return None


def _own_names(tree: ast.AST) -> set[str]:
    """Names that the answer gives to things of its own: functions, classes, variables, arguments."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    return own


def _uses(node: ast.AST, bound: Mapping[str, str], own: set[str]) -> list[tuple[str, bool]]:
    """Dotted names that ``node`` uses, each with whether its root is something imported (or a builtin)."""
    if isinstance(node, ast.Import):
        return [(name.name, True) for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(f"{node.module or ''}.{name.name}", True) for name in node.names]
    if isinstance(node, ast.Name):
        if node.id in own:
            return []
        if node.id in bound:
            return [(bound[node.id], True)]
        return [(node.id, True)] if node.id in _BUILTINS else []
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
