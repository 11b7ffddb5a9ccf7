"""A split of a data set, by name, in the size and colours asked for: in memory if it fits, else on the disk."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.data.buckets import bucket_sizes, nearest
from ldm_jax.data.catalog import find
from ldm_jax.data.records import Records


@dataclass(frozen=True, eq=False)
class Dataset:
    """`dataset[[3, 5]]` is {"x": uint8 [2, H, W, C], ...} as `Records` has it, wherever the examples are."""

    name: str
    split: str
    shape: tuple[int, int, int, int]  # N, H, W, C
    class_names: tuple[str, ...]  # empty: without labels; or the captions, each of which is a class of its own
    captions: tuple[tuple[str, ...], ...]  # what can be said of a picture of each class; empty: without texts
    present: tuple[int, ...]  # of these, what this split has
    fingerprint: str  # equal means equal examples in equal order
    arrays: dict[str, np.ndarray] | None  # "x" uint8 [N, H, W, C], "label" int32 [N] if labelled ...; None: on the disk
    records: Records | None  # None: in memory
    groups: np.ndarray | None = None  # int64 [N], the group of each example; None: without groups

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
        """How many classes the labels tell apart; 0 without labels."""
        return len(self.class_names)


def load_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | Path,
    manual_dir: str | Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    crop: str = "center",
    image_key: str = "auto",
    label_key: str = "auto",
    segments_key: str = "none",
    caption_key: str = "none",
    group_key: str = "none",
    memory_limit: int = 2**31,
) -> Dataset:
    """A split of "fashion_mnist", "emoji" or "folder", prepared here if not there, or of any prepared TFDS data set.

    Args:
        name: see `catalog.find`.
        split: "train", "test", "train[:1000]", ... as in TFDS.
        data_dir: the folder of prepared data sets.
        manual_dir: where the source files of one of our own builders lie, if not where it looks for them.
        image_size: height and width; None keeps the data set's.
        channels: 1 or 3; None keeps the data set's.
        crop: "center" (the largest square) or "none" (all of it), then resized; see `images.fit`.
        image_key: the feature with the picture; "auto" finds it.
        label_key: the feature with the class; "auto" finds it, "none" goes without.
        segments_key: the feature with a map of classes, an image whose pixels are their numbers; "none" goes without.
        caption_key: the feature with a text or several, which then are the class; "auto" finds it, "none" goes without.
        group_key: the feature, a text or a number, that tells the groups of pictures apart; "none" goes without.
        memory_limit: bytes of pixels above which the examples stay on the disk.

    Raises:
        InputError: what was asked for isn't there, or is damaged; one line says what and where.
        RunError: preparing the data failed on the way (a full disk).
    """
    options = {"image_size": image_size, "channels": channels, "crop": crop, "image_key": image_key}
    options |= {"label_key": label_key, "segments_key": segments_key}
    options |= {"caption_key": caption_key, "group_key": group_key}
    return _held(_open(name, split, data_dir, manual_dir, options), name, split, memory_limit)


def load_buckets(
    name: str,
    split: str,
    *,
    step: int,
    image_size: int,
    data_dir: str | Path,
    manual_dir: str | Path | None = None,
    memory_limit: int = 2**31,
    **options: Any,
) -> list[Dataset]:
    """The same in the shapes near the pictures' own: see `buckets.bucket_sizes`. Each has at least one picture.

    Labels mean the same in all of them, and as in `load_dataset`. For the rest, and errors, see there.
    """
    records = _open(name, split, data_dir, manual_dir, options | {"image_size": image_size})
    sizes = bucket_sizes(image_size, step)
    bucket_of = nearest(sizes, records.shapes())
    rows_of = {size: np.flatnonzero(bucket_of == number) for number, size in enumerate(sizes)}
    buckets = [records.bucket(size, rows) for size, rows in rows_of.items() if len(rows)]
    return [_held(bucket, name, split, memory_limit // len(buckets)) for bucket in buckets]


def _open(
    name: str, split: str, data_dir: str | Path, manual_dir: str | Path | None, options: dict[str, Any]
) -> Records:
    folder = find(name, Path(data_dir).expanduser(), Path(manual_dir).expanduser() if manual_dir else None)
    return Records(folder, split, **options)


def _held(records: Records, name: str, split: str, memory_limit: int) -> Dataset:
    common = {"name": name, "split": split, "shape": records.shape}
    common |= {"class_names": records.class_names, "captions": records.captions, "present": records.present}
    common |= {"groups": records.groups}
    if math.prod(records.shape) > memory_limit:
        return Dataset(**common, fingerprint=records.fingerprint, arrays=None, records=records)
    arrays = records.load()
    return Dataset(**common, fingerprint=content_hash(arrays), arrays=arrays, records=None)


def content_hash(arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of arrays: of their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()
