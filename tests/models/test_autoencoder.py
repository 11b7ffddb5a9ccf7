import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.models.autoencoder import AutoencoderKL, VQModel

TINY = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time
X = np.random.default_rng(0).uniform(-1, 1, (2, 8, 6, 1)).astype(np.float32)


def abstract(module, x=X):
    """Output and parameters of `init`, as shapes only."""
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    return out, variables["params"]


def shape_of(module, params, method, *args):
    return jax.eval_shape(lambda p: module.apply({"params": p}, *args, method=method), params)


def conv(i, o, k=3):
    return k * k * i * o + o


def resnet(i, o):
    return 2 * i + conv(i, o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)


def expected_size(encoder_out, quant_convs):
    """Parameters of the TINY autoencoder, from the topology."""
    middle = 2 * resnet(8, 8) + 2 * 8 + 4 * conv(8, 8, 1)  # norm, then q, k, v, out
    encoder = conv(1, 4) + resnet(4, 4) + conv(4, 4) + resnet(4, 8) + middle + 2 * 8 + conv(8, encoder_out)
    decoder = conv(2, 8) + middle + 2 * resnet(8, 8) + conv(8, 8) + resnet(8, 4) + resnet(4, 4) + 2 * 4 + conv(4, 1)
    return encoder + decoder + quant_convs


@pytest.mark.parametrize(
    "module, expected",
    [
        (AutoencoderKL(**TINY), expected_size(4, conv(4, 4, 1) + conv(2, 2, 1))),
        (AutoencoderKL(**TINY, use_quant_conv=False, use_post_quant_conv=False), expected_size(4, 0)),
        (VQModel(**TINY, num_vq_embeddings=7), expected_size(2, 2 * conv(2, 2, 1) + 7 * 2)),
        (VQModel(**TINY, num_vq_embeddings=7, vq_embed_dim=5), expected_size(2, conv(2, 5, 1) + conv(5, 2, 1) + 7 * 5)),
    ],
)
def test_parameter_count_by_hand(module, expected):
    _, params = abstract(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_parameter_count_as_a_number():
    assert expected_size(4, conv(4, 4, 1) + conv(2, 2, 1)) == 11179


@pytest.mark.parametrize("widths, factor", [((4,), 1), ((4, 8), 2), ((4, 4, 8), 4)])
def test_shapes(widths, factor):
    module = AutoencoderKL(**TINY | {"block_out_channels": widths})
    assert module.downsampling == factor
    x = np.zeros((3, 8, 12, 1), np.float32)
    out, params = abstract(module, x)
    assert out.shape == x.shape
    moments = shape_of(module, params, "encode", x)
    assert moments.shape == (3, 8 // factor, 12 // factor, 4)
    raw = np.zeros((3, 8 // factor, 12 // factor, 2), np.float32)
    assert shape_of(module, params, "decode_features", raw).shape == (3, 8, 12, 4)
    assert shape_of(module, params, "decode", raw).shape == x.shape


def test_middle_without_attention():
    _, params = abstract(AutoencoderKL(**TINY, mid_block_add_attention=False))
    assert not any("attentions_0" in path for path in flatten_dict(params))


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_half_precision_computes_in_it_and_returns_float32(kind):
    module = kind(**TINY, dtype=jnp.bfloat16)
    out, params = abstract(module)
    assert out.dtype == jnp.float32
    assert shape_of(module, params, "encode", X).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    jaxpr = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, X))(params))
    convolutions = [line for line in jaxpr.splitlines() if "= conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


def test_decoding_in_two_parts(random_params):
    """decode = to_pixels after decode_features, and to_pixels needs the last convolution's parameters alone."""
    module = AutoencoderKL(**TINY)
    params = random_params(module, X)
    raw = np.random.default_rng(1).normal(size=(2, 4, 3, 2)).astype(np.float32)
    h = jax.jit(lambda p: module.apply({"params": p}, raw, method="decode_features"))(params)
    last = {"decoder": {"conv_out": params["decoder"]["conv_out"]}}
    x_hat = module.apply({"params": last}, h, method="to_pixels")
    whole = jax.jit(lambda p: module.apply({"params": p}, raw, method="decode"))(params)
    np.testing.assert_allclose(x_hat, whole, atol=1e-5)


def unreached(module, params, loss):
    """The parameters without a gradient."""
    grads = flatten_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))
    assert all(np.isfinite(g).all() for g in grads.values())
    return ["/".join(path) for path, g in grads.items() if not np.abs(g).max() > 1e-7]


# A bias of the keys adds the same to a query's score for each key, so the softmax does not see it.
NO_GRADIENT = ["encoder/mid_block/attentions_0/to_k/bias", "decoder/mid_block/attentions_0/to_k/bias"]


def test_gradients_of_the_kl_autoencoder_reach_every_parameter(random_params):
    module = AutoencoderKL(**TINY)

    def loss(params):
        moments = module.apply({"params": params}, X, method="encode")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        x_hat = module.apply({"params": params}, mean + 0.1 * jnp.exp(0.5 * logvar), method="decode")
        return jnp.mean((x_hat - X) ** 2)

    left = unreached(module, random_params(module, X), loss)
    assert set(left) <= set(NO_GRADIENT)


def test_gradients_of_the_vq_autoencoder_reach_every_parameter(random_params):
    """Straight through the codebook to the encoder by the reconstruction alone; the codes move by their own term."""
    module = VQModel(**TINY, num_vq_embeddings=7)

    def loss(params):
        q = module.apply({"params": params}, module.apply({"params": params}, X, method="encode"), method="quantize")
        h = module.apply({"params": params}, q.z_q, method="decode_features")
        return jnp.mean((module.apply({"params": params}, h, method="to_pixels") - X) ** 2) + 1e-3 * q.codebook_loss

    left = unreached(module, random_params(module, X), loss)
    assert set(left) <= set(NO_GRADIENT)


def test_vq_decode_quantises_first(random_params):
    module = VQModel(**TINY, num_vq_embeddings=7)
    params = {"params": random_params(module, X)}
    raw = np.random.default_rng(1).normal(size=(2, 4, 3, 2)).astype(np.float32)
    decode = jax.jit(lambda raw: module.apply(params, raw, method="decode"))
    codes = module.apply(params, raw, method="quantize").z_q
    assert np.abs(codes - raw).max() > 0.1
    np.testing.assert_allclose(decode(raw), decode(codes), atol=1e-5)


@pytest.mark.parametrize(
    "fields, x, message",
    [
        ({"block_out_channels": ()}, X, "block_out_channels is empty"),
        ({"norm_num_groups": 3}, X, "multiple of norm_num_groups=3; 4 in"),
        ({}, X[:, :7], "divide by 2; got \\(2, 7, 6, 1\\)"),
        ({}, X[:, :, :5], "divide by 2; got \\(2, 8, 5, 1\\)"),
        ({"in_channels": 3}, X, "takes 3 channels on the last axis; got \\(2, 8, 6, 1\\)"),
    ],
)
@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_errors(kind, fields, x, message):
    with pytest.raises(ValueError, match=message):
        abstract(kind(**TINY | fields), x)
