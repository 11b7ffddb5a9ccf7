"""experiments/data_parallel: its strategies train alike, and the results are computed from the measured times."""

import json

import jax
import numpy as np
import pytest
import tiny

from experiments.data_parallel import run, worker
from experiments.runner import Workspace
from experiments.untrained import diffusion_start
from ldm_jax.data.feeds import DeviceFeed


@pytest.mark.slow
def test_the_strategies_train_alike(four_devices):
    config = tiny.get_config().unlock()
    config.autoencoder.type, config.unet.attention = "none", (False,)
    config.diffusion.update(warmup_steps=0, decay="constant", learning_rate=1e-2)
    stage, state, frozen = diffusion_start(config, jax.random.key(0))
    images, labels = tiny.pictures(16)
    feed = DeviceFeed({"x": images, "label": labels.astype(np.int32)}, 8, 0)
    initial = jax.device_get(state)
    strategies, losses, changes = worker.make_strategies(stage, frozen, feed, initial), {}, {}
    assert worker.bytes_per_device(strategies["FSDP"][1]) < 0.3 * worker.bytes_per_device(strategies["pmap"][1])
    for name, (step, after) in strategies.items():
        losses[name] = []
        for number in range(3):
            after, metrics = step(after, feed(number), number)
            losses[name].append(float(metrics["loss"]))
        changes[name] = jax.tree.map(np.subtract, jax.device_get(after.params), initial.params)
    for name in ("pmap", "FSDP"):
        np.testing.assert_allclose(losses[name], losses["jit"], rtol=1e-4)
        for change, expected in zip(*map(jax.tree.leaves, (changes[name], changes["jit"])), strict=True):
            assert np.linalg.norm(change - expected) <= 1e-2 * np.linalg.norm(expected)
    assert np.mean([change.any() for change in jax.tree.leaves(changes["jit"])]) > 0.5


def result(losses, seconds):
    return {"losses": losses, "step_seconds": seconds, "state_bytes": 2_000_000}


def test_the_results_by_hand(tmp_path):
    """The first two steps compile and are not timed."""
    workspace = Workspace("minutes", "data", tmp_path)
    results = {
        "1 device": {"jit": result([2.0, 1.0, 0.5], [9, 9, 1]), "pmap": result([2.0, 1.0, 0.5], [9, 9, 2])},
        "2 processes of 2": {
            "pmap": result([2.0, 1.000004, 0.5], [9, 9, 3]),
            "FSDP": result([2.0, 1.0, 0.499999], [9, 9, 6]),
        },
    }
    (tmp_path / "data_parallel").mkdir()
    for arm, strategies in results.items():
        (tmp_path / "data_parallel" / f"{arm}.json").write_text(json.dumps(strategies))
    one, two = (run.measure(workspace, arm, 0) for arm in results)
    assert one["devices"] == 1 and one["strategies"]["pmap"]["relative_step_time"] == 2.0
    assert one["strategies"]["pmap"]["max_relative_difference_ppm"] == 0.0
    assert two["devices"] == 4 and two["strategies"]["FSDP"]["relative_step_time"] == 2.0
    assert two["strategies"]["pmap"]["max_relative_difference_ppm"] == pytest.approx(4.0)
    assert two["strategies"]["FSDP"]["max_relative_difference_ppm"] == pytest.approx(2.0)
    assert two["strategies"]["FSDP"]["state_megabytes"] == 2.0


@pytest.mark.slow
def test_a_failed_worker_raises(tmp_path):
    with pytest.raises(run.RunError, match=r"failed for 1 device; its output is above"):
        run.run_of(Workspace("smoke", str(tmp_path / "none"), tmp_path), "1 device")
