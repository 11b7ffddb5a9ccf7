"""FID's Inception: its peculiar input, pools and shapes. The numbers against torch-fidelity are in tests/parity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.inception import InceptionE, InceptionV3, average_pool, conv_relu, inception_input


def test_input_is_tensorflow_1s_bilinear_written_out():
    images = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 1), dtype=np.uint8)
    got = inception_input(jnp.asarray(images))
    assert got.shape == (1, 299, 299, 3)
    for i, j in ((0, 0), (17, 100), (150, 298), (298, 1)):
        y, x = i * 5 / 299, j * 7 / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 6)
        pixel = images[0, :, :, 0].astype(float)
        upper = pixel[top, left] * (1 - x + left) + pixel[top, right] * (x - left)
        lower = pixel[bottom, left] * (1 - x + left) + pixel[bottom, right] * (x - left)
        value = upper * (1 - y + top) + lower * (y - top)
        np.testing.assert_allclose(got[0, i, j], [(value - 128) / 128] * 3, atol=2e-5)


def test_input_of_the_right_size_is_only_scaled():
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_allclose(inception_input(jnp.asarray(images)), (images.astype(np.float32) - 128) / 128, atol=1e-6)


def test_average_pool_leaves_padding_out_and_the_last_block_pools_by_maximum():
    h = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(average_pool(h)[0, 0, 0], [2.0])  # (0 + 1 + 3 + 4) / 4
    np.testing.assert_allclose(average_pool(h)[0, 1, 1], [4.0])
    for max_pool, corner in ((False, 2.0), (True, 4.0)):
        block = InceptionE(max_pool=max_pool)
        shapes = jax.eval_shape(block.init, jax.random.key(0), h)["params"]
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        params["branch_pool"]["kernel"] += 1.0
        out = block.apply({"params": params}, h)
        assert out.shape == (1, 3, 3, 2048)
        np.testing.assert_allclose(out[0, 0, 0, -192:], corner)
        np.testing.assert_allclose(out[..., :-192], 0)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "size"),
    [(3, 2, False, (4, 3)), (3, 1, True, (9, 8)), ((1, 7), 1, True, (9, 8)), (1, 1, False, (9, 8))],
)
def test_unit_sizes_and_relu(kernel, stride, pad, size):
    class One(nn.Module):
        @nn.compact
        def __call__(self, h):
            return conv_relu(h, "layer", 5, kernel, stride, pad)

    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8, 3)), jnp.float32)
    out, variables = One().init_with_output(jax.random.key(0), h)
    assert out.shape == (2, *size, 5) and (out >= 0).all() and (out > 0).any()
    assert set(variables["params"]["layer"]) == {"kernel", "bias"}


def test_the_whole_network_on_paper():
    out, variables = jax.eval_shape(
        InceptionV3().init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.uint8)
    )
    assert out.shape == (2, 2048) and out.dtype == jnp.float32
    params = variables["params"]
    assert len(params) == 5 + 11
    convolutions = sum(
        "kernel" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    )
    assert convolutions == 94
    # torchvision's inception_v3 without AuxLogits and fc has 21,785,568 parameters, of which 17,216 are the batch
    # norms' scales; here each convolution has only the bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21_785_568 - 17_216
    assert params["Mixed_7c"]["branch3x3dbl_3a"]["kernel"].shape == (1, 3, 384, 384)
