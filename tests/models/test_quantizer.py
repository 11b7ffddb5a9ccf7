import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.quantizer import VectorQuantizer, perplexity

CODES = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]], np.float32)
RAW = np.array([[[[0.75, 0.75], [2.0, 0.0]], [[0.25, 0.0], [3.0, -1.0]]]], np.float32)  # [1, 2, 2, 2]
PARAMS = {"params": {"embedding": {"embedding": CODES}}}
QUANTIZER = VectorQuantizer(3, 2)


def test_quantisation_by_hand():
    """Nearest codes 1, 2 (distance 1, the code 1 is at sqrt 2), 0, 2."""
    q = QUANTIZER.apply(PARAMS, jnp.asarray(RAW))
    assert q.indices.dtype == jnp.int32
    assert np.array_equal(q.indices, [[[1, 2], [0, 2]]])
    np.testing.assert_allclose(q.z_q, CODES[np.asarray(q.indices)], atol=1e-6)
    squares = [0.0625, 0.0625, 1, 0, 0.0625, 0, 0, 1]
    np.testing.assert_allclose(q.codebook_loss, np.mean(squares), rtol=1e-6)
    np.testing.assert_allclose(q.commitment_loss, np.mean(squares), rtol=1e-6)
    np.testing.assert_allclose(q.usage, [0.25, 0.25, 0.5])


def test_gradients_go_where_they_should():
    """z_q straight through to raw; the codebook term to the codes alone; the commitment term to raw alone."""
    weight = jnp.arange(8.0).reshape(RAW.shape)

    def grads(f):
        loss = lambda params, raw: f(QUANTIZER.apply(params, raw))  # noqa: E731
        params, raw = jax.grad(loss, argnums=(0, 1))(PARAMS, jnp.asarray(RAW))
        return params["params"]["embedding"]["embedding"], raw

    codes, raw = grads(lambda q: jnp.sum(q.z_q * weight))
    assert not codes.any()
    assert np.array_equal(raw, weight)

    codes, raw = grads(lambda q: q.codebook_loss)
    assert not raw.any()
    # d/de of mean over 8 numbers of (raw - e)^2: 2 (e - raw) / 8, summed over the code's positions
    np.testing.assert_allclose(codes, [[-0.0625, 0], [0.0625, 0.0625], [0.25, 0.25]], atol=1e-6)

    codes, raw = grads(lambda q: q.commitment_loss)
    assert not codes.any()
    np.testing.assert_allclose(raw[0, 0], [[-0.0625, -0.0625], [-0.25, 0]], atol=1e-6)


def test_half_precision_input_is_quantised_in_float32():
    q = QUANTIZER.apply(PARAMS, jnp.asarray(RAW, jnp.bfloat16))
    assert q.z_q.dtype == jnp.float32


@pytest.mark.parametrize("usage, expected", [([1, 0, 0, 0], 1.0), ([0.25] * 4, 4.0), ([0.5, 0.5, 0, 0], 2.0)])
def test_perplexity_by_hand(usage, expected):
    np.testing.assert_allclose(perplexity(jnp.array(usage)), expected, rtol=1e-6)


def test_codes_start_within_one_over_their_number():
    params = VectorQuantizer(10, 4).init(jax.random.key(0), jnp.zeros((1, 1, 1, 4)))
    largest = np.abs(params["params"]["embedding"]["embedding"]).max()
    assert 0.08 < largest <= 0.1
