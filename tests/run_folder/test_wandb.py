"""Weights & Biases by config.wandb, on a fake module that records its calls."""

import json
import sys

import jobs
import pytest

from ldm_jax.errors import InputError
from ldm_jax.run_folder import wandb_log

WANDB = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")

def record(name, value):
    with calls.open("a") as file:
        file.write(json.dumps([name, value], default=str) + "\\n")

class Run:
    def define_metric(self, name, step_metric):
        record("metric", [name, step_metric])

    def log(self, values):
        record("log", values)

    def finish(self):
        record("finish", None)

def init(**options):
    if options["project"] == "locked":
        raise ValueError("No API key configured.\\nUse wandb login")
    record("init", options)
    return Run()
"""
ALONE = ("--config.stages=('autoencoder',)", "--config.evaluation.vlb_examples=0")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """calls(): the calls of the fake package so far, as (name, value)."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return lambda: [tuple(json.loads(line)) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_a_run_logs_its_metrics_and_a_resumed_run_goes_on(calls, tiny_data, tmp_path):
    run = tmp_path / "run"
    steps = "--config.autoencoder.steps={}".format
    assert jobs.train_here(tiny_data, run, *ALONE, "--config.wandb=team/toy", steps(4)) == 0
    first = calls()
    options = first[0][1]
    assert first[0][0] == "init" and first[-1] == ("finish", None)
    assert (options["entity"], options["project"], options["name"]) == ("team", "toy", "run")
    assert options["config"]["autoencoder"]["steps"] == 4 and options["resume"] == "allow"
    assert ("metric", ["autoencoder/*", "autoencoder/step"]) in first
    logged = [value for what, value in first if what == "log" and "autoencoder/loss" in value]
    assert {value["autoencoder/step"]: value["autoencoder/loss"] for value in logged} == {
        step: loss for (_, step), loss in jobs.losses(run).items()
    }
    assert jobs.train_here(tiny_data, run, *ALONE, "--config.wandb=team/toy", steps(8)) == 0
    again = [value for what, value in calls() if what == "init"][1]
    assert again["id"] == options["id"] == (run / wandb_log.ID).read_text()
    assert jobs.train_here(tiny_data, run, *ALONE, "--config.wandb=", steps(9)) == 0  # it may change
    assert len([what for what, _ in calls() if what == "init"]) == 2


@pytest.mark.usefixtures("calls")
def test_a_failure_to_start_is_told_in_one_line(tiny_data, tmp_path, capsys):
    assert jobs.train_here(tiny_data, tmp_path / "run", *ALONE, "--config.wandb=locked") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "W&B did not start (No API key configured.)" in error and "offline" in error


def test_without_the_package_one_line_says_so(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    assert jobs.train_here(tiny_data, tmp_path / "run", *ALONE, "--config.wandb=toy") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.wandb is 'toy', and there is no package wandb: pip install" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a/b/c", "50%", "a:b"])
def test_a_name_that_is_no_project_is_refused(name, tiny_data, tmp_path, capsys):
    assert jobs.train_here(tiny_data, tmp_path / "run", *ALONE, f"--config.wandb={name}") == 2
    assert "it must be a Weights & Biases project" in capsys.readouterr().err


def test_a_folder_of_offline_runs_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="there is no package wandb"):
        wandb_log.check("toy")
    wandb_log.check("")
