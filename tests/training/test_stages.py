"""The steps of the stages: what they compute, that they learn, and that devices and bad numbers change nothing."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy.stats import norm

from ldm_jax.diffusion.forward import noise_level, q_sample, target
from ldm_jax.diffusion.likelihood import vlb_term
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.diffusion.random import Stream, example_keys
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.conditioning import EncodedConditioning
from ldm_jax.models.first_stage import kl_divergence, sample_posterior
from ldm_jax.pipeline.from_config import from_config, init_params
from ldm_jax.pipeline.trainable import Parts, trainable_of
from ldm_jax.runtime.parallel import parallel_step, replicate, shard
from ldm_jax.training.diffusion import choose_caption
from ldm_jax.training.from_config import (
    autoencoder_terms,
    make_autoencoder_stage,
    make_classifier_stage,
    make_diffusion_stage,
)
from ldm_jax.training.loop import first_nonfinite
from ldm_jax.training.state import TrainState

IMAGES, LABELS = tiny.pictures(16)


class Compiled(NamedTuple):
    """A stage with its first state and its compiled step."""

    stage: Any
    state: Any
    step: Any


@cache
def compiled(which, **changes):
    """A stage of the tiny config with these fields changed ("a__b" is a.b)."""
    if which == "diffusion":
        stage = diffusion_stage(config(**changes))
        init = partial(initial, stage)
    elif which == "classifier":
        stage = make_classifier_stage(from_config(config(**changes), tiny.CLASS_NAMES), 4, config(**changes))
        init = stage.init
    else:
        stage = make_autoencoder_stage(config(**changes))
        init = stage.init
    return Compiled(stage, jax.jit(init)(jax.random.key(0)), jax.jit(stage.step))


def diffusion_stage(config, class_names=tiny.CLASS_NAMES):
    """Training of the whole model from scratch."""
    model = from_config(config, class_names)
    return make_diffusion_stage(model, trainable_of(config, model), config)


def initial(stage, rng):
    """The state of a diffusion stage before the first step, from a model at random."""
    return stage.init(rng, init_params(stage.model, rng))


def config(**changes):
    config = tiny.get_config().unlock()
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        assert leaf in node
        node[leaf] = value
    return config


def autoencoder_batch(n=8, step=0):
    return {"x": IMAGES[:n], "id": np.arange(n, dtype=np.int32), "step": np.int32(step)}


def moments_batch(n=8, step=0, channels=4):
    moments = np.random.default_rng(0).normal(size=(n, 1, 4, 4, channels)).astype(np.float32)
    label = LABELS[:n].astype(np.int32)
    return {"moments": moments, "label": label, "id": np.arange(n, dtype=np.int32), "step": np.int32(step)}


LATENTS = {"first_stage": {}, "shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
FROZEN = LATENTS | {"table": np.arange(5, dtype=np.int32)}  # four classes and the null condition

# Each option in one of them: every entry is a compilation.
AUTOENCODERS = {
    "kl": {},
    "vq, without attention, at a constant rate": {
        "autoencoder__type": "vq",
        "autoencoder__mid_block_attention": False,
        "autoencoder__decay": "constant",
    },
    "adversarial, flipped": {
        "autoencoder__loss__adversarial": 0.5,
        "autoencoder__mid_block_attention": False,
        "data__flip": True,
    },
}


def compiled_autoencoder(name):
    return compiled("autoencoder", autoencoder__steps=60, autoencoder__learning_rate=3e-3, **AUTOENCODERS[name])


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_autoencoder_learns_one_batch(name):
    _, state, step = compiled_autoencoder(name)
    losses = []
    for number in range(60):
        state, metrics = step(state, {}, autoencoder_batch(step=number), np.uint32(0))
        losses.append(float(metrics["l1"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    if "vq" in name:
        assert 1 <= metrics["perplexity"] <= 8
        assert 0 < metrics["codes_used"] <= 1
    if "adversarial" in name:
        assert 0 < metrics["adversarial_weight"] < 1e4
        assert metrics["discriminator"] > 0


def test_before_its_start_the_adversary_neither_takes_part_nor_learns():
    stage, state, step = compiled_autoencoder("adversarial, flipped")
    early = jax.jit(partial(stage.step, adversarial=False))
    same = AUTOENCODERS["adversarial, flipped"] | {"autoencoder__loss__adversarial": 0.0}
    alone = compiled("autoencoder", autoencoder__steps=60, autoencoder__learning_rate=3e-3, **same)
    without = TrainState(state.step, drop(state.params), state.ema_params, drop(state.opt_state))
    expected, _ = alone.step(without, {}, autoencoder_batch(), np.uint32(0))
    after, metrics = early(state, {}, autoencoder_batch(), np.uint32(0))
    jax.tree.map(np.testing.assert_array_equal, drop(after.params), expected.params)
    for which in ("params", "opt_state"):
        old, new = (getattr(s, which)["discriminator"] for s in (state, after))
        jax.tree.map(np.testing.assert_array_equal, old, new)
    assert "adversarial_weight" not in metrics
    # Adam's first step has learning rate 0 (warm-up), so the second is the one that moves the discriminator.
    for number in (1, 2):
        before = after
        after, metrics = step(before, {}, autoencoder_batch(step=number), np.uint32(0))
        assert metrics["adversarial_weight"] > 0
    pairs = zip(jax.tree.leaves(before.params["discriminator"]), jax.tree.leaves(after.params["discriminator"]))
    assert any((old != new).any() for old, new in pairs)


@pytest.mark.parametrize("perceptual, adversarial", [(0.5, 0.2), (0.5, 0.0), (0.0, 0.2), (0.0, 0.0)])
def test_terms_of_the_autoencoder_start_at_their_steps(perceptual, adversarial):
    weights = {"autoencoder__loss__perceptual": perceptual, "autoencoder__loss__adversarial": adversarial}
    starts = {"autoencoder__loss__perceptual_start": 3, "autoencoder__loss__adversarial_start": 5}
    terms = [autoencoder_terms(config(**weights, **starts), step) for step in range(7)]
    assert [step["perceptual"] for step in terms] == [step >= 3 and perceptual > 0 for step in range(7)]
    assert [step["adversarial"] for step in terms] == [step >= 5 and adversarial > 0 for step in range(7)]


def drop(tree):
    """Without the discriminator's part."""
    return {name: part for name, part in tree.items() if name != "discriminator"}


@pytest.mark.slow
def test_the_perceptual_term_is_measured_on_a_share(four_devices):
    changes = {"perceptual": 0.5, "perceptual_every": 4, "perceptual_size": 16}
    changes = {f"autoencoder__loss__{name}": value for name, value in changes.items()}
    plain = {"autoencoder__mid_block_attention": False}
    c = config(**changes, **plain)
    stage = make_autoencoder_stage(c)
    frozen, batch = {"lpips": load_lpips("vgg16")[0]}, autoencoder_batch()
    state = jax.jit(stage.init)(jax.random.key(0))
    after, metrics = jax.jit(stage.step)(state, frozen, batch, np.uint32(0))
    seen = jax.jit(lambda *args: {name: stage.trace(*args)[name] for name in ("x", "x_hat")})(
        state, frozen, batch, np.uint32(0)
    )
    distance = jax.jit(stage.lpips.apply)({"params": frozen["lpips"]}, seen["x"][::4], seen["x_hat"][::4]).mean()
    np.testing.assert_allclose(metrics["perceptual"], distance, rtol=1e-4)
    expected = metrics["l1"] + 0.5 * distance + c.autoencoder.loss.kl * metrics["kl"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    assert int(after.step) == 1
    without = make_autoencoder_stage(config(**changes | {"autoencoder__loss__perceptual": 0.0}, **plain))
    before_its_start = jax.jit(partial(stage.step, perceptual=False))(state, frozen, batch, np.uint32(0))
    jax.tree.map(np.testing.assert_array_equal, before_its_start, jax.jit(without.step)(state, {}, batch, np.uint32(0)))
    # Of four devices with two examples each, two have none to measure.
    step = parallel_step(stage)
    arrays = {name: value for name, value in batch.items() if name != "step"}
    metrics_many = step(replicate(jax.device_get(state)), frozen, {}, shard(arrays), np.int32(0), np.uint32(0))[1]
    for name in metrics:
        np.testing.assert_allclose(metrics_many[name], metrics[name], rtol=2e-3, atol=1e-5, err_msg=name)


PIXELS = IMAGES[:8] / np.float32(127.5) - 1
ADVERSARIAL = {
    "autoencoder__loss__reconstruction": 0.6,
    "autoencoder__loss__adversarial": 0.7,
    "autoencoder__loss__kl": 0.1,
    "autoencoder__discriminator__learning_rate": 0.02,
}


@cache
def one_step(**changes):
    """(stage, state before, state after, metrics) of a step on PIXELS without clipping and warm-up."""
    plain = {"clip_norm": 1e9, "mid_block_attention": False, "warmup_steps": 0, "decay": "constant"}
    stage = make_autoencoder_stage(
        config(**{f"autoencoder__{name}": value for name, value in plain.items()}, **changes)
    )
    state = jax.jit(stage.init)(jax.random.key(1))
    if stage.discriminator is not None:
        state.params["discriminator"]["conv_out"]["kernel"] *= 10  # logits on both sides of the hinge's margins
    return stage, state, *jax.jit(stage.step)(state, {}, autoencoder_batch(), np.uint32(3))


def gradient_of_first_step(state, name):
    """By Adam's first moment, (1 - beta1) times the gradient."""
    return jax.device_get(jax.tree.map(lambda mu: mu / 0.1, optax.tree.get(state.opt_state[name], "mu")))


def sampled_reconstruction(autoencoder, params):
    """(x_hat, moments) of `one_step`."""
    keys = example_keys(np.uint32(3), Stream.AUTOENCODER, 0, np.arange(8, dtype=np.int32))
    moments = autoencoder.apply({"params": params}, PIXELS, method="encode")
    raw = sample_posterior(moments, jax.vmap(jax.random.split)(keys)[:, 1])
    return autoencoder.apply({"params": params}, raw, method="decode"), moments


def test_one_backward_pass_gives_the_gradient_of_all_terms():
    """The step's gradient = that of the plain sum of the terms, with the adaptive weight of Esser 2021, eq. 7."""
    stage, state, after, metrics = one_step(**ADVERSARIAL)

    def terms(params):
        x_hat, moments = sampled_reconstruction(stage.autoencoder, params)
        adversarial = -stage.discriminator.apply({"params": state.params["discriminator"]}, x_hat).mean()
        return jnp.stack([0.6 * jnp.abs(PIXELS - x_hat).mean(), adversarial, kl_divergence(moments).mean() / 64])

    gradient = gradient_of_first_step(after, "autoencoder")
    gradients = jax.device_get(jax.jit(jax.jacrev(terms))(state.params["autoencoder"]))
    g_l1, g_adversarial, g_kl = (jax.tree.map(lambda g, k=k: g[k], gradients) for k in range(3))
    last = [np.linalg.norm(g["decoder"]["conv_out"]["kernel"]) for g in (g_l1, g_adversarial)]
    weight = 0.7 * last[0] / (last[1] + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-4)
    expected = jax.tree.map(lambda a, b, c: a + weight * b + 0.1 * c, g_l1, g_adversarial, g_kl)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6), gradient, expected)


def test_the_discriminator_has_the_hinge_loss_and_its_own_learning_rate():
    stage, state, after, metrics = one_step(**ADVERSARIAL)
    x_hat, _ = jax.jit(partial(sampled_reconstruction, stage.autoencoder))(state.params["autoencoder"])

    def hinge(params):
        """E[max(0, 1 - D(x))] / 2 + E[max(0, 1 + D(x_hat))] / 2 (Lim & Ye 2017)."""
        real, fake = (stage.discriminator.apply({"params": params}, images) for images in (PIXELS, x_hat))
        return (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean()) / 2, (real, fake)

    (loss, (real, fake)), expected = jax.jit(jax.value_and_grad(hinge, has_aux=True))(state.params["discriminator"])
    assert 0.05 < (real > 1).mean() < 0.95 and 0.05 < (fake < -1).mean() < 0.95
    np.testing.assert_allclose(metrics["discriminator"], loss, rtol=1e-5)
    gradient = gradient_of_first_step(after, "discriminator")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6), gradient, expected)
    for name, rate in (("discriminator", 0.02), ("autoencoder", 1e-3)):  # Adam's first step is as long as the rate
        steps = jax.tree.map(lambda new, old: jnp.abs(new - old).max(), after.params[name], state.params[name])
        np.testing.assert_allclose(max(jax.tree.leaves(steps)), rate, rtol=1e-3)


def test_the_gradient_of_the_vq_loss():
    """Of its three terms, each with its weight (van den Oord 2017, eq. 3)."""
    weights = {"reconstruction": 0.7, "codebook": 0.3, "commitment": 0.2}
    changes = {f"autoencoder__loss__{name}": weight for name, weight in weights.items()}
    stage, state, after, metrics = one_step(autoencoder__type="vq", autoencoder__block_out_channels=(8,), **changes)
    constant = jax.lax.stop_gradient

    def loss(params):
        autoencoder = partial(stage.autoencoder.apply, {"params": params})
        raw, codes = autoencoder(PIXELS, method="encode"), params["quantize"]["embedding"]["embedding"]
        e = codes[((raw[..., None, :] - codes) ** 2).sum(-1).argmin(-1)]
        features = autoencoder(raw + constant(e - raw), method="decode_features")  # straight through
        l1 = jnp.abs(PIXELS - autoencoder(features, method="to_pixels")).mean()
        codebook, commitment = ((constant(raw) - e) ** 2).mean(), ((raw - constant(e)) ** 2).mean()
        return 0.7 * l1 + 0.3 * codebook + 0.2 * commitment, {"codebook": codebook, "commitment": commitment}

    (value, terms), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params["autoencoder"])
    for name, term in terms.items():
        np.testing.assert_allclose(metrics[name], term, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    gradient = gradient_of_first_step(after, "autoencoder")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6), gradient, expected)


# One level, for a quick compilation, and noise up to the end.
SMALL = {
    "unet__block_out_channels": (16,),
    "unet__attention": (True,),
    "diffusion__timesteps": 1000,
    "diffusion__steps": 200,
    "diffusion__learning_rate": 1e-2,
    "diffusion__ema_decay": 0.9,
    "diffusion__label_dropout": 0.25,
}
NO_ATTENTION = {"unet__attention": (False,)}
DIFFUSIONS = {
    "eps": {},
    "v with zero terminal SNR": NO_ATTENTION | {"diffusion__prediction": "v", "diffusion__zero_terminal_snr": True},
    "z0, cosine": NO_ATTENTION | {"diffusion__prediction": "z0", "diffusion__schedule": "cosine"},
    "min-SNR": NO_ATTENTION | {"diffusion__weighting": "min_snr", "diffusion__schedule": "scaled_linear"},
}


@pytest.mark.parametrize("name", [*list(DIFFUSIONS)[:3], pytest.param("min-SNR", marks=pytest.mark.slow)])
def test_the_diffusion_model_learns_one_example(name):
    """Of one latent alone, without spread, noise and latent follow from z_t and t: the loss falls towards 0."""
    _, state, step = compiled("diffusion", **SMALL | DIFFUSIONS[name])
    batch = moments_batch(16)
    batch["moments"] = np.concatenate([batch["moments"][:1, ..., :2].repeat(16, 0), np.full((16, 1, 4, 4, 2), -30)], -1)
    losses = []
    for number in range(200):
        state, metrics = step(state, FROZEN, batch | {"step": np.int32(number)}, np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5]), losses


def test_timesteps_have_the_distribution_of_the_config():
    """Logit-normal (Esser 2024, eq. 19), then shifted (eq. 23)."""
    fields = {"sampling": "logit_normal", "mean": -1.0, "std": 0.5, "shift": 2.0}
    changes = {f"diffusion__timestep_{name}": value for name, value in fields.items()}
    stage, n = diffusion_stage(config(**SMALL | NO_ATTENTION | changes)), 2000
    batch = {"id": np.arange(n, dtype=np.int32), "moments": np.zeros((n, 1, 4, 4, 4), np.float32), "step": np.int32(0)}
    t = np.asarray(jax.jit(stage._example)(batch, FROZEN, np.uint32(0))["t"])
    levels = np.linspace(0.05, 0.95, 19)
    s = 1 / (1 + np.exp(1.0 - 0.5 * norm.ppf(levels)))
    below = [(t < 1000 * quantile).mean() for quantile in 2 * s / (1 + s)]
    np.testing.assert_allclose(below, levels, atol=4 * np.sqrt(0.25 / n) + 1e-3)


def test_min_snr_clips_at_the_gamma_of_the_config():
    changes = SMALL | NO_ATTENTION | {"diffusion__weighting": "min_snr", "diffusion__snr_gamma": 0.5}
    stage = diffusion_stage(config(**changes))
    rng, model = np.random.default_rng(0), stage.model
    shapes = jax.eval_shape(partial(initial, stage), jax.random.key(0)).params
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(p.dtype), shapes)

    @jax.jit
    def loss_and_by_hand(params, frozen):
        example = stage._example(moments_batch(16), frozen, np.uint32(0))
        loss, _ = stage._loss(params, frozen, example, None)
        cond = model.conditioning.encode(params["conditioning"], example["dropped"])
        eps_hat = model.denoiser.apply({"params": params["denoiser"]}, example["z_t"], example["t"], **cond)
        snr = jnp.square(model.process.alpha / model.process.sigma)[example["t"]]
        return loss, jnp.minimum(snr, 0.5) / snr * ((eps_hat - example["eps"]) ** 2).mean((1, 2, 3)), snr

    loss, losses, snr = loss_and_by_hand(params, FROZEN)
    assert (snr < 0.5).any() and ((snr > 0.5) & (snr < 5)).any() and (snr > 5).any()
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-4)


def test_a_learned_variance_leaves_the_mean_to_the_simple_loss():
    """Of the last layer, the half of the mean has the gradient of L_simple alone, that of the variance L_vlb's."""
    small = {"unet__block_out_channels": (8,), "unet__attention": (False,), "diffusion__timesteps": 1000}
    c = config(**small, diffusion__variance="learned", diffusion__vlb_weight=0.1, diffusion__prediction="v")
    stage = diffusion_stage(c)
    denoiser, process = stage.model.denoiser, stage.model.process
    rng, batch = np.random.default_rng(0), moments_batch(8)
    shapes = jax.eval_shape(partial(initial, stage), jax.random.key(0)).params
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(p.dtype), shapes)
    seen = jax.jit(stage.trace)(TrainState(np.int32(0), params, params, ()), FROZEN, batch, np.uint32(0))
    z0, z_t = seen["z0"], seen["z_t"]

    @jax.jit
    def sampled(ids):
        keys = jax.vmap(partial(jax.random.split, num=4))(example_keys(np.uint32(0), Stream.DIFFUSION, 0, ids))
        t = jax.vmap(partial(jax.random.randint, shape=(), minval=0, maxval=1000))(keys[:, 1])
        return t, jax.vmap(partial(jax.random.normal, shape=(4, 4, 2)))(keys[:, 2])

    t, eps = sampled(batch["id"])
    np.testing.assert_allclose(z_t, q_sample(z0, t, eps, process), rtol=1e-4, atol=1e-5)

    def simple(output):
        return ((output[..., :2] - target("v", z0, eps, t, process)) ** 2).mean()

    def vlb(output, mean=jax.lax.stop_gradient):
        z0_hat = mean(to_z0("v", output[..., :2], z_t, *noise_level(t, process).broadcast_to(z_t)))
        return vlb_term(z0, z_t, z0_hat, t, process, variance="learned", var_frac=(output[..., 2:] + 1) / 2).mean()

    @jax.jit
    def gradients(params):
        output, back = jax.vjp(lambda p: denoiser.apply({"params": p}, z_t, t, seen["context"]), params)
        heads = (simple, vlb, partial(vlb, mean=lambda z0_hat: z0_hat))
        return simple(output), vlb(output), jax.vmap(back)(jnp.stack([jax.grad(head)(output) for head in heads]))

    simple_value, vlb_value, (every,) = gradients(params["denoiser"])
    np.testing.assert_allclose(seen["loss"], simple_value + 100 * vlb_value, rtol=1e-4)  # 0.1 T
    of_simple, of_vlb, through_the_mean = (every["conv_out"]["kernel"][i] for i in range(3))
    got = seen["gradient"]["denoiser"]["conv_out"]["kernel"]
    np.testing.assert_allclose(got[..., :2], of_simple[..., :2], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got[..., 2:], 100 * of_vlb[..., 2:], rtol=1e-3, atol=1e-5)
    assert not of_simple[..., 2:].any() and not of_vlb[..., :2].any()
    assert np.abs(100 * through_the_mean[..., :2]).max() > 0.1 * np.abs(of_simple).max()  # it would have shown
    expected = jax.tree.map(lambda g: g[0] + 100 * g[1], every)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4), seen["gradient"]["denoiser"], expected)


def test_pixels_without_labels_are_diffused_by_the_same_stage():
    c = config(autoencoder__type="none", data__flip=True, **SMALL | NO_ATTENTION)
    stage = diffusion_stage(c, ())
    state = jax.jit(partial(initial, stage))(jax.random.key(0))
    frozen = {"first_stage": {}, "shift": np.zeros(1, np.float32), "scale": np.ones(1, np.float32)}
    frozen["table"] = stage.model.conditioning.table()
    state, metrics = jax.jit(stage.step)(state, frozen, autoencoder_batch(), np.uint32(0))
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 1


CLASSIFIER = {"classifier__steps": 150, "classifier__learning_rate": 1e-2}


def test_the_classifier_learns_one_batch():
    """Moments without spread, whose four classes lie apart: all but the noisiest z_t show their class."""
    _, state, step = compiled("classifier", **CLASSIFIER)
    batch = moments_batch(16)
    means = 2.0 * np.random.default_rng(1).normal(size=(4, 1, 4, 4, 2))[batch["label"]]
    batch["moments"] = np.concatenate([means, np.full(means.shape, -30)], axis=-1).astype(np.float32)
    metrics = []
    for number in range(150):
        state, measured = step(state, FROZEN, batch | {"step": np.int32(number)}, np.uint32(0))
        metrics.append(measured)
    losses, accuracies, norms = (
        np.array([float(m[name]) for m in metrics]) for name in ("loss", "accuracy", "grad_norm")
    )
    assert abs(losses[0] - np.log(4)) < 1.0
    assert np.mean(losses[-10:]) < 0.3 * losses[0], losses
    assert np.mean(accuracies[-10:]) > 0.9, accuracies
    assert (norms > 0).all()
    assert np.isfinite(norms).all()


def test_the_classifier_is_validated_at_the_batch_s_own_timesteps():
    """At the last, where there is no signal, the prior alone speaks."""
    stage, state, _ = compiled("classifier", **CLASSIFIER, diffusion__zero_terminal_snr=True)
    batch = moments_batch(16) | {"t": np.full(16, 19, np.int32)}
    params = {"classifier": state.params["classifier"] | {"prior": jnp.array([0.0, 3.0, 0.0, 0.0])}}
    validate = jax.jit(stage.validate)
    measured = validate(params, FROZEN, batch, np.uint32(0))
    np.testing.assert_array_equal(measured["accuracy"], batch["label"] == 1)
    expected = np.log(3 + np.exp(3)) - 3.0 * (batch["label"] == 1)
    np.testing.assert_allclose(measured["loss"], expected, rtol=1e-5)
    early = validate(params, FROZEN, batch | {"t": np.full(16, 2, np.int32)}, np.uint32(0))
    assert (early["loss"] != measured["loss"]).all()


def noised(stage, state, batch, frozen=FROZEN):
    """What the stage makes of a batch before it is given to the denoiser."""
    return jax.jit(lambda *arguments: {k: v for k, v in stage.trace(*arguments).items() if k in ("z0", "context")})(
        state, frozen, batch, np.uint32(0)
    )


def test_cached_moments_hold_both_sides_of_a_flipped_set():
    """With F = 2 each example takes one of its two sides, by its own coin."""
    stage = diffusion_stage(config(**SMALL | NO_ATTENTION))
    batch = moments_batch(64) | {"label": np.zeros(64, np.int32)}
    both = np.concatenate([batch["moments"], -batch["moments"]], axis=1)
    z0_of = jax.jit(lambda moments: stage._example(batch | {"moments": moments}, FROZEN, np.uint32(0))["z0"])
    mixed = z0_of(both)
    first, second = (np.isclose(mixed, z0_of(both[:, side])).all((1, 2, 3)) for side in ([0], [1]))
    assert (first ^ second).all() and 0.25 < first.mean() < 0.75


def test_the_label_is_dropped_at_its_rate():
    stage, state, _ = compiled("diffusion", **SMALL)
    n = 2000
    batch = moments_batch() | {"id": np.arange(n, dtype=np.int32), "label": np.full(n, 2, np.int32)}
    batch["moments"] = np.zeros((n, 1, 4, 4, 4), np.float32)
    context = np.asarray(noised(stage, state, batch)["context"])
    null = np.asarray(state.params["conditioning"]["embedding"]["embedding"])[4]
    dropped = np.isclose(context[:, 0], null).all(axis=1).mean()
    assert abs(dropped - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)


def test_captions_are_chosen_evenly_and_dropped_at_the_rate():
    """Of an image with two of them: each conditions half of the steps that are conditioned at all."""
    stage, n = diffusion_stage(config(**SMALL | NO_ATTENTION)), 2000
    state = jax.jit(partial(initial, stage))(jax.random.key(0))
    frozen = FROZEN | {"captions": np.array([[0, 1], [1, 3], [2, 3], [0, 3]], np.int32)}
    batch = moments_batch() | {"id": np.arange(n, dtype=np.int32), "label": np.full(n, 1, np.int32)}
    batch["moments"] = np.zeros((n, 1, 4, 4, 4), np.float32)
    context = np.asarray(noised(stage, state, batch, frozen)["context"])[:, :1]
    rows = np.asarray(state.params["conditioning"]["embedding"]["embedding"])
    shares = np.isclose(context, rows).all(axis=2).mean(axis=0)
    expected = np.array([0, 0.375, 0, 0.375, 0.25])
    assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all(), shares


def test_a_caption_is_chosen_among_those_of_its_label_by_the_key_alone():
    captions = np.array([[0, 1, 2], [3, 3, 4], [5, 6, 7]], np.int32)
    label, keys = np.arange(900, dtype=np.int32) % 3, jax.random.split(jax.random.key(0), 900)
    rows = np.asarray(choose_caption(captions, label, keys))
    for k in range(3):
        counts = np.bincount(rows[label == k], minlength=8)[np.unique(captions[k])]
        expected = 100 * np.unique(captions[k], return_counts=True)[1]
        assert counts.sum() == 300 and (np.abs(counts - expected) < 4 * np.sqrt(300 * 2 / 9)).all(), counts
    np.testing.assert_array_equal(choose_caption(captions, label[::-1], keys[::-1]), rows[::-1])


def test_encoded_conditions_give_the_same_loss_as_encoding_in_the_step():
    """The denoiser alone, trained on a table of its own arguments, against the denoiser with the frozen embedder."""
    whole, state, _ = compiled("diffusion", **SMALL)
    params, batch = state.params, moments_batch(16)
    encode, table = whole.model.conditioning.encode, FROZEN["table"]
    model = replace(whole.model, conditioning=EncodedConditioning())
    parts = Parts(("denoiser",))
    in_the_step = replace(whole, trainable=parts), FROZEN | {"conditioning": params["conditioning"]}
    encoded = replace(whole, model=model, trainable=parts), LATENTS | {"table": encode(params["conditioning"], table)}
    results = []
    for stage, frozen in (in_the_step, encoded):
        state = stage.init(jax.random.key(0), params)
        assert sorted(state.params) == ["denoiser"]
        trace = jax.jit(lambda *arguments, stage=stage: {n: stage.trace(*arguments)[n] for n in ("context", "loss")})
        results.append(trace(state, frozen, batch, np.uint32(0)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_the_diffusion_model_is_validated_with_its_labels_at_the_batch_s_own_timesteps():
    """By the unweighted loss of each example, whatever the rate at which labels are dropped."""
    stage, state, _ = compiled("diffusion", **SMALL)
    batch = moments_batch(16) | {"t": np.arange(0, 960, 60, dtype=np.int32)}
    batch["moments"][..., 2:] = -30.0  # no spread
    model, z0, t = stage.model, batch["moments"][:, 0, ..., :2], batch["t"]

    @jax.jit
    def by_hand(params):
        keys = example_keys(np.uint32(7), Stream.DIFFUSION_VALIDATION, 0, batch["id"])
        keys = jax.vmap(partial(jax.random.split, num=5))(keys)[:, 2]
        eps = jax.vmap(partial(jax.random.normal, shape=(4, 4, 2)))(keys)
        cond = model.conditioning.encode(params["conditioning"], batch["label"])
        z_t = q_sample(z0, t, eps, model.process)
        return ((model.denoiser.apply({"params": params["denoiser"]}, z_t, t, **cond) - eps) ** 2).mean((1, 2, 3))

    measured = jax.jit(stage.validate)(state.params, FROZEN, batch, np.uint32(7))
    assert measured.keys() == {"loss"}
    np.testing.assert_allclose(measured["loss"], by_hand(state.params), rtol=1e-4)


@pytest.mark.parametrize("which", ["autoencoder", "diffusion", "classifier"])
def test_stages_are_equal_and_hashed_by_value(which):
    """So that they can be part of a compiled function's key."""

    def make(**changes):
        c = config(**SMALL | changes)
        if which == "autoencoder":
            return make_autoencoder_stage(c)
        model = from_config(c, tiny.CLASS_NAMES)
        return make_classifier_stage(model, 4, c) if which == "classifier" else diffusion_stage(c)

    stage, same = make(), make(sampling__steps=3)  # how it is sampled is no part of it
    assert stage is not same and stage == same and hash(stage) == hash(same)
    assert parallel_step(stage) is parallel_step(same)
    for field, value in ((f"{which}__learning_rate", 0.5), (f"{which}__ema_decay", 0.5), ("data__flip", True)):
        assert make(**{field: value}) != stage, field


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(list(AUTOENCODERS)[1], marks=pytest.mark.slow),
        list(AUTOENCODERS)[2],
        "diffusion",
        pytest.param("classifier", marks=pytest.mark.slow),
    ],
)
def test_four_devices_take_the_same_step_as_one(which, four_devices):
    if which == "diffusion":
        (stage, one, step_one), batch, frozen = (
            compiled("diffusion", **SMALL | DIFFUSIONS["min-SNR"]),
            moments_batch(16),
            FROZEN,
        )
    elif which == "classifier":
        (stage, one, step_one), batch, frozen = compiled("classifier", **CLASSIFIER), moments_batch(16), FROZEN
    else:
        (stage, one, step_one), batch, frozen = compiled_autoencoder(which), autoencoder_batch(), {}
    many, step_many = replicate(jax.device_get(one)), parallel_step(stage)  # a copy: it is donated
    assert jax.local_device_count() == 4
    arrays = {name: value for name, value in batch.items() if name != "step"}
    for number in range(3):
        one, metrics_one = step_one(one, frozen, batch | {"step": np.int32(number)}, np.uint32(5))
        many, metrics_many = step_many(many, frozen, {}, shard(arrays), np.int32(number), np.uint32(5))
        for name in metrics_one:
            np.testing.assert_allclose(metrics_one[name], metrics_many[name], rtol=2e-3, atol=1e-5, err_msg=name)
    assert int(many.step) == 3
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3)


def test_the_average_follows_the_parameters_after_the_update():
    _, state, step = compiled("diffusion", **SMALL)
    state, _ = step(state, FROZEN, moments_batch(16), np.uint32(0))  # at the warm-up's rate of 0
    after, _ = step(state, FROZEN, moments_batch(16, step=1), np.uint32(0))
    rate = 2 / 11  # min(0.9, (1 + n) / (10 + n)) at n = 1
    expected = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema_params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.ema_params, expected)


@pytest.mark.parametrize("which", ["autoencoder", "diffusion", pytest.param("classifier", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_freezes_the_state(which):
    if which == "diffusion":
        stage, state, step = compiled("diffusion", **SMALL | DIFFUSIONS["min-SNR"])
        batch, frozen, layer = partial(moments_batch, 16), FROZEN, "conv_in"
    elif which == "classifier":
        stage, state, step = compiled("classifier", **CLASSIFIER)
        batch, frozen, layer = partial(moments_batch, 16), FROZEN, "conv_in"
    else:
        stage, state, step = compiled_autoencoder("vq, without attention, at a constant rate")
        batch, frozen, layer = autoencoder_batch, {}, "quant_conv"
    state, _ = step(state, frozen, batch(), np.uint32(0))
    broken = jax.tree.map(lambda a: a, state)  # new dicts around the same arrays
    broken.params["denoiser" if which == "diffusion" else which][layer]["bias"] *= np.nan
    frozen_state, metrics = step(broken, frozen, batch(step=1), np.uint32(0))
    assert not np.isfinite(metrics["loss"])
    assert int(frozen_state.step) == 1
    # The next batch is a good one, but it is not the one the state waits for.
    later, _ = step(state, frozen, batch(step=2), np.uint32(0))
    jax.tree.map(np.testing.assert_array_equal, later, state)
    name = first_nonfinite(stage.trace(broken, frozen, batch(step=1), np.uint32(0)))
    assert name in (
        "params/denoiser/conv_in/bias",
        "params/autoencoder/quant_conv/bias",
        "params/classifier/conv_in/bias",
    )


def test_the_first_tensor_that_is_not_finite_is_the_first_to_arise():
    tensors = {"b": {"fine": np.ones(2)}, "a": ({"late": np.array([1, np.inf])},), "c": np.nan}
    assert first_nonfinite(tensors) == "a/late"
    assert first_nonfinite({"all": np.ones(3), "fine": None}) is None
