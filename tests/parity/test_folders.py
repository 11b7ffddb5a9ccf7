"""Folders that diffusers writes, opened here, and folders written here, opened by diffusers: the same networks."""

import inspect
from functools import partial

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity.quiet import open_quietly

from ldm_jax.interop.config_fields import TABLES, defaults
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.folder import load_autoencoder, load_unet, write_component
from ldm_jax.interop.modules import config_from_autoencoder, config_from_unet
from ldm_jax.models.unet import Added

SD1 = {
    "block_out_channels": (8, 16, 24, 32),
    "attention_head_dim": 8,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 64,
}
XL = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 5 + 6 * 6,
}
UPSCALER = {
    "in_channels": 7,
    "block_out_channels": (8, 16, 16, 32),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
    "num_class_embeds": 10,
}
CELEBAHQ = {
    "block_out_channels": (8, 16, 24, 32),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 64,
}
SMALL_CELEBAHQ = {
    "block_out_channels": (8, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
UNETS = {
    "SD1": ("UNet2DConditionModel", SD1),
    "SD2": (
        "UNet2DConditionModel",
        SD1 | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    ),
    "SDXL": ("UNet2DConditionModel", SD1 | XL),
    "inpainting": ("UNet2DConditionModel", SD1 | {"in_channels": 9}),
    "x4 upscaler": ("UNet2DConditionModel", SD1 | UPSCALER),
    "celebahq": ("UNet2DModel", CELEBAHQ),
    "one head, sines first": (
        "UNet2DModel",
        SMALL_CELEBAHQ | {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1},
    ),
    "no attention in the middle": ("UNet2DModel", SMALL_CELEBAHQ | {"add_attention": False, "attention_head_dim": 4}),
}

AUTOENCODER = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "sample_size": 16,
}
AUTOENCODERS = {
    "KL": ("AutoencoderKL", AUTOENCODER),
    "KL without quant convs": (
        "AutoencoderKL",
        AUTOENCODER
        | {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    "VQ": ("VQModel", AUTOENCODER | {"layers_per_block": 2, "num_vq_embeddings": 16, "scaling_factor": 1.0}),
}


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def assert_close(ours, theirs):
    """Within 1e-4 of the output's scale; theirs NCHW."""
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error <= 1e-4


def unet_inputs(name, config):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    size = (8, 16) if name == "UNet2DModel" else (9, 8)  # diffusers' AttnUpBlock2D takes no odd sizes
    channels = config.get("in_channels", 3 if name == "UNet2DModel" else 4)
    inputs = {"z_t": normal(2, *size, channels), "t": np.array([3, 871])}
    if name == "UNet2DConditionModel":
        inputs["context"] = normal(2, 5, 12)
    if "num_class_embeds" in config:
        inputs["class_labels"] = np.array([0, 9])
    if "addition_embed_type" in config:
        inputs["added"] = Added(normal(2, 5), rng.integers(0, 1024, (2, 6)).astype(np.float32))
    return inputs


def call_theirs(model, inputs):
    names = {"context": "encoder_hidden_states", "class_labels": "class_labels"}
    named = {names[k]: torch.from_numpy(v) for k, v in inputs.items() if k in names}
    if "added" in inputs:
        text, time_ids = map(torch.from_numpy, inputs["added"])
        named["added_cond_kwargs"] = {"text_embeds": text, "time_ids": time_ids}
    return model(nchw(inputs["z_t"]), torch.from_numpy(inputs["t"]), **named).sample


@partial(jax.jit, static_argnames=("module", "method"))
def call(module, params, *args, method=None, **named):
    return module.apply({"params": params}, *args, method=method, **named)


def public(model):
    return {field: value for field, value in model.config.items() if not field.startswith("_")}


def as_lists(config):
    return {field: list(value) if isinstance(value, tuple) else value for field, value in config.items()}


@pytest.mark.parametrize("name, config", UNETS.values(), ids=UNETS.keys())
def test_unets_there_and_back(tmp_path, random_weights, name, config):
    theirs = random_weights(getattr(diffusers, name)(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = unet_inputs(name, config)
    expected = call_theirs(theirs, inputs)
    unet, params = load_unet(tmp_path / "theirs")
    assert_close(call(unet, params, **inputs), expected)

    write_component(tmp_path / "ours", config_from_unet(unet, 64), state_dict_from_params(params))
    again = open_quietly(name, tmp_path / "ours")
    assert torch.equal(call_theirs(again, inputs), expected)
    without = {"sample_size", "upcast_attention"}
    assert all(public(again)[k] == v for k, v in as_lists(public(theirs)).items() if k not in without)


@pytest.mark.parametrize("name, config", AUTOENCODERS.values(), ids=AUTOENCODERS.keys())
def test_autoencoders_there_and_back(tmp_path, random_weights, name, config):
    theirs = random_weights(getattr(diffusers, name)(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    encode = lambda model, x: model._encode(x) if name == "AutoencoderKL" else model.encode(x).latents  # noqa: E731
    x = np.random.default_rng(0).uniform(-1, 1, (2, 12, 8, 3)).astype(np.float32)
    latents = encode(theirs, nchw(x))
    raw = np.random.default_rng(1).normal(size=(2, 3, 2, 4 if name == "AutoencoderKL" else 3)).astype(np.float32)
    pixels = theirs.decode(nchw(raw)).sample

    autoencoder, params, shift, scale = load_autoencoder(tmp_path / "theirs")
    assert_close(call(autoencoder, params, x, method="encode"), latents)
    assert_close(call(autoencoder, params, raw, method="decode"), pixels)
    assert (set(shift.tolist()), set(scale.tolist())) == (
        {np.float32(theirs.config.get("shift_factor") or 0)},
        {np.float32(theirs.config.scaling_factor)},
    )

    state = state_dict_from_params(params)
    write_component(tmp_path / "ours", config_from_autoencoder(autoencoder, shift, scale, 16), state)
    again = open_quietly(name, tmp_path / "ours")
    assert torch.equal(encode(again, nchw(x)), latents)
    assert torch.equal(again.decode(nchw(raw)).sample, pixels)
    assert public(again) == as_lists(public(theirs))


WAYS = {
    "sharded": ({"max_shard_size": "100KB"}, 3),
    "fp16": ({"variant": "fp16"}, 1),
    "fp16 sharded": ({"variant": "fp16", "max_shard_size": "50KB"}, 3),
    "pickled": ({"safe_serialization": False}, 1),
    "pickled in shards": ({"safe_serialization": False, "max_shard_size": "100KB"}, 3),
}


@pytest.mark.parametrize("how, files", WAYS.values(), ids=WAYS.keys())
def test_ways_to_save(tmp_path, random_weights, how, files):
    name, config = UNETS["SD1"]
    theirs = random_weights(diffusers.UNet2DConditionModel(**config))
    if "variant" in how:
        theirs = theirs.half()
    theirs.save_pretrained(tmp_path, **how)
    written = [p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin")]
    assert len(written) >= files and (files > 1) == any(".index." in p.name for p in tmp_path.iterdir())
    unet, params = load_unet(tmp_path, variant=how.get("variant"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    inputs = unet_inputs(name, config)
    assert_close(call(unet, params, **inputs), call_theirs(theirs.float(), inputs))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_defaults(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert defaults(name) == {field: p.default for field, p in parameters.items() if field != "self"}


def test_bfloat16_attention_is_as_exact_as_upcast_attention():
    """Large scores: what diffusers' flag is for. Here there is no flag, scores are always float32."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    from ldm_jax.models.attention import Attention as Ours

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(1, 64, 32)).astype(np.float32)).bfloat16()
    weights = {name: 3 * torch.from_numpy(rng.normal(size=(32, 32)) * 32**-0.5).bfloat16() for name in "qk"}
    errors = {}
    for upcast in (False, True):
        theirs = Attention(32, heads=2, dim_head=16, upcast_attention=upcast, processor=AttnProcessor())
        theirs = theirs.bfloat16().requires_grad_(False)
        theirs.to_q.weight.copy_(weights["q"])
        theirs.to_k.weight.copy_(weights["k"])
        theirs.to_v.weight.copy_(torch.eye(32))
        theirs.to_out[0].weight.copy_(torch.eye(32))
        theirs.to_out[0].bias.zero_()
        low = theirs(x).float()
        exact = theirs.double()(x.double()).float()
        errors[upcast] = (low - exact).abs().mean()
    params = {
        "to_q": {"kernel": weights["q"].float().numpy().T},
        "to_k": {"kernel": weights["k"].float().numpy().T},
        "to_v": {"kernel": np.eye(32, dtype=np.float32)},
        "to_out_0": {"kernel": np.eye(32, dtype=np.float32), "bias": np.zeros(32, np.float32)},
    }
    x = x.float().numpy().astype("bfloat16")
    ours = Ours(2, dtype="bfloat16").apply({"params": params}, x, x).astype(np.float32)
    error = np.abs(np.asarray(ours) - exact.numpy()).mean()
    print(f"mean error {error:.1e} here, {errors[True]:.1e} with the flag, {errors[False]:.1e} without")
    assert error <= 1.2 * errors[True]
