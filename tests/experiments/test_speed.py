"""experiments/speed.py: rates by the clock, noted once."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import speed
from experiments.frame import Lab


def test_a_rate_is_told_by_the_clock(monkeypatch):
    """By steps of five images that take a quarter of a second each, and are waited for by eights."""
    now, steps = [0.0], []

    def step(number):
        steps.append(number)
        now[0] += 0.25
        return jnp.zeros(())

    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    assert speed.timed(step, 5, 3.0) == 20.0
    assert steps == list(range(1, 17))


def test_what_is_known_is_not_measured_again(tmp_path):
    """And all that is not is made ready before the first is timed."""
    done, lab = [], Lab("smoke", "", tmp_path)

    def task(name, value):
        def ready():
            done.append(f"{name} ready")
            return lambda: done.append(f"{name} timed") or value

        return ready

    assert speed.measured(lab, {"a": task("a", 1.0)}) == {"a": 1.0}
    assert speed.measured(lab, {"a": task("a", 7.0), "b": task("b", 2.0), "c": task("c", 3.0)}) == {
        "a": 1.0, "b": 2.0, "c": 3.0
    }  # fmt: skip
    assert done[:2] == ["a ready", "a timed"] and sorted(done[2:4]) == ["b ready", "c ready"]
    assert done[4:] == ["b timed", "c timed"]


def test_sampling_is_timed_after_it_has_compiled(monkeypatch):
    now, turns = [0.0], []

    def sample(seed):
        turns.append(seed)
        now[0] += {0: 100.0, 1: 6.0, 2: 4.0}[seed]
        return np.zeros(8)

    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    ready = speed.seconds_per_image(lambda: sample)()
    assert turns == [0] and ready() == 0.5 and turns == [0, 1, 2]


@pytest.mark.parametrize("kind", ["kl", "none"])
def test_stages_of_a_config_take_steps(kind):
    """On latents and on pixels; and the autoencoder's."""
    config = tiny.get_config().unlock()
    config.autoencoder.type = kind
    courses = [speed.of_diffusion(config), *([speed.of_autoencoder(config)] if kind == "kl" else [])]
    for course in courses:
        step, batch_size = speed.prepared(course)
        assert batch_size == 8 and np.isfinite(float(step(1)))
