"""experiments/speed.py: rates by the clock, noted once."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import speed
from experiments.frame import Lab


def test_a_rate_is_told_by_the_clock(monkeypatch):
    """By steps of five pictures that take a quarter of a second each, and are waited for by eights."""
    now, steps = [0.0], []

    def step(number):
        steps.append(number)
        now[0] += 0.25
        return jnp.zeros(())

    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    assert speed.timed(step, 5, 3.0) == 20.0
    assert steps == list(range(1, 17))


def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch):
    made, lab = [], Lab("smoke", "", tmp_path)
    monkeypatch.setattr(speed, "prepared", lambda course: (lambda number: jnp.zeros(()), course))
    monkeypatch.setattr(speed, "timed", lambda step, batch_size, seconds: 10.0 * batch_size)

    def course(batch_size):
        made.append(batch_size)
        return batch_size

    assert speed.images_per_second(lab, {"a": lambda: course(1)}) == {"a": 10.0}
    again = speed.images_per_second(lab, {"a": lambda: course(7), "b": lambda: course(2)})
    assert again == {"a": 10.0, "b": 20.0} and made == [1, 2]


@pytest.mark.parametrize("kind", ["kl", "none"])
def test_stages_of_a_config_take_steps(kind):
    """On latents and on pixels; and the autoencoder's."""
    config = tiny.get_config().unlock()
    config.autoencoder.kind = kind
    courses = [speed.of_diffusion(config), *([speed.of_autoencoder(config)] if kind == "kl" else [])]
    for course in courses:
        step, batch_size = speed.prepared(course)
        assert batch_size == 8 and np.isfinite(float(step(1)))
