"""Latent diffusion on Fashion-MNIST."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The main job: `make train`."""
    return base.get_config()
