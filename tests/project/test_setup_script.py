"""The set-up script, run for real by sh, with stand-ins for Python and pip: what it does, says and repairs."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sh", "cat", "cksum", "rm", "mv", "mkdir", "grep", "ps", "chmod", "cp")

# A stand-in for Python. Code given by -c really runs, in this test's Python, under the version named in FAKE.
PYTHON = """\
#!/bin/sh
here=$(cd "${0%/*}" && pwd)
if [ "$1" = -V ]; then echo "Python VERSION"; exit 0; fi
if [ "$1" = -c ]; then
    pretend="import sys; sys.version_info = tuple(map(int, 'VERSION'.split('.'))); PRELUDE"
    exec REAL -S -c "$pretend; exec(sys.argv[1])" "$2"
fi
echo "$*" >> "$CALLS"
case "$2" in
venv)
    [ "$FAKE" = venv-killed ] && { mkdir -p "$3"; kill -9 $PPID; }
    [ "$FAKE" = venv-fails ] && { echo "Error: no" >&2; exit 1; }
    mkdir -p "$3/bin"; echo home > "$3/pyvenv.cfg"; cp "$0.in-environment" "$3/bin/python" ;;
pip)
    while [ "$1" != --log ]; do shift; done
    case "$FAKE" in
    stopped) kill -TERM $PPID; exit 1 ;;
    pip-killed) echo half > .venv/half-copied; kill -9 $PPID ;;
    no-network) echo "NewConnectionError: Failed to establish a new connection" > "$2"; exit 1 ;;
    disk-full) echo "ERROR: [Errno 28] No space left on device" > "$2"; exit 1 ;;
    certificate) echo "SSLError(CERTIFICATE_VERIFY_FAILED)" > "$2"; exit 1 ;;
    odd) echo "ERROR: something else" > "$2"; exit 2 ;;
    esac ;;
esac
"""


class Clone:
    """A small clone in a temporary folder, on a machine that has only the Pythons put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a clone"  # paths with a space must do
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        (self.folder / "minillm").mkdir(parents=True)
        (self.folder / "minillm" / "__init__.py").touch()
        (self.folder / ".ci").mkdir()
        for name in (".ci/setup", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is not None:  # ps is missing from small containers, and the script does without
                (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, version: str, prelude: str = "pass") -> None:
        text = PYTHON.replace("REAL", sys.executable).replace("VERSION", version)
        self._write(name, text.replace("PRELUDE", prelude))
        inside = "sys.prefix, sys.base_prefix, sys.modules['pip'] = '.venv', '/usr', sys"
        self._write(f"{name}.in-environment", text.replace("PRELUDE", inside))

    def _write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, fake: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        environment = {"PATH": str(self.bin), "CALLS": str(self.calls), "FAKE": fake, "GOAL": "lab", **variables}
        return subprocess.run(
            ["sh", ".ci/setup", ".venv", "course,tests", "constraints.txt"],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def marker_exists(self) -> bool:
        return (self.folder / ".venv.unfinished").exists()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    clone = Clone(tmp_path)
    clone.add_python("python3", "3.11.7")
    return clone


def test_makes_the_environment_once_and_then_does_nothing(clone: Clone) -> None:
    first = clone.setup()
    assert first.returncode == 0, first.stderr
    assert clone.calls.read_text().splitlines() == [
        "-m venv .venv",
        "-m pip install --no-input --disable-pip-version-check --log .venv/pip.log "
        "-c constraints.txt -e .[course,tests]",
    ]
    assert (clone.venv / "share/jupyter/lab/settings/overrides.json").exists()
    second = clone.setup()
    assert (second.returncode, second.stderr, clone.calls.read_text()) == (0, "", "")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_the_requirements_change(clone: Clone, name: str) -> None:
    clone.setup()
    path = clone.folder / name
    path.write_text(path.read_text() + "\n# changed\n")
    assert clone.setup().returncode == 0
    assert "pip install" in clone.calls.read_text()
    assert "venv" not in clone.calls.read_text().splitlines()[0].split()


def test_touching_a_file_without_changing_it_costs_nothing(clone: Clone) -> None:
    clone.setup()
    os.utime(clone.folder / "pyproject.toml")
    clone.setup()
    assert clone.calls.read_text() == ""


def test_pip_options_are_passed_on_as_words(clone: Clone) -> None:
    clone.setup(PIP_ARGS="--find-links wheels --no-index")
    assert "--find-links wheels --no-index -c constraints.txt" in clone.calls.read_text()


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.9.2", "python3.12": "3.12.1"}, "3.12.1"),
        ({"python3": "3.9.2", "python3.11": "3.11.0", "python3.13": "3.13.0"}, "3.13.0"),
        ({"python3": "3.12.4", "python3.13": "3.13.0"}, "3.12.4"),  # what the user calls python3, when it fits
        ({"python3": "3.17.0", "python3.12": "3.12.1"}, "3.12.1"),  # one that the pins are known for comes first
        ({"python3": "3.17.0"}, "3.17.0"),
        ({"python": "3.11.1"}, "3.11.1"),
    ],
)
def test_finds_a_python_that_fits(tmp_path: Path, pythons: dict[str, str], chosen: str) -> None:
    clone = Clone(tmp_path)
    for name, version in pythons.items():
        clone.add_python(name, version)
    result = clone.setup()
    assert result.returncode == 0, result.stderr
    assert f"making .venv with Python {chosen}" in result.stderr


def test_a_shim_that_does_not_run_is_passed_over(clone: Clone) -> None:
    (clone.bin / "python3").write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    clone.add_python("python3.12", "3.12.1")
    assert "with Python 3.12.1" in clone.setup().stderr


def test_says_that_python_is_too_old_and_which_were_seen(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    clone.add_python("python3", "3.9.2")
    result = clone.setup()
    assert result.returncode == 1
    assert "needs Python 3.11 or newer" in result.stderr
    assert "python3 is Python 3.9.2" in result.stderr
    assert "make lab PYTHON=" in result.stderr
    assert not clone.venv.exists()
    assert not clone.marker_exists()


def test_says_that_there_is_no_python(tmp_path: Path) -> None:
    result = Clone(tmp_path).setup()
    assert result.returncode == 1
    assert "There is no Python at all" in result.stderr


@pytest.mark.parametrize(
    ("python", "words"), [("old", "is Python 3.8.0"), ("nowhere", "does not run"), ("new", "3.12.1")]
)
def test_takes_the_python_that_is_named(clone: Clone, python: str, words: str) -> None:
    clone.add_python("old", "3.8.0")
    clone.add_python("new", "3.12.1")
    result = clone.setup(PYTHON=python)
    assert result.returncode == (python != "new")
    assert words in result.stderr


def test_a_named_python_other_than_the_environments_is_refused(clone: Clone) -> None:
    clone.setup()
    clone.add_python("new", "3.12.1")
    result = clone.setup(PYTHON="new")
    assert result.returncode == 1
    assert "made with Python 3.11.7, not with new" in result.stderr


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_says_that_the_venv_module_is_missing(tmp_path: Path, missing: str) -> None:
    clone = Clone(tmp_path)
    clone.add_python("python3", "3.11.2", prelude=f"sys.modules['{missing}'] = None")
    result = clone.setup()
    assert result.returncode == 1
    assert "Python 3.11.2 has no venv module" in result.stderr
    assert "apt install python3.11-venv" in result.stderr
    assert not clone.marker_exists()


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("no-network", "no network"),
        ("disk-full", "disk is full"),
        ("certificate", "certificate was not accepted"),
        ("odd", "its own words are above"),
    ],
)
def test_says_why_pip_failed_and_goes_on_from_there(clone: Clone, fake: str, words: str) -> None:
    failed = clone.setup(fake)
    assert failed.returncode == 1
    assert words in failed.stderr
    assert "run make lab again" in failed.stderr
    repaired = clone.setup()
    assert repaired.returncode == 0
    assert clone.calls.read_text().startswith("-m pip install")  # the environment itself was good


def test_a_working_environment_survives_an_update_without_network(clone: Clone) -> None:
    clone.setup()
    (clone.venv / "installed").touch()
    (clone.folder / "constraints.txt").write_text("torch==9\n")
    assert clone.setup("no-network").returncode == 1
    assert (clone.venv / "installed").exists()


@pytest.mark.parametrize("moment", ["venv-killed", "pip-killed"])
def test_a_killed_setup_is_started_afresh(clone: Clone, moment: str) -> None:
    killed = clone.setup(moment)
    assert killed.returncode == -9
    assert clone.marker_exists()
    result = clone.setup()
    assert result.returncode == 0, result.stderr
    assert "was interrupted: starting the environment afresh" in result.stderr
    assert not (clone.venv / "half-copied").exists()
    assert not clone.marker_exists()
    assert clone.setup().stderr == ""


def test_a_stopped_setup_says_so_and_is_started_afresh(clone: Clone) -> None:
    stopped = clone.setup("stopped")
    assert stopped.returncode == 130
    assert "interrupted. To finish, run make lab again." in stopped.stderr
    assert clone.marker_exists()
    assert "starting the environment afresh" in clone.setup().stderr


def test_an_environment_that_cannot_be_made_leaves_nothing(clone: Clone) -> None:
    result = clone.setup("venv-fails")
    assert result.returncode == 1
    assert "could not make the environment" in result.stderr
    assert not clone.venv.exists()
    assert not clone.marker_exists()


def test_an_environment_whose_python_is_gone_is_started_afresh(clone: Clone) -> None:
    clone.setup()
    (clone.venv / "bin" / "python").unlink()
    result = clone.setup()
    assert result.returncode == 0
    assert "does not work" in result.stderr
    assert (clone.venv / "bin" / "python").exists()


def test_a_moved_clone_is_installed_again(clone: Clone) -> None:
    clone.setup()
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert clone.setup().returncode == 0
    assert "pip install" in clone.calls.read_text()


def test_a_folder_that_is_no_environment_is_left_alone(clone: Clone) -> None:
    clone.venv.mkdir()
    (clone.venv / "thesis.tex").touch()
    result = clone.setup()
    assert result.returncode == 1
    assert "not a virtual environment" in result.stderr
    assert (clone.venv / "thesis.tex").exists()


def test_an_environment_that_the_user_made_is_used(clone: Clone) -> None:
    (clone.venv / "bin").mkdir(parents=True)
    (clone.venv / "pyvenv.cfg").touch()
    shutil.copy(clone.bin / "python3.in-environment", clone.venv / "bin" / "python")
    (clone.venv / "mine").touch()
    assert clone.setup().returncode == 0
    assert (clone.venv / "mine").exists()


@pytest.fixture
def other_setup() -> Iterator[int]:
    """The id of a living process whose command line is that of a set-up."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, ".ci/setup"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate()


def test_two_setups_at_once_do_not_harm_each_other(clone: Clone, other_setup: int) -> None:
    (clone.venv / "bin").mkdir(parents=True)
    (clone.folder / ".venv.unfinished").write_text(f"{other_setup}\n")
    result = clone.setup()
    assert result.returncode == 1
    assert f"another set-up is at work in this folder (process {other_setup})" in result.stderr
    assert (clone.venv / "bin").exists()


def test_refuses_to_run_elsewhere(clone: Clone) -> None:
    (clone.folder / "pyproject.toml").unlink()
    result = clone.setup()
    assert result.returncode == 1
    assert "top folder of the repository" in result.stderr


def test_scripts_parse_in_sh() -> None:
    for script in (".ci/setup", ".ci/run"):
        shell = "bash" if "bash" in (ROOT / script).read_text().splitlines()[0] else "sh"
        subprocess.run([shell, "-n", ROOT / script], check=True)
    assert textwrap.dedent((ROOT / ".ci/run").read_text()).rstrip().endswith("exec make test </dev/null")
