"""The image encoder by hand; that it is transformers' own is proven in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.clip import CLIPTextEncoder, Encoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder, normalize

TINY = {
    "image_size": 6,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 5,
}
TEXT = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
X = np.random.default_rng(1).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
IDS = np.array([[18, 4, 7, 19], [18, 19, 0, 0], [18, 3, 19, 0]], np.int32)


def norm(p, x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def test_around_the_layers(random_params):
    """Patches row by row behind the class token, the norms before and after, the projection."""
    encoder = CLIPImageEncoder(**TINY)
    p = random_params(encoder, X)
    features = jax.jit(encoder.apply)({"params": p}, X)
    kernel, e = p["embeddings"]["patch_embedding"]["kernel"], p["embeddings"]
    h = np.zeros((2, 10, 8))
    h[:, 0] = e["class_embedding"]
    for i, j in np.ndindex(3, 3):
        h[:, 1 + 3 * i + j] = np.einsum("bhwc,hwcd->bd", X[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], kernel)
    h = norm(p["pre_layrnorm"], h + e["position_embedding"]["embedding"]).astype(np.float32)
    layers = Encoder(2, 2, 12, "quick_gelu", 1e-5, causal=False)
    last = jax.jit(layers.apply)({"params": p["encoder"]}, h)[1]
    np.testing.assert_allclose(features.last, last, atol=2e-5)
    pooled = norm(p["post_layernorm"], np.asarray(last[:, 0])) @ p["visual_projection"]["kernel"]
    np.testing.assert_allclose(features.pooled, pooled, atol=2e-5)
    assert features.pooled.shape == (2, 5)


def test_half_precision_keeps_float32_parameters(random_params):
    encoder = CLIPImageEncoder(**TINY)
    params = random_params(encoder, X)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact, half = (jax.jit(m.apply)({"params": params}, X) for m in (encoder, encoder.clone(dtype=jnp.bfloat16)))
    assert [a.dtype for a in (*exact, *half)] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b in zip(exact, half):
        np.testing.assert_allclose(a, b.astype(np.float32), atol=0.05 * np.abs(a).max())


def test_clip_is_both_encoders(random_params):
    """Embeddings of length 1 along what the encoders pool, and a temperature that starts at 0.07."""
    text, image = CLIPTextEncoder(**TEXT, projection_dim=5), CLIPImageEncoder(**TINY)
    clip = CLIP(text, image)
    params = random_params(clip, IDS, X) | {"logit_scale": np.float32(np.log(30))}
    assert params.keys() == {"text", "image", "logit_scale"}
    u, v, scale = jax.jit(clip.apply)({"params": params}, IDS, X)
    for module, part, inputs, got in ((text, "text", IDS, u), (image, "image", X, v)):
        pooled = np.asarray(jax.jit(module.apply)({"params": params[part]}, inputs).pooled)
        np.testing.assert_allclose(got, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(scale, 30, rtol=1e-5)
    drawn = jax.jit(lambda key: clip.init(key, IDS, X)["params"]["logit_scale"])(jax.random.key(0))
    np.testing.assert_allclose(np.exp(-drawn), 0.07, rtol=1e-6)


def test_nothing_has_no_direction():
    value, grad = jax.value_and_grad(lambda x: normalize(x).sum())(jnp.zeros(3))
    assert value == 0 and np.isfinite(grad).all()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_act", "relu", "hidden_act must be one of gelu, quick_gelu; got 'relu'"),
        ("num_attention_heads", 3, "num_attention_heads must divide hidden_size; got 3 for 8"),
        ("patch_size", 4, "patch_size must divide image_size; got 4 for 6"),
        ("patch_size", 0, "patch_size must be 1 or more; got 0"),
        ("num_channels", 0, "num_channels must be 1 or more; got 0"),
        ("projection_dim", 0, "projection_dim must be 1 or more; got 0"),
    ],
)
def test_refused_fields(field, value, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(CLIPImageEncoder(**TINY | {field: value}).init, jax.random.key(0), X)


@pytest.mark.parametrize("projection_dim", [None, 4])
def test_encoders_to_different_spaces_are_refused(projection_dim):
    clip = CLIP(CLIPTextEncoder(**TEXT, projection_dim=projection_dim), CLIPImageEncoder(**TINY))
    with pytest.raises(ValueError, match=f"projection_dim of .* must be the same; got {projection_dim} and 5"):
        jax.eval_shape(clip.init, jax.random.key(0), IDS, X)


@pytest.mark.parametrize(
    "x, given",
    [
        (X[0], r"float32 \[6, 6, 3\]"),
        (X[:, :4], r"float32 \[2, 4, 6, 3\]"),
        (X[..., :1], r"float32 \[2, 6, 6, 1\]"),
        (np.zeros((2, 6, 6, 3), np.uint8), r"uint8 \[2, 6, 6, 3\]"),
    ],
)
def test_refused_pictures(x, given):
    with pytest.raises(ValueError, match=rf"x must be floats \[B, 6, 6, 3\]; got {given}"):
        jax.eval_shape(CLIPImageEncoder(**TINY).init, jax.random.key(0), x)
