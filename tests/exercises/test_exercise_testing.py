"""The tests that every exercise inherits: held to an exercise that is right, and to ones that are not."""

import pytest

from minillm.course.notebooks import read_notebook, write_notebook
from minillm.exercises import Mistake, build
from minillm.exercises.testing import ExerciseTests, judge, solution_names

WRONG = {
    "90.1": {
        "starts at one": (
            "def total(numbers):\n    t = 1\n    for n in numbers:\n        t += n\n    return t",
            "is 0",
        ),
        "last left out": (
            "def total(numbers):\n    t = 0\n    for n in numbers[:-1]:\n        t += n\n    return t",
            "20",
        ),
        "signs lost": (
            "def total(numbers):\n    t = 0\n    for n in numbers:\n        t += abs(n)\n    return t",
            "negative numbers count too",
        ),
    },
    "90.2": {
        "no division": ("def mean(numbers):\n    return total(numbers)", "'mean: 10'"),
        "returns nothing": ("def mean(numbers):\n    pass", "'mean: None'"),
        "divides by zero": ("def mean(numbers):\n    return 2.5 / (len(numbers) - 1) * 3", "division by zero"),
    },
    **{
        f"90.{n}": {
            "first": (f"def {name}(numbers):\n    return numbers[0] * 3", f"{name}: 3"),
            "none": (f"def {name}(numbers): ...", f"{name}: None"),
            "renamed": ("def other(numbers): ...", f"does not define {name}"),
        }
        for n, name in ((3, "largest"), (4, "smallest"), (5, "middle"))
    },
}


@pytest.fixture
def tests_of(exercises):
    class Tests(ExerciseTests):
        exercise = "90"
        wrong_answers = WRONG
        folder = exercises

    return Tests


def test_a_good_exercise_passes_all_of_them(tests_of):
    names = [name for name in dir(tests_of) if name.startswith("test_")]
    assert len(names) == 7
    for name in names:
        getattr(tests_of(), name)()


def test_a_notebook_that_was_not_rebuilt_is_found(tests_of, student):
    student.path.write_text(student.path.read_text().replace("Five small", "Six small"))
    with pytest.raises(AssertionError, match="run: minillm exercises build 90"):
        tests_of().test_generated_notebook_is_committed()


def test_right_answers_that_are_rejected_are_found(tests_of, student):
    tests_of.right_answers = {
        "as solved": ("90.1", student.right["p1"]),
        "a sum of its own": ("90.1", WRONG["90.1"]["starts at one"][0]),
    }
    with pytest.raises(AssertionError, match=r"^a sum of its own: the sum of no numbers is 0"):
        tests_of().test_right_answers_of_other_kinds_pass()


def test_a_heading_of_another_title_is_found(tests_of, exercises):
    source = exercises / "solutions" / "90_numbers.ipynb"
    notebook = read_notebook(source)
    heading = next(cell for cell in notebook.cells if cell.source.startswith("## 90.1"))
    heading.source = heading.source.replace("(3 minutes)", "(5 minutes)")
    write_notebook(notebook, source)
    with pytest.raises(AssertionError):
        tests_of().test_titles_and_minutes_are_those_that_the_machine_shows()


def test_the_solutions_names_can_be_had(exercises):
    assert solution_names("90", folder=exercises)["total"]([1, 2, 3]) == 6


def test_two_wrong_answers_are_too_few(tests_of):
    tests_of.wrong_answers = WRONG | {"90.3": {}}
    with pytest.raises(AssertionError, match=r"fewer than three wrong answers: \{'90.3': 0\}"):
        tests_of().test_each_part_has_three_wrong_answers()
    tests_of.wrong_answers = {"90.1": WRONG["90.1"]}
    with pytest.raises(AssertionError, match=r"wrong answers for \['90.1'\], parts \['90.1', '90.2'"):
        tests_of().test_each_part_has_three_wrong_answers()


def test_wrong_answers_that_pass_or_are_told_badly_are_found(tests_of, student):
    dump = "def largest(numbers):\n    raise ValueError('7 ' * 300)"
    tests_of.wrong_answers = {
        "90.1": {"right": (student.right["p1"], "x"), "unsaid": (WRONG["90.1"]["starts at one"][0], "the moon")},
        "90.3": {"dump": (dump, "7")},
    }
    with pytest.raises(AssertionError) as raised:
        tests_of().test_wrong_answers_are_rejected_with_the_likely_mistake()
    said = str(raised.value)
    assert "90.1, right: passes" in said
    assert "90.1, unsaid: the message is 'the sum of no numbers is 0', without 'the moon'" in said
    assert "90.3, dump: 400 characters read as a dump" in said


def test_checks_that_pass_without_an_answer_are_found(tests_of, exercises):
    source = exercises / "solutions" / "90_numbers.ipynb"
    notebook = read_notebook(source)
    next(cell for cell in notebook.cells if cell.id == "check-90-1").source = "print('sum: 10')"
    write_notebook(notebook, source)
    build("90", folder=exercises)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        tests_of().test_untouched_notebook_says_what_to_do()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "not started"),
        ("def total(numbers):\n    return sum(numbers)", "line 2 of your answer uses sum"),
        ("raise SystemExit", "ends the notebook"),
        ("def total(numbers):\n    raise NotImplementedError('Exercise 90.1: x')", "still raises NotImplementedError"),
        ("def total(numbers):\n    print('debugging')\n    return __builtins__['sum'](numbers)", None),
    ],
)
def test_one_answer_is_judged_without_a_kernel(exercises, answer, message):
    said = judge("90", "90.1", answer, folder=exercises)
    assert said is None if message is None else message in said


def test_a_message_is_one_line_and_keeps_its_spaces(exercises):
    """Where a text has a space too many, both texts must be seen to differ."""
    answer = "def total(numbers):\n    class Mistake(Exception): pass\n    raise Mistake({!r})"
    said = judge("90", "90.1", answer.format("it is '  low',\n\n    you return ' low'\n"), folder=exercises)
    assert said == "it is '  low', you return ' low'"
    assert str(Mistake("it is '  low',\n\n    you return ' low'\n")) == said


def test_an_answer_that_never_ends_is_stopped(exercises, monkeypatch):
    monkeypatch.setattr("minillm.exercises.testing._SECONDS", 1)
    said = judge("90", "90.1", "def total(numbers):\n    while True: pass", folder=exercises)
    assert said == "TimeoutError: still running after 1 s"
