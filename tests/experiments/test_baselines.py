"""Baseline models of experiments/baselines: densities, autoregressive order, GAN losses, spectral norm."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from experiments.baselines import flow, gan, pixelcnn, run, vae
from experiments.baselines.models import GAN, SMALL, SPECTRAL, models
from experiments.baselines.stage import LikelihoodStage
from experiments.runner import Workspace
from experiments.untrained import CLASSES
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.training.from_config import make_autoencoder_stage
from ldm_jax.training.optimizer import Optimization

pytestmark = pytest.mark.slow

SHAPE = (4, 8, 1)
LABEL = jnp.array([1, 0])
KEYS = jax.random.split(jax.random.key(3), 2)


def random_params(model, *arguments):
    """Parameters without zeros, like a trained model's."""
    params = jax.jit(model.init)(jax.random.key(0), *arguments)["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, noisy)


def images(shape=SHAPE, n=2):
    return jnp.asarray(np.random.default_rng(5).integers(0, 256, (n, *shape)), jnp.uint8)


@pytest.fixture(scope="module")
def pixels():
    model = pixelcnn.PixelCNN(2, features=4, layers=9)  # a receptive field of all eight columns
    return model, random_params(model, jnp.zeros((1, *SHAPE)), LABEL[:1])


def test_a_pixel_depends_on_those_before_it_and_on_all_of_them(pixels):
    """By the Jacobians at several images, because at a single one units may be inactive."""
    model, params = pixels
    n = SHAPE[0] * SHAPE[1]

    def summed(x):
        return model.apply({"params": params}, x.reshape(1, *SHAPE), LABEL[:1]).reshape(n, -1).sum(axis=-1)

    slopes = jax.jit(jax.vmap(jax.jacrev(summed)))(to_pixels(images(n=8)).reshape(8, n))
    np.testing.assert_array_equal((slopes != 0).any(axis=0), np.tri(n, k=-1, dtype=bool))


def test_a_pixelcnn_samples_from_its_probabilities(pixels):
    """Bits per dim are those of its softmaxes, and each pixel is sampled from them with the same keys."""
    model, params = pixels
    samples = jax.jit(lambda params: pixelcnn.sample(model, params, LABEL, KEYS, SHAPE[:2]))(params)
    logits = np.asarray(model.apply({"params": params}, to_pixels(samples), LABEL))
    bits = pixelcnn.bits_per_dim(model, params, samples, LABEL)
    for i in range(2):
        nats = 0.0
        for number, (row, column) in enumerate(np.ndindex(SHAPE[:2])):
            pixel_logits = logits[i, row, column]
            assert samples[i, row, column, 0] == jax.random.categorical(
                jax.random.fold_in(KEYS[i], number), pixel_logits
            )
            nats -= float(jax.nn.log_softmax(pixel_logits)[samples[i, row, column, 0]])
        np.testing.assert_allclose(bits[i], nats / np.log(2) / 32, rtol=1e-5)


def test_a_pixelcnn_is_conditioned_on_the_class(pixels):
    model, params = pixels
    same = jnp.repeat(images()[:1], 2, axis=0)
    assert np.ptp(pixelcnn.bits_per_dim(model, params, same, LABEL)) > 1e-4


@pytest.fixture(scope="module")
def random_flow():
    model = flow.Flow(2, features=8, steps=2)
    return model, random_params(model, jnp.zeros((1, *SHAPE)), LABEL[:1])


def test_a_flow_is_invertible(random_flow):
    model, params = random_flow
    y = jax.random.normal(jax.random.key(7), (2, *SHAPE))
    latents, _ = model.apply({"params": params}, y, LABEL)
    assert [z.shape[1:] for z in latents] == flow.latent_shapes(SHAPE, 2) == [(2, 4, 2), (1, 2, 8)]
    back = model.apply({"params": params}, latents, LABEL, method="inverse")
    np.testing.assert_allclose(back, y, atol=1e-4)
    np.testing.assert_array_equal(flow.unsqueeze(flow.squeeze(y)), y)


def test_the_log_determinant_of_a_flow(random_flow):
    """Against the determinant of the 32 x 32 Jacobian."""
    model, params = random_flow
    y = jax.random.normal(jax.random.key(7), (1, *SHAPE))

    def flat(y):
        latents, _ = model.apply({"params": params}, y.reshape(1, *SHAPE), LABEL[:1])
        return jnp.concatenate([z.ravel() for z in latents])

    _, log_det = model.apply({"params": params}, y, LABEL[:1])
    np.testing.assert_allclose(log_det[0], jnp.linalg.slogdet(jax.jacfwd(flat)(y.ravel()))[1], rtol=1e-4)


def test_the_density_of_dequantized_pixels():
    x = images((2, 2, 1), 1)
    noise = jnp.full(x.shape, 0.25)
    y, log_det = flow.to_logits(x, noise)
    slope = jax.vmap(jax.grad(lambda value: flow.to_logits(value.reshape(1, 1, 1, 1), 0.0)[0].sum()))
    np.testing.assert_allclose(log_det[0], jnp.log(slope((x + noise).ravel())).sum(), rtol=1e-5)
    np.testing.assert_array_equal(flow.from_logits(y), x)


def test_the_bits_of_a_flow_without_couplings():
    """By hand: the latents of an image are its logits."""
    model = flow.Flow(2, features=8, steps=0)
    x = images()
    bits = flow.bits_per_dim(model, {"embed": {"embedding": jnp.zeros((2, 8))}}, x, LABEL, KEYS)
    noise = np.stack([jax.random.uniform(key, SHAPE) for key in KEYS])
    p = 0.05 + 0.9 * (np.asarray(x, np.float64) + noise) / 256
    density = np.exp(-0.5 * np.log(p / (1 - p)) ** 2) / np.sqrt(2 * np.pi) * 0.9 / 256 / (p * (1 - p))
    np.testing.assert_allclose(bits, -np.log2(density).mean(axis=(1, 2, 3)), rtol=1e-4)


def test_a_discretized_logistic_is_a_distribution():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(256, 1, 1, 1)
    for mean, log_scale in ((0.1, -3.0), (-1.2, -1.0), (0.97, -4.0)):
        nats = vae.log_likelihood(levels, jnp.float32(mean), jnp.float32(log_scale))
        assert float(jnp.exp(nats).sum()) == pytest.approx(1.0, abs=1e-4)
    middle = vae.log_likelihood(levels[128], jnp.float32(0.1), jnp.float32(-3.0)).item()
    edges = (np.array([128.5, 127.5]) / 127.5 - 1 - 0.1) * np.exp(3.0)
    assert middle == pytest.approx(np.log(np.subtract(*expit(edges))), abs=1e-4)


def test_the_vlb_of_a_vae_by_hand():
    model = vae.VAE(2, (4, 4, 1), features=4, latent=3)
    x = images((4, 4, 1))
    params = random_params(model, to_pixels(x), LABEL)
    moments = np.asarray(model.apply({"params": params}, to_pixels(x), LABEL, method="encode"), np.float64)
    mean, logvar = moments[..., :3], moments[..., 3:]
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(1, 2, 3))
    noise = np.stack([jax.random.normal(key, (1, 1, 3)) for key in KEYS])
    z = jnp.asarray(mean + np.exp(logvar / 2) * noise, jnp.float32)
    log_likelihood = vae.log_likelihood(x, *model.apply({"params": params}, z, LABEL, method="decode")).sum(
        axis=(1, 2, 3)
    )
    bits = jax.jit(lambda params: vae.bits_per_dim(model, params, x, LABEL, KEYS))(params)
    np.testing.assert_allclose(bits, (kl - log_likelihood) / 16 / np.log(2), rtol=1e-4)
    assert vae.sample(model, params, LABEL, KEYS).shape == (2, 4, 4, 1)


def gan_stage(spectral_norm=False, **changes):
    fields = {"loss": "hinge", "r1": 0.5} | changes
    generator = gan.Generator(2, (4, 4, 1), features=16, latent=4)
    discriminator = gan.Discriminator(2, features=4, spectral_norm=spectral_norm)
    return generator, gan.GANStage(
        generator, discriminator, adam=gan.Adam(1e-3, b1=0.5, b2=0.999), ema_decay=0.9, **fields
    )


BATCH = {"x": images((4, 4, 1), 4), "label": jnp.array([0, 1, 0, 1]), "id": jnp.arange(4), "step": jnp.int32(0)}


@pytest.mark.parametrize(("loss", "real", "fake"), [("hinge", 2.0, 0.0), ("non_saturating", 2 * np.log(2), np.log(2))])
def test_the_losses_of_a_gan_with_a_constant_discriminator(loss, real, fake):
    """A discriminator with zero weights has logit 0 for every image: each loss is known, and R1 is 0."""
    _, stage = gan_stage(loss=loss)
    state = jax.jit(stage.init)(jax.random.key(0))
    constant = state.replace(
        params=state.params | {"discriminator": jax.tree.map(jnp.zeros_like, state.params["discriminator"])}
    )
    trace = jax.jit(stage.trace)(constant, {}, BATCH, jnp.uint32(0))
    assert float(trace["losses"]["discriminator"]) == pytest.approx(real)
    assert float(trace["losses"]["generator"]) == pytest.approx(fake)


def test_the_gradient_penalty_of_a_gan_by_finite_differences():
    losses = {}
    for r1 in (0.0, 3.0):
        _, stage = gan_stage(r1=r1)
        state = jax.jit(stage.init)(jax.random.key(0))
        losses[r1] = float(jax.jit(stage.trace)(state, {}, BATCH, jnp.uint32(0))["losses"]["discriminator"])
    discriminator, x = gan.Discriminator(2, features=4), np.asarray(to_pixels(BATCH["x"]), np.float64)
    weights = state.params["discriminator"]
    logits = lambda x: np.asarray(discriminator.apply({"params": weights}, x, BATCH["label"]), np.float64)  # noqa: E731
    square = np.zeros(4)
    for row, column in np.ndindex(4, 4):
        step = np.zeros_like(x)
        step[:, row, column] = 1e-3
        square += ((logits(jnp.float32(x + step)) - logits(jnp.float32(x - step))) / 2e-3) ** 2
    assert losses[3.0] - losses[0.0] == pytest.approx(0.5 * 3.0 * square.mean(), rel=2e-2)


def test_a_gan_updates_both_networks_and_samples():
    generator, stage = gan_stage()
    state = jax.jit(stage.init)(jax.random.key(0))
    new, metrics = jax.jit(stage.step)(state, {}, BATCH, jnp.uint32(0))
    assert int(new.step) == 1 and metrics.keys() == {"loss", "discriminator", "grad_norm"}
    for name in ("generator", "discriminator"):
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params[name], state.params[name])
        assert max(jax.tree.leaves(moved)) > 1e-4
    samples = gan.sample(generator, new.ema_params["generator"], LABEL, KEYS)
    assert samples.shape == (2, 4, 4, 1) and samples.dtype == jnp.uint8
    wrong, _ = jax.jit(stage.step)(state, {}, BATCH | {"step": jnp.int32(5)}, jnp.uint32(0))
    assert int(wrong.step) == 0  # another step's batch
    with pytest.raises(ValueError, match="loss='wgan': must be one of hinge, non_saturating"):
        gan_stage(loss="wgan")


def test_spectral_norm_divides_by_the_largest_singular_values():
    """After enough power iterations the discriminator equals one with weights divided by NumPy's singular values."""
    _, stage = gan_stage(spectral_norm=True, r1=0.0)
    state, step = jax.jit(stage.init)(jax.random.key(0)), jax.jit(stage.step)
    converged = state
    for number in range(60):  # updates the singular vectors only
        new, _ = step(converged.replace(step=jnp.int32(number)), {}, BATCH | {"step": jnp.int32(number)}, jnp.uint32(0))
        converged = converged.replace(params=converged.params | {gan.SINGULAR: new.params[gan.SINGULAR]})

    def divided(weights):
        if weights.ndim < 2:
            return weights
        return weights / np.linalg.svd(np.asarray(weights).reshape(-1, weights.shape[-1]), compute_uv=False)[0]

    x, label, weights = to_pixels(BATCH["x"]), BATCH["label"], converged.params["discriminator"]
    variables = {"params": weights, gan.SINGULAR: converged.params[gan.SINGULAR]}
    logits = gan.Discriminator(2, features=4, spectral_norm=True).apply(variables, x, label)
    expected = gan.Discriminator(2, features=4).apply({"params": jax.tree.map(divided, weights)}, x, label)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5)
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(new.params[gan.SINGULAR]), jax.tree.leaves(state.params[gan.SINGULAR]))
    ]
    assert max(moved) > 0.1


def test_a_gan_without_spectral_norm_has_no_singular_vectors():
    _, stage = gan_stage()
    assert jax.eval_shape(stage.init, jax.random.key(0)).params[gan.SINGULAR] == {}


@pytest.mark.parametrize("budget", ["minutes", "gpu"])
def test_all_models_have_about_as_many_parameters(budget):
    def size(shapes):
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def shapes_of(stage):
        return jax.eval_shape(stage.init, jax.random.key(0)).params

    workspace = Workspace(budget, "", Path())
    config = workspace.config(run.diffusion_config(workspace))
    _, diffusion = on_paper(config, CLASSES)
    sizes = [size([shapes_of(make_autoencoder_stage(config)), diffusion])]
    sizes += [size(shapes_of(model.stage(10))) for model in models(run.SIZES[budget]).values()]
    assert max(sizes) / min(sizes) < 1.2


@pytest.mark.parametrize("name", models(SMALL))
def test_equal_stages_share_compiled_steps(name):
    """`parallel_step` compiles once for two equal stages."""
    one, same, other = (models(SMALL)[name].stage(steps) for steps in (10, 10, 20))
    assert one == same and hash(one) == hash(same)
    assert (one == other) == (name in (GAN, SPECTRAL))  # a constant learning rate


def test_a_likelihood_stage_reduces_its_loss(pixels):
    model, _ = pixels
    x = jnp.repeat(images()[:1], 4, axis=0)
    optimization = Optimization(
        steps=30, learning_rate=1e-2, warmup_steps=0, decay="constant", adam_b2=0.999, weight_decay=0.0, clip_norm=1e9
    )
    stage = LikelihoodStage(model, pixelcnn.bits_per_dim, SHAPE, optimization, ema_decay=0.9)
    state, step, losses = jax.jit(stage.init)(jax.random.key(0)), jax.jit(stage.step), []
    for number in range(30):
        batch = {"x": x, "label": jnp.zeros(4, jnp.int32), "id": jnp.arange(4), "step": jnp.int32(number)}
        state, metrics = step(state, {}, batch, jnp.uint32(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert stage.trace(state, {}, batch, jnp.uint32(0)).keys() == {"params", "loss", "gradient"}
