"""The sheet of samples among test images."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation.mixed_sheet import ANSWER, COLUMNS, MIXED, write_mixed_sheet


def plain(n, grey, channels=1):
    """n images of 4 x 4 pixels of one grey level."""
    return np.full((n, 4, 4, channels), grey, np.uint8)


def cells(path, n):
    """The top left pixel of each of the n images of a sheet, in order."""
    sheet = np.asarray(Image.open(path))
    side, columns = 2 + 8, min(COLUMNS, n)
    return np.array([sheet[2 + i // columns * side, 2 + i % columns * side] for i in range(n)])


@pytest.mark.parametrize("samples, real, n", [(150, 120, 200), (7, 120, 14), (150, 3, 6), (1, 1, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_half_are_samples_in_an_order_of_the_seed(samples, real, n, channels, tmp_path):
    write_mixed_sheet(tmp_path, plain(samples, 40, channels), plain(real, 90, channels), seed=3)
    shown, answer = (cells(tmp_path / name, n).reshape(n, -1)[:, 0] for name in (MIXED, ANSWER))
    assert sorted(shown) == [40] * (n // 2) + [90] * (n // 2)
    np.testing.assert_array_equal(answer, np.where(shown == 40, 40, 222))  # 0.2 x 90 + 0.8 x 255
    write_mixed_sheet(tmp_path, plain(samples, 40, channels), plain(real, 90, channels), seed=4)
    if n > 10:
        assert (cells(tmp_path / MIXED, n).reshape(n, -1)[:, 0] != shown).any()
        assert (shown[: n // 2] == 40).any() and (shown[: n // 2] == 90).any()
