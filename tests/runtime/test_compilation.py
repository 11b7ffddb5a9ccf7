"""Nothing compiles twice: not when a seed, a solver, its steps, guidance or labels change, and not while training."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.pipeline.from_config import build_classifier, from_config, init_params
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import NO_EDIT, Edit, Guidance, Recipe, solving_defaults
from ldm_jax.sampling.sampler import make_sampler
from ldm_jax.sampling.tables import make_table
from ldm_jax.training.from_config import make_autoencoder_stage, make_diffusion_stage


@pytest.fixture(scope="module")
def model():
    """A model, and its parameters on the device."""
    model, params = random_runs.random_model()
    return model, replicate(params)


def inputs_of(model, sampler, num, labels, *, seed=0, **guidance):
    """The inputs of `num` samples."""
    guidance = Guidance(**{"interval": [0.0, 1.0], **guidance})
    solving = solving_defaults(model[0], "ddim")
    recipe = Recipe(num, seed, labels, [], [8, 8], "float32", solving, guidance)
    return sample_inputs(*model, recipe, sampler)[1]


def table_of(model, *, sampler="ddim", steps=4, edit=NO_EDIT, **changes):
    return make_table(model[0], solving_defaults(model[0], sampler, steps)._replace(**changes), edit)


def test_a_sweep_of_sampling_compiles_each_part_once(model):
    sampler, clock = make_sampler(model[0], 8), CompileClock()

    def sample(inputs, table):
        return list(sampler.latents(model[1], inputs, table))

    inputs = inputs_of(model, sampler, 8, [0, 1, 2, 3], scale=1.0)
    ((z, _),) = sample(inputs, table_of(model, sampler="ddim", steps=2))
    sampler.decode(model[1], z)
    first = clock.count
    assert first <= 4, "the initial latents, the solver, the decoder, and one to spare"
    for name in SOLVERS:
        for seed, steps in enumerate((1, 2, 5, 12, 19)):
            inputs = inputs_of(model, sampler, 3, [seed % 4], scale=0.5 * seed, seed=seed)
            sample(inputs, table_of(model, sampler=name, steps=steps))
    mask = np.zeros((4, 4, 1), bool)
    for changes in (
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "edm", "churn": 5.0},
        {"sampler": "ddpm", "edit": Edit(resample=2)},
        {"sampler": "ddpm", "variance": "fixed_large"},
        {"sampler": "unipc", "spacing": "karras"},
        {"sampler": "heun", "spacing": [19, 7, 3, 1], "edit": Edit(strength=0.5)},
    ):
        table = table_of(model, **changes)
        sample(inputs_of(model, sampler, 11, [], scale=7.5, seed=2**32 - 1), table)
        guidance = {"scale": 3.0, "negative_label": 2, "rescale": 0.5, "interval": [0.2, 0.7]}
        inputs = inputs_of(model, sampler, 3, [1], seed=1, **guidance)
        inputs = inputs._replace(shared=inputs.shared._replace(z0=z[0], mask=mask), init_image=True)
        for z, _ in sample(inputs, table):
            sampler.decode(model[1], z)
    assert clock.count == first


@pytest.mark.slow
def test_a_sweep_of_classifier_guidance_compiles_once(model):
    classifier = build_classifier(tiny.get_config(), 4)
    z, one = np.zeros((1, *model[0].latent_shape), np.float32), np.ones(1, np.float32)
    params = model[1] | {"classifier": jax.jit(classifier.init)(jax.random.key(0), z, one, one)["params"]}
    params, sampler, table = replicate(params), make_sampler(model[0], 8, classifier), table_of(model)
    clock, counts = CompileClock(), []
    for scale, guidance, labels in ((0.0, 1.0, [0]), (2.0, 1.0, [1]), (9.0, 0.0, []), (0.5, 3.0, [2, 3])):
        interval = [0.0, 0.1 + scale / 10]
        inputs = inputs_of(model, sampler, 8, labels, scale=guidance, classifier="run", interval=interval)
        scales = np.full(8, scale, np.float32) * np.arange(8, dtype=np.float32)
        inputs = inputs._replace(samples=inputs.samples._replace(classifier_scale=scales))
        list(sampler.latents(params, inputs, table))
        counts.append(clock.count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("which", [pytest.param("autoencoder", marks=pytest.mark.slow), "diffusion"])
def test_training_compiles_one_step(which):
    """A stage made anew of an equal config has it too."""
    config = tiny.get_config().unlock()
    config.unet.attention = (False,)
    config[which].learning_rate = 0.0123  # another than in any other test, whose step would be shared
    images, labels = tiny.pictures(16)

    def make():
        if which == "autoencoder":
            return make_autoencoder_stage(config)
        model = from_config(config, tiny.CLASS_NAMES)
        return make_diffusion_stage(model, trainable_of(config, model), config)

    stage, resident, frozen = make(), {"x": images}, {}
    init = stage.init
    if which == "diffusion":
        init = lambda rng: stage.init(rng, init_params(stage.model, rng))  # noqa: E731
        moments = np.random.default_rng(0).normal(size=(16, 1, 4, 4, 4)).astype(np.float32)
        resident = {"moments": moments, "label": labels.astype(np.int32)}
        frozen = {"first_stage": {}, "shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
        frozen["table"] = stage.model.conditioning.table()
    state, frozen, resident = replicate(jax.jit(init)(jax.random.key(0))), replicate(frozen), replicate(resident)
    clock, counts = CompileClock(), []
    for number in range(4):
        step = parallel_step(stage if number < 2 else make())
        index = (np.arange(8) + number).astype(np.int32) % 16
        batch = shard({"index": index, "id": np.arange(8, dtype=np.int32)})
        state, _ = step(state, frozen, resident, batch, np.int32(number), np.uint32(7 + number))
        counts.append(clock.count)
    assert int(state.step) == 4
    assert counts == [1, 1, 1, 1]


@dataclass(frozen=True)
class Scaled:
    """A stage that counts how often it is traced."""

    factor: float

    def step(self, state, frozen, batch, seed, *, axis_name, negative=False):
        TRACED.append((self.factor, negative))
        state = state + self.factor * (-1 if negative else 1) * jax.lax.pmean(batch["x"].mean(), axis_name)
        return state, {"loss": state}


TRACED = []


def test_equal_stages_share_a_step_of_each_variant():
    """Whichever is there first; another one, or other arguments that are compiled in, have a step of their own."""

    def run(stage, **static):
        arguments = replicate(np.float32(0)), {}, {}, shard({"x": np.arange(8, dtype=np.float32)})
        return float(parallel_step(stage, **static)(*arguments, np.int32(0), np.uint32(0))[0])

    assert parallel_step(Scaled(2.0)) is parallel_step(Scaled(2.0))
    assert [run(Scaled(2.0)), run(Scaled(2.0)), run(Scaled(3.0))] == [7.0, 7.0, 10.5]
    assert [run(Scaled(2.0), negative=True), run(Scaled(2.0), negative=True)] == [-7.0, -7.0]
    assert TRACED == [(2.0, False), (3.0, False), (2.0, True)]
