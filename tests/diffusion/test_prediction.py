"""Prediction rows: each recovers z0, in every process that it fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.diffusion.forward import noise_level, q_sample, target
from ldm_jax.diffusion.prediction import PREDICTIONS, coefficient_tables, coefficients, from_z0, to_z0
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process

HAND = Process.variance_preserving([0.81, 0.36, 0.04])
PROCESSES = {
    "linear": make_process("linear", 10, beta_start=0.02, beta_end=0.5),
    "rectified_flow": make_process("rectified_flow", 10),
}
ZERO_SNR = make_process("scaled_linear", 100, zero_terminal_snr=True)
PAIRS = [(name, p) for name in PROCESSES for p in PREDICTIONS if name == "linear" or p in ("z0", "flow")]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@settings(max_examples=30)
@given(
    pair=st.sampled_from(PAIRS),
    t=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_targets_invert(pair, t, seed):
    process, prediction = PROCESSES[pair[0]], pair[1]
    z0, eps = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    t = jnp.array(t)
    z_t = q_sample(z0, t, eps, process)
    output = target(prediction, z0, eps, t, process)
    levels = noise_level(t, process).broadcast_to(z_t)
    np.testing.assert_allclose(to_z0(prediction, output, z_t, *levels), z0, atol=3e-5)
    np.testing.assert_allclose(from_z0(prediction, z0, z_t, *levels), output, atol=3e-5)


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("eps", [0, 1, 1, -0.8, 0.6]),
        ("v", [-0.8, 0.6, 0.6, -0.8, 1]),
        ("z0", [1, 0, 0, 1, 1]),
        ("flow", [-1, 1, 1, -0.8, 1.4]),
        ("edm", [0.8, -0.6, 0.6, 0.8, 1]),
    ],
)
def test_rows_by_hand(prediction, expected):
    np.testing.assert_allclose(coefficients(prediction, 0.6, 0.8), expected, rtol=1e-12)
    tables = coefficient_tables(prediction, HAND)
    np.testing.assert_allclose([table[1] for table in tables], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bfloat16_network_is_scheduled_in_float32(prediction):
    levels = noise_level(jnp.array([0, 2]), HAND).broadcast_to(jnp.zeros((2, 3)))
    output = normal(0, 2, 3).astype(jnp.bfloat16)
    for convert in (to_z0, from_z0):
        assert convert(prediction, output, normal(1, 2, 3), *levels).dtype == jnp.float32


@pytest.mark.parametrize("process", [HAND, ZERO_SNR, PROCESSES["rectified_flow"]])
@pytest.mark.parametrize("prediction", ["z0", "flow"])
def test_z0_and_flow_fit_every_process(prediction, process):
    assert all(np.isfinite(table).all() for table in coefficient_tables(prediction, process))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: coefficient_tables("x0", HAND), "prediction must be one of eps, v, z0, flow, edm, got 'x0'"),
        (lambda: coefficients("score", 0.6, 0.8), "got 'score'"),
        (lambda: to_z0("", jnp.ones(3), jnp.ones(3), 0.6, 0.8), "got ''"),
        (lambda: from_z0("x0", jnp.ones(3), jnp.ones(3), 0.6, 0.8), "got 'x0'"),
        (
            lambda: coefficient_tables("eps", ZERO_SNR),
            "does not determine z0 at timestep 99, where alpha = 0 and sigma = 1 (zero terminal SNR); predict v or z0",
        ),
        (
            lambda: coefficient_tables("v", PROCESSES["rectified_flow"]),
            "prediction 'v' does not determine z0 at timestep 8, where alpha = 0.1 and sigma = 0.9; predict z0 or flow",
        ),
        (lambda: coefficient_tables("eps", PROCESSES["rectified_flow"]), "timestep 9, where alpha = 0 and sigma = 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
