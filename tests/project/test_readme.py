"""README.md says nothing that does not work: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from minillm.cli import main
from minillm.course.__main__ import main as course_main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [
    line.split(" #")[0].strip()
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0])
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    promised = re.findall(r"print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert [line for line in promised if line not in result.stdout.splitlines()] == []


def test_there_is_something_to_run() -> None:
    assert PYTHON
    assert SHELL


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)\b", " ".join([*SHELL, *re.findall(r"`([^`\n]+)`", README)])))
    assert {"lab", "test", "run"} <= named <= targets


COMMANDS = [
    *(line for line in SHELL if re.match(r"(\.venv/bin/)?(minillm|python -m minillm)\b", line)),
    *(code for code in re.findall(r"`([^`\n]+)`", README) if re.match(r"(python -m )?minillm [a-z]", code)),
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(re.sub(r"^(\.venv/bin/)?(python -m )?", "", line))
    command: click.Command = course_main if words[0] == "minillm.course" else main
    for word in words[1:]:
        if word.startswith("-"):
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert word.split("=")[0] in known, f"{line}: no option {word}; there are {sorted(known)}"
        elif isinstance(command, click.Group):
            assert word in command.commands, f"{line}: no command {word}; there are {sorted(command.commands)}"
            command = command.commands[word]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README):
        assert (ROOT / target.split("#")[0]).exists(), target


def test_files_named_in_code_marks_exist() -> None:
    for name in re.findall(r"`((?:minillm|tests|notebooks|exercises|benchmarks|\.ci)/[\w./-]*\w)`", README):
        assert (ROOT / name).exists(), name
