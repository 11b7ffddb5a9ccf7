"""Latent diffusion in JAX: pure functions for the mathematics, Flax modules for the networks, one loop for training.

    model, params = ldm_jax.load("runs/fashion_mnist")
    images = ldm_jax.sample(model, params, labels=[3, 7], seed=0)
    ldm_jax.train(config, "runs/mine")

`sample` and `train` are the commands' modules, which can be called. Everything else is imported from its own module,
e.g. `from ldm_jax.diffusion.schedules import make_process`.
"""

from importlib import import_module
from typing import Any

from ldm_jax.runtime.xla import turn_off_ynn

turn_off_ynn()  # before JAX computes anything

_COMMANDS = ("train", "sample", "evaluate", "convert")


def __getattr__(name: str) -> Any:
    """Imports lazily: JAX takes seconds."""
    if name == "load":
        return import_module("ldm_jax.pipeline.load").load
    if name in _COMMANDS:
        return import_module(f"ldm_jax.{name}")
    raise AttributeError(f"module 'ldm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load", *_COMMANDS]
