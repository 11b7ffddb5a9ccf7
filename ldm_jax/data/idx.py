"""The IDX format of MNIST's relatives: zeros, a type code, the number of axes, their sizes, then the bytes.

Offset 0: 0x0000, 0x08 (unsigned byte), n; then n big-endian uint32 sizes; then the data, the last axis fastest.
Source: the format's description on the MNIST page, http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ldm_jax.errors import InputError

UNSIGNED_BYTE = b"\0\0\x08"


def gunzip(path: Path) -> bytes:
    """What a .gz file holds; raises InputError if it is missing, cut off, damaged or no gzip file at all."""
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
    """The uint8 array, with `axes` axes, in the unzipped content of an IDX file; `where` names it in errors.

    Raises:
        InputError: another magic number, or more or fewer bytes than the sizes in the header ask for.
    """
    magic = UNSIGNED_BYTE + bytes([axes])
    if content[:4] != magic:
        raise InputError(f"{where}: not an IDX file of {axes} axes: it begins {content[:4].hex()}, not {magic.hex()}")
    start = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4"))
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise InputError(f"{where}: {len(content)} bytes of content where shape {list(shape)} asks for {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
