"""Super-resolution on Fashion-MNIST: from 7x7 to 28x28 pixels (Rombach 2022, section 4.4).

    python -m ldm_jax.train --config=configs/fashion_mnist_superres.py

The low-resolution image is concatenated to the noisy latents, one more input channel of the UNet, without class
conditioning. Trains its own autoencoder, or reuses the main job's with
--config.autoencoder.checkpoint=runs/fashion_mnist. In experiments/super_resolution, by AdamW, the 10,000 test images
have LPIPS 0.121 and FD-VGG16 12.1, against 0.383 and 147.2 of bicubic interpolation.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job with concat conditioning on 7x7 images."""
    config = fashion_mnist.get_config().unlock()
    config.data.label_key = "none"
    config.concat.type = "low_resolution"
    config.concat.factor = 4
    config.sampling.guidance = 1.0
    config.sampling.guide_step = 0
    return config.lock()
