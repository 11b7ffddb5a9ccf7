"""The main job with a diffusion transformer (DiT) for a denoiser, for a CPU with two cores.

    python -m ldm_jax.train --config=configs/fashion_mnist_dit.py

28x28 grayscale images -> 7x7x8 latents -> a DiT of 1.9 million parameters and 49 tokens. A training step by AdamW of a
batch has 24.4 Gflop by XLA's count, that of the main job's UNet 15.5. It has not been trained to the end yet, and its
learning rate comes from 300 steps.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job with the default DiT."""
    config = fashion_mnist.get_config().unlock()
    config.denoiser = "dit"
    config.diffusion.learning_rate = 4e-3
    return config.lock()
