"""XLA's YNN fusions are off wherever the package computes: jaxlib 0.10.2 computes wrong numbers with them."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.runtime import xla

ROWS = 32_769


def test_the_product_of_many_rows_is_right():
    """The reproducer of jax#39103, in this process."""
    x = jnp.arange(ROWS, dtype=jnp.float32)[:, None] * jnp.array([1.0, 0.0, 0.0])
    matrix = jnp.eye(3)
    squares = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x))(x)
    assert squares[-1] == (ROWS - 1) ** 2


def warned(monkeypatch, flags, *, version="0.10.2", started=False):
    """The warnings of `turn_off_ynn`, and the flags that it leaves."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(xla, "version", lambda name: version)
    monkeypatch.setattr(xla, "_cpu_is_started", lambda: started)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        xla.turn_off_ynn()
    return [str(each.message) for each in caught], os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("version", ["0.10.2", "0.11.2", "0.12.0"])
def test_the_flag_is_added_once(version, monkeypatch):
    assert warned(monkeypatch, "", version=version) == ([], xla.YNN)
    assert warned(monkeypatch, "--other=1", version=version) == ([], f"--other=1 {xla.YNN}")
    assert warned(monkeypatch, xla.YNN, version=version) == ([], xla.YNN)


def test_an_unknown_version_of_xla_is_given_no_flag(monkeypatch):
    """It would end the process."""
    assert warned(monkeypatch, "", version="0.99.0") == ([], "")


@pytest.mark.parametrize(("version", "warns"), [("0.10.2", True), ("0.11.2", False), ("0.12.0", False)])
def test_a_warning_where_it_is_too_late(version, warns, monkeypatch):
    for flags, started, words in (
        ("", True, "JAX was started before ldm_jax was imported, and jaxlib 0.10.2 computes wrong numbers"),
        (f"{xla.YNN}LIBRARY_FUSION_TYPE_DOT", False, f"XLA_FLAGS has {xla.YNN}LIBRARY_FUSION_TYPE_DOT, and"),
    ):
        caught, _ = warned(monkeypatch, flags, version=version, started=started)
        assert len(caught) == warns and all(words in message for message in caught)


def test_importing_the_package_is_enough():
    """In a process of its own, that imports JAX before, and starts it after."""
    code = "import os, sys, jax; import ldm_jax; print(os.environ['XLA_FLAGS']); assert 'orbax' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (xla.YNN in done.stdout) == xla.knows_cpu_flags()
