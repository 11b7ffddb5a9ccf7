import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.state import AdamW, make_optimizer

FIELDS = {"steps": 10, "learning_rate": 0.1, "adam_b2": 0.99, "weight_decay": 0.0, "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("decay", "warmup_steps", "expected"),
    [
        ("constant", 0, [0.1, 0.1, 0.1]),
        ("constant", 2, [0.0, 0.05, 0.1]),
        ("cosine", 0, [0.1, 0.05 * (1 + np.cos(0.1 * np.pi)), 0.05 * (1 + np.cos(0.2 * np.pi))]),
    ],
)
def test_learning_rate(decay, warmup_steps, expected):
    """Of a constant gradient, Adam makes steps as long as the rate."""
    optimizer = make_optimizer(AdamW(decay=decay, warmup_steps=warmup_steps, **FIELDS))
    params = jnp.zeros(())
    state, steps = optimizer.init(params), []
    for _ in expected:
        updates, state = optimizer.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(-float(updates))
    np.testing.assert_allclose(steps, expected, rtol=1e-5)


def test_equal_specs_give_the_same_optimizer():
    """By which equal stages are compiled once."""
    spec = AdamW(decay="cosine", warmup_steps=2, **FIELDS)
    assert make_optimizer(spec) is make_optimizer(AdamW(**spec._asdict()))
    assert make_optimizer(spec) is not make_optimizer(spec._replace(learning_rate=0.2))


def test_an_unknown_decay():
    with pytest.raises(ValueError, match="decay is 'step'; it must be 'constant' or 'cosine'"):
        make_optimizer(AdamW(decay="step", warmup_steps=0, **FIELDS))
