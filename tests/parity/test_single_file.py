"""Single files of CompVis and Stability AI: read as diffusers' and transformers' own converters read them.

The state dicts are made from diffusers' models by an inverse of the converters that is written out here by itself; that
it is one is what the converters say.
"""

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from ldm_jax.interop import single_file
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.ldm_configs import autoencoder_config, clip_config, open_clip_config, unet_config
from ldm_jax.interop.ldm_families import FAMILIES
from ldm_jax.interop.modules import AUTOENCODERS
from ldm_jax.interop.config_fields import defaults

VOCABULARY, LENGTH, POOLED = 100, 7, 64

DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SD1 = {
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "layers_per_block": 2,
    "sample_size": 64,
}
SD2 = SD1 | {
    "block_out_channels": (64, 64, 128, 128),
    "attention_head_dim": (1, 1, 2, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 128,
    "sample_size": 96,
}
XL = SD2 | {
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    "sample_size": 128,
}
FULL = {  # the true configurations
    "Stable Diffusion 1": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "Stable Diffusion 2": {
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "sample_size": 64,
    },
    "Stable Diffusion XL": XL
    | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
}

# (family, what is changed of its UNet)
MODELS = {
    "SD1": ("Stable Diffusion 1", SD1),
    "SD1 inpainting": ("Stable Diffusion 1", SD1 | {"in_channels": 9}),
    "SD2": ("Stable Diffusion 2", SD2),
    "SD2 inpainting": ("Stable Diffusion 2", SD2 | {"in_channels": 9, "sample_size": 64}),
    "SDXL": ("Stable Diffusion XL", XL),
    "SDXL inpainting": ("Stable Diffusion XL", XL | {"in_channels": 9}),
}
PREFIXES = {
    "Stable Diffusion 1": ("cond_stage_model.transformer.",),
    "Stable Diffusion 2": ("cond_stage_model.model.",),
    "Stable Diffusion XL": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_to_ldm(state, config):
    """A UNet2DConditionModel's state dict under CompVis' names, by walking the blocks as CompVis builds them."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    blocks = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    blocks |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    blocks |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    number = 0
    for level in range(levels):
        for layer in range(layers):
            number += 1
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if level < levels - 1:
            number += 1
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for ours, theirs in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        blocks[f"mid_block.{ours}"] = f"middle_block.{theirs}"
    number = -1
    for level in range(levels):
        attends = any(name.startswith(f"up_blocks.{level}.attentions") for name in state)
        for layer in range(layers + 1):
            number += 1
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
    renamed = {}
    for name, tensor in state.items():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        rest = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            module, leaf = rest.split(".")
            rest = f"{RESNET[module]}.{leaf}"
        renamed[f"model.diffusion_model.{blocks[block]}.{rest}"] = tensor
    return renamed


def vae_to_ldm(state, levels):
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        for ours, theirs in (
            ("encoder.down_blocks", "encoder.down"),
            ("resnets", "block"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("mid_block.block.0", "mid.block_1"),
            ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
        ):
            name = name.replace(ours, theirs)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{name}"] = tensor
    return renamed


def clip_to_ldm(state, prefix):
    names = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {f"{prefix}text_model.{name}": tensor for name, tensor in names.items()}
    return renamed | {f"{prefix}text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}


def open_clip_to_ldm(state, prefix, *, more_layers=0):
    """OpenCLIP's names; Stable Diffusion 2 has a layer more than diffusers uses, and a projection."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for name in [name for name in state if name.startswith(f"encoder.layers.{layers - 1}.")] * more_layers:
        state[name.replace(f".{layers - 1}.", f".{layers}.")] = torch.randn_like(state[name])
    width = state["final_layer_norm.weight"].shape[0]
    renamed = {"text_projection": state.pop("text_projection.weight", torch.randn(width, width)).T.contiguous()}
    renamed["positional_embedding"] = state.pop("embeddings.position_embedding.weight")
    renamed["token_embedding.weight"] = state.pop("embeddings.token_embedding.weight")
    renamed["logit_scale"] = torch.tensor(4.6)
    for leaf in ("weight", "bias"):
        renamed[f"ln_final.{leaf}"] = state.pop(f"final_layer_norm.{leaf}")
        for layer in range(layers + more_layers):
            ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            three = [state.pop(f"{ours}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            renamed[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(three)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                renamed[f"{theirs}.{b}.{leaf}"] = state.pop(f"{ours}.{a}.{leaf}")
    assert not state
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}


def text_encoder(width, layers, act, projection=None):
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        projection_dim=projection or width,
        eos_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def build(name, draw_weights):
    """(diffusers' and transformers' parts by name, the state dict of the single file) of a model."""
    family, config = MODELS[name]
    parts = {"unet": diffusers.UNet2DConditionModel(**config), "vae": diffusers.AutoencoderKL(**VAE)}
    if family == "Stable Diffusion 2":
        parts["text_encoder"] = text_encoder(128, 2, "gelu")
    else:
        parts["text_encoder"] = text_encoder(64, 2, "quick_gelu")
    if family == "Stable Diffusion XL":
        parts["text_encoder_2"] = text_encoder(128, 3, "gelu", projection=POOLED)
    for part in parts.values():
        draw_weights(part)
    states = {part: model.state_dict() for part, model in parts.items()}
    file = unet_to_ldm(states["unet"], config) | vae_to_ldm(states["vae"], 3)
    if family == "Stable Diffusion 2":
        file |= open_clip_to_ldm(dict(states["text_encoder"]), PREFIXES[family][0], more_layers=1)
    else:
        file |= clip_to_ldm(states["text_encoder"], PREFIXES[family][0])
    if family == "Stable Diffusion XL":
        file |= open_clip_to_ldm(dict(states["text_encoder_2"]), PREFIXES[family][1])
    return parts, file


def assert_same(params, theirs):
    ours = state_dict_from_params(params)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)


def without_prefix(state):
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_read_as_diffusers_reads_them(name, tmp_path, draw_weights):
    parts, file = build(name, draw_weights)
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "model.safetensors")
    found = single_file.read(tmp_path / "model.safetensors")
    family, config = MODELS[name]
    assert found.family == family
    assert found.sample_size == config["sample_size"]
    assert ("Inpaint" in found.pipeline) == ("inpainting" in name)

    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(file), dict(parts["unet"].config))
    assert_same(found.unet[1], theirs)
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(file), dict(parts["vae"].config))
    assert_same(found.autoencoder[1], theirs)
    for part, prefix, (_, params) in zip(("text_encoder", "text_encoder_2"), PREFIXES[family], found.texts):
        if prefix.endswith("model."):
            theirs = single_file_utils.convert_open_clip_checkpoint(parts[part], _cut(file, prefix), prefix=prefix)
            if family == "Stable Diffusion 2":
                theirs = {k: v for k, v in theirs.items() if ".2." not in k and "projection" not in k}
        else:
            theirs = single_file_utils.convert_ldm_clip_checkpoint(file)
            theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith("position_ids")}
        assert_same(params, without_prefix(theirs))
        # and so the modules say the same
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
        module = found.texts[0 if part == "text_encoder" else 1][0]
        ours = jax.jit(module.apply)({"params": params}, ids)
        with torch.no_grad():
            out = parts[part](torch.from_numpy(ids), output_hidden_states=True)
        for a, b in ((ours.last, out.last_hidden_state), (ours.penultimate, out.hidden_states[-2])):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-4)


def _cut(file, prefix):
    """Without what diffusers leaves out by its number, 23, of a layer."""
    return dict(file)
