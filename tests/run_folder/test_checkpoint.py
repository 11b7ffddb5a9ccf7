"""Checkpoints: the names of their arrays, which have been the same since the first version, and whose they are."""

import errno

import jax
import numpy as np
import pytest
import tiny
from damage import array_files, flip_a_bit

from ldm_jax.errors import InputError, RunError
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import (
    STORED_NAMES,
    Checkpoints,
    ema_params,
    flatten,
    identity,
    load_latest,
    subtree,
    unflatten,
)
from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import init_state

OPTIMIZATION = Optimization(8, 1e-3, 2, "cosine", 0.99, 0.0, 1.0)
PARTS = {"denoiser": {"conv_in": {"kernel": np.ones((2, 3), np.float32)}},
         "conditioning": [{"embedding": np.zeros(4, np.float32)}]}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return jax.device_get(init_state(PARTS, make_optimizer(OPTIMIZATION)).replace(step=np.int32(3)))


def test_a_checkpoint_has_the_names_of_the_first_version(trained_run):
    """So that older runs can be read and resumed, and older versions can read newer runs."""
    names = {name.split("/")[1] for name in load_latest(trained_run / "diffusion") if name.startswith("ema_params/")}
    assert names == {"unet", "conditioner"}
    assert load_latest(trained_run / "diffusion").keys() >= {
        "step",
        "params/unet/conv_in/kernel",
        "opt_state/1/0/mu/unet/conv_in/kernel",
        "ema_params/conditioner/embedding/embedding",
    }


def test_arrays_are_read_back_under_their_names_in_memory(state):
    flat = flatten(state)
    assert {"params/unet/conv_in/kernel", "ema_params/conditioner/0/embedding", "step"} <= flat.keys()
    assert not any(part in STORED_NAMES for name in flat for part in name.split("/"))
    jax.tree.map(np.testing.assert_array_equal, unflatten(flat, state, where="there"), state)
    jax.tree.map(np.testing.assert_array_equal, ema_params(flat, state.params, "there"), state.ema_params)
    assert subtree(flat, "params/unet") == state.params["denoiser"]
    with pytest.raises(InputError, match="has no 'params/denoiser'; it holds "):
        subtree(flat, "params/denoiser")


def test_a_state_of_another_model_is_refused(state):
    flat = flatten(state)
    del flat["params/unet/conv_in/kernel"]
    with pytest.raises(
        InputError, match=r"there belongs to another model: 1 arrays are missing \['params/unet/conv_in"
    ):
        unflatten(flat, state, where="there")
    flat["params/unet/conv_in/kernel"] = np.ones((2, 3), np.float16)
    with pytest.raises(InputError, match=r"params/unet/conv_in/kernel is float16\[2, 3\] there, float32\[2, 3\] here"):
        unflatten(flat, state, where="there")


def test_the_newest_checkpoints_are_kept_and_those_of_given_steps(state, tmp_path):
    for always, kept in (((), {5, 6}), ((2, 4), {2, 4, 5, 6})):
        folder = tmp_path / str(len(always))
        with Checkpoints(folder, keep=2, identity={}, always=always) as checkpoints:
            for step in range(1, 7):
                checkpoints.save(state.replace(step=np.int32(step)))
        assert {int(path.name) for path in folder.glob("[0-9]*")} == kept


def test_a_half_trained_state_is_restored_whole_and_by_its_own_run_alone(state, tmp_path):
    config = tiny.get_config()
    recorded = identity(config, "diffusion") | {"init_from": "abc"}
    with Checkpoints(tmp_path, keep=2, identity=recorded) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(state)
        checkpoints.wait()
        like = init_state(jax.tree.map(np.zeros_like, PARTS), make_optimizer(OPTIMIZATION))
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(like), state)
    other = identity(config, "diffusion") | {"init_from": "abd"}
    with (
        Checkpoints(tmp_path, keep=2, identity=other) as checkpoints,
        pytest.raises(InputError, match="belongs to another run: its init_from is 'abc', not 'abd'"),
    ):
        checkpoints.restore(state)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "MemoryError"),
        (PermissionError(13, "Permission denied", "_METADATA"), r"\[Errno 13\] Permission denied: '_METADATA'"),
        *(
            (OSError(getattr(errno, name), name), rf"\[Errno \d+\] {name}")
            for name in ("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EAGAIN", "EHOSTDOWN")
        ),
        (ValueError("ABORTED: Stale file handle"), "ABORTED: Stale file handle"),
        (ValueError("PERMISSION_DENIED: Error opening"), "PERMISSION_DENIED: Error opening"),  # as TensorStore has it
        (ValueError("UNAVAILABLE: CURL error"), "UNAVAILABLE: CURL error"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_is_not_of_the_checkpoint_leaves_it(error, line, state, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    with Checkpoints(tmp_path, keep=2, identity={}) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_read_unchecked", fail)
            with pytest.raises(RunError, match=f"could not read {tmp_path}/3: {line}$"):
                checkpoints.restore(state)
            with pytest.raises(RunError, match=f"could not read {tmp_path}/3: {line}$"):
                load_latest(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(state), state)


def test_a_checkpoint_damaged_again_is_put_aside_again(state, tmp_path):
    """Each of three times, under a name of its own; none of them counts as a checkpoint."""
    with Checkpoints(tmp_path, keep=2, identity={}) as checkpoints:
        checkpoints.save(state)
    for names in ({"damaged.4"}, {"damaged.4", "damaged.4.2"}, {"damaged.4", "damaged.4.2", "damaged.4.3"}):
        with Checkpoints(tmp_path, keep=2, identity={}) as checkpoints:
            checkpoints.save(state.replace(step=np.int32(4)))
        for path in array_files(tmp_path / "4"):
            flip_a_bit(path)
        with Checkpoints(tmp_path, keep=2, identity={}) as checkpoints:
            assert checkpoints.restore(state).step == 3
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", *names}
        assert load_latest(tmp_path)["step"] == 3


@pytest.mark.parametrize(("damaged", "error"), [(False, RunError), (True, checkpoint._DamagedError)])
def test_all_hosts_end_alike_if_another_one_cannot_read_its_shards(damaged, error, state, tmp_path, monkeypatch):
    """A process of several asks twice: whether any cannot read, and whether for a reason that is no damage."""
    answers = iter([True, not damaged])
    monkeypatch.setattr(checkpoint, "any_host", lambda condition: next(answers))
    with Checkpoints(tmp_path, keep=2, identity={}) as checkpoints:
        checkpoints.save(state)
    with pytest.raises(error, match="another host cannot read it"):
        checkpoint._read(tmp_path, 3, (), {"of another model": np.zeros(2)})


@pytest.mark.parametrize(
    ("field", "stages"),  # whose checkpoints depend on the field
    [
        ("seed", {"autoencoder", "clip", "diffusion", "classifier"}),
        ("autoencoder.latent_channels", {"autoencoder", "diffusion", "classifier"}),
        ("diffusion.timesteps", {"diffusion", "classifier"}),
        ("diffusion.steps", {"diffusion"}),
        ("unet.layers_per_block", {"diffusion"}),
        ("lora.rank", {"diffusion"}),
        ("classifier.steps", {"classifier"}),
        ("clip.steps", {"clip"}),
        ("sampling.steps", set()),
        ("log_every", set()),
    ],
)
def test_what_the_checkpoints_of_a_stage_depend_on(field, stages):
    config, changed = tiny.get_config(), tiny.get_config().unlock()
    changed.update_from_flattened_dict({field: 7})
    every = ("autoencoder", "clip", "diffusion", "classifier")
    assert {stage for stage in every if identity(config, stage) != identity(changed, stage)} == stages
