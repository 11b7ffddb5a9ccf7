"""What a sample depends on: its seed, index, condition and guidance, and nothing else."""

import jax
import numpy as np
import pytest
import random_runs

from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.pipeline.model import apply_denoiser, decode_latents
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import CompileClock
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Guidance, Recipe, solving_defaults
from ldm_jax.sampling.sampler import PREVIEWS, SNAPSHOTS, make_sampler, smallest_batch
from ldm_jax.sampling.tables import make_table

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
ALL = [0, 1, 2, 3]


class Model:
    """A tiny model, its parameters on the device, and how it is sampled."""

    def __init__(self, changes=()):
        self.model, params = random_runs.random_model(changes)
        self.params = replicate(params)

    def inputs(
        self,
        num=8,
        labels=ALL,
        *,
        scale=1.5,
        seed=5,
        negative_label=None,
        interval=(0.0, 1.0),
        rescale=0.0,
        sampler="ddpm",
    ):
        guidance = Guidance(scale, list(interval), rescale, negative_label=negative_label)
        solving = solving_defaults(self.model, sampler)
        recipe = Recipe(num, seed, list(labels), [], [8, 8], "float32", solving, guidance)
        return sample_inputs(self.model, self.params, recipe, self.sampler())[1]

    def sampler(self, batch_size=8):
        return make_sampler(self.model, batch_size)

    def table(self, sampler="ddpm", steps=5, **changes):
        return make_table(self.model, solving_defaults(self.model, sampler, steps)._replace(**changes))

    def latents(self, inputs, batch_size=8, **changes):
        batches = self.sampler(batch_size).latents(self.params, inputs, self.table(**changes))
        return np.concatenate([z for z, _ in batches])

    def sample(self, *args, **guidance):
        return self.latents(self.inputs(*args, **guidance))


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.mark.parametrize("batch_size", [4, 16])
def test_the_batch_does_not_matter(model, batch_size):
    """ddpm: the noise of each step is the sample's own as well."""
    inputs = model.inputs(11)
    np.testing.assert_allclose(model.latents(inputs, batch_size), model.latents(inputs), **CLOSE)


def test_the_order_does_not_matter(model):
    order, inputs = np.random.default_rng(0).permutation(11), model.inputs(11)
    shuffled = inputs._replace(samples=jax.tree.map(lambda rows: rows[order], inputs.samples))
    np.testing.assert_allclose(model.latents(shuffled), model.latents(inputs)[order], **CLOSE)


def test_seed_index_label_and_guidance_do_matter(model):
    def one(index=3, label=2, scale=1.5, seed=5):
        inputs = model.inputs(1, [label], scale=scale, seed=seed)
        return model.latents(inputs._replace(samples=inputs.samples._replace(index=np.int32([index]))))

    plain = one()
    np.testing.assert_array_equal(plain, one())
    for changed in (one(index=4), one(seed=6), one(label=1), one(scale=4.0)):
        assert np.abs(changed - plain).max() > 0.01


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional(model):
    conditional, unconditional = model.sample(8, [2], scale=1.0), model.sample(8, [], scale=1.0)
    np.testing.assert_allclose(model.sample(8, [2], scale=1.0 + 1e-6), conditional, **CLOSE)  # 1 skips guidance
    np.testing.assert_allclose(model.sample(8, [2], scale=0.0), unconditional, **CLOSE)
    assert np.abs(conditional - unconditional).max() > 0.01


def test_guidance_in_an_interval(model):
    everywhere, nowhere = (model.sample(8, [2], scale=scale) for scale in (3.0, 1.0))
    whole, last, some = (
        model.sample(8, [2], scale=3.0, interval=interval) for interval in ((0.0, 1.0), (0.96, 1.0), (0.3, 0.7))
    )
    np.testing.assert_allclose(whole, everywhere, **CLOSE)
    np.testing.assert_allclose(last, nowhere, **CLOSE)  # t / T is at most 0.95
    assert min(np.abs(some - other).max() for other in (everywhere, nowhere)) > 0.01


def test_rescaling_and_a_negative_label_matter(model):
    plain, itself = model.sample(8, [2], scale=4.0), model.sample(8, [2], scale=4.0, negative_label=2)
    for changed in (model.sample(8, [2], scale=4.0, rescale=1.0), model.sample(8, [2], scale=4.0, negative_label=3)):
        assert np.abs(changed - plain).max() > 0.01
    np.testing.assert_allclose(itself, model.sample(8, [2], scale=1.0), **CLOSE)


def test_the_options_of_a_solver_matter(model):
    options = [{}, {"churn": 3.0}, {"spacing": "karras"}, {"spacing": (19, 16, 13, 10, 5)}, {"sampler": "plms"}]
    inputs = model.inputs(11)
    latents = [model.latents(inputs, **{"sampler": "edm", **changes}) for changes in options]
    for i, one in enumerate(latents):
        for other in latents[i + 1 :]:
            assert np.abs(one - other).max() > 0.002


def test_solver_steps_guidance_and_seed_compile_nothing(model):
    """An equal model, made anew, shares what is compiled."""
    model.latents(model.inputs(8, [2], scale=3.0))
    clock, again = CompileClock(), Model()
    inputs = again.inputs(8, [1, 0], scale=0.5, seed=9, interval=(0.2, 0.5))
    again.latents(inputs, sampler="ddpm", variance="fixed_large")
    assert again.sampler() is model.sampler()
    assert clock.count == 0


@pytest.fixture(scope="module")
def pixel_model():
    """Diffusion on pixels with a learned variance."""
    return Model((("autoencoder.type", "none"), ("diffusion.variance", "learned")))


def test_the_variance_matters_to_ddpm_and_compiles_nothing(pixel_model):
    model = pixel_model
    inputs = model.inputs(8, [0, 1], scale=2.0)
    first, clock = model.latents(inputs, variance="fixed_small"), CompileClock()
    learned, large, again = (model.latents(inputs, variance=v) for v in ("learned", "fixed_large", "fixed_small"))
    np.testing.assert_array_equal(again, first)
    for one, other in ((learned, first), (large, first), (learned, large)):
        assert np.abs(one - other).max() > 0.01
    assert clock.count == 0


@pytest.mark.parametrize(("sampler", "variance", "matters"), [
    ("ddpm", "learned", True),
    ("ddpm", "fixed_small", False),
    ("ddim", "fixed_small", False),
    ("dpmpp_2m", "fixed_small", False),
    ("unipc", "fixed_small", False),
])  # fmt: skip
def test_the_predicted_variance_matters_to_ddpm_with_a_learned_variance_alone(sampler, variance, matters, pixel_model):
    """The second half of the denoiser's channels, here one of two."""
    model, inputs = pixel_model, pixel_model.inputs(8, [0, 1], scale=2.0)
    conv = model.params["denoiser"]["conv_out"]
    changed = model.params["denoiser"] | {"conv_out": conv | {"bias": conv["bias"] + np.float32([0, 3])}}
    table = model.table(sampler, variance=variance)
    ((before, _),) = model.sampler().latents(model.params, inputs, table)
    ((after, _),) = model.sampler().latents(model.params | {"denoiser": changed}, inputs, table)
    assert np.isfinite(after).all() and np.array_equal(before, after) is not matters


def test_the_trajectory_leads_from_noise_to_the_sample(model):
    sampler, table, inputs = model.sampler(), model.table("ddim", 20), model.inputs(11).first(9)
    frames = sampler.trajectory(model.params, inputs, table)
    assert frames.shape == (SNAPSHOTS, 9, 8, 8, 1)
    assert frames.dtype == np.uint8
    images = np.concatenate(list(sampler.images(model.params, inputs, table)))
    np.testing.assert_array_equal(frames[-1], images)
    for z, z0_hats in sampler.latents(model.params, inputs, table):
        np.testing.assert_allclose(z0_hats[:, -1], z, **CLOSE)
        assert (z0_hats[:, 0] != z).any()


def test_the_initial_noise_may_be_scaled_or_begin_from_an_image(model):
    """sigma_T eps as in diffusers' init_noise_sigma; alpha z0 + sigma eps of an image."""
    table, inputs = model.table("ddim", 4), model.inputs(4, scale=1.0)
    noise = np.asarray(initial_latents(sample_keys(np.uint32(5), np.arange(4)), model.model.latent_shape))
    z0 = np.full(model.model.latent_shape, 0.5, np.float32)

    def with_noise(z_T, **changes):
        some = inputs._replace(samples=inputs.samples._replace(z_T=np.float32(z_T)), **changes)
        return model.latents(some, sampler="ddim", steps=4)

    alpha, sigma = float(table.alpha[0]), float(table.sigma[0])
    plain = model.latents(inputs, sampler="ddim", steps=4)
    np.testing.assert_allclose(with_noise(noise), plain, **CLOSE)
    scaled = model.latents(inputs._replace(scaled_initial_noise=True), sampler="ddim", steps=4)
    np.testing.assert_allclose(with_noise(sigma * noise), scaled, **CLOSE)
    image = inputs._replace(init_image=True, shared=inputs.shared._replace(z0=z0))
    from_image = model.latents(image, sampler="ddim", steps=4)
    np.testing.assert_allclose(with_noise(alpha * z0 + sigma * noise), from_image, **CLOSE)
    assert np.abs(plain - from_image).max() > 0.01


def test_decoding_and_encoding_take_any_number(model):
    z = np.random.default_rng(0).normal(size=(3, *model.model.latent_shape)).astype(np.float32)
    decoded = model.sampler().decode(model.params, z)
    by_hand = np.asarray(decode_latents(model.model, model.params, z))
    np.testing.assert_allclose(decoded, np.round(by_hand.clip(-1, 1) * 127.5 + 127.5), atol=1)
    assert model.sampler().encode(model.params, np.zeros((11, 8, 8, 1), np.uint8)).shape == (11, *z.shape[1:])


def test_mean_flow_on_pixels_is_not_clipped_before_the_last_step():
    """Over an interval z_t - t u is no estimate of the data: a step is z_t - (t - r) u, whatever its values."""
    changes = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow", "autoencoder.type": "none"}
    model = Model(tuple((changes | {"diffusion.objective": "mean_flow"}).items()))
    params = model.params | {"denoiser": jax.tree.map(lambda leaf: 3 * leaf, model.params["denoiser"])}
    inputs, table = model.inputs(4, scale=1.0, sampler="ddim"), model.table("ddim", 2)
    ((z, _),) = model.sampler(4).latents(params, inputs, table)
    expected = np.asarray(initial_latents(sample_keys(np.uint32(5), np.arange(4)), model.model.latent_shape))
    cond = model.model.conditioning.encode(params["conditioning"], inputs.samples.cond)
    for i in range(2):
        interval = np.full(4, table.sigma[i] - table.reached_sigma[i], np.float32)
        t = np.full(4, table.t[i], np.float32)
        u = apply_denoiser(model.model, params, expected, t, cond | {"interval": interval})
        expected = expected - interval[:, None, None, None] * u
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("num", "batch_size", "devices", "expected"), [
    (8, 64, 1, 8),
    (9, 64, 4, 12),
    (99, 64, 4, 64),
    (20, 8, 3, 6),  # a model's own batch need not divide over the devices
    (4, 8, 3, 6),
    (20, 1, 4, 4),
])  # fmt: skip
def test_smallest_batch(num, batch_size, devices, expected):
    assert smallest_batch(num, batch_size, devices) == expected


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_sampling_with_previews_is_the_same(model, sampler):
    """A solver with noise and one with a history, in parts that a watcher sees: z0_hat of the last is the sample."""
    inputs, seen = model.inputs(11), []
    table = model.table(sampler, steps=15)
    watched = [*model.sampler(8).watched_latents(model.params, inputs, table, seen.append)]
    plain = [z for z, _ in model.sampler(8).latents(model.params, inputs, table)]
    np.testing.assert_allclose(np.concatenate(watched), np.concatenate(plain), **CLOSE)
    assert [len(z) for z in watched] == [8, 3] and {progress.first for progress in seen} == {0, 8}
    assert len(seen) == 2 * PREVIEWS and seen[-1].fraction == 1
    assert seen[-1].z0_hat.shape == watched[-1].shape


def test_previews_compile_once(model):
    """Whatever the solver, number of steps, guidance and seed; and no more than once before the first."""
    ignore = [].append
    [*model.sampler(8).watched_latents(model.params, model.inputs(), model.table("ddpm", 5), ignore)]
    inputs, clock = model.inputs(scale=3.0, seed=9), CompileClock()
    for sampler, steps in (("ddim", 3), ("heun", 4), ("unipc", 20)):
        [*model.sampler(8).watched_latents(model.params, inputs, model.table(sampler, steps), ignore)]
    assert clock.count == 0
