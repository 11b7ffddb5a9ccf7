import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.layers import Downsample, ResnetBlock, Upsample, check_groups, timestep_embedding, upsample_nearest
from ldm_jax.models.primitives import Conv, Dense, GroupNorm, LayerNorm


def test_upsample_nearest_doubles_each_pixel():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert np.array_equal(upsample_nearest(x)[0, :, :, 0], expected)


@pytest.mark.parametrize("size", [(7, 6), (8, 5), (7, 5), (8, 6)])
def test_upsample_nearest_to_a_size(size):
    """Output pixel i is input pixel floor(i * n_in / n_out), as PyTorch's interpolate has it."""
    x = np.arange(12.0).reshape(1, 4, 3, 1)
    rows = [i * 4 // size[0] for i in range(size[0])]
    columns = [i * 3 // size[1] for i in range(size[1])]
    assert np.array_equal(upsample_nearest(jnp.asarray(x), size), x[:, rows][:, :, columns])


def ones_like_params(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: np.full(s.shape, 0.0 if s.ndim == 1 else 1.0, np.float32), shapes)


def test_downsample_padding():
    """With a kernel of ones each output counts the pixels under it, so it shows where the zeros of the padding are."""
    x = jnp.ones((1, 4, 4, 1))
    both = Downsample(1, (1, 1))
    assert np.array_equal(both.apply(ones_like_params(both, x), x)[0, :, :, 0], [[4, 6], [6, 9]])
    after = Downsample(1, (0, 1))
    assert np.array_equal(after.apply(ones_like_params(after, x), x)[0, :, :, 0], [[9, 6], [6, 4]])


@pytest.mark.parametrize("padding, size", [((1, 1), 4), ((0, 1), 3)])
def test_downsample_of_an_odd_size(padding, size):
    out, _ = jax.eval_shape(Downsample(5, padding).init_with_output, jax.random.key(0), jnp.ones((2, 7, 7, 3)))
    assert out.shape == (2, size, size, 5)


def test_upsample_layer_sizes():
    x = jnp.ones((1, 4, 4, 1))
    layer = Upsample(1)
    params = ones_like_params(layer, x)
    assert layer.apply(params, x).shape == (1, 8, 8, 1)
    out = layer.apply(params, x, (7, 7))[0, :, :, 0]
    assert out.shape == (7, 7)
    assert (out[0, 0], out[0, 1], out[1, 1]) == (4, 6, 9)


def test_group_norm_against_numpy():
    """Also where the mean is 30 times the deviation, which E[x^2] - E[x]^2 does not survive in float32."""
    x = (30 + np.random.default_rng(0).normal(size=(2, 3, 5, 6))).astype(np.float32)
    grouped = x.astype(np.float64).reshape(2, 15, 2, 3)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 0.5)).reshape(x.shape)
    params = {"params": {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)}}
    np.testing.assert_allclose(GroupNorm(2, 0.5).apply(params, x), expected, atol=2e-5)


@pytest.mark.parametrize("kind, axes", [("group", (1, 2, 3)), ("layer", -1)])
def test_norm_statistics_are_float32_in_half_precision(kind, axes):
    x = jnp.asarray(30 + np.random.default_rng(0).normal(size=(2, 4, 4, 8)), jnp.bfloat16)
    params = {"params": {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}}
    norm = GroupNorm(1, 1e-5, dtype=jnp.bfloat16) if kind == "group" else LayerNorm(dtype=jnp.bfloat16)
    out = norm.apply(params, x)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(axes, keepdims=True)) / exact.std(axes, keepdims=True)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.02)


def test_layer_norm_eps():
    params = {"params": {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}}
    x = np.array([[-1e-3, 1e-3]], np.float32)  # variance 1e-6, eps 1e-5: 1e-3 / sqrt(1.1e-5)
    np.testing.assert_allclose(LayerNorm().apply(params, x)[0, 1], 0.301511, rtol=1e-5)
    np.testing.assert_allclose(LayerNorm(3e-6).apply(params, x)[0, 1], 0.5, rtol=1e-5)  # 1e-3 / sqrt(4e-6)


def test_timestep_embedding_by_hand():
    """dim 4: frequencies 1 and 10000^-1/2 = 0.01; with freq_shift 1, 1 and 10000^-1."""
    t = jnp.array([0, 2])
    c, s = np.cos, np.sin
    expected = [[1, 1, 0, 0], [c(2), c(0.02), s(2), s(0.02)]]
    np.testing.assert_allclose(timestep_embedding(t, 4), expected, atol=1e-6)
    expected = [[0, 0, 1, 1], [s(2), s(2e-4), c(2), c(2e-4)]]
    out = timestep_embedding(t, 4, flip_sin_to_cos=False, freq_shift=1)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_initialisation(initialise):
    """Uniform within 1/sqrt(fan_in), filling that range; zeros where asked for; biases 0."""
    x = jnp.zeros((1, 4, 4, 16))
    params = initialise(Conv(32), x)
    largest, bound = np.abs(params["kernel"]).max(), (9 * 16) ** -0.5
    assert 0.98 * bound < largest <= bound
    assert not params["bias"].any()
    largest = np.abs(initialise(Dense(64), x)["kernel"]).max()
    assert 0.98 / 4 < largest <= 1 / 4
    for layer in (Conv(2, zero=True), Dense(2, zero=True)):
        assert not initialise(layer, x)["kernel"].any()


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_resnet_block_starts_as_the_identity(initialise, random_params):
    x, temb = draw(2, 4, 4, 8), draw(2, 6)
    block = ResnetBlock(8, groups=4, eps=1e-5)
    params = random_params(block, x, temb) | {"conv2": initialise(block, x, temb, layer="conv2")}
    assert np.array_equal(jax.jit(block.apply)({"params": params}, x, temb), x)


def test_resnet_block_uses_the_time_embedding_of_each_sample(random_params):
    x = draw(2, 4, 4, 8)
    temb = jnp.array([[1.0, 2.0], [1.0, -2.0]])
    block = ResnetBlock(4, groups=2, eps=1e-5)
    params = {"params": random_params(block, x, temb)}
    out = jax.jit(block.apply)(params, x, temb)
    assert out.shape == (2, 4, 4, 4)
    assert np.abs(out[0] - out[1]).max() > 0.1
    swapped = jax.jit(block.apply)(params, x[::-1], temb[::-1])
    np.testing.assert_allclose(swapped[::-1], out, atol=1e-6)


def test_dropout(random_params):
    x = draw(1, 4, 4, 8)
    block = ResnetBlock(8, groups=4, eps=1e-5, dropout=0.5)
    params = {"params": random_params(block, x)}
    plain = jax.jit(ResnetBlock(8, groups=4, eps=1e-5).apply)(params, x)
    assert np.array_equal(jax.jit(block.apply)(params, x), plain)
    apply = jax.jit(lambda key: block.apply(params, x, deterministic=False, rngs={"dropout": key}))
    dropped = apply(jax.random.key(3))
    assert np.abs(dropped - plain).max() > 0.1


def test_computation_in_half_precision_keeps_float32_parameters():
    x = jnp.ones((1, 4, 4, 8))
    out, variables = jax.eval_shape(ResnetBlock(4, 4, 1e-5, dtype=jnp.bfloat16).init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("groups, message", [(3, "8 in \\(6, 8\\) is not"), (0, "1 or more; got 0")])
def test_groups_that_do_not_divide(groups, message):
    with pytest.raises(ValueError, match=message):
        check_groups((6, 8), groups)
