"""The record of a run: software and devices of each start, and what the time was spent on, lost steps included."""

import getpass
import json
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.evaluation import goodput
from ldm_jax.evaluation.report import write_report
from ldm_jax.run_folder import software
from ldm_jax.run_folder.log import Log, read_metrics
from ldm_jax.runtime.clock import Clock


def starts(lines):
    return [line for line in lines if line["stage"] == "start"]


def test_a_start_is_recorded_without_names_of_this_machine(trained_run):
    (record,) = starts(read_metrics(trained_run / "metrics.jsonl"))
    assert record["step"] == 0 and record["hosts"] == 1 and record["devices"].startswith("1 x ")
    assert record["jax"] == jax.__version__ and record["python"].count(".") == 2
    assert {"commit", "jaxlib", "flax", "optax", "orbax-checkpoint", "ldm_jax", "xla_flags"} <= record.keys()
    text = json.dumps(record)
    for name in ("/", "\\", socket.gethostname(), str(Path.home()), getpass.getuser()):
        assert name not in text, name


def test_the_goodput_of_a_run(trained_run):
    lines = read_metrics(trained_run / "metrics.jsonl")
    (line,) = (line for line in lines if line["stage"] == "goodput")
    shares = {name: value for name, value in line.items() if name not in ("stage", "step", "time")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert 0 < shares["goodput"] < 1 and shares["lost"] == 0 and min(shares.values()) >= 0
    for activity in ("compiling", "checkpoints", "sampling", "scoring", "starting", "latents"):
        assert shares[activity] > 0, activity
    assert sum(goodput.seconds(lines).values()) == pytest.approx(lines[-1]["time"], rel=0.02)
    html = (trained_run / "report.html").read_text()
    assert f"Goodput: {goodput.shares(lines)['goodput']:.1%}" in html
    assert "Starts of the run" in html and jax.__version__ in html


class Times:
    """A clock that tests move."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def started(folder, log_lines, times):
    """One start of a run: (seconds until then, method of Log, arguments) in turn, and then a kill."""
    log = Log(folder, write=True)
    log.start({"commit": "abc"})
    for seconds, method, *arguments in log_lines:
        times.now += seconds
        getattr(log, method)(*arguments)
    return read_metrics(folder / "metrics.jsonl")


def logged(step):
    return 1.0, "__call__", "diffusion", step


def test_steps_made_again_after_a_kill_are_lost(tmp_path, monkeypatch):
    """Saved at step 4, killed after step 7: three steps and their three seconds are lost; saved in time, none."""
    times = Times(monkeypatch)
    first = [(2.0, "account", "setup", 0), *map(logged, (1, 2, 3, 4)), (0.0, "account", "diffusion", 4)]
    started(tmp_path, [*first, *map(logged, (5, 6, 7))], times)
    times.now += 1000.0  # nothing ran
    second = [(2.0, "account", "setup", 0), (0.0, "rewind", "diffusion", 4), *map(logged, (5, 6, 7, 8))]
    lines = started(tmp_path, [*second, (0.0, "account", "diffusion", 8)], times)
    assert [line["diffusion_lost_steps"] for line in lines if "diffusion_lost_steps" in line] == [3]
    assert [line["step"] for line in lines if line["stage"] == "diffusion"] == [*range(1, 9)]
    spent = {name: value for name, value in goodput.seconds(lines).items() if value}
    assert spent == pytest.approx({"steps": 8.0, "starting": 4.0, "lost": 3.0})
    assert goodput.shares(lines)["goodput"] == pytest.approx(8 / 15)
    third = [(2.0, "account", "setup", 0), (0.0, "rewind", "diffusion", 8)]
    lines = started(tmp_path, third, times)
    assert len(starts(lines)) == 3 and goodput.seconds(lines)["lost"] == 3.0


def test_a_damaged_checkpoint_loses_steps_that_were_accounted_for(tmp_path, monkeypatch):
    times = Times(monkeypatch)
    saved = [(0.0, "account", "setup", 0), *map(logged, (1, 2)), (0.0, "account", "diffusion", 2)]
    saved += [*map(logged, (3, 4)), (0.5, "account", "diffusion", 4), logged(5)]
    started(tmp_path, saved, times)
    lines = started(tmp_path, [(0.0, "account", "setup", 0), (0.0, "rewind", "diffusion", 2)], times)
    spent = {name: value for name, value in goodput.seconds(lines).items() if value}
    assert spent == pytest.approx({"steps": 2.0, "lost": 3.5})


def test_a_run_of_an_earlier_version_has_no_goodput(tmp_path):
    line = {"stage": "timing", "step": 0, "time": 9.0, "diffusion_seconds": 9.0, "diffusion_compile_seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    html = write_report(tmp_path).read_text()
    assert "Where the time went" in html and "Goodput" not in html and "Starts" not in html


def test_the_clock_counts_compiling_apart(monkeypatch):
    times = Times(monkeypatch)
    clock = Clock()
    times.now += 1.0  # of nothing in particular
    with clock.spend("data"):
        times.now += 50.0
    with clock.spend("validation"):
        jax.jit(lambda x: jax.numpy.tanh(x) * 1.2345)(np.float32(1))  # compiles
        times.now += 10_000.0  # longer than that takes
    with clock.spend("data", hidden=lambda: True):
        times.now += 7.0
    with clock.spend("data"):
        times.now += 20.0
    read = clock.read()
    assert read["data_seconds"] == 70.0 and read["seconds"] == 10_078.0
    assert read["compilations"] >= 1 and 0 < read["compile_seconds"] < 10_000
    assert read["validation_seconds"] + read["compile_seconds"] == pytest.approx(10_000, abs=0.002)  # rounded
    times.now += 3.0
    assert clock.read() == {"seconds": 3.0, "compile_seconds": 0.0, "compilations": 0}


def test_the_commit_of_a_checkout(tmp_path):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("a = 1\n")
    assert software.commit(package) == ""
    git("init")
    git("commit", "--allow-empty", "-m", "without it, as with a package in an environment of the project")
    assert software.commit(package) == ""
    git("add", ".")
    git("commit", "-m", "with it")
    clean = software.commit(package)
    assert len(clean) == 12 and set(clean) <= set("0123456789abcdef")
    (tmp_path / "unrelated").write_text("outside the package")
    assert software.commit(package) == clean
    (package / "a.py").write_text("a = 2\n")
    assert software.commit(package) == clean + "+"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.commit(software.PACKAGE) == ""


def test_paths_in_flags_are_left_out():
    given = "--xla_dump_to=/home/user/dump --xla_cpu_enable_fast_math=false --xla_flag"
    assert software.flags(given) == "--xla_dump_to=... --xla_cpu_enable_fast_math=false --xla_flag"
    assert software.package_version("no_such_package") == ""


def test_equal_starts_in_a_row_share_a_line_of_the_report(tmp_path):
    for commit in ("abc", "abc", "def+", "abc"):
        Log(tmp_path, write=True).start({"commit": commit, "jax": "0.10.2", "jaxlib": "0.10.2"})
    html = write_report(tmp_path).read_text()
    cells = [
        f"<tr><td>{start}</td><td>{commit}</td>" for start, commit in (("1–2", "abc"), ("3", "def+"), ("4", "abc"))
    ]
    places = [html.index(cell) for cell in cells]
    assert places == sorted(places) and html.count("<td>0.10.2, 0.10.2</td>") == 3
