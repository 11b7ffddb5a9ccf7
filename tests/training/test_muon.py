"""Muon: its orthogonalization against the plain Newton-Schulz iteration and the SVD, and its momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ldm_jax.pipeline.clip import clip_of
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.training import muon
from ldm_jax.training.from_config import make_autoencoder_stage, make_classifier_stage, make_clip_stage
from ldm_jax.training.state import state_shapes

SHAPES = {
    "tall": (90, 16),
    "wide": (16, 90),
    "square": (16, 16),
    "one column": (5, 1),
    "one row": (1, 5),
    "of rank 1": (30, 16),
    "of equal rows": (30, 16),
}


def matrix(name, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPES[name])
    if name == "of rank 1":
        x = np.outer(x[:, 0], x[0])
    if name == "of equal rows":
        x = np.tile(x[:1], (len(x), 1))
    return x


def plain_newton_schulz(x):
    """Jordan 2024, in float64."""
    a, b, c = muon.COEFFICIENTS
    x = x / np.linalg.norm(x)
    for _ in range(muon.ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_gram_matrices_give_the_plain_iteration(name, size):
    x = size * matrix(name)
    (result,) = muon.orthogonalize([jnp.asarray(x, jnp.float32)])
    np.testing.assert_allclose(result, plain_newton_schulz(x), atol=2e-2 if size == 1e-6 else 1e-3)


def test_matrices_of_all_shapes_at_once():
    """Those of one smaller side are iterated together, transposed or not."""
    matrices = [jnp.asarray(matrix(name, seed), jnp.float32) for seed in range(3) for name in SHAPES]
    for result, x in zip(muon.orthogonalize(matrices), matrices):
        np.testing.assert_allclose(result, muon.orthogonalize([x])[0], atol=1e-5)


def test_singular_values_are_near_one_down_to_a_thousandth_of_the_largest():
    left, right = (np.linalg.qr(np.random.default_rng(seed).normal(size=(n, 20)))[0] for seed, n in ((0, 200), (1, 20)))
    x = left @ np.diag(np.geomspace(1, 3e-3, 20)) @ right.T
    singular = np.linalg.svd(muon.orthogonalize([jnp.asarray(x, jnp.float32)])[0], compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_zero_gradients_make_no_update():
    np.testing.assert_array_equal(muon.orthogonalize([jnp.zeros((6, 4))])[0], 0)


def kernels_by_adamw(params):
    """The names of the layers, without those of the modules around them."""
    leaves = jax.tree_util.tree_leaves_with_path(muon._labels(params))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/").split("/") for path, label in leaves if label == "adamw"
    ]
    return {"/".join(names[:-1]).rpartition("embeddings/")[2] for names in paths if names[-1] == "kernel"}


def test_the_first_and_last_layers_of_each_network_are_by_adamw():
    config = tiny.get_config().unlock()
    clip = state_shapes(make_clip_stage(clip_of(config), config)).params
    assert kernels_by_adamw(clip["image"]) == {"patch_embedding", "visual_projection"}
    assert kernels_by_adamw(clip["text"]) == {"text_projection"}
    model, unet = on_paper(config, tiny.CLASS_NAMES)
    assert kernels_by_adamw(unet["denoiser"]) == {"conv_in", "conv_out"}
    classifier = state_shapes(make_classifier_stage(model, 4, config)).params["classifier"]
    assert kernels_by_adamw(classifier) == {"conv_in", "head"}
    autoencoder = state_shapes(make_autoencoder_stage(config)).params["autoencoder"]
    assert (
        kernels_by_adamw(autoencoder["encoder"]) == kernels_by_adamw(autoencoder["decoder"]) == {"conv_in", "conv_out"}
    )
    config.denoiser, config.dit.hidden_size = "dit", 8
    dit = on_paper(config, tiny.CLASS_NAMES)[1]["denoiser"]
    assert kernels_by_adamw(dit) == {"pos_embed/proj", "proj_out_2"}


def test_updates_are_those_of_optax():
    """Up to their size: by the consistent root mean square in both; the momentum has no bias correction here."""
    rng = np.random.default_rng(0)
    grads = [{"conv": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)} for _ in range(40)]
    optimizer = muon.scale_by_muon()
    reference = scale_by_muon(weight_dimension_numbers={"conv": MuonDimensionNumbers((0, 1, 2), 3)})
    state, reference_state = optimizer.init(grads[0]), reference.init(grads[0])
    for gradient in grads:
        update, state = optimizer.update(gradient, state)
        expected, reference_state = reference.update(gradient, reference_state)
    scaled = muon.UPDATE_RMS * 36**0.5 * expected["conv"]
    cosine = jnp.vdot(update["conv"], scaled) / jnp.linalg.norm(update["conv"]) / jnp.linalg.norm(scaled)
    assert cosine > 0.99
    np.testing.assert_allclose(jnp.linalg.norm(update["conv"]), jnp.linalg.norm(scaled), rtol=0.05)


def test_momentum_is_nesterovs():
    """By hand for kernels of one element, which orthogonalization maps to the sign of the momentum."""
    optimizer = muon.scale_by_muon()
    state, momentum = optimizer.init({"kernel": jnp.zeros((1, 1))}), 0.0
    for gradient in (1.0, -0.5, -0.5, -3.0):
        update, state = optimizer.update({"kernel": jnp.full((1, 1), gradient)}, state)
        momentum = 0.95 * momentum + gradient
        np.testing.assert_allclose(state.momentum["kernel"], momentum, rtol=1e-6)
        assert np.sign(update["kernel"]) == np.sign(0.95 * momentum + gradient)


def test_a_step_of_the_whole_optimizer_is_finite_and_small():
    params = {"conv_in": {"kernel": jnp.ones((3, 3, 1, 4))}, "mid": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    optimizer = muon.muon(optax.constant_schedule(0.01), b1=0.9, b2=0.99, weight_decay=0.1)
    grads = jax.tree.map(lambda leaf: 1e-12 * leaf, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() < 0.03 for leaf in jax.tree.leaves(updates))
