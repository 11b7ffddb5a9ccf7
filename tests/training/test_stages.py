"""Both stages' steps: what they compute, that they learn, and that devices and bad numbers change nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ldm_jax import builders
from ldm_jax.data.pixels import to_pixels
from ldm_jax.training.loop import first_nonfinite
from ldm_jax.training.parallel import parallel_step, replicate, shard

IMAGES, LABELS = tiny.pictures(16)


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


FROZEN = {"autoencoder": {}, "shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}

AUTOENCODERS = {
    "kl": {},
    "vq": {"autoencoder__kind": "vq"},
    "adversarial": {"autoencoder__loss__adversarial": 0.5, "autoencoder__loss__adversarial_start": 1},
    "flip": {"data__flip": True},
    "no attention": {"autoencoder__mid_block_attention": False},
    "constant rate": {"autoencoder__decay": "constant"},
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_autoencoder_learns_one_batch(name):
    c = config(autoencoder__steps=60, autoencoder__learning_rate=3e-3, **AUTOENCODERS[name])
    stage = builders.build_autoencoder_stage(c)
    state, step = stage.init(jax.random.key(0)), jax.jit(stage.step)
    losses = []
    for number in range(60):
        state, metrics = step(state, {}, autoencoder_batch(step=number), np.uint32(0))
        losses.append(float(metrics["l1"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    if name == "vq":
        assert 1 <= metrics["perplexity"] <= 8
        assert 0 < metrics["codes_used"] <= 1
    if name == "adversarial":
        assert 0 < metrics["adversarial_weight"] < 1e4
        assert metrics["discriminator"] > 0


def test_the_adversarial_term_waits_for_its_start():
    c = config(autoencoder__loss__adversarial=0.5, autoencoder__loss__adversarial_start=2)
    stage = builders.build_autoencoder_stage(c)
    start = stage.init(jax.random.key(0))
    state, step = start, jax.jit(stage.step)
    for number in range(3):
        before = state.params["discriminator"]
        state, metrics = step(state, {}, autoencoder_batch(step=number), np.uint32(0))
        moved = any(
            jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params["discriminator"]))
        )
        # Adam's first step has learning rate 0 (warm-up), so the discriminator's own counter is what tells.
        counts = [
            int(a)
            for p, a in jax.tree_util.tree_leaves_with_path(state.opt_state["discriminator"])
            if "count" in str(p)
        ]
        assert (metrics["adversarial_weight"] > 0) == (number >= 2)
        assert set(counts) == {max(0, number - 1)}
        assert not moved or number >= 2


def test_one_backward_pass_gives_the_gradient_of_all_terms():
    """The step's gradient = that of the plain sum of the terms, with the adaptive weight of Esser 2021, eq. 7."""
    c = config(autoencoder__loss__adversarial=0.7, autoencoder__loss__adversarial_start=0, autoencoder__loss__kl=0.1)
    seen = {}

    def spy():
        def update(grads, state, params=None):
            seen.setdefault("grads", grads)
            return jax.tree.map(jnp.zeros_like, grads), state

        return optax.GradientTransformation(lambda params: (), update)

    from ldm_jax.first_stage import draw, kl_divergence
    from ldm_jax.models.discriminator import PatchDiscriminator
    from ldm_jax.training.autoencoder import STREAM, make_autoencoder_stage
    from ldm_jax.training.state import example_keys

    autoencoder = builders.build_autoencoder(c)
    discriminator = PatchDiscriminator(in_channels=1, features=8, layers=1, norm_num_groups=4)
    stage = make_autoencoder_stage(
        autoencoder=autoencoder, kind="kl", discriminator=discriminator, lpips=None, image_shape=(8, 8, 1),
        weights=c.autoencoder.loss, adversarial_start=0, perceptual_every=1, flip=False,
        optimizer=spy(), discriminator_optimizer=optax.sgd(0.0), ema_decay=0.9,
    )  # fmt: skip
    state, batch = stage.init(jax.random.key(1)), autoencoder_batch()
    _, metrics = stage.step(state, {}, batch, np.uint32(3))

    x, params = to_pixels(batch["x"]), state.params["autoencoder"]
    keys = jax.vmap(jax.random.split)(example_keys(np.uint32(3), STREAM, 0, batch["id"]))[:, 1]

    def reconstruct(params):
        moments = autoencoder.apply({"params": params}, x, method="encode")
        return autoencoder.apply({"params": params}, draw(moments, keys), method="decode"), moments

    def l1(params):
        return jnp.abs(x - reconstruct(params)[0]).mean()

    def adversarial(params):
        return -discriminator.apply({"params": state.params["discriminator"]}, reconstruct(params)[0]).mean()

    def kl(params):
        return kl_divergence(reconstruct(params)[1]).mean() / 64

    g_l1, g_adversarial, g_kl = (jax.grad(f)(params) for f in (l1, adversarial, kl))
    last = [jnp.linalg.norm(g["decoder"]["conv_out"]["kernel"]) for g in (g_l1, g_adversarial)]
    weight = 0.7 * last[0] / (last[1] + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-4)
    expected = jax.tree.map(lambda a, b, c: a + weight * b + 0.1 * c, g_l1, g_adversarial, g_kl)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6), seen["grads"], expected)


DIFFUSIONS = {
    "eps": {},
    "v with zero terminal SNR": {"diffusion__prediction": "v", "diffusion__zero_terminal_snr": True},
    "z0": {"diffusion__prediction": "z0"},
    "min-SNR": {"diffusion__weighting": "min_snr"},
    "cosine": {"diffusion__schedule": "cosine"},
    "scaled linear": {"diffusion__schedule": "scaled_linear"},
}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_diffusion_model_learns_one_batch(name):
    c = config(diffusion__steps=150, diffusion__learning_rate=5e-3, **DIFFUSIONS[name])
    stage = builders.build_diffusion_stage(c, 4)
    state, step = stage.init(jax.random.key(0)), jax.jit(stage.step)
    losses = []
    for number in range(150):
        state, metrics = step(state, FROZEN, moments_batch(step=number), np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:5]), losses


@pytest.mark.parametrize("labels", [True, False])
def test_pixels_are_diffused_by_the_same_stage(labels):
    c = config(autoencoder__kind="none", data__flip=True)
    stage = builders.build_diffusion_stage(c, 4 if labels else 0)
    batch = autoencoder_batch() | ({"label": LABELS[:8].astype(np.int32)} if labels else {})
    frozen = {"autoencoder": {}, "shift": np.zeros(1, np.float32), "scale": np.ones(1, np.float32)}
    state, metrics = stage.step(stage.init(jax.random.key(0)), frozen, batch, np.uint32(0))
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 1


def test_cached_moments_hold_both_sides_of_a_flipped_set():
    """With F = 2 each example takes one of its two sides, by its own coin."""
    stage = builders.build_diffusion_stage(config(data__flip=True), 4)
    batch = moments_batch(64)
    both = np.concatenate([batch["moments"], -batch["moments"]], axis=1)
    state = stage.init(jax.random.key(0))
    plain = stage.trace(state, FROZEN, batch | {"label": np.zeros(64, np.int32)}, np.uint32(0))["z0"]
    mixed = stage.trace(state, FROZEN, batch | {"moments": both, "label": np.zeros(64, np.int32)}, np.uint32(0))["z0"]
    same = np.all(np.isclose(plain, mixed), axis=(1, 2, 3))
    assert 0.25 < same.mean() < 0.75


def test_the_label_is_dropped_at_its_rate():
    stage = builders.build_diffusion_stage(config(diffusion__label_dropout=0.25), 4)
    n = 2000
    batch = moments_batch(8) | {"id": np.arange(n, dtype=np.int32), "label": np.full(n, 2, np.int32)}
    batch["moments"] = np.zeros((n, 1, 4, 4, 4), np.float32)
    state = stage.init(jax.random.key(0))
    context = np.asarray(stage.trace(state, FROZEN, batch, np.uint32(0))["context"])
    null = np.asarray(state.params["conditioner"]["embedding"]["embedding"])[4]
    dropped = np.isclose(context[:, 0], null).all(axis=1).mean()
    assert abs(dropped - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("which", ["autoencoder", "adversarial", "vq", "diffusion"])
def test_four_devices_take_the_same_step_as_one(which):
    if which == "diffusion":
        stage, batch, frozen = builders.build_diffusion_stage(config(), 4), moments_batch(), FROZEN
    else:
        changes = AUTOENCODERS["kl" if which == "autoencoder" else which]
        stage, batch, frozen = builders.build_autoencoder_stage(config(**changes)), autoencoder_batch(), {}
    state = stage.init(jax.random.key(0))
    one, many, step = state, replicate(state), parallel_step(stage.step)
    assert jax.local_device_count() == 4
    arrays = {name: value for name, value in batch.items() if name != "step"}
    for number in range(3):
        one, metrics_one = jax.jit(stage.step)(one, frozen, batch | {"step": np.int32(number)}, np.uint32(5))
        many, metrics_many = step(many, frozen, {}, shard(arrays), np.int32(number), np.uint32(5))
        for name in metrics_one:
            np.testing.assert_allclose(metrics_one[name], metrics_many[name], rtol=2e-3, atol=1e-5, err_msg=name)
    assert int(many.step) == 3
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3)


def test_the_average_follows_the_parameters_after_the_update():
    stage = builders.build_diffusion_stage(config(diffusion__ema_decay=0.9, diffusion__warmup_steps=0), 4)
    state = stage.init(jax.random.key(0))
    after, _ = stage.step(state, FROZEN, moments_batch(), np.uint32(0))
    rate = min(0.9, 1 / 10)  # (1 + n) / (10 + n) at n = 0
    expected = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema_params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.ema_params, expected)


@pytest.mark.parametrize("which", ["autoencoder", "diffusion"])
def test_a_step_that_is_not_finite_freezes_the_state(which):
    if which == "diffusion":
        stage, batch = builders.build_diffusion_stage(config(), 4), moments_batch
    else:
        stage, batch = builders.build_autoencoder_stage(config()), autoencoder_batch
    state, frozen = stage.init(jax.random.key(0)), FROZEN if which == "diffusion" else {}
    state, _ = stage.step(state, frozen, batch(), np.uint32(0))
    broken = jax.tree.map(lambda a: a, state)
    broken.params["unet" if which == "diffusion" else "autoencoder"][
        "conv_in" if which == "diffusion" else "quant_conv"
    ]["bias"] *= np.nan
    frozen_state, metrics = stage.step(broken, frozen, batch(step=1), np.uint32(0))
    assert not np.isfinite(metrics["loss"])
    assert int(frozen_state.step) == 1
    # The next batch is a good one, but it is not the one the state waits for.
    later, _ = stage.step(state, frozen, batch(step=2), np.uint32(0))
    jax.tree.map(np.testing.assert_array_equal, later, state)
    name = first_nonfinite(stage.trace(broken, frozen, batch(step=1), np.uint32(0)))
    assert name in ("params/unet/conv_in/bias", "params/autoencoder/quant_conv/bias")


def test_the_first_tensor_that_is_not_finite_is_the_first_to_arise():
    tensors = {"b": {"fine": np.ones(2)}, "a": ({"late": np.array([1, np.inf])},), "c": np.nan}
    assert first_nonfinite(tensors) == "a/late"
    assert first_nonfinite({"all": np.ones(3), "fine": None}) is None
