"""Errors of reading a checkpoint that are not the checkpoint's: it may be whole, and must not be renamed as damaged."""

import errno

TYPES = (MemoryError, PermissionError, ConnectionError, TimeoutError, BlockingIOError, InterruptedError)
# Of the process, the machine or a network disk. EIO is none of them: a file that the disk cannot read is damaged.
NUMBERS = {
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOLCK, errno.ESTALE, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
# Status codes of TensorStore and JAX, which begin their messages; ABORTED is ESTALE's.
CODES = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
)


def is_no_damage(error: Exception) -> bool:
    """Whether an error of reading a checkpoint says nothing of its files."""
    of_system = isinstance(error, OSError) and error.errno in NUMBERS
    return of_system or isinstance(error, TYPES) or str(error).startswith(CODES)
