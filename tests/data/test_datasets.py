import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ldm_jax.data.datasets import load_dataset, sha256_of_arrays
from ldm_jax.errors import InputError

X = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)


@pytest.fixture
def data(make_set, tmp_path):
    features = {
        "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
    }
    examples = [{"image": image, "label": k % 2} for k, image in enumerate(X)]
    make_set("small", features, {"train": examples[:4], "test": examples[4:]})
    return tmp_path / "data"


def test_in_memory(data):
    dataset = load_dataset("small", "train", data_dir=data)
    assert (dataset.name, dataset.split, dataset.shape) == ("small", "train", (4, 4, 4, 1))
    assert len(dataset) == 4 and dataset.num_classes == 2 and dataset.class_names == ("a", "b")
    assert dataset.records is None
    np.testing.assert_array_equal(dataset.arrays["x"], X[:4])
    np.testing.assert_array_equal(dataset.arrays["label"], [0, 1, 0, 1])


def test_on_the_disk_gives_the_same(data):
    pixels = 4 * 4 * 4
    memory = load_dataset("small", "train", data_dir=str(data), memory_limit=pixels)
    disk = load_dataset("small", "train", data_dir=data, memory_limit=pixels - 1)
    assert disk.arrays is None and memory.arrays is not None
    assert disk.shape == memory.shape and disk.class_names == memory.class_names
    for indices in (np.array([3, 1, 1]), range(2, 4), [0]):
        a, b = memory[indices], disk[indices]
        assert a.keys() == b.keys() == {"x", "label"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def test_options_reach_the_records(data):
    dataset = load_dataset("small", "test", data_dir=data, image_size=2, channels=3, crop="none", label_key="none")
    assert dataset.shape == (2, 2, 2, 3) and dataset.num_classes == 0 and dataset.arrays.keys() == {"x"}
    with pytest.raises(InputError, match="image_key='picture'"):
        load_dataset("small", "test", data_dir=data, image_key="picture")


def test_fingerprint_is_of_the_content(data):
    train = load_dataset("small", "train", data_dir=data)
    assert train.fingerprint == load_dataset("small", "train[:4]", data_dir=data).fingerprint
    others = [
        load_dataset("small", "test", data_dir=data),
        load_dataset("small", "train", data_dir=data, image_size=2),
        load_dataset("small", "train", data_dir=data, label_key="none"),
    ]
    assert len({train.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert sha256_of_arrays(train.arrays) == train.fingerprint
    flat = {name: values.reshape(-1) for name, values in train.arrays.items()}
    assert sha256_of_arrays(flat) != train.fingerprint  # the shape counts


def test_manual_folder_reaches_the_builder(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/none: Fashion-MNIST's files are not all there"):
        load_dataset("fashion_mnist", "train", data_dir=tmp_path / "data", manual_dir=tmp_path / "none")


def test_importing_costs_nothing_heavy():
    code = (
        "import sys; import ldm_jax.data.datasets, ldm_jax.data.feeds; "
        "print([name for name in ('tensorflow_datasets', 'tensorflow', 'grain', 'jax') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout.strip(), out.stderr) == ("[]", "")
