"""Names and layouts by hand; that they are diffusers' own is proven in tests/parity."""

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import params_from_state_dict, state_dict_from_params
from ldm_jax.models.autoencoder import VQModel

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


STATE = {
    "down_blocks.0.resnets.1.conv1.weight": draw(5, 4, 3, 2),
    "down_blocks.0.resnets.1.conv1.bias": draw(5),
    "time_embedding.linear_1.weight": draw(5, 4),
    "mid_block.attentions.0.transformer_blocks.12.attn1.to_out.0.weight": draw(3, 2),
    "mid_block.attentions.0.transformer_blocks.12.ff.net.0.proj.bias": draw(3),
    "conv_norm_out.weight": draw(6),
    "quantize.embedding.weight": draw(7, 2),
}
PARAMS = {
    "down_blocks_0": {
        "resnets_1": {
            "conv1": {
                "kernel": np.moveaxis(STATE["down_blocks.0.resnets.1.conv1.weight"], (0, 1), (3, 2)),
                "bias": STATE["down_blocks.0.resnets.1.conv1.bias"],
            }
        }
    },
    "time_embedding": {"linear_1": {"kernel": STATE["time_embedding.linear_1.weight"].T}},
    "mid_block": {
        "attentions_0": {
            "transformer_blocks_12": {
                "attn1": {"to_out_0": {"kernel": STATE[[*STATE][3]].T}},
                "ff": {"net_0": {"proj": {"bias": STATE[[*STATE][4]]}}},
            }
        }
    },
    "conv_norm_out": {"scale": STATE["conv_norm_out.weight"]},
    "quantize": {"embedding": {"embedding": STATE["quantize.embedding.weight"]}},
}
TARGET = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PARAMS)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_params_from_state_dict():
    assert PARAMS["down_blocks_0"]["resnets_1"]["conv1"]["kernel"].shape == (3, 2, 4, 5)
    assert_trees_equal(params_from_state_dict(STATE, TARGET), PARAMS)


def test_state_dict_from_params_is_the_inverse():
    back = state_dict_from_params(PARAMS)
    assert back.keys() == STATE.keys()
    assert all(np.array_equal(back[key], STATE[key]) for key in STATE)


def test_dtypes_are_kept():
    half = {key: value.astype(np.float16) for key, value in STATE.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params_from_state_dict(half, TARGET))} == {np.dtype(np.float16)}


def test_old_attention_layers():
    """Names of before 2023, and linear maps kept as 1x1 convolutions."""
    module = VQModel(1, 1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2)
    target = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))["params"]
    params = jax.tree.map(lambda s: draw(*s.shape), target)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in state_dict_from_params(params).items():
        for new_name, old_name in old.items():
            if f".{new_name}." in key:
                key = key.replace(new_name, old_name)
                value = value[:, :, None, None] if value.ndim == 2 else value
        state[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    assert state["decoder.mid_block.attentions.0.query.weight"].shape == (4, 4, 1, 1)
    assert_trees_equal(params_from_state_dict(state, target), params)


def test_old_names_in_every_layer_of_a_level():
    """UNet2DModel has several attentions a level; a transformer's layers never had such names."""
    names = ("to_q", "to_k", "to_v", "to_out_0")
    params = {"up_blocks_0": {"attentions_2": {name: {"kernel": draw(3, 3)} for name in names}}}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in state_dict_from_params(params).items():
        _, level, _, layer, *name, leaf = key.split(".")
        state[f"up_blocks.{level}.attentions.{layer}.{old['.'.join(name)]}.{leaf}"] = value
    assert "up_blocks.0.attentions.2.proj_attn.weight" in state
    assert_trees_equal(params_from_state_dict(state, params), params)


def test_all_that_is_wrong_is_named():
    state = dict(STATE)
    del state["conv_norm_out.weight"], state["time_embedding.linear_1.weight"]
    state["conv_norm_in.weight"] = draw(6)
    state["quantize.embedding.weight"] = draw(8, 2)
    with pytest.raises(InputError) as error:
        params_from_state_dict(state, TARGET)
    assert str(error.value) == (
        "the state_dict does not fit this model: "
        "missing keys (2): conv_norm_out.weight, time_embedding.linear_1.weight; "
        "unexpected keys (1): conv_norm_in.weight; "
        "size mismatch (1): quantize.embedding.weight (8, 2) for (7, 2)"
    )


@pytest.mark.parametrize("shape", [(4, 5), (5, 4, 3, 3), (5,), (5, 4, 1)])
def test_a_kernel_of_another_shape(shape):
    with pytest.raises(InputError, match=r"size mismatch \(1\): time_embedding.linear_1.weight \("):
        params_from_state_dict(STATE | {"time_embedding.linear_1.weight": draw(*shape)}, TARGET)
