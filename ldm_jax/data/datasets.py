"""A split of a data set, by name, at one image size: in memory if it fits, else read from the disk."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_jax.data.buckets import bucket_sizes, nearest
from ldm_jax.data.catalog import find

if TYPE_CHECKING:
    from ldm_jax.data.records import Records


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split of a data set: `dataset[[3, 5]]` is {"x": uint8 [2, H, W, C], ...}, the examples of `Records`."""

    name: str
    split: str
    shape: tuple[int, int, int, int]  # N, H, W, C
    class_names: tuple[str, ...]  # empty without labels; with captions, the first caption of each class
    captions: tuple[tuple[str, ...], ...]  # of each class; empty without captions
    present: tuple[int, ...]  # the classes of captions that this split has
    fingerprint: str  # equal for equal examples in equal order
    arrays: dict[str, np.ndarray] | None  # "x" uint8 [N, H, W, C], "label" int32 [N], ...; None: on the disk
    records: "Records | None"  # None: in memory
    groups: np.ndarray | None = None  # int64 [N], the group of each example; None without groups

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked."""
        if self.arrays is None:
            return self.records[indices]
        indices = np.asarray(indices)
        return {name: values[indices] for name, values in self.arrays.items()}

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return len(self.class_names)


def load_dataset(name: str, split: str, *, memory_limit: int = 2**31, **options: Any) -> Dataset:
    """A split of one of `catalog.BUILDERS`, prepared here at the first call, or of a prepared TFDS data set.

    Args:
        name: see `catalog.find`.
        split: "train", "test", "train[:1000]", ... as in TFDS.
        memory_limit: bytes of pixels above which the examples stay on the disk.
        options: `data_dir`, the folder of prepared data sets; `manual_dir`, the folder of source files of the
            data sets prepared here (default: where they are installed or downloaded); and those of `Records`.

    Raises:
        InputError: the data set, the split or a feature does not exist or is damaged; one line says what and where.
        RunError: preparing the data failed (a full disk).
    """
    return _dataset(_open(name, split, **options), name, split, memory_limit)


def load_buckets(
    name: str, split: str, *, step: int, image_size: int, memory_limit: int = 2**31, **options: Any
) -> list[Dataset]:
    """A split in aspect ratio buckets of `bucket_sizes`, without the empty ones.

    Labels mean the same in all buckets as in `load_dataset`, which documents the other arguments and the errors.
    """
    records = _open(name, split, image_size=image_size, **options)
    sizes = bucket_sizes(image_size, step)
    bucket_of = nearest(sizes, records.shapes())
    rows_of = {size: np.flatnonzero(bucket_of == number) for number, size in enumerate(sizes)}
    buckets = [records.bucket(size, rows) for size, rows in rows_of.items() if len(rows)]
    return [_dataset(bucket, name, split, memory_limit // len(buckets)) for bucket in buckets]


def _open(
    name: str, split: str, *, data_dir: str | Path, manual_dir: str | Path | None = None, **options: Any
) -> "Records":
    from ldm_jax.data.records import Records  # imports TensorFlow Datasets

    folder = find(name, Path(data_dir).expanduser(), Path(manual_dir).expanduser() if manual_dir else None)
    return Records(folder, split, **options)


def _dataset(records: "Records", name: str, split: str, memory_limit: int) -> Dataset:
    fields = {name: getattr(records, name) for name in ("shape", "class_names", "captions", "present", "groups")}
    if math.prod(records.shape) > memory_limit:
        return Dataset(name, split, **fields, fingerprint=records.fingerprint, arrays=None, records=records)
    arrays = records.load()
    return Dataset(name, split, **fields, fingerprint=sha256_of_arrays(arrays), arrays=arrays, records=None)


def sha256_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of arrays: of their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()
