"""Checkpoints of two hosts: they agree on which they restore if one is damaged or cannot be read, and save as one."""

import re
import socket
import subprocess
import sys

import jobs
import pytest

from ldm_jax.run_folder.store import SNAPSHOTS, checkpoint_steps

# Restores on two hosts, then saves step 2 again. Host 0 reads damaged files a second later than host 1.
HOST = """
import sys, time
from pathlib import Path
from ldm_jax.runtime.hosts import connect

host, port, folder, fault = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
connect(coordinator_address=f"localhost:{port}", num_processes=2, process_id=host)
import numpy as np
from damage import array_files, flip_a_bit
from ldm_jax.run_folder import checkpoint
from ldm_jax.runtime.parallel import wait_for_hosts

def state(step):
    return {"step": np.int32(step), "a": np.arange(1000.0) + step}

def read(folder, step, shards, read=checkpoint._read_unchecked):
    if fault == "damaged files" and host == 0:
        time.sleep(1)
    if fault == "damaged on one host" and host == 1 and step == 2:
        raise ValueError("checksum")
    return read(folder, step, shards)

with checkpoint.Checkpoints(folder, keep=3, identity={}) as checkpoints:
    for step in (1, 2):
        checkpoints.save(state(step))
        checkpoints.wait()
if fault == "damaged files" and host == 0:
    for path in array_files(folder / "2"):
        flip_a_bit(path)
wait_for_hosts("saved")
intact, checkpoint._read_unchecked = checkpoint._read_unchecked, read
with checkpoint.Checkpoints(folder, keep=3, identity={}) as checkpoints:
    print("restored", checkpoints.restore(state(0))["step"])
    checkpoints.save(state(2))
    checkpoints.wait()
    checkpoint._read_unchecked = intact
    print("restored", checkpoints.restore(state(0))["step"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["damaged files", "damaged on one host"])
def test_hosts_restore_the_same_step_and_save_it_again(fault, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = jobs.environment(1) | {"PYTHONPATH": "tests", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(host), str(port), str(tmp_path / "checkpoints"), fault],
            cwd=jobs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in (0, 1)
    ]  # fmt: skip
    try:
        outputs = jobs.finish_all(processes, timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert [re.findall(r"restored (\d)", output) for output in outputs] == [["1", "2"]] * 2
    assert (tmp_path / "checkpoints" / "damaged.2").is_dir()


@pytest.mark.slow
def test_hosts_save_a_checkpoint_and_a_snapshot_of_the_same_step(start_hosts, tmp_path):
    """Which each waits for all hosts, at the same time."""
    averages = ("--config.diffusion.ema_sigma_rels=(0.1,)", "--config.diffusion.ema_snapshot_every=4")
    alone = ("--config.checkpoint_every=4", "--config.sampling.num=0", jobs.NO_ATTENTION)
    jobs.finish_all(start_hosts(2, tmp_path / "run", *averages, *alone), timeout=300)
    assert all(8 in checkpoint_steps(tmp_path / "run" / folder) for folder in ("diffusion", SNAPSHOTS))
