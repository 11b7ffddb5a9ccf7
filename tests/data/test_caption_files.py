"""Captions as people write them: metadata in several forms and encodings, and text files with the images' names."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from ldm_jax.data.caption_files import read_captions
from ldm_jax.data.captioned_folder import prepare
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.image_files import list_files
from ldm_jax.data.skipped import print_once
from ldm_jax.errors import InputError

ROW = {"file_name": "a.png", "text": "a cat"}


@pytest.fixture
def source(tmp_path):
    print_once.cache_clear()
    draw(tmp_path / "photos" / "a.png")
    return tmp_path / "photos"


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def captions(source):
    """Path of each image below the folder -> its caption."""
    return {str(path.relative_to(source)): text for path, text in read_captions(list_files(source)).of.items()}


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


UTF8 = json_lines(ROW)
READ = {
    "a byte order mark and Windows' line ends": (b"\xef\xbb\xbf" + UTF8.replace("\n", "\r\n").encode(), "a cat"),
    "UTF-16": (UTF8.encode("utf-16"), "a cat"),
    "UTF-16, big endian": (b"\xfe\xff" + UTF8.encode("utf-16-be"), "a cat"),
    "the key prompt": (json_lines({"file_name": "a.png", "prompt": "a cat"}).encode(), "a cat"),
    "the key caption, before prompt": (b'{"file_name": "a.png", "prompt": "x", "caption": "a cat"}', "a cat"),
    "text null, but a caption": (b'{"file_name": "a.png", "text": null, "caption": "a cat"}', "a cat"),
    "null": (b'{"file_name": "a.png", "text": null}', ""),
    "spaces": (b'{"file_name": "a.png", "text": " \\n"}', ""),
    "a number": (b'{"file_name": "a.png", "text": 5}', ""),
    "a zero byte": (b'{"file_name": "a.png", "text": "a\\u0000"}', ""),
    "a lone surrogate": (b'{"file_name": "a.png", "text": "a\\ud800"}', ""),
    "a dot before the name": (b'{"file_name": "./a.png", "text": "a cat"}', "a cat"),
    "line separators in the text": (json_lines({"file_name": "a.png", "text": "a\u2028b\x85c\x0bd"}).encode(),
                                    "a\u2028b\x85c\x0bd"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_json_lines(source, case):
    content, expected = READ[case]
    (source / "metadata.jsonl").write_bytes(content)
    assert captions(source) == {"a.png": expected}


TABLES = {
    "commas": ("file_name,text\na.png,a cat\n", "a cat"),
    "quotes": ('file_name,text\r\na.png,"a ""red"" cat,\nsitting"\r\n', 'a "red" cat,\nsitting'),
    "single quotes": ("file_name,text\na.png,'a cat, sitting'\n", "a cat, sitting"),
    "an apostrophe": ("file_name,text\na.png,the cat's\n", "the cat's"),
    "semicolons": ("file_name;text\na.png;a cat, sitting\n", "a cat, sitting"),
    "tabs": ("file_name\ttext\na.png\ta cat\n", "a cat"),
    "other columns and order": ("id,Caption,File_Name\n1,a cat,a.png\n", "a cat"),
    "empty": ("file_name,text\na.png,\n", ""),
    "no text": ("file_name,text\na.png\n", ""),
    "empty lines": ("\nfile_name,text\n\na.png,a cat\n\n", "a cat"),
    "a line separator": ("file_name,text\na.png,a\u2028cat\n", "a\u2028cat"),
}


@pytest.mark.parametrize("case", TABLES)
def test_csv(source, case):
    content, expected = TABLES[case]
    (source / "metadata.csv").write_bytes(content.encode())
    assert captions(source) == {"a.png": expected}


def test_metadata_above_the_splits_as_on_the_hub(source, tmp_path):
    for name in ("train/0.png", "train/1.png", "test/2.png"):
        draw(source / name)
    names = ("train/0.png", "train\\1.png", "test/2.png")
    rows = [{"file_name": name, "text": f"number {i}"} for i, name in enumerate(names)]
    (source / "metadata.jsonl").write_text(json_lines(*rows))
    for split, number in (("train", 2), ("test", 1)):
        options = {"data_dir": tmp_path / "data", "manual_dir": source, "caption_key": "auto"}
        dataset = load_dataset("folder", split, **options)
        assert len(dataset) == number and dataset.class_names == ("number 0", "number 1", "number 2")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_other_normal_forms(source, forms):
    stored, listed = (unicodedata.normalize(form, "é.png") for form in forms)
    draw(source / stored)
    (source / "metadata.jsonl").write_text(json_lines({"file_name": listed, "text": "accent"}))
    assert captions(source) == {stored: "accent"}
    draw(source / listed)  # now both are there: the name is exact
    assert captions(source) == {listed: "accent"}


def test_names_that_are_not_utf8(source):
    name = os.fsdecode(b"caf\xe9.png")
    draw(source / name)
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "coffee"}))  # as json.dumps has it
    (source / os.fsdecode(b"caf\xe8.txt")).write_text("of no image")
    assert captions(source) == {name: "coffee"}


def test_two_captions_for_one_image(source, tmp_path, capsys):
    (source / "metadata.jsonl").write_text(json_lines(ROW, ROW, ROW | {"text": "a dog"}, ROW | {"text": ""}))
    prepare(tmp_path / "data", source)
    assert capsys.readouterr().out.splitlines() == [
        f"Skipped: 1 further captions of an image that has one, e.g. {source / 'a.png'}: a dog"
    ]
    assert captions(source) == {"a.png": "a cat"}


def test_the_nearest_metadata_count(source):
    draw(source / "deep" / "b.png")
    (source / "metadata.jsonl").write_text(json_lines({"file_name": "deep/b.png", "text": "far"}, ROW))
    (source / "deep" / "metadata.csv").write_text("file_name,text\nb.png,near\n")
    assert captions(source) == {"a.png": "a cat", "deep/b.png": "near"}


def test_links_to_one_image_have_their_own_captions(source):
    (source / "b.png").symlink_to(source / "a.png")
    (source / "metadata.jsonl").write_text(json_lines(ROW, {"file_name": "b.png", "text": "a copy"}))
    assert captions(source) == {"a.png": "a cat", "b.png": "a copy"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": b"a cat\n"}, "a cat"),
        ({"a.caption": b"a cat"}, "a cat"),
        ({"a.TXT": b"a cat"}, "a cat"),
        ({"a.txt": b"a cat", "a.caption": b"a dog"}, "a cat"),
        ({"a.txt": b" ", "a.caption": b"a dog"}, "a dog"),
        ({"a.txt": "un disque é".encode("utf-16")}, "un disque é"),
        ({"a.txt": "un disque é".encode("latin-1")}, None),
        ({"a.txt": b"\0\0\0"}, None),
        ({"b.txt": b"of no image"}, None),
    ],
)
def test_files_beside_the_image(source, files, expected):
    for name, content in files.items():
        (source / name).write_bytes(content)
    assert captions(source).get("a.png") == expected


def test_images_without_a_caption_are_counted_by_what_is_in_its_place(source, tmp_path, capsys):
    draw(source / "b.png")
    draw(source / "c.png")
    draw(source / "d.png")
    (source / "c.txt").write_bytes(b"\xe9")
    (source / "metadata.jsonl").write_text(json_lines(ROW, {"file_name": "b.png", "text": ["a", "list"]}))
    prepare(tmp_path / "data", source)
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"Skipped: 1 with a caption in a metadata file that is no text, e.g. {source / 'b.png'}",
        f"Skipped: 1 with a .txt file that is not UTF-8 text, e.g. {source / 'c.png'}",
        f"Skipped: 1 without a caption, e.g. {source / 'd.png'}",
    ]


REFUSED = {
    "Latin-1": ("metadata.jsonl", json_lines(ROW | {"text": "é"}).encode("latin-1"), "it is not UTF-8 text; save it a"),
    "Latin-1 in a table": ("metadata.csv", b"file_name,text\na.png,\xe9\n", "it is not UTF-8 text; save it as UTF-8"),
    "an array": ("metadata.jsonl", json.dumps([ROW], indent=1).encode(), "is a JSON array; each line must have"),
    "no name": ("metadata.jsonl", b'{"text": "a cat"}', "line 1 must have a file_name and a text"),
    "a name that is a number": ("metadata.jsonl", b'{"file_name": 1, "text": "a"}', "must have a file_name and a text"),
    "no caption": ("metadata.jsonl", b'{"file_name": "a.png", "label": 1}', "must have a file_name and a text"),
    "deep nesting": ("metadata.jsonl", b"{" + b'"a":[' * 100_000, "line 1 is damaged"),
    "an unquoted comma": ("metadata.csv", b"file_name,text\na.png,a cat, sitting\n", "line 2 has more columns than"),
    "an open quote": ("metadata.csv", b'file_name,text\na.png,"a cat\n', "metadata.csv is damaged: unexpected end"),
    "no header": ("metadata.csv", b"a.png,a cat\n", "must begin with the names of its columns: file_name,text"),
    "an empty table": ("metadata.csv", b"", "must begin with the names of its columns: file_name,text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(source, tmp_path, case):
    name, content, expected = REFUSED[case]
    (source / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        prepare(tmp_path / "data", source)
    assert "\n" not in str(error.value)
