"""The set-up that `make` does, with stand-ins for apt and for an old Python: nothing is downloaded."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = "INSTALLED=nowhere"  # in the new project: as on a machine without the package, whatever this one has


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
    for target in ("train", "test", "check", "parity", "data", "emoji-data", "clean"):
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


EMOJI_FILES = ["usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/unicode/emoji/emoji-test.txt"]


@pytest.fixture
def emoji_packages(project):
    """Stand-ins by which apt has the two packages with the emoji's files, and a list of what it is asked for."""
    stand_in(
        project, "apt-get", 'echo "$*" >> ../../../asked.log; case "$*" in *" download "*) touch ${@: -1}_1.deb; esac'
    )
    unpack = """
        case "$2" in *noto*) file=FONT;; *) file=NAMES;; esac
        mkdir -p "$3/$(dirname $file)" && touch "$3/$file" "$3/more"
    """
    stand_in(project, "dpkg", unpack.replace("FONT", EMOJI_FILES[0]).replace("NAMES", EMOJI_FILES[1]))
    return project


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_emoji_data_from_the_packages(emoji_packages):
    for asked in (["fonts-noto-color-emoji", "unicode-data"], []):  # the second time they are there
        run = make(emoji_packages, "emoji-data", "SYSTEM=nowhere")
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.splitlines() == [f"Fetching the Debian package {name} ..." for name in asked]
        assert files_below(emoji_packages / "data") == EMOJI_FILES
    (emoji_packages / "data" / EMOJI_FILES[1]).unlink()
    make(emoji_packages, "emoji-data", "SYSTEM=nowhere")
    asked = (emoji_packages / "asked.log").read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["fonts-noto-color-emoji", "unicode-data", "unicode-data"]


def test_emoji_data_that_is_installed(emoji_packages):
    for name in EMOJI_FILES:
        (emoji_packages / "system" / name).parent.mkdir(parents=True)
        (emoji_packages / "system" / name).touch()
    run = make(emoji_packages, "emoji-data", "SYSTEM=system")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not (emoji_packages / "asked.log").exists() and not (emoji_packages / "data").exists()


def test_no_emoji_data_is_no_error(project):
    stand_in(project, "apt-get", "echo E: no network >&2; exit 100")
    run = make(project, "emoji-data", "SYSTEM=nowhere")
    assert (run.returncode, run.stderr) == (0, "")
    assert [line for line in run.stdout.splitlines() if not line.startswith("Fetching")] == [
        "No Debian package to be had here: put NotoColorEmoji.ttf in data/usr/share/fonts/truetype/noto for the emoji.",
        "No Debian package to be had here: put emoji-test.txt in data/usr/share/unicode/emoji for the emoji.",
    ]
    assert files_below(project / "data") == []


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
