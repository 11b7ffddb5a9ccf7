"""The whole job on one device, on four, and on two processes of two: the same losses and the same images."""

import shutil

import jobs
import numpy as np
import pytest

pytestmark = pytest.mark.slow


def assert_same_losses(run, other):
    a, b = jobs.losses(run), jobs.losses(other)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=5e-3)


def assert_same_samples(run, other):
    """Sums in another order differ in their last digit, and Adam makes more of it."""
    a, b = jobs.samples(run), jobs.samples(other)
    assert (a["labels"] == b["labels"]).all()
    assert np.abs(a["images"].astype(int) - b["images"]).mean() < 4


def test_four_devices_do_as_one(one_device_run, tiny_data, tmp_path):
    run = tmp_path / "run"
    assert "Device: 4 x cpu" in jobs.finish(jobs.start(tiny_data, run, devices=4))
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)


def test_a_run_goes_on_with_another_number_of_devices(one_device_run, tiny_data, tmp_path):
    """Four devices take over from one at half of stage 2."""
    run = shutil.copytree(one_device_run, tmp_path / "run")
    shutil.rmtree(run / "diffusion" / "8")
    jobs.finish(jobs.start(tiny_data, run, "--config.sampling.num=0", devices=4))
    assert_same_losses(run, one_device_run)
    jobs.assert_same_training(run, one_device_run, rtol=2e-2, atol=5e-3)


def test_two_processes_do_as_one(one_device_run, start_hosts, tmp_path):
    """Both write to one run folder, as hosts with a common disk do."""
    run = tmp_path / "run"
    processes = start_hosts(2, run, devices=2)
    outputs = [jobs.finish(process) for process in processes]
    assert "Device: 4 x cpu" in outputs[0]
    assert "on 2 hosts" in outputs[0]
    assert "Done: " in outputs[0]
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)
