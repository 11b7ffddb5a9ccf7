import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.models.discriminator import PatchDiscriminator

TINY = {"in_channels": 1, "features": 4, "layers": 2, "norm_num_groups": 2}


def abstract(module, shape):
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros(shape))
    return out, variables["params"]


@pytest.mark.parametrize(
    "layers, size, expected",
    [(3, (256, 256), (30, 30)), (2, (28, 28), (5, 5)), (1, (28, 20), (12, 8)), (2, (12, 15), (1, 1))],
)
def test_one_logit_per_patch(layers, size, expected):
    """256 -> 30 is pix2pix's 70x70 PatchGAN."""
    out, _ = abstract(PatchDiscriminator(**TINY | {"layers": layers}), (2, *size, 1))
    assert out.shape == (2, *expected, 1)


def test_parameter_count_by_hand():
    """Three hidden 4x4 convolutions, 1-4-8-16, biases in the first alone, two norms; and one to a logit."""
    _, params = abstract(PatchDiscriminator(**TINY), (1, 28, 28, 1))
    expected = (16 * 1 * 4 + 4) + (16 * 4 * 8 + 2 * 8) + (16 * 8 * 16 + 2 * 16) + (16 * 16 * 1 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 2933


def test_widths_stop_at_eight_times():
    _, params = abstract(PatchDiscriminator(**TINY | {"layers": 5}), (1, 96, 96, 1))
    assert [params[f"conv_{i}"]["kernel"].shape[-1] for i in range(6)] == [4, 8, 16, 32, 32, 32]


def test_initialisation_is_pix2pix(initialise):
    params = initialise(PatchDiscriminator(**TINY | {"features": 32, "layers": 1}), jnp.zeros((1, 8, 8, 1)))
    np.testing.assert_allclose(params["conv_1"]["kernel"].std(), 0.02, rtol=0.05)
    scale = params["norm_1"]["scale"]
    assert abs(scale.mean() - 1) < 0.01
    np.testing.assert_allclose(scale.std(), 0.02, rtol=0.4)
    assert not params["norm_1"]["bias"].any()


def test_gradients_reach_every_parameter_and_images_are_independent(random_params):
    module = PatchDiscriminator(**TINY)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    params = random_params(module, x)
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x))
    np.testing.assert_allclose(apply(params, np.stack([x[0], x[0]]))[0], apply(params, x)[0], atol=1e-5)
    grads = flatten_dict(jax.jit(jax.grad(lambda p: (apply(p, x) ** 2).mean()))(params))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-7 for g in grads.values())


def test_half_precision():
    out, params = abstract(PatchDiscriminator(**TINY, dtype=jnp.bfloat16), (1, 28, 28, 1))
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "fields, shape, message",
    [
        ({"layers": 0}, (1, 28, 28, 1), "at least 1 layer of stride 2; got layers=0"),
        ({"norm_num_groups": 3}, (1, 28, 28, 1), "multiple of norm_num_groups=3; 8 in"),
        ({}, (1, 28, 28, 3), "takes 1 channels on the last axis; got \\(1, 28, 28, 3\\)"),
        ({"layers": 3}, (1, 23, 28, 1), "no patch of 23x28 pixels; take sizes of 24 or more, or fewer layers"),
    ],
)
def test_errors(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        abstract(PatchDiscriminator(**TINY | fields), shape)
