"""VGG16, AlexNet and LPIPS: shapes, hand-made weights, gradients; the published numbers are in tests/interop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config.fields import LPIPS_MIN_SIZE
from ldm_jax.models.perceptual import (
    IMAGENET_SCALE,
    IMAGENET_SHIFT,
    LPIPS,
    TOWERS,
    VGG16,
    AlexNet,
    conv3x3,
    imagenet_input,
)


def random_params(module, *inputs, seed=0):
    """Small random parameters, drawn in NumPy: much faster than the module's own init."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / fan_in))

    return {"params": jax.tree.map(draw, shapes)}


def pixels(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def test_imagenet_input_is_the_published_normalisation_and_repeats_grey():
    grey = jnp.full((1, 16, 16, 1), 0.5)
    out = imagenet_input(grey, 16, "VGG16")
    assert out.shape == (1, 16, 16, 3)
    expected = [(0.5 - shift) / scale for shift, scale in zip(IMAGENET_SHIFT, IMAGENET_SCALE)]
    np.testing.assert_allclose(out[0, 3, 4], expected, rtol=1e-6)
    # ImageNet's own mean, in [0, 1], is where the towers see 0.
    mean = 2 * jnp.broadcast_to(jnp.array([0.485, 0.456, 0.406]), (1, 16, 16, 3)) - 1
    np.testing.assert_allclose(imagenet_input(mean, 16, "VGG16"), 0, atol=1e-6)


def test_the_smallest_images_are_those_of_the_config():
    assert LPIPS_MIN_SIZE.keys() == TOWERS.keys()
    for net, size in LPIPS_MIN_SIZE.items():
        shapes = jax.eval_shape(
            lambda x, net=net: TOWERS[net]().init_with_output(jax.random.key(0), x)[0], pixels(1, size, size, 1)
        )
        assert min(shapes[-1].shape[1:3]) == 1
        with pytest.raises(ValueError, match=f"at least {size}x{size}"):
            TOWERS[net]().init(jax.random.key(0), pixels(1, size, size - 1, 1))


def test_vgg16_gives_five_taps_for_28_pixel_images():
    taps = jax.eval_shape(lambda x: VGG16().init_with_output(jax.random.key(0), x)[0], pixels(2, 28, 28, 1))
    assert [tap.shape for tap in taps] == [
        (2, 28, 28, 64),
        (2, 14, 14, 128),
        (2, 7, 7, 256),
        (2, 3, 3, 512),
        (2, 1, 1, 512),
    ]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (3, 3), (2, 4)])
def test_conv3x3_on_tiny_fields_is_the_plain_convolution_and_so_are_its_gradients(size):
    h = pixels(2, *size, 4)
    conv = nn.Conv(5, (3, 3), padding=1)
    variables = random_params(conv, h)

    def plain(variables, h):
        return jnp.sum(jnp.sin(conv.apply(variables, h)))

    def ours(variables, h):
        return jnp.sum(jnp.sin(nn.apply(conv3x3, conv)(variables, h)))

    assert nn.apply(conv3x3, conv)(variables, h).shape == (2, *size, 5)
    for got, want in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(variables, h)) for f in (ours, plain))):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_alexnet_gives_five_taps():
    taps = jax.eval_shape(lambda x: AlexNet().init_with_output(jax.random.key(0), x)[0], pixels(2, 64, 64, 3))
    assert [tap.shape for tap in taps] == [
        (2, 15, 15, 64),
        (2, 7, 7, 192),
        (2, 3, 3, 384),
        (2, 3, 3, 256),
        (2, 3, 3, 256),
    ]


@pytest.mark.parametrize(
    ("tower", "shape", "words"),
    [
        (VGG16, (1, 15, 28, 1), "at least 16x16, got 15x28"),
        (AlexNet, (1, 28, 28, 1), "at least 31x31, got 28x28"),
        (VGG16, (1, 28, 28, 2), "1 or 3"),
        (VGG16, (28, 28, 1), "1 or 3"),
    ],
)
def test_towers_refuse_what_they_cannot_see(tower, shape, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(tower().init, jax.random.key(0), jnp.zeros(shape))


def test_lpips_refuses_unknown_nets_and_unlike_shapes():
    x = pixels(1, 32, 32, 1)
    with pytest.raises(ValueError, match="vgg16, alexnet; got 'resnet'"):
        jax.eval_shape(LPIPS("resnet").init, jax.random.key(0), x, x)
    with pytest.raises(ValueError, match="one shape"):
        jax.eval_shape(LPIPS().init, jax.random.key(0), x, x[:, :16])


def test_lpips_is_the_sum_written_out():
    """Equation 1 from the taps, pixel by pixel in NumPy."""
    x, y = pixels(2, 32, 32, 3, seed=1), pixels(2, 32, 32, 3, seed=2)
    variables = random_params(LPIPS("alexnet"), x, y)
    params = variables["params"]
    expected = np.zeros(2)
    tower = {"params": params["tower"]}
    for level, (f_x, f_y) in enumerate(zip(AlexNet().apply(tower, x), AlexNet().apply(tower, y))):
        lin = np.asarray(params[f"lin{level}"], np.float64)
        for b in range(2):
            per_pixel = []
            for row_x, row_y in zip(np.asarray(f_x[b], np.float64), np.asarray(f_y[b], np.float64)):
                for u, v in zip(row_x, row_y):
                    u, v = u / max(np.linalg.norm(u), 1e-9), v / max(np.linalg.norm(v), 1e-9)
                    per_pixel.append(np.sum(lin * (u - v) ** 2))
            expected[b] += np.mean(per_pixel)
    np.testing.assert_allclose(LPIPS("alexnet").apply(variables, x, y), expected, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{"net": "vgg16"}, {"net": "alexnet", "resize": 48}])
def test_lpips_of_28_pixel_images_is_per_example_zero_at_itself_and_differentiable(kwargs):
    module = LPIPS(**kwargs)
    x = pixels(2, 28, 28, 1)
    y = x.at[1].set(-x[1])
    variables = random_params(module, x, y)
    variables["params"] = {k: abs(v) if k.startswith("lin") else v for k, v in variables["params"].items()}

    @jax.jit
    def distances_and_gradient(x, y):
        grad, d = jax.grad(lambda y: (lambda d: (d.sum(), d))(module.apply(variables, x, y)), has_aux=True)(y)
        return d, grad

    d, gradient = distances_and_gradient(x, y)
    assert d.shape == (2,) and d.dtype == jnp.float32
    assert d[0] < 1e-10 and d[1] > 1e-3
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0]).max() < 1e-3 * np.abs(gradient[1]).max()


def test_gradient_is_finite_where_all_features_are_zero():
    """The published sqrt(sum f^2) gives NaN here."""
    x = pixels(1, 32, 32, 1)
    zeros = jax.tree.map(jnp.zeros_like, random_params(LPIPS("alexnet"), x, x))
    gradient = jax.jit(jax.grad(lambda y: LPIPS("alexnet").apply(zeros, x, y).sum()))(0.5 * x)
    assert np.isfinite(gradient).all()


def test_bfloat16_towers_agree_roughly_and_return_float32():
    x, y = pixels(2, 32, 32, 1, seed=1), pixels(2, 32, 32, 1, seed=2)
    variables = random_params(LPIPS("alexnet"), x, y)
    variables["params"] = {k: abs(v) if k.startswith("lin") else v for k, v in variables["params"].items()}
    exact = LPIPS("alexnet").apply(variables, x, y)
    rough = LPIPS("alexnet", dtype=jnp.bfloat16).apply(variables, x, y)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, rtol=0.1)
    assert not np.array_equal(rough, exact)
