"""Tiny jobs, in this process or in one of their own, and what they leave behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ldm_jax import command_line, train
from ldm_jax.run_folder.checkpoint import load_at, load_latest
from ldm_jax.run_folder.log import read_metrics

ROOT = Path(__file__).parent.parent

SMALL = ("--config=tests/tiny.py", "--config.sampling.progress_every=0")

# For jobs whose network need not be conditioned: it compiles in half the time.
NO_ATTENTION = "--config.unet.attention=(False,)"

TEXTS = (
    "--config.stages=('autoencoder','clip','diffusion')",
    "--config.data.caption_key=auto",
    "--config.sampling.sampler=ddim",
    "--config.evaluation.zero_shot_key=label",
    "--config.evaluation.vlb_examples=8",
)
CLASSIFIER = ("--config.stages=('autoencoder','classifier')", "--config.sampling.progress_every=4")


def flags(data, workdir, *changes):
    """The command line of a small job, the name of the command left out; of a flag given twice, the last counts."""
    given = dict(flag.split("=", 1) for flag in [*SMALL, f"--config.data.dir={data}", f"--workdir={workdir}", *changes])
    return [f"{name}={value}" for name, value in given.items()]


def train_here(data, workdir, *changes):
    """Runs a small job in this process; returns the exit status."""
    return command_line.run(train.main, ["train", *flags(data, workdir, *changes)])


def start(data, workdir, *changes, devices=1):
    """Starts a small job in a process of its own; `finish` waits for it."""
    command = [sys.executable, "-m", "ldm_jax.train", *flags(data, workdir, *changes)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_hosts(data, workdir, count, *changes, devices=1, of_host=None):
    """Starts a small job in `count` processes, as on as many hosts with a common disk; `of_host` has flags of one."""
    own = of_host or {}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = (f"--coordinator=localhost:{port}", f"--num_processes={count}", *changes)
    flags = [(*hosts, *own.get(host, ()), f"--process_id={host}") for host in range(count)]
    return [start(data, workdir, *each, devices=devices) for each in flags]


def environment(devices):
    """That of a process that compiles as quickly as this one."""
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "NPROC": "4",  # threads of XLA, as many as the devices of conftest.py: sums have the same order
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def finish(process, *, status=0, timeout=400):
    """What the process printed, once it has ended with `status`."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == status, output
    assert "Traceback" not in output, output
    return output


def finish_all(processes, statuses=None, timeout=400):
    """`finish` of all hosts at once: one that cannot print, as nobody reads, would keep the others waiting."""
    with ThreadPoolExecutor(len(processes)) as pool:
        ends = [
            pool.submit(finish, process, status=status, timeout=timeout)
            for process, status in zip(processes, statuses or [0] * len(processes), strict=True)
        ]
        return [end.result() for end in ends]


def stop_when(process, condition, number=signal.SIGKILL, timeout=400):
    """Sends the signal as soon as `condition()` holds; fails if the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        if time.monotonic() > end:
            process.kill()
            raise AssertionError("never came to that")
        time.sleep(0.002)
    process.send_signal(number)


def assert_same_training(one, other, *, stages=("autoencoder", "diffusion")):
    """The last checkpoints of two run folders are equal to the last bit."""
    for stage in stages:
        a, b = load_latest(one / stage), load_latest(other / stage)
        assert a.keys() == b.keys()
        assert {name.split("/")[0] for name in a} == {"step", "params", "ema_params", "opt_state"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_but_for_rounding(one, other, *, stages=("diffusion",), since=4):
    """The last checkpoints of two run folders differ by at most 1e-4 of what the training after step `since` changed.

    Compared are all parameters together, all moving averages, and both of Adam's moments: alone, a parameter whose
    gradient is rounding error moves anywhere. All else, the counts of steps, is equal.
    """
    for stage in stages:
        a, b, before = load_latest(one / stage), load_latest(other / stage), load_at(other / stage, since)
        assert a.keys() == b.keys()
        rest = set(a)
        for part in ("/params/", "/ema_params/", "/mu/", "/nu/"):
            names = [name for name in a if part in f"/{name}"]
            difference, change = (
                np.sqrt(sum(np.square(x[name] - b[name], dtype=np.float64).sum() for name in names))
                for x in (a, before)
            )
            assert change > 0, f"{stage}{part}: nothing has changed"
            assert difference <= 1e-4 * change, f"{stage}{part}: {difference / change:.1e} of the change"
            rest -= {*names}
        assert rest and all(a[name].size == 1 for name in rest), rest
        for name in rest:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def losses(workdir):
    """Stage and step -> loss."""
    return {
        (line["stage"], line["step"]): line["loss"]
        for line in read_metrics(workdir / "metrics.jsonl")
        if "loss" in line
    }


def samples(workdir):
    """The arrays of samples.npz."""
    with np.load(workdir / "samples.npz") as arrays:
        return dict(arrays)
