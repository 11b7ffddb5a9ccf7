"""The cached latents of a data set, and the measurement of their shift and scale.

The cache has the moments (mean, logvar), not samples, so that each epoch samples new latents; with random flips also
those of the flipped images. What fits into config.data.memory_limit_gb is in .npy files, more in ArrayRecord shards.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.lib.format import open_memmap
from tqdm import tqdm

from ldm_jax.data.datasets import Dataset
from ldm_jax.data.feeds import Batch, Source, in_order, read_in_order
from ldm_jax.data.shards import INDEX, Shards, write_index
from ldm_jax.errors import InputError
from ldm_jax.models.first_stage import LOGVAR_MAX, LOGVAR_MIN, FirstStage
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.model import Params
from ldm_jax.run_folder.store import place_among_hosts
from ldm_jax.runtime.files import atomic, content_hash, named_errors
from ldm_jax.runtime.parallel import parallel_map, replicate, wait_for_hosts

MEASURED_AT_ONCE = 2**26  # numbers of the moments
EXAMPLES_PER_SHARD = 1024  # or a few more: a multiple of the batch size; 128 MB of Stable Diffusion's for 512 x 512

Features = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape of each example


class Latents(NamedTuple):
    """Cached latents as a data set (see `feeds.Source`), in memory-mapped files."""

    arrays: dict[str, np.ndarray]  # "moments" [N, F, h, w, 2c] float32, and "label" [N] int32 if there are classes

    def __len__(self) -> int:
        return len(self.arrays["moments"])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: np.asarray(values[indices]) for name, values in self.arrays.items()}


def cached_latents(
    config: ConfigDict, workdir: Path, first_stage: FirstStage, params: Params, dataset: Dataset, parts: int = 1
) -> Latents | Shards:
    """The latents of `dataset`, one of `parts` of a set, from the cache if it has them for this encoder and data.

    The cache is latents/ in `workdir` or, for a reused autoencoder, in its run folder. Else the images are encoded:
    into memory-mapped files by every host for itself or, above config.data.memory_limit_gb / `parts`, into shards, by
    each host its own. The moments are [N, F, h, w, 2c], F = 2 with those of the flipped images, else 1.
    """
    flip, params = config.data.flip, params["first_stage"]
    key = content_hash(params, dataset.fingerprint, f"flip={flip}")
    names = ("moments", "label") if dataset.class_names else ("moments",)
    other = config.autoencoder.checkpoint
    folders = [run / "latents" for run in ((Path(other), workdir) if other else (workdir,))]
    for folder in folders:
        paths = {name: folder / f"{key}.{name}.npy" for name in names}
        if cached := _read(paths, len(dataset)):
            return cached
    encode, batch_size = _encoder(first_stage, params, flip), config.evaluation.batch_size
    features = _features(first_stage, params, dataset, flip)
    if _size(features, len(dataset)) > config.data.memory_limit_gb * 2**30 / parts:
        if len(folders) > 1 and _are_complete(folders[0] / key):
            return Shards(folders[0] / key)
        return _sharded(folders[-1] / key, features, encode, dataset, batch_size, place_among_hosts(workdir))
    _write(map(encode, in_order(dataset, batch_size)), len(dataset), paths)
    return _read(paths, len(dataset))


def _features(first_stage: FirstStage, params: Any, dataset: Dataset, flip: bool) -> Features:
    """The arrays of the latents: the moments, and labels if there are classes."""
    x = jax.ShapeDtypeStruct((1, *dataset.shape[1:]), np.float32)
    moments = jax.eval_shape(first_stage.encode, params, x)
    features = {"moments": ("<f4", (1 + flip, *moments.shape[1:]))}
    return features | ({"label": ("<i4", ())} if dataset.class_names else {})


def _size(features: Features, num: int) -> int:
    """The bytes of `num` examples."""
    return num * sum(np.dtype((dtype, shape)).itemsize for dtype, shape in features.values())


def _encoder(first_stage: FirstStage, params: Any, flip: bool) -> Callable[[Batch], Batch]:
    """`encode(batch)`: the batch of images with their moments."""

    def moments(params: Any, batch: Batch) -> jax.Array:
        x = to_pixels(batch["x"])
        return jnp.stack([first_stage.encode(params, side) for side in ([x, x[:, :, ::-1]] if flip else [x])], axis=1)

    mapped, params = parallel_map(moments), replicate(params)
    return lambda batch: batch | {"moments": mapped(params, {"x": batch["x"]})}


def _sharded(
    folder: Path,
    features: Features,
    encode: Callable[[Batch], Batch],
    dataset: Dataset,
    batch_size: int,
    place: tuple[int, int],
) -> Shards:
    """The latents in the shards of `folder`, named as their content hash; each host encodes its own missing ones.

    `place` is this host's (index, number) among those that share the folder (see `store.place_among_hosts`). A shard
    begins where a batch of `in_order` does, so that the moments are those of the .npy files to the last bit, unless
    `batch_size` has changed since the index was written.
    """
    index, hosts = place
    if index == 0 and not _has_index(folder):
        per_shard = -(-EXAMPLES_PER_SHARD // batch_size) * batch_size
        write_index(folder, folder.name, len(dataset), per_shard, features)
    wait_for_hosts("index of the latents")  # is written
    shards = Shards(folder)
    own = range(index, len(shards.paths), hosts)
    missing = [number for number in own if not shards.is_complete(number)]
    if missing:
        print(f"     latents: {_size(features, len(dataset)) / 2**30:.3g} GB in {len(shards.paths)} shards, "
              f"{len(missing)} to be encoded here", flush=True)  # fmt: skip
    for number in tqdm(missing, desc="Encoding shards", leave=False, disable=None):
        shards.write(number, map(encode, read_in_order(dataset, batch_size, shards.rows[number])))
    wait_for_hosts("latents")  # of all hosts are written
    return shards


def _are_complete(folder: Path) -> bool:
    """Whether a folder has shards, and none is missing or damaged."""
    if not _has_index(folder):
        return False
    shards = Shards(folder)
    return all(shards.is_complete(number) for number in range(len(shards.paths)))


def _has_index(folder: Path) -> bool:
    try:
        return bool(Shards(folder))
    except InputError as error:
        if (folder / INDEX).exists():
            print(f"     cached latents have a damaged index ({error})", flush=True)
        return False


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


def _write(batches: Iterable[Batch], num: int, paths: dict[str, Path]) -> None:
    """Writes the moments of `num` examples, and the labels if `paths` has them."""
    arrays = {}
    with ExitStack() as stack:
        temporary = {name: stack.enter_context(atomic(path, jax.process_index())) for name, path in paths.items()}
        for batch in batches:
            rows = batch["id"][batch["valid"]]
            for name, path in temporary.items():
                if name not in arrays:
                    shape = (num, *batch[name].shape[1:])
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


def measure_scale(latents: Source, *, gaussian: bool) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), each [c] float32, which give raw latents zero mean and unit variance in each channel.

    With `gaussian` raw = mean + exp(logvar / 2) noise has the variance Var[mean] + E[exp(logvar)]; the moments of a VQ
    autoencoder are the latents. Rombach 2022, appendix G, has one scale for all channels, from the first batch.
    """
    shape = latents[[0]]["moments"].shape
    chunk = int(np.clip(MEASURED_AT_ONCE // np.prod(shape), 1, 4096))
    channels = shape[-1] // 2 if gaussian else shape[-1]
    count, total, square, noise = 0, 0.0, 0.0, 0.0
    for start in range(0, len(latents), chunk):
        moments = latents[range(start, min(start + chunk, len(latents)))]["moments"]
        rows = moments.astype(np.float64).reshape(-1, shape[-1])
        mean = rows[:, :channels]
        count += len(rows)
        total += mean.sum(0)
        square += (mean**2).sum(0)
        if gaussian:
            noise += np.exp(np.clip(rows[:, channels:], LOGVAR_MIN, LOGVAR_MAX)).sum(0)
    shift = total / count
    variance = square / count - shift**2 + noise / count
    return shift.astype(np.float32), (1.0 / np.sqrt(np.maximum(variance, 1e-12))).astype(np.float32)
