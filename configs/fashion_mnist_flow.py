"""Rectified flow on Fashion-MNIST (Liu 2022), with logit-normal timesteps (Esser 2024).

    python -m ldm_jax.train --config=configs/fashion_mnist_flow.py

The main job with z_t = (1 - s) z0 + s eps and the target eps - z0, sampled by Euler's method. It trains an autoencoder,
or reuses that of the main job with --config.autoencoder.checkpoint=runs/fashion_mnist. It has not been trained to the
end yet.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job on rectified flow."""
    config = fashion_mnist.get_config().unlock()
    config.diffusion.schedule = "rectified_flow"
    config.diffusion.prediction = "flow"
    config.diffusion.weighting = "uniform"
    config.diffusion.timestep_sampling = "logit_normal"
    config.sampling.sampler = "euler"
    config.sampling.steps = 50
    return config.lock()
