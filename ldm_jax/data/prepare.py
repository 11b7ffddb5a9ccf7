"""Running a TensorFlow Datasets builder: once, whole or not at all, quietly, and without TensorFlow."""

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
    """Holds the lock of a data set's folder, so that of several processes one prepares it and the others wait.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}): choose another data_dir") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(builder: "tfds.core.DatasetBuilder") -> Path:
    """Prepares what `builder` describes, under `one_at_a_time`, and returns the folder.

    TFDS writes to a folder incomplete.* and renames it at the end: what has the right name is whole, and what a killed
    process left is removed here.

    Raises:
        InputError: from the builder, about its input.
        RunError: the disk is full, or whatever else TFDS has to say.
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"cannot prepare {builder.name} in {builder.data_path}: {reason}") from error
    return Path(builder.data_path)
