"""The exercise machine: one solved source a chapter, a student's notebook generated from it, and nbval as the judge.

``check_that`` and ``Mistake`` are for check cells; ``build``, ``check``, ``hint`` and ``grade`` stand behind
``minillm exercises ...``; :mod:`minillm.exercises.authoring` and :mod:`minillm.exercises.testing` are for authors.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minillm.exercises.mistake import Mistake, check_that

if TYPE_CHECKING:
    from minillm.exercises.building import build
    from minillm.exercises.checking import PartReport, Report, check
    from minillm.exercises.grading import Grades, Row, grade
    from minillm.exercises.hints import hint

__all__ = ["Grades", "Mistake", "PartReport", "Report", "Row", "build", "check", "check_that", "grade", "hint"]

_ROOMS = {
    "building": ("build",),
    "checking": ("PartReport", "Report", "check"),
    "grading": ("Grades", "Row", "grade"),
    "hints": ("hint",),
}


def __getattr__(name: str) -> Any:
    # Check cells import this package in every kernel, and the notebook format's library alone takes a second to load.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
