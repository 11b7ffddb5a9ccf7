"""The examples of a TFDS image data set prepared as ArrayRecord: read by index from the disk, without TensorFlow."""

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from ldm_jax.data.captions import has_captions, read_captions
from ldm_jax.data.images import CROPS, MODES, decode, fit, fit_segments, is_grey, shape_of
from ldm_jax.data.prepare import in_one_line
from ldm_jax.errors import InputError

CHUNK = 256  # records that one thread reads at a time
SAMPLED_BYTES = 1 << 16  # at both ends of each file, for the fingerprint


class Records:
    """The examples of one split: `records[[3, 5]]` is {"x": uint8 [2, H, W, C], "label": int32 [2] if labelled,
    "segments": uint8 [2, H, W, 1] with a `segments_key`}.

    Args:
        folder: of a prepared data set, with its dataset_info.json.
        split: "train", or any of TFDS's expressions: "train[:90%]", "train+test".
        image_size: height and width of the result; None keeps the images' size, which must be one.
        channels: 1 or 3; None keeps the data set's, without transparency.
        crop: "center" (the largest square) or "none" (the whole image, squeezed), see `images.fit`.
        image_key: the feature of images; "auto" finds the only one.
        label_key: the `ClassLabel` feature; "auto" finds the only one, "none" goes without.
        segments_key: the feature of segmentation maps, images whose pixels are class numbers; "none" goes without.
        caption_key: the feature of a text or a sequence of texts; "auto" finds the only one, "none" goes without. The
            captions are then the classes: each different text of the data set, over all splits, is one (of sequences,
            all texts of an image together).
        group_key: the feature, a text or a number, whose values are the groups of images; "none" goes without.

    Attributes:
        shape: (N, H, W, C).
        class_names: of the labels; with captions, the first of each class; empty without labels.
        captions: of each class, at least one; empty without captions.
        present: the classes of captions that this split has.
        groups: the group of each image, int64 [N]; None without groups.
        fingerprint: a hash of the arguments and of the record files' names, sizes, beginnings and ends.

    Raises:
        InputError: the folder, the split or a feature does not exist or is damaged, or an argument is out of range.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        crop: str = "center",
        image_key: str = "auto",
        label_key: str = "auto",
        segments_key: str = "none",
        caption_key: str = "none",
        group_key: str = "none",
    ) -> None:
        _check_arguments(image_size, channels, crop)
        self._where = f"{folder} ({split})"
        info, self._source = _open(folder, split)
        keys = {"image": image_key, "label": label_key if caption_key == "none" else "none", "segments": segments_key}
        keys |= {"caption": caption_key, "group": group_key}
        self._keys = {usual: _choose(info.features, key, usual, self._where) for usual, key in keys.items()}
        used = {key: info.features[key] for usual, key in self._keys.items() if key and usual != "group"}
        self._features = tfds.features.FeaturesDict(used)  # the rest of a record is never decoded
        # TFDS would decode with OpenCV or Pillow, whichever is there, and a palette as if it were grey.
        encoded = [key for key, feature in used.items() if isinstance(feature, tfds.features.Image)]
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}

        self._rows = np.arange(len(self._source))
        image = info.features[self._keys["image"]]
        stored_channels = image.shape[2] if len(image.shape) == 3 else 1
        self._fit = {"size": image_size, "channels": channels or (1 if stored_channels in (1, 2) else 3), "crop": crop}
        height, width = (image_size, image_size) if image_size else image.shape[:2]
        if None in (height, width):
            height, width = self._shape(0, self._source[0])  # `__getitem__` checks the others
        self.shape = (len(self._source), height, width, self._fit["channels"])
        self.class_names = tuple(info.features[self._keys["label"]].names) if self._keys["label"] else ()
        self.captions: tuple[tuple[str, ...], ...] = ()
        self.present: tuple[int, ...] = ()
        if key := self._keys["caption"]:
            self.captions, labels = _captions(folder, key, _fingerprint(info.splits["all"].file_instructions, []))
            self.class_names = tuple(captions[0] for captions in self.captions)
            self._label_of = {captions: i for i, captions in enumerate(self.captions)}
            files = info.splits[split].file_instructions
            here = [labels[file.filename][file.skip : file.skip + file.take] for file in files]
            self.present = tuple(np.unique(np.concatenate(here)).tolist())
        self.groups: np.ndarray | None = None
        if key := self._keys["group"]:
            self.groups = np.unique(list(_values(folder, split, key)), return_inverse=True)[1]
        self.fingerprint = _fingerprint(info.splits[split].file_instructions, [self.shape, self._fit, list(used)])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked; raises InputError, with its number, for a damaged one."""
        indices = [int(self._rows[index]) for index in indices]
        examples = [self._decode(index, content) for index, content in zip(indices, self._contents(indices))]
        for index, example in zip(indices, examples):
            if example["x"].shape != self.shape[1:]:
                raise InputError(
                    f"{self._where}: example {index} is {list(example['x'].shape)}, others are "
                    f"{list(self.shape[1:])}: set image_size"
                )
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def shapes(self) -> np.ndarray:
        """Height and width of every stored image, int64 [N, 2], mostly from headers; InputError for a damaged one."""
        shapes = []
        for start in range(0, len(self), CHUNK):
            rows = [int(row) for row in self._rows[start : start + CHUNK]]
            shapes += [self._shape(row, content) for row, content in zip(rows, self._contents(rows))]
        return np.array(shapes)

    def _shape(self, row: int, content: bytes) -> tuple[int, int]:
        key = self._keys["image"]
        with in_one_line(f"{self._where}: example {row} cannot be read"):
            image = self._features.deserialize_example_np(content, decoders=self._decoders or None)[key]
            return shape_of(image) if key in self._decoders else image.shape[:2]

    def is_grey(self) -> bool:
        """Whether no stored image has a colour; images are decoded up to the first one that has."""
        key, where = self._keys["image"], self._where
        for start in range(0, len(self), CHUNK):
            rows = [int(row) for row in self._rows[start : start + CHUNK]]
            for row, content in zip(rows, self._contents(rows)):
                with in_one_line(f"{where}: example {row} cannot be read"):
                    image = self._features.deserialize_example_np(content, decoders=self._decoders or None)[key]
                    if not is_grey(decode(image) if key in self._decoders else image):
                        return False
        return True

    def bucket(self, size: tuple[int, int], rows: np.ndarray) -> "Records":
        """The examples at the indices `rows` [n], resized to (height, width)."""
        bucket = copy.copy(self)
        bucket._rows, bucket._fit = self._rows[rows], self._fit | {"size": size}
        bucket.shape = (len(rows), *size, self.shape[3])
        bucket.groups = None if self.groups is None else self.groups[rows]
        hashed = json.dumps([self.fingerprint, size, bucket._rows.tolist()])
        bucket.fingerprint = hashlib.sha256(hashed.encode()).hexdigest()
        return bucket

    def _contents(self, indices: list[int]) -> Sequence[bytes]:
        with in_one_line(f"{self._where}: a record in {min(indices)}..{max(indices)} is damaged"):
            contents = self._source.__getitems__(indices)  # one call: ten times as fast as one by one
        if empty := [index for index, content in zip(indices, contents) if not content]:
            raise InputError(f"{self._where}: example {empty[0]} cannot be read: its file is truncated")
        return contents

    def _decode(self, index: int, content: bytes) -> dict[str, np.ndarray]:
        label, segments, caption = (self._keys[usual] for usual in ("label", "segments", "caption"))
        with in_one_line(f"{self._where}: example {index} cannot be read"):
            example = self._features.deserialize_example_np(content, decoders=self._decoders or None)
            example |= {key: decode(example[key]) for key in self._decoders}
            arrays = {"x": fit(example[self._keys["image"]], **self._fit)}
            if segments:
                place = {"size": self._fit["size"], "crop": self._fit["crop"]}
                arrays["segments"] = fit_segments(example[segments], **place)
        if caption:
            arrays["label"] = np.int32(self._label_of[read_captions(self._features[caption], example[caption])])
        elif label:
            arrays["label"] = np.int32(example[label])
            if arrays["label"] < 0:
                raise InputError(f"{self._where}: example {index} has no label: use label_key=none")
        return arrays

    def load(self) -> dict[str, np.ndarray]:
        """All examples in order, as `self[range(N)]` but by one thread per core and with a progress bar."""
        arrays = {"x": np.empty(self.shape, np.uint8)}
        if self.class_names:
            arrays["label"] = np.empty(len(self), np.int32)
        if self._keys["segments"]:
            arrays["segments"] = np.empty((*self.shape[:3], 1), np.uint8)

        def read(start: int) -> int:
            chunk = self[range(start, min(start + CHUNK, len(self)))]
            for name, values in chunk.items():
                arrays[name][start : start + CHUNK] = values
            return len(chunk["x"])

        bar = tqdm(desc=f"Reading {self._where}", total=len(self), delay=3, leave=False, disable=None)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for count in pool.map(read, range(0, len(self), CHUNK)):
                bar.update(count)
        return arrays


def split_sizes(folder: Path) -> dict[str, int]:
    """The number of examples of each split of a prepared data set; InputError if it cannot be read."""
    with in_one_line(f"{folder}: not a prepared TFDS data set"):
        info = tfds.builder_from_directory(folder).info
    return {name: split.num_examples for name, split in info.splits.items()}


def _check_arguments(image_size: int | None, channels: int | None, crop: str) -> None:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size}: it is the height and width in pixels, at least 1")
    if channels not in (None, *MODES):
        raise InputError(f"channels={channels}: images have 1 (grey) or 3 (colour)")
    if crop not in CROPS:
        raise InputError(f"crop={crop!r} is not one of {', '.join(CROPS)}")


def _open(folder: Path, split: str) -> tuple[Any, Sequence[bytes]]:
    """TFDS's description of a prepared data set, and the raw records of a split."""
    with in_one_line(f"{folder}: not a prepared TFDS data set"):
        builder = tfds.builder_from_directory(folder)
        format_ = builder.info.file_format.value
    if format_ != "array_record":
        raise InputError(
            f"{folder} is prepared as {format_}, which has no random access: prepare it with file_format=array_record"
        )
    splits = ", ".join(f"{name} ({info.num_examples})" for name, info in builder.info.splits.items())
    with in_one_line(f"{folder}: no split {split!r} to read; there is {splits}"):
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        source[0]  # opens the file
    return builder.info, source


def _values(folder: Path, split: str, key: str) -> Iterator[Any]:
    """The values of one feature over the examples of a split."""
    info, source = _open(folder, split)
    feature = tfds.features.FeaturesDict({key: info.features[key]})
    for start in range(0, len(source), CHUNK):
        for content in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            yield feature.deserialize_example_np(content)[key]


@lru_cache(maxsize=2)  # for all splits of a data set: a pass reads the images too
def _captions(folder: Path, key: str, fingerprint: str) -> tuple[tuple[tuple[str, ...], ...], dict[str, np.ndarray]]:
    """The different captions of all splits, sorted, and for each record file the index of those of each example.

    `fingerprint` is of all files: of files that have changed the captions are read again.
    """
    info, _ = _open(folder, "all")
    values = [read_captions(info.features[key], value) for value in _values(folder, "all", key)]
    different = tuple(sorted(set(values)))
    label_of, files = {captions: i for i, captions in enumerate(different)}, info.splits["all"].file_instructions
    labels = np.array([label_of[captions] for captions in values], np.int32)
    parts = np.split(labels, np.cumsum([file.take for file in files])[:-1])
    return different, {file.filename: part for file, part in zip(files, parts, strict=True)}


def _choose(features: Any, key: str, usual: str, where: str) -> str | None:
    """The feature of a key: a name, "none", or "auto" for the usual name (or its plural), else the only candidate."""
    if key == "none" and usual != "image":
        return None
    candidates = sorted(name for name, feature in features.items() if CANDIDATES[usual](feature))
    if key == "auto":
        preferred = [name for name in (usual, f"{usual}s") if name in candidates] or candidates
        if len(preferred) > 1 and usual not in preferred:
            raise InputError(f"{where} has several: set {usual}_key to one of {', '.join(candidates)}")
        if not preferred and usual in ("image", "caption", "group"):
            raise InputError(f"{where} has no {usual}, only {', '.join(sorted(features))}")
        return next(iter(preferred), None)
    if key not in candidates:
        raise InputError(f"{usual}_key={key!r}: no such {usual} in {where}; there is {', '.join(candidates) or 'none'}")
    return key


def _is_image(feature: Any) -> bool:
    """An encoded image, or an array of bytes, [H, W] or [H, W, C]."""
    if isinstance(feature, tfds.features.Image):
        return feature.np_dtype != np.float32  # TFDS stores those as the bytes of an RGBA image
    return isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8 and len(feature.shape) in (2, 3)


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, tfds.features.ClassLabel) and feature.num_classes is not None


def _is_scalar(feature: Any) -> bool:
    """A text, a class or a number."""
    return isinstance(feature, tfds.features.Tensor) and feature.shape == ()


# The usual name of a feature -> whether a feature can be that.
CANDIDATES = {"image": _is_image, "label": _is_class_label, "segments": _is_image}
CANDIDATES |= {"caption": has_captions, "group": _is_scalar}


def _fingerprint(instructions: Sequence[Any], arguments: list) -> str:
    """A hash of the arguments and record files, without reading all of these."""
    digest = hashlib.sha256(json.dumps(arguments).encode())
    for file in instructions:
        path = Path(file.filename)
        digest.update(f"{path.name} {path.stat().st_size} {file.skip} {file.take}".encode())
        with path.open("rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
            digest.update(content.read())  # the end holds the index: where each record begins
    return digest.hexdigest()
