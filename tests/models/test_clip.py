"""The text encoder by hand and in NumPy; that it is transformers' own is proven in tests/parity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.clip import ACTIVATIONS, CLIPTextEncoder, Encoder, end_of_text

TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
    "eos_token_id": 19,
}
IDS = np.array([[18, 4, 7, 19, 0, 0], [18, 19, 19, 19, 19, 19]], np.int32)


def apply(module, params, ids):
    return jax.jit(module.apply)({"params": params}, ids)


def norm(p, x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def slow_layer(p, x, heads, activation, eps, causal):
    """One layer on one text [L, D] in float64, a position and a head at a time."""
    h = norm(p["layer_norm1"], x, eps)
    q, k, v = (linear(p["self_attn"][name], h) for name in ("q_proj", "k_proj", "v_proj"))
    size = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for i, head in np.ndindex(len(x), heads):
        seen, part = slice(0, i + 1 if causal else None), slice(head * size, (head + 1) * size)
        weight = np.exp(k[seen, part] @ q[i, part] / math.sqrt(size))
        mixed[i, part] = weight @ v[seen, part] / weight.sum()
    x = x + linear(p["self_attn"]["out_proj"], mixed)
    h = linear(p["mlp"]["fc1"], norm(p["layer_norm2"], x, eps))
    return x + linear(p["mlp"]["fc2"], activation(h))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("act, eps, projection_dim", [("quick_gelu", 1e-5, None), ("gelu", 1e-3, 5)])
def test_against_numpy(act, eps, projection_dim, random_params):
    encoder = CLIPTextEncoder(**TINY, hidden_act=act, layer_norm_eps=eps, projection_dim=projection_dim)
    params = random_params(encoder, IDS)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    tokens, positions = (p["embeddings"][f"{name}_embedding"]["embedding"] for name in ("token", "position"))
    features = apply(encoder, params, IDS)
    for b, end in enumerate((3, 1)):
        states = [tokens[IDS[b]] + positions]
        for i in range(2):
            layer = p["encoder"][f"layers_{i}"]
            states.append(slow_layer(layer, states[-1], 2, {"gelu": gelu, "quick_gelu": quick_gelu}[act], eps, True))
        last = norm(p["final_layer_norm"], states[2], eps)
        pooled = last[end] @ p["text_projection"]["kernel"] if projection_dim else last[end]
        np.testing.assert_allclose(features.last[b], last, atol=2e-5)
        np.testing.assert_allclose(features.penultimate[b], states[1], atol=2e-5)
        np.testing.assert_allclose(features.pooled[b], pooled, atol=2e-5)
    assert ("text_projection" in params) is (projection_dim is not None)


def test_the_layers_without_a_mask(random_params):
    """As a vision tower has them."""
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    encoder = Encoder(1, 2, 12, "quick_gelu", 1e-5, causal=False)
    params = random_params(encoder, x)
    before, after = apply(encoder, params, x)
    expected = slow_layer(params["layers_0"], x[0], 2, quick_gelu, 1e-5, False)
    assert np.array_equal(before, x)
    np.testing.assert_allclose(after[0], expected, atol=2e-5)


def test_activations_by_hand():
    """2 / (1 + exp(-3.404)) = 1.9356586, and 2 Phi(2) = 1.9544997 (its tanh approximation is 1.9545977)."""
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](jnp.array([2.0, 0.0])), [1.9356586, 0], rtol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.array([2.0, 0.0])), [1.9544997, 0], rtol=1e-6)


def test_no_token_changes_what_came_before(random_params):
    encoder = CLIPTextEncoder(**TINY)
    params = random_params(encoder, IDS)
    changed = IDS.copy()
    changed[0, 2] = 11
    a, b = apply(encoder, params, IDS), apply(encoder, params, changed)
    for name in ("last", "penultimate"):
        difference = np.abs(getattr(a, name) - getattr(b, name)).max(-1)
        assert (difference[0, :2] == 0).all() and (difference[1] == 0).all()
        assert (difference[0, 2:] > 1e-3).all()
    shorter = apply(encoder, params, IDS[:, :4])
    np.testing.assert_allclose(shorter.last, a.last[:, :4], atol=1e-5)


@pytest.mark.parametrize(
    "eos_token_id, ends",
    [
        (19, [2, 1, 0, 0]),  # its first position, or 0
        (2, [2, 1, 3, 0]),  # the first position of the highest id
        (5, [0, 0, 1, 0]),
    ],
)
def test_where_a_text_ends(eos_token_id, ends):
    ids = jnp.array([[18, 4, 19, 19], [18, 19, 0, 2], [4, 5, 5, 6], [7, 7, 7, 7]])
    assert np.array_equal(jax.jit(end_of_text, static_argnums=1)(ids, eos_token_id), ends)


@pytest.mark.parametrize("eos_token_id, ends", [(19, [1, 4]), (2, [4, 4])])
def test_pooled_is_where_the_text_ends(eos_token_id, ends, random_params):
    """A new token may have a higher id than the one that ends the text."""
    ids = np.array([[18, 19, 3, 19, 20], [18, 3, 4, 5, 19]], np.int32)
    encoder = CLIPTextEncoder(**TINY | {"eos_token_id": eos_token_id, "vocab_size": 21})
    features = apply(encoder, random_params(encoder, ids), ids)
    np.testing.assert_allclose(features.pooled, features.last[np.arange(2), ends], rtol=1e-6)


def test_one_layer_has_the_embeddings_before_it(random_params):
    encoder = CLIPTextEncoder(**TINY | {"num_hidden_layers": 1})
    params = random_params(encoder, IDS)
    tables = params["embeddings"]
    expected = tables["token_embedding"]["embedding"][IDS] + tables["position_embedding"]["embedding"]
    np.testing.assert_allclose(apply(encoder, params, IDS).penultimate, expected, rtol=1e-6)


def test_an_id_out_of_range_never_passes_for_a_token(random_params):
    encoder = CLIPTextEncoder(**TINY)
    features = apply(encoder, random_params(encoder, IDS), IDS.clip(max=18) + 2)
    assert np.isnan(features.last[:, 0]).all()


def test_gradients_are_finite(random_params):
    encoder = CLIPTextEncoder(**TINY, projection_dim=3)
    params = random_params(encoder, IDS)
    grads = jax.jit(jax.grad(lambda p: sum((f**2).sum() for f in encoder.apply({"params": p}, IDS))))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        # A bias of the keys adds the same to every score of a query, which the softmax takes no notice of.
        assert np.abs(grad).max() > 1e-3 or "['k_proj']['bias']" in jax.tree_util.keystr(path), path


def test_half_precision_keeps_float32_parameters(random_params):
    encoder = CLIPTextEncoder(**TINY, projection_dim=3)
    params = random_params(encoder, IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact, half = apply(encoder, params, IDS), apply(encoder.clone(dtype=jnp.bfloat16), params, IDS)
    assert [a.dtype for a in exact] == [jnp.float32] * 3
    assert [a.dtype for a in half] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(exact, half):
        np.testing.assert_allclose(a, b.astype(np.float32), atol=0.05 * np.abs(a).max())


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_act", "relu", "hidden_act must be one of gelu, quick_gelu; got 'relu'"),
        ("num_attention_heads", 3, "num_attention_heads must divide hidden_size; got 3 for 8"),
        ("num_hidden_layers", 0, "num_hidden_layers must be 1 or more; got 0"),
        ("projection_dim", 0, "projection_dim must be 1 or more; got 0"),
    ],
)
def test_refused_fields(field, value, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(CLIPTextEncoder(**TINY | {field: value}).init, jax.random.key(0), IDS)


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.zeros((1, 7), np.int32), "1 to 6 tokens; got 7"),
        (np.zeros((1, 0), np.int32), "1 to 6 tokens; got 0"),
        (np.zeros(6, np.int32), r"integers \[B, L\]; got int32 \(6,\)"),
        (np.zeros((1, 6), np.float32), r"integers \[B, L\]; got float32 \(1, 6\)"),
    ],
)
def test_refused_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(CLIPTextEncoder(**TINY).init, jax.random.key(0), ids)
