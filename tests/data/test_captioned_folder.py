import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.captioned_folder import prepare
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.prompt_templates import TEMPLATES, with_prompts
from ldm_jax.data.skipped import print_once
from ldm_jax.errors import InputError


@pytest.fixture
def source(tmp_path):
    return tmp_path / "photos"


def draw(path, value, caption=None, mode="RGB", size=(6, 4)):
    """A picture of one colour, with its caption in a .txt file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def load(source, split="train", **changes):
    options = {"image_size": 4, "channels": 3, "caption_key": "auto"} | changes
    return load_dataset("folder", split, data_dir=source.parent / "data", manual_dir=source, **options)


def captions_by_pixel(dataset):
    """Value of the first pixel -> caption."""
    examples = dataset[range(len(dataset))]
    return {int(x[0, 0, 0]): dataset.class_names[label] for x, label in zip(examples["x"], examples["label"])}


def test_text_files_and_metadata(source):
    draw(source / "a.png", 10, "a cat\n")
    draw(source / "deep" / "b.png", 20, "not this")  # metadata.jsonl is asked first
    draw(source / "deep" / "c.jpg", 30, "ein Käse", mode="L")
    draw(source / "d.png", 40, "a cat")
    lines = [{"file_name": "deep/b.png", "text": "a dog", "more": 1}, {"file_name": "d.png", "text": " a cat "}]
    (source / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    dataset = load(source)
    assert captions_by_pixel(dataset) == {10: "a cat", 20: "a dog", 30: "ein Käse", 40: "a cat"}
    assert dataset.class_names == ("a cat", "a dog", "ein Käse")
    assert dataset.shape == (4, 4, 4, 3)
    assert load(source, channels=1).shape == (4, 4, 4, 1)
    assert load(source, image_size=None).shape == (4, 4, 6, 3)


def test_from_the_disk_it_is_the_same(source):
    for i in range(3):
        draw(source / f"{i}.png", 10 * i, f"number {i}")
    here, there = load(source), load(source, memory_limit=10)
    assert there.arrays is None
    assert captions_by_pixel(here) == captions_by_pixel(there) == {0: "number 0", 10: "number 1", 20: "number 2"}


def test_a_folder_per_split_and_one_list_of_captions(source):
    draw(source / "train" / "a.png", 10, "old")
    draw(source / "test" / "a.png", 20, "new")
    assert load(source, "train").class_names == load(source, "test").class_names == ("new", "old")
    assert (captions_by_pixel(load(source, "train")), captions_by_pixel(load(source, "test"))) == (
        {10: "old"},
        {20: "new"},
    )


def test_what_is_skipped_is_printed_once_in_each_run_one_line_for_each_reason(source, capsys):
    draw(source / "a.png", 10, "a cat")
    for name in ("b.png", "c.png"):
        draw(source / name, 20)
    draw(source / "d.png", 20, "  ")
    draw(source / "e.png", 20)
    (source / "e.txt").write_bytes(b"\xff\xfe\xff")
    (source / "f.png").write_text("no picture")
    (source / "f.txt").write_text("a text")
    (source / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "gone"}\n')
    for _ in range(2):  # the second finds the prepared data set
        print_once.cache_clear()  # as in a new process
        assert captions_by_pixel(load(source)) == captions_by_pixel(load(source)) == {10: "a cat"}
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(", e.g. ")[0] for line in lines] == [
            "Skipped: 3 without a caption",
            "Skipped: 1 with a .txt file that is not UTF-8 text",
            "Skipped: 1 named in a metadata.jsonl but not there",
            "Skipped: 1 that cannot be read",
            f"Skipped: all are listed in {next(source.parent.glob('data/folder_*/left_out.txt'))}",
        ]
        assert lines[0].endswith("b.png") and "f.png: not an image" in lines[3]


def test_another_content_is_another_data_set(source):
    draw(source / "a.png", 10, "a cat")
    first = load(source)
    (source / "a.txt").write_text("a dog")
    assert captions_by_pixel(load(source)) == {10: "a dog"}
    draw(source / "b.png", 20, "a cat")
    assert captions_by_pixel(load(source)) == {10: "a dog", 20: "a cat"}
    assert captions_by_pixel(first) == {10: "a cat"}


def metadata(content):
    def write(source):
        draw(source / "a.png", 10)
        (source / "metadata.jsonl").write_bytes(content)

    return write


def nothing_readable(source):
    draw(source / "a.png", 10, "a cat")
    (source / "a.png").write_text("no picture")


REFUSED = {
    "no folder": (lambda source: None, r"photos is no folder"),
    "an empty one": (lambda source: source.mkdir(), r"has no image with a caption: it needs images"),
    "no captions": (lambda source: draw(source / "a.png", 10), r"image with a caption: left out are 1 without a cap"),
    "no picture": (nothing_readable, r"no image with a caption: left out are 1 that cannot be read"),
    "metadata that is no JSON": (metadata(b'{"file_name": "a.png"'), r"metadata.jsonl, line 1 is damaged"),
    "a later line": (metadata(b'{"file_name": "a.png", "text": "x"}\n}'), r"metadata.jsonl, line 2 is damaged"),
    "no text in it": (metadata(b'{"file_name": "a.png"}'), r"line 1 must have a file_name and a text"),
    "a text that is a number": (metadata(b'{"file_name": "a.png", "text": 3}'), r"1 with a caption in .* no text"),
    "a list": (metadata(b"[]"), r"is a JSON array; each line must have a file_name and a text"),
    "bytes": (metadata(b"\xff\xff"), r"metadata.jsonl is damaged: it is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, source, tmp_path):
    make, expected = REFUSED[case]
    make(source)
    with pytest.raises(InputError, match=expected) as error:
        prepare(tmp_path / "data", source)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").glob("*/1.0.0"))


def test_a_path_is_needed(tmp_path):
    with pytest.raises(InputError, match=r"needs config.data.path"):
        prepare(tmp_path / "data", None)


def test_captions_of_any_data_set(make_set, tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8), "title": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["x"])}  # fmt: skip
    examples = [{"image": np.full((4, 4, 3), i, np.uint8), "title": f"t{i % 2}", "label": 0} for i in range(4)]
    make_set("titled", features, {"train": examples})
    for key in ("auto", "title"):
        dataset = load_dataset("titled", "train", data_dir=tmp_path / "data", caption_key=key)
        assert captions_by_pixel(dataset) == {0: "t0", 1: "t1", 2: "t0", 3: "t1"}
    assert load_dataset("titled", "train", data_dir=tmp_path / "data").class_names == ("x",)
    with pytest.raises(InputError, match=r"caption_key='text': no such caption in .*; there is title"):
        load_dataset("titled", "train", data_dir=tmp_path / "data", caption_key="text")
    make_set("silent", {"image": features["image"]}, {"train": [{"image": examples[0]["image"]}]})
    with pytest.raises(InputError, match="has no caption, only image"):
        load_dataset("silent", "train", data_dir=tmp_path / "data", caption_key="auto")


def test_images_of_one_concept_need_no_captions(source):
    """Those without have an empty one; what is damaged is left out."""
    draw(source / "a.png", 10)
    draw(source / "b.png", 20, "a <toy>")
    draw(source / "c.png", 30)
    draw(source / "d.png", 40)
    (source / "d.txt").write_bytes(b"\xff\xfe\xff")
    options = {"data_dir": source.parent / "data", "manual_dir": source, "image_size": 4, "caption_key": "auto"}
    dataset = load_dataset("concept", "train", **options)
    assert captions_by_pixel(dataset) == {10: "", 20: "a <toy>", 30: ""}
    prompted = with_prompts(dataset, "<toy>", "style")
    assert captions_by_pixel(prompted)[10] == TEMPLATES["style"][0].format("<toy>")
    assert set(prompted.captions) == {("a <toy>",), tuple(t.format("<toy>") for t in TEMPLATES["style"])}


def test_a_concept_needs_images(source):
    source.mkdir()
    (source / "notes.doc").touch()
    options = {"data_dir": source.parent / "data", "manual_dir": source}
    with pytest.raises(InputError, match=r"has no image that can be read: left out are 1 .doc files"):
        load_dataset("concept", "train", **options)
    (source / "notes.doc").unlink()
    with pytest.raises(InputError, match=r"has no image that can be read$"):
        load_dataset("concept", "train", **options)
    with pytest.raises(InputError, match=r"needs config\.data\.path: the folder of your images$"):
        load_dataset("concept", "train", data_dir=source.parent / "data")
