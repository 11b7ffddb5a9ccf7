"""experiments/data_parallel: FSDP training equals pmap, and the results are computed from the measured times."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from experiments.data_parallel import fsdp, run
from experiments.runner import Workspace
from ldm_jax.runtime.parallel import AXIS, parallel_step, replicate, shard
from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import TrainState, update_if_finite

OPTIMIZER = make_optimizer(
    Optimization(
        steps=10, learning_rate=0.1, warmup_steps=0, decay="constant", adam_b2=0.99, weight_decay=0.0, clip_norm=1.0
    )
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), (AXIS,))


def init():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 8)).astype(np.float32), "b": np.zeros(5, np.float32)}
    return TrainState(np.int32(0), params, jax.tree.map(np.copy, params), jax.device_get(OPTIMIZER.init(params)))


@dataclass(frozen=True)
class Stage:
    """Linear regression."""

    def step(self, state, frozen, batch, seed, *, axis_name=None):
        def loss_fn(params):
            return jnp.square((batch["x"] @ params["w"]).sum(-1) - batch["x"][:, 0] - params["b"].sum()).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        state, _ = update_if_finite(state, batch["step"], loss, grads, optimizer=OPTIMIZER, ema_decay=0.9)
        return state, {"loss": loss}


def test_an_array_is_sharded_along_its_longest_divisible_axis(mesh):
    shapes = {(3, 8): (None, AXIS), (16, 8): (AXIS, None), (5,): (None,), (): (), (4, 6): (AXIS, None), (0,): (None,)}
    for shape, spec in shapes.items():
        assert fsdp.sharding_of(mesh, jnp.zeros(shape)).spec == PartitionSpec(*spec), shape


def test_a_sharded_state_is_trained_like_a_replicated_one(mesh):
    whole, shards = replicate(init()), fsdp.shard_state(mesh, init())
    whole_bytes, shard_bytes = fsdp.bytes_per_device(whole), fsdp.bytes_per_device(shards)
    sharded_bytes = 4 * 3 * 8 * 4  # w, its EMA and Adam's two moments
    assert whole_bytes - shard_bytes == sharded_bytes * 3 // 4  # each of four devices stores a quarter
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    mapped, sharded = parallel_step(Stage()), fsdp.sharded_step(Stage(), mesh, init())
    for number in range(3):
        index = {"index": np.arange(8, dtype=np.int32)}
        args = np.int32(number), np.uint32(0)
        whole, expected = mapped(whole, {}, {"x": x}, shard(index), *args)
        shards, metrics = sharded(shards, {}, {"x": x}, fsdp.shard_batch(mesh, index), *args)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shards, whole)
    assert shards.params["w"].addressable_shards[0].data.shape == (3, 2)
    assert int(shards.step) == 3


def result(losses, seconds):
    return {"losses": losses, "step_seconds": seconds, "state_bytes": 2_000_000}


def test_the_results_by_hand(tmp_path):
    """The first two steps compile and are not timed."""
    workspace = Workspace("cpu", "data", tmp_path)
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
