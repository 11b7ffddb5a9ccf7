import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ldm_jax.models.unet import Added, UNet
from ldm_jax.models.unet2d import UNet2D

TINY = {
    "in_channels": 1,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_heads": 2,
    "cross_attention_dim": 3,
    "norm_num_groups": 2,
}


QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time


def inputs(size=(6, 6), tokens=2):
    rng = np.random.default_rng(0)
    z_t = rng.normal(size=(2, *size, 1)).astype(np.float32)
    context = rng.normal(size=(2, tokens, 3)).astype(np.float32)
    return z_t, np.array([1, 500], np.int32), context


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(module, *args, **kwargs):
    """Output and parameters of `init`, as shapes only."""
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *args, **kwargs)
    return out, variables["params"]


def test_parameter_count_by_hand():
    def conv(i, o, k=3):
        return k * k * i * o + o

    def linear(i, o):
        return i * o + o

    def resnet(i, o):  # norm, conv, time, norm, conv, shortcut; the time embedding is 4 * 4 wide
        return 2 * i + conv(i, o) + linear(16, o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    def transformer(c, d):  # norm, two projections; three layer norms, self-, cross-attention, GEGLU, linear
        attentions = (3 * c * c + linear(c, c)) + (c * c + 2 * d * c + linear(c, c))
        return 2 * c + 2 * conv(c, c, 1) + 6 * c + attentions + linear(c, 8 * c) + linear(4 * c, c)

    time = linear(4, 16) + linear(16, 16)
    down = (resnet(4, 4) + conv(4, 4)) + (resnet(4, 8) + transformer(8, 3))
    middle = 2 * resnet(8, 8) + transformer(8, 3)
    up_coarse = resnet(8 + 8, 8) + resnet(8 + 4, 8) + 2 * transformer(8, 3) + conv(8, 8)
    up_fine = resnet(8 + 4, 4) + resnet(4 + 4, 4)
    expected = conv(1, 4) + time + down + middle + up_coarse + up_fine + 2 * 4 + conv(4, 2)

    _, params = abstract(UNet(**TINY), *inputs())
    assert count(params) == expected == 16426


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (1, 1), (5, 8)])
def test_any_size(size):
    out, _ = abstract(UNet(**TINY), *inputs(size))
    assert (out.shape, out.dtype) == ((2, *size, 2), jnp.float32)


def test_prediction_starts_at_zero(initialise):
    module, args = UNet(**TINY), inputs()
    last = initialise(module, *args, layer="conv_out")
    assert not last["kernel"].any()
    assert not last["bias"].any()


def test_gradients_reach_every_parameter(random_params):
    module, args = UNet(**TINY), inputs((7, 7))
    loss = lambda p: jnp.mean(module.apply({"params": p}, *args) ** 2)  # noqa: E731
    grads = flatten_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(random_params(module, *args)))
    assert all(np.isfinite(g).all() for g in grads.values())
    assert [path for path, g in grads.items() if not np.abs(g).max() > 1e-7] == []


def test_samples_are_independent_and_time_may_be_a_scalar(random_params):
    """Also: float and integer times are one, and time, context and input all matter."""
    module, (z_t, t, context) = UNet(**TINY), inputs()
    params = {"params": random_params(module, z_t, t, context)}
    apply = jax.jit(module.apply)
    out = apply(params, z_t, t, context)
    np.testing.assert_allclose(apply(params, z_t[::-1], t[::-1], context[::-1])[::-1], out, atol=1e-5)
    np.testing.assert_allclose(apply(params, z_t, np.int32(500), context)[1], out[1], atol=1e-5)
    np.testing.assert_allclose(apply(params, z_t, t.astype(np.float32), context), out, atol=1e-5)
    for changed in ((z_t[::-1], t, context), (z_t, t[::-1], context), (z_t, t, context[::-1])):
        assert np.abs(apply(params, *changed) - out).max() > 1e-3


PLAIN = {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
}


def test_without_attention_no_context_is_needed():
    out, _ = abstract(UNet(**TINY | PLAIN), *inputs()[:2])
    assert out.shape == (2, 6, 6, 2)


def test_class_labels(random_params):
    module, args = UNet(**TINY | PLAIN, num_class_embeds=3), inputs()
    labels = np.array([0, 2])
    params = {"params": random_params(module, *args, class_labels=labels)}
    assert params["params"]["class_embedding"]["embedding"].shape == (3, 16)
    apply = jax.jit(lambda labels: module.apply(params, *args, class_labels=labels))
    changed = np.abs(apply(labels) - apply(np.array([0, 1]))).max((1, 2, 3))
    assert changed[0] == 0
    assert changed[1] > 1e-3


# Three time ids, each of four sinusoids, after five numbers of pooled text.
ADDITION = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 17,
}


def extra():
    rng = np.random.default_rng(1)
    return Added(rng.normal(size=(2, 5)).astype(np.float32), rng.integers(0, 1024, (2, 3)).astype(np.float32))


def test_added_embedding_by_hand(random_params):
    """linear_2(silu(linear_1([pooled, cos 1, sin 1, cos 2, ...]))) is added to the time embedding: so to its bias."""
    module, args, added = UNet(**TINY | PLAIN | ADDITION), inputs(), extra()
    params = random_params(module, *args, added=added)
    angles = added.time_ids[..., None] * np.array([1.0, 0.01])  # 10000^(-i/2), i = 0, 1
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(2, 12)
    h = np.concatenate([added.pooled, sinusoids], 1) @ params["add_embedding"]["linear_1"]["kernel"]
    h += params["add_embedding"]["linear_1"]["bias"]
    h = (
        h / (1 + np.exp(-h)) @ params["add_embedding"]["linear_2"]["kernel"]
        + params["add_embedding"]["linear_2"]["bias"]
    )

    out = jax.jit(module.apply)({"params": params}, *args, added=added)
    plain = jax.jit(UNet(**TINY | PLAIN).apply)
    for i in range(2):
        time = params["time_embedding"]["linear_2"]
        moved = params | {
            "time_embedding": params["time_embedding"] | {"linear_2": time | {"bias": time["bias"] + h[i]}}
        }
        moved.pop("add_embedding")
        np.testing.assert_allclose(plain({"params": moved}, *args)[i], out[i], atol=2e-4)


def test_gradients_reach_the_added_embedding(random_params):
    module, args, added = UNet(**TINY | PLAIN | ADDITION), inputs(), extra()
    loss = lambda p: jnp.mean(module.apply({"params": p}, *args, added=added) ** 2)  # noqa: E731
    grads = flatten_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(random_params(module, *args, added=added)))
    assert [path for path, g in grads.items() if not np.abs(g).max() > 1e-7] == []
    assert grads["add_embedding", "linear_1", "kernel"].shape == (17, 16)


def test_dropout_is_off_unless_asked_for():
    """That it works is the ResNet block's test; here, that the rate and the switch reach all 8 blocks."""
    module, args = UNet(**TINY, dropout=0.5), inputs()
    _, params = abstract(module, *args)

    def dropouts(**kwargs):
        """(rate, deterministic) of each dropout layer that a call passes."""
        seen = []

        def watch(call, args, kwargs, context):
            if isinstance(context.module, nn.Dropout):
                seen.append((context.module.rate, kwargs["deterministic"]))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            jax.eval_shape(lambda p: module.apply({"params": p}, *args, **kwargs), params)
        return seen

    assert dropouts() == [(0.5, True)] * 8
    assert dropouts(deterministic=False, rngs={"dropout": jax.random.key(0)}) == [(0.5, False)] * 8


def test_half_precision_computes_in_it_and_returns_float32():
    module, args = UNet(**TINY, dtype=jnp.bfloat16), inputs()
    out, params = abstract(module, *args)
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    jaxpr = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, *args))(params))
    convolutions = [line for line in jaxpr.splitlines() if "= conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


OPTIONS = {
    "heads and layers per level": {"attention_heads": (1, 4), "transformer_layers_per_block": (1, 2)},
    "linear projections": {"use_linear_projection": True},
    "only cross attention": {"only_cross_attention": (False, True)},
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "no middle": {"mid_block_type": None},
    "one level": {
        "block_out_channels": (4,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "two layers": {"layers_per_block": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options):
    args = inputs((5, 6))
    out, params = abstract(UNet(**TINY | options), *args)
    assert out.shape == (2, 5, 6, 2)
    names = {"/".join(path) for path in flatten_dict(params)}
    assert any("transformer_blocks_1" in n for n in names) == ("transformer_layers_per_block" in options)
    assert any("resnets_2" in n for n in names) == ("layers_per_block" in options)
    assert any(n.startswith("mid_block/") for n in names) == (options.get("mid_block_type", "") is not None)
    assert any(n.startswith("mid_block/attentions_0") for n in names) == ("mid_block_type" not in options)


def test_heads_need_not_divide_where_nothing_attends():
    abstract(UNet(**TINY | {"attention_heads": (3, 2)}), *inputs())


BAD_FIELDS = [
    ({"down_block_types": ("DownBlock2D",)}, "down_block_types must have one entry for each of the 2 levels"),
    ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types must have one entry for each of the 2 levels; got 3"),
    ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "for each of the 0 levels"),
    ({"down_block_types": ("DownBlock2D", "Down")}, "unknown block 'Down' in down_block_types; known are"),
    ({"up_block_types": ("DownBlock2D", "UpBlock2D")}, "unknown block 'DownBlock2D' in up_block_types"),
    ({"mid_block_type": "Middle"}, "unknown mid_block_type 'Middle'; known are"),
    ({"norm_num_groups": 3}, "multiple of norm_num_groups=3; 4 in"),
    ({"block_out_channels": (3, 6), "norm_num_groups": 3}, "block_out_channels\\[0\\] must be even.*got 3"),
    ({"attention_heads": 3}, "level 1 has 3 for 8"),
    ({"attention_heads": 0}, "level 1 has 0 for 8"),
    ({"attention_heads": (2, 2, 2)}, "attention_heads must be one value or one for each of the 2 levels; got 3"),
    ({"transformer_layers_per_block": (1,)}, "transformer_layers_per_block must be one value or one for"),
    ({"only_cross_attention": (True,)}, "only_cross_attention must be one value or one for each"),
    (ADDITION | {"addition_embed_type": "text"}, "addition_embed_type must be 'text_time' or None; got 'text'"),
    (ADDITION | {"addition_embed_type": None}, "go with addition_embed_type; got 4, 17 and None"),
    (ADDITION | {"addition_time_embed_dim": None}, "go with addition_embed_type; got None, 17 and 'text_time'"),
    (ADDITION | {"addition_time_embed_dim": 3}, "addition_time_embed_dim must be even; got 3"),
]


@pytest.mark.parametrize("fields, message", BAD_FIELDS, ids=[m[:25] for _, m in BAD_FIELDS])
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet(**TINY | fields), *inputs())


BAD_INPUTS = [
    (lambda z, t, c: (z[..., 0], t, c), {}, "z_t must be \\[B, h, w, 1\\]; got \\(2, 6, 6\\)"),
    (lambda z, t, c: (np.repeat(z, 2, -1), t, c), {}, "got \\(2, 6, 6, 2\\)"),
    (lambda z, t, c: (z, t, None), {}, "context must be \\[2, L, 3\\]; got None"),
    (lambda z, t, c: (z, t, c[..., :2]), {}, "context must be \\[2, L, 3\\]; got \\(2, 2, 2\\)"),
    (lambda z, t, c: (z, t, c[:1]), {}, "got \\(1, 2, 3\\)"),
    (lambda z, t, c: (z, t, c[:, 0]), {}, "got \\(2, 3\\)"),
    (lambda z, t, c: (z, t, c), {"class_labels": np.array([0, 1])}, "num_class_embeds=None and class_labels not None"),
    (lambda z, t, c: (z, t, c), {"added": extra()}, "got addition_embed_type=None and added not None"),
]


@pytest.mark.parametrize("change, more, message", BAD_INPUTS)
def test_bad_inputs(change, more, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet(**TINY), *change(*inputs()), **more)


@pytest.mark.parametrize(
    "added, message",
    [
        (None, "got addition_embed_type='text_time' and added None"),
        (
            Added(extra().pooled[:1], extra().time_ids),
            "pooled \\[2, P\\] and time_ids \\[2, N\\] with P \\+ 4 N = 17; got",
        ),
        (Added(extra().pooled, extra().time_ids[:, :2]), "got \\(2, 5\\) and \\(2, 2\\)"),
        (Added(extra().pooled, extra().time_ids[0]), "got \\(2, 5\\) and \\(3,\\)"),
    ],
)
def test_bad_added(added, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet(**TINY | ADDITION), *inputs(), added=added)


def test_missing_class_labels():
    with pytest.raises(ValueError, match="num_class_embeds=3 and class_labels None"):
        abstract(UNet(**TINY, num_class_embeds=3), *inputs())


@pytest.mark.parametrize("attention", ["cross-attention", "self-attention"])
def test_gradient_checkpointing_changes_neither_parameters_nor_gradients(attention):
    """And the tensors inside the blocks can still be captured."""
    z_t, t, context = inputs(size=(5, 6))
    if attention == "cross-attention":
        plain, arguments = UNet(**TINY), (z_t, t, context)
    else:
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        shared = {name: value for name, value in TINY.items() if not name.startswith(("attention", "cross"))}
        plain = UNet2D(**shared | {"down_block_types": down, "up_block_types": up}, attention_head_dim=4)
        arguments = (z_t, t)
    remat = plain.clone(remat=True)
    params = jax.jit(plain.init, compiler_options=QUICK)(jax.random.key(0), *arguments)["params"]
    assert abstract(remat, *arguments)[1] == jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    params = jax.tree.map(lambda p: p + 0.1, params)  # the last layers start at 0

    def gradient(module):
        def loss(params):
            out, tensors = module.apply({"params": params}, *arguments, capture_intermediates=True)
            return jnp.square(out).sum(), tensors["intermediates"]

        (value, tensors), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
        return {"loss": value, "grads": grads, "tensors": tensors}

    one, other = gradient(plain), gradient(remat)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), one, other)
    program = str(jax.make_jaxpr(jax.grad(lambda p: remat.apply({"params": p}, *arguments).sum()))(params))
    assert program.count("remat") >= 5  # two down blocks, the middle one, two up blocks
