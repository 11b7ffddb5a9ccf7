"""Nothing compiles twice: not when a seed, a solver, its steps, guidance or labels change, and not while training."""

import jax
import numpy as np
import pytest
import tiny

from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling import generate, guidance_models, tables
from ldm_jax.sampling.generate import request
from ldm_jax.training import from_config as training_from_config


@pytest.fixture
def clock(trained_run):
    """Counts, once everything that other tests use is there."""
    return CompileClock()


def test_a_sweep_of_sampling_compiles_each_part_once(trained_run, clock):
    model = pipeline_load.load(trained_run)
    generator = generate.build_generator(model.config, 4, 8)
    params = replicate(model.params)
    start = clock.count

    def draw(num, labels, *, guidance, seed, **table):
        return list(generator.latents(params, request(num, labels, guidance=guidance, seed=seed), table_of(**table)))

    def table_of(**changes):
        return tables.build_table(model.config, **changes)

    ((z, _),) = draw(8, [0, 1, 2, 3], guidance=1.0, seed=0, sampler="ddim", steps=2)
    generator.decode(params, z)
    first = clock.count - start
    assert first <= 4, "the initial latents, the solver, the decoder, and one to spare"
    for sampler in SOLVERS:
        for seed, steps in enumerate((1, 2, 5, 12, 19)):
            draw(3, [seed % 4], guidance=0.5 * seed, seed=seed, sampler=sampler, steps=steps)
    mask = np.zeros((4, 4, 1), bool)
    for changes in (
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "edm", "churn": 5.0},
        {"sampler": "ddpm", "resample": 2},
        {"sampler": "ddpm", "variance": "fixed_large"},
        {"sampler": "unipc", "spacing": "karras"},
        {"sampler": "heun", "spacing": (19, 7, 3, 1), "strength": 0.5},
    ):
        draw(11, [], guidance=7.5, seed=2**32 - 1, steps=4, **changes)
        wanted = request(3, [1], guidance=3.0, seed=1, z0=z[0], mask=mask, negative=2, rescale=0.5, interval=(0.2, 0.7))
        for z, _ in generator.latents(params, wanted, table_of(steps=4, **changes)):
            generator.decode(params, z)
    assert clock.count - start == first


def test_a_sweep_of_classifier_guidance_compiles_once(trained_run, clock):
    model = pipeline_load.load(trained_run)
    params = jax.jit(training_from_config.build_classifier_stage(model.config, 4).init)(jax.random.key(0)).params
    guide = guidance_models.Classifier(model.config, params["classifier"])
    generator = generate.build_generator(model.config, 4, 8, guidance_models.Guides(guide))
    params, table = replicate(model.params | params), tables.build_table(model.config)
    counts = []
    for scale, guidance, labels in ((0.0, 1.0, [0]), (2.0, 1.0, [1]), (9.0, 0.0, []), (0.5, 3.0, [2, 3])):
        scales = np.full(8, scale, np.float32) * np.arange(8)
        rest = {"classifier_scale": scales, "interval": (0.0, 0.1 + scale / 10)}
        wanted = request(8, labels, guidance=guidance, seed=0, **rest)
        list(generator.latents(params, wanted, table))
        counts.append(clock.count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("which", ["autoencoder", "diffusion"])
def test_training_compiles_one_step(which, clock):
    config = tiny.get_config().unlock()
    config.unet.block_out_channels, config.unet.attention = (8,), (False,)
    config.autoencoder.mid_block_attention = False
    images, labels = tiny.pictures(16)
    resident, frozen = {"x": images}, {}
    stage = training_from_config.build_autoencoder_stage(config)
    if which == "diffusion":
        stage = training_from_config.build_diffusion_stage(config, 4)
        moments = np.random.default_rng(0).normal(size=(16, 1, 4, 4, 4)).astype(np.float32)
        resident = {"moments": moments, "label": labels.astype(np.int32)}
        frozen = {"autoencoder": {}, "shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
    state, frozen, resident = replicate(jax.jit(stage.init)(jax.random.key(0))), replicate(frozen), replicate(resident)
    step, counts = parallel_step(stage.step), []
    start = clock.count
    for number in range(4):
        index = (np.arange(8) + number).astype(np.int32) % 16
        batch = shard({"index": index, "id": np.arange(8, dtype=np.int32)})
        state, _ = step(state, frozen, resident, batch, np.int32(number), np.uint32(7 + number))
        counts.append(clock.count - start)
    assert counts == [1, 1, 1, 1]
