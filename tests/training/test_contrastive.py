"""The contrastive loss against matrices by hand, its gradient against the formula, on one, two and four devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.contrastive import caption_arrays, contrastive_loss, with_bounded_scale

LN = np.log
# With the identity as texts, image text^T is this matrix; its exponentials are [[2, 1, 1], [1, 2, 1], [3, 1, 4]].
TEXT, IMAGE = np.eye(3), LN(np.array([[2, 1, 1], [1, 2, 1], [3, 1, 4]]))


def loss(scale, sampled, captions):
    arrays = np.float32(TEXT), np.float32(IMAGE), np.float32(scale), np.array(sampled), np.array(captions)
    return jax.jit(contrastive_loss)(*arrays)


def test_three_pairs_by_hand():
    """Rows (the text of an image): 2/4, 2/4, 4/8. Columns (the image of a text): 2/6, 2/4, 4/6.

    Cross-entropies ln 2, ln 2, ln 2 and ln 3, ln 2, ln 3/2. Image 2 is nearer to text 0 than image 0 is.
    """
    measured = loss(1.0, [0, 1, 2], [[0], [1], [2]])
    np.testing.assert_allclose(measured["loss"], [LN(6) / 2, LN(4) / 2, LN(3) / 2], rtol=1e-6)
    assert np.array_equal(measured["text_accuracy"], [1, 1, 1])
    assert np.array_equal(measured["image_accuracy"], [0, 1, 1])


def test_the_scale_sharpens():
    """Twice the scale squares the exponentials: rows 4/6, 4/6, 16/26, columns 4/14, 4/6, 16/18."""
    rows, columns = [4 / 6, 4 / 6, 16 / 26], [4 / 14, 4 / 6, 16 / 18]
    measured = loss(2.0, [0, 1, 2], [[0], [1], [2]])
    np.testing.assert_allclose(measured["loss"], -(LN(rows) + LN(columns)) / 2, rtol=1e-6)


def test_one_caption_of_two_images_is_true_of_both():
    """Examples 0 and 1 share their caption: uniform targets over texts 0 and 1, and over images 0 and 1.

    Rows: -(ln 2/4 + ln 1/4) / 2 = 3/2 ln 2 twice, ln 2. Columns: -(ln 2/6 + ln 1/6) / 2 = (ln 3 + ln 6) / 2,
    -(ln 1/4 + ln 2/4) / 2 = 3/2 ln 2, ln 3/2.
    """
    measured = loss(1.0, [5, 5, 7], [[5], [5], [7]])
    rows, columns = [1.5 * LN(2), 1.5 * LN(2), LN(2)], [LN(18) / 2, 1.5 * LN(2), LN(1.5)]
    np.testing.assert_allclose(measured["loss"], (np.array(rows) + columns) / 2, rtol=1e-6)
    assert np.array_equal(measured["image_accuracy"], [0, 1, 1])


def test_a_text_is_true_of_every_image_that_has_it():
    """Image 0 has the captions 5 and 7, and 5 was sampled; image 1 has 7 alone: text 1 is true of both, text 0 of one.

    Rows: 3/2 ln 2, ln 2, ln 2. Columns: ln 3, 3/2 ln 2, ln 3/2.
    """
    measured = loss(1.0, [5, 7, 9], [[5, 7], [7, 7], [9, 9]])
    rows, columns = [1.5 * LN(2), LN(2), LN(2)], [LN(3), 1.5 * LN(2), LN(1.5)]
    np.testing.assert_allclose(measured["loss"], (np.array(rows) + columns) / 2, rtol=1e-6)


RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=(5, 4)).astype(np.float32) for name in ("text", "image")}
PARAMS["scale"] = np.float32(7.0)
BATCH = {name: RNG.normal(size=(8, 5)).astype(np.float32) for name in ("text", "image")}
BATCH["sampled"] = np.array([0, 1, 2, 3, 0, 1, 4, 5], np.int32)
BATCH["captions"] = np.stack([BATCH["sampled"], [1, 1, 2, 3, 1, 1, 6, 5]], axis=1).astype(np.int32)


@cache
def by_formula():
    """Loss and gradient in float64.

    With logits S = scale image text^T, row-wise softmax P and targets Y, column-wise Q and Z, the mean loss has the
    gradient G = (P - Y + Q - Z) / 2B at S.
    """
    text, image = (BATCH[name].astype(np.float64) @ PARAMS[name] for name in ("text", "image"))
    scale, n = float(PARAMS["scale"]), 8
    logits = scale * image @ text.T
    true = np.array([[sampled in own for sampled in BATCH["sampled"]] for own in BATCH["captions"]])
    e = np.exp(logits - logits.max())
    p, q = e / e.sum(1, keepdims=True), e / e.sum(0)
    y, z = true / true.sum(1, keepdims=True), true / true.sum(0)
    g = (p - y + q - z) / (2 * n)
    grads = {"text": BATCH["text"].T @ (scale * g.T @ image), "image": BATCH["image"].T @ (scale * g @ text)}
    return -(y * LN(p) + z * LN(q)).sum() / (2 * n), grads | {"scale": (g * logits).sum() / scale}


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_whole_batch_on_any_number_of_devices(devices, four_devices):
    def mean_loss(params, batch):
        text, image = (batch[name] @ params[name] for name in ("text", "image"))
        captions = batch["sampled"], batch["captions"]
        return contrastive_loss(text, image, params["scale"], *captions, axis_name="data")["loss"].mean()

    def both(params, batch):
        return jax.lax.pmean(jax.value_and_grad(mean_loss)(params, batch), "data")

    parts = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), BATCH)
    compiled = jax.pmap(both, axis_name="data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:devices])
    value, grads = compiled(PARAMS, parts)
    expected, expected_grads = by_formula()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(expected_grads["text"]).min() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


def test_the_scale_stops_at_100():
    """Steps of 1: log 100 = 4.605 is reached from 4 in one, kept, and left again downwards."""
    optimizer = with_bounded_scale(optax.sgd(1.0))
    params = {"logit_scale": jnp.float32(4.0), "text": jnp.ones(2)}
    state, seen = optimizer.init(params), []
    for gradient in (-1.0, -1.0, 1.0):
        updates, state = optimizer.update({"logit_scale": jnp.float32(gradient), "text": -jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["logit_scale"]))
    np.testing.assert_allclose(seen, [LN(100), LN(100), LN(100) - 1], rtol=1e-6)
    assert np.array_equal(params["text"], [4, 4])


def test_equal_captions_have_equal_numbers():
    ids = np.array([[[7, 1], [7, 2]], [[7, 3], [7, 1]], [[7, 2], [7, 2]]])
    arrays = caption_arrays(ids)
    assert np.array_equal(arrays["ids"], ids) and arrays["index"].dtype == arrays["ids"].dtype == np.int32
    assert np.array_equal(arrays["index"], [[0, 1], [2, 0], [1, 1]])


@pytest.mark.parametrize(
    "ids, given",
    [
        (np.zeros((2, 3), int), r"int64 \[2, 3\]"),
        (np.zeros((2, 0, 3), int), r"int64 \[2, 0, 3\]"),
        (np.zeros((2, 1, 3)), r"float64 \[2, 1, 3\]"),
    ],
)
def test_refused_captions(ids, given):
    with pytest.raises(ValueError, match=rf"captions must be integers \[P, K, L\] of one or more each; got {given}"):
        caption_arrays(ids)
