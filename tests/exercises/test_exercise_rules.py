"""Answers that call the thing they should build."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.exercises.rules import aliases, violation

FORBIDDEN = ["softmax", "tokenizers", "torch.nn.functional.relu", "sum", "collections.Counter"]
SETUP = aliases("import torch\nimport torch.nn.functional as F\nfrom collections import Counter")


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
        ("exec('import tokenizers')", 1, "exec"),
        ("eval('1')", 1, "eval"),
        ("from minillm.exercises import check_that", 1, "minillm.exercises.check_that"),
        ("import minillm.exercises.mistake", 1, "minillm.exercises.mistake"),
        ("get_ipython().run_cell('1')", 1, "get_ipython"),
        ("import sys\nsys.exit()", 2, "sys.exit"),
        ("from os import _exit", 1, "os._exit"),
        ("exit()", 1, "exit"),
        ("from torch import *", 1, "everything from torch"),
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
    ],
)
def test_allowed(answer):
    assert violation(answer, FORBIDDEN, SETUP) is None


@given(st.text(max_size=30))
def test_text_in_a_string_is_never_a_use(text):
    assert violation(f"x = {text!r}", FORBIDDEN, SETUP) is None
