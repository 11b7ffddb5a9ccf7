import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ldm_jax.data import records as records_module
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.records import Records
from ldm_jax.errors import InputError

RNG = np.random.default_rng(0)


def png(array) -> io.BytesIO:
    """A PNG file; TFDS takes it over as it is, without TensorFlow."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    buffer.seek(0)
    return buffer


@pytest.fixture
def colours():
    return RNG.integers(0, 256, (7, 4, 6, 3), np.uint8)


@pytest.fixture
def colour_set(make_set, colours):
    """Colour pictures as PNG files, without labels; beside them what must not be decoded."""
    features = {"image": tfds.features.Image(), "mask": tfds.features.Tensor(shape=(2,), dtype=np.uint8)}
    examples = [{"image": png(x), "mask": np.zeros(2, np.uint8)} for x in colours]
    return make_set("colours", features, {"train": examples[:5], "test": examples[5:]})


def test_encoded_colour_without_labels(colour_set, colours):
    records = Records(colour_set, "train")
    assert records.shape == (5, 4, 6, 3) and len(records) == 5
    assert records.class_names == ()
    batch = records[np.array([4, 0])]
    assert batch.keys() == {"x"} and batch["x"].dtype == np.uint8
    np.testing.assert_array_equal(batch["x"], colours[[4, 0]])
    np.testing.assert_array_equal(records.load()["x"], colours[:5])


def test_split_expressions(colour_set, colours):
    np.testing.assert_array_equal(Records(colour_set, "test").load()["x"], colours[5:])
    np.testing.assert_array_equal(Records(colour_set, "train[:40%]+test[1:]").load()["x"], colours[[0, 1, 6]])


def test_size_crop_and_channels(colour_set, colours):
    records = Records(colour_set, "train", image_size=4, channels=1)
    assert records.shape == (5, 4, 4, 1)
    middle = colours[2, :, 1:5].astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(records[[2]]["x"][0, :, :, 0], middle, atol=1)
    squeezed = Records(colour_set, "train", image_size=4, crop="none")[[2]]["x"]
    assert squeezed.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(squeezed.mean(), colours[2].mean(), atol=3)


def test_segments_lie_as_their_picture_does(make_set, colours):
    """A map as an encoded picture, whose numbers are never mixed; in memory and one by one."""
    areas = (colours[..., :1] // 86).astype(np.uint8)
    features = {"image": tfds.features.Image(), "areas": tfds.features.Image(shape=(None, None, 1))}
    examples = [{"image": png(x), "areas": png(area[..., 0])} for x, area in zip(colours, areas)]
    folder = make_set("segmented", features, {"train": examples})
    records = Records(folder, "train", image_size=4, segments_key="areas")
    batch = records[[3, 1]]
    np.testing.assert_array_equal(batch["segments"], areas[[3, 1], :, 1:5])
    np.testing.assert_array_equal(records.load()["segments"], areas[:, :, 1:5])
    assert records.fingerprint != Records(folder, "train", image_size=4).fingerprint
    assert Records(folder, "train", image_size=4).load().keys() == {"x"}
    with pytest.raises(InputError, match="segments_key='parts': no such segments"):
        Records(folder, "train", segments_key="parts")


def labelled(shape=(3, 3, 1), **kwargs):
    return {
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8, **kwargs),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
    }


@pytest.mark.parametrize("encoding", ["none", "bytes", "zlib"])
@pytest.mark.parametrize("shape", [(3, 3, 1), (3, 3), (3, 3, 3)])
def test_arrays_with_labels(make_set, encoding, shape):
    x = RNG.integers(0, 256, (4, *shape), np.uint8)
    examples = [{"image": image, "label": label} for image, label in zip(x, [2, 0, 1, 2])]
    folder = make_set("arrays", labelled(shape, encoding=encoding), {"train": examples})
    records = Records(folder, "train")
    batch = records[range(4)]
    np.testing.assert_array_equal(batch["x"], x.reshape(4, 3, 3, -1))
    np.testing.assert_array_equal(batch["label"], [2, 0, 1, 2])
    assert batch["label"].dtype == np.int32
    assert records.class_names == ("ant", "bee", "cat")
    assert Records(folder, "train", channels=3).shape == (4, 3, 3, 3)
    plain = Records(folder, "train", label_key="none")
    assert plain[[0]].keys() == {"x"} and plain.class_names == ()
    assert plain.load().keys() == {"x"}


def test_many_chunks_come_in_order(make_set, monkeypatch):
    monkeypatch.setattr("ldm_jax.data.records.CHUNK", 3)
    x = RNG.integers(0, 256, (20, 3, 3, 1), np.uint8)
    examples = [{"image": image, "label": k % 3} for k, image in enumerate(x)]
    arrays = Records(make_set("many", labelled(), {"train": examples}), "train").load()
    np.testing.assert_array_equal(arrays["x"], x)
    np.testing.assert_array_equal(arrays["label"], np.arange(20) % 3)


def test_classes_without_names_are_numbers(make_set):
    features = {
        "image": tfds.features.Tensor(shape=(3, 3), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=4),
    }
    folder = make_set("numbered", features, {"train": [{"image": np.zeros((3, 3), np.uint8), "label": 3}]})
    assert Records(folder, "train").class_names == ("0", "1", "2", "3")


def test_16_bit_pictures(make_set):
    features = {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")}
    folder = make_set("deep", features, {"train": [{"image": png(np.array([[0, 257, 65535]], np.uint16))}]})
    np.testing.assert_array_equal(Records(folder, "train").load()["x"].ravel(), [0, 1, 255])


def test_transparent_pictures_become_colour(make_set):
    features = {"image": tfds.features.Image(shape=(None, None, 4))}
    folder = make_set("clear", features, {"train": [{"image": png(np.array([[[9, 9, 9, 0]]], np.uint8))}]})
    np.testing.assert_array_equal(Records(folder, "train").load()["x"], [[[[255, 255, 255]]]])


SEVERAL = (("a red cat", "a cat"), ("a dog",), ("a red cat", "an animal"), ())
TEXTS = tfds.features.Sequence(tfds.features.Text())
COCO = tfds.features.Sequence({"id": np.int64, "text": np.str_})  # as TFDS's coco_captions has them


def as_feature(captions, feature):
    """Captions as the feature takes them."""
    return [{"id": i, "text": text} for i, text in enumerate(captions)] if feature is COCO else list(captions)


@pytest.fixture(params=[TEXTS, COCO], ids=["sequence", "coco"])
def captioned_set(request, make_set):
    """The last picture of the training split has the captions of the first; the last of the test split has none."""
    features = {"image": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8), "captions": request.param,
                "file": tfds.features.Text(), "kind": tfds.features.ClassLabel(names=["x", "y"])}  # fmt: skip
    splits = {"train": (0, 1, 0), "test": (2, 3)}
    examples = {
        split: [{"image": np.full((2, 2), 10 * k + n, np.uint8), "captions": as_feature(SEVERAL[k], request.param),
                 "file": f"{k}.png", "kind": k % 2} for n, k in enumerate(numbers)]
        for split, numbers in splits.items()
    }  # fmt: skip
    return make_set("captioned", features, examples)


def test_several_captions_are_one_class(captioned_set):
    """All of a picture's together, whichever split has them; the label is their number, and the first is the name."""
    train, test = (Records(captioned_set, split, caption_key="auto") for split in ("train", "test"))
    assert train.captions == test.captions == (("",), ("a dog",), ("a red cat", "a cat"), ("a red cat", "an animal"))
    assert train.class_names == ("", "a dog", "a red cat", "a red cat")
    for batch in (train[range(3)], train.load()):
        assert batch["label"].dtype == np.int32
        assert [train.captions[label] for label in batch["label"]] == [SEVERAL[0], SEVERAL[1], SEVERAL[0]]
        np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], [0, 11, 2])
    assert [test.captions[label] for label in test.load()["label"]] == [SEVERAL[2], ("",)]


def test_captions_are_read_once_for_all_splits(captioned_set, monkeypatch):
    """Of parts of splits too, those that are present are those of their examples."""
    passes, values = [], records_module._values
    monkeypatch.setattr(records_module, "_values", lambda *arguments: passes.append(arguments) or values(*arguments))
    records_module._captions.cache_clear()
    for split in ("train", "test", "train[:1]", "train[1:2]+test[1:]", "test+train[2:]"):
        records = Records(captioned_set, split, caption_key="captions")
        assert records.present == tuple(sorted(set(records.load()["label"].tolist())))
    assert len(passes) == 1


def test_captions_in_memory_and_on_the_disk(captioned_set):
    options = {"data_dir": captioned_set.parents[1], "caption_key": "captions"}
    here, there = (load_dataset("captioned", "train", **options, memory_limit=n) for n in (2**20, 1))
    assert there.arrays is None and here.records is None
    assert here.captions == there.captions and here.class_names == there.class_names
    np.testing.assert_array_equal(here[range(3)]["label"], there[range(3)]["label"])


def test_one_text_is_a_class_with_one_caption(captioned_set):
    records = Records(captioned_set, "train", caption_key="file")
    assert records.class_names == ("0.png", "1.png", "2.png", "3.png")
    assert records.captions == (("0.png",), ("1.png",), ("2.png",), ("3.png",))


def test_classes_have_no_captions(captioned_set):
    """The same pictures in the same order, labelled by another feature."""
    captioned = Records(captioned_set, "train", caption_key="auto").load()
    kinds = Records(captioned_set, "train", label_key="kind")
    assert kinds.captions == () and kinds.class_names == ("x", "y")
    np.testing.assert_array_equal(kinds.load()["x"], captioned["x"])
    np.testing.assert_array_equal(kinds.load()["label"], [0, 1, 0])


def test_groups_are_the_values_of_a_feature(captioned_set):
    """By a text or a class; in memory, on the disk and in a bucket; and the pictures stay what they are."""
    options = {"data_dir": captioned_set.parents[1], "caption_key": "auto"}
    plain = load_dataset("captioned", "train", **options)
    assert plain.groups is None
    for key in ("file", "kind"):
        for limit in (2**20, 1):
            dataset = load_dataset("captioned", "train", **options, group_key=key, memory_limit=limit)
            assert dataset.groups.tolist() == [0, 1, 0]
            np.testing.assert_array_equal(dataset[range(3)]["x"], plain[range(3)]["x"])
    records = Records(captioned_set, "train", group_key="kind")
    assert records.bucket((2, 2), np.array([2, 1])).groups.tolist() == [0, 1]


@pytest.mark.parametrize("key", ["captions", "tone"])
def test_a_feature_that_has_no_groups(captioned_set, key):
    with pytest.raises(InputError, match=rf"group_key='{key}': no such group in .*; there is file, kind"):
        Records(captioned_set, "train", group_key=key)


def test_no_feature_that_has_groups(make_set):
    folder = make_set("bare", {"image": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8)},
                      {"train": [{"image": np.zeros((2, 2), np.uint8)}]})  # fmt: skip
    with pytest.raises(InputError, match=r"has no group, only image"):
        Records(folder, "train", group_key="auto")


TITLED = {"title": tfds.features.Text(), "alt": TEXTS}
TWO_TEXTS = tfds.features.Sequence({"text": tfds.features.Text(), "language": tfds.features.Text()})


@pytest.mark.parametrize(
    ("features", "key", "message"),
    [
        (TITLED, "auto", r"has several: set caption_key to one of alt, title"),
        (TITLED, "text", r"caption_key='text': no such caption in .*; there is alt, title"),
        (TITLED, "image", r"caption_key='image': no such caption in .*; there is alt, title"),
        ({"pair": TWO_TEXTS}, "auto", r"has no caption, only image, pair"),
        ({"boxes": tfds.features.Sequence(np.float32)}, "boxes", r"no such caption in .*; there is none"),
    ],
)
def test_captions_that_cannot_be(make_set, features, key, message):
    example = {"title": "a", "alt": ["a"], "pair": [{"text": "a", "language": "en"}], "boxes": [0.5]}
    image = {"image": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8)}
    example = {name: example[name] for name in features} | {"image": np.zeros((2, 2), np.uint8)}
    with pytest.raises(InputError, match=message) as error:
        Records(make_set("wrong", image | features, {"train": [example]}), "train", caption_key=key)
    assert "\n" not in str(error.value)


@pytest.fixture
def two_of_each(make_set):
    array = tfds.features.Tensor(shape=(3, 3), dtype=np.uint8)
    features = {
        "left": array,
        "right": array,
        "kind": tfds.features.ClassLabel(num_classes=2),
        "colour": tfds.features.ClassLabel(num_classes=5),
    }
    example = {"left": np.full((3, 3), 1, np.uint8), "right": np.full((3, 3), 2, np.uint8), "kind": 1, "colour": 4}
    return make_set("pairs", features, {"train": [example]})


def test_keys_choose_the_features(two_of_each):
    batch = Records(two_of_each, "train", image_key="right", label_key="colour")[[0]]
    assert (batch["x"] == 2).all() and batch["label"] == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has several: set image_key to one of left, right"),
        ({"image_key": "left"}, "has several: set label_key to one of colour, kind"),
        ({"image_key": "middle"}, "image_key='middle': no such image in .*; there is left, right"),
        ({"image_key": "none"}, "image_key='none': no such image"),
        ({"image_key": "kind"}, "image_key='kind': no such image"),
        ({"image_key": "left", "label_key": "left"}, "label_key='left': no such label in .*; there is colour, kind"),
        ({"image_key": "left", "label_key": "none", "channels": 2}, "channels=2: images have 1"),
        ({"crop": "middle"}, "crop='middle' is not one of center, none"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_options_that_cannot_be(two_of_each, options, message):
    with pytest.raises(InputError, match=message) as error:
        Records(two_of_each, "train", **options)
    assert "\n" not in str(error.value)


def test_no_pictures(make_set):
    features = {"text": tfds.features.Text(), "depth": tfds.features.Tensor(shape=(3, 3), dtype=np.float32)}
    example = {"text": "a", "depth": np.zeros((3, 3), np.float32)}
    with pytest.raises(InputError, match="has no image, only depth, text"):
        Records(make_set("words", features, {"train": [example]}), "train")


@pytest.mark.parametrize("split", ["valid", "train[:", "", "train[5:]"])
def test_unknown_or_empty_split(colour_set, split):
    with pytest.raises(InputError, match=r"no split .* to read; there is .*train \(5\)") as error:
        Records(colour_set, split)
    assert "\n" not in str(error.value)


def test_sizes_that_differ(make_set):
    examples = [{"image": png(RNG.integers(0, 256, (4, width, 3), np.uint8))} for width in (4, 4, 5)]
    folder = make_set("sizes", {"image": tfds.features.Image()}, {"train": examples})
    with pytest.raises(InputError, match=r"example 2 is \[4, 5, 3\], others are \[4, 4, 3\]: set image_size"):
        Records(folder, "train").load()
    assert Records(folder, "train", image_size=4).load()["x"].shape == (3, 4, 4, 3)


def test_unlabelled_examples_in_a_labelled_set(make_set):
    example = {"image": np.zeros((3, 3, 1), np.uint8), "label": -1}
    folder = make_set("hidden", labelled(), {"test": [example]})
    with pytest.raises(InputError, match="example 0 has no label: use label_key=none"):
        Records(folder, "test").load()
    assert Records(folder, "test", label_key="none").load()["x"].shape == (1, 3, 3, 1)


def test_damaged_picture(make_set, colours):
    broken = io.BytesIO(png(colours[0]).getvalue()[:60])
    examples = [{"image": png(colours[1])}, {"image": broken}]
    folder = make_set("broken", {"image": tfds.features.Image(shape=(4, 6, 3))}, {"train": examples})
    with pytest.raises(InputError, match=r"broken/1.0.0 \(train\): example 1 cannot be read: not a readable") as error:
        Records(folder, "train").load()
    assert "\n" not in str(error.value)


def record_file(folder):
    return next(folder.glob("*train*"))


def test_damaged_record_file(make_set, colours):
    folder = make_set("colours", {"image": tfds.features.Image()}, {"train": [{"image": png(x)} for x in colours]})
    path = record_file(folder)
    good = path.read_bytes()
    for damaged in (good[: len(good) // 2], b"", good[:700] + bytes(100) + good[800:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=str(folder)) as error:
            Records(folder, "train").load()
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match="no split 'train' to read"):
        Records(folder, "train")


def test_damaged_description(colour_set):
    (colour_set / "features.json").write_text("{")
    with pytest.raises(InputError, match="not a prepared TFDS data set"):
        Records(colour_set, "train")
    with pytest.raises(InputError, match="not a prepared TFDS data set"):
        Records(colour_set.parent, "train")


def test_fingerprint_depends_on_what_matters(colour_set, make_set, colours):
    options = [{}, {"image_size": 4}, {"image_size": 4, "crop": "none"}, {"channels": 1}]
    prints = [Records(colour_set, "train", **option).fingerprint for option in options]
    prints += [Records(colour_set, split).fingerprint for split in ("test", "train[:4]")]
    assert len(set(prints)) == 6
    assert Records(colour_set, "train").fingerprint == prints[0]
    changed = record_file(colour_set)
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    assert Records(colour_set, "train", image_size=4).fingerprint != prints[1]
