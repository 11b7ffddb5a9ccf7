"""TPU slices by name: names that are none, libtpu that is not installed, and with it their devices."""

import importlib.util
import os
import subprocess
import sys

import pytest

from ldm_jax.errors import InputError
from ldm_jax.runtime.topology import CHIPS, load_topology, parse_topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, an optional extra")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v5e:16x16", ("v5e", (16, 16))), ("v4:2x2x1", ("v4", (2, 2, 1))), ("v6e:1x1", ("v6e", (1, 1)))],
)
def test_a_topology_is_a_chip_and_a_shape(name, expected):
    assert parse_topology(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "there is no chip 'v9'; it must be one of v4, v5e, v5p, v6e"),
        ("", "there is no chip ''"),
        ("4x4", "there is no chip '4x4'"),
        ("v5e", "a slice of v5e has 2 axes, e.g. v5e:4x4"),
        ("v5e:4x4x4", "a slice of v5e has 2 axes"),
        ("v4:4x4", "a slice of v4 has 3 axes, e.g. v4:2x2x1"),
        ("v5e:0x4", "a slice of v5e has 2 axes"),
        ("v5e:4xfour", "a slice of v5e has 2 axes"),
        ("v5e:4x4 ", "a slice of v5e has 2 axes"),
    ],
)
def test_what_is_no_topology_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        load_topology(name)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'compiling for v5e:4x4 needs libtpu.*: pip install "jax\[tpu\]"$'):
        load_topology("v5e:4x4")


@needs_libtpu
@pytest.mark.parametrize(("name", "devices"), [("v5e:1x1", 1), ("v5e:4x4", 16), ("v4:2x2x1", 4), ("v5p:2x2x2", 8),
                                               ("v6e:16x16", 256)])  # fmt: skip
def test_a_slice_has_a_device_for_each_chip(name, devices):
    topology = load_topology(name)
    assert len(topology.devices) == devices
    assert topology.chip == CHIPS[name.split(":")[0]]


@needs_libtpu
def test_a_shape_that_libtpu_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"libtpu has no such slice .* it must be e\.g\. v5e:4x4"):
        load_topology("v5e:3x5")


@needs_libtpu
def test_two_processes_compile_for_slices_at_a_time():
    """libtpu by default lets one process of a machine load it."""
    program = (
        "from ldm_jax.runtime.topology import load_topology; print(len(load_topology('v5e:4x4').devices), flush=True)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = [sys.executable, "-c", f"{program}; input()"]
    with subprocess.Popen(first, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "16\n"
        second = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        process.communicate("\n")
    assert second.stdout == "16\n"
