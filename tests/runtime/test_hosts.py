"""Runs on several hosts of which one is stopped, or dies: all end, and the same command goes on to the same bits."""

import os
import re
import signal
import subprocess
import sys
import time

import jobs
import numpy as np
import pytest

from ldm_jax.run_folder.layout import checkpoint_steps
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.runtime.hosts import TIMEOUT, slurm_devices

EACH_STEP = ("--config.log_every=1",)  # of metrics: an interval of several would end where a run is stopped
LONG = "--config.autoencoder.steps=1000000"


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run of two hosts that nobody stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    jobs.finish_all(jobs.start_hosts(tiny_data, run, 2, *EACH_STEP))
    return run


@pytest.mark.parametrize(
    ("nodes", "tasks", "gpus", "devices"),
    [("2", "2", "8", [0, 1, 2, 3, 4, 5, 6, 7]), ("2", "16", "8", []), ("2", "2", None, []), (None, None, "8", [])],
)
def test_one_process_of_a_slurm_node_has_all_its_gpus(nodes, tasks, gpus, devices):
    given = {"SLURM_STEP_NUM_NODES": nodes, "SLURM_NTASKS": tasks, "SLURM_GPUS_ON_NODE": gpus}
    assert slurm_devices({name: value for name, value in given.items() if value}) == devices


def test_several_hosts_of_no_cluster_are_refused():
    """JAX's own detection finds none, in a process without JAX's devices."""
    command = [sys.executable, "-m", "ldm_jax.train", "--config=tests/tiny.py", "--workdir=none", "--distributed"]
    hidden = ("SLURM_", "KUBERNETES_", "OMPI_", "PMI_", "TPU_", "CLOUD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "--distributed detects no cluster" in line
    assert "on one machine leave --distributed out, elsewhere give --coordinator=HOST:PORT --num_processes=N" in line


def assert_same_run(run, other):
    jobs.assert_same_training(run, other)
    assert jobs.losses(run) == jobs.losses(other)
    for name, array in jobs.samples(other).items():
        np.testing.assert_array_equal(jobs.samples(run)[name], array)


@pytest.mark.slow
def test_hosts_with_different_configs_are_refused(tiny_data, tmp_path):
    """One line on each, with the field; nothing is written. They used to train, or to wait for each other forever."""
    processes = jobs.start_hosts(
        tiny_data, tmp_path / "run", 2, of_host={1: ["--config.diffusion.learning_rate=0.5", "--config.seed=7"]}
    )
    outputs = jobs.finish_all(processes, [2, 2])
    for host, (output, rate) in enumerate(zip(outputs, ("", "0.5"))):
        (line,) = [line for line in output.splitlines() if line.startswith("train: ")]
        assert f"config.diffusion.learning_rate is {rate}" in line and f"on host {host}; host {1 - host} has" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "number", "statuses"), [(1, signal.SIGTERM, [143, 143]), (0, signal.SIGINT, [130, 143])]
)
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(host, number, statuses, start_hosts, tmp_path):
    run = tmp_path / "run"
    processes = start_hosts(2, run, LONG)
    jobs.stop_when(processes[host], lambda: (run / "autoencoder" / "4").exists(), number)
    outputs = jobs.finish_all(processes, statuses)
    steps = [re.search(r"Interrupted: stopped at step (\d+)", output)[1] for output in outputs]
    assert steps[0] == steps[1]
    assert (run / "autoencoder" / steps[0]).exists()


@pytest.mark.hosts
@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_while_the_first_host_samples_stops_both(host, start_hosts, tmp_path):
    """There is nothing to save then; the checkpoints of training are there."""
    run = tmp_path / "run"
    long = ("--config.sampling.num=1000000", "--config.sampling.batch_size=2")
    processes = start_hosts(2, run, *long, "--config.diffusion.steps=4", "--config.autoencoder.steps=4")
    saved = "diffusion_checkpoint_seconds"  # of the last line before sampling, whose first seconds are its compilation
    jobs.stop_when(
        processes[host], lambda: any(saved in line for line in read_metrics(run / "metrics.jsonl")), number=0
    )
    time.sleep(10)
    processes[host].send_signal(signal.SIGTERM)
    jobs.finish_all(processes, [143, 143])
    assert checkpoint_steps(run / "diffusion") == [4]


def starts(run):
    return sum(line["stage"] == "start" for line in read_metrics(run / "metrics.jsonl"))


@pytest.mark.hosts
def test_signals_at_random_moments_to_one_of_four(start_hosts, tmp_path):
    """All leave with 143, from the same step if they were training, and the run ends as one that nobody stopped."""
    rng, run = np.random.default_rng(0), tmp_path / "run"
    for number, moment in enumerate(rng.uniform(0.0, 25.0, size=4), start=1):
        processes = start_hosts(4, run, "--config.checkpoint_every=1000", *EACH_STEP)
        signalled = processes[rng.integers(4)]
        jobs.stop_when(signalled, lambda number=number, run=run: starts(run) == number, number=0)
        time.sleep(moment)
        signalled.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=400)[0] for process in processes]
        if "Done: " in outputs[0]:
            break
        assert [process.returncode for process in processes] == [143] * 4, outputs
        assert len({re.search(r"Interrupted: stopped at step \d+|$", output)[0] for output in outputs}) == 1, outputs
        assert not any("Traceback" in output for output in outputs), outputs
    for folder in (run, tmp_path / "whole"):
        jobs.finish_all(start_hosts(4, folder, *EACH_STEP))
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.hosts
@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_host_ends_the_other_within_a_minute_and_the_run_goes_on(host, whole, start_hosts, tmp_path):
    run = tmp_path / "run"
    processes = start_hosts(2, run, "--config.checkpoint_every=1", *EACH_STEP)
    jobs.stop_when(processes[host], lambda: (run / "diffusion" / "2").exists(), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = processes[1 - host].communicate(timeout=60)
    assert processes[1 - host].returncode not in (0, 143) and time.monotonic() - killed < 60
    if host == 1:
        assert processes[0].returncode == 1 and "Traceback" not in output, output
        assert f"Host 1 is lost: no heartbeat for {TIMEOUT:.0f} s. The same command, on all hosts, goes on" in output
    else:  # the store of the heartbeats is gone with it
        assert "Terminating process because the JAX distributed service detected fatal errors" in output
    assert max(checkpoint_steps(run / "diffusion")) < 8
    jobs.finish_all(start_hosts(2, run, *EACH_STEP))
    assert_same_run(run, whole)
