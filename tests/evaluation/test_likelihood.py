"""The bound's estimate: unbiased against the sum over all timesteps, and right on data whose entropy is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.likelihood import log_variance_bounds, prior_kl, vlb_term
from ldm_jax.diffusion.process import neighbours, posterior
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.evaluation.bound import bound_card, make_bound, range_edges, stratified_timesteps
from ldm_jax.models.first_stage import make_first_stage
from ldm_jax.runtime.parallel import replicate

T, MEAN, STD = 100, 0.1, 0.25
PROCESS = make_process("linear", T, beta_start=0.001, beta_end=0.15)
PARAMS = {"unet": {}, "conditioner": {}, "autoencoder": {}, "shift": np.zeros(1), "scale": np.ones(1)}


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


def measure(examples, *, learned, levels, seed=0, clip=np.inf):
    """The bound of the exact model, whose context is the label: 0, or 1 for a z0_hat that is 0.05 off."""
    unet = SimpleNamespace(
        apply=lambda _, z_t, t, label: exact(z_t, t.astype(int), learned) + 0.05 * label.reshape(-1, 1, 1, 1)
    )
    function = make_bound(
        unet=unet,
        conditioner=SimpleNamespace(apply=lambda _, label: label.astype(jnp.float32), null=0),
        first_stage=make_first_stage(None),
        process=PROCESS,
        prediction="z0",
        clip=clip,
        levels=levels,
        batch_size=512,
    )
    return function(replicate(PARAMS), examples, seed)


ENTROPY = 0.5 * np.log2(2 * np.pi * np.e * STD**2)  # of the density; of the pixels, of which 127.5 make 1, it is more


@pytest.mark.parametrize("levels, entropy", [(None, ENTROPY), (256, ENTROPY + np.log2(127.5))])
def test_the_bound_of_the_exact_model_is_the_entropy(levels, entropy):
    bound = measure({"x": pixels(3000)}, learned=True, levels=levels)
    assert bound.std < 0.02
    assert bound.total == pytest.approx(entropy, abs=0.015 + 3 * bound.std)
    assert bound.total == pytest.approx(bound.prior + sum(bound.ranges), rel=1e-6)
    assert bound.terms[0] == pytest.approx(bound.ranges[0], rel=1e-6)
    assert len(bound.terms) == T and None not in bound.terms
    worse = measure({"x": pixels(3000)}, learned=False, levels=levels)
    assert worse.total > bound.total + 0.05


def test_the_estimate_is_that_of_the_sum_over_all_timesteps():
    """In each range, for a model that is off, so that every term matters."""
    n = 2000
    bound = measure({"x": pixels(n), "label": np.ones(n, np.int32)}, learned=False, levels=None)
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
    np.testing.assert_allclose(bound.ranges, expected, rtol=0.05, atol=0.01)
    prior = float(prior_kl(z0, PROCESS).mean())
    assert bound.total == pytest.approx(every.sum() + prior, abs=4 * bound.std + 0.005)


def test_examples_draw_their_own_noise_and_the_label_counts():
    some = {"x": np.repeat(pixels(1), 4, axis=0), "label": np.zeros(4, np.int32)}
    one = measure(some, learned=False, levels=None)
    assert one.std > 0
    again, reseeded, other = (
        measure(some | {"label": np.full(4, label, np.int32)}, learned=False, levels=None, seed=seed)
        for label, seed in ((0, 0), (0, 1), (1, 0))
    )
    assert again == one != reseeded
    assert other.total != one.total
    assert other.prior == one.prior
    assert None in one.terms
    assert measure({"x": pixels(1)}, learned=False, levels=None).std is None


def test_z0_is_kept_within_bounds():
    plain, clipped = (measure({"x": pixels(64)}, learned=False, levels=None, clip=clip) for clip in (np.inf, 0.01))
    assert clipped.total > plain.total + 0.1


@pytest.mark.parametrize(
    "latents, labelled, learned, score, words",
    [
        (True, True, False, "bits/dim (latents)", "scaled latents, Gaussian decoder, given the class; fixed_large"),
        (False, False, True, "bits/dim", "8-bit pixels; learned variance; 100 timesteps in 8 ranges"),
    ],
)
def test_the_card_says_what_it_is_a_bound_of(latents, labelled, learned, score, words):
    images = pixels(8)
    bound = measure({"x": images}, learned=learned, levels=None)
    ((name, card),) = bound_card(
        bound, images, split="test[:8]", latents=latents, labelled=labelled, learned=learned
    ).items()
    assert name == card["score"] == score
    assert words in card["method"]
    assert (card["value"], card["std"], card["n"], card["better"]) == (bound.total, bound.std, 8, "lower")
    assert card["reference"] == "test[:8]"
