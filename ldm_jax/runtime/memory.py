"""The memory of the devices of this machine."""

import os

import jax


def device_memory() -> float:
    """The bytes of memory that a program may use on a local device; CPU devices share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
