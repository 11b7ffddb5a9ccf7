"""Feature extraction and perceptual distances on stored images: one compile, right padding, honest hashes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.evaluation.features import lpips_distance, vgg16_features
from ldm_jax.interop.lpips_weights import load_lpips
from ldm_jax.models.perceptual import LPIPS, VGG16
from ldm_jax.models.pixels import to_pixels
from ldm_jax.runtime.parallel import map_in_batches, parallel_map
from ldm_jax.sampling.image_grids import check_images


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9])
def test_the_last_batch_is_padded_and_cut(n):
    shapes = []

    def double(params, batch):
        shapes.append(batch[0].shape)
        return jnp.asarray(batch[0] + batch[1])

    rows = np.arange(2 * n).reshape(n, 2)
    np.testing.assert_array_equal(map_in_batches(double, None, (rows, rows), 4), 2 * rows)
    assert set(shapes) == {(4, 2)} and len(shapes) == -(-n // 4)


@pytest.mark.parametrize("batch_size", [1, 6, 8])
def test_a_batch_need_not_divide_over_the_devices(batch_size, four_devices):
    double, rows = parallel_map(lambda params, batch: params * batch), np.arange(22.0).reshape(11, 2)
    np.testing.assert_array_equal(map_in_batches(double, 2.0, rows, batch_size), 2 * rows)


def test_to_pixels_spans_the_range():
    np.testing.assert_allclose(to_pixels(jnp.array([0, 255], jnp.uint8)), [-1, 1])


def test_vgg16_features_are_the_mean_of_the_last_tap_whatever_the_batch():
    x = images(3, 28, 28, 1)
    extractor = vgg16_features(resize=32, batch_size=2)
    features = extractor(x)
    assert features.shape == (3, 512) and features.dtype == np.float32
    params, digest = load_lpips("vgg16")
    assert (extractor.weights_sha256, extractor.resize) == (digest, 32)
    # Bilinear from 28 to 32 written out: output pixel i sits at (i + 0.5) * 28 / 32 - 0.5, edges held.
    at = np.clip((np.arange(32) + 0.5) * 28 / 32 - 0.5, 0, 27)
    left = np.minimum(at.astype(int), 26)
    weights = np.zeros((32, 28), np.float32)
    weights[np.arange(32), left], weights[np.arange(32), left + 1] = 1 - (at - left), at - left
    resized = np.einsum("ih,nhwc,jw->nijc", weights, np.asarray(to_pixels(x)), weights)
    expected = jax.jit(VGG16().apply)({"params": params["tower"]}, resized)[-1].mean(axis=(1, 2))
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_one_compile_for_any_number_of_images():
    extractor = vgg16_features(resize=16, batch_size=2)
    compiled = extractor.apply.func._cache_size
    extractor(images(2, 28, 28, 1))
    before = compiled()
    extractor(images(5, 28, 28, 1))
    extractor(images(1, 28, 28, 1))
    vgg16_features(resize=16, batch_size=2)(images(1, 28, 28, 1))
    assert compiled() == before


def test_lpips_distance_equals_the_module():
    x, y = images(3, 28, 28, 3), images(3, 28, 28, 3, seed=1)
    distance = lpips_distance("alexnet", resize=32, batch_size=2)
    params, digest = load_lpips("alexnet")
    assert (distance.weights_sha256, distance.name) == (digest, "LPIPS-alexnet")
    expected = jax.jit(LPIPS("alexnet", resize=32).apply)({"params": params}, to_pixels(x), to_pixels(y))
    np.testing.assert_allclose(distance(x, y), expected, rtol=1e-5)
    with pytest.raises(InputError, match="image by image"):
        distance(x, y[:2])
    with pytest.raises(InputError, match="image by image"):
        distance(x, y.astype(np.float32))


@pytest.mark.parametrize(("net", "least"), [("vgg16", 16), ("alexnet", 31)])
def test_lpips_distance_of_small_images_is_refused(net, least):
    with pytest.raises(InputError, match=f"needs resize of at least {least}, got {least - 1}"):
        lpips_distance(net, resize=least - 1)
    small = images(2, least, least - 1, 3)
    with pytest.raises(InputError, match=f"needs sides of at least {least}, got .*; set resize"):
        lpips_distance(net)(small, small)


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), "float32"),
        (np.zeros((2, 8, 8), np.uint8), r"\[2, 8, 8\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"\[2, 8, 8, 4\]"),
        (np.zeros((0, 8, 8, 1), np.uint8), "at least one"),
        ([1, 2], "list"),
    ],
)
def test_what_is_not_images_is_refused(bad, given):
    with pytest.raises(InputError, match=f"the samples.*{given}"):
        check_images(bad, "the samples")


def test_bad_arguments():
    with pytest.raises(InputError, match="at least 16, got 8"):
        vgg16_features(resize=8)
    extractor = replace(vgg16_features(), apply=lambda params, x: x.reshape(len(x), -1), batch_size=4)
    with pytest.raises(InputError, match="VGG16"):
        extractor(np.zeros((2, 3), np.uint8))
