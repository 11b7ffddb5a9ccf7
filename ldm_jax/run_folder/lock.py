"""The lock of a run folder: one process trains a run at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.run_folder import store
from ldm_jax.run_folder.layout import LOCK


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a run folder; the system releases that of a process that was killed.

    Raises InputError, which names the holder, if another process has it. In an object store the last process that
    comes has it, and the one before ends (see `store.claim`).
    """
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"--workdir={workdir} is in use by {holder}; wait for it, or choose another --workdir"
            ) from None
        file.truncate(0)
        this = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
        file.write(f"{this}\n")
        file.flush()
        store.claim(workdir, this)
        yield
