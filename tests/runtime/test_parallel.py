"""The whole job on one device, on four or eight, on two processes of two, by any engine: the same losses and images."""

import shutil

import jobs
import numpy as np
import pytest
from damage import array_files, flip_a_bit

pytestmark = pytest.mark.slow


def assert_same_losses(run, other):
    a, b = jobs.losses(run), jobs.losses(other)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def assert_same_samples(run, other):
    """Sums in another order differ in their last digit: the images by a grey level at most."""
    a, b = jobs.samples(run), jobs.samples(other)
    assert (a["labels"] == b["labels"]).all()
    assert np.abs(a["images"].astype(int) - b["images"]).max() <= 1


def test_four_devices_do_as_one(one_device_run, tiny_data, tmp_path):
    run = tmp_path / "run"
    assert "Device: 4 x cpu" in jobs.finish(jobs.start(tiny_data, run, devices=4))
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)


FSDP = "--config.parallel.engine=fsdp"
SHARDED = (FSDP, "--config.parallel.accumulate=2", "--config.parallel.remat=True")


def go_on_from_step_4(run, tiny_data, *changes, devices=1):
    """The last half of stage 2 anew, without samples."""
    shutil.rmtree(run / "diffusion" / "8")
    jobs.finish(jobs.start(tiny_data, run, *changes, "--config.sampling.num=0", devices=devices))


def test_fsdp_does_as_pmap_and_pmap_takes_over_its_run(one_device_run, tiny_data, tmp_path):
    """With micro-batches and recomputed activations."""
    run = tmp_path / "run"
    output = jobs.finish(jobs.start(tiny_data, run, *SHARDED, "--config.sampling.progress_every=4", devices=4))
    assert "Device: 4 x cpu" in output
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)
    assert (run / "progress" / "diffusion_000008.png").exists()
    back = shutil.copytree(run, tmp_path / "back")
    go_on_from_step_4(back, tiny_data)
    assert_same_losses(back, one_device_run)
    jobs.assert_same_but_for_rounding(back, run)


CHANGES = {  # name -> (devices, changes of the config)
    "four devices": (4, ()),
    "fsdp, micro-batches, remat": (4, SHARDED),
    "fsdp over half of the devices": (8, (FSDP, "--config.parallel.fsdp=4")),
    "micro-batches": (1, ("--config.parallel.accumulate=4",)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_goes_on_in_another_way(case, one_device_run, tiny_data, tmp_path):
    devices, changes = CHANGES[case]
    run = shutil.copytree(one_device_run, tmp_path / "run")
    go_on_from_step_4(run, tiny_data, *changes, devices=devices)
    assert_same_losses(run, one_device_run)
    jobs.assert_same_but_for_rounding(run, one_device_run)


def test_two_processes_do_as_one(one_device_run, start_hosts, tmp_path):
    """Both write to one run folder, as hosts with a common disk do."""
    run = tmp_path / "run"
    processes = start_hosts(2, run, devices=2)
    outputs = jobs.finish_all(processes)
    assert "Device: 4 x cpu" in outputs[0]
    assert "on 2 hosts" in outputs[0]
    assert "Done: " in outputs[0]
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)


@pytest.mark.hosts
@pytest.mark.parametrize("changes", [(), SHARDED], ids=["pmap", "fsdp, micro-batches, remat"])
def test_four_processes_do_as_one(changes, one_device_run, start_hosts, tmp_path):
    run = tmp_path / "run"
    outputs = jobs.finish_all(start_hosts(4, run, *changes))
    assert "Device: 4 x cpu" in outputs[0] and "on 4 hosts" in outputs[0] and "Done: " in outputs[0]
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)


@pytest.mark.hosts
def test_two_processes_share_a_sharded_state(one_device_run, start_hosts, tiny_data, tmp_path):
    """Two processes and a process with one device resume its checkpoint; all fall back from a damaged one."""
    run = tmp_path / "run"
    changes = (FSDP, "--config.parallel.accumulate=2", "--config.sampling.progress_every=8")
    outputs = jobs.finish_all(start_hosts(2, run, *changes, devices=2))
    assert "Done: " in outputs[0] and (run / "progress" / "diffusion_000008.png").exists()
    assert_same_losses(run, one_device_run)
    assert_same_samples(run, one_device_run)
    whole = shutil.copytree(run, tmp_path / "whole")
    (run / "report.html").unlink()  # it is not done
    shutil.rmtree(run / "diffusion" / "8")
    jobs.finish_all(start_hosts(2, run, *changes, devices=2))
    jobs.assert_same_but_for_rounding(run, whole)
    (run / "report.html").unlink()
    for path in array_files(run / "diffusion" / "8"):
        flip_a_bit(path)
    outputs = jobs.finish_all(start_hosts(2, run, *changes, devices=2))
    assert all("going back to the one before" in output for output in outputs), outputs
    jobs.assert_same_but_for_rounding(run, whole)
    shutil.rmtree(run / "diffusion" / "8")
    jobs.finish(jobs.start(tiny_data, run, "--config.sampling.num=0"))
    jobs.assert_same_but_for_rounding(run, whole)
