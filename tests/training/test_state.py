import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.state import AdamW, init_state, make_optimizer, update_if_finite

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


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_step_that_is_not_finite_or_not_the_next_changes_nothing(backend, monkeypatch):
    """By a branch on CPUs and a selection elsewhere."""
    optimizer = make_optimizer(AdamW(decay="constant", warmup_steps=0, **FIELDS))
    start, one = init_state({"w": jnp.ones(3)}, optimizer), {"w": jnp.ones(3)}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # In a function of its own: jit would otherwise reuse the other backend's program.
    update = jax.jit(lambda loss, grads, index: update_if_finite(start, index, loss, grads, optimizer, 0.5))
    good, norm = update(0.3, one, 0)
    assert int(good.step) == 1 and float(norm) == pytest.approx(3**0.5)
    np.testing.assert_allclose(good.params["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(good.ema_params["w"], 0.91, rtol=1e-6)  # the decay of step 0 is 1 / 10
    for loss, grads, index in ((np.nan, one, 0), (0.3, {"w": jnp.array([1.0, np.inf, 1.0])}, 0), (0.3, one, 1)):
        state, _ = update(loss, grads, index)
        jax.tree.map(np.testing.assert_array_equal, state, start)
