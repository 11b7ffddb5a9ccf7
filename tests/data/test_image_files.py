"""The files of a folder as people have them: links, hidden files, formats, names, splits."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, features

from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.image_files import list_files, show, split_folders
from ldm_jax.data.image_folder import find_images, prepare
from ldm_jax.data.images import decode, fit
from ldm_jax.data.skipped import print_once
from ldm_jax.errors import InputError


@pytest.fixture
def source(tmp_path):
    print_once.cache_clear()
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def draw(path, value=100, size=(4, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path, **options)


def classes(source):
    """Class -> number of images, of the split "train"."""
    labels = [label for _, label in find_images(source).splits["train"]]
    return {label: labels.count(label) for label in labels}


@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN"])
def test_hidden_folders_are_no_classes(source, junk):
    for name in ("cat", "dog", junk, f"cat/{junk}"):
        draw(source / name / "0.png")
    assert classes(source) == {"cat": 1, "dog": 1}
    assert [why for why, _ in find_images(source).left_out] == ["hidden or system files and folders"] * 2


def test_files_of_operating_systems_are_no_images(source):
    draw(source / "cat" / "0.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (source / "cat" / name).write_bytes(b"\0\5\x16\7")
    assert classes(source) == {"cat": 1}
    assert len(find_images(source).left_out) == 4


def test_links_are_followed(source, tmp_path):
    for i in range(3):
        draw(tmp_path / "store" / "disc" / f"{i}.png", i)
    (source / "disc").symlink_to(tmp_path / "store" / "disc")
    (source / "again").symlink_to(tmp_path / "store" / "disc")
    (source / "square").mkdir()
    (source / "square" / "link.png").symlink_to(tmp_path / "store" / "disc" / "0.png")
    (source / "square" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert classes(source) == {"again": 3, "disc": 3, "square": 1}
    assert find_images(source).left_out == [("broken links", str(source / "square" / "broken.png"))]
    prepare(source, "linked", tmp_path / "data")
    dataset = load_dataset("linked", "train", data_dir=tmp_path / "data")
    assert sorted(zip(dataset.arrays["label"].tolist(), dataset.arrays["x"][:, 0, 0, 0].tolist())) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]  # fmt: skip


def test_links_in_a_circle_end(source):
    draw(source / "cat" / "0.png")
    (source / "cat" / "up").symlink_to(source)
    (source / "cat" / "self").symlink_to(source / "cat")
    (source / "loop").symlink_to(source / "loop")
    assert classes(source) == {"cat": 1}
    reasons = sorted(why for why, _ in list_files(source).left_out)
    assert reasons == ["broken links", *["links to a folder that they are in"] * 2]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {"train": "train", "test": "test"}),
        (("Train", "VALID", "dev"), {"train": "Train", "valid": "VALID", "dev": "dev"}),
        (("training", "testing"), {"train": "training", "test": "testing"}),
        (("train",), {"train": "train"}),
        (("train", "bus", "car"), {"train": ""}),  # vehicles
        (("test", "val"), {"train": ""}),
        (("train", "Train"), {"train": ""}),
        (("cat", "dog"), {"train": ""}),
        ((), {"train": ""}),
    ],
)
def test_folders_are_splits_if_all_are_named_so(source, folders, expected):
    images = [source / folder / "cat" / "0.png" for folder in folders] or [source / "0.png"]
    found, note = split_folders(source, images)
    assert found == {split: source / folder for split, folder in expected.items()}
    assert bool(note) == ("train" in map(str.lower, folders) and expected == {"train": ""})


def test_a_class_named_as_a_split(source, tmp_path, capsys):
    for folder in ("bus", "car", "train"):
        draw(source / folder / "0.png")
    prepare(source, "vehicles", tmp_path / "data")
    assert load_dataset("vehicles", "train", data_dir=tmp_path / "data").class_names == ("bus", "car", "train")
    assert capsys.readouterr().out.splitlines() == [
        "train: 3 images in 3 classes: bus (1), car (1), train (1)",
        "train: no splits, though named so, as bus, car are not",
    ]


def test_a_folder_around_the_class_folders_is_named(source):
    for folder in ("cat", "dog"):
        draw(source / "archive" / folder / "0.png")
    assert classes(source) == {"archive": 2}
    assert find_images(source).notes == [
        f"all images are in folders of {source / 'archive'}: if those are the classes, that is the folder to give"
    ]
    assert find_images(source / "archive").notes == []


def test_files_beside_the_splits_are_left_out(source):
    for name in ("train/a/0.png", "test/a/0.png", "cover.png"):
        draw(source / name)
    (source / "annotations").mkdir()
    (source / "annotations" / "boxes.json").write_text("{}")
    found = find_images(source)
    assert {split: len(images) for split, images in found.splits.items()} == {"test": 1, "train": 1}
    assert sorted(why for why, _ in found.left_out) == [".json files", "images outside the folders of splits"]


FORMATS = {".PNG": "PNG", ".apng": "PNG", ".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".WebP": "WEBP",
           ".jp2": "JPEG2000", ".tga": "TGA", ".ppm": "PPM", ".pgm": "PPM", ".avif": "AVIF", ".tif": "TIFF",
           ".dib": "BMP"}  # fmt: skip


@pytest.mark.parametrize("extension", FORMATS)
def test_all_formats_that_can_be_read_are(source, tmp_path, extension):
    if extension == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    draw(source / f"a{extension}", 100, (16, 16), format=FORMATS[extension])
    prepare(source, "one", tmp_path / "data")
    x = load_dataset("one", "train", data_dir=tmp_path / "data", channels=3).arrays["x"]
    np.testing.assert_allclose(x, np.full((1, 16, 16, 3), 100), atol=2)


def test_what_is_left_out_is_counted_and_listed(source, tmp_path, capsys):
    draw(source / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README", "data.json"):
        (source / name).write_bytes(b"nothing")
    prepare(source, "some", tmp_path / "data")
    list_of_all = tmp_path / "data" / "some" / "left_out.txt"
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 image, without classes",
        f"Skipped: 1 files without an extension, e.g. {source / 'README'}",
        f"Skipped: 2 .heic files, e.g. {source / 'b.heic'}",
        f"Skipped: 1 .json files, e.g. {source / 'data.json'}",
        f"Skipped: 1 .txt files, e.g. {source / 'notes.txt'}",
        f"Skipped: all are listed in {list_of_all}",
    ]
    assert len(list_of_all.read_text().splitlines()) == 5


def test_only_files_that_cannot_be_read(source):
    (source / "a.heic").write_bytes(b"ftypheic")
    with pytest.raises(InputError, match=r"has no images .*; it has .heic files"):
        find_images(source)


NAMES = [b"caf\xe9.png", b"new\nline.png", "räksmörgås 猫 🐈.png".encode(), b"it's \"quoted\" & $HOME.png", b"a\\b.png",
         b"x" * 240 + b".png", b"\x1b[31m.png"]  # fmt: skip


def test_any_names_of_files(source, tmp_path, capsys):
    draw(source / "0.png")
    for value, name in enumerate(NAMES):
        (source / os.fsdecode(name)).write_bytes((source / "0.png").read_bytes())
        draw(source / "0.png", value)
    (source / "0.png").unlink()
    (source / os.fsdecode(b"\xff\n.heic")).write_bytes(b"")
    prepare(source, "names", tmp_path / "data")
    assert len(load_dataset("names", "train", data_dir=tmp_path / "data")) == len(NAMES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith(r"photos/\xff\n.heic")


def test_names_of_classes_that_are_not_utf8_or_of_two_lines(source, tmp_path):
    for name in (b"caf\xe9", b"two\nlines", "猫".encode()):
        draw(source / os.fsdecode(name) / "0.png")
    prepare(source, "names", tmp_path / "data")
    names = load_dataset("names", "train", data_dir=tmp_path / "data").class_names
    assert names == (r"caf\xe9", r"two\nlines", "猫")


def test_names_that_the_terminal_cannot_print(source, tmp_path):
    draw(source / "猫" / "0.png")
    command = [
        "-m",
        "ldm_jax.data.image_folder",
        f"--source={source}",
        "--name=cats",
        f"--data_dir={tmp_path / 'data'}",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.splitlines()[0] == rb"train: 1 image in 1 class: \u732b (1)"


@pytest.mark.parametrize("names", [("cat", "cat "), (" ", "cat")])
def test_names_of_classes_that_would_be_lost(source, names):
    for name in names:
        draw(source / name / "0.png")
    with pytest.raises(InputError, match="rename the folder '"):
        find_images(source)


def test_show_is_one_line_of_text():
    assert show(os.fsdecode(b"caf\xe9\n\x1b[0m")) == r"caf\xe9\n\x1b[0m"
    assert show("a\u2028b\ud800 猫👨‍👩‍👧") == "a\\u2028b\\ud800 猫👨‍👩‍👧"


def damage(source, number):
    for i in range(number):
        draw(source / f"{i}.png")
        (source / f"{i}.png").write_bytes((source / f"{i}.png").read_bytes()[:40])


def test_all_damaged_images_are_named_at_once(source, tmp_path, capsys):
    draw(source / "good.png")
    damage(source, 5)
    Image.fromarray(np.full((4, 4), -1, np.float32)).save(source / "negative.tif")
    with pytest.raises(InputError) as error:
        prepare(source, "photos", tmp_path / "data")
    listed = tmp_path / "data" / "photos" / "damaged.txt"
    assert str(error.value).startswith(f"6 images cannot be read, listed in {listed}: {source / '0.png'}: not a")
    assert str(error.value).endswith("; and 3 more; --skip_damaged leaves them out")
    lines = listed.read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [*(str(source / f"{i}.png") for i in range(5)),
                                                      str(source / "negative.tif")]  # fmt: skip
    prepare(source, "photos", tmp_path / "data", skip_damaged=True)
    assert len(load_dataset("photos", "train", data_dir=tmp_path / "data")) == 1 and not listed.exists()
    assert capsys.readouterr().out.splitlines()[:2] == [
        "train: 1 image, without classes",
        f"Skipped: 6 that cannot be read, e.g. {lines[0]}",
    ]


def test_nothing_but_damaged_images(source, tmp_path):
    damage(source, 1)
    for skip in (False, True):
        with pytest.raises(InputError, match=r"^1 image cannot be read, .*; no other image is there$"):
            prepare(source, "photos", tmp_path / "data", skip_damaged=skip)


def test_some_without_a_class_are_counted(source):
    for name in ("cat/0.png", "1.png", "2.png", "3.png"):
        draw(source / name)
    with pytest.raises(InputError, match=r"photos/1.png is in no class's folder \(nor are 2 more\), others in"):
        find_images(source)


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "0.txt", "0.caption"])
def test_captions_that_are_not_used_are_named(source, tmp_path, capsys, file):
    draw(source / "0.png")
    (source / file).write_text("a cat")
    prepare(source, "photos", tmp_path / "data")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{source / file}: captions, which are not used here; with them: "
        f"--config.data.name=folder --config.data.path={source}"
    ]


def test_images_of_any_mode_have_their_colours(source):
    ramp = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))
    grey = Image.fromarray(ramp)
    saved = {
        "palette.png": grey.convert("P"),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
        "16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "32.tif": Image.fromarray(ramp.astype(np.int32) * 257),
        "float.tif": Image.fromarray(ramp.astype(np.float32)),
        "alpha.png": Image.merge("LA", (grey, Image.new("L", grey.size, 255))),
    }
    for name, image in saved.items():
        image.save(source / name)
        x = fit(decode((source / name).read_bytes()), size=16, channels=3, crop="center")
        np.testing.assert_allclose(x[..., 0], ramp, atol=1, err_msg=name)
    for size in ((1, 1), (3000, 2)):
        draw(source / "odd.png", 77, size)
        x = fit(decode((source / "odd.png").read_bytes()), size=16, channels=3, crop="center")
        np.testing.assert_array_equal(x, np.full((16, 16, 3), 77))
