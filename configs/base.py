"""The defaults, under the name that config files of earlier versions import them by."""

from ldm_jax.config.defaults import get_config as get_config
