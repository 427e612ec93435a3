"""Figures need no display, look the same for everybody, and are the same bytes each time."""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from PIL import Image

from minillm.plots import loss_curve, save, visible


def _figure() -> Figure:
    return loss_curve({"a": ([1, 2, 3], [3.0, 2.0, 1.5])}, references={"floor": 1.0}, title="Same bytes")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_saves_the_same_bytes_each_time(ending: str, tmp_path: Path) -> None:
    first = save(_figure(), tmp_path / f"new folder/first.{ending}").read_bytes()
    assert save(_figure(), tmp_path / f"second.{ending}").read_bytes() == first
    assert mpl.__version__.encode() not in first


def test_refuses_other_kinds_of_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.svg.*figure\.jpeg"):
        save(_figure(), tmp_path / "figure.jpeg")
    assert list(tmp_path.iterdir()) == []


def test_ignores_and_keeps_the_callers_settings(tmp_path: Path) -> None:
    plain = save(_figure(), tmp_path / "plain.png").read_bytes()
    settings = {"font.size": 30.0, "xtick.labelsize": 30.0, "grid.color": "red", "axes.facecolor": "black"}
    with mpl.rc_context(settings):
        assert save(_figure(), tmp_path / "other.png").read_bytes() == plain
        assert {name: mpl.rcParams[name] for name in settings} == settings


def test_shows_itself_in_a_notebook_as_a_sharp_png(tmp_path: Path) -> None:
    data, metadata = InteractiveShell.instance().display_formatter.format(_figure())
    (tmp_path / "shown.png").write_bytes(data["image/png"])
    with Image.open(tmp_path / "shown.png") as image:
        assert image.width == pytest.approx(metadata["image/png"]["width"] * 1.5, abs=1)
    assert metadata["image/png"]["alt"] == "Same bytes"  # what a screen reader says
    assert data["text/plain"] == "<Picture size 825x418 with 1 Axes>"


def test_needs_neither_a_display_nor_pyplot_nor_torch() -> None:
    program = (
        "import sys; from minillm.plots import attention_map; attention_map([[1.0]], ['a']).draw_without_rendering();"
        "sys.exit(str({'matplotlib.pyplot', 'torch', 'tkinter'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stderr, result.stdout) == ("\n", "")


def test_makes_blanks_visible() -> None:
    assert visible(" the\n\tend\r") == "·the↵→end←"
    assert visible("é ✓") == "é·✓"
    assert visible("\x00\u4e2d\u00a0\U0001f996") == "\\u0000\\u4e2d\\u00a0\\u1f996"


@given(st.text())
def test_visible_text_holds_nothing_that_cannot_be_drawn(text: str) -> None:
    assert visible(text).isprintable()
    assert " " not in visible(text)
