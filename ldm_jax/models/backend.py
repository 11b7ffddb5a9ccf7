"""The platform that programs are traced for: that of the devices, or of a TPU slice that is only compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def target_platform() -> str:
    """The platform of the program that is traced: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


@contextmanager
def compiling_for(platform: str | None) -> Iterator[None]:
    """Programs that are traced in the block are for this platform; None: for that of the devices."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
