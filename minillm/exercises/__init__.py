"""The exercise machine: one solved source a chapter, a student's notebook generated from it, and nbval as the judge.

``check_that`` and ``Mistake`` are for check cells; ``build``, ``check``, ``hint`` and ``grade`` stand behind
``minillm exercises ...``; :mod:`minillm.exercises.authoring` and :mod:`minillm.exercises.testing` are for chapters'
authors.
"""

from minillm.exercises.build import build
from minillm.exercises.check import PartReport, Report, check
from minillm.exercises.grade import Grades, Row, grade
from minillm.exercises.hints import hint
from minillm.exercises.mistake import Mistake, check_that

__all__ = ["Grades", "Mistake", "PartReport", "Report", "Row", "build", "check", "check_that", "grade", "hint"]
