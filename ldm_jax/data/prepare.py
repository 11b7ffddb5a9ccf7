"""Preparing a data set with a TFDS builder: once, atomically, quietly, and without TensorFlow."""

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from ldm_jax.errors import InputError, RunError

# Above 1 GB TFDS sorts the examples in temporary files, by TensorFlow's file functions, which are Python's here. All
# files are open at once: fewer than usual limits allow. Their number does not change the order.
_GFILE = SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
shuffle.tf = SimpleNamespace(io=SimpleNamespace(gfile=_GFILE), errors=SimpleNamespace(ResourceExhaustedError=()))
shuffle.BUCKETS_NUMBER = 200


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of ArrayRecord files.

    Args:
        name, version, data_dir: the data set is prepared in `data_dir`/name/version.
        features: feature name -> TFDS feature.
        splits: split -> its examples as (key, {feature name: value}), in the order of their keys' hashes if `shuffle`.
    """

    code_path = None  # TFDS's search for further files needs a package that it does not declare

    def __init__(
        self,
        name: str,
        version: str,
        data_dir: Path,
        features: Mapping[str, Any],
        splits: Mapping[str, Iterable[tuple[str | int, dict[str, Any]]]],
        *,
        shuffle: bool = True,
    ) -> None:
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._features, self._splits, self._shuffle = features, splits, shuffle
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=not self._shuffle)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(examples) for split, examples in self._splits.items()}

    def _generate_examples(self, examples):
        return examples


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Locks the folder of a data set: one process prepares it, the others wait; RunError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}): choose another data_dir") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(builder: tfds.core.DatasetBuilder) -> Path:
    """Prepares a builder's data set, under `one_at_a_time`, and returns its folder.

    TFDS writes to a folder incomplete.*, which it renames at the end; those of killed processes are removed here.
    Raises the builder's InputErrors, and RunError if the disk is full or for another error of TFDS.
    """
    for leftover in builder.data_path.parent.glob("incomplete.*"):
        shutil.rmtree(leftover)
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config, download_dir=f"{builder.data_dir_root}/downloads")
    except InputError:
        raise
    except Exception as error:  # the record writer has errors of its own for a full disk
        raise RunError(f"cannot prepare {builder.name} in {builder.data_path}: {_first_line(error)}") from error
    return Path(builder.data_path)


@contextlib.contextmanager
def in_one_line(message: str) -> Iterator[None]:
    """Turns any error of the block, as damaged files raise nearly all, into InputError(f"{message}: {first line}")."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{message}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
