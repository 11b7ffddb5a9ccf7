"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/).

0x0000, 0x08 (unsigned byte), the number of axes n; n big-endian uint32 sizes; then the data, the last axis fastest.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ldm_jax.errors import InputError

UNSIGNED_BYTE = b"\0\0\x08"


def gunzip(path: Path) -> bytes:
    """The content of a .gz file; InputError if it is missing, truncated, damaged or not a gzip file."""
    try:
        with gzip.open(path) as file:
            return file.read()
    except EOFError:
        raise InputError(f"{path}: truncated gzip file of {path.stat().st_size} bytes; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not an intact gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_idx(content: bytes, *, axes: int, where: Path) -> np.ndarray:
    """The array, uint8 [N, ...] with `axes` axes, of the unzipped content of an IDX file, which errors call `where`.

    Raises InputError for another magic number, or more or fewer bytes than the header's sizes require.
    """
    magic = UNSIGNED_BYTE + bytes([axes])
    if content[:4] != magic:
        raise InputError(f"{where}: not an IDX file of {axes} axes: it begins {content[:4].hex()}, not {magic.hex()}")
    start = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4"))
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise InputError(f"{where}: {len(content)} bytes of content where shape {list(shape)} requires {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
