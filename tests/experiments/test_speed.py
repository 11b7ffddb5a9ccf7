"""experiments/speed.py: measured speeds, stored after the first measurement."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import speed
from experiments.runner import Workspace

pytestmark = pytest.mark.slow


def test_images_per_second(monkeypatch):
    """Steps of five images that take 0.25 seconds each, in groups of eight."""
    now, steps = [0.0], []

    def step(number):
        steps.append(number)
        now[0] += 0.25
        return jnp.zeros(())

    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    assert speed.time_steps(step, 5, 3.0) == 20.0
    assert steps == list(range(1, 17))


def test_stored_speeds_are_not_measured_again(tmp_path):
    """All missing timings compile before the first is measured."""
    done, workspace = [], Workspace("smoke", "", tmp_path)

    def timing(name, value):
        def compile_timing():
            done.append(f"{name} compiled")
            return lambda: done.append(f"{name} timed") or value

        return compile_timing

    assert speed.measure_speeds(workspace, {"a": timing("a", 1.0)}) == {"a": 1.0}
    assert speed.measure_speeds(workspace, {"a": timing("a", 7.0), "b": timing("b", 2.0), "c": timing("c", 3.0)}) == {
        "a": 1.0, "b": 2.0, "c": 3.0
    }  # fmt: skip
    assert done[:2] == ["a compiled", "a timed"] and sorted(done[2:4]) == ["b compiled", "c compiled"]
    assert done[4:] == ["b timed", "c timed"]


def test_sampling_is_timed_after_it_has_compiled(monkeypatch):
    now, seeds = [0.0], []

    def sample(seed):
        seeds.append(seed)
        now[0] += {0: 100.0, 1: 6.0, 2: 4.0}[seed]
        return np.zeros(8)

    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    measure = speed.seconds_per_image(lambda: sample)()
    assert seeds == [0] and measure() == 0.5 and seeds == [0, 1, 2]


@pytest.mark.parametrize("autoencoder", ["kl", "none"])
def test_the_setups_of_a_config_take_steps(autoencoder):
    """Diffusion on latents and on pixels, and the autoencoder."""
    config = tiny.get_config().unlock()
    config.autoencoder.type = autoencoder
    setups = [speed.diffusion_setup(config), *([speed.autoencoder_setup(config)] if autoencoder == "kl" else [])]
    for training_setup in setups:
        step, batch_size = speed.compile_step(training_setup)
        assert batch_size == 8 and np.isfinite(float(step(1)))
