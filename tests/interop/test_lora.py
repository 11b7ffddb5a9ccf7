"""LoRA files: what is written is read, in each layout to the same sum; what is not understood is refused."""

import json

import jax
import numpy as np
import pytest
from random_runs import random_model
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import InputError
from ldm_jax.interop.lora import init_lora, merge, save_lora
from ldm_jax.interop.lora_files import add_lora, layer_names, read_lora
from ldm_jax.interop.modules import abstract_params
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.lora import with_lora

RNG = np.random.default_rng(0)
LAYER = "down_blocks.0.attn1.to_out.0"


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


UNET = {
    "conv_in": {"kernel": array(3, 3, 4, 6), "bias": array(6)},
    "down_blocks_0": {
        "attn1": {"to_q": {"kernel": array(6, 6)}, "to_out_0": {"kernel": array(6, 6), "bias": array(6)}},
        "proj_in": {"kernel": array(1, 1, 6, 5)},
    },
}
DOWN, UP = array(2, 6), array(6, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def added(path, scale=1.0):
    names = layer_names(UNET)
    pairs = {names[layer]: pair for (component, layer), pair in read_lora(path).items() if component in ("unet", "")}
    return add_lora(UNET, pairs, scale, where="--lora=it")


def test_what_is_written_is_read(path):
    lora = init_lora(jax.random.key(0), UNET, 2)
    assert set(lora["down_blocks_0"]) == {"attn1"}
    jax.tree.map(np.testing.assert_array_equal, merge(UNET, lora, 3.0), UNET)
    lora = jax.tree.map(lambda p: array(*p.shape), lora)
    save_lora(path, lora, 3.0)
    names = [f"unet.down_blocks.0.attn1.{layer}.lora.{side}.weight" for layer in ("to_out.0", "to_q")
             for side in ("down", "up")]  # fmt: skip
    assert sorted(load_file(path)) == names
    for scale in (1.0, 0.5):
        here = merge(UNET, lora, 3.0 * scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), added(path, scale), here)


LAYOUTS = {  # keys of a file with DOWN and UP -> what they are multiplied by
    "diffusers": ({f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP}, {}, 1),
    "peft": ({f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP}, {}, 1),
    "before 0.22": (
        {f"unet.down_blocks.0.attn1.processor.to_out_lora.{side}.weight": a
         for side, a in (("down", DOWN), ("up", UP))}, {}, 1,
    ),
    "with an alpha": (
        {f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP,
         f"unet.{LAYER}.alpha": np.array(6, np.float32)}, {}, 3,
    ),
    "with peft's config": (
        {f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP}, {"unet.lora_alpha": 8}, 4,
    ),
    "rank-stabilized": (
        {f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP},
        {"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5,
    ),
    "with an alpha by layer": (
        {f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP},
        {"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2, "attn1.to_out.0": 4}}, 2,
    ),
    "a PEFT adapter": (
        {f"base_model.model.{LAYER}.lora_A.weight": DOWN, f"base_model.model.{LAYER}.lora_B.default.weight": UP},
        {}, 1,
    ),
    "kohya's": (
        {"lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight": DOWN,
         "lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight": UP,
         "lora_unet_down_blocks_0_attn1_to_out_0.alpha": np.array(6, np.float32)}, {}, 3,
    ),
    "kohya's, as a convolution of one pixel": (
        {"lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight": DOWN[..., None, None],
         "lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight": UP[..., None, None]}, {}, 1,
    ),
}  # fmt: skip


def save(path, state, metadata):
    adapter = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(state, path, metadata=adapter if metadata else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, path):
    state, metadata, times = LAYOUTS[layout]
    save(path, state, metadata)
    out = added(path)["down_blocks_0"]["attn1"]
    expected = UNET["down_blocks_0"]["attn1"]["to_out_0"]["kernel"] + times * (UP @ DOWN).T
    np.testing.assert_allclose(out["to_out_0"]["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(out["to_q"]["kernel"], UNET["down_blocks_0"]["attn1"]["to_q"]["kernel"])


def test_convolutions(path):
    """In half precision, the layer of one pixel and that of nine."""
    state = {
        "conv_in": (array(2, 4, 3, 3), array(6, 2, 1, 1)),
        "down_blocks.0.proj_in": (array(2, 6, 1, 1), array(5, 2, 1, 1)),
    }
    halves = {f"unet.{layer}.lora.{side}.weight": a.astype(np.float16)
              for layer, pair in state.items() for side, a in zip(("down", "up"), pair)}  # fmt: skip
    save(path, halves, {})
    out = added(path)
    for layer, (down, up) in state.items():
        ours, before = out, UNET
        for name in layer.replace(".0", "_0").split("."):
            ours, before = ours[name], before[name]
        delta = np.einsum("or,rihw->hwio", up[:, :, 0, 0], down)
        np.testing.assert_allclose(ours["kernel"], before["kernel"] + delta, atol=1e-2)


def key(name, *shape):
    return {f"unet.{name}.weight": array(*shape)}


PAIR = LAYOUTS["diffusers"][0]
REFUSED = {
    "keys of no LoRA": (
        PAIR | {"a.weight": DOWN, "b": UP}, {},
        r"is no LoRA of a UNet or text encoder: unknown keys \(2\): a.weight, b"),
    "whole weights": ({"lora_unet_x.diff": UP}, {}, "has whole weights of LyCORIS"),
    "no keys": ({}, {}, "is no LoRA of a UNet or text encoder"),
    "half a pair": (
        key(f"{LAYER}.lora.down", 2, 6), {},
        r"is damaged: layers without their down or up weight \(1\): unet down_blocks.0.attn1.to_out.0"),
    "an alpha alone": (
        PAIR | {"unet.x.alpha": np.array(1.0, np.float32)}, {}, "layers without their down or up weight"),
    "another width": (
        key(f"{LAYER}.lora.down", 2, 7) | key(f"{LAYER}.lora.up", 6, 2), {},
        r"\[6, 2\] x \[2, 7\] in it, but \[6, 6\]"),
    "nan": ({name: value * np.nan for name, value in PAIR.items()}, {}, "has values that are not finite"),
    "DoRA by its tensor": (PAIR | {f"unet.{LAYER}.dora_scale": UP}, {}, r"has DoRA \(.*dora_scale\), which is not"),
    "LoHa": ({"lora_unet_x.hada_w1_a": UP}, {}, r"has LoHa of LyCORIS \(lora_unet_x.hada_w1_a\)"),
    "LoKr": ({"lora_unet_x.lokr_w1": UP}, {}, "has LoKr of LyCORIS"),
    "ranks that do not agree": (
        key(f"{LAYER}.lora.down", 3, 6) | key(f"{LAYER}.lora.up", 6, 2), {}, "is for another model"),
    "a convolution for a linear layer": (
        key(f"{LAYER}.lora.down", 2, 6, 3, 3) | key(f"{LAYER}.lora.up", 6, 2, 1, 1), {}, "is for another model"),
    "DoRA": (PAIR, {"unet.use_dora": True}, "has use_dora, which is not supported"),
    "a config that is a list": (PAIR, [1], "lora_adapter_metadata cannot be read"),
}  # fmt: skip


def test_a_convolution_in_three_factors(path):
    """As LyCORIS writes it: W[o, i, h, w] = sum_rs up[o, r] mid[r, s, h, w] down[s, i]."""
    down, mid, up = array(2, 4, 1, 1), array(2, 2, 3, 3), array(6, 2, 1, 1)
    names = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    save(path, {f"lora_unet_conv_in.{name}.weight": value for name, value in names.items()}, {})
    delta = np.einsum("or,rshw,si->hwio", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    np.testing.assert_allclose(added(path)["conv_in"]["kernel"], UNET["conv_in"]["kernel"] + delta, atol=1e-5)


def test_the_config_of_an_adapter_next_to_it(tmp_path):
    save(tmp_path / "adapter_model.safetensors", LAYOUTS["a PEFT adapter"][0], {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "peft_type": "LORA"}))
    ((place, pair),) = read_lora(tmp_path / "adapter_model.safetensors").items()
    assert (place, pair.scale) == (("", LAYER), 4.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(InputError, match="has use_dora, which is not supported"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_layers_under_the_names_of_stability_ai():
    """Of a UNet of SDXL's layout, as kohya names them."""
    unet = UNet(block_out_channels=(32, 32), layers_per_block=2, attention_heads=(1, 1), cross_attention_dim=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 1),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    names = layer_names(abstract_params(unet), unet)
    block = "transformer_blocks.0.attn1.to_k"
    for alias, name in {
        f"input_blocks_4_1_{block.replace('.', '_')}": f"down_blocks.1.attentions.0.{block}",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "time_embed_0": "time_embedding.linear_1",
    }.items():
        assert names[alias] == names[name] == names[name.replace(".", "_")]


def test_layers_that_a_model_lacks_are_listed(path):
    """Of another model, or a text encoder's of a model without one."""
    model, params = random_model()
    state = key("mid.lora.down", 2, 6) | key("mid.lora.up", 6, 2)
    state |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN,
              "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": UP}  # fmt: skip
    save(path, state, {})
    expected = r"is for another model: layers that --model lacks \(2\): text_encoder encoder_layers_0_mlp_fc1, unet mid"
    with pytest.raises(InputError, match=expected):
        with_lora(model, params, path, 1.0)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, path):
    state, metadata, expected = REFUSED[case]
    save(path, state, metadata)
    with pytest.raises(InputError, match=expected) as error:
        added(path)
    assert "\n" not in str(error.value)


def test_files_that_are_none(path):
    with pytest.raises(InputError, match=r"lora.safetensors does not exist"):
        read_lora(path)
    with pytest.raises(InputError, match=r"not readable as a file of weights"):
        read_lora(_written(path.with_suffix(".bin"), b"x"))
    save(path, PAIR, {})
    with pytest.raises(InputError, match=r"is damaged"):
        read_lora(_written(path, path.read_bytes()[:-8]))


def _written(path, content):
    path.write_bytes(content)
    return path
