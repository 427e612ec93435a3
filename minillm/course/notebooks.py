"""Notebooks as files: run one afresh, bring it to one normal form, write it so that the same notebook gives the same
bytes.

Notebooks and exercises are committed with their outputs, so a rebuild that changes nothing must change no byte. Three
things would: how a kernel's prints are cut into stream messages (joined here), the time stamps that a front end keeps
in ``metadata.execution`` and the interpreter's patch version in ``metadata.language_info`` (both dropped here).
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode


def node(content: dict[str, Any]) -> NotebookNode:
    """A notebook, a cell or a piece of metadata from plain data."""
    made: NotebookNode = nbformat.from_dict(content)  # type: ignore[no-untyped-call]
    return made


KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
"""What every committed notebook names as its kernel: JupyterLab then opens it with the environment's own Python."""


def read_notebook(path: Path | str) -> NotebookNode:
    """Read a version 4 notebook; ``ValueError`` names the file and what is wrong with it."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # Before nbformat sees it: where ids are missing or doubled, nbformat warns and draws new ones at random.
        for place, cell in enumerate(content["cells"]):
            cell.setdefault("id", f"cell-{place:03d}")
        _refuse_doubled_ids(content["cells"])
        content["nbformat_minor"] = max(5, content["nbformat_minor"])
        return node(nbformat.reads(json.dumps(content), as_version=4))  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise ValueError(f"there is no notebook {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        said = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} is not a Jupyter notebook of format 4: {type(error).__name__}, {said}") from None


def _refuse_doubled_ids(cells: list[dict[str, Any]]) -> None:
    ids = [cell["id"] for cell in cells]
    doubled = sorted({name for name in ids if ids.count(name) > 1})
    if doubled:
        raise ValueError(f"cells share an id, and ids must differ: {', '.join(doubled)}")


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Bring ``notebook`` to the committed form, in place, and return it.

    Drops front ends' bookkeeping, names one kernel, joins consecutive pieces of the same stream, and gives every cell
    that has none an id by its place (``cell-007``). Ids, execution counts and outputs are kept. Two cells with one id:
    ``ValueError``.
    """
    notebook.metadata.pop("language_info", None)
    notebook.metadata.pop("widgets", None)  # saved widget state without its model shows as "Invalid" on GitHub
    notebook.metadata["kernelspec"] = node(KERNELSPEC)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for place, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{place:03d}")
        for key in ("execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = _join_streams(cell.outputs)
    _refuse_doubled_ids(notebook.cells)
    return notebook


def _join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    joined: list[NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else None
        if before is not None and output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def execute(notebook: NotebookNode, *, folder: Path | str, timeout: int = 600) -> NotebookNode:
    """Run every cell of ``notebook`` in a fresh kernel of this very Python, in place, and return it normalised.

    ``folder`` is the kernel's working directory; ``timeout`` is in seconds a cell. A cell that raises ends the run with
    ``nbclient.exceptions.CellExecutionError``; one that takes too long with ``CellTimeoutError``.
    """
    # Imported here because they take half a second, and the exercises' kernels import this package for its small parts.
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(KernelSpecManager):
        """Whatever a kernel spec in the user's home says, the notebook runs in the environment that minillm runs in."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=timeout,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(stderr=subprocess.DEVNULL)  # a kernel greets there with advice about its transport
    return normalise(notebook)


def notebook_bytes(notebook: NotebookNode) -> bytes:
    """The file's content: JSON with sorted keys, one-space indent, a newline at the end."""
    text: str = nbformat.writes(notebook, version=4)  # type: ignore[no-untyped-call]
    return (text + "\n").encode()


def write_notebook(notebook: NotebookNode, path: Path | str) -> Path:
    """Write atomically: whoever reads ``path`` sees the old notebook or the new one, never a part."""
    return write_atomically(Path(path), notebook_bytes(notebook))


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` beside ``path`` under a temporary name, flush it to the disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
