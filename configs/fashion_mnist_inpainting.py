"""Inpainting on Fashion-MNIST: a diffusion model conditioned on a mask and the masked image.

    python -m ldm_jax.train --config=configs/fashion_mnist_inpainting.py

The mask and the latents of the masked image are concatenated to the noisy latents, nine more input channels of the UNet
(Rombach 2022, section 4.5), which is class-conditional too. Trains its own autoencoder, or reuses the main job's with
--config.autoencoder.checkpoint=runs/fashion_mnist. Then
`sample --model=runs/fashion_mnist_inpainting --init_image=FILE --mask=FILE` inpaints the mask's white part.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job with concat conditioning on images with masked random boxes."""
    config = fashion_mnist.get_config().unlock()
    config.concat.type = "inpainting"
    config.sampling.guidance = 1.75
    config.sampling.guide_step = 0
    return config.lock()
