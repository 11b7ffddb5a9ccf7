import gzip
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.data.idx import gunzip, parse_idx
from ldm_jax.errors import InputError

HERE = Path("some.gz")
# Two pictures of 2 x 3: zeros, type 8, 3 axes, sizes 2, 2, 3, then the twelve bytes.
CONTENT = bytes.fromhex("00000803 00000002 00000002 00000003") + bytes(range(12))


def test_hand_written_file():
    array = parse_idx(CONTENT, axes=3, where=HERE)
    np.testing.assert_array_equal(array, np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert array.dtype == np.uint8


def test_labels_have_one_axis():
    content = bytes.fromhex("00000801 00000003") + b"\7\1\0"
    np.testing.assert_array_equal(parse_idx(content, axes=1, where=HERE), [7, 1, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], r"27 bytes of content where shape \[2, 2, 3\] requires 28"),
        (CONTENT + b"\0", "29 bytes of content where .* requires 28"),
        (bytes.fromhex("00000801") + CONTENT[4:], "not an IDX file of 3 axes: it begins 00000801, not 00000803"),
        (bytes.fromhex("00000d03") + CONTENT[4:], "begins 00000d03"),  # floats
        (b"<html>not found</html>", "begins 3c68746d"),
        (CONTENT[:9], "9 bytes of content"),  # ends within the header
        (b"", "begins , not"),
    ],
)
def test_wrong_content_is_one_line(content, message):
    with pytest.raises(InputError, match=message) as error:
        parse_idx(content, axes=3, where=HERE)
    assert str(error.value).startswith("some.gz: ")
    assert "\n" not in str(error.value)


def test_gunzip(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(CONTENT))
    assert gunzip(path) == CONTENT


def damage_crc(zipped: bytes) -> bytes:
    return zipped[:-8] + bytes([zipped[-8] ^ 1]) + zipped[-7:]


def damage_middle(zipped: bytes) -> bytes:
    return zipped[:200] + bytes(100) + zipped[300:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda zipped: zipped[:-20], "truncated gzip file of"),
        (lambda zipped: zipped[:5], "truncated gzip file of 5 bytes"),
        (lambda zipped: b"GIF89a" + zipped, "not an intact gzip file"),
        (damage_crc, "not an intact gzip file"),
        (damage_middle, "not an intact gzip file"),
        (lambda zipped: None, "cannot be read"),
    ],
)
def test_damaged_gzip_is_one_line(tmp_path, change, message):
    path = tmp_path / "a.gz"
    zipped = gzip.compress(np.random.default_rng(0).bytes(1000))
    if (changed := change(zipped)) is not None:
        path.write_bytes(changed)
    with pytest.raises(InputError, match=message) as error:
        gunzip(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
