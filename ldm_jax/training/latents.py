"""Between the stages: the whole set is encoded once, its moments cached, and the latents' scale measured.

Cached are the moments (mean, logvar), not samples, so that every epoch draws fresh latents; of flipped sets both sides.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.format import open_memmap

from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import in_order
from ldm_jax.models.first_stage import LOGVAR_MAX, LOGVAR_MIN, FirstStage
from ldm_jax.models.pixels import to_pixels
from ldm_jax.runtime.files import atomic, content_hash
from ldm_jax.runtime.parallel import parallel_map, replicate


class Latents(NamedTuple):
    """The cache as a data set (see `feeds.Source`): memory maps, whose rows are read when they are asked for."""

    arrays: dict[str, np.ndarray]  # "moments" [N, F, h, w, 2c] float32, and "label" [N] int32 in labelled sets

    def __len__(self) -> int:
        return len(self.arrays["moments"])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: np.asarray(values[indices]) for name, values in self.arrays.items()}


def cached_latents(
    folder: Path,
    *,
    first_stage: FirstStage,
    params: Any,
    dataset: Dataset,
    flip: bool,
    batch_size: int,
    elsewhere: Path | None = None,
) -> Latents:
    """Encodes `dataset`, unless `folder`, or `elsewhere`, has the result for this encoder and this data already.

    The moments are [N, F, h, w, 2c], F = 2 with the flipped image's, else 1. Every host encodes all for itself.
    """
    key = content_hash(params, dataset.fingerprint, f"flip={flip}")
    names = ("moments", "label") if dataset.class_names else ("moments",)
    for place in (elsewhere, folder) if elsewhere else (folder,):
        paths = {name: place / f"{key}.{name}.npy" for name in names}
        if there := all(path.exists() for path in paths.values()):
            break
    if not there:
        encode = parallel_map(lambda params, batch: _encode_sides(first_stage, params, batch["x"], flip))
        params = replicate(params)
        with ExitStack() as stack:
            temporary = {name: stack.enter_context(atomic(path)) for name, path in paths.items()}
            arrays: dict[str, np.ndarray] = {}
            for batch in in_order(dataset, batch_size):
                rows = batch["id"][batch["valid"]]
                batch["moments"] = encode(params, {"x": batch["x"]})
                for name in names:
                    if name not in arrays:
                        shape = (len(dataset), *batch[name].shape[1:])
                        arrays[name] = open_memmap(temporary[name], mode="w+", dtype=batch[name].dtype, shape=shape)
                        _claim(temporary[name])
                    arrays[name][rows] = batch[name][batch["valid"]]
            for array in arrays.values():
                array.flush()
    return Latents({name: np.load(path, mmap_mode="r") for name, path in paths.items()})


def _claim(path: Path) -> None:
    """Takes a sparse file's space: on a full disk an OSError here, where writing to the memory map would be a crash."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _encode_sides(first_stage: FirstStage, params: Any, images: jax.Array, flip: bool) -> jax.Array:
    x = to_pixels(images)
    sides = [x, x[:, :, ::-1]] if flip else [x]
    return jnp.stack([first_stage.encode(params, side) for side in sides], axis=1)


def measure_scale(moments: np.ndarray, *, gaussian: bool, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), each [c] float32, that give raw latents zero mean and unit variance in every channel.

    raw = mean + exp(logvar / 2) noise has the variance Var[mean] + E[exp(logvar)] (`gaussian`); the latents of a VQ
    autoencoder have that of themselves. Rombach 2022, appendix G, has one scale for all channels of its first batch.
    """
    channels = moments.shape[-1] // 2 if gaussian else moments.shape[-1]
    count, total, square, spread = 0, 0.0, 0.0, 0.0
    for start in range(0, len(moments), chunk):
        some = np.asarray(moments[start : start + chunk], np.float64).reshape(-1, moments.shape[-1])
        mean = some[:, :channels]
        count += len(some)
        total += mean.sum(0)
        square += (mean**2).sum(0)
        if gaussian:
            spread += np.exp(np.clip(some[:, channels:], LOGVAR_MIN, LOGVAR_MAX)).sum(0)
    shift = total / count
    variance = square / count - shift**2 + spread / count
    return shift.astype(np.float32), (1.0 / np.sqrt(np.maximum(variance, 1e-12))).astype(np.float32)
