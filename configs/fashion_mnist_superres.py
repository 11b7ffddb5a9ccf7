"""Super-resolution on Fashion-MNIST: 7x7 pictures become 28x28 ones (Rombach 2022, section 4.4).

    python -m ldm_jax.train --config=configs/fashion_mnist_superres.py

The small picture lies beside the latents as one more channel of the UNet's input; no class is told. Trains an
autoencoder of its own, or takes the main job's by --config.autoencoder.checkpoint=runs/fashion_mnist. The 10,000 test
images then have LPIPS 0.121 and FD-VGG16 12.1, where bicubic interpolation has 0.383 and 147.2
(experiments/super_resolution).
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """28 -> 7 -> 28, beside the main job's autoencoder."""
    config = fashion_mnist.get_config().unlock()
    config.data.label_key = "none"
    config.concat.type = "low_resolution"
    config.concat.factor = 4
    config.sampling.guidance = 1.0
    return config.lock()
