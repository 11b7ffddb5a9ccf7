"""Preparing sets that are larger than TFDS sorts in memory: without TensorFlow, in the same order."""

import errno
import io
import resource

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.prepare import Builder, build
from ldm_jax.errors import RunError

FEATURES = {"image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8), "caption": tfds.features.Text()}


def prepare(folder, num=500):
    rng = np.random.default_rng(0)
    examples = ((k, {"image": rng.integers(0, 256, (8, 8, 1), np.uint8), "caption": f"{k}"}) for k in range(num))
    build(Builder("set", "1.0.0", folder, FEATURES, {"train": examples}))
    return load_dataset("set", "train", data_dir=folder, caption_key="caption")


def test_the_order_is_that_of_a_small_set(tmp_path, monkeypatch):
    """And no file is left; usual limits allow 1,024 open files, less is tried here."""
    small = prepare(tmp_path / "small")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(600, limits[1]), limits[1]))
    try:
        large = prepare(tmp_path / "large")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert large.fingerprint == small.fingerprint and len(large) == 500
    assert not [path for path in (tmp_path / "large").rglob("*") if "bucket" in path.name]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    monkeypatch.setattr(shuffle.tf.io.gfile, "GFile", lambda path, mode: Full())
    with pytest.raises(RunError, match=r"^cannot prepare set in .*: .*No space left on device$"):
        prepare(tmp_path)
