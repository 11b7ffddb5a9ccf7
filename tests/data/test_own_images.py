"""data.name=images: classes, splits and what is held out."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.folder_builder import say_once
from ldm_jax.data.own_images import prepare, with_test_split
from ldm_jax.data.skipped import print_once
from ldm_jax.errors import InputError


@pytest.fixture
def source(tmp_path):
    print_once.cache_clear()
    say_once.cache_clear()
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def draw(path, value):
    """An image of one colour of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def load(source, split):
    return load_dataset("images", split, data_dir=source.parent / "data", manual_dir=source, channels=3)


def values(dataset):
    return sorted(dataset.arrays["x"][:, 0, 0, 0].tolist())


def test_a_tenth_is_held_out(source):
    for i in range(60):
        draw(source / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    train, test = load(source, "train"), load(source, "test")
    assert (len(train), len(test)) == (54, 6)
    assert sorted(values(train) + values(test)) == list(range(60))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert all(value % 2 == 1 - label for value, label in zip(test.arrays["x"][:, 0, 0, 0], test.arrays["label"]))


@pytest.mark.parametrize(("num", "held_out"), [(2, 1), (3, 1), (8, 2), (10, 2), (16, 4), (30, 4), (50, 5), (200, 20)])
def test_few_images(num, held_out):
    images = [(Path(f"{i}.png"), None) for i in range(num)]
    splits = with_test_split({"train": images})
    assert (len(splits["train"]), len(splits["test"])) == (num - held_out, held_out)
    assert sorted(splits["train"] + splits["test"]) == sorted(images)
    assert set(splits["test"]) == set(with_test_split({"train": images[::-1]})["test"])  # whatever the order


def test_each_class_keeps_an_image_to_train_on():
    images = [(Path(f"{label}{i}.png"), label) for label, num in (("a", 30), ("b", 1), ("c", 2)) for i in range(num)]
    for extra in range(20):  # other images, other choices
        splits = with_test_split({"train": [*images, *((Path(f"{extra}_{i}.png"), "d") for i in range(4))]})
        assert set(Counter(label for _, label in splits["train"])) == {"a", "b", "c", "d"}
        assert len(splits["test"]) == 4
    with pytest.raises(InputError, match="no class has two images"):
        with_test_split({"train": [(Path("a.png"), "a"), (Path("b.png"), "b")]})


@pytest.mark.parametrize("folder", ["test", "validation", "VAL", "dev"])
def test_a_test_split_of_ones_own(source, folder):
    for i in range(8):
        draw(source / "train" / f"{i}.png", i)
    draw(source / folder / "0.png", 100)
    assert (values(load(source, "train")), values(load(source, "test"))) == (list(range(8)), [100])


def test_test_before_validation(source):
    for value, folder in enumerate(("train", "test", "validation")):
        draw(source / folder / "0.png", value)
    assert [values(load(source, split)) for split in ("train", "test", "validation")] == [[0], [1], [2]]


def test_what_was_found_is_printed_once(source, capsys):
    for i in range(3):
        draw(source / "cat" / f"{i}.png", i)
    draw(source / "dog" / "0.png", 9)
    (source / "dog" / "1.png").write_text("damaged")
    (source / "notes.md").write_text("")
    for split in ("train", "test"):
        load(source, split)
    folder = next((source.parent / "data").glob("images_*"))
    damaged = source / "dog" / "1.png"
    assert capsys.readouterr().out.splitlines() == [
        "train: 5 images in 2 classes: cat (3), dog (2)",
        f"Skipped: 1 .md files, e.g. {source / 'notes.md'}",
        f"Skipped: 1 that cannot be read, e.g. {damaged}: not an image in any format that Pillow reads (7 bytes)",
    ]
    assert len((folder / "left_out.txt").read_text().splitlines()) == 2


def test_another_content_is_another_data_set(source, tmp_path):
    for i in range(4):
        draw(source / f"{i}.png", i)
    first = prepare(tmp_path / "data", source)
    assert prepare(tmp_path / "data", source) == first
    draw(source / "4.png", 4)
    assert prepare(tmp_path / "data", source) != first


def test_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"name=images needs config.data.path: the folder of your images"):
        prepare(tmp_path / "data", None)
    with pytest.raises(InputError, match=r"nowhere is no folder; it must be one of images"):
        prepare(tmp_path / "data", tmp_path / "nowhere")
    draw(source / "0.png", 0)
    with pytest.raises(InputError, match=r"has too few images that can be read: it needs at least two"):
        prepare(tmp_path / "data", source)
    (source / "1.png").write_text("damaged")
    with pytest.raises(InputError, match=r"one to test; left out are 1 that cannot be read, e.g. .*1.png"):
        prepare(tmp_path / "data", source)
    assert not list((tmp_path / "data").glob("*/1.0.0"))
