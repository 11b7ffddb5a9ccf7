"""Random streams: all different, and indexed by (seed, stream, step, example)."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.random import Stream, example_keys, initial_latents, low_resolution_noise, sample_keys


def test_no_two_streams_are_equal():
    """As names: an enum's equal values would be one member, whatever they are called."""
    assert len(Stream.__members__) == len(set(Stream)) == len({int(stream) for stream in Stream})
    assert all(0 <= stream < 2**32 for stream in Stream)


def test_all_streams_give_different_numbers():
    ids = jnp.arange(4)
    draws = [jax.vmap(jax.random.normal)(example_keys(0, stream, 0, ids)) for stream in Stream]
    keys = sample_keys(0, ids)
    draws += [initial_latents(keys, ()), low_resolution_noise(keys, ())]
    values = np.concatenate(draws)
    assert len(np.unique(values)) == len(values)


def test_an_example_s_key_depends_on_its_own_index_alone():
    def draw(seed=0, step=3, ids=(5,)):
        return np.asarray(jax.vmap(jax.random.normal)(example_keys(seed, Stream.DIFFUSION, step, jnp.array(ids))))

    np.testing.assert_array_equal(draw(ids=(1, 5, 9))[1], draw()[0])
    assert len({float(draw()[0]), float(draw(seed=1)[0]), float(draw(step=4)[0]), float(draw(ids=(6,))[0])}) == 4
