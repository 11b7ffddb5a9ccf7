"""Our autoencoders against diffusers' with the same weights."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.first_stage import FirstStage

X = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)


def call(module, params, method, *args):
    return jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))(params, *args)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def assert_equal_nchw(ours, theirs):
    """Within 1e-4 of the output's scale."""
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error <= 1e-4


def widths_and_types(widths):
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


KL_CASES = {
    "f4": {"block_out_channels": (16, 32, 32), "layers_per_block": 2},
    "no attention": {"block_out_channels": (16, 32), "mid_block_add_attention": False},
    "no quant convs": {"block_out_channels": (16,), "use_quant_conv": False, "use_post_quant_conv": False},
}


@pytest.mark.parametrize("case", KL_CASES.values(), ids=KL_CASES.keys())
def test_autoencoder_kl(case, transplant):
    shared = {"latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1} | case
    theirs = diffusers.AutoencoderKL(**shared | widths_and_types(case["block_out_channels"]))
    ours = AutoencoderKL(**shared)
    params = transplant(theirs, ours, X)

    moments = call(ours, params, "encode", X)
    their_moments = theirs._encode(nchw(X))
    assert_equal_nchw(moments, their_moments)

    raw = np.random.default_rng(1).normal(size=(*moments.shape[:3], 4)).astype(np.float32)
    assert_equal_nchw(call(ours, params, "decode", raw), theirs.decode(nchw(raw)).sample)

    back = state_dict_from_params(params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(np.array_equal(back[k], v.numpy()) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("height, width", [(40, 28), (16, 30), (22, 16)])
def test_in_tiles(height, width, transplant):
    """Tiles of 16 pixels, the last ones smaller; an image no larger than one tile is not cut."""
    shared = {"latent_channels": 4, "norm_num_groups": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
    theirs = diffusers.AutoencoderKL(**shared | widths_and_types((16, 32)), sample_size=16)
    theirs.enable_tiling()
    ours = AutoencoderKL(**shared)
    first_stage, params = FirstStage(ours, 16, tiled=True), transplant(theirs, ours, X)
    x = np.random.default_rng(2).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    moments = jax.jit(first_stage.encode)(params, x)
    assert_equal_nchw(moments, theirs._encode(nchw(x)))
    raw = np.random.default_rng(1).normal(size=(*moments.shape[:3], 4)).astype(np.float32)
    decoded = jax.jit(first_stage.decode)(params, raw)
    assert_equal_nchw(decoded, theirs.decode(nchw(raw)).sample)
    whole = call(ours, params, "decode", raw)
    assert np.abs(whole - decoded).max() > 0.05 * np.abs(whole).max()


@pytest.mark.parametrize("vq_embed_dim", [None, 5])
def test_vq_model(vq_embed_dim, transplant):
    shared = {"latent_channels": 3, "norm_num_groups": 8, "num_vq_embeddings": 20, "vq_embed_dim": vq_embed_dim}
    theirs = diffusers.VQModel(**shared | widths_and_types((16, 32)))
    ours = VQModel(**shared, block_out_channels=(16, 32), layers_per_block=1)
    params = transplant(theirs, ours, X)

    raw = call(ours, params, "encode", X)
    their_raw = theirs.encode(nchw(X)).latents
    assert_equal_nchw(raw, their_raw)

    q = call(ours, params, "quantize", raw)
    z_q, their_loss, (_, _, their_indices) = theirs.quantize(nchw(raw))
    assert np.array_equal(q.indices.reshape(-1), their_indices.numpy())
    assert_equal_nchw(q.z_q, z_q)
    np.testing.assert_allclose(q.commitment_loss + 0.25 * q.codebook_loss, their_loss.item(), rtol=1e-5)
    assert_equal_nchw(call(ours, params, "decode", raw), theirs.decode(nchw(raw)).sample)


def test_gradient_of_the_reconstruction_error(transplant):
    """The backward pass agrees too, for every parameter of encoder and decoder."""
    shared = {"latent_channels": 4, "norm_num_groups": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
    theirs = diffusers.AutoencoderKL(**shared | widths_and_types((16, 32)))
    ours = AutoencoderKL(**shared)
    params = transplant(theirs, ours, X)

    grads = jax.jit(jax.grad(lambda p: ((ours.apply({"params": p}, X) - X) ** 2).mean()))(params)
    theirs.double().requires_grad_(True)  # in float32 its gradient of the keys' bias is rounding of that size
    images = nchw(X).double()
    ((theirs.decode(theirs._encode(images)[:, :4]).sample - images) ** 2).mean().backward()
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, grad in state_dict_from_params(grads).items():
        scale = max(np.abs(their_grads[name]).max(), 1e-5)  # the keys' bias has gradient 0 but for rounding
        assert np.abs(grad - their_grads[name]).max() <= 1e-3 * scale, name
