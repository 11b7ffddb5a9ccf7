"""The diffusion transformer: what it is at the start, its sizes and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.models.attention import Attention
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.dit import DiT, DiTBlock, PatchEmbed, normalize, sincos_positions, unpatchify
from ldm_jax.models.primitives import RMSNorm

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


def test_rms_norm_by_hand():
    """Of small values too, where eps counts; a scale for each component, and float32 within."""
    x, scale = np.float32([[1, 2, 6], [0, -3e-3, 4e-3]]), np.float32([2, -1, 0.5])
    norm = np.sqrt([[41 / 3 + 1e-6], [25e-6 / 3 + 1e-6]])
    params = {"params": {"scale": scale}}
    np.testing.assert_allclose(RMSNorm().apply(params, x), x / norm * scale, rtol=1e-5)
    half = RMSNorm().apply(params, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), x / norm * scale, rtol=0.02)
    assert RMSNorm(dtype=jnp.float32).apply(params, x.astype(jnp.bfloat16)).dtype == jnp.float32


def attention_by_hand(params, x, context, heads):
    """With RMS norm of the queries and the keys of each head, x / rms(x) times `scale`, if `params` has its scales."""
    q, k, v = (y @ params[f"to_{name}"]["kernel"] + params[f"to_{name}"]["bias"]
               for name, y in (("q", x), ("k", context), ("v", context)))  # fmt: skip
    out, size = np.zeros_like(q), x.shape[-1] // heads
    for b, i, head in np.ndindex(*x.shape[:2], heads):
        part = slice(head * size, (head + 1) * size)
        query, keys = q[b, i, part], k[b, :, part]
        if "norm_q" in params:
            query = query / np.sqrt(np.mean(query**2)) * params["norm_q"]["scale"]
            keys = keys / np.sqrt(np.mean(keys**2, axis=1, keepdims=True)) * params["norm_k"]["scale"]
        weight = np.exp(keys @ query / np.sqrt(size))
        out[b, i, part] = weight @ v[b, :, part] / weight.sum()
    return out @ params["to_out_0"]["kernel"] + params["to_out_0"]["bias"]


def test_norm_of_queries_and_keys_by_hand(random_params):
    """Of each head by itself, with one scale of its length for all; with the same weights and without the norm too."""
    rng = np.random.default_rng(1)
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 6), (2, 3, 4)))
    module = Attention(heads=2, use_bias=True, qk_norm=True)
    params = random_params(module, x, context)
    assert params["norm_q"]["scale"].shape == params["norm_k"]["scale"].shape == (3,)
    for name in ("norm_q", "norm_k"):
        params[name]["scale"] = rng.normal(size=3).astype(np.float32)
    plain = {name: leaves for name, leaves in params.items() if not name.startswith("norm")}
    normalised, expected = module.apply({"params": params}, x, context), attention_by_hand(params, x, context, 2)
    without = module.clone(qk_norm=False).apply({"params": plain}, x, context)
    np.testing.assert_allclose(normalised, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(without, attention_by_hand(plain, x, context, 2), rtol=1e-4, atol=1e-5)
    assert np.abs(normalised - without).max() > 0.1


OPTIONS = {  # the option; the fields that it is added to; shape of the context
    "patches of one": ({"patch_size": 1}, {}, (1, 8)),
    "patches of four": ({"patch_size": 4}, {}, (1, 8)),
    "RMS norm": ({"norm": "rms"}, {}, (1, 8)),
    "norm of queries and keys": ({"qk_norm": "rms"}, {}, (1, 8)),
    "an embedding for each block": ({"separate_embeddings": True}, {}, (2, 8)),
    "a text": ({"cross_attention_dim": 8}, {}, (1, 8)),
    "norm of queries and keys with a text": ({"qk_norm": "rms"}, {"cross_attention_dim": 6}, (3, 6)),
    "a wider feed-forward network": ({"mlp_ratio": 6.0}, {}, (1, 8)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_prediction_and_every_input_counts(name, random_params):
    """With the same weights wherever a module without the option has them too, of the same shape."""
    option, fields, context = OPTIONS[name]
    module, args = DiT(**TINY | fields | option), inputs(context=context)
    params = random_params(module, *args)
    predict = jax.jit(lambda *a: module.apply({"params": params}, *a), compiler_options=QUICK)
    with_option = predict(*args)
    assert with_option.shape == (2, 4, 4, 6) and np.isfinite(with_option).all()
    for i in range(3):
        changed = list(args)
        changed[i] = args[i] + 1
        assert np.abs(predict(*changed) - with_option).max() > 1e-3
    plain = DiT(**TINY | fields)
    args = (*args[:2], args[2] if fields else args[2][:, :1])  # of one embedding
    same, own = flatten_dict(params), flatten_dict(random_params(plain, *args))
    own |= {path: same[path] for path, leaf in own.items() if path in same and same[path].shape == leaf.shape}
    assert np.abs(output(plain, unflatten_dict(own), *args) - with_option).max() > 1e-3


def test_queries_and_keys_of_every_attention_are_normalised(random_params):
    """Both attentions of each block, to the image itself and to a text: each scale counts."""
    module, args = DiT(**TINY, qk_norm="rms", cross_attention_dim=6), inputs(context=(3, 6))
    flat = flatten_dict(random_params(module, *args))
    scales = [path for path in flat if path[-2] in ("norm_q", "norm_k")]
    blocks, attentions = [f"transformer_blocks_{i}" for i in range(2)], ("attn1", "attn2")
    assert sorted(path[:2] for path in scales) == sorted((b, a) for b in blocks for a in attentions for _ in "qk")
    predict = jax.jit(lambda p: module.apply({"params": unflatten_dict(p)}, *args), compiler_options=QUICK)
    before = predict(flat)
    for path in scales:
        assert np.abs(predict(flat | {path: 3 * flat[path]}) - before).max() > 1e-3, path


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
