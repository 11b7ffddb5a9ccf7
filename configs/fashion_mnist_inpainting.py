"""Inpainting on Fashion-MNIST: a model that is told which part of a picture is hidden, and the rest of it.

    python -m ldm_jax.train --config=configs/fashion_mnist_inpainting.py

The mask and the latents of the masked picture lie beside the noised latents, nine more channels of the UNet's input
(Rombach 2022, section 4.5); the class is told as well. Trains an autoencoder of its own, or takes the main job's by
--config.autoencoder.checkpoint=runs/fashion_mnist. Then
`sample --model=runs/fashion_mnist_inpainting --init_image=FILE --mask=FILE` fills the mask's white part.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """Boxes of any size hidden, beside the main job's autoencoder."""
    config = fashion_mnist.get_config().unlock()
    config.concat.type = "inpainting"
    return config.lock()
