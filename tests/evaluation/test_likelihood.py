"""The VLB's estimate: unbiased against the sum over all timesteps, and right on data whose entropy is known."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.likelihood import log_variance_bounds, prior_kl, vlb_term
from ldm_jax.diffusion.process import neighbours, posterior
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.evaluation.likelihood import make_vlb, range_edges, stratified_timesteps, vlb_card
from ldm_jax.models.conditioning import EncodedConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.parallel import replicate

T, MEAN, STD = 100, 0.1, 0.25
PROCESS = make_process("linear", T, beta_start=0.001, beta_end=0.15)
PARAMS = {"denoiser": {}, "first_stage": {}, "shift": np.zeros(1), "scale": np.ones(1)}


@pytest.mark.parametrize("T, edges", [(2, [0, 1, 2]), (4, [0, 1, 2, 4]), (20, [0, 1, 2, 4, 8, 16, 20])])
def test_ranges_double_and_cover_every_timestep(T, edges):
    assert range_edges(T).tolist() == edges


def test_each_image_has_a_uniform_timestep_of_each_range_and_all_images_go_through_it_evenly():
    n, T, seeds = 32, 40, 1500
    t = np.stack([stratified_timesteps(n, T, seed) for seed in range(seeds)])  # [seeds, n, ranges]
    for j, (first, end) in enumerate(zip(range_edges(T), range_edges(T)[1:])):
        width = end - first
        assert t[..., j].min() == first and t[..., j].max() == end - 1
        for image in (0, n - 1):
            count = np.bincount(t[:, image, j] - first, minlength=width)
            expected = seeds / width
            assert np.abs(count - expected).max() <= 4.5 * np.sqrt(expected)
        visits = np.stack([np.bincount(some - first, minlength=width) for some in t[:100, :, j]])
        assert visits.min() >= n // width and visits.max() <= -(-n // width)
    assert (t[0] != t[1]).any()


def pixels(n, seed=0):
    """uint8 [n, 4, 4, 1] of N(MEAN, STD^2) in x, of which none lies at the ends."""
    x = np.random.default_rng(seed).normal(MEAN, STD, (n, 4, 4, 1))
    return np.round(x.clip(-1, 1) * 127.5 + 127.5).astype(np.uint8)


def exact(z_t, t, learned):
    """E[z0 | z_t], and beside it where Var[z_{t-1} | z_t] lies, from t = 1 on."""
    a2 = PROCESS.alpha**2
    on_z0, _, small = posterior(*neighbours(PROCESS))
    low, high = log_variance_bounds(PROCESS)
    variance = small + on_z0**2 * STD**2 * (1 - a2) / (a2 * STD**2 + 1 - a2)
    v = jnp.asarray(2 * (np.log(variance) - low) / np.where(high > low, high - low, 1) - 1, jnp.float32)
    a2 = jnp.asarray(a2, jnp.float32)[t].reshape(-1, 1, 1, 1)
    z0_hat = MEAN + jnp.sqrt(a2) * STD**2 / (a2 * STD**2 + 1 - a2) * (z_t - jnp.sqrt(a2) * MEAN)
    return jnp.concatenate([z0_hat, jnp.full_like(z_t, v[t].reshape(-1, 1, 1, 1))], -1) if learned else z0_hat


@dataclass(frozen=True)
class Exact:
    """The exact denoiser of that data, whose z0_hat is off by the context [B]."""

    learned: bool
    in_channels = 1

    @property
    def out_channels(self):
        return 2 if self.learned else 1

    def apply(self, params, z_t, t, context):
        return exact(z_t, t.astype(int), self.learned) + context.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Identity:
    """An autoencoder whose latents are the pixels."""

    downsampling = 1

    def apply(self, params, x, method):
        return x


def model_of(*, learned, latents):
    return LatentDiffusion(
        denoiser=Exact(learned),
        first_stage=FirstStage(Identity() if latents else None),
        conditioning=EncodedConditioning(),
        concat=None,
        process=PROCESS,
        prediction="z0",
        image_shape=(4, 4, 1),
        defaults=None,
    )


def measure(x, *, learned, latents, offset=0.0, seed=0):
    """The VLB of images under the exact model whose z0_hat is off by `offset`."""
    examples = {"x": x, "cond": {"context": np.full(len(x), offset, np.float32)}}
    return make_vlb(model_of(learned=learned, latents=latents), 512)(replicate(PARAMS), examples, seed)


ENTROPY = 0.5 * np.log2(2 * np.pi * np.e * STD**2)  # of the density; of the pixels, of which 127.5 make 1, it is more


@pytest.mark.parametrize("latents, entropy", [(True, ENTROPY), (False, ENTROPY + np.log2(127.5))])
def test_the_vlb_of_the_exact_model_is_the_entropy(latents, entropy):
    vlb = measure(pixels(3000), learned=True, latents=latents)
    assert vlb.std < 0.02
    assert vlb.total == pytest.approx(entropy, abs=0.015 + 3 * vlb.std)
    assert vlb.total == pytest.approx(vlb.prior + sum(vlb.ranges), rel=1e-6)
    assert vlb.terms[0] == pytest.approx(vlb.ranges[0], rel=1e-6)
    assert len(vlb.terms) == T and None not in vlb.terms
    worse = measure(pixels(3000), learned=False, latents=latents)
    assert worse.total > vlb.total + 0.05


def test_the_estimate_is_that_of_the_sum_over_all_timesteps():
    """In each range, for a model that is off, so that every term matters."""
    vlb = measure(pixels(2000), learned=False, latents=True, offset=0.05)
    z0 = jnp.asarray(pixels(20_000, seed=1)[:, :1, :1] / 127.5 - 1, jnp.float32)

    @jax.jit
    def term(t):
        eps = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), z0.shape)
        at = jnp.full(len(z0), t)
        z_t = q_sample(z0, at, eps, PROCESS)
        z0_hat = exact(z_t, at, False) + 0.05
        return vlb_term(z0, z_t, z0_hat, at, PROCESS, variance="fixed_large").mean()

    every = np.array([term(t) for t in range(T)])
    expected = np.add.reduceat(every, range_edges(T)[:-1])
    np.testing.assert_allclose(vlb.ranges, expected, rtol=0.05, atol=0.01)
    prior = float(prior_kl(z0, PROCESS).mean())
    assert vlb.total == pytest.approx(every.sum() + prior, abs=4 * vlb.std + 0.005)


def test_examples_have_their_own_noise_and_the_condition_counts():
    same = np.repeat(pixels(1), 4, axis=0)
    one, again, reseeded, other = (
        measure(same, learned=False, latents=True, offset=offset, seed=seed)
        for offset, seed in ((0, 0), (0, 0), (0, 1), (0.05, 0))
    )
    assert one.std > 0
    assert again == one != reseeded
    assert other.total != one.total
    assert other.prior == one.prior
    assert None in one.terms
    assert measure(pixels(1), learned=False, latents=True).std is None


def test_z0_hat_of_pixels_is_clipped():
    """All of it is beyond 1 for either offset."""
    pixel, clipped = (measure(pixels(64), learned=False, latents=False, offset=offset) for offset in (9.0, 10.0))
    assert clipped.total == pytest.approx(pixel.total, rel=1e-6)
    near, far = (measure(pixels(64), learned=False, latents=True, offset=offset) for offset in (9.0, 10.0))
    assert far.total > near.total + 1


@pytest.mark.parametrize(
    "latents, condition, learned, score, words",
    [
        (True, "class", False, "bits/dim (latents)", "scaled latents, Gaussian decoder, given the class; fixed_large"),
        (True, "caption", False, "bits/dim (latents)", "Gaussian decoder, given the caption; fixed_large"),
        (False, "", True, "bits/dim", "8-bit pixels; learned variance; 100 timesteps in 8 ranges"),
    ],
)
def test_the_card_says_what_it_is_a_bound_of(latents, condition, learned, score, words):
    images, model = pixels(8), model_of(learned=learned, latents=latents)
    vlb = measure(images, learned=learned, latents=latents)
    ((name, card),) = vlb_card(model, vlb, images, split="test[:8]", condition=condition).items()
    assert name == card["score"] == score
    assert words in card["method"]
    assert (card["value"], card["std"], card["n"], card["better"]) == (vlb.total, vlb.std, 8, "lower")
    assert card["reference"] == "test[:8]"
