"""The engines: training by pmap and by FSDP is the same, over any mesh and with any number of micro-batches."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from ldm_jax.diffusion.random import Stream, example_keys, normal
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.pipeline.from_config import from_config, init_params
from ldm_jax.pipeline.trainable import LoRA, trainable_of
from ldm_jax.run_folder.sharded import checksums, is_sharded
from ldm_jax.runtime import fsdp
from ldm_jax.runtime.engine import PMAP, make_engine
from ldm_jax.training.contrastive import caption_arrays
from ldm_jax.training.from_config import (
    make_autoencoder_stage,
    make_classifier_stage,
    make_clip_stage,
    make_diffusion_stage,
)
from ldm_jax.training.loop import initial_state
from ldm_jax.training.optimizer import Optimization
from ldm_jax.training.state import GradientStage, init_state

IMAGES, LABELS = tiny.pictures(16)
LABELS = LABELS.astype(np.int32)
MOMENTS = np.random.default_rng(0).normal(size=(16, 1, 4, 4, 4)).astype(np.float32)
SCALE = {"shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
STEPS = 3
ADVERSARIAL = {
    "autoencoder__loss__adversarial": 0.5,
    "autoencoder__loss__adversarial_start": 0,
    "autoencoder__discriminator__learning_rate": 1e-2,
}


def tiny_config(**changes):
    """Its learning rate is as high in every step: the parameters move far from their start."""
    config = tiny.get_config().unlock()
    for stage in (config.autoencoder, config.clip, config.diffusion, config.classifier):
        stage.learning_rate, stage.warmup_steps, stage.decay = 1e-2, 0, "constant"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def a_diffusion_stage(config):
    """(stage, arguments of its init, frozen, resident)."""
    model = from_config(config, tiny.CLASS_NAMES)
    params, rng = jax.device_get(jax.jit(partial(init_params, model))(jax.random.key(1))), np.random.default_rng(1)
    # Layers that are 0 at first would leave those before them, and LoRA, without a gradient.
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), params)
    trainable = LoRA(2, 4.0) if config.lora.rank else trainable_of(config, model)
    frozen = trainable.frozen(params | {"first_stage": {}} | SCALE) | {"table": model.conditioning.table()}
    return make_diffusion_stage(model, trainable, config), (params,), frozen, {"moments": MOMENTS, "label": LABELS}


def a_classifier_stage(config):
    stage = make_classifier_stage(from_config(config, tiny.CLASS_NAMES), 4, config)
    return stage, (), {"first_stage": {}} | SCALE, {"moments": MOMENTS, "label": LABELS}


def an_autoencoder_stage(config):
    frozen = {"lpips": load_lpips("vgg16")[0]} if config.autoencoder.loss.perceptual else {}
    return make_autoencoder_stage(config), (), frozen, {"x": IMAGES}


def a_clip_stage(config):
    from ldm_jax.pipeline.clip import clip_of

    ids = np.tile(np.arange(4, dtype=np.int32)[:, None, None], (1, 1, config.clip.max_length))
    return make_clip_stage(clip_of(config), config), (), {"texts": caption_arrays(ids)}, {"x": IMAGES, "label": LABELS}


@dataclass(frozen=True, kw_only=True)
class Regression(GradientStage):
    """Linear regression from noisy numbers, the noise of each example by its key: it compiles in a moment."""

    def init(self, rng):
        params = {"w": jax.random.normal(rng, (3, 8)), "b": jnp.zeros(5)}
        return init_state(params, self.optimizer, ema_sigma_rels=(0.05, 0.1))

    def _example(self, batch, frozen, seed):
        keys = example_keys(seed, Stream.DIFFUSION, batch["step"], batch["id"])
        return {"x": batch["x"] + 0.1 * normal(keys, (3,))}

    def _loss(self, params, frozen, example, axis_name):
        error = (example["x"] @ params["w"]).sum(-1) + params["b"].sum() - frozen["factor"] * example["x"][:, 0]
        return jnp.square(error).mean(), {"error": jnp.abs(error).mean()}


def a_regression(config):
    rate = Optimization(10, 0.1, 0, "constant", 0.99, 0.0, 1.0)
    stage = Regression(flip=False, optimization=rate, ema_decay=0.9, accumulate=config.parallel.accumulate)
    x = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    return stage, (), {"factor": np.float32(2.0)}, {"x": x}


STAGES = {
    "regression": a_regression,
    "diffusion": a_diffusion_stage,
    "classifier": a_classifier_stage,
    "autoencoder": an_autoencoder_stage,
    "clip": a_clip_stage,
}


def trained(name, engine=PMAP, **changes):
    """(metrics of each step, the first state, the last state) of a stage of the tiny config with changes."""
    stage, arguments, frozen, resident = STAGES[name](tiny_config(**changes))
    state = engine.place_params(initial_state(stage.init, 0, *arguments, engine=engine))
    start = jax.device_get(state)
    frozen, resident, step, metrics = engine.place_params(frozen), engine.place(resident), engine.step(stage), []
    for number in range(STEPS):
        rows = {"index": (np.arange(8, dtype=np.int32) + 4 * number) % 16, "id": np.arange(8, dtype=np.int32)}
        batch = engine.shard_batch(rows)
        state, values = step(state, frozen, resident, batch, np.int32(number), np.uint32(5))
        metrics.append(jax.device_get(values))
    return metrics, start, state


@cache
def reference(name, **changes):
    """As `trained`, by pmap on one device."""
    return jax.device_get(trained(name, **changes))


def changes(start, state):
    """Name -> the change of each array of the parameters and of their averages, but of the biases of keys.

    A constant added to all keys changes no attention: its gradient is rounding, of which AdamW makes whole steps.
    """
    before, after = (
        jax.tree.leaves_with_path({"params": s.params, "ema": s.ema_params, "power": s.power_emas})
        for s in jax.device_get((start, state))
    )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in before]
    named = {name: new - old for name, (_, old), (_, new) in zip(names, before, after, strict=True)}
    return {name: change for name, change in named.items() if not name.endswith(("to_k/bias", "k_proj/bias"))}


def assert_same(one, other, rtol=2e-3):
    """Metrics, the first state, and the changes: of each array, to a hundredth of its norm."""
    for a, b in zip(one[0], other[0], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-5, err_msg=name)
    assert int(one[2].step) == int(other[2].step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    got, expected = changes(*one[1:]), changes(*other[1:])
    assert got.keys() == expected.keys()
    errors = {k: np.linalg.norm(got[k] - v) / max(np.linalg.norm(v), 1e-30) for k, v in expected.items()}
    assert max(errors.values()) <= 1e-2, max(errors, key=errors.get)
    assert np.mean([change.any() for change in expected.values()]) > 0.5


@pytest.mark.parametrize(
    ("name", "fsdp_size", "changes"),
    [
        *[("regression", size, {}) for size in (0, 1, 2, 4)],
        pytest.param("diffusion", 0, {}, marks=pytest.mark.slow),
        pytest.param("diffusion", 2, {"parallel__remat": True}, marks=pytest.mark.slow),
        pytest.param("diffusion", 1, {"diffusion__optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param("diffusion", 0, {"lora__rank": 2}, marks=pytest.mark.slow),
        pytest.param("classifier", 0, {}, marks=pytest.mark.slow),
        pytest.param("autoencoder", 0, ADVERSARIAL, marks=pytest.mark.slow),
        pytest.param("clip", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_state_is_trained_as_a_whole_one(name, fsdp_size, changes, request):
    expected = reference(name, **changes)
    request.getfixturevalue("four_devices")
    metrics, start, state = trained(name, make_engine("fsdp", fsdp_size), **changes)
    assert_same((metrics, start, state), expected)
    shards = fsdp_size or 4
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    assert largest.addressable_shards[0].data.size * shards == largest.size
    for others in (state.opt_state, *([state.power_emas] if name == "regression" else [])):
        assert any(is_sharded(leaf) for leaf in jax.tree.leaves(others)) == (shards > 1)
    gathered = make_engine("fsdp", fsdp_size).gather(state.ema_params)
    jax.tree.map(np.testing.assert_array_equal, gathered, state.ema_params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(gathered))


@pytest.mark.parametrize(
    ("name", "engine", "accumulate", "changes"),
    [
        *[("regression", engine, accumulate, {}) for engine in ("pmap", "fsdp") for accumulate in (1, 2)],
        ("regression", "pmap", 8, {}),
        ("diffusion", "pmap", 2, {}),
        pytest.param("diffusion", "fsdp", 2, {}, marks=pytest.mark.slow),
        pytest.param("classifier", "pmap", 2, {}, marks=pytest.mark.slow),
        pytest.param("autoencoder", "pmap", 2, {"autoencoder__type": "vq"}, marks=pytest.mark.slow),
        pytest.param("autoencoder", "fsdp", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_train_as_the_batch(name, engine, accumulate, changes, request):
    """On four devices, with eight micro-batches on one; the noise of an example is the same."""
    expected = reference(name, **changes)
    if accumulate < 8:
        request.getfixturevalue("four_devices")
    assert_same(trained(name, make_engine(engine), parallel__accumulate=accumulate, **changes), expected)


def test_an_array_is_sharded_along_its_longest_divisible_axis(four_devices):
    mesh = fsdp.make_mesh(0)
    expected = {(3, 8): (None, "fsdp"), (16, 8): ("fsdp", None), (5,): (None,), (): (), (4, 6): ("fsdp", None)}
    for shape, spec in (expected | {(0,): (None,)}).items():
        assert fsdp.sharding_of(mesh, np.zeros(shape)).spec == PartitionSpec(*spec), shape
    assert fsdp.make_mesh(2).shape == {"data": 2, "fsdp": 2}
    with pytest.raises(ValueError, match="engine is 'ddp'; it must be 'pmap' or 'fsdp'"):
        make_engine("ddp")


def test_a_checksum_is_that_of_any_sharding_and_finds_any_change(four_devices):
    array = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    arrays = {"whole": array} | {str(size): fsdp.shard_params(fsdp.make_mesh(size), array) for size in (0, 1, 2)}
    assert len(set(checksums(arrays).values())) == 1
    expected = checksums({"whole": array})["whole"]
    for row, column, bit in ((0, 0, 0), (7, 11, 31), (3, 5, 17)):
        changed = array.copy()
        changed.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
        assert checksums({"changed": changed})["changed"] != expected
    for other in (array[::-1], array.T.reshape(8, 12), np.zeros_like(array)):
        assert checksums({"other": np.ascontiguousarray(other)})["other"] != expected
    for kind in ("int32", "uint8", "float16"):
        values = checksums({str(start): np.arange(start, start + 6).astype(kind) for start in (0, 1)})
        assert values["0"] != values["1"]
