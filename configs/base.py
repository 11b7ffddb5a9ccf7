"""The default config, for config files of earlier versions that import it from here."""

from ldm_jax.config.defaults import get_config as get_config
