from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.optimizer import Optimization, make_optimizer

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
    optimizer = make_optimizer(Optimization(decay=decay, warmup_steps=warmup_steps, **FIELDS))
    params = jnp.zeros(())
    state, steps = optimizer.init(params), []
    for _ in expected:
        updates, state = optimizer.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(-float(updates))
    np.testing.assert_allclose(steps, expected, rtol=1e-5)


def test_adamw_by_hand():
    """Clipping by the norm of the gradients of all parameters, then Loshchilov & Hutter 2019, algorithm 2."""
    fields = FIELDS | {"adam_b2": 0.9, "weight_decay": 0.1, "clip_norm": 2.0}
    optimizer = make_optimizer(Optimization(decay="constant", warmup_steps=0, **fields))
    rng = np.random.default_rng(0)
    theta = np.concatenate([rng.normal(size=6), [3.0, -2.0]])
    split = lambda flat: {"kernel": jnp.float32(flat[:6]).reshape(2, 3), "bias": jnp.float32(flat[6:])}  # noqa: E731
    params, m, v = split(theta), np.zeros(8), np.zeros(8)
    state = optimizer.init(params)
    for step, norm in enumerate((10.0, 0.1, 3.0), 1):
        g = rng.normal(size=8)
        g *= norm / np.linalg.norm(g)
        updates, state = optimizer.update(split(g), state, params)
        params = optax.apply_updates(params, updates)
        g *= min(1, 2.0 / norm)
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
        adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
        theta -= 0.1 * (adam + 0.1 * theta)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), params, split(theta))


def test_equal_specs_give_the_same_optimizer():
    """By which equal stages are compiled once."""
    spec = Optimization(decay="cosine", warmup_steps=2, **FIELDS)
    assert make_optimizer(spec) is make_optimizer(Optimization(**spec._asdict()))
    assert make_optimizer(spec) is not make_optimizer(spec._replace(learning_rate=0.2))


def test_an_unknown_decay():
    with pytest.raises(ValueError, match="decay is 'step'; it must be 'constant' or 'cosine'"):
        make_optimizer(Optimization(decay="step", warmup_steps=0, **FIELDS))


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer is 'sgd'; it must be one of adamw, muon"):
        make_optimizer(Optimization(decay="constant", warmup_steps=0, optimizer="sgd", **FIELDS))


def test_muon_orthogonalizes_hidden_kernels_and_adamw_updates_all_else():
    """Singular values: of the quintic Newton-Schulz iteration, between 0.7 and 1.2 instead of 1."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
        "dense": {"kernel": (24, 6)},
        "conv_in": {"kernel": (3, 3, 8, 16)},
        "embedding": {"embedding": (10, 6)},
    }
    leaf = {"is_leaf": lambda shape: isinstance(shape, tuple)}
    grads = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, **leaf)
    params = jax.tree.map(jnp.ones_like, grads)
    optimizer = make_optimizer(Optimization(decay="constant", warmup_steps=0, optimizer="muon", **FIELDS))
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, b2=0.99, weight_decay=0.0, nesterov=True))
    chains = {"muon": optimizer, "adamw": adamw}
    updates = {name: chain.update(grads, chain.init(params), params)[0] for name, chain in chains.items()}
    for layer, inputs in (("conv", 72), ("dense", 24)):
        update = np.asarray(updates["muon"][layer].pop("kernel")).reshape(inputs, -1)
        singular = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * inputs**0.5)
        assert singular.min() > 0.6 and singular.max() < 1.3, layer
        gradient = np.asarray(grads[layer]["kernel"]).reshape(inputs, -1)
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        cosine = -np.sum(update * (left @ right)) / np.linalg.norm(update) / np.linalg.norm(left @ right)
        assert cosine > 0.97, layer  # the first momentum is the gradient, whose nearest orthogonal matrix this is
        del updates["adamw"][layer]["kernel"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates["muon"], updates["adamw"])


def test_muon_decays_weights_as_adamw_does():
    params = {"dense": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    spec = Optimization(decay="constant", warmup_steps=0, optimizer="muon", **FIELDS | {"weight_decay": 0.5})
    optimizer = make_optimizer(spec)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    jax.tree.map(lambda update: np.testing.assert_allclose(update, -0.05, rtol=1e-5), updates)
