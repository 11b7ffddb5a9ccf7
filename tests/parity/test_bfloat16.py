"""How far --dtype=bfloat16 takes a single forward from float32: ours, and theirs of the same weights and inputs."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity.test_clip import make_theirs, token_ids

from ldm_jax.interop.clip_weights import text_encoder_from_config, text_params_from_state_dict
from ldm_jax.interop.folder import component_config, load_autoencoder, load_unet
from ldm_jax.interop.weights import read_state_dict

TYPES = ("float32", "bfloat16")
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(2, 16, 16, 4)).astype(np.float32)
CONTEXT = RNG.normal(size=(2, 7, 32)).astype(np.float32)
T = np.array([20, 700])

UNET = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}


def unet():
    def ours(folder, dtype):
        module, params = load_unet(folder, dtype=dtype, params_dtype=dtype)
        return jax.jit(module.apply)({"params": params}, Z, T, CONTEXT)

    def theirs(model, dtype):
        out = model(nchw(Z).to(dtype), torch.from_numpy(T), torch.from_numpy(CONTEXT).to(dtype)).sample
        return out.float().numpy().transpose(0, 2, 3, 1)

    return diffusers.UNet2DConditionModel(**UNET), ours, theirs


def decoder():
    def ours(folder, dtype):
        module, params, _, _ = load_autoencoder(folder, dtype=dtype, params_dtype=dtype)
        return jax.jit(lambda p: module.apply({"params": p}, Z, method="decode"))(params)

    def theirs(model, dtype):
        return model.decode(nchw(Z).to(dtype)).sample.float().numpy().transpose(0, 2, 3, 1)

    return diffusers.AutoencoderKL(**VAE), ours, theirs


def clip(case):
    def ours(folder, dtype):
        module = text_encoder_from_config(component_config(folder.parent, folder.name)).clone(dtype=dtype)
        target = jax.eval_shape(module.init, jax.random.key(0), token_ids())["params"]
        params = text_params_from_state_dict(read_state_dict(folder, dtype=dtype), target)
        return jax.jit(module.apply)({"params": params}, token_ids()).last

    def theirs(model, dtype):
        return model(torch.from_numpy(token_ids()).long()).last_hidden_state.float().numpy()

    return make_theirs(case), ours, theirs


def nchw(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def drift(exact, half):
    """The largest difference, relative to the scale of what is exact; and the mean one."""
    off, scale = np.abs(np.asarray(half, np.float32) - exact), np.abs(exact).max()
    return off.max() / scale, off.mean() / scale


MODELS = {
    "UNet": unet,
    "decoder": decoder,
    "CLIP-L": lambda: clip("CLIP-L"),
    "OpenCLIP-bigG": lambda: clip("OpenCLIP-bigG"),
}


@pytest.mark.parametrize("name", MODELS)
def test_drift(name, random_weights, tmp_path):
    """At most half as much again as theirs, and hundredths of the scale; but not nothing, which would be float32."""
    model, ours, theirs = MODELS[name]()
    random_weights(model).save_pretrained(tmp_path / "model")
    a, b = (ours(tmp_path / "model", np.dtype(dtype)) for dtype in map(jax.numpy.dtype, TYPES))
    exact, half = (theirs(model.to(getattr(torch, dtype)), getattr(torch, dtype)) for dtype in TYPES)
    (largest, mean), (their_largest, their_mean) = drift(np.asarray(a), b), drift(exact, half)
    print(f"{name}: ours {largest:.1e} (mean {mean:.1e}), theirs {their_largest:.1e} (mean {their_mean:.1e})")
    assert drift(exact, a)[0] <= 1e-4
    assert 1e-4 < mean <= 1.5 * their_mean
    assert largest <= min(0.05, 1.5 * their_largest)
