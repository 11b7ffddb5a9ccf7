import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import classifier_free, clip_z0, from_network
from ldm_jax.diffusion.process import PREDICTIONS, level_at, to_z0
from ldm_jax.diffusion.schedules import make_schedule

ALPHA_BAR = make_schedule("scaled_linear", 100).alpha_bar
Z = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.array([0, 50, 99])
LEVEL = level_at(T, ALPHA_BAR)
CONTEXT = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
NULL = jnp.full((1, 1, 1), -1.0)


def network(z_t, t, context):
    """Nonlinear in z_t, and different for each t and context, so that a mixed-up batch shows."""
    return jnp.tanh(z_t * context[..., None]) + 0.01 * t[:, None, None, None]


def plain(z_t, level, context):
    """The same as a denoiser."""
    return network(z_t, jnp.broadcast_to(level.t, z_t.shape[:1]), context)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_from_network_converts(prediction):
    denoise = from_network(network, prediction, ALPHA_BAR)
    expected = to_z0(prediction, network(Z, T, CONTEXT), Z, LEVEL)
    np.testing.assert_allclose(denoise(Z, LEVEL, CONTEXT), expected, rtol=1e-6)


def test_from_network_refuses_before_it_is_called():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        from_network(network, "eps", make_schedule("linear", 10, zero_terminal_snr=True).alpha_bar)
    with pytest.raises(ValueError, match="got 'x0'"):
        from_network(network, "x0", ALPHA_BAR)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, [0.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_z0_is_guiding_the_prediction(prediction, scale):
    cond, null = network(Z, T, CONTEXT), network(Z, T, jnp.broadcast_to(NULL, CONTEXT.shape))
    w = jnp.reshape(jnp.asarray(scale), (-1, 1, 1, 1))
    expected = to_z0(prediction, null + w * (cond - null), Z, LEVEL)
    denoise = classifier_free(from_network(network, prediction, ALPHA_BAR), CONTEXT, NULL, scale)
    np.testing.assert_allclose(denoise(Z, LEVEL), expected, rtol=1e-4, atol=1e-4)


def test_one_call_of_2B_or_of_B():
    """The null half costs nothing at scale 1, decided at run time in one compiled program."""
    sizes = []

    def counted(z_t, level, context):
        jax.debug.callback(lambda: sizes.append(z_t.shape[0]))
        return plain(z_t, level, context)

    traces = []

    @jax.jit
    def run(scale, interval=(0, 99)):
        traces.append(scale)
        return classifier_free(counted, CONTEXT, NULL, scale, interval=interval)(Z, LEVEL)

    for scale, expected in [([1.0, 1.0, 1.0], [3]), ([2.0, 2.0, 2.0], [6]), ([1.0, 1.0, 1.5], [6]), ([1] * 3, [3])]:
        sizes.clear()
        run(jnp.asarray(scale, jnp.float32)).block_until_ready()
        jax.effects_barrier()
        assert sizes == expected, scale
    for interval, expected in [((51, 98), [3]), ((50, 98), [6]), ((99, 99), [6]), ((0, 0), [6])]:  # T = 0, 50, 99
        sizes.clear()
        run(jnp.full(3, 2.0), interval).block_until_ready()
        jax.effects_barrier()
        assert sizes == expected, interval
    assert len(traces) == 2, "without and with an interval"


def test_outside_the_interval_the_conditional_speaks_alone():
    denoise = from_network(network, "v", ALPHA_BAR)
    everywhere = classifier_free(denoise, CONTEXT, NULL, jnp.array([2.0, 3.0, 4.0]))(Z, LEVEL)
    got = classifier_free(denoise, CONTEXT, NULL, jnp.array([2.0, 3.0, 4.0]), interval=(1, 50))(Z, LEVEL)
    np.testing.assert_allclose(got[1], everywhere[1], rtol=1e-6)
    np.testing.assert_allclose(got[::2], denoise(Z, LEVEL, CONTEXT)[::2], rtol=1e-5, atol=1e-5)
    assert np.abs(got - everywhere)[::2].max() > 0.1


def test_scale_1_is_the_conditional_even_where_the_null_is_broken():
    broken = jnp.full_like(NULL, jnp.nan)
    got = classifier_free(plain, CONTEXT, broken, 1.0)(Z, LEVEL)
    np.testing.assert_array_equal(got, jax.jit(plain)(Z, LEVEL, CONTEXT))  # the branch for scale 1 is compiled as well
    assert np.isnan(classifier_free(plain, CONTEXT, broken, 2.0)(Z, LEVEL)).all()


def test_context_may_be_a_tree_and_t_a_scalar():
    def two(z_t, level, context):
        return plain(z_t, level, context["tokens"]) + context["pooled"][:, :, None, None]

    context = {"tokens": CONTEXT, "pooled": jnp.ones((3, 1))}
    null = {"tokens": NULL, "pooled": jnp.zeros((1, 1))}
    cond, uncond = network(Z, jnp.full(3, 5), CONTEXT) + 1, network(Z, jnp.full(3, 5), jnp.full((3, 1, 1), -1.0))
    got = classifier_free(two, context, null, 3.0)(Z, level_at(5, ALPHA_BAR))
    np.testing.assert_allclose(got, uncond + 3 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_denoiser_gives_float32():
    half = lambda z_t, level, context: plain(z_t, level, context).astype(jnp.bfloat16)  # noqa: E731
    for scale in (1.0, 2.0):
        assert classifier_free(half, CONTEXT, NULL, scale)(Z, LEVEL).dtype == jnp.float32


def test_clip():
    clipped = jax.jit(lambda bound: clip_z0(lambda z, level: 3 * z, bound)(jnp.array([-1.0, 0.1, 1.0]), LEVEL))
    np.testing.assert_allclose(clipped(1.0), [-1, 0.3, 1], rtol=1e-6)
    np.testing.assert_allclose(clipped(jnp.inf), [-3, 0.3, 3], rtol=1e-6)


def test_guidance_has_a_gradient():
    """Through the cond, on both sides: later guidance differentiates the denoiser."""
    for scale in (1.0, 2.0):
        grad = jax.grad(lambda z: classifier_free(plain, CONTEXT, NULL, scale)(z, LEVEL).sum())(Z)  # noqa: B023
        assert np.isfinite(grad).all()
