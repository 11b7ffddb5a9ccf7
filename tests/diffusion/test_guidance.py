import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.denoiser import Estimate, clip_z0, from_network, paste_known, threshold_z0
from ldm_jax.diffusion.forward import NoiseLevel, noise_level
from ldm_jax.diffusion.guidance import (
    Projection,
    autoguided,
    cfg_plus_plus,
    classifier_free,
    classifier_guided,
    similarity_guided,
)
from ldm_jax.diffusion.prediction import PREDICTIONS, from_z0, to_z0
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process

PROCESS = make_process("scaled_linear", 100)
Z = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.array([0, 50, 99])
LEVEL = noise_level(T, PROCESS)
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
    denoise = from_network(network, prediction, PROCESS)
    expected = to_z0(prediction, network(Z, T, CONTEXT), Z, *LEVEL.broadcast_to(Z))
    np.testing.assert_allclose(denoise(Z, LEVEL, CONTEXT), expected, rtol=1e-6)


def test_from_network_refuses_before_it_is_called():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        from_network(network, "eps", make_process("linear", 10, zero_terminal_snr=True))
    with pytest.raises(ValueError, match="got 'x0'"):
        from_network(network, "x0", PROCESS)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, [0.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_z0_is_guiding_the_prediction(prediction, scale):
    cond, null = network(Z, T, CONTEXT), network(Z, T, jnp.broadcast_to(NULL, CONTEXT.shape))
    w = jnp.reshape(jnp.asarray(scale), (-1, 1, 1, 1))
    expected = to_z0(prediction, null + w * (cond - null), Z, *LEVEL.broadcast_to(Z))
    denoise = classifier_free(from_network(network, prediction, PROCESS), CONTEXT, NULL, scale)
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


RULES = {
    "classifier-free": lambda interval: classifier_free(plain, CONTEXT, NULL, 3.0, interval=interval),
    "cfg++": lambda interval: cfg_plus_plus(plain, CONTEXT, NULL, 0.6, interval=interval),
    "autoguidance": lambda interval: autoguided(at(CONTEXT), at(NULL), 3.0, interval=interval),
    "classifier": lambda interval: classifier_guided(
        at(CONTEXT), lambda z, t: z.sum((1, 2, 3)), 3.0, interval=interval
    ),
    "similarity": lambda interval: similarity_guided(at(CONTEXT), lambda z: z.sum((1, 2, 3)), 3.0, interval=interval),
}


def at(context):
    """The denoiser of one condition."""
    return lambda z_t, level: plain(z_t, level, jnp.broadcast_to(context, CONTEXT.shape))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("t", [-0.75, -1.1e-16, 0.0])
def test_an_interval_from_0_has_no_lower_limit(rule, t):
    """Rectified flow is sampled at t = T s - 1 < 0 too; an interval that begins above 0 leaves these out."""
    level = NoiseLevel(*jnp.float32([t, 0.9, 0.1]))
    z0 = {interval: RULES[rule](interval)(Z, level) for interval in ((0, np.inf), (0, 50.0), (-1, np.inf), (1, np.inf))}
    z0 = {interval: value.z0 if isinstance(value, Estimate) else value for interval, value in z0.items()}
    np.testing.assert_array_equal(z0[0, np.inf], z0[-1, np.inf])
    np.testing.assert_array_equal(z0[0, 50.0], z0[-1, np.inf])
    np.testing.assert_array_equal(z0[1, np.inf], at(CONTEXT)(Z, level))
    assert np.abs(z0[0, np.inf] - z0[1, np.inf]).max() > 0.01


def test_outside_the_interval_there_is_no_guidance():
    denoise = from_network(network, "v", PROCESS)
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
    got = classifier_free(two, context, null, 3.0)(Z, noise_level(5, PROCESS))
    np.testing.assert_allclose(got, uncond + 3 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_denoiser_gives_float32():
    half = lambda z_t, level, context: plain(z_t, level, context).astype(jnp.bfloat16)  # noqa: E731
    for scale in (1.0, 2.0):
        assert classifier_free(half, CONTEXT, NULL, scale)(Z, LEVEL).dtype == jnp.float32


def test_clip():
    clipped = jax.jit(lambda bound: clip_z0(lambda z, level: 3 * z, bound)(jnp.array([-1.0, 0.1, 1.0]), LEVEL))
    np.testing.assert_allclose(clipped(1.0), [-1, 0.3, 1], rtol=1e-6)
    np.testing.assert_allclose(clipped(jnp.inf), [-3, 0.3, 3], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_gradient_of_guidance_is_that_of_its_formula(scale):
    """Through the cond, on both sides: later guidance differentiates the denoiser."""

    def formula(z):
        null = network(z, T, jnp.broadcast_to(NULL, CONTEXT.shape))
        return (null + scale * (network(z, T, CONTEXT) - null)).sum()

    grad = jax.grad(lambda z: classifier_free(plain, CONTEXT, NULL, scale)(z, LEVEL).sum())(Z)
    expected = jax.grad(formula)(Z)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
    assert (np.abs(expected).max((1, 2, 3)) > 0.5).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rescaling_brings_the_standard_deviation_back(prediction):
    """Lin 2023, eq. 15 and 16: of each example by itself, on the network's own output."""
    level = noise_level(jnp.array([10, 50, 99]), PROCESS)
    denoise = from_network(network, prediction, PROCESS)
    stds = {}
    for phi in (0.0, 0.5, 1.0):
        z0 = classifier_free(denoise, CONTEXT, NULL, 6.0, rescale=phi, prediction=prediction)(Z, level)
        stds[phi] = np.asarray(from_z0(prediction, z0, Z, *level.broadcast_to(Z)).std((1, 2, 3)))
    cond = from_z0(prediction, denoise(Z, level, CONTEXT), Z, *level.broadcast_to(Z)).std((1, 2, 3))
    np.testing.assert_allclose(stds[1.0], cond, rtol=1e-3)
    np.testing.assert_allclose(stds[0.5], (stds[0.0] + stds[1.0]) / 2, rtol=1e-3)
    assert (np.abs(stds[0.0] / cond - 1) > 0.1).all()


def test_a_negative_condition():
    away = jnp.broadcast_to(jnp.float32(0.5), CONTEXT.shape)
    got = classifier_free(plain, CONTEXT, away, 3.0)(Z, LEVEL)
    expected = plain(Z, LEVEL, away) + 3 * (plain(Z, LEVEL, CONTEXT) - plain(Z, LEVEL, away))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def gaussian_denoiser(z_t, level):
    """E[z0 | z_t] for z0 ~ N(0, 1): alpha z_t."""
    return level.broadcast_to(z_t)[0] * z_t


@pytest.mark.parametrize("y, noise", [(0.7, 0.5), (-2.0, 1.5)])
def test_classifier_guidance_makes_the_posterior(y, noise):
    """z0 ~ N(0, 1) and y = z0 + noise: guided by log p(y | z_t) at scale 1, the denoiser is E[z0 | z_t, y]."""

    def log_probability(z_t, t):
        alpha, sigma = noise_level(t.astype(jnp.int32), PROCESS).broadcast_to(z_t)
        return (-((y - alpha * z_t) ** 2) / (2 * (sigma**2 + noise**2))).sum((1, 2, 3))

    guided = jax.jit(lambda z_t, level: classifier_guided(gaussian_denoiser, log_probability, 1.0)(z_t, level))
    t = jnp.array([20, 50, 99])
    level = noise_level(t, PROCESS)
    alpha, sigma = level.broadcast_to(Z)
    precision = 1 + alpha**2 / sigma**2 + 1 / noise**2
    posterior_mean = (alpha * Z / sigma**2 + y / noise**2) / precision
    np.testing.assert_allclose(guided(Z, level), posterior_mean, rtol=1e-3, atol=1e-4)


def test_similarity_guidance_makes_the_posterior():
    """z0 ~ N(0, 1) tilted by exp(s c z0): given z_t, N(alpha z_t, sigma^2) tilted, of mean alpha z_t + sigma^2 s c."""
    c, t = jax.random.normal(jax.random.key(1), Z.shape[1:]), jnp.array([20, 50, 99])
    level, scale = noise_level(t, PROCESS), jnp.array([0.5, -1.0, 2.0])
    alpha, sigma = level.broadcast_to(Z)
    guided = jax.jit(
        lambda z_t: similarity_guided(gaussian_denoiser, lambda z0: (z0 * c).sum((1, 2, 3)), scale)(z_t, level)
    )
    expected = alpha * Z + sigma**2 * scale.reshape(3, 1, 1, 1) * c
    np.testing.assert_allclose(guided(Z), expected, rtol=1e-5, atol=1e-5)


def test_similarity_guidance_looks_at_the_estimate():
    """log N(y; z0_hat, noise^2) with z0_hat = alpha z_t: the push is sigma^2 (y - alpha z_t) / noise^2."""
    y, noise, level = 0.7, 0.8, noise_level(jnp.array([20, 50, 99]), PROCESS)
    alpha, sigma = level.broadcast_to(Z)
    log_p = lambda z0: (-((y - z0) ** 2) / (2 * noise**2)).sum((1, 2, 3))  # noqa: E731
    learned = lambda z_t, level: Estimate(gaussian_denoiser(z_t, level), z_t)  # noqa: E731
    got = similarity_guided(learned, log_p, 1.0)(Z, level)
    expected = alpha * Z + sigma**2 * (y - alpha * Z) / noise**2
    np.testing.assert_allclose(got.z0, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.var_frac, Z)  # guidance changes z0 alone


def test_similarity_guidance_composes_and_costs_nothing_where_it_does_nothing():
    calls = []

    def similarity(z0):
        jax.debug.callback(lambda: calls.append(1))
        return z0.sum((1, 2, 3))

    inner = classifier_free(plain, CONTEXT, NULL, 2.0)
    guided = jax.jit(
        lambda scale, interval: clip_z0(similarity_guided(inner, similarity, scale, interval=interval), 5.0)(Z, LEVEL)
    )
    plainly, everywhere = np.asarray(jnp.clip(jax.jit(inner)(Z, LEVEL), -5, 5)), jnp.array([0.0, 99.0])
    for scale, interval in ((jnp.zeros(3), everywhere), (jnp.full(3, 2.0), jnp.array([1.0, 49.0]))):  # T = 0, 50, 99
        np.testing.assert_allclose(guided(scale, interval), plainly, rtol=1e-6)
    jax.effects_barrier()
    assert not calls
    pushed = guided(jnp.array([0.0, 1.0, 0.0]), everywhere)
    jax.effects_barrier()
    assert calls and np.abs(pushed - plainly)[1].max() > 1e-3
    np.testing.assert_allclose(pushed[::2], plainly[::2], rtol=1e-5, atol=1e-6)


def test_similarity_guidance_at_no_signal():
    level = noise_level(jnp.array([0, 1]), Process.variance_preserving([0.5, 0.0]))
    got = similarity_guided(lambda z, level: 3 * z, lambda z0: z0.sum((1, 2, 3)), 1.0)(Z[:2], level)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[1], 3 * Z[1])


def test_classifier_guidance_has_a_scale_for_each_example_and_composes():
    log_probability = lambda z_t, t: (z_t * t[:, None, None, None]).sum((1, 2, 3))  # noqa: E731  (gradient: t)
    level = noise_level(jnp.array([10, 20, 30]), PROCESS)
    alpha, sigma = level.broadcast_to(Z)
    inner = classifier_free(plain, CONTEXT, NULL, 2.0)
    got = clip_z0(classifier_guided(inner, log_probability, jnp.array([0.0, 0.1, 0.2])), 5.0)(Z, level)
    push = sigma**2 / alpha * jnp.array([0.0, 2.0, 6.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(got, jnp.clip(inner(Z, level) + push, -5, 5), rtol=1e-4, atol=1e-4)


def test_classifier_guidance_costs_nothing_where_it_does_nothing():
    calls = []
    unguided = lambda z_t, level: plain(z_t, level, CONTEXT)  # noqa: E731

    def log_probability(z_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return z_t.sum((1, 2, 3))

    guided = jax.jit(lambda z, *rest: classifier_guided(unguided, log_probability, rest[0], interval=rest[1])(z, LEVEL))
    plainly = np.asarray(jax.jit(lambda z: unguided(z, LEVEL))(Z))
    everywhere, nowhere = jnp.array([0.0, 99.0]), jnp.array([1.0, 49.0])
    for scale, interval in ((jnp.zeros(3), everywhere), (jnp.full(3, 2.0), nowhere)):
        np.testing.assert_array_equal(guided(Z, scale, interval), plainly)
    jax.effects_barrier()
    assert calls == []
    some = np.asarray(guided(Z, jnp.array([1.0, 2.0, 3.0]), jnp.array([50.0, 98.0])))  # t = 0, 50, 99
    np.testing.assert_array_equal(some[::2], plainly[::2])
    alpha, sigma = LEVEL.broadcast_to(Z)
    np.testing.assert_allclose(some[1] - plainly[1], np.full(Z.shape[1:], 2 * sigma[1] ** 2 / alpha[1]), rtol=1e-3)
    jax.effects_barrier()
    assert calls


def test_classifier_guidance_of_pure_noise_adds_nothing():
    level = noise_level(jnp.array([99, 99, 50]), make_process("linear", 100, zero_terminal_snr=True))
    assert level.alpha[0] == 0
    denoise = lambda z_t, level: 0.5 * z_t  # noqa: E731
    got = classifier_guided(denoise, lambda z_t, t: z_t.sum((1, 2, 3)), jnp.ones(3))(Z, level)
    np.testing.assert_array_equal(got[:2], 0.5 * Z[:2])
    assert np.isfinite(got).all()
    assert (got[2] != 0.5 * Z[2]).all()


def test_dynamic_thresholding_by_hand():
    """|z0| = .5, 1, 2, 4, 8: at the 75 % quantile s = 4, so that 8 becomes 1 and .5 an eighth; at most 2, a quarter."""
    z0 = jnp.array([[0.5, -1.0, 2.0, -4.0, 8.0], [0.1, 0.2, -0.3, 0.4, 0.5]])
    threshold = jax.jit(lambda q, highest: threshold_z0(lambda z, level: z0, q, highest)(z0, noise_level(0, PROCESS)))
    np.testing.assert_allclose(threshold(0.75, jnp.inf), [[0.125, -0.25, 0.5, -1, 1], z0[1]], rtol=1e-6)
    np.testing.assert_array_equal(threshold(0.0, jnp.inf), np.clip(z0, -1, 1))
    np.testing.assert_allclose(threshold(0.75, 2.0), [[0.25, -0.5, 1, -1, 1], z0[1]], rtol=1e-6)


def test_the_known_region_is_pasted_at_its_noise_level():
    z, z0, mask = jnp.full((500, 3), 9.0), jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, False])
    keys = jax.random.split(jax.random.key(0), 500)
    kept = paste_known(z0, mask)(z, NoiseLevel(0.0, 0.8, 0.6), keys)
    np.testing.assert_array_equal(kept[:, 0], 9)
    np.testing.assert_allclose(kept[:, 1:].mean(0), 0.8 * z0[1:], atol=0.1)
    np.testing.assert_allclose(kept[:, 1:].std(0), 0.6, atol=0.06)
    np.testing.assert_array_equal(
        paste_known(z0, mask)(z, NoiseLevel(0.0, 1.0, 0.0), keys)[:, 1:], jnp.tile(z0[1:], (500, 1))
    )
    np.testing.assert_array_equal(paste_known(z0, jnp.ones(3, bool))(z, NoiseLevel(0.0, 0.6, 0.8), keys), z)


def wide(z_t, t, context):
    """`network`, with a learned variance behind it."""
    return jnp.concatenate([network(z_t, t, context), jnp.cos(3 * z_t) + context[..., None]], axis=-1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_of_twice_the_channels_has_a_learned_variance(prediction):
    estimate = from_network(wide, prediction, PROCESS)(Z, LEVEL, CONTEXT)
    assert isinstance(estimate, Estimate)
    np.testing.assert_array_equal(estimate.z0, from_network(network, prediction, PROCESS)(Z, LEVEL, CONTEXT))
    np.testing.assert_allclose(estimate.var_frac, (jnp.cos(3 * Z) + CONTEXT[..., None] + 1) / 2, rtol=1e-6)


def log_probability(z_t, t):
    return -(z_t**2).sum((1, 2, 3)) - t


CHAIN = {  # rules composed on a denoiser
    "without guidance": lambda d: classifier_free(d, CONTEXT, NULL, 1.0),
    "guided": lambda d: classifier_free(d, CONTEXT, NULL, 3.0),
    "guided by shares": lambda d: classifier_free(d, CONTEXT, NULL, jnp.array([0.0, 1.0, 3.0])),
    "in an interval, rescaled": lambda d: classifier_free(d, CONTEXT, NULL, 3.0, interval=(40, 60), rescale=0.7),
    "clipped": lambda d: clip_z0(lambda z, level: d(z, level, CONTEXT), 0.4),
    "thresholded": lambda d: threshold_z0(lambda z, level: d(z, level, CONTEXT), 0.5),
    "by a classifier, clipped": lambda d: clip_z0(
        classifier_guided(classifier_free(d, CONTEXT, NULL, 3.0), log_probability, 0.1), 5.0
    ),
}


@pytest.mark.parametrize("name", CHAIN)
def test_guidance_changes_z0_alone(name):
    """z0 is as without a learned variance, which is that of the condition, unchanged."""
    estimate = CHAIN[name](from_network(wide, "v", PROCESS))(Z, LEVEL)
    np.testing.assert_array_equal(estimate.z0, CHAIN[name](from_network(network, "v", PROCESS))(Z, LEVEL))
    np.testing.assert_allclose(estimate.var_frac, (jnp.cos(3 * Z) + CONTEXT[..., None] + 1) / 2, rtol=1e-6)


def pairs(cond, null):
    """A conditional denoiser of constant estimates [B, 2]: cond for the condition 1, null for 0."""
    values = jnp.stack([jnp.asarray(null, jnp.float32), jnp.asarray(cond, jnp.float32)])
    return lambda z_t, level, context: values[context[:, 0].astype(int), jnp.arange(len(z_t)) % values.shape[1]]


APG_LEVEL = NoiseLevel(jnp.full(2, 5.0), jnp.full(2, 0.8), jnp.full(2, 0.6))


@pytest.mark.parametrize(
    "projection, expected",
    [
        # z0 (3, 4) and (1, 0) from null (1, 2) and (1, 2): d = (2, 2) and (0, -2); w = 3.
        (Projection(), [[7, 8], [1, -4]]),
        # d along z0: 14/25 (3, 4) = (1.68, 2.24), and across it (.32, -.24); the second is across already.
        (Projection(parallel=0.0), [[3 + 2 * 0.32, 4 - 2 * 0.24], [1, -4]]),
        (Projection(parallel=0.5), [[3 + 2 * (0.32 + 0.84), 4 + 2 * (-0.24 + 1.12)], [1, -4]]),
        # |d| = 8^.5 and 2, both to 1.
        (Projection(max_norm=1.0), [[3 + 2 * 0.5**0.5, 4 + 2 * 0.5**0.5], [1, -2]]),
        (Projection(parallel=0.0, max_norm=1.0), [[3 + 2 * 0.32 / 8**0.5, 4 - 2 * 0.24 / 8**0.5], [1, -2]]),
        (Projection(max_norm=2.5), [[3 + 2 * 2.5 * 0.5**0.5, 4 + 2 * 2.5 * 0.5**0.5], [1, -4]]),
    ],
)
def test_adaptive_projected_guidance_by_hand(projection, expected):
    denoise = pairs([[3, 4], [1, 0]], [[1, 2], [1, 2]])

    @jax.jit
    def run(projection):
        guided = classifier_free(denoise, jnp.ones((2, 1)), jnp.zeros((1, 1)), 3.0, projection=projection)
        return guided(jnp.zeros((2, 2)), APG_LEVEL)

    np.testing.assert_allclose(run(projection), expected, rtol=1e-5)


def test_projected_guidance_that_is_off_changes_no_bit():
    plainly, projected = (
        jax.jit(lambda p=p: classifier_free(plain, CONTEXT, NULL, 2.5, projection=p)(Z, LEVEL))
        for p in (Projection(), Projection(jnp.float32(1.0), jnp.float32(np.inf)))
    )
    np.testing.assert_array_equal(plainly(), projected())
    cond, null = plain(Z, LEVEL, CONTEXT), plain(Z, LEVEL, jnp.broadcast_to(NULL, CONTEXT.shape))
    np.testing.assert_allclose(plainly(), null + 2.5 * (cond - null), rtol=1e-5, atol=1e-5)


def test_projection_of_zeros_is_finite():
    zeros = pairs([[0, 0], [0, 0]], [[0, 0], [0, 0]])
    options = {"projection": Projection(0.0, 1.0)}
    got = classifier_free(zeros, jnp.ones((2, 1)), jnp.zeros((1, 1)), 3.0, **options)(jnp.zeros((2, 2)), APG_LEVEL)
    np.testing.assert_array_equal(got, 0)


def constant(*values):
    return lambda z_t, level: jnp.asarray(values, jnp.float32)


def test_autoguidance_by_hand():
    strong, weak = constant([1.0, 2.0], [3.0, 4.0]), constant([0.0, 3.0], [3.0, 0.0])
    got = autoguided(strong, weak, jnp.array([2.0, 0.5]))(jnp.zeros((2, 2)), APG_LEVEL)
    np.testing.assert_allclose(got, [[2, 1], [3, 2]])
    got = autoguided(strong, weak, 3.0, projection=Projection(parallel=0.0))(jnp.zeros((2, 2)), APG_LEVEL)
    np.testing.assert_allclose(got, [[1 + 2 * 1.2, 2 - 2 * 0.6], [3 - 2 * 1.92, 4 + 2 * 1.44]], rtol=1e-5)


def test_autoguidance_outside_its_interval_and_at_scale_1_calls_the_strong_alone():
    calls = []

    def weak(z_t, level):
        jax.debug.callback(lambda: calls.append(1))
        return z_t

    @jax.jit
    def run(scale, interval=(0, 99)):
        return autoguided(constant([1.0, 2.0], [3.0, 4.0]), weak, scale, interval=interval)(
            jnp.zeros((2, 2)), APG_LEVEL
        )

    for arguments, expected in [((1.0,), 0), ((2.0,), 1), ((2.0, (6, 99)), 0), ((2.0, (5, 99)), 1)]:
        calls.clear()
        got = run(*arguments)
        jax.effects_barrier()
        assert len(calls) == expected, arguments
        np.testing.assert_array_equal(got, jnp.array([[1.0, 2], [3, 4]]) * (2 if expected else 1))


@pytest.mark.parametrize("learned_weak", [False, True])
def test_autoguidance_keeps_the_strong_models_variance(learned_weak):
    variance = jnp.full((2, 2), 0.3)

    def strong(z_t, level):
        return Estimate(jnp.ones((2, 2)), variance)

    def weak(z_t, level):
        return Estimate(jnp.zeros((2, 2)), variance + 1) if learned_weak else jnp.zeros((2, 2))

    for scale in (1.0, 2.0):
        got = autoguided(strong, weak, scale)(jnp.zeros((2, 2)), APG_LEVEL)
        np.testing.assert_array_equal(got.z0, scale)
        np.testing.assert_array_equal(got.var_frac, variance)
