"""MeanFlow on Fashion-MNIST (Geng 2025): samples in one network call, trained from scratch; for one GPU.

    python -m ldm_jax.train --config=configs/fashion_mnist_meanflow.py
    python -m ldm_jax.sample --model=runs/fashion_mnist_meanflow --out=samples --steps=2

The main job with the average velocity of a rectified flow in place of v. The guidance scale is that of training; the
samples need none. More steps than one are possible, by `ddim`.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    """The main job with MeanFlow as its objective."""
    config = fashion_mnist.get_config().unlock()

    diffusion = config.diffusion
    diffusion.objective = "mean_flow"
    diffusion.schedule = "rectified_flow"
    diffusion.prediction = "flow"
    diffusion.weighting = "uniform"
    diffusion.timestep_sampling = "logit_normal"
    diffusion.timestep_mean = -0.4
    diffusion.steps = 20_000
    diffusion.batch_size = 256

    config.mean_flow.interval_ratio = 0.5
    config.mean_flow.guidance = 1.75
    config.mean_flow.tangent = "network"

    sampling = config.sampling
    sampling.sampler = "ddim"
    sampling.steps = 1
    sampling.guidance = 1.0
    sampling.guide_step = 0
    return config.lock()
