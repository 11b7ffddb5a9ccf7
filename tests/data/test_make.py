"""The set-up that `make` does, with stand-ins for apt and for an old Python: nothing is downloaded."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = "INSTALLED=/nowhere"  # as on a machine without the package, whatever this one has


@pytest.fixture
def project(tmp_path):
    """A folder, with a blank in its name, with our Makefile and a `bin` for stand-ins of commands."""
    folder = tmp_path / "a project"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("")
    return folder


def stand_in(project, name, script):
    path = project / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def make(project, *arguments):
    # Not a recursive make, even where `make test` runs this: that would print the folders it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = outside | {"PATH": f"{project / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(
        ["make", *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def test_help_lists_the_targets(project):
    out = make(project).stdout
    for target in ("train", "test", "check", "parity", "data", "clean"):
        assert f"make {target} " in out


@pytest.mark.parametrize("lists", ["there", "missing"])
def test_data_from_the_package(project, lists):
    # Without package lists the plain download fails, and succeeds with lists that `update` has made.
    stand_in(
        project,
        "apt-get",
        f"""
        name=dataset-fashion-mnist
        case "$*" in
            *" update") touch updated;;
            *" download $name") [ {lists} = there ] || [ -e updated ] && touch ${{name}}_1.deb;;
            *) exit 1;;
        esac
        """,
    )
    stand_in(
        project,
        "dpkg",
        '[ "$1" = -x ] && mkdir -p "$3/usr/share/datasets/fashion-mnist" && touch "$3/$(basename "$2")"',
    )
    run = make(project, "data", NOT_INSTALLED)
    assert (run.returncode, run.stderr) == (0, "")
    assert [str(path.relative_to(project)) for path in (project / "data").rglob("*")] == [
        "data/usr",
        "data/usr/share",
        "data/usr/share/datasets",
        "data/usr/share/datasets/fashion-mnist",
    ]
    stand_in(project, "apt-get", "touch called; exit 1")
    assert make(project, "data", NOT_INSTALLED).stdout == ""  # it is there
    assert not list(project.rglob("called"))


def test_no_package_is_no_error(project):
    stand_in(project, "apt-get", "echo E: no network >&2; exit 100")
    run = make(project, "data", NOT_INSTALLED)
    assert run.returncode == 0 and run.stderr == ""
    assert "the program will download Fashion-MNIST itself" in run.stdout


def test_an_installed_package_is_not_fetched(project):
    stand_in(project, "apt-get", "touch called; exit 1")
    run = make(project, "data", "INSTALLED=bin")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(project.rglob("called"))


def test_old_python_is_one_line(project):
    stand_in(project, "old", '[ "$1" = -V ] && echo Python 3.9.2 || exit 1')
    run = make(project, ".venv/ready", "PYTHON=old")
    assert run.returncode == 2
    assert run.stderr.splitlines()[0] == (
        "error: Python 3.11 or newer is needed, and old is Python 3.9.2; "
        "install it, or say where it is: make PYTHON=/path/to/python3"
    )
    assert not (project / ".venv").exists()


def test_missing_venv_is_one_line(project):
    stand_in(project, "bare", '[ "$1" = -c ]')  # new enough, but `-m venv` fails
    stand_in(project, "apt-get", "exit 100")
    run = make(project, ".venv/ready", "PYTHON=bare")
    assert run.returncode == 2
    assert run.stderr.splitlines()[0] == (
        "error: bare cannot make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv"
    )
    assert not (project / ".venv").exists()


def test_requirements_are_installed_when_they_change(project):
    working = 'echo "$*" >> pip.log'
    venv = f"mkdir -p .venv/bin && printf '#!/bin/bash\\n{working}\\n' > .venv/bin/python && chmod +x .venv/bin/python"
    stand_in(project, "new", f'[ "$1" = -c ] || {{ {venv}; }}')
    for _ in range(2):
        assert make(project, ".venv/ready", "PYTHON=new").returncode == 0
    installs = [line for line in (project / "pip.log").read_text().splitlines() if "install" in line]
    assert len(installs) == 1 and installs[0].endswith("-r requirements.txt")
    stamp = (project / ".venv/ready").stat().st_mtime
    os.utime(project / "requirements.txt", (stamp + 5, stamp + 5))
    make(project, ".venv/ready", "PYTHON=new")
    assert (project / "pip.log").read_text().count("install") == 2
