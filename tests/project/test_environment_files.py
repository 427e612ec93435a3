"""The files that say what is installed agree with each other and with what is installed here."""

import importlib.metadata
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]]
PINS = {
    canonicalize_name(pin.name): pin
    for pin in (
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}

NOT_THE_PINS = "this environment is not made from constraints.txt (the oldest versions are being tested)"


def pinned(name: str) -> str:
    (specifier,) = PINS[canonicalize_name(name)].specifier
    return specifier.version


def makefile(variable: str) -> str:
    match = re.search(rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def pip_arguments() -> list[str]:
    """What the set-up script gives to pip after its own options, for the extras of `make lab` and `make test`."""
    call = re.search(r"\n +-c (.*?) \|\|", (ROOT / ".ci/setup").read_text())
    assert call is not None
    values = {"$constraints": "constraints.txt", "$extras": makefile("EXTRAS")}
    words = ["-c", *shlex.split(call[1])]
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return words


def test_every_pin_is_exact_and_stands_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS)
    for pin in PINS.values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is not an exact pin"
        assert pin.url is None
        assert not pin.extras


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_direct_dependency_is_pinned_within_its_range_and_has_a_floor(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned(requirement.name))
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)


def test_torch_is_pinned_to_the_version_that_has_a_cpu_build() -> None:
    assert pinned("torch") == "2.13.0"


def test_pins_are_all_that_the_extras_install_and_nothing_else() -> None:
    """Walk the requirements of what is installed, from this project on: the names met are the names pinned."""
    if not _pins_are_installed():
        pytest.skip(NOT_THE_PINS)
    environments = [{"platform_system": system, "sys_platform": name} for system, name in _SYSTEMS]
    reached: set[str] = set()
    waiting = [(canonicalize_name(requirement.name), frozenset(requirement.extras)) for requirement in DIRECT]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        reached.add(name)
        try:
            lines = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            # Not for this system (triton, appnope, ...), or of an extra that is not installed here: a leaf.
            assert name in PINS, f"{name} is required, neither pinned nor installed"
            continue
        for line in lines:
            requirement = Requirement(line)
            marker = requirement.marker
            wanted = marker is None or any(
                marker.evaluate(
                    {**environment, "os_name": "nt" if "win32" in environment.values() else "posix", "extra": extra}
                )
                for environment in environments
                for extra in ("", *extras)
            )
            if wanted:
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    cuda = {name for name in reached if name.startswith(("nvidia-", "cuda-"))}  # named exactly by torch's CUDA build
    assert sorted(reached - cuda - set(PINS)) == []
    # A bench library that is not installed here hides what it requires, so only then may a pin stay unreached.
    if all(_installed(Requirement(line).name) for line in EXTRAS["bench"]):
        assert sorted(set(PINS) - reached) == []


_SYSTEMS = [("Linux", "linux"), ("Darwin", "darwin"), ("Windows", "win32")]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_environment_yml_gives_pip_what_the_makefile_gives() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert sorted(re.split("[=<>]", package)[0] for package in conda) == ["pip", "python"]
    assert [word for line in pip["pip"] for word in shlex.split(line)] == pip_arguments()
    (python,) = [package.split("=")[1] for package in conda if package.startswith("python=")]
    assert Version(python) >= Version(PROJECT["requires-python"].removeprefix(">="))


def test_the_pip_section_asks_for_nothing_that_is_not_installed() -> None:
    """pip itself reads environment.yml's lines, with no index to go to, and finds everything in place."""
    if not _pins_are_installed():
        pytest.skip(NOT_THE_PINS)
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    # Without isolation the build of the project itself needs no index either: setuptools comes with torch.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", "--no-input"]
    arguments = [word for line in lines for word in shlex.split(line)]
    result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    installs = [line for line in result.stdout.splitlines() if line.startswith("Would install")]
    assert installs in ([], ["Would install minillm-course-" + PROJECT["version"]])


def _pins_are_installed() -> bool:
    names = [Requirement(line).name for line in PROJECT["dependencies"] + EXTRAS["course"] + EXTRAS["tests"]]
    return all(importlib.metadata.version(name).split("+")[0] == pinned(name) for name in names)


def test_floors_are_read_from_pyproject() -> None:
    floors = runpy.run_path(str(ROOT / ".ci/floors.py"))["floors"]
    lines = [
        Requirement(line) for line in floors(*((ROOT / f).read_text() for f in ("pyproject.toml", "constraints.txt")))
    ]
    oldest = {requirement.name: str(requirement.specifier) for requirement in lines}
    assert oldest.pop("torch") == "==2.13.0"
    assert oldest.pop("triton") == f"=={pinned('triton')}"
    declared = {
        requirement.name: f"=={specifier.version}"
        for requirement in DIRECT
        for specifier in requirement.specifier
        if specifier.operator == ">=" and requirement.name != "torch" and requirement.marker is None
    }
    assert oldest == declared
    with pytest.raises(ValueError, match="'rich<9' is not of the form"):
        floors('[project]\ndependencies = ["rich<9"]\noptional-dependencies = {}', "")


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert "(3, 11)" in (ROOT / ".ci/setup").read_text()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == "py311"
    assert tools["mypy"]["python_version"] == "3.11"


def test_licence_and_names() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["name"] == "minillm-course"
    for page in ("README.md", "Makefile", "environment.yml"):
        # That name on the package index belongs to someone else.
        assert not re.search(r"pip install (-U )?minillm\b(?!-)", (ROOT / page).read_text()), page


def test_top_level_is_small() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    allowed = {
        *("notebooks", "minillm", "exercises", "tests", "benchmarks", ".ci"),
        *("environment.yml", "pyproject.toml", "README.md", "Makefile", "LICENSE"),
        *("constraints.txt", "course.toml", ".gitignore"),
    }
    assert {path.split("/")[0] for path in tracked if path} <= allowed
