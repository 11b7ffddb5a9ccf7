"""The cached latents of a data set, and the measurement of their shift and scale.

The cache has the moments (mean, logvar), not samples, so that each epoch samples new latents; with random flips also
those of the flipped images.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.lib.format import open_memmap

from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import in_order
from ldm_jax.models.first_stage import LOGVAR_MAX, LOGVAR_MIN, FirstStage
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.model import Params
from ldm_jax.runtime.files import atomic, content_hash, named_errors
from ldm_jax.runtime.parallel import parallel_map, replicate


class Latents(NamedTuple):
    """Cached latents as a data set (see `feeds.Source`), in memory-mapped files."""

    arrays: dict[str, np.ndarray]  # "moments" [N, F, h, w, 2c] float32, and "label" [N] int32 if there are classes

    def __len__(self) -> int:
        return len(self.arrays["moments"])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: np.asarray(values[indices]) for name, values in self.arrays.items()}


def cached_latents(
    config: ConfigDict, workdir: Path, first_stage: FirstStage, params: Params, dataset: Dataset
) -> Latents:
    """The latents of `dataset`, from the cache if it has them for this encoder and data.

    The cache is latents/ in `workdir` or, for a reused autoencoder, in its run folder. Else the images are encoded, by
    every host for itself. The moments are [N, F, h, w, 2c], F = 2 with those of the flipped images, else 1.
    """
    flip, params = config.data.flip, params["first_stage"]
    key = content_hash(params, dataset.fingerprint, f"flip={flip}")
    names = ("moments", "label") if dataset.class_names else ("moments",)
    other = config.autoencoder.checkpoint
    for run in (Path(other), workdir) if other else (workdir,):
        paths = {name: run / "latents" / f"{key}.{name}.npy" for name in names}
        if cached := _read(paths, len(dataset)):
            return cached
    _encode(first_stage, params, dataset, flip, config.evaluation.batch_size, paths)
    return _read(paths, len(dataset))


def _read(paths: dict[str, Path], num: int) -> Latents | None:
    """The latents in these files, or None if there are none, or damaged ones."""
    if not all(path.exists() for path in paths.values()):
        return None
    try:
        arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    except (ValueError, EOFError, OSError) as error:
        print(f"     cached latents are damaged and encoded anew ({error})", flush=True)
        return None
    return Latents(arrays) if all(len(array) == num for array in arrays.values()) else None


def _encode(
    first_stage: FirstStage, params: Any, dataset: Dataset, flip: bool, batch_size: int, paths: dict[str, Path]
) -> None:
    """Writes the moments, and the labels if `paths` has them."""

    def moments(params: Any, batch: dict) -> jax.Array:
        x = to_pixels(batch["x"])
        return jnp.stack([first_stage.encode(params, side) for side in ([x, x[:, :, ::-1]] if flip else [x])], axis=1)

    encode, params, arrays = parallel_map(moments), replicate(params), {}
    with ExitStack() as stack:
        temporary = {name: stack.enter_context(atomic(path)) for name, path in paths.items()}
        for batch in in_order(dataset, batch_size):
            rows = batch["id"][batch["valid"]]
            batch["moments"] = encode(params, {"x": batch["x"]})
            for name, path in temporary.items():
                if name not in arrays:
                    shape = (len(dataset), *batch[name].shape[1:])
                    with named_errors(paths[name]):
                        arrays[name] = open_memmap(path, mode="w+", dtype=batch[name].dtype, shape=shape)
                        _allocate(path)
                arrays[name][rows] = batch[name][batch["valid"]]
        for array in arrays.values():
            array.flush()


def _allocate(path: Path) -> None:
    """Allocates a sparse file: on a full disk this raises OSError, where writing to the memory map would crash."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def measure_scale(moments: np.ndarray, *, gaussian: bool, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), each [c] float32, which give raw latents zero mean and unit variance in each channel.

    With `gaussian` raw = mean + exp(logvar / 2) noise has the variance Var[mean] + E[exp(logvar)]; the moments of a VQ
    autoencoder are the latents. Rombach 2022, appendix G, has one scale for all channels, from the first batch.
    """
    channels = moments.shape[-1] // 2 if gaussian else moments.shape[-1]
    count, total, square, noise = 0, 0.0, 0.0, 0.0
    for start in range(0, len(moments), chunk):
        rows = np.asarray(moments[start : start + chunk], np.float64).reshape(-1, moments.shape[-1])
        mean = rows[:, :channels]
        count += len(rows)
        total += mean.sum(0)
        square += (mean**2).sum(0)
        if gaussian:
            noise += np.exp(np.clip(rows[:, channels:], LOGVAR_MIN, LOGVAR_MAX)).sum(0)
    shift = total / count
    variance = square / count - shift**2 + noise / count
    return shift.astype(np.float32), (1.0 / np.sqrt(np.maximum(variance, 1e-12))).astype(np.float32)
