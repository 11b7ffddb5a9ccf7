"""The software and the devices of a run, as each of its starts records them: no path, host name or user name."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ldm_jax")
PACKAGE = Path(__file__).parents[1]


def describe_device() -> str:
    """The number and the model of the devices, e.g. "4 x NVIDIA H100"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def software() -> dict[str, str | int]:
    """The commit of ldm_jax, versions of Python and packages, XLA's flags, devices and number of hosts, by name."""
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES}
    devices = {"devices": describe_device(), "hosts": jax.process_count()}
    return {"commit": commit(PACKAGE)} | versions | {"xla_flags": flags(os.environ.get("XLA_FLAGS", ""))} | devices


def package_version(name: str) -> str:
    """The version of an installed package, "" of one that runs from its source folder."""
    try:
        return version(name)
    except ModuleNotFoundError:
        return ""


def commit(folder: Path) -> str:
    """The git commit (12 digits) of a folder of Python files, with a + if they have changed; "" if git has it not."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--", "*.py"):  # as when it is installed in another project's environment
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return (git("rev-parse", "--short=12", "HEAD") or "") + ("+" if changed else "")


def flags(given: str) -> str:
    """XLA's flags, "..." in place of values that are paths."""
    pairs = (flag.partition("=") for flag in given.split())
    return " ".join(name + equals + ("..." if {"/", "\\"} & set(value) else value) for name, equals, value in pairs)
