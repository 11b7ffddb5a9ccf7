"""Counts of operations and activations, against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ldm_jax.runtime.operations import count_flops, saved_bytes

NHWC = ("NHWC", "HWIO", "NHWC")


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def flops(function, *arguments):
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def convolve(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC} | options
    return lax.conv_general_dilated(x, kernel, **options)


W, X, IMAGES, KERNEL = zeros(6, 5), zeros(4, 6), zeros(2, 8, 8, 3), zeros(3, 3, 3, 7)
PRODUCT = 2 * 4 * 6 * 5

CASES = {
    "product": (lambda x, w: x @ w, (X, W), PRODUCT),
    "batch of products": (lambda q, k: jnp.einsum("bqnd,bknd->bnqk", q, k), (zeros(2, 9, 3, 8), zeros(2, 7, 3, 8)),
                          2 * 2 * 3 * 9 * 7 * 8),
    "elementwise": (lambda x: jnp.tanh(x) + x, (X,), 0),
    "convolution": (convolve, (IMAGES, KERNEL), 2 * (2 * 8 * 8 * 7) * (3 * 3 * 3)),
    "strided": (lambda x, k: convolve(x, k, window_strides=(2, 2)), (IMAGES, KERNEL), 2 * (2 * 4 * 4 * 7) * 27),
    "transposed": (lambda x, k: convolve(x, k, lhs_dilation=(2, 2), padding=((2, 1), (2, 1))),
                   (IMAGES, KERNEL), 2 * (2 * 16 * 16 * 7) * 27 // 4),
    "grouped": (lambda x, k: convolve(x, k, feature_group_count=3), (IMAGES, zeros(3, 3, 1, 6)),
                2 * (2 * 8 * 8 * 6) * 9),
    "loop": (lambda x, w: lax.scan(lambda c, _: (c, x @ w), 0.0, None, length=11)[1], (X, W), 11 * PRODUCT),
    "loop in a loop": (lambda x, w: lax.fori_loop(
        0, 3, lambda _, y: lax.fori_loop(0, 5, lambda _, z: z @ w @ w.T, y), x), (X, W), 15 * 2 * PRODUCT),
    "jit": (jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w)), (X, W), PRODUCT),
    "the larger branch": (lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ (w @ w.T) @ w), (X, W),
                          2 * 6 * 5 * 6 + 2 * 4 * 6 * 6 + PRODUCT),
    "gradient": (jax.grad(lambda w, x: (x @ w).sum()), (W, X), PRODUCT + 2 * 4 * 6 * 5),
    "gradient, both": (jax.grad(lambda w, x: ((x @ w) ** 2).sum(), (0, 1)), (W, X), 3 * PRODUCT),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operations_are_counted(name):
    function, arguments, expected = CASES[name]
    assert flops(function, *arguments) == expected


def test_the_gradient_of_a_strided_convolution_is_twice_its_operations():
    """Zeros that dilate the input of the backward pass do not count."""

    def loss(x, kernel):
        return (convolve(x, kernel, window_strides=(2, 2)) ** 2).sum()

    forward = 2 * (2 * 4 * 4 * 7) * 27
    counted = flops(jax.grad(loss, (0, 1)), IMAGES, KERNEL)
    assert counted == pytest.approx(3 * forward, rel=0.01)


def test_operations_of_all_devices_are_counted(four_devices):
    function = jax.pmap(lambda x, w: x @ w, in_axes=(0, None), devices=jax.devices()[:4])
    assert flops(function, zeros(4, 4, 6), W) == 4 * PRODUCT


def saved(function, *arguments):
    return saved_bytes(jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr)


def test_activations_are_what_the_backward_pass_reads():
    def layers(w, x, wrap=lambda layer: layer):
        for _ in range(3):
            x = wrap(lambda x: jnp.sin(x @ w))(x)
        return x.sum()

    w, x = zeros(8, 8), zeros(16, 8)
    # Of sin its derivative, of each product but the first its input.
    assert saved(layers, w, x) == 5 * 16 * 8 * 4
    # With checkpointing the input of each layer but the first, and the derivative in one of them.
    assert saved(lambda w, x: layers(w, x, jax.checkpoint), w, x) == 2 * 16 * 8 * 4

    def accumulated(w, x):
        gradient = jax.grad(layers)
        return lax.scan(lambda total, rows: (total + gradient(w, rows), None), w, x)[0]

    assert saved_bytes(jax.make_jaxpr(accumulated)(w, zeros(4, 4, 8)).jaxpr) == 5 * 4 * 8 * 4
