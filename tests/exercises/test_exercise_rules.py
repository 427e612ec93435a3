"""Answers that call the thing they should build."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.exercises.assemble import assemble
from minillm.exercises.folder import find_exercise, find_folder
from minillm.exercises.rules import Surroundings, aliases, violation
from minillm.exercises.submission import read_submission
from minillm.exercises.testing import judge

FORBIDDEN = ["softmax", "tokenizers", "torch.nn.functional.relu", "sum", "collections.Counter"]
SETUP = Surroundings(aliases("import torch\nimport torch.nn.functional as F\nfrom collections import Counter"))


@pytest.mark.parametrize(
    ("answer", "line", "used"),
    [
        ("import tokenizers", 1, "tokenizers"),
        ("import tokenizers.models as m", 1, "tokenizers.models"),
        ("x = 1\nfrom tokenizers import Tokenizer", 2, "tokenizers.Tokenizer"),
        ("def f(x):\n    from tokenizers.models import BPE\n    return BPE()", 2, "tokenizers.models.BPE"),
        ("import torch as t\nt.softmax(1)", 2, "torch.softmax"),
        ("F.softmax(x)", 1, "torch.nn.functional.softmax"),
        ("F.relu(x)", 1, "torch.nn.functional.relu"),
        ("torch.nn.functional.relu(x)", 1, "torch.nn.functional.relu"),
        ("from torch.nn.functional import relu as r", 1, "torch.nn.functional.relu"),
        ("x.softmax(-1)", 1, "softmax"),
        ("f(x)[0].softmax(-1)", 1, "softmax"),
        ("torch.Tensor.softmax(x, -1)", 1, "torch.Tensor.softmax"),
        ("from torch import softmax as s", 1, "torch.softmax"),
        ("def softmax(x):\n    return torch.softmax(x, -1)", 2, "torch.softmax"),
        ("getattr(x, 'softmax')(-1)", 1, "softmax"),
        ("sum(x)", 1, "sum"),
        ("total = sum\ntotal(x)", 1, "sum"),
        ("Counter(x)", 1, "collections.Counter"),
        ("import collections\ncollections.Counter(x)", 2, "collections.Counter"),
        ("__import__('tokenizers')", 1, "__import__"),
        ("import importlib", 1, "importlib"),
        ("import pkgutil\npkgutil.resolve_name('tokenizers')", 1, "pkgutil"),
        ("from runpy import run_module", 1, "runpy"),
        ("exec('import tokenizers')", 1, "exec"),
        ("eval('1')", 1, "eval"),
        ("from minillm.exercises import check_that", 1, "minillm.exercises.check_that"),
        ("import minillm.exercises.mistake", 1, "minillm.exercises.mistake"),
        ("get_ipython().run_cell('1')", 1, "get_ipython"),
        ("import sys\nsys.exit()", 2, "sys.exit"),
        ("from os import _exit", 1, "os._exit"),
        ("exit()", 1, "exit"),
        ("from torch import *", 1, "everything from torch"),
        ("def f(x):\n    return softmax(x)", 2, "softmax"),  # left in the namespace by some other cell
    ],
)
def test_refused(answer, line, used):
    found = violation(answer, FORBIDDEN, SETUP)
    assert found is not None
    assert found[0] == line
    assert used in found[1]


@pytest.mark.parametrize(
    "answer",
    [
        "def softmax(x):\n    return x\n\nsoftmax(1)",
        "class A:\n    def softmax(self):\n        return self.softmax()",
        "x = 'softmax tokenizers sum'  # softmax, torch.softmax",
        "model.eval()",
        "import re\nre.compile('a')",
        "torch.exp(x) / torch.exp(x).amax()",
        "def f(sum):\n    return sum",
        "sum = 0\nfor x in [1]:\n    sum += x",
        "from collections import defaultdict",
        "import tokenizers_of_mine",
        "F.gelu(x)",
        "relu = lambda x: x\nrelu(1)",
        "try:\n    f()\nexcept ValueError as softmax:\n    print(softmax)",
        "match x:\n    case [sum, *softmax]:\n        print(sum, softmax)",
        "mine(softmax_of_mine)",
    ],
)
def test_allowed(answer):
    assert violation(answer, FORBIDDEN, SETUP) is None


@given(st.text(max_size=30))
def test_text_in_a_string_is_never_a_use(text):
    assert violation(f"x = {text!r}", FORBIDDEN, SETUP) is None


def test_what_the_notebooks_other_cells_define_may_be_used():
    around = Surroundings(own=frozenset({"softmax", "sum"}))
    assert violation("softmax(sum(x))", FORBIDDEN, around) is None


def test_what_a_check_imports_is_nobodys_own():
    around = Surroundings({"softmax": "torch.softmax"}, frozenset({"softmax"}), frozenset({"softmax"}))
    found = violation("def softmax():\n    pass\n\ndef f(x):\n    return softmax(x)", FORBIDDEN, around)
    assert found is not None
    assert found == (5, "uses torch.softmax: that is what this part asks you to build")


TRAIN = """def train_bpe(words, n_merges):
    texts = [word.decode("latin-1") for word, count in words.items() for _ in range(count)]
    merges = ByteBPETokenizer.train(texts, 256 + max(n_merges, 0)).merges[:n_merges]
    number = {bytes([i]): i for i in range(256)}
    learnt = []
    for left, right in merges:
        learnt.append((number[left], number[right]))
        number[left + right] = 255 + len(learnt)
    return learnt
"""
DECODE = """def decode(ids, merges, special_tokens):
    pieces = [bytes([i]) for i in range(256)]
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    vocabulary = {}
    for i, piece in enumerate(pieces):
        vocabulary.setdefault(piece, i)
    return ByteBPETokenizer(vocabulary, [], special_tokens=special_tokens).decode(ids)
"""


@pytest.mark.parametrize(
    ("part", "answer", "line"),
    [("2.3", TRAIN, 3), ("2.3", f"def ByteBPETokenizer(): ...\n{TRAIN}", 4), ("2.6", DECODE, 8)],
)
def test_the_reference_that_a_check_cell_imports_is_not_an_answer(part, answer, line):
    """Without an import or getattr of its own: the check leaves the name in the namespace that the answer runs in."""
    said = judge("02", part, answer, folder=find_folder())
    assert said is not None
    assert said.startswith(f"line {line} of your answer uses minillm.tokenizers.ByteBPETokenizer")


def test_an_answer_may_use_what_the_exercise_and_the_student_define(student):
    """`total` is an earlier part's, `sum` here a helper in another cell, though 90.1 forbids the builtin."""
    helper = {"cell_type": "code", "id": "mine", "metadata": {}, "outputs": [], "execution_count": None}
    helper["source"] = "def sum(numbers):\n    return numbers[0] + sum(numbers[1:]) if numbers else 0"
    student.answer(p1="def total(numbers):\n    return sum(numbers)", p2=student.right["p2"])
    path = student.edit(lambda cells: cells.insert(2, helper))
    exercise = find_exercise("90", student.folder)
    notebook = assemble(exercise, read_submission(path, exercise))
    statuses = {cell.id: cell.metadata["judge"].get("status") for cell in notebook.cells}
    assert statuses["answer-90-1"] == statuses["answer-90-2"] == "written"
    assert "extra-0" in statuses
