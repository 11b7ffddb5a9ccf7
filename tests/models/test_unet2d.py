import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.models import attention
from ldm_jax.models.unet2d import UNet2D

TINY = {
    "in_channels": 1,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time


def inputs(size=(6, 6)):
    z_t = np.random.default_rng(0).normal(size=(2, *size, 1)).astype(np.float32)
    return z_t, np.array([1, 500], np.int32)


def abstract(module, *args):
    """Output and parameters of `init`, as shapes only."""
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *args)
    return out, variables["params"]


def test_parameter_count_by_hand():
    def conv(i, o, k=3):
        return k * k * i * o + o

    def linear(i, o):
        return i * o + o

    def resnet(i, o):  # norm, conv, time, norm, conv, shortcut; the time embedding is 4 * 4 wide
        return 2 * i + conv(i, o) + linear(16, o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    attention = 2 * 8 + 4 * linear(8, 8)  # norm; q, k, v and out, all with biases
    time = linear(4, 16) + linear(16, 16)
    down = (resnet(4, 4) + conv(4, 4)) + (resnet(4, 8) + attention)
    middle = 2 * resnet(8, 8) + attention
    up_coarse = resnet(8 + 8, 8) + resnet(8 + 4, 8) + 2 * attention + conv(8, 8)
    up_fine = resnet(8 + 4, 4) + resnet(4 + 4, 4)
    expected = conv(1, 4) + time + down + middle + up_coarse + up_fine + 2 * 4 + conv(4, 2)

    _, params = abstract(UNet2D(**TINY), *inputs())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 1)])
def test_any_size(size):
    out, _ = abstract(UNet2D(**TINY), *inputs(size))
    assert (out.shape, out.dtype) == ((2, *size, 2), jnp.float32)


def test_gradients_reach_every_parameter(random_params):
    """But the biases of the keys: they add the same to a query's score for each key, which the softmax does not see."""
    module, args = UNet2D(**TINY), inputs()
    loss = lambda p: jnp.mean(module.apply({"params": p}, *args) ** 2)  # noqa: E731
    grads = flatten_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(random_params(module, *args)))
    assert all(np.isfinite(g).all() for g in grads.values())
    unreached = [path for path, g in grads.items() if not np.abs(g).max() > 1e-6]
    assert all(path[-2:] == ("to_k", "bias") for path in unreached)


def test_samples_are_independent_and_time_matters(random_params):
    module, (z_t, t) = UNet2D(**TINY), inputs()
    params = {"params": random_params(module, z_t, t)}
    apply = jax.jit(module.apply)
    out = apply(params, z_t, t)
    np.testing.assert_allclose(apply(params, z_t[::-1], t[::-1])[::-1], out, atol=1e-5)
    np.testing.assert_allclose(apply(params, z_t, np.int32(500))[1], out[1], atol=1e-5)
    assert np.abs(apply(params, z_t, t[::-1]) - out).max() > 1e-3


@pytest.mark.parametrize("size, heads", [(4, 2), (8, 1), (2, 4), (None, 1)])
def test_the_size_of_heads(size, heads, monkeypatch):
    """attention_head_dim is the size of a head, not their number."""
    seen, attend = set(), attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, *kv, **more: seen.add(q.shape[2:]) or attend(q, *kv, **more))
    abstract(UNet2D(**TINY | {"attention_head_dim": size}), *inputs())
    assert seen == {(heads, 8 // heads)}


OPTIONS = {
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "no attention": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
        "attention_head_dim": 3,
    },
    "two layers": {"layers_per_block": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options):
    out, params = abstract(UNet2D(**TINY | options), *inputs((5, 6)))
    assert out.shape == (2, 5, 6, 2)
    names = {"/".join(path) for path in flatten_dict(params)}
    middle = options.get("mid_block_type", "") is not None
    assert any(n.startswith("mid_block/resnets_1") for n in names) == middle
    assert any(n.startswith("mid_block/attentions_0") for n in names) == (middle and "add_attention" not in options)
    assert any(n.startswith("down_blocks_1/attentions_0") for n in names) == ("down_block_types" not in options)
    assert any("resnets_2" in n for n in names) == ("layers_per_block" in options)


def test_half_precision_computes_in_it_and_returns_float32():
    module, args = UNet2D(**TINY, dtype=jnp.bfloat16), inputs()
    out, params = abstract(module, *args)
    assert out.dtype == jnp.float32
    jaxpr = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, *args))(params))
    convolutions = [line for line in jaxpr.splitlines() if "= conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


BAD_FIELDS = [
    ({"down_block_types": ("DownBlock2D",)}, "down_block_types must have one entry for each of the 2 levels"),
    ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types must have one entry for each of the 2 levels; got 3"),
    ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "for each of the 0 levels"),
    ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "'CrossAttnDownBlock2D' in down_block_types"),
    ({"up_block_types": ("DownBlock2D", "UpBlock2D")}, "unknown block 'DownBlock2D' in up_block_types"),
    ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "unknown mid_block_type 'UNetMidBlock2DCrossAttn'; known are"),
    ({"norm_num_groups": 3}, "multiple of norm_num_groups=3; 4 in"),
    ({"block_out_channels": (3, 6), "norm_num_groups": 3}, "block_out_channels\\[0\\] must be even.*got 3"),
    ({"attention_head_dim": 3}, "attention_head_dim must divide the width of a level; level 1: 3 for 8"),
    ({"attention_head_dim": 0}, "level 1: 0 for 8"),
]


@pytest.mark.parametrize("fields, message", BAD_FIELDS, ids=[m[:25] for _, m in BAD_FIELDS])
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet2D(**TINY | fields), *inputs())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, t: (z[..., 0], t), "z_t must be \\[B, h, w, 1\\]; got \\(2, 6, 6\\)"),
        (lambda z, t: (np.repeat(z, 2, -1), t), "got \\(2, 6, 6, 2\\)"),
        (lambda z, t: (z, t, z[..., 0]), "the context must be None; got \\(2, 6, 6\\)"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet2D(**TINY), *change(*inputs()))
