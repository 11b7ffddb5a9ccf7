"""experiments/data_parallel: a state in parts is trained like a whole one, and what is told is what was timed."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from experiments.data_parallel import fsdp, run
from experiments.frame import Lab
from ldm_jax.runtime.parallel import AXIS, parallel_step, replicate, shard
from ldm_jax.training.state import AdamW, TrainState, make_optimizer, update_if_finite

OPTIMIZER = make_optimizer(
    AdamW(steps=10, learning_rate=0.1, warmup_steps=0, decay="constant", adam_b2=0.99, weight_decay=0.0, clip_norm=1.0)
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


def test_an_array_is_cut_along_its_longest_axis_that_divides(mesh):
    shapes = {(3, 8): (None, AXIS), (16, 8): (AXIS, None), (5,): (None,), (): (), (4, 6): (AXIS, None), (0,): (None,)}
    for shape, spec in shapes.items():
        assert fsdp.cut(mesh, jnp.zeros(shape)).spec == PartitionSpec(*spec), shape


def test_a_state_in_parts_is_trained_like_a_whole_one(mesh):
    whole, parts = replicate(init()), fsdp.shard_state(mesh, init())
    of_all, of_one = fsdp.bytes_on_a_device(whole), fsdp.bytes_on_a_device(parts)
    cut_bytes = 4 * 3 * 8 * 4  # w, its average and Adam's two moments
    assert of_all - of_one == cut_bytes * 3 // 4  # of which each of four devices keeps a quarter
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    mapped, sharded = parallel_step(Stage()), fsdp.sharded_step(Stage(), mesh, init())
    for number in range(3):
        index = {"index": np.arange(8, dtype=np.int32)}
        args = np.int32(number), np.uint32(0)
        whole, expected = mapped(whole, {}, {"x": x}, shard(index), *args)
        parts, found = sharded(parts, {}, {"x": x}, fsdp.shard_batch(mesh, index), *args)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)
    assert parts.params["w"].addressable_shards[0].data.shape == (3, 2)
    assert int(parts.step) == 3


def way(losses, seconds):
    return {"losses": losses, "step_seconds": seconds, "state_bytes": 2_000_000}


def test_what_is_told_is_what_was_timed(tmp_path):
    """By hand; the first two steps compile."""
    lab = Lab("cpu", "data", tmp_path)
    found = {
        "1 device": {"jit": way([2.0, 1.0, 0.5], [9, 9, 1]), "pmap": way([2.0, 1.0, 0.5], [9, 9, 2])},
        "2 processes of 2": {
            "pmap": way([2.0, 1.000004, 0.5], [9, 9, 3]),
            "FSDP": way([2.0, 1.0, 0.499999], [9, 9, 6]),
        },
    }
    (tmp_path / "data_parallel").mkdir()
    for arm, ways in found.items():
        (tmp_path / "data_parallel" / f"{arm}.json").write_text(json.dumps(ways))
    one, two = (run.measure(lab, arm, 0) for arm in found)
    assert one["devices"] == 1 and one["ways"]["pmap"]["times"] == 2.0
    assert one["ways"]["pmap"]["largest_difference_in_millionths"] == 0.0
    assert two["devices"] == 4 and two["ways"]["FSDP"]["times"] == 2.0
    assert two["ways"]["pmap"]["largest_difference_in_millionths"] == pytest.approx(4.0)
    assert two["ways"]["FSDP"]["largest_difference_in_millionths"] == pytest.approx(2.0)
    assert two["ways"]["FSDP"]["megabytes_of_state"] == 2.0


def test_a_worker_that_fails_is_told(tmp_path):
    with pytest.raises(run.RunError, match=r"failed for 1 device; what it said is above"):
        run.run_of(Lab("smoke", str(tmp_path / "none"), tmp_path), "1 device")
