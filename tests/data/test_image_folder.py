import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.image_folder import find_images, main, prepare
from ldm_jax.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "photos"


def draw(path, size=(5, 4)):
    """Writes a picture; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(x).save(path)
    return x


def multiset(images):
    return sorted(x.tobytes() for x in images)


def test_pictures_without_classes(source, tmp_path):
    drawn = [draw(source / f"{k}.png") for k in range(6)]
    (source / "notes.txt").write_text("not a picture")
    assert prepare(source, "photos", tmp_path / "data") == tmp_path / "data/photos/1.0.0"
    dataset = load_dataset("photos", "train", data_dir=tmp_path / "data")
    assert dataset.shape == (6, 4, 5, 3) and dataset.num_classes == 0
    assert multiset(dataset.arrays["x"]) == multiset(drawn)  # lossless, in TFDS's own shuffled order


def test_a_folder_per_class(source, tmp_path):
    drawn = {name: [draw(source / name / f"{k}.PNG", (4, 4)) for k in range(3)] for name in ("dog", "cat", "eel")}
    draw(source / "cat" / "deeper" / "one.jpg", (9, 7))
    prepare(source, "animals", tmp_path / "data")
    dataset = load_dataset("animals", "train", data_dir=tmp_path / "data", image_size=4)
    assert dataset.class_names == ("cat", "dog", "eel")
    assert np.bincount(dataset.arrays["label"]).tolist() == [4, 3, 3]
    eels = dataset.arrays["x"][dataset.arrays["label"] == 2]
    assert multiset(eels) == multiset(drawn["eel"])


def test_a_folder_per_split(source, tmp_path):
    for split, n in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            for k in range(n):
                draw(source / split / name / f"{k}.png")
    draw(source / "test" / "c" / "0.png")
    prepare(source, "letters", tmp_path / "data")
    train, test = (load_dataset("letters", split, data_dir=tmp_path / "data") for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 5)
    assert train.class_names == test.class_names == ("a", "b", "c")
    half = load_dataset("letters", "train[:50%]", data_dir=tmp_path / "data")
    assert len(half) == 4


@pytest.mark.parametrize("name", ["my-photos", "a/b", "a:1.0.0", "fashion_mnist", ""])
def test_impossible_names(source, tmp_path, name):
    draw(source / "0.png")
    with pytest.raises(InputError, match=f"--name={name}: letters, digits"):
        prepare(source, name, tmp_path / "data")


def test_nothing_there(source, tmp_path):
    with pytest.raises(InputError, match=r"photos is no folder"):
        find_images(source)
    source.mkdir()
    with pytest.raises(InputError, match=r"photos has no images \(.*.bmp"):
        find_images(source)


def test_some_without_a_class(source):
    draw(source / "cat" / "0.png")
    draw(source / "1.png")
    with pytest.raises(InputError, match=r"photos/1.png is in no class's folder"):
        find_images(source)


def test_damaged_picture_is_named_and_nothing_written(source, tmp_path):
    draw(source / "0.png")
    (source / "1.png").write_bytes((source / "0.png").read_bytes()[:50])
    with pytest.raises(InputError, match=r"photos/1.png: not an? (readable )?image") as error:
        prepare(source, "photos", tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data/photos").glob("*1.0.0"))


def test_not_overwritten(source, tmp_path):
    draw(source / "0.png")
    prepare(source, "photos", tmp_path / "data")
    with pytest.raises(InputError, match=r"photos/1.0.0 is there already: delete it"):
        prepare(source, "photos", tmp_path / "data")


def test_command(source, tmp_path, monkeypatch, capsys):
    draw(source / "0.png")
    arguments = [f"--source={source}", "--name=photos", f"--data_dir={tmp_path / 'data'}"]
    run = subprocess.run(
        [sys.executable, "-m", "ldm_jax.data.image_folder", *arguments], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("use it with --config.data.name=photos\n")
    monkeypatch.setattr(sys, "argv", ["image_folder", *arguments])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setattr(sys, "argv", ["image_folder", *arguments[:2], f"--data_dir={source / '0.png'}"])
    assert main() == 1
