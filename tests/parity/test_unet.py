"""Our UNet against diffusers' UNet2DConditionModel with the same weights."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.models.unet import UNet

QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time

BASE = {
    "in_channels": 4,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_heads": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
}

# What differs from BASE, height and width, tokens of context.
CASES = {
    "8x8": ({}, (8, 8), 5),
    "7x7": ({}, (7, 7), 5),
    "one token": ({}, (8, 8), 1),
    "linear projections": ({"use_linear_projection": True}, (8, 8), 5),
    "Stable Diffusion 1": (
        {
            "block_out_channels": (8, 16, 24, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "layers_per_block": 2,
            "attention_heads": 8,
        },
        (16, 24),
        7,
    ),
    "SDXL without its added embedding": (
        {
            "block_out_channels": (8, 16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_heads": (1, 2, 4),
            "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True,
        },
        (8, 8),
        7,
    ),
    "x4 upscaler": (
        {
            "block_out_channels": (8, 16, 16, 32),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
            "only_cross_attention": (True, True, True, False),
            "use_linear_projection": True,
            "num_class_embeds": 10,
        },
        (13, 9),
        5,
    ),
    "only cross attention everywhere": ({"only_cross_attention": True}, (6, 6), 3),
    "7x5 over three levels": (
        {
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (7, 5),
        5,
    ),
    "plain middle": ({"mid_block_type": "UNetMidBlock2D"}, (8, 8), 5),
    "no middle": ({"mid_block_type": None}, (8, 8), 5),
    "no attention": (
        {
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "mid_block_type": "UNetMidBlock2D",
        },
        (8, 8),
        None,
    ),
    "sines first, other frequencies": ({"flip_sin_to_cos": False, "freq_shift": 1}, (4, 4), 5),
}


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def both(case, size, tokens, transplant):
    """diffusers' model, ours, our parameters, and the arguments both take (images NHWC)."""
    config = BASE | case
    rng = np.random.default_rng(0)
    z_t = rng.normal(size=(2, *size, 4)).astype(np.float32)
    t = np.array([3, 871], np.int32)
    context = None if tokens is None else rng.normal(size=(2, tokens, 12)).astype(np.float32)
    labels = np.array([0, 9], np.int32) if "num_class_embeds" in config else None

    ours = UNet(**config)
    theirs = diffusers.UNet2DConditionModel(attention_head_dim=config.pop("attention_heads"), **config)
    params = transplant(theirs, ours, z_t, t, context, class_labels=labels)
    return theirs, ours, params, (z_t, t, context, labels)


def call_theirs(model, z_t, t, context, labels):
    as_tensor = lambda a: None if a is None else torch.from_numpy(a)  # noqa: E731
    out = model(nchw(z_t), torch.from_numpy(t), as_tensor(context), class_labels=as_tensor(labels)).sample
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_unet(case, transplant):
    theirs, ours, params, (z_t, t, context, labels) = both(*case, transplant)
    expected = call_theirs(theirs, z_t, t, context, labels).numpy()
    output = jax.jit(ours.apply)({"params": params}, z_t, t, context, class_labels=labels)

    assert output.shape == expected.shape
    error = np.abs(np.asarray(output) - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error <= 1e-4

    back = state_dict_from_params(params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(np.array_equal(back[k], v.numpy()) for k, v in theirs.state_dict().items())


def test_unet_gradient(transplant):
    """The backward pass agrees too, for every parameter."""
    theirs, ours, params, (z_t, t, context, labels) = both({}, (7, 7), 5, transplant)
    loss = lambda p: (ours.apply({"params": p}, z_t, t, context) ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    theirs.requires_grad_(True)
    (call_theirs(theirs, z_t, t, context, labels) ** 2).mean().backward()
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, grad in state_dict_from_params(grads).items():
        assert np.abs(grad - their_grads[name]).max() <= 1e-3 * np.abs(their_grads[name]).max(), name
