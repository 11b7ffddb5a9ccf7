"""The weights of FID's Inception network, from the files that torch-fidelity and pytorch-fid publish."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.weights import read_weights
from ldm_jax.models.inception import InceptionV3

BATCH_NORM_EPS = 1e-3


def load_inception(path: Path) -> tuple[dict[str, Any], str]:
    """Parameters for `InceptionV3`, batch normalisation folded into the convolutions; the SHA-256 of the file.

    Args:
        path: weights-inception-2015-12-05-6726825d.pth (torch-fidelity), pt_inception-2015-12-05-6726825d.pth
            (pytorch-fid), or the same tensors as .safetensors.

    Raises InputError: missing, damaged or foreign file.
    """
    path = Path(path)
    tensors = read_weights(path)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    expected = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]

    def fill(tree: Any, where: str) -> Any:
        if "kernel" in tree:
            return _fold(tensors, where, tree["kernel"].shape, path)
        return {name: fill(subtree, f"{where}.{name}".lstrip(".")) for name, subtree in tree.items()}

    return fill(expected, ""), hashlib.sha256(path.read_bytes()).hexdigest()


def _fold(tensors: dict[str, np.ndarray], where: str, shape: tuple[int, ...], path: Path) -> dict[str, np.ndarray]:
    """gamma (W h - mean) / sqrt(var + eps) + beta as one convolution with bias; OIHW -> HWIO."""
    names = [f"{where}.{name}" for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
    shapes = [(shape[3], shape[2], *shape[:2])] + [(shape[3],)] * 4
    for name, expected in zip(names, shapes):
        if name not in tensors:
            raise InputError(f"{path}: not FID's Inception weights: there is no {name}")
        if (got := tensors[name].shape) != expected:
            raise InputError(f"{path}: not FID's Inception weights: {name} is {got}, expected {expected}")
    kernel, gamma, beta, mean, variance = (tensors[name].astype(np.float64) for name in names)
    factor = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    folded = kernel.transpose(2, 3, 1, 0) * factor
    return {"kernel": folded.astype(np.float32), "bias": (beta - mean * factor).astype(np.float32)}
