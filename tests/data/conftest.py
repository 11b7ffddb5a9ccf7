import gzip
import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ldm_jax.data import fashion_mnist
from ldm_jax.data.prepare import build


def idx(array: np.ndarray) -> bytes:
    """The content of an IDX file, written independently of the reader."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fake_files(tmp_path, monkeypatch):
    """A folder with four small files that pass for Fashion-MNIST's: 20 training and 10 test pictures."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    hashes = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        contents = {
            f"{prefix}-images-idx3-ubyte.gz": idx(rng.integers(0, 256, (n, 28, 28))),
            f"{prefix}-labels-idx1-ubyte.gz": idx(np.arange(n) % 10),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(gzip.compress(content))
            hashes[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    return folder


class AnyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS data set from a dict of features and, for each split, a list of examples."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def __init__(self, *, name, features, splits, version="1.0.0", config=None, **kwargs):
        self.name, self._features, self._splits = name, features, splits
        self.VERSION = tfds.core.Version(version)
        super().__init__(config=config and tfds.core.BuilderConfig(name=config, version=version), **kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(examples) for split, examples in self._splits.items()}

    def _generate_examples(self, examples):
        return enumerate(examples)


@pytest.fixture
def make_set(tmp_path, monkeypatch):
    """make_set(name, features, {split: [example, ...]}) prepares a data set below tmp_path; returns its folder."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

    def make(name, features, splits, *, data_dir=None, file_format="array_record", **kwargs):
        data_dir = data_dir or tmp_path / "data"
        return build(
            AnyBuilder(
                name=name, features=features, splits=splits, data_dir=data_dir, file_format=file_format, **kwargs
            )
        )

    return make
