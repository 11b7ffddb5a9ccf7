"""The README and docs/: their commands, code, links and diffs are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax import command_line, convert, evaluate, sample, train
from ldm_jax.config import rules
from ldm_jax.config.io import open_fields
from ldm_jax.data import from_images
from ldm_jax.data.fashion_mnist import CLASS_NAMES
from ldm_jax.data.from_images import TrainingImages
from ldm_jax.demo import __main__ as demo
from tests.random_runs import random_run

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = {"sample": sample, "evaluate": evaluate, "convert": convert, "train": train, "demo": demo}


def blocks(page, language):
    """The fenced blocks of a page in a language; "" is none."""
    pieces = re.split(r"^ *```(\w*)\n", page.read_text(), flags=re.MULTILINE)  # text, fence, block, fence, text ...
    return [block for fence, block in zip(pieces[1::4], pieces[2::4]) if fence == language]


def commands(page):
    """The commands of a page, each as its arguments; lines that end with a backslash are joined."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.strip(), comments=True) for line in lines if line.strip()]


def module_calls():
    for page in PAGES:
        for command in commands(page):
            if command[1:2] == ["-m"] and command[2].startswith("ldm_jax."):
                yield pytest.param(
                    command[2].removeprefix("ldm_jax."), command[3:], id=f"{page.stem}: {shlex.join(command[2:5])}"
                )


@pytest.mark.parametrize(("name", "arguments"), [*module_calls()])
def test_a_command_has_flags_and_fields_that_exist(name, arguments, capsys):
    if name == "data.image_folder":
        help_text = subprocess.run(
            [sys.executable, "-m", f"ldm_jax.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert all(argument.split("=")[0] in help_text.stdout for argument in arguments)
        return
    argv = [name, *arguments]
    with_config = any(argument.startswith("--config=") for argument in argv)
    values = COMMANDS[name].define_flags()
    arguments = [a.replace("--config=CONFIG", "--config=configs/fashion_mnist.py") for a in argv]
    command_line.parse(values, arguments, config=with_config)
    if with_config:
        config = values.config.copy_and_resolve_references().unlock()
        config.update_from_flattened_dict(from_images.fill(config, TrainingImages(180, 20, 10, 128, False)))
        config.update_from_flattened_dict(dict.fromkeys(open_fields(config), "train"))
        rules.validate(config)
    assert capsys.readouterr().err == ""  # no old name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_is_tested(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(page):
        if command[0] == "make":
            assert command[1] in targets
        else:
            assert command[1] == "-m" and command[2].startswith("ldm_jax."), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/sampling.md", marks=pytest.mark.slow)])
def test_the_python_example_runs_as_written(page, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    size = {"data.image_size": 28, "data.channels": 1, "diffusion.timesteps": 1000}
    random_run(tmp_path / "runs" / "fashion_mnist", size, CLASS_NAMES)
    monkeypatch.chdir(tmp_path)
    variables = {}
    (code,) = blocks(ROOT / page, "python")
    exec(compile(code, page, "exec"), variables)
    assert variables["images"].shape[1:] == (28, 28, 1)
    if page == "README.md":
        assert variables["eps_hat"].shape == variables["z_0"].shape


@pytest.mark.slow
def test_the_diffs_of_extending_apply_and_their_code_runs(tmp_path):
    shutil.copytree(ROOT / "ldm_jax", tmp_path / "ldm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    page = ROOT / "docs" / "extending.md"
    diffs, checks = blocks(page, "diff"), blocks(page, "python")
    assert len(diffs) == len(checks) == 7
    for diff in diffs:
        touched = apply(diff, tmp_path)
        assert len(touched) <= 2
    # Each section's code by itself, in one process.
    sections = "\n".join(f"exec({check!r}, {{}})" for check in checks)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", sections], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def apply(diff, folder):
    """Applies a diff without line numbers: the old lines of each hunk must be in the file once."""
    touched = []
    for part in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"^@@.*\n", part, flags=re.MULTILINE)
        path = folder / name.removeprefix("+++ ").strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in "+- \n" for line in lines)
            old = "".join(line[1:] for line in lines if line[0] in "- ")
            new = "".join(line[1:] for line in lines if line[0] in "+ ")
            assert text.count(old) == 1 or not (old or text), f"{path}: {old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)
        touched.append(path)
    return touched
