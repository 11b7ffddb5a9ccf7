import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import attention
from ldm_jax.models.attention import GEGLU, Attention, SelfAttention2D, Transformer2D, TransformerBlock, attend


def slow_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v in float64, one sample, head and query at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(q.shape[:3]):
        score = k[b, :, n] @ q[b, i, n] / math.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, i, n] = weight @ v[b, :, n] / weight.sum()
    return out


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def test_attend_against_a_slow_loop():
    q, k, v = draw((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    np.testing.assert_allclose(attend(q, k, v), slow_attention(q, k, v), atol=1e-5)


def test_causal_attention_sees_no_later_key():
    q, k, v = draw((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4))
    rows = [slow_attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]) for i in range(5)]
    np.testing.assert_allclose(attend(q, k, v, causal=True), np.concatenate(rows, axis=1), atol=1e-5)


def test_attend_to_one_key_is_its_value():
    q, k, v = draw((2, 5, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4))
    np.testing.assert_allclose(jnp.broadcast_to(attend(q, k, v), q.shape), slow_attention(q, k, v), atol=1e-6)


def test_softmax_is_float32_in_half_precision():
    """Scores near 100 are 0.5 apart in bfloat16; in float32 the softmax tells 100 from 100.25."""
    q = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    k = jnp.array([100.0, 100.5], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    q = q * jnp.bfloat16(1.0078125)  # products 100.78 and 101.29 are no bfloat16 numbers
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32)[0, 0, 0, 0], 1 / (1 + math.exp(-0.5 * 1.0078125)), atol=0.004)


@pytest.mark.parametrize(
    "dtype, queries, keys, head_size, device, fused",
    [
        (jnp.bfloat16, 64, 80, 64, True, True),
        (jnp.float16, 64, 64, 128, True, True),
        (jnp.float32, 64, 64, 64, True, False),
        (jnp.bfloat16, 49, 64, 64, True, False),
        (jnp.bfloat16, 64, 77, 64, True, False),
        (jnp.bfloat16, 64, 64, 20, True, False),
        (jnp.bfloat16, 64, 64, 256, True, False),
        (jnp.bfloat16, 64, 64, 64, False, False),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_asked_for_where_it_exists(
    monkeypatch, dtype, queries, keys, head_size, device, fused, causal
):
    asked = []
    fake = lambda q, k, v, is_causal, implementation: asked.append((is_causal, implementation)) or q  # noqa: E731
    monkeypatch.setattr(attention, "_on_ampere_or_later", lambda: device)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    q, kv = jnp.ones((1, queries, 2, head_size), dtype), jnp.ones((1, keys, 2, head_size), dtype)
    assert attend(q, kv, kv, causal=causal).shape == q.shape
    assert asked == ([(causal, "cudnn")] if fused else [])


@pytest.mark.parametrize("version, capability, expected", [("cuda 12090", "9.0", True), ("cuda 12090", "7.5", False)])
def test_which_devices_have_fused_attention(monkeypatch, version, capability, expected):
    class Client:
        platform_version = version

    class Device:
        client = Client()
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert attention._on_ampere_or_later() is expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs a CPU alone")
def test_the_cpu_has_no_fused_attention():
    assert not attention._on_ampere_or_later()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_fused_attention_is_right():
    q, k, v = (a.astype(jnp.bfloat16) for a in draw((2, 64, 2, 32), (2, 16, 2, 32), (2, 16, 2, 32)))
    assert attention._cudnn_supports(q, k)
    np.testing.assert_allclose(attend(q, k, v).astype(np.float32), slow_attention(q, k, v), atol=0.03)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_fused_causal_attention_is_right():
    q, k, v = (a.astype(jnp.bfloat16) for a in draw((2, 16, 2, 32), (2, 16, 2, 32), (2, 16, 2, 32)))
    assert attention._cudnn_supports(q, k)
    rows = [slow_attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]) for i in range(16)]
    fused = attend(q, k, v, causal=True).astype(np.float32)
    np.testing.assert_allclose(fused, np.concatenate(rows, axis=1), atol=0.03)


def test_multi_head_attention_by_hand(random_params):
    """Feature h * D + d of a projection is component d of head h; no bias but in the output projection."""
    x, context = draw((2, 5, 6), (2, 3, 4))
    module = Attention(heads=2)
    p = random_params(module, x, context)
    assert {name: sorted(leaves) for name, leaves in p.items()} == {
        "to_q": ["kernel"],
        "to_k": ["kernel"],
        "to_v": ["kernel"],
        "to_out_0": ["bias", "kernel"],
    }
    q, k, v = x @ p["to_q"]["kernel"], context @ p["to_k"]["kernel"], context @ p["to_v"]["kernel"]
    heads = [slow_attention(*(a[..., None, 3 * h : 3 * h + 3] for a in (q, k, v)))[:, :, 0] for h in range(2)]
    expected = np.concatenate(heads, -1) @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]
    np.testing.assert_allclose(module.apply({"params": p}, x, context), expected, atol=1e-5)


def test_geglu_by_hand():
    """Value first, gate second, exact GELU: 3 * 2 Phi(2) with Phi(2) = (1 + erf(sqrt 2)) / 2 = 0.9772499."""
    params = {"params": {"proj": {"kernel": np.array([[3.0, 2.0]], np.float32), "bias": np.zeros(2, np.float32)}}}
    np.testing.assert_allclose(GEGLU(1).apply(params, jnp.ones((1, 1, 1))), [[[5.8634990]]], rtol=1e-6)


@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_transformer_block_mixes_positions_only_by_self_attention(only_cross_attention, random_params):
    x, context = draw((1, 4, 8), (1, 3, 5))
    block = TransformerBlock(2, only_cross_attention)
    params = {"params": random_params(block, x, context)}
    apply = jax.jit(partial(block.apply, params))
    changed = apply(x.at[0, 3].add(1.0), context) - apply(x, context)
    assert np.abs(changed[0, 3]).max() > 0.1
    assert (np.abs(changed[0, 0]).max() > 1e-4) is not only_cross_attention
    moved = apply(x, context.at[0, 1].add(1.0)) - apply(x, context)
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("use_linear_projection, axes", [(False, 4), (True, 2)])
def test_transformer_starts_as_the_identity(use_linear_projection, axes, initialise, random_params):
    x, context = draw((2, 3, 4, 8), (2, 3, 5))
    module = Transformer2D(2, 2, 4, use_linear_projection=use_linear_projection)
    params = random_params(module, x, context) | {"proj_out": initialise(module, x, context, layer="proj_out")}
    assert np.array_equal(jax.jit(module.apply)({"params": params}, x, context), x)
    assert params["proj_in"]["kernel"].ndim == params["proj_out"]["kernel"].ndim == axes
    assert "transformer_blocks_1" in params


def test_self_attention_2d(initialise, random_params):
    """Starts as the identity; with other weights every position sees every other; one position works too."""
    (x,) = draw((2, 3, 4, 8))
    module = SelfAttention2D(groups=2, eps=1e-6)
    apply = jax.jit(module.apply)
    params = {"params": random_params(module, x)}
    still = {"params": params["params"] | {"to_out_0": initialise(module, x, layer="to_out_0")}}
    assert np.array_equal(apply(still, x), x)
    assert {"kernel", "bias"} == set(params["params"]["to_q"])
    changed = apply(params, x.at[:, 0, 0].add(3.0)) - apply(params, x)
    assert np.abs(changed[:, 2, 3]).max() > 1e-4
    assert apply(params, x[:, :1, :1]).shape == (2, 1, 1, 8)
