"""TPU slices by name, such as v5e:16x16: their chips, and devices to compile for on a machine that has none of them.

Programs are compiled by libtpu, which needs no TPU. The figures of the chips are those of Google's documentation
(https://docs.cloud.google.com/tpu/docs: the pages v4, v5e, v5p and v6e), that of v4's interconnect is from table 4 of
Jouppi 2023 (arXiv:2304.01433).
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ldm_jax.errors import InputError


class Chip(NamedTuple):
    """A TPU chip: its memory, and the peaks of arithmetic and of transfers."""

    memory: float  # bytes of HBM
    flops: float  # bfloat16 operations per second
    bandwidth: float  # bytes per second from and to HBM
    interconnect: float  # bytes per second to other chips, over all links in one direction
    axes: int  # of the torus


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1200e9, 300e9, 3),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 2),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 3),
    "v6e": Chip(32 * 2**30, 918e12, 1638e9, 400e9, 2),
}
EXAMPLES = {2: "4x4 or 16x16", 3: "2x2x1 or 4x4x8"}  # by the number of axes

# Options of libtpu: v4 has two cores a chip, which programs see as one device.
OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# libtpu reads them; without a TPU it otherwise searches the network for one.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # while another process computes on the TPUs, or compiles as well
}


class Topology(NamedTuple):
    """A TPU slice: its name, the chip, and its devices, which only compile."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """The chip's name and the shape of a slice: "v5e:4x4" -> ("v5e", (4, 4)); raises InputError if there is none."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        raise InputError(f"topology {name!r}: there is no chip {chip!r}; it must be one of {', '.join(CHIPS)}")
    axes = CHIPS[chip].axes
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise InputError(f"topology {name!r}: a slice of {chip} has {axes} axes, e.g. {chip}:{EXAMPLES[axes]}")
    return chip, tuple(map(int, shape.split("x")))


def load_topology(name: str) -> Topology:
    """The slice of this name.

    Raises InputError if there is no such slice, or libtpu is not installed.
    """
    chip, shape = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f'compiling for {name} needs libtpu, which runs without a TPU: pip install "jax[tpu]"')
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    bounds = tuple(min(2, length) for length in (*shape, 1)[:3]) if len(shape) == 2 else (2, 2, 1)
    try:
        options = {"chips_per_host_bounds": bounds} | OPTIONS.get(chip, {})
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except (RuntimeError, AttributeError) as error:  # AttributeError: a broken installation
        reason, example = str(error).splitlines()[0].rstrip("."), f"{chip}:{EXAMPLES[len(shape)]}"
        raise InputError(
            f"topology {name!r}: libtpu has no such slice ({reason}); it must be e.g. {example}"
        ) from error
    if len(devices) != math.prod(shape):
        raise InputError(f"topology {name!r}: libtpu has {len(devices)} devices for its {math.prod(shape)} chips")
    return Topology(name, CHIPS[chip], tuple(devices))
