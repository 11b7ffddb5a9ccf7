"""The package as pip installs it: it imports, and its commands run, from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    """What a command prints; fails if the command does."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a fresh virtual environment with the package; the requirements are those of this process."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("venv")
    shutil.copytree(ROOT / "ldm_jax", source / "ldm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", source)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@pytest.fixture
def elsewhere(tmp_path):
    """The options of a process in a folder outside the repository, which does not find the repository by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"cwd": tmp_path, "env": environment | {"JAX_PLATFORMS": "cpu"}}


def test_all_files_of_the_package_are_installed(python, elsewhere):
    place = run(python, "-c", "import ldm_jax; print(ldm_jax.__file__)", **elsewhere).strip()
    installed = Path(place).parent
    assert installed.is_relative_to(python.parents[1])
    for path in (ROOT / "ldm_jax").rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT / "ldm_jax")).is_file(), path


def test_a_config_file_is_checked_by_the_installed_command(python, elsewhere, tiny_data):
    """A dry run: the config's defaults and the data set are read, and nothing is written."""
    config = shutil.copy(ROOT / "tests" / "tiny.py", elsewhere["cwd"] / "mine.py")
    flags = [f"--config={config}", f"--config.data.dir={tiny_data}", "--dry_run"]
    output = run(python, "-m", "ldm_jax.train", *flags, **elsewhere)
    assert output.strip()
    assert [path.name for path in elsewhere["cwd"].iterdir() if path.name != "__pycache__"] == ["mine.py"]
