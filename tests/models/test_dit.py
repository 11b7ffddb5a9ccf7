"""The diffusion transformer: what it is at the start, its sizes and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.dit import DiT, DiTBlock, PatchEmbed, normalize, sincos_positions, unpatchify

TINY = {"in_channels": 3, "out_channels": 6, "sample_size": 4, "hidden_size": 8, "depth": 2, "heads": 2}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time


def inputs(size=(4, 4), context=(1, 8), channels=3):
    rng = np.random.default_rng(0)
    z_t, cond = rng.normal(size=(2, *size, channels)), rng.normal(size=(2, *context))
    return z_t.astype(np.float32), np.array([1, 500], np.int32), cond.astype(np.float32)


def count(module, *args):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *args)))


def output(module, params, *args):
    return jax.jit(lambda *a: module.apply({"params": params}, *a), compiler_options=QUICK)(*args)


def test_the_defaults_are_xl_2():
    """Peebles & Xie 2023, table 1: DiT-XL/2 has 675 million parameters, with 1,001 classes and the fixed positions."""
    module, embedder = DiT(), ClassEmbedder(1000, 1152)
    z_t, t, context = np.zeros((1, 32, 32, 4)), np.zeros(1), np.zeros((1, 1, 1152))
    classes, positions = count(embedder, np.zeros(1, np.int32)), sincos_positions(16, 16, 1152, 16).size
    assert count(module, z_t, t, context) + classes + positions == 675_129_632
    out = jax.eval_shape(lambda key: module.init_with_output(key, z_t, t, context)[0], jax.random.key(0))
    assert (out.shape, out.dtype) == ((1, 32, 32, 8), jnp.float32)


def test_each_block_begins_as_the_identity_and_the_prediction_as_zero(initialise):
    rng = np.random.default_rng(0)
    x, emb, text = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 8), (2, 8), (2, 3, 6)))
    for context in (None, text):
        block = DiTBlock(2, qk_norm=True)
        np.testing.assert_array_equal(output(block, initialise(block, x, emb, context), x, emb, context), x)
    module = DiT(**TINY)
    assert not output(module, initialise(module, *inputs()), *inputs()).any()


def test_patches_go_back_where_they_were():
    """A patch embedding that copies the values of each patch, without positions, and its inverse."""
    image = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    kernel = np.eye(12, dtype=np.float32).reshape(2, 2, 3, 12)
    params = {"proj": {"kernel": kernel, "bias": np.zeros(12, np.float32)}}
    patches = PatchEmbed(2, 12, base_size=2).apply({"params": params}, image) - sincos_positions(2, 3, 12, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_allclose(patches[0, 1].reshape(2, 2, 3), image[0, :2, 2:4], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(unpatchify(patches, 2, 3, 2), image, rtol=1e-6, atol=1e-5)


def test_positions_by_hand():
    """Column, then row; sines, then cosines; of frequencies 1 and 1 / 100; then positions half as far apart."""
    positions = sincos_positions(3, 3, 8, base_size=3)
    one = [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(positions[1], [*one, 0, 0, 1, 1], rtol=1e-6)  # row 0, column 1
    np.testing.assert_allclose(positions[3], [0, 0, 1, 1, *one], rtol=1e-6)
    finer = sincos_positions(6, 6, 8, base_size=3).reshape(6, 6, 8)
    np.testing.assert_allclose(finer[::2, ::2].reshape(9, 8), positions, rtol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_by_hand(norm):
    x = jnp.asarray([[1.0, 2.0, 6.0]])
    centred = np.array([-2.0, -1.0, 3.0]) if norm == "layer" else np.array([1.0, 2.0, 6.0])
    np.testing.assert_allclose(normalize(x, norm)[0], centred / np.sqrt(np.mean(centred**2)), rtol=1e-5)
    assert normalize(x.astype(jnp.bfloat16), norm).dtype == jnp.bfloat16


OPTIONS = {  # fields; shape of the context
    "plain": ({}, (1, 8)),
    "patches of one": ({"patch_size": 1}, (1, 8)),
    "patches of four": ({"patch_size": 4}, (1, 8)),
    "RMS norm": ({"norm": "rms"}, (1, 8)),
    "norm of queries and keys": ({"qk_norm": "rms"}, (1, 8)),
    "an embedding for each block": ({"separate_embeddings": True}, (2, 8)),
    "a text": ({"cross_attention_dim": 6, "qk_norm": "rms"}, (3, 6)),
    "a wider feed-forward network": ({"mlp_ratio": 6.0}, (1, 8)),
}


@pytest.fixture(scope="module")
def outputs():
    return {}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_prediction_and_every_input_counts(name, random_params, outputs):
    fields, context = OPTIONS[name]
    module, args = DiT(**TINY | fields), inputs(context=context)
    params = random_params(module, *args)
    predict = jax.jit(lambda *a: module.apply({"params": params}, *a), compiler_options=QUICK)
    outputs[name] = predict(*args)
    assert outputs[name].shape == (2, 4, 4, 6) and np.isfinite(outputs[name]).all()
    for i in range(3):
        changed = list(args)
        changed[i] = args[i] + 1
        assert np.abs(predict(*changed) - outputs[name]).max() > 1e-3
    assert all(np.abs(outputs[name] - other).max() > 1e-3 for key, other in outputs.items() if key != name)


def test_rematerialisation_and_bfloat16(random_params):
    args = inputs()
    module = DiT(**TINY, dtype=jnp.float32)
    params = random_params(module, *args)

    def loss(module):
        square = lambda p: jnp.square(module.apply({"params": p}, *args)).mean()  # noqa: E731
        return jax.jit(jax.grad(square), compiler_options=QUICK)(params)

    plain, again = loss(module), loss(module.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
    half = output(module.clone(dtype=jnp.bfloat16), params, *args)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, output(module, params, *args), rtol=0, atol=0.15)
    assert (half == half.astype(jnp.bfloat16)).all()


def test_other_sizes_than_in_training(random_params):
    module = DiT(**TINY)
    params = random_params(module, *inputs())
    assert output(module, params, *inputs((6, 2))).shape == (2, 6, 2, 6)


@pytest.mark.parametrize(
    ("fields", "args", "message"),
    [
        ({"hidden_size": 6}, inputs(context=(1, 6)), "multiple of 4 and of heads = 2; got 6"),
        ({"heads": 3}, inputs(), "multiple of 4 and of heads = 3; got 8"),
        ({"norm": "batch"}, inputs(), "norm must be one of layer, rms; got 'batch'"),
        ({"qk_norm": "layer"}, inputs(), "qk_norm must be one of none, rms; got 'layer'"),
        ({}, inputs((5, 4)), r"h and w multiples of patch_size = 2; got \(2, 5, 4, 3\)"),
        ({}, inputs(channels=2), "z_t must be"),
        ({}, inputs(context=(2, 8)), r"context must be \[2, 1, 8\]; got \(2, 2, 8\)"),
        ({"cross_attention_dim": 6}, inputs(context=(2, 8)), r"context must be \[2, 'L', 6\]"),
    ],
)
def test_wrong_fields_and_shapes(fields, args, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(DiT(**TINY | fields).init, jax.random.key(0), *args)
