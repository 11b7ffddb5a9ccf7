"""Preparing a data set with a TFDS builder: once, atomically, quietly, and without TensorFlow."""

import contextlib
import fcntl
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_jax.errors import InputError, RunError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


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


def build(builder: "tfds.core.DatasetBuilder") -> Path:
    """Prepares a builder's data set, under `one_at_a_time`, and returns its folder.

    TFDS writes to a folder incomplete.* and renames it at the end: a folder with the final name is complete; what a
    killed process left is removed here.

    Raises:
        InputError: from the builder, about its input.
        RunError: the disk is full, or another error of TFDS.
    """
    import tensorflow_datasets as tfds

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
