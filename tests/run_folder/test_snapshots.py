"""Snapshots of power function averages: when they are taken, of whole and of sharded states, and which are deleted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import RunError
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import load_at
from ldm_jax.run_folder.layout import checkpoint_steps
from ldm_jax.run_folder.snapshots import Snapshots
from ldm_jax.runtime.engine import make_engine
from ldm_jax.training.state import TrainState

KERNEL = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def state_at(step, engine=None):
    averages = {"0.05": {"unet": {"kernel": jnp.asarray(KERNEL + step)}}}
    state = TrainState(jnp.int32(step), {}, {}, (), averages)
    return engine.place_params(state) if engine else state


def snapshots(folder):
    return Snapshots(folder, every=3, identity={"config": "mine"})


def run(folder, start, stop, engine=None):
    """As the training loop calls it."""
    with snapshots(folder) as kept:
        kept.begin(state_at(start, engine))
        for step in range(start + 1, stop + 1):
            kept.save(step, state_at(step, engine))


@pytest.mark.parametrize("engine", ["pmap", "fsdp"])
def test_they_are_taken_in_turn(engine, tmp_path, four_devices):
    run(tmp_path, 0, 10, make_engine(engine))
    assert sorted(checkpoint_steps(tmp_path)) == [3, 6, 9]
    for step in (3, 6, 9):
        flat = load_at(tmp_path, step)
        assert flat.keys() == {"step", "power_emas/0.05/unet/kernel"} and flat["step"] == step
        np.testing.assert_array_equal(flat["power_emas/0.05/unet/kernel"], (KERNEL + step).astype(np.float16))


def test_those_of_later_steps_are_made_again(tmp_path):
    run(tmp_path, 0, 9)
    with snapshots(tmp_path) as kept:
        kept.begin(state_at(7))
        assert sorted(checkpoint_steps(tmp_path)) == [3, 6]
        changed = state_at(9).replace(power_emas=state_at(0).power_emas)
        kept.save(9, changed)
    np.testing.assert_array_equal(load_at(tmp_path, 9)["power_emas/0.05/unet/kernel"], KERNEL.astype(np.float16))


def test_that_of_the_first_state_is_taken_if_it_is_missing(tmp_path):
    run(tmp_path, 6, 7)
    assert checkpoint_steps(tmp_path) == [6]
    run(tmp_path / "none", 0, 1)
    assert checkpoint_steps(tmp_path / "none") == []


def test_none_is_taken_after_a_rejected_update(tmp_path):
    """The state stays at step 2 while the loop goes on, until it reads the metrics."""
    with snapshots(tmp_path) as kept:
        kept.begin(state_at(2))
        kept.save(3, state_at(2))
    assert checkpoint_steps(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with snapshots(tmp_path) as kept:
        kept.begin(state_at(0))
        monkeypatch.setattr(checkpoint, "MARGIN", 1 << 60)
        with pytest.raises(RunError, match="No space left on device"):
            kept.save(3, state_at(3))


def test_large_values_are_infinite_without_a_warning(tmp_path):
    with snapshots(tmp_path) as kept:
        kept.begin(state_at(0))
        kept.save(3, state_at(3).replace(power_emas=jax.tree.map(lambda leaf: leaf + 1e5, state_at(3).power_emas)))
    assert np.isinf(load_at(tmp_path, 3)["power_emas/0.05/unet/kernel"]).all()
