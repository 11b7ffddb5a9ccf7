"""The hand-written gradients are those that JAX derives for Flax's own layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax.models.layers import upsample_nearest
from ldm_jax.models.primitives import Conv, Dense, GroupNorm, LayerNorm, gelu, sum_rows

CONV = nn.Conv(6, (3, 3), padding=((1, 1), (1, 1)))


class UpsampleThenConv:
    init = staticmethod(CONV.init)

    @staticmethod
    def apply(variables, x):
        return CONV.apply(variables, upsample_nearest(x))


PAIRS = {
    "dense": (Dense(6), nn.Dense(6)),
    "dense without bias": (Dense(6, use_bias=False), nn.Dense(6, use_bias=False)),
    "conv 3x3": (Conv(6, 3, 1, (1, 1)), nn.Conv(6, (3, 3), padding=((1, 1), (1, 1)))),
    "conv 3x3, stride 2, padded after": (
        Conv(6, 3, 2, (0, 1)),
        nn.Conv(6, (3, 3), strides=2, padding=((0, 1), (0, 1))),
    ),
    "upsampling conv": (Conv(6, upsample=True), UpsampleThenConv),
    "conv 1x1": (Conv(6, 1, 1, (0, 0)), nn.Conv(6, (1, 1))),
    "group norm": (GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False)),
    "group norm, a channel a group": (GroupNorm(8, 1e-6), nn.GroupNorm(8, epsilon=1e-6, use_fast_variance=False)),
    "layer norm": (LayerNorm(1e-5), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)),
}


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_flax(name, mean):
    ours, flax = PAIRS[name]
    x = mean + jax.random.normal(jax.random.key(0), (3, 6, 6, 8))
    params = ours.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)
    like = jax.eval_shape(flax.init, jax.random.key(1), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like)

    def result(module, params, x):
        y = module.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.value_and_grad(lambda p, x: result(ours, p, x), (0, 1), has_aux=True)(params, x)
    (_, expected), wanted = jax.value_and_grad(lambda p, x: result(flax, p, x), (0, 1), has_aux=True)(params, x)
    tolerance = {"rtol": 2e-4, "atol": 2e-4 if mean else 2e-5}
    np.testing.assert_allclose(y, expected, **tolerance)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["dense", "conv 3x3", "upsampling conv", "conv 1x1", "group norm", "layer norm"])
def test_bfloat16_is_computed_from_float32_parameters(name):
    ours = PAIRS[name][0].clone(dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    params = ours.init(jax.random.key(1), x)["params"]
    y = ours.apply({"params": params}, x)
    grads = jax.grad(lambda p: jnp.sum(ours.apply({"params": p}, x).astype(jnp.float32) ** 2))(params)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, grads)))
    exact = ours.clone(dtype=jnp.float32).apply({"params": params}, x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


def test_sums_over_rows():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(sum_rows(x), [60, 66, 72, 78])


def test_gelu_is_x_times_the_normal_distribution_function():
    x = np.linspace(-6, 6, 25, dtype=np.float32)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
    density = np.exp(-(x.astype(float) ** 2) / 2) / math.sqrt(2 * math.pi)
    value, pull_back = jax.vjp(gelu, jnp.asarray(x))
    np.testing.assert_allclose(value, x * cdf, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.full(25, 2.0))[0], 2 * (cdf + x * density), rtol=0, atol=1e-6)
    half, pull_back = jax.vjp(gelu, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and pull_back(half)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, gelu(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16))
