"""Pictures in shapes near their own, each shape a data set of its own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm_jax.data.buckets import ELONGATED, bucket_sizes, nearest
from ldm_jax.data.datasets import load_buckets, load_dataset
from ldm_jax.data.image_folder import prepare
from ldm_jax.data.images import fit, shape_of
from ldm_jax.errors import InputError

COLUMNS, ROWS = np.meshgrid(np.arange(60), np.arange(60))
SHAPES = {"square": (20, 20), "wide": (12, 20), "wider": (11, 40), "high": (30, 18), "nearly square": (20, 19)}


def picture(height, width):
    """An image whose pixels encode their positions."""
    return np.stack([4 * ROWS, 4 * COLUMNS, 0 * ROWS + 7], -1)[:height, :width].astype(np.uint8)


@pytest.mark.parametrize(
    ("image_size", "step", "expected"),
    [
        (512, 64, ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))),
        (16, 4, ((20, 12), (16, 16), (12, 20))),
        (64, 64, ((64, 64),)),
    ],
)
def test_sizes(image_size, step, expected):
    assert bucket_sizes(image_size, step) == expected


@given(st.integers(1, 40), st.integers(1, 40))
def test_sizes_are_as_large_as_they_may_be(step, times):
    sizes, area = bucket_sizes(step * times, step), (step * times) ** 2
    assert (step * times,) * 2 in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and h * w <= area < max((h + step) * w, h * (w + step))
        assert max(h, w) <= ELONGATED * min(h, w)
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(ratios)


@given(st.lists(st.tuples(st.integers(1, 999), st.integers(1, 999)), min_size=1, max_size=8))
def test_nearest(shapes):
    sizes = bucket_sizes(512, 64)
    for (h, w), number in zip(shapes, nearest(sizes, np.array(shapes))):
        off = [abs(math.log(h / w) - math.log(a / b)) for a, b in sizes]
        assert off[number] == pytest.approx(min(off))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared set with a picture of each shape."""
    home = tmp_path_factory.mktemp("buckets")
    for name, shape in SHAPES.items():
        (home / "photos" / name).mkdir(parents=True)
        Image.fromarray(picture(*shape)).save(home / "photos" / name / "0.png")
    prepare(home / "photos", "photos", home / "data")
    return home / "data"


@pytest.mark.parametrize("memory_limit", [2**31, 10])
def test_every_picture_is_in_the_bucket_that_cuts_off_least(data, memory_limit):
    buckets = load_buckets("photos", "train", step=4, image_size=16, data_dir=data, memory_limit=memory_limit)
    assert all((bucket.arrays is None) == (memory_limit == 10) for bucket in buckets)
    found = {}
    for bucket in buckets:
        examples = bucket[range(len(bucket))]
        for x, label in zip(examples["x"], examples["label"]):
            name = bucket.class_names[label]
            found[name] = bucket.shape[1:3]
            whole = picture(*SHAPES[name])
            np.testing.assert_array_equal(x, fit(whole, size=bucket.shape[1:3], channels=3, crop="center"))
    square, wide, high = (16, 16), (12, 20), (20, 12)
    assert found == {"square": square, "nearly square": square, "wide": wide, "wider": wide, "high": high}
    names = load_dataset("photos", "train", data_dir=data, image_size=16).class_names
    assert {bucket.class_names for bucket in buckets} == {names}
    assert len({bucket.fingerprint for bucket in buckets}) == 3


def test_buckets_of_other_pictures_are_others(data):
    """From the disk, where the files alone would give equal fingerprints."""
    options = {"image_size": 16, "data_dir": data, "memory_limit": 10}
    four = {b.shape[1:3]: b.fingerprint for b in load_buckets("photos", "train", step=4, **options)}
    eight = {b.shape[1:3]: b.fingerprint for b in load_buckets("photos", "train", step=8, **options)}
    assert four.keys() & eight.keys() == {(16, 16)} and four[16, 16] != eight[16, 16]


@pytest.mark.parametrize("turned", [None, 1, 3, 6, 8])
def test_the_shape_is_that_of_the_upright_picture(turned, tmp_path):
    exif = Image.Exif()
    if turned:
        exif[0x0112] = turned
    Image.fromarray(picture(10, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert shape_of((tmp_path / "a.jpg").read_bytes()) == ((20, 10) if turned in (6, 8) else (10, 20))


def test_what_is_no_picture_has_no_shape():
    with pytest.raises(InputError, match="not a readable image"):
        shape_of(b"words")
