import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ldm_jax.data.catalog import find
from ldm_jax.data.records import Records
from ldm_jax.errors import InputError

FEATURES = {"image": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8)}
SPLITS = {"train": [{"image": np.zeros((2, 2), np.uint8)}]}


@pytest.fixture
def data(make_set, tmp_path):
    make_set("flowers", FEATURES, SPLITS, version="2.0.0")
    make_set("flowers", FEATURES, SPLITS, version="10.0.0")
    make_set("birds", FEATURES, SPLITS, config="small")
    make_set("cars", FEATURES, SPLITS, config="front")
    make_set("cars", FEATURES, SPLITS, config="rear", version="1.1.0")
    make_set("elsewhere", FEATURES, SPLITS, data_dir=tmp_path / "tfds")
    make_set("flowers", FEATURES, SPLITS, data_dir=tmp_path / "tfds", version="30.0.0")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("flowers", "data/flowers/10.0.0"),  # the highest, as a number; data_dir goes before TFDS's own folder
        ("flowers:2.0.0", "data/flowers/2.0.0"),
        ("flowers:30.0.0", "tfds/flowers/30.0.0"),
        ("birds", "data/birds/small/1.0.0"),  # the only config
        ("birds:1.0.0", "data/birds/small/1.0.0"),
        ("cars/rear", "data/cars/rear/1.1.0"),
        ("cars/front:1.0.0", "data/cars/front/1.0.0"),
        ("elsewhere", "tfds/elsewhere/1.0.0"),
    ],
)
def test_find(data, tmp_path, name, folder):
    found = find(name, data)
    assert found == tmp_path / folder
    assert len(Records(found, "train")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flower", "data set 'flower' is not prepared in .*data or .*tfds; did you mean flowers?"),
        ("fashion-mnist", "'fashion-mnist' is no data set's name"),
        ("fashion_mnits", "did you mean fashion_mnist?"),
        ("zzz", "there is: birds/small, cars/front, cars/rear, concept, elsewhere, emoji, fashion_mnist, flowers"),
        ("zzz", "tfds build zzz --file_format=array_record --data_dir=.*data; .* -m ldm_jax.data.image_folder"),
        ("flowers:3.0.0", "'flowers:3.0.0' is not prepared"),
        ("flowers/red", "'flowers/red' is not prepared"),
        ("cars", "has several configs; name one of: cars/front, cars/rear"),
        ("../data/flowers", "is no data set's name: it should read NAME"),
        ("", "is no data set's name"),
    ],
)
def test_not_found(data, name, message):
    with pytest.raises(InputError, match=message) as error:
        find(name, data)
    assert "\n" not in str(error.value)


def test_no_data_folder_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(InputError, match="there is: concept, emoji, fashion_mnist"):
        find("zzz", tmp_path / "data")


def test_home_is_looked_through_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}/tensorflow_datasets"):
        find("zzz", tmp_path / "data")


def test_other_file_format(data):
    path = data / "flowers/2.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match=r"is prepared as tfrecord, .* prepare it with file_format=array_record"):
        Records(path.parent, "train")
