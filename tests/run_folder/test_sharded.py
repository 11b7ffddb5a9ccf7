"""Checkpoints of a sharded state: its shards on disk, read in any sharding or whole; a damaged one is not."""

import jax
import numpy as np
import pytest
from damage import array_files, cut, flip_a_bit

from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import Checkpoints, load_latest
from ldm_jax.run_folder.sharded import checksums, is_sharded
from ldm_jax.runtime import fsdp
from ldm_jax.runtime.engine import make_engine

rng = np.random.default_rng(0)
STATE = {
    "params": {"kernel": rng.normal(size=(16, 8)).astype(np.float32), "bias": rng.normal(size=5).astype(np.float32)}
}
ENGINES = {"pmap": ("pmap", 0), "fsdp": ("fsdp", 0), "fsdp over 2": ("fsdp", 2)}


def state_at(step):
    return {"step": np.int32(step), "params": jax.tree.map(lambda leaf: leaf + np.float32(step), STATE["params"])}


def save(folder, engine, *steps):
    with Checkpoints(folder, keep=9, identity={"config": "mine"}) as checkpoints:
        for step in steps:
            checkpoints.save(engine.place_params(state_at(step)))


def restore(folder, engine):
    with Checkpoints(folder, keep=9, identity={"config": "mine"}) as checkpoints:
        return checkpoints.restore(engine.place_params(state_at(0)))


@pytest.mark.parametrize("reader", ENGINES)
@pytest.mark.parametrize("writer", ENGINES)
def test_any_engine_restores_what_any_engine_saved(writer, reader, tmp_path, four_devices):
    save(tmp_path, make_engine(*ENGINES[writer]), 4)
    restored = restore(tmp_path, make_engine(*ENGINES[reader]))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(4))
    assert is_sharded(restored["params"]["kernel"]) == (writer != "pmap" and reader != "pmap")
    if is_sharded(restored["params"]["kernel"]):
        assert restored["params"]["kernel"].sharding == fsdp.sharding_of(
            fsdp.make_mesh(ENGINES[reader][1]), restored["params"]["kernel"]
        )
    flat = load_latest(tmp_path)  # for sampling, on one host
    assert flat.keys() == {"step", "params/kernel", "params/bias"}
    assert all(isinstance(array, np.ndarray) for array in flat.values())
    np.testing.assert_array_equal(flat["params/kernel"], state_at(4)["params"]["kernel"])


def test_a_single_wrong_value_of_a_shard_is_noticed(tmp_path, four_devices, monkeypatch):
    """As if it had changed on the disk in a way that Orbax does not see."""
    engine = make_engine("fsdp")
    state = engine.place_params(state_at(8))
    save(tmp_path, engine, 4)
    wrong = {"params/kernel": checksums({"": state_at(8)["params"]["kernel"] * np.float32(1.0000001)})[""]}
    with monkeypatch.context() as change, Checkpoints(tmp_path, keep=9, identity={"config": "mine"}) as checkpoints:
        change.setattr(checkpoint, "checksums", lambda arrays: wrong)
        checkpoints.save(state)
    with pytest.raises(checkpoint._DamagedError, match="1 arrays differ from what was saved, the first is params/ker"):
        checkpoint._read(tmp_path, 8, (), {})
    assert int(restore(tmp_path, engine)["step"]) == 4


def test_what_is_saved_is_the_state_of_then(tmp_path, four_devices):
    """The next step takes its buffers (donation) while Orbax still writes."""
    engine, next_state = (
        make_engine("fsdp"),
        jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0),
    )
    state = engine.place_params(state_at(0))
    with Checkpoints(tmp_path, keep=9, identity={"config": "mine"}) as checkpoints:
        for _ in range(4):
            checkpoints.save(state)
            state = next_state(state)
    for step in range(4):
        np.testing.assert_array_equal(load_latest(tmp_path, step)["params/bias"], state_at(step)["params"]["bias"])


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
@pytest.mark.parametrize("reader", ENGINES)
def test_a_damaged_shard_falls_back(reader, damage, tmp_path, four_devices, capsys):
    save(tmp_path, make_engine("fsdp"), 4, 8)
    for path in array_files(tmp_path / "8"):
        damage(path)
    assert load_latest(tmp_path)["step"] == 4
    restored = restore(tmp_path, make_engine(*ENGINES[reader]))
    assert (tmp_path / "damaged.8").is_dir() and "going back to the one before" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(4))
