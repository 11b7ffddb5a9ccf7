"""The platform that programs are compiled for: that of the devices, or of a topology without any (see `topology`)."""

import os
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


def device_memory() -> float:
    """The bytes of memory that a program may use on a local device; CPU devices share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
