"""Validation while training: which examples at which timesteps, and the means that are logged."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.runtime.parallel import replicate
from ldm_jax.training.validation import BUCKETS, examples_used, make_validation


class Held:
    """Held-out examples whose x is their index."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, rows):
        return {"x": np.asarray(rows, np.float32)}


@dataclass(frozen=True)
class Measures:
    """Measures what it is given, times a parameter."""

    def validate(self, params, frozen, batch, seed):
        one = jnp.ones(batch["x"].shape)
        return {"loss": params * (batch["t"] + frozen["offset"]), "x": batch["x"], "id": batch["id"] * one,
                "seed": seed * one}  # fmt: skip


def validation(n, num, batch_size, T):
    validate = make_validation(Measures(), Held(n), num=num, batch_size=batch_size, T=T)
    return validate(replicate(np.float32(2.0)), {"offset": np.float32(1.0)}, 7)


def test_the_mean_and_that_of_each_tenth_of_the_timesteps():
    """64 examples at timesteps that go evenly through [0, 1000), in two batches."""
    measured = validation(80, 64, 32, 1000)
    names = {f"validation_{name}{k}" for name in ("loss", "x", "id", "seed")
             for k in ("", *(f"_{k}" for k in range(BUCKETS)))}  # fmt: skip
    assert measured.keys() == names
    t = ((np.arange(64) * 2 + 1) * 1000 // 128).astype(int)
    np.testing.assert_allclose(measured["validation_loss"], 2 * (t.mean() + 1), rtol=1e-6)
    for k in range(BUCKETS):
        rows = (t >= 100 * k) & (t < 100 * (k + 1))
        np.testing.assert_allclose(measured[f"validation_loss_{k}"], 2 * (t[rows].mean() + 1), rtol=1e-6)
        np.testing.assert_allclose(measured[f"validation_x_{k}"], np.flatnonzero(rows).mean(), rtol=1e-6)
    assert measured["validation_seed"] == 7
    assert measured["validation_x"] == measured["validation_id"] == 31.5  # the first 64, each once


def test_fewer_examples_than_a_batch_are_taken_again():
    """And of fewer timesteps than ranges, those that there are have a mean."""
    measured = validation(3, 100, 8, 4)
    assert measured["validation_x"] == np.mean(np.arange(8) % 3)
    assert {name for name in measured if name.startswith("validation_loss_")} == {
        f"validation_loss_{k}" for k in range(4)
    }
    assert examples_used(Held(3), 100, 8) == 8


def test_it_is_the_same_each_time():
    assert validation(80, 64, 32, 1000) == validation(80, 64, 32, 1000)


@pytest.mark.parametrize(("n", "num", "batch_size", "expected"), [(100, 50, 16, 48), (40, 50, 16, 32), (9, 5, 16, 16)])
def test_whole_batches_are_used(n, num, batch_size, expected):
    assert examples_used(Held(n), num, batch_size) == expected
