"""Previews of images while they are sampled, from the clean latents that the denoiser predicts."""

from collections.abc import Callable

import numpy as np

from ldm_jax.pipeline.model import LatentDiffusion

SMALL = 64  # side in pixels up to which previews are decoded by the model itself
FIT = 8  # images that the linear map is fitted to
PATCH = 4  # side, in latents, of the patches that these are made of


def preview_decoder(
    model: LatentDiffusion, decode: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """A cheap decoder of latents [b, h, w, c], to images uint8 [b, H, W, C] or [b, h, w, C].

    `decode` is the model's own, z [b, h, w, c] -> uint8 [b, H, W, C]. It decodes small images, and those of diffusion
    on pixels; of others the preview is a linear map of each latent to a pixel, an image of the latents' size.
    """
    if model.first_stage.module is None or max(model.image_shape[:2]) <= SMALL:
        return decode
    weights = fit_linear(decode, model.latent_shape)
    return lambda z: linear_decode(weights, z)


def fit_linear(decode: Callable[[np.ndarray], np.ndarray], latent_shape: tuple[int, int, int]) -> np.ndarray:
    """The affine map of latents to pixels, [c + 1, C], that is nearest to a decoder in the least-squares sense.

    It is fitted to decoded patches of Gaussian latents, constant within a patch, as a model's scaled latents have unit
    variance: no images are needed. The last row is the offset.
    """
    h, w, c = latent_shape
    patches = np.random.default_rng(0).normal(size=(FIT, -(-h // PATCH), -(-w // PATCH), c)).astype(np.float32)
    z = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)[:, :h, :w]
    images = np.concatenate([decode(each[None]) for each in z]).astype(np.float32)
    factor, channels = images.shape[1] // h, images.shape[-1]
    pixels = images.reshape(FIT, h, factor, w, factor, channels).mean(axis=(2, 4)).reshape(-1, channels)
    return np.linalg.lstsq(_with_one(z).reshape(-1, c + 1), pixels, rcond=None)[0]


def linear_decode(weights: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Pixels uint8 [b, h, w, C] of latents [b, h, w, c] by weights [c + 1, C]."""
    pixels = _with_one(np.nan_to_num(z)) @ weights
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _with_one(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z, np.ones_like(z[..., :1])], axis=-1)
