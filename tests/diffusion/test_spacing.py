import numpy as np
import pytest

from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.spacing import TIMESTEP_SPACINGS, noise_levels, timesteps


@pytest.mark.parametrize(
    "spacing, T, steps, offset, expected",
    [
        ("leading", 1000, 5, 0, [800, 600, 400, 200, 0]),
        ("leading", 1000, 5, 1, [801, 601, 401, 201, 1]),
        ("leading", 10, 3, 1, [7, 4, 1]),
        ("leading", 10, 10, 0, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("trailing", 1000, 5, 0, [999, 799, 599, 399, 199]),
        ("trailing", 1000, 5, 1, [999, 799, 599, 399, 199]),  # the offset is for leading only
        ("trailing", 10, 3, 0, [9, 6, 2]),
        ("trailing", 10, 1, 0, [9]),
        ("linspace", 1000, 5, 0, [999, 749, 500, 250, 0]),  # 749.25, 499.5 to even, 249.75
        ("linspace", 10, 4, 0, [9, 6, 3, 0]),
        ("linspace", 10, 1, 0, [0]),
    ],
)
def test_timesteps_by_hand(spacing, T, steps, offset, expected):
    t = timesteps(spacing, T, steps, offset)
    assert t.tolist() == expected
    assert t.dtype == np.int64


@pytest.mark.parametrize("T", [1, 7, 100, 1000])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_descend_within_range(spacing, T):
    """For every number of steps; trailing at 1000 includes the counts where arange gives an element too many."""
    for steps in range(1, T + 1):
        t = timesteps(spacing, T, steps)
        assert len(t) == steps, steps
        assert t[0] < T and t[-1] >= 0, steps
        assert (np.diff(t) < 0).all(), steps


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: timesteps("karras", 10, 5), "spacing must be one of leading, trailing, linspace here, got 'karras'"),
        (lambda: timesteps("leading", 10, 0), "steps must lie in 1..10 for a schedule of 10 timesteps, got 0"),
        (lambda: timesteps("linspace", 10, 11), "steps must lie in 1..10 for a schedule of 10 timesteps, got 11"),
        (lambda: noise_levels("leading", make_process("cosine", 130), 4, grid="lcm"), "a multiple of 50 timesteps, or"),
        (lambda: timesteps("leading", 10, 10, 1), "steps_offset must lie in 0..0 for 10 of 10 timesteps, got 1"),
        (lambda: timesteps("leading", 10, 2, -1), "steps_offset must lie in 0..4 for 2 of 10 timesteps, got -1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
